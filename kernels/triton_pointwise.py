"""Triton kernels of pointwise.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from planner.kernels.op import like

_BLOCK = 2048


@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, cols, BLOCK: tl.constexpr):
    """One program per (row, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < cols
    g = tl.load(gate_ptr + row * gate_stride + col, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + row * up_stride + col, mask=inside, other=0.0).to(tl.float32)
    out = g * tl.sigmoid(g) * u
    tl.store(out_ptr + row * cols + col, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, dy_stride, gate_stride, up_stride, cols, BLOCK: tl.constexpr
):
    """One program per (row, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < cols
    d = tl.load(dy_ptr + row * dy_stride + col, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate_ptr + row * gate_stride + col, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + row * up_stride + col, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    dgate = d * u * s * (1.0 + g * (1.0 - s))
    tl.store(dgate_ptr + row * cols + col, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + row * cols + col, (d * g * s).to(dup_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rope_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, tokens, length, heads, half,
    BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One program per token: its angles are loaded once for all heads."""
    token = tl.program_id(0)
    angle = (token % length) * half + tl.arange(0, HALF)
    lane = tl.arange(0, HALF)
    c = tl.load(cos_ptr + angle, mask=lane < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin_ptr + angle, mask=lane < half, other=0.0).to(tl.float32)[None, :]
    if BACK:
        s = -s
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)
        at = (token.to(tl.int64) * heads + head)[:, None] * (2 * half) + lane[None, :]
        inside = (head < heads)[:, None] & (lane < half)[None, :]
        a = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + at + half, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, (a * c - b * s).to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(out_ptr + at + half, (b * c + a * s).to(out_ptr.dtype.element_ty), mask=inside)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """A (rows, columns) form with contiguous rows: a view where strides allow (halves of one projection do)."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The op swiglu."""
    out, g, u = like(gate), _rows(gate), _rows(up)
    rows, cols = g.shape
    block = min(_BLOCK, triton.next_power_of_2(cols))
    if rows:
        swiglu_kernel[(rows, triton.cdiv(cols, block))](
            g, u, out, g.stride(0), u.stride(0), cols, BLOCK=block, num_warps=8
        )
    return out


def swiglu_backward(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The op swiglu_backward."""
    dgate, dup, d, g, u = like(gate), like(up), _rows(dy), _rows(gate), _rows(up)
    rows, cols = g.shape
    block = min(_BLOCK, triton.next_power_of_2(cols))
    if rows:
        swiglu_backward_kernel[(rows, triton.cdiv(cols, block))](
            d, g, u, dgate, dup, d.stride(0), g.stride(0), u.stride(0), cols, BLOCK=block, num_warps=8
        )
    return dgate, dup


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool) -> torch.Tensor:
    """The op rope."""
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    batch, length, heads, dim = x.shape
    out, half = like(x), triton.next_power_of_2(dim // 2)
    if x.numel():
        rope_kernel[(batch * length,)](
            x, cos, sin, out, batch * length, length, heads, dim // 2,
            BACK=back, HEADS=min(triton.next_power_of_2(heads), max(1, _BLOCK // half)), HALF=half, num_warps=4,
        )  # fmt: skip
    return out
