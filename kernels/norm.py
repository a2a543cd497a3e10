"""RMSNorm, alone or with the residual's addition before it in one pass.

y = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4), in float32. Backward,
with n = x rstd and g = dy weight: dx = rstd (g - n mean(g n)), dweight = sum over rows of dy n.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard

from planner.kernels.op import Sharding, define, lazily, like, precise, streamed


def _rms(h: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    wide = precise(h)
    rstd = (wide.square().mean(dim=-1) + eps).rsqrt()
    return (wide * rstd.unsqueeze(-1) * precise(weight)).to(h.dtype), rstd


def _add_rms(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    h = x + residual
    return (*_rms(h, weight, eps), h)


def _rms_backward(
    dy: torch.Tensor, dh: torch.Tensor | None, h: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    n, wide = precise(h) * rstd.unsqueeze(-1), precise(dy)
    g = wide * precise(weight)
    dx = rstd.unsqueeze(-1) * (g - n * (g * n).mean(dim=-1, keepdim=True))
    dx = dx if dh is None else dx + precise(dh)
    return dx.to(h.dtype), (wide * n).flatten(0, -2).sum(dim=0).to(weight.dtype)


def _rstd_like(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))


def _by_rows(outs: int, tensors: int) -> Any:
    """Rows may be split along any dim but the last; the weight, third from the first of `tensors`, is whole."""

    def rule(*args: Any) -> list[Sharding]:
        return [([Shard(d)] * outs, [Shard(d)] * tensors + [Replicate()]) for d in range(args[0].ndim - 1)]

    return rule


def _backward_by_rows(dy: Any, dh: Any, *rest: Any) -> list[Sharding]:
    rows = [Shard(d) for d in range(dy.ndim - 1)]
    return [([r, Partial("sum")], [r, r, r, Replicate(), r]) for r in rows]


rms_norm_op = define(
    "rms_norm", _rms, fake=lambda h, weight, eps: (like(h), _rstd_like(h)),
    work=lambda h, weight, eps, out: streamed((h, weight), out, 4 * h.numel()), sharding=_by_rows(2, 1),
    kernels={"ours": lazily("triton_norm", "rms_norm"), "liger": lazily("peers", "liger_rms_norm")},
)  # fmt: skip
add_rms_norm_op = define(
    "add_rms_norm", _add_rms,
    fake=lambda x, residual, weight, eps: (like(x), _rstd_like(x), like(x)),
    work=lambda x, residual, weight, eps, out: streamed((x, residual, weight), out, 5 * x.numel()),
    sharding=_by_rows(3, 2), kernels={"ours": lazily("triton_norm", "add_rms_norm")},
)  # fmt: skip
rms_norm_backward = define(
    "rms_norm_backward", _rms_backward,
    fake=lambda dy, dh, h, weight, rstd: (like(h), like(weight)),
    work=lambda *args, out: streamed(args, out, 9 * args[2].numel(), kernels=2), sharding=_backward_by_rows,
    kernels={"ours": lazily("triton_norm", "rms_norm_backward"), "liger": lazily("peers", "liger_rms_norm_backward")},
)  # fmt: skip


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    h = inputs[0] if len(inputs) == 3 else output[2]
    ctx.save_for_backward(h, inputs[-2], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Any, drstd: Any, dh: Any = None) -> Any:
    h, weight, rstd = ctx.saved_tensors
    if dy is None:  # only the sum was used
        return (dh, dh, None, None)
    dx, dw = rms_norm_backward(dy, dh, h, weight, rstd)
    return dx, dw


rms_norm_op.register_autograd(lambda ctx, dy, drstd: (*_backward(ctx, dy, drstd), None), setup_context=_save)


def _add_backward(ctx: Any, dy: Any, drstd: Any, dh: Any) -> Any:
    if dy is None:
        return dh, dh, None, None
    dx, dw = _backward(ctx, dy, drstd, dh)
    return dx, dx, dw, None


add_rms_norm_op.register_autograd(_add_backward, setup_context=_save)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """RMSNorm over the last dim."""
    return rms_norm_op(x, weight, eps)[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """(RMSNorm of x + residual, x + residual): the branch and the residual stream of a pre-norm block."""
    y, _, h = add_rms_norm_op(x, residual, weight, eps)
    return y, h
