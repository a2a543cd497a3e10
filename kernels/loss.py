"""Vocabulary-parallel cross-entropy: one collective, 6 bytes per bf16 logit, and a form without logits.

Every rank holds the columns [vocab_start, vocab_start + V) of the logits. With m = max x, s = sum exp(x - m) and t the
target's logit (0 elsewhere) of its part, one all-gather of (m, s, t), 12 bytes a row, gives every rank
lse = M + log sum_r s_r exp(m_r - M) and loss = lse - sum_r t_r; backward is local: grad (exp(x - lse) - onehot).
(Shoeybi et al. 2019, arXiv 1909.08053, section 3, has the same with more collectives; Yeung et al. 2024, arXiv
2411.05288, section 4, places it in a pipeline.)
The chunked form computes logits, loss and gradients chunk by chunk of rows in forward, 6 N H V FLOPs, nothing twice
(Liger: Hsu et al. 2024, arXiv 2410.10989, section 3.2), the collective of a chunk under the product of the next.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard

from planner.kernels.collective import finish, start_gather
from planner.kernels.op import Work, define, lazily, like, nbytes, precise, streamed

IGNORE_INDEX = -100
PRODUCT_BYTES = 2**27  # of a product on its way into the weight's gradient: a whole one may outweigh chunks of logits


def _stats(logits: torch.Tensor, target: torch.Tensor, vocab_start: int) -> torch.Tensor:
    x = precise(logits)
    m = x.amax(dim=-1)
    s = (x - torch.where(m == -torch.inf, 0, m).unsqueeze(-1)).exp().sum(dim=-1)
    local = target - vocab_start
    owned = (local >= 0) & (local < x.shape[-1])
    t = x.gather(-1, local.clamp(0, x.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    return torch.stack([m, s, torch.where(owned, t, 0)], dim=-1)


def _grad(
    logits: torch.Tensor, target: torch.Tensor, lse: torch.Tensor, scale: torch.Tensor, vocab_start: int
) -> torch.Tensor:
    p = (precise(logits) - lse.unsqueeze(-1)).exp()
    local = target - vocab_start
    owned = (local >= 0) & (local < p.shape[-1])
    hit = torch.where(owned, -1.0, 0.0).to(p.dtype)
    p.scatter_add_(-1, local.clamp(0, p.shape[-1] - 1).unsqueeze(-1), hit.unsqueeze(-1))
    # A row without weight has gradient 0 even where its lse is not finite.
    return torch.where(scale.unsqueeze(-1) == 0, 0, p * scale.unsqueeze(-1)).to(logits.dtype)


def _grad_(
    logits: torch.Tensor, target: torch.Tensor, lse: torch.Tensor, scale: torch.Tensor, vocab_start: int
) -> None:
    logits.copy_(_grad(logits, target, lse, scale, vocab_start))


def _stats_fake(logits: torch.Tensor, target: torch.Tensor, vocab_start: int) -> torch.Tensor:
    return logits.new_empty((logits.shape[0], 3), dtype=torch.promote_types(logits.dtype, torch.float32))


def _stats_work(logits: torch.Tensor, target: torch.Tensor, vocab_start: int, out: torch.Tensor) -> Work:
    return streamed((logits, target), out, 4 * logits.numel())  # compare, subtract, exp, add


def _grad_work(logits: torch.Tensor, *rest: Any, out: Any = None) -> Work:
    read = nbytes(logits, *rest[:3])
    return Work(flops=4 * logits.numel(), read_bytes=read, written_bytes=nbytes(logits), kernels=1)


def _combine(
    stats: torch.Tensor, target: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, log-sum-exp, 1 or 0 where ignored) per row of gathered statistics (ranks, rows, 3)."""
    m, s, t = stats.unbind(dim=-1)
    top = m.amax(dim=0)
    safe = torch.where(top == -torch.inf, 0, top)
    lse = safe + (s * (m - safe).exp()).sum(dim=0).log()
    kept = target != ignore_index
    return torch.where(kept, lse - t.sum(dim=0), 0), lse, kept.to(lse.dtype)


def _by_rows(*args: Any) -> Any:
    return [([Shard(0)], [Shard(0)] * 4)]


ce_stats = define(
    "ce_stats", _stats, fake=_stats_fake, work=_stats_work, sharding=_by_rows,
    kernels={"ours": lazily("triton_ce", "stats")},
)  # fmt: skip
ce_grad = define(
    "ce_grad", _grad, fake=lambda logits, *rest: like(logits), work=_grad_work, sharding=_by_rows,
    kernels={"ours": lazily("triton_ce", "grad")},
)  # fmt: skip
ce_grad_ = define(
    "ce_grad_", _grad_, fake=lambda *args: None, work=_grad_work, mutates=("logits",),
    sharding=lambda *args: [([], [Shard(0)] * 4)], kernels={"ours": lazily("triton_ce", "grad_")},
)  # fmt: skip

