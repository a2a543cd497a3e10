"""What every op has to pass: opcheck, one traced node, torch.compile, FLOPs as its formula says."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from planner.kernels.op import FORMULAS, NAMESPACE


def check_op(op: Any, args: tuple[Any, ...]) -> None:
    """opcheck of the schema, fake and autograd; FLOPs counted by torch equal the formula; compile keeps one call."""
    packet = op._opoverload._overloadpacket
    torch.library.opcheck(op, args)
    with FlopCounterMode(display=False) as counter:
        out = op(*args)
    work = FORMULAS[packet](*args, out=out)
    assert counter.get_total_flops() == work.flops
    assert min(work.read_bytes, work.written_bytes, work.kernels) >= 0
    if op._opoverload._schema.is_mutable:
        return
    traced = make_fx(lambda *a: op(*a), tracing_mode="fake")(*args)
    ours = [n for n in traced.graph.nodes if n.op == "call_function" and NAMESPACE in str(n.target)]
    assert len(ours) == 1


def check_compiles(call: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> None:
    """`call(*inputs)` and the gradients of its sum are the same under torch.compile(fullgraph=True)."""
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # dynamo instantiates autograd.Function itself
        traced = value_and_grads(compiled, *inputs)
    for got, want in zip(traced, value_and_grads(call, *inputs), strict=True):
        torch.testing.assert_close(got, want)


def value_and_grads(call: Callable[..., Any], *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Outputs, then the gradients of the sum of all outputs weighted by a fixed pattern."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = call(*leaves)
    outs = [out] if isinstance(out, torch.Tensor) else list(out)
    total = sum((o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in outs)
    total.backward()
    return [*(o.detach() for o in outs), *(x.grad for x in leaves if x.requires_grad)]


def max_error(got: torch.Tensor, want: torch.Tensor, floor: float = 0.0) -> float:
    """Largest error relative to the largest value, or to `floor`; infinite where only one is finite."""
    got, want = got.double(), want.double()
    if not torch.equal(got.isfinite(), want.isfinite()):
        return float("inf")
    finite = want.isfinite()
    scale = want[finite].abs().max().item() if finite.any() else 0.0
    return ((got - want)[finite].abs().max().item() / max(scale, floor, 1e-30)) if finite.any() else 0.0
