"""Triton kernels of norm.py: a tile of whole rows per program; backward keeps dweight in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from planner.kernels.op import like

MAX_COLS = 16384  # a row must fit in one tile
_TILE = 4096


@triton.jit
def forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, h_ptr, rstd_ptr, rows, cols, eps,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per tile of ROWS whole rows; ADD: h = x + residual is stored and normed as stored."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    at = row.to(tl.int64)[:, None] * cols + col[None, :]
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + at, rounded, mask=inside)
        x = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / cols + eps)
    weight = tl.load(weight_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
    y = x * rstd[:, None] * weight[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def backward_kernel(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr, rows, cols,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program p handles tiles p, p + programs, ... and writes its sum of dweight to row p of `partial`."""
    col = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * cols + col[None, :]
        inside = (row < rows)[:, None] & (col < cols)[None, :]
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        n = h * rstd[:, None]
        g = dy * weight[None, :]
        dx = rstd[:, None] * (g - n * (tl.sum(g * n, axis=1) / cols)[:, None])
        if ADD:
            dx += tl.load(dh_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dw += tl.sum(dy * n, axis=0)
    tl.store(partial_ptr + tl.program_id(0) * cols + col, dw, mask=col < cols)


def _tile(cols: int) -> tuple[int, int, int]:
    """(rows, padded columns, warps) of a tile."""
    if cols > MAX_COLS:
        raise ValueError(f"rows of {cols} values; the Triton RMSNorm takes at most {MAX_COLS}, choose 'torch'")
    block = triton.next_power_of_2(cols)
    rows = max(1, _TILE // block)
    return rows, block, 8 if rows * block <= 2 * _TILE else 16


def _forward(x, residual, weight, eps):
    x = x.contiguous()
    cols = x.shape[-1]
    rows = x.numel() // cols
    y, rstd = like(x), torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    h = x if residual is None else like(x)
    residual = x if residual is None else residual.contiguous()
    tile, block, warps = _tile(cols)
    if rows:
        forward_kernel[(triton.cdiv(rows, tile),)](
            x, residual, weight, y, h, rstd, rows, cols, eps,
            ADD=h is not x, ROWS=tile, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return y, rstd, h


def rms_norm(h: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The op rms_norm."""
    return _forward(h, None, weight, eps)[:2]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op add_rms_norm."""
    return _forward(x, residual, weight, eps)


def rms_norm_backward(
    dy: torch.Tensor, dh: torch.Tensor | None, h: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op rms_norm_backward."""
    dy, h, rstd = dy.contiguous(), h.contiguous(), rstd.contiguous()
    cols = h.shape[-1]
    rows = h.numel() // cols
    dx = like(h)
    tile, block, warps = _tile(cols)
    most = 2 * torch.cuda.get_device_properties(h.device).multi_processor_count if h.is_cuda else 3
    programs = max(1, min(triton.cdiv(rows, tile), most))
    partial = torch.empty((programs, cols), dtype=torch.float32, device=h.device)
    backward_kernel[(programs,)](
        dy, dy if dh is None else dh.contiguous(), h, weight, rstd, dx, partial, rows, cols,
        ADD=dh is not None, ROWS=tile, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return dx, partial.sum(dim=0).to(weight.dtype)
