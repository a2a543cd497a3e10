"""Triton kernels of quantize.py: one pass each; int4 joins neighbouring values in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from planner.kernels.quantize import check_layout, packed_length

_TILE = 4096


@triton.jit
def _nearest_even(x):
    """Rounds |x| < 2^22 to the nearest integer, ties to even, by the float32 addition of 1.5 * 2^23."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def quantize_kernel(
    x_ptr, packed_ptr, scale_ptr, values, blocks,
    QMAX: tl.constexpr, INT4: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS blocks per program: their scales and their steps."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row.to(tl.int64)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + at, mask=at < values, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(x), axis=1) / QMAX
    tl.store(scale_ptr + row, scale, mask=row < blocks)
    steps = _nearest_even(tl.math.div_rn(x, tl.where(scale == 0.0, 1.0, scale)[:, None])).to(tl.int8)
    if INT4:
        low, high = tl.split(tl.reshape(steps, [ROWS, BLOCK // 2, 2]))
        byte = row.to(tl.int64)[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
        tl.store(packed_ptr + byte, (low & 15) | (high << 4), mask=(row < blocks)[:, None])
    else:
        tl.store(packed_ptr + at, steps, mask=(row < blocks)[:, None])


@triton.jit
def dequantize_sum_kernel(
    packed_ptr, scale_ptr, out_ptr, values, blocks, parts,
    INT4: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS blocks per program, summed over the parts."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < blocks
    at = row.to(tl.int64)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    stride = tl.full([1, 1], BLOCK // 2 if INT4 else BLOCK, tl.int64) * blocks  # of a part
    for part in range(0, parts):
        scale = tl.load(scale_ptr + part * blocks + row, mask=here, other=0.0)
        if INT4:
            byte = row.to(tl.int64)[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
            both = tl.load(packed_ptr + stride * part + byte, mask=here[:, None], other=0).to(tl.int32)
            steps = tl.reshape(tl.join((both << 28) >> 28, both >> 4), [ROWS, BLOCK])
        else:
            steps = tl.load(packed_ptr + stride * part + at, mask=here[:, None], other=0)
        total += steps.to(tl.float32) * scale[:, None]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < values)


def _rows(block: int) -> int:
    return max(1, _TILE // block)


def quantize(x: torch.Tensor, bits: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The op quantize_blocks."""
    check_layout(bits, block)
    x = x.contiguous()
    blocks = packed_length(x.numel(), 8, block) // block
    packed = torch.empty(packed_length(x.numel(), bits, block), dtype=torch.int8, device=x.device)
    scale = torch.empty(blocks, dtype=torch.float32, device=x.device)
    if blocks:
        quantize_kernel[(triton.cdiv(blocks, _rows(block)),)](
            x, packed, scale, x.numel(), blocks, QMAX=127.0 if bits == 8 else 7.0, INT4=bits == 4,
            ROWS=_rows(block), BLOCK=block, num_warps=8,
        )  # fmt: skip
    return packed, scale


def dequantize_sum(
    packed: torch.Tensor, scale: torch.Tensor, values: int, bits: int, block: int, dtype: torch.dtype
) -> torch.Tensor:
    """The op dequantize_sum."""
    check_layout(bits, block)
    packed, scale = packed.contiguous(), scale.contiguous()
    out = torch.empty(values, dtype=dtype, device=packed.device)
    blocks = scale.shape[1]
    if values:
        dequantize_sum_kernel[(triton.cdiv(blocks, _rows(block)),)](
            packed, scale, out, values, blocks, len(packed), INT4=bits == 4,
            ROWS=_rows(block), BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out
