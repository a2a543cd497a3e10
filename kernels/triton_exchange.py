"""Triton kernels of exchange.py: rows moved for Ulysses, rows gathered and summed for MoE."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from planner.kernels.op import like

_MAX_BLOCK = 1024
_TILE = 4096  # elements of a program


@triton.jit
def swap_kernel(x_ptr, out_ptr, outer, inner, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(outer, inner, width) to (inner, outer, width), a tile of rows and columns a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < outer * inner)[:, None] & (col < width)[None, :]
    source = (row % outer) * inner + row // outer
    x = tl.load(x_ptr + source[:, None] * width + col[None, :], mask=inside)
    tl.store(out_ptr + row[:, None] * width + col[None, :], x, mask=inside)


@triton.jit
def gather_kernel(x_ptr, order_ptr, out_ptr, rows, top_k, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Row i of out is the token of copy order[i]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = row < rows
    token = tl.load(order_ptr + row, mask=here, other=0) // top_k
    inside = here[:, None] & (col < width)[None, :]
    x = tl.load(x_ptr + token[:, None] * width + col[None, :], mask=inside)
    tl.store(out_ptr + row[:, None] * width + col[None, :], x, mask=inside)


@triton.jit
def combine_kernel(y_ptr, place_ptr, weight_ptr, out_ptr, top_k, width, BLOCK: tl.constexpr):
    """A token's copies, wherever they lie, summed by their weights in float32."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < width
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(0, top_k):
        place = tl.load(place_ptr + token * top_k + k)
        weight = tl.load(weight_ptr + token * top_k + k).to(tl.float32)
        total += weight * tl.load(y_ptr + place * width + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + col, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def split_kernel(
    dx_ptr, y_ptr, order_ptr, weight_ptr, dy_ptr, dw_ptr, top_k, width, BLOCK: tl.constexpr
):
    """Gradients of one copy and of its weight."""
    row = tl.program_id(0).to(tl.int64)
    copy = tl.load(order_ptr + row)
    weight = tl.load(weight_ptr + copy).to(tl.float32)
    dot = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        inside = col < width
        grad = tl.load(dx_ptr + copy // top_k * width + col, mask=inside, other=0.0).to(tl.float32)
        dot += grad * tl.load(y_ptr + row * width + col, mask=inside, other=0.0).to(tl.float32)
        tl.store(dy_ptr + row * width + col, (grad * weight).to(dy_ptr.dtype.element_ty), mask=inside)
    tl.store(dw_ptr + copy, tl.sum(dot, axis=0).to(dw_ptr.dtype.element_ty))


def _tile(rows: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """(grid, constants) of a kernel over rows and columns."""
    block = min(_MAX_BLOCK, triton.next_power_of_2(width))
    tall = min(max(1, _TILE // block), triton.next_power_of_2(rows))
    return (triton.cdiv(rows, tall), triton.cdiv(width, block)), {"ROWS": tall, "BLOCK": block}


def _swapped(x: torch.Tensor, out: torch.Tensor, outer: int, inner: int) -> torch.Tensor:
    if x.numel():
        width = x.numel() // (outer * inner)
        grid, constants = _tile(outer * inner, width)
        swap_kernel[grid](x.contiguous(), out, outer, inner, width, **constants, num_warps=4)
    return out


def pack_heads(x: torch.Tensor, ranks: int) -> torch.Tensor:
    """The op pack_heads."""
    batch, length, heads, dim = x.shape
    return _swapped(x, x.new_empty((ranks, batch, length, heads // ranks, dim)), batch * length, ranks)


def unpack_heads(x: torch.Tensor) -> torch.Tensor:
    """The op unpack_heads."""
    ranks, batch, length, heads, dim = x.shape
    return _swapped(x, x.new_empty((batch, length, ranks * heads, dim)), ranks, batch * length)


def pack_sequence(x: torch.Tensor, ranks: int) -> torch.Tensor:
    """The op pack_sequence."""
    batch, length, heads, dim = x.shape
    return _swapped(x, x.new_empty((ranks, batch, length // ranks, heads, dim)), batch, ranks)


def unpack_sequence(x: torch.Tensor) -> torch.Tensor:
    """The op unpack_sequence."""
    ranks, batch, length, heads, dim = x.shape
    return _swapped(x, x.new_empty((batch, ranks * length, heads, dim)), ranks, batch)


def moe_permute(
    x: torch.Tensor, experts: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op moe_permute; the sort is torch's."""
    flat = experts.reshape(-1)
    order = flat.argsort(stable=True)
    out = x.new_empty((flat.numel(), x.shape[1]))
    if out.numel():
        grid, constants = _tile(*out.shape)
        gather_kernel[grid](
            x.contiguous(), order, out, out.shape[0], experts.shape[1], out.shape[1], **constants, num_warps=4
        )
    return out, order, torch.bincount(flat, minlength=num_experts)


def moe_unpermute(y: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The op moe_unpermute."""
    tokens, top_k = weights.shape
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    out = y.new_empty((tokens, y.shape[1]))
    if out.numel():
        block = min(_MAX_BLOCK, triton.next_power_of_2(y.shape[1]))
        combine_kernel[(tokens, triton.cdiv(y.shape[1], block))](
            y.contiguous(), place, weights.contiguous(), out, top_k, y.shape[1], BLOCK=block, num_warps=4
        )
    return out


def moe_unpermute_backward(
    dx: torch.Tensor, y: torch.Tensor, order: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op moe_unpermute_backward."""
    dy, dw = like(y), like(weights)
    if y.shape[0]:
        block = min(_MAX_BLOCK, triton.next_power_of_2(max(y.shape[1], 1)))
        split_kernel[(y.shape[0],)](
            dx.contiguous(), y.contiguous(), order, weights.contiguous(), dy, dw, weights.shape[1], y.shape[1],
            BLOCK=block, num_warps=4,
        )  # fmt: skip
    return dy, dw
