"""RMSNorm modules of the user's model on the kernel op, where the plan's choice of kernels is not torch.

A module is taken for RMSNorm by what it computes, once, on random numbers: `nn.RMSNorm`, and classes of that name as
Hugging Face's models bring them, which take it apart into half a dozen kernels and keep float32 copies for backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.func import functional_call

from planner.kernels import dispatch, norm

_WIDEST = 16_384  # values that the kernel takes in a row


def chosen(device: torch.device) -> bool:
    """Whether the op is chosen over the model's own code."""
    return dispatch.choice("rms_norm", device.type) != "torch"


def install(model: nn.Module) -> int:
    """Let the op stand for every RMSNorm of the model; how many there are."""
    count = 0
    for module in model.modules():
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if is_rms_norm(module, eps):
            module.forward = _forward(module, eps)  # type: ignore[method-assign]
            count += 1
    return count


def is_rms_norm(module: nn.Module, eps: float | None) -> bool:
    """Whether `module` multiplies rows of unit mean square by its weight and has nothing else."""
    named = dict(module.named_parameters())
    if "RMSNorm" not in type(module).__name__ or list(named) != ["weight"] or list(module.buffers()):
        return False
    width = named["weight"].shape[-1]
    if named["weight"].dim() != 1 or width > _WIDEST:
        return False
    if type(module) is nn.RMSNorm or not isinstance(eps, float):
        return type(module) is nn.RMSNorm
    with unset_fake_temporarily(), torch.no_grad():
        made = torch.Generator().manual_seed(0)
        x = torch.randn(8, width, generator=made) * torch.logspace(-4, 3, 8).unsqueeze(1)
        weight = torch.rand(width, generator=made) - 0.5
        try:
            found = functional_call(module, {"weight": weight}, (x,))
        except Exception:  # whatever a user's module does with numbers of ours, it keeps its own code
            return False
        wanted = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
        return isinstance(found, torch.Tensor) and torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)


def _forward(module: nn.Module, eps: float | None) -> Callable[[torch.Tensor], Any]:
    own = module.forward

    def forward(x: torch.Tensor) -> Any:
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        if x.dtype != weight.dtype:
            return own(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        added = torch.finfo(wide).eps if eps is None else eps  # nn.RMSNorm's default, of the type that it computes in
        return norm.rms_norm(x, weight, added)

    return forward
