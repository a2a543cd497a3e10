"""SwiGLU and rotary position embedding, each one pass forward and one backward.

SwiGLU: silu(gate) * up (Shazeer 2020, arXiv 2002.05202, equation 6). RoPE: pairs (i, i + D/2) of a head turned by
position times a frequency (Su et al. 2021, arXiv 2104.09864, section 3.2), in the half-split layout of GPT-NeoX and
Llama; its gradient is the turn back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import Replicate, Shard

from planner.kernels.op import Sharding, define, lazily, like, precise, streamed


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return (torch.nn.functional.silu(precise(gate)) * precise(up)).to(gate.dtype)


def _swiglu_backward(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    g, u, d = precise(gate), precise(up), precise(dy)
    s = g.sigmoid()
    return (d * u * s * (1 + g * (1 - s))).to(gate.dtype), (d * g * s).to(up.dtype)


def _rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool) -> torch.Tensor:
    a, b = precise(x).chunk(2, dim=-1)
    c, s = precise(cos).unsqueeze(-2), precise(-sin if back else sin).unsqueeze(-2)
    return torch.cat([a * c - b * s, b * c + a * s], dim=-1).to(x.dtype)


def _anywhere(outs: int, ins: int) -> Any:
    def rule(x: Any, *rest: Any) -> list[Sharding]:
        return [([Shard(d)] * outs, [Shard(d)] * ins) for d in range(x.ndim)]

    return rule


def _rope_rule(x: Any, *rest: Any) -> list[Sharding]:
    """Batch and heads split freely; the sequence with its own angles."""
    whole = [Replicate(), Replicate(), None]
    return [
        ([Shard(0)], [Shard(0), *whole]),
        ([Shard(2)], [Shard(2), *whole]),
        ([Shard(1)], [Shard(1), Shard(0), Shard(0), None]),
    ]


swiglu = define(
    "swiglu", _swiglu, fake=lambda gate, up: like(gate),
    work=lambda gate, up, out: streamed((gate, up), out, 5 * gate.numel()), sharding=_anywhere(1, 2),
    kernels={"ours": lazily("triton_pointwise", "swiglu"), "liger": lazily("peers", "liger_swiglu")},
)  # fmt: skip
swiglu_backward = define(
    "swiglu_backward", _swiglu_backward, fake=lambda dy, gate, up: (like(gate), like(up)),
    work=lambda dy, gate, up, out: streamed((dy, gate, up), out, 10 * gate.numel()), sharding=_anywhere(2, 3),
    kernels={"ours": lazily("triton_pointwise", "swiglu_backward")},
)  # fmt: skip
rope_op = define(
    "rope", _rope, fake=lambda x, cos, sin, back: like(x),
    work=lambda x, cos, sin, back, out: streamed((x, cos, sin), out, 3 * x.numel()), sharding=_rope_rule,
    kernels={"ours": lazily("triton_pointwise", "rope")},
)  # fmt: skip

swiglu.register_autograd(
    lambda ctx, dy: swiglu_backward(dy, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _save_angles(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.back = inputs[3]


rope_op.register_autograd(
    lambda ctx, dy: (rope_op(dy, *ctx.saved_tensors, not ctx.back), None, None, None), setup_context=_save_angles
)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn x (batch, sequence, heads, D) by angles (sequence, D/2) given as cos and sin; they get no gradient."""
    return rope_op(x, cos, sin, False)
