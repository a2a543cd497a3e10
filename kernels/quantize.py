"""Block quantisation for transfers: int8 or int4 with one float32 scale a block, and the receiver's dequantise-sum.

A block of `block` values is divided by max|x| / qmax, qmax = 127 or 7, and rounded to nearest even (Wang et al. 2023,
ZeRO++, arXiv 2306.10209, section 4: qwZ and qgZ). int4 packs values 2i and 2i+1 into the low and high half of byte i.
The last block may be short. A receiver sums the parts of all senders in float32 in one pass. Not differentiable.
"""

from __future__ import annotations

from typing import Any

import torch

from planner.kernels.op import Work, define, lazily, streamed

_QMAX = {8: 127, 4: 7}


def check_layout(bits: int, block: int) -> None:
    """Refuse other widths than 8 and 4 and blocks that are not a power of two of at least 16."""
    if bits not in _QMAX or block < 16 or block & (block - 1):
        raise ValueError(f"bits={bits}, block={block}: bits must be 8 or 4, block a power of two of at least 16")


def packed_length(values: int, bits: int, block: int) -> int:
    """Bytes that `values` values take: whole blocks, so that int4 never splits a byte."""
    return -(-values // block) * block * bits // 8


def _quantize(x: torch.Tensor, bits: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    check_layout(bits, block)
    flat = x.reshape(-1).float()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    scale = blocks.abs().amax(dim=-1) / _QMAX[bits]
    steps = (blocks / torch.where(scale == 0, 1, scale).unsqueeze(-1)).round().to(torch.int8)
    if bits == 4:
        steps = (steps[:, 0::2] & 15) | (steps[:, 1::2] << 4)
    return steps.reshape(-1), scale


def _dequantize_sum(
    packed: torch.Tensor, scale: torch.Tensor, values: int, bits: int, block: int, dtype: torch.dtype
) -> torch.Tensor:
    check_layout(bits, block)
    parts = len(packed)
    steps = packed.view(parts, -1, block * bits // 8)
    if bits == 4:
        steps = torch.stack([(steps << 4) >> 4, steps >> 4], dim=-1).flatten(-2)
    total = torch.zeros(steps.shape[1:], dtype=torch.float32, device=packed.device)
    for part in range(parts):
        total += steps[part] * scale[part].unsqueeze(-1)
    return total.reshape(-1)[:values].to(dtype)


def _quantize_fake(x: torch.Tensor, bits: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    length = packed_length(x.numel(), bits, block)
    return x.new_empty(length, dtype=torch.int8), x.new_empty(length * 8 // bits // block, dtype=torch.float32)


def _dequantize_work(
    packed: torch.Tensor, scale: torch.Tensor, values: int, bits: int, block: int, dtype: torch.dtype, out: Any
) -> Work:
    return streamed((packed, scale), out, 2 * values * len(packed))


quantize_blocks = define(
    "quantize_blocks", _quantize, fake=_quantize_fake,
    work=lambda x, bits, block, out: streamed((x,), out, 3 * x.numel()),
    kernels={"ours": lazily("triton_quantize", "quantize")},
)  # fmt: skip
dequantize_sum = define(
    "dequantize_sum", _dequantize_sum,
    fake=lambda packed, scale, values, bits, block, dtype: packed.new_empty(values, dtype=dtype), work=_dequantize_work,
    kernels={"ours": lazily("triton_quantize", "dequantize_sum")},
)  # fmt: skip
