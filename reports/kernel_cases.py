"""The kernels that kernel_bench.py measures: inputs, our call, the definition in plain torch, and peers.

Shapes are those of the goals: 8192 rows of 4096, an MLP of 14336, a vocabulary of 128256, heads of 128.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from planner.kernels import exchange, gla, loss, lstm, norm, pointwise, quantize, ring, slstm
from planner.reports.kernel_extras import torch_loss_parallel

Call = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kernel. `inputs(device, small)`; `plain` the same in torch (float64 of it is the truth, its eager and
    compiled forms are peers); `roof` what bounds it (its targets are kernel_targets.py's); `tolerance` in bf16,
    relative to the largest value. `units(*inputs)` counts the elements that bytes are quoted per.
    """

    name: str
    inputs: Callable[[str, bool], tuple[torch.Tensor, ...]]
    ours: Call
    plain: Call
    backward: bool = True
    plain_is_peer: bool = True  # not a loop over time steps or no computation at all
    differentiable: int | None = None  # how many of the first inputs take gradients; None: all
    whole: bool = False  # forward and backward only together: the gradients are made in forward
    roof: str = "copy"  # "copy" | "gemm"
    tolerance: float = 1.5e-2
    peers: Mapping[str, tuple[str, Call]] = field(default_factory=dict)  # label -> (package, call)
    units: Call = lambda *inputs: inputs[0].numel()


def _normal(device: str, *shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(s, device=device, dtype=torch.bfloat16) for s in shapes)


def _rows(width: int, small_width: int, count: int, weight: bool = False) -> Callable[[str, bool], Any]:
    def inputs(device: str, small: bool) -> tuple[torch.Tensor, ...]:
        shape = (64, small_width) if small else (8192, width)
        return _normal(device, *[shape] * count, *([shape[1:]] if weight else []))

    return inputs


def _rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-6)


def _add_rms(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = x + residual
    return _rms(h, weight), h


def _angles(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    turn = torch.outer(torch.arange(x.shape[1], device=x.device, dtype=torch.float32), frequency)
    return turn.cos(), turn.sin()


def _turnable(device: str, small: bool) -> tuple[torch.Tensor, ...]:
    (x,) = _heads(device, small)
    return x, *_angles(x)


def _rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    c, s = (t.to(x.dtype).unsqueeze(-2) for t in (cos, sin))
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * c - b * s, b * c + a * s], dim=-1)


def _heads(device: str, small: bool) -> tuple[torch.Tensor, ...]:
    return _normal(device, (1, 64, 4, 32) if small else (1, 8192, 32, 128))


def _targets(x: torch.Tensor, cols: int) -> torch.Tensor:
    return torch.arange(x.shape[0], device=x.device) * 7919 % cols


def _logits(device: str, small: bool) -> tuple[torch.Tensor, ...]:
    (x,) = _normal(device, (32, 1000) if small else (8192, 128256))
    return x, _targets(x, x.shape[1])


def _linear(device: str, small: bool) -> tuple[torch.Tensor, ...]:
    rows, width, cols = (64, 32, 500) if small else (8192, 4096, 128256)
    x, w = _normal(device, (rows, width), (cols, width))
    return x, w * width**-0.5, _targets(x, cols)


def _cross_entropy(logits: torch.Tensor, target: torch.Tensor, reduction: str = "none") -> torch.Tensor:
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target, reduction=reduction)


