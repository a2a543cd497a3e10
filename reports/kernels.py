"""`python -m planner.reports.kernels`: what every kernel moves and launches, counted, beside torch's; needs no GPU.

Writes kernels.md beside this file. Bytes, kernels and collectives are those of the dispatched operations (ours by the
formulas of planner.kernels, torch's with each tensor moved once), forward plus backward, at the shapes of
kernel_cases.py. Nothing is timed.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.distributed.tensor.parallel import loss_parallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from planner.kernels import gla, loss
from planner.kernels.counters import WorkCounter
from planner.reports.kernel_cases import CASES, Call, Case
from planner.reports.kernel_extras import LINEAR_SIZES, memory_row

PATH = Path(__file__).with_name("kernels.md")
RANKS = 8
_LARGE_FRAC = 0.02  # of the bytes of a pass: what a kernel moves that works on the data, not on a number a row

_ABOUT = """\
Written by `python -m planner.reports.kernels` on a CPU: bytes of device memory moved per element of the first input
(per logit for linear_cross_entropy), forward plus backward where there is one, and kernels launched; in brackets those
that work on the data and not on a number a row. torch: eager, each operation its own kernel; torch.compile fuses some
and is not counted, and on a GPU torch has a kernel of its own for rms_norm, which a CPU takes apart. ring_step counts
the empty start that it continues from; torch's row is one attention that continues from nothing. Nothing here is a
time: `python -m planner.reports.kernel_bench` measures, on a GPU."""


class Counter(WorkCounter):
    """WorkCounter that keeps every kernel's bytes and leaves out what DTensor runs only to learn shapes."""

    def __init__(self, fakes_count: bool) -> None:
        super().__init__()
        self.fakes_count = fakes_count
        self.each_bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.fakes_count and any(issubclass(t, FakeTensor) for t in types):
            return func(*args, **(kwargs or {}))
        before = self.total
        out = super().__torch_dispatch__(func, types, args, kwargs)
        launched = self.total.kernels - before.kernels
        if launched:
            self.each_bytes += [(self.total.moved_bytes - before.moved_bytes) // launched] * launched
        return out

    @property
    def large(self) -> int:
        """Kernels that work on the data itself."""
        return sum(b >= _LARGE_FRAC * self.total.moved_bytes for b in self.each_bytes)


def _local(call: Call, inputs: tuple[torch.Tensor, ...], leaves: int, backward: bool) -> Counter:
    """What `call(*inputs)`, and with `backward` the gradients of the first `leaves`, dispatches on fake tensors."""
    used = [x.detach().requires_grad_(backward and i < leaves) for i, x in enumerate(inputs)]
    with Counter(True) as counted:
        outs = call(*used)
    outs = (outs,) if isinstance(outs, torch.Tensor) else outs
    if backward:
        grads = [torch.ones_like(o) for o in outs]
        with counted:
            torch.autograd.grad(outs, [x for x in used if x.requires_grad], grads)
    return counted


def _local_row(case: Case) -> str:
    with FakeTensorMode():
        inputs = case.inputs("cpu", False)
        leaves = len(inputs) if case.differentiable is None else case.differentiable
        ours, plain = (_local(c, inputs, leaves, case.backward) for c in (case.ours, case.plain))
        per = [c.total.moved_bytes / case.units(*inputs) for c in (ours, plain)]
    kernels = [f"{c.total.kernels} ({c.large})" for c in (ours, plain)]
    return f"| {case.name} | {per[0]:.1f} | {per[1]:.1f} | {kernels[0]} | {kernels[1]} |"


def _spread_row(name: str, elements: int, unit: str, run: Callable[[], object]) -> str:
    run()  # DTensor learns its shapes
    with Counter(False) as c:
        run()
    moved = f"{c.total.moved_bytes / elements:.1f} a {unit}"
    return f"| {name} | {moved} | {c.total.kernels} ({c.large}) | {c.collectives} | {c.sent_bytes:,} |"


def _spread_rows() -> list[str]:
    """Cross-entropy of a vocabulary over the ranks beside torch's loss_parallel; linear attention by LASP-2."""
    logits, target = torch.zeros(64, 8192, dtype=torch.bfloat16).requires_grad_(), torch.zeros(64, dtype=torch.int64)
    parts = [torch.zeros(1, 512, 4, 64, dtype=torch.bfloat16).requires_grad_() for _ in range(4)]
    group = dist.group.WORLD
    mesh = init_device_mesh("cpu", (RANKS,))
    everywhere = DTensor.from_local(target, mesh, [Replicate()], run_check=False)

    def ours() -> object:
        return torch.autograd.grad(loss.cross_entropy(logits, target, group=group).sum(), logits)

    def torchs() -> object:
        whole = DTensor.from_local(logits, mesh, [Shard(1)], run_check=False)
        with loss_parallel():
            return torch.autograd.grad(F.cross_entropy(whole.float(), everywhere, reduction="sum"), logits)

    def states() -> object:
        return torch.autograd.grad(gla.gated_linear_attention(*parts, group=group)[0].sum(), parts)

    return [
        _spread_row("cross_entropy, ours", logits.numel(), "logit", ours),
        _spread_row("cross_entropy, torch's loss_parallel", logits.numel(), "logit", torchs),
        _spread_row("gla, ours", parts[0].numel(), "element of q", states),
    ]


def _memory_line() -> str:
    """Most memory of the chunked loss at its case's shapes, on fake tensors."""
    with FakeTensorMode():
        found = memory_row("cpu", *LINEAR_SIZES)
    rows, width, vocab, chunk_rows = LINEAR_SIZES
    return (
        f"linear_cross_entropy of {rows:,} rows of {width:,} over a vocabulary of {vocab:,}, in chunks of "
        f"{chunk_rows:,} rows, forward and backward, holds at most {found['extra_bytes'] / 2**20:,.0f} MiB beside its "
        f"inputs and their gradients, {found['extra_chunks']:.1f} chunks of logits. The float32 sum of the weight's "
        f"gradient is {found['weight_sum_chunks']:.1f} of them; of logits there is one at most, over ranks two."
    )


def text() -> str:
    """The report."""
    local = [_local_row(case) for case in CASES if case.plain_is_peer]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    try:
        spread = _spread_rows()
    finally:
        dist.destroy_process_group()
    return "\n".join([
        "# Kernels, counted", "",
        *_ABOUT.splitlines(), "",
        "| kernel | ours, B | torch, B | ours, kernels | torch, kernels |", "|---|---|---|---|---|", *local, "",
        *textwrap.wrap(_memory_line(), 120), "",
        f"Over {RANKS} ranks, one rank's share; bytes sent are those of the tensors that it hands to a collective.", "",
        "| kernel | B | kernels | collectives | bytes sent |", "|---|---|---|---|---|", *spread, "",
    ])  # fmt: skip


def main() -> int:
    """Write the report."""
    PATH.write_text(text())
    print(PATH.read_text(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
