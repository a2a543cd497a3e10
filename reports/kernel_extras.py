"""What kernel_bench.py measures beside times of kernels: what a ring step adds to attention, the loss's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.distributed.tensor.parallel import loss_parallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from planner.kernels import loss, ring
from planner.runtime.memory import most_bytes

LINEAR_SIZES = (8192, 4096, 128256, 2048)  # rows, width, vocabulary, rows of a chunk: as in kernel_cases.py
Seconds = Callable[[Callable[[], object]], float]


@contextmanager
def one_rank() -> Iterator[None]:
    """Torch's loss_parallel on a mesh of one rank: its collectives send nothing, what it computes is real."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        with loss_parallel():
            yield
    finally:
        dist.destroy_process_group()


def torch_loss_parallel(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy a row of logits cut over the vocabulary, by torch; inside `one_rank`."""
    mesh = init_device_mesh(logits.device.type, (1,))
    cut = DTensor.from_local(logits, mesh, [Shard(1)], run_check=False)
    cut = cut.to(torch.promote_types(logits.dtype, torch.float32))
    everywhere = DTensor.from_local(target, mesh, [Replicate()], run_check=False)
    rows: torch.Tensor = F.cross_entropy(cut, everywhere, reduction="none").to_local()
    return rows


def ring_row(device: str, length: int, heads: int, dim: int, seconds: Seconds) -> dict[str, float]:
    """A step over one block of keys that all queries see, forward: ours, torch's attention alone, and torch's merge.

    `merge_ratio`: torch's merge of two partial results over what our step takes beyond torch's attention.
    """
    q, k, v = torch.randn(3, 1, heads, length, dim, device=device, dtype=torch.bfloat16).unbind(0)
    at = torch.arange(length, device=device, dtype=torch.int32)
    where = (at + length, at, torch.zeros_like(at), torch.zeros_like(at), dim**-0.5, True, length * length)
    out, lse = ring.ring_step(q, k, v, *ring.start(q), *where)
    block = F.scaled_dot_product_attention(q, k, v)
    wide = block.float()
    with torch.no_grad():
        step_s = seconds(lambda: ring.ring_step(q, k, v, out, lse, *where))
        bare_s = seconds(lambda: F.scaled_dot_product_attention(q, k, v))
        merge_s = seconds(lambda: ring.merge_partials(out, lse, wide, lse))
        merger = torch_merger(block, lse)
        torch_merge_s = seconds(lambda: merger.step(block, lse, partial=False))
    added_s = max(step_s - bare_s, 1e-9)
    return {
        "length": length, "step_s": step_s, "bare_s": bare_s, "merge_s": merge_s, "torch_merge_s": torch_merge_s,
        "overhead_frac": step_s / bare_s - 1, "merge_ratio": torch_merge_s / added_s,
    }  # fmt: skip


def torch_merger(out: torch.Tensor, lse: torch.Tensor) -> Any:
    """What merges partial results in torch's own context parallelism, with this one in it."""
    from torch.distributed.tensor.experimental._context_parallel._attention import _SDPAMerger

    merger = _SDPAMerger(True, 2)
    merger.step(out, lse, partial=False)
    return merger


def memory_row(device: str, rows: int, width: int, vocab: int, chunk_rows: int) -> dict[str, float]:
    """Most bytes of the chunked linear cross-entropy, both ways, beside its inputs and their gradients.

    `extra_chunks`: over those of a chunk of logits; `weight_sum_chunks`: the same of the sum of the weight's gradient
    in float32, which is there until it is converted.
    """
    x, w = (torch.randn(s, device=device, dtype=torch.bfloat16) for s in ((rows, width), (vocab, width)))
    target = torch.arange(rows, device=device) % vocab
    leaves = [x.requires_grad_(), w.requires_grad_()]

    def both() -> None:
        total = loss.linear_cross_entropy(*leaves, target, chunk_rows=chunk_rows)
        torch.autograd.grad(total, leaves)

    gradients = sum(t.nbytes for t in leaves)
    extra = most_bytes(torch.device(device), both, [*leaves, target]) - gradients
    chunk = 2 * min(chunk_rows, rows) * vocab
    return {
        "extra_bytes": extra, "chunk_bytes": chunk, "extra_chunks": extra / chunk,
        "weight_sum_chunks": 4 * w.numel() / chunk,
    }  # fmt: skip