def _linear_ours(x: torch.Tensor, w: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return loss.linear_cross_entropy(x, w, target, chunk_rows=max(16, len(x) // 4))


def _liger_linear(x: torch.Tensor, w: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Function

    return Function.apply(x, w, target, None, None, -100, 0.0, 0.0, "sum")[0]


def _liger_rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "gemma", False)


def _liger_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def _attention(device: str, small: bool) -> tuple[torch.Tensor, ...]:
    return _normal(device, *[(1, 8, 96, 32) if small else (1, 32, 8192, 128)] * 3)


def _ring_ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    place = torch.arange(q.shape[2], device=q.device, dtype=torch.int32)
    docs = torch.zeros_like(place)
    pairs = len(place) * (len(place) + 1) // 2
    scale = q.shape[-1] ** -0.5
    return ring.ring_step(q, k, v, *ring.start(q), place, place, docs, docs, scale, True, pairs)[0].to(q.dtype)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _partials(device: str, small: bool) -> tuple[torch.Tensor, ...]:
    shape = (1, 4, 64, 32) if small else (1, 32, 8192, 128)
    a, b = _normal(device, shape, shape)
    return a, torch.randn(shape[:-1], device=device), b, torch.randn(shape[:-1], device=device)


def _merge(a: torch.Tensor, lse_a: torch.Tensor, b: torch.Tensor, lse_b: torch.Tensor) -> torch.Tensor:
    """The form of torch's own context parallelism: a sigmoid of the difference."""
    weight = torch.sigmoid(lse_b - lse_a).unsqueeze(-1)
    return (a.to(weight.dtype) - weight * (a.to(weight.dtype) - b.to(weight.dtype))).to(a.dtype)


def _gates(device: str, small: bool) -> tuple[torch.Tensor, ...]:
    shape = (1, 100, 2, 16) if small else (1, 8192, 32, 128)
    q, k, v, g = _normal(device, *[shape] * 4)
    return q, k, v, F.logsigmoid(g.float()).to(q.dtype)


def _recurrence(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    state = gla.empty_state(q, v)
    outs = []
    for t in range(q.shape[1]):
        state = g[:, t].exp().unsqueeze(-1) * state + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        outs.append((q[:, t].unsqueeze(-2).to(state.dtype) @ state).squeeze(-2) * q.shape[-1] ** -0.5)
    return torch.stack(outs, dim=1).to(q.dtype)


def _fla(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    from fla.ops.gla import chunk_gla  # with its own backward, which the backend of the op has not

    out: torch.Tensor = chunk_gla(q, k, v, g, scale=q.shape[-1] ** -0.5)[0]
    return out


def _flat(device: str, small: bool) -> tuple[torch.Tensor, ...]:
    return _normal(device, (4096,) if small else (512 * 1024 * 1024,))


def _round_trip(bits: int) -> Call:
    def call(x: torch.Tensor) -> torch.Tensor:
        packed, scale = quantize.quantize_blocks(x, bits, 256)
        return quantize.dequantize_sum(packed[None], scale[None], x.numel(), bits, 256, x.dtype)

    return call


def _gates_lstm(device: str, small: bool) -> tuple[torch.Tensor, ...]:
    batch, time, heads, dim = (17, 6, 2, 16) if small else (16, 1024, 8, 64)
    x, r = _normal(device, (batch, time, heads, 4, dim), (heads, 4, dim, dim))
    return x, r * dim**-0.5


def _lstm_loop(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    h = c = x.new_zeros((x.shape[0], x.shape[2], x.shape[4]))
    outs = []
    for t in range(x.shape[1]):
        i, f, z, o = (x[:, t] + torch.einsum("bhd,hgde->bhge", h, r)).unbind(2)
        c = f.sigmoid() * c + i.sigmoid() * z.tanh()
        h = o.sigmoid() * c.tanh()
        outs.append(h)
    return torch.stack(outs, 1)


def _slstm_loop(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Without a stabiliser: these gates are small."""
    h = c = n = x.new_zeros((x.shape[0], x.shape[2], x.shape[4]))
    outs = []
    for t in range(x.shape[1]):
        i, f, z, o = (x[:, t] + torch.einsum("bhd,hgde->bhge", h, r)).unbind(2)
        c, n = f.sigmoid() * c + i.exp() * z.tanh(), f.sigmoid() * n + i.exp()
        h = o.sigmoid() * c / n
        outs.append(h)
    return torch.stack(outs, 1)


_FLASHRNN = "cuda_fused"


def _flashrnn(function: str) -> Mapping[str, tuple[str, Call]]:
    """As its README has the call, the recurrent weights with their inputs last; measured only where it is installed.

    That its results are those of the loops here was seen with its backend "vanilla", 1.0.8 on a CPU.
    """

    def call(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        from flashrnn import flashrnn

        bias = r.new_zeros(r.shape[1], r.shape[0], r.shape[2])  # gates, heads, dim
        weights = r.transpose(0, 1).transpose(2, 3).contiguous()
        states, _ = flashrnn(x.transpose(2, 3).contiguous(), weights, bias, function=function, backend=_FLASHRNN)
        out: torch.Tensor = states[0]
        return out

    return {"flashrnn": ("flashrnn", call)}


def _pack(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(2, (4, -1)).permute(2, 0, 1, 3, 4).contiguous()


def _routed(device: str, small: bool) -> tuple[torch.Tensor, ...]:
    tokens, width, experts, top_k = (64, 32, 8, 2) if small else (8192, 4096, 64, 8)
    (x,) = _normal(device, (tokens, width))
    first = torch.arange(tokens, device=device).unsqueeze(1) * 7919
    chosen = (first + torch.arange(top_k, device=device)) % experts
    return x, torch.rand(tokens, top_k, device=device), chosen


def _permuted(x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    copies, order, _ = exchange.moe_permute(x, chosen, 64)
    return exchange.moe_unpermute(copies, order, weights)


def _permuted_by_torch(x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    order = chosen.flatten().argsort(stable=True)
    copies = x[order // chosen.shape[1]]
    each = torch.empty_like(copies).index_copy(0, order, copies).view(*chosen.shape, -1)
    return (each * weights.unsqueeze(-1).to(x.dtype)).sum(dim=1)


CASES = (
    Case(
        name="rms_norm", inputs=_rows(4096, 96, 1, True), ours=norm.rms_norm, plain=_rms,
        peers={"liger": ("liger_kernel", _liger_rms)},
    ),
    Case(name="add_rms_norm", inputs=_rows(4096, 96, 2, True), ours=norm.add_rms_norm, plain=_add_rms),
    Case(
        name="swiglu", inputs=_rows(14336, 96, 2), ours=pointwise.swiglu, plain=lambda g, u: F.silu(g) * u,
        peers={"liger": ("liger_kernel", _liger_swiglu)},
    ),
    Case(name="rope", inputs=_turnable, ours=pointwise.rope, plain=_rope, differentiable=1),
    Case(
        name="cross_entropy", inputs=_logits, ours=loss.cross_entropy, plain=_cross_entropy, differentiable=1,
        peers={"loss_parallel": ("torch", torch_loss_parallel)},
    ),
    Case(
        name="linear_cross_entropy", inputs=_linear, ours=_linear_ours, roof="gemm", tolerance=3e-2,
        plain=lambda x, w, target: _cross_entropy(x @ w.t(), target, "sum"), whole=True, differentiable=2,
        peers={"liger": ("liger_kernel", _liger_linear)}, units=lambda x, w, _: len(x) * len(w),
    ),
    Case(name="ring_step", inputs=_attention, ours=_ring_ours, plain=_sdpa, roof="gemm"),
    Case(
        name="merge_partials", inputs=_partials, ours=lambda *t: ring.merge_partials(*t)[0], plain=_merge,
        backward=False,
    ),
    Case(
        name="gla", inputs=_gates, ours=lambda *t: gla.gated_linear_attention(*t)[0], plain=_recurrence,
        tolerance=3e-2, plain_is_peer=False, peers={"fla": ("fla", _fla)},
    ),
    Case(
        name="lstm", inputs=_gates_lstm, ours=lambda x, r: lstm.lstm(x, r)[0], plain=_lstm_loop,
        tolerance=3e-2, plain_is_peer=False, peers=_flashrnn("lstm"),
    ),
    Case(
        name="slstm", inputs=_gates_lstm, ours=lambda x, r: slstm.slstm(x, r)[0], plain=_slstm_loop,
        tolerance=3e-2, plain_is_peer=False, peers=_flashrnn("slstm"),
    ),
    Case(
        name="quantize_int8", inputs=_flat, ours=_round_trip(8), plain=lambda x: x, backward=False,
        plain_is_peer=False,
    ),
    Case(
        name="quantize_int4", inputs=_flat, ours=_round_trip(4), plain=lambda x: x, backward=False,
        plain_is_peer=False, tolerance=9e-2,
    ),
    Case(name="ulysses_pack", inputs=_heads, ours=lambda x: exchange.pack_heads(x, 4), plain=_pack),
    Case(name="moe_permute", inputs=_routed, ours=_permuted, plain=_permuted_by_torch, differentiable=2),
)  # fmt: skip
