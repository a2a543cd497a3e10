"""Triton kernels of loss.py: statistics in one pass over the logits, gradients in one more, one to combine ranks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from planner.kernels.op import like

_MAX_BLOCK = 4096
_ROWS = 256


@triton.jit
def stats_kernel(x_ptr, target_ptr, out_ptr, row_stride, vocab_start, cols, BLOCK: tl.constexpr):
    """One program per row: running maximum and rescaled sum per lane, folded at the end."""
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * row_stride
    lane = tl.arange(0, BLOCK)
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + lane
        x = tl.load(x_row + col, mask=col < cols, other=float("-inf")).to(tl.float32)
        new_m = tl.maximum(m, x)
        safe = tl.where(new_m == float("-inf"), 0.0, new_m)
        s = s * tl.exp(m - safe) + tl.exp(x - safe)
        m = new_m
    top = tl.max(m, axis=0)
    total = tl.sum(s * tl.exp(m - tl.where(top == float("-inf"), 0.0, top)), axis=0)
    local = tl.load(target_ptr + row) - vocab_start
    owned = (local >= 0) & (local < cols)
    t = tl.load(x_row + tl.where(owned, local, 0), mask=owned, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * 3, top)
    tl.store(out_ptr + row * 3 + 1, total)
    tl.store(out_ptr + row * 3 + 2, t)


@triton.jit
def grad_kernel(
    x_ptr, out_ptr, target_ptr, lse_ptr, scale_ptr, row_stride, out_stride, vocab_start, cols, BLOCK: tl.constexpr
):
    """One program per (row, block of columns); x and out may be the same memory."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < cols
    lse = tl.load(lse_ptr + row)
    scale = tl.load(scale_ptr + row)
    local = tl.load(target_ptr + row) - vocab_start
    x = tl.load(x_ptr + row * row_stride + col, mask=inside, other=float("-inf")).to(tl.float32)
    grad = (tl.exp(x - lse) - tl.where(col == local, 1.0, 0.0)) * scale
    grad = tl.where(scale == 0.0, 0.0, grad)
    tl.store(out_ptr + row * out_stride + col, grad.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def combine_kernel(
    stats_ptr, target_ptr, loss_ptr, lse_ptr, kept_ptr, rows, ranks, ignore_index, BLOCK: tl.constexpr
):
    """BLOCK rows per program: running maximum and rescaled sum over the ranks."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = row < rows
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    t = tl.zeros([BLOCK], tl.float32)
    for rank in range(0, ranks):
        at = (rank * rows + row) * 3
        top = tl.load(stats_ptr + at, mask=here, other=float("-inf"))
        new_m = tl.maximum(m, top)
        safe = tl.where(new_m == float("-inf"), 0.0, new_m)
        s = s * tl.exp(m - safe) + tl.load(stats_ptr + at + 1, mask=here, other=0.0) * tl.exp(top - safe)
        t += tl.load(stats_ptr + at + 2, mask=here, other=0.0)
        m = new_m
    lse = tl.where(s > 0.0, m + tl.log(tl.where(s > 0.0, s, 1.0)), float("-inf"))
    kept = tl.load(target_ptr + row, mask=here, other=0) != ignore_index
    tl.store(loss_ptr + row, tl.where(kept, lse - t, 0.0), mask=here)
    tl.store(lse_ptr + row, lse, mask=here)
    tl.store(kept_ptr + row, kept.to(tl.float32), mask=here)


def stats(logits: torch.Tensor, target: torch.Tensor, vocab_start: int) -> torch.Tensor:
    """ce_stats of (rows, cols) logits whose rows are contiguous."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    rows, cols = logits.shape
    out = torch.empty((rows, 3), dtype=torch.float32, device=logits.device)
    block = min(_MAX_BLOCK, triton.next_power_of_2(cols))
    if rows:
        stats_kernel[(rows,)](logits, target, out, logits.stride(0), vocab_start, cols, BLOCK=block, num_warps=8)
    return out


def combine(
    stats: torch.Tensor, target: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op ce_combine."""
    ranks, rows, _ = stats.shape
    loss, lse, kept = (torch.empty(rows, dtype=torch.float32, device=stats.device) for _ in range(3))
    if rows:
        combine_kernel[(triton.cdiv(rows, _ROWS),)](
            stats.contiguous(), target.contiguous(), loss, lse, kept, rows, ranks, ignore_index, BLOCK=_ROWS,
            num_warps=4,
        )  # fmt: skip
    return loss, lse, kept


def _launch_grad(logits, out, target, lse, scale, vocab_start):
    rows, cols = logits.shape
    block = min(_MAX_BLOCK, triton.next_power_of_2(cols))
    if rows:
        grid = (rows, triton.cdiv(cols, block))
        strides = (logits.stride(0), out.stride(0))
        grad_kernel[grid](logits, out, target, lse, scale, *strides, vocab_start, cols, BLOCK=block, num_warps=8)


def grad(
    logits: torch.Tensor, target: torch.Tensor, lse: torch.Tensor, scale: torch.Tensor, vocab_start: int
) -> torch.Tensor:
    """ce_grad into a new tensor."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    out = like(logits)
    _launch_grad(logits, out, target, lse.contiguous(), scale.contiguous(), vocab_start)
    return out


def grad_(logits: torch.Tensor, target: torch.Tensor, lse: torch.Tensor, scale: torch.Tensor, vocab_start: int) -> None:
    """ce_grad in place."""
    if logits.stride(-1) != 1:
        raise ValueError("ce_grad_ needs logits whose rows are contiguous")
    _launch_grad(logits, logits, target, lse.contiguous(), scale.contiguous(), vocab_start)
