"""Backends from other libraries, where one has the contract of our op: Liger (BSD-2) and fla (MIT), if installed.

Both run on a GPU only; tests/gpu compares them with float64. Written for liger-kernel 0.8 and fla-core 0.6.
"""

from __future__ import annotations

import torch


def liger_rms_norm(h: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The op rms_norm; casting mode "gemma" is the one that computes in float32 throughout."""
    from liger_kernel.ops.rms_norm import rms_norm_forward

    y, _, rstd, *_ = rms_norm_forward(h.contiguous(), weight, eps, 0.0, "gemma", None)
    return y, rstd.view(h.shape[:-1])


def liger_rms_norm_backward(
    dy: torch.Tensor, dh: torch.Tensor | None, h: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op rms_norm_backward; the gradient of a residual is added in a kernel of its own."""
    from liger_kernel.ops.rms_norm import _str_to_casting_mode, rms_norm_backward
    from liger_kernel.ops.utils import calculate_settings

    cols = h.shape[-1]
    block, warps = calculate_settings(cols)
    mode = _str_to_casting_mode["gemma"]
    flat = (dy.contiguous(), h.contiguous().view(-1, cols), weight, rstd.contiguous().view(-1))
    dx, dw = rms_norm_backward(*flat, 0.0, mode, block, warps, False, None)[:2]
    dx = dx.view(h.shape)
    return dx if dh is None else dx + dh, dw


def liger_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The op swiglu."""
    from liger_kernel.ops.swiglu import swiglu_forward

    return swiglu_forward(gate.contiguous(), up.contiguous())[-1]


def fla_gla(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op gla."""
    from fla.ops.gla import chunk_gla

    return chunk_gla(q, k, v, g, scale=scale, initial_state=state, output_final_state=True)