ce_combine = define(
    "ce_combine", _combine, fake=lambda stats, *rest: tuple(stats.new_empty(stats.shape[1]) for _ in range(3)),
    work=lambda stats, target, ignore_index, out: streamed((stats, target), out),
    sharding=lambda *args: [([Shard(0)] * 3, [Shard(1), Shard(0), None])],
    kernels={"ours": lazily("triton_ce", "combine")},
)  # fmt: skip


def _start(logits: Any, target: Any, vocab_start: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Statistics (ranks, rows, 3) of every rank, on their way."""
    stats = ce_stats(logits, target, vocab_start)
    return stats.unsqueeze(0) if group is None else start_gather(stats, group)


def _arrived(gathered: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    return gathered if group is None else finish(gathered, group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Any, target: Any, vocab_start: int, group: Any, ignore_index: int) -> Any:
        loss, lse, kept = ce_combine(_arrived(_start(logits, target, vocab_start, group), group), target, ignore_index)
        ctx.save_for_backward(logits, target, lse, kept)
        ctx.vocab_start = vocab_start
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        logits, target, lse, kept = ctx.saved_tensors
        return ce_grad(logits, target, lse, kept * grad, ctx.vocab_start), None, None, None, None


def cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, *, vocab_start: int = 0, group: dist.ProcessGroup | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> torch.Tensor:  # fmt: skip
    """Loss per row (rows,), float32, of this rank's logits (rows, V) and global targets; ignored rows lose 0.

    The same on every rank of `group`, and so must be its gradient; None: the whole vocabulary is here.
    """
    return _CrossEntropy.apply(logits, target, vocab_start, group, ignore_index)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Any, weight: Any, target: Any, vocab_start: int, group: Any, ignore_index: int, chunk_rows: int,
        grads: bool,
    ) -> Any:  # fmt: skip
        loss, dx = [], torch.empty_like(x)
        dw = torch.zeros_like(weight, dtype=torch.promote_types(x.dtype, torch.float32)) if grads else None
        pending = None
        for rows in zip(x.split(chunk_rows), target.split(chunk_rows), dx.split(chunk_rows), strict=True):
            logits = rows[0] @ weight.t()
            chunk = (logits, _start(logits, rows[1], vocab_start, group), *rows)
            del logits
            if group is None:  # nothing is on its way under the next product
                pending, chunk = chunk, None
            if pending is not None:
                loss.append(_finish_chunk(*pending, group, weight, dw, vocab_start, ignore_index))
            pending, chunk = chunk, None
        if pending is not None:
            loss.append(_finish_chunk(*pending, group, weight, dw, vocab_start, ignore_index))
        if dw is not None:
            ctx.save_for_backward(dx, dw.to(weight.dtype))
        return torch.stack(loss).sum() if loss else x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        dx, dw = (_scaled(d, grad) for d in ctx.saved_tensors)
        return dx, dw, None, None, None, None, None, None


def _scaled(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """`x` times the number `by`, which is not rounded to the type of `x`: every gradient would be off by that."""
    return torch.mul(x, by.reshape(1), out=torch.empty_like(x))


def _finish_chunk(
    logits: Any, gathered: Any, x: Any, target: Any, dx: Any, group: Any, weight: Any, dw: Any, vocab_start: int,
    ignore_index: int,
) -> torch.Tensor:  # fmt: skip
    """Loss of a chunk whose statistics are gathered; its logits become their gradient, then dx and dw."""
    loss, lse, kept = ce_combine(_arrived(gathered, group), target, ignore_index)
    if dw is not None:
        ce_grad_(logits, target, lse, kept, vocab_start)
        torch.mm(logits, weight, out=dx)
        _add_product(dw, logits, x)
    return loss.sum()


def _add_product(dw: torch.Tensor, grad: torch.Tensor, x: torch.Tensor) -> None:
    """Dw += grad^T x: inside the product, or where x has 16 bits in float32 behind it, some rows of dw at a time."""
    if dw.dtype == x.dtype:
        torch.addmm(dw, grad.t(), x, out=dw)
        return
    rows = max(PRODUCT_BYTES // (x.element_size() * x.shape[1]), 1)
    for part, columns in zip(dw.split(rows), grad.split(rows, dim=1), strict=True):
        part.add_(columns.t() @ x)


def linear_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, *, chunk_rows: int = 2048, vocab_start: int = 0,
    group: dist.ProcessGroup | None = None, ignore_index: int = IGNORE_INDEX,
) -> torch.Tensor:  # fmt: skip
    """Summed loss of x (rows, H) @ weight (V, H)^T, holding one chunk of logits, in a group of ranks two.

    x is the same on every rank of `group` and weight is its part of the vocabulary, as in `cross_entropy`. The
    gradient of x is this rank's part of a sum over the group: its all-reduce or reduce-scatter is the caller's.
    Gradients are computed in forward and scaled in backward; dw is summed over chunks in float32.
    """
    grads = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(x, weight, target, vocab_start, group, ignore_index, chunk_rows, grads)
