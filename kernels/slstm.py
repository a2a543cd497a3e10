"""The sLSTM recurrence over all time steps in one op: LSTM with an exponential input gate and a normaliser.

(i, f, z, o) = x_t + h_{t-1} R as in lstm.py. With a_t = log sigmoid(f): m_t = max(a_t + m_{t-1}, i),
i' = exp(i - m_t), f' = exp(a_t + m_{t-1} - m_t), c_t = f' c_{t-1} + i' tanh(z), n_t = f' n_{t-1} + i',
h_t = sigmoid(o) c_t / n_t (Beck et al. 2024, arXiv 2405.04517, equations 8 to 17). m only scales c and n alike, so
gradients with m held fixed are exact. From an empty state (n = 0, m = -inf) n is never below 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import Replicate, Shard

from planner.kernels.lstm import F, I, O, Z
from planner.kernels.op import Sharding, define, lazily, precise, streamed

State = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
KEPT = 5  # of every step, for backward: i', f', tanh z, sigmoid o, 1 - sigmoid f


def _slstm(
    x: torch.Tensor, r: torch.Tensor, h0: torch.Tensor, c0: torch.Tensor, n0: torch.Tensor, m0: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    h, (c, n, m) = h0, map(precise, (c0, n0, m0))
    steps: list[tuple[torch.Tensor, ...]] = []
    for t in range(x.shape[1]):
        a = precise(x[:, t]) + torch.einsum("bhd,hgde->bhge", precise(h), precise(r))
        decayed = torch.nn.functional.logsigmoid(a[:, :, F]) + m
        m = torch.maximum(decayed, a[:, :, I])
        i, f, z, o = (a[:, :, I] - m).exp(), (decayed - m).exp(), a[:, :, Z].tanh(), a[:, :, O].sigmoid()
        c, n = f * c + i * z, f * n + i
        h = (o * c / n).to(x.dtype)
        kept = torch.stack([i, f, z, o, (-a[:, :, F]).sigmoid()], dim=2).to(x.dtype)
        steps.append((h, c, n, kept))
    hs, cs, ns, gates = (torch.stack(list(found), 1) for found in zip(*steps, strict=True))
    return hs, cs, ns, m.clone(), gates


def _slstm_backward(
    dhs: torch.Tensor, dc: torch.Tensor, dn: torch.Tensor, gates: torch.Tensor, cs: torch.Tensor, ns: torch.Tensor,
    c0: torch.Tensor, n0: torch.Tensor, r: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    dh, dc, dn = torch.zeros_like(precise(c0)), precise(dc), precise(dn)
    dx: list[torch.Tensor] = []
    for t in reversed(range(gates.shape[1])):
        i, f, z, o, rest = precise(gates[:, t]).unbind(dim=2)
        c, n = precise(cs[:, t]), precise(ns[:, t])
        before, norm = (precise(s[:, t - 1] if t else s0) for s, s0 in ((cs, c0), (ns, n0)))
        dh = dh + precise(dhs[:, t])
        dc, dn = dc + dh * o / n, dn - dh * o * c / (n * n)
        da = torch.stack(
            [(dc * z + dn) * i, (dc * before + dn * norm) * f * rest, dc * i * (1 - z * z), dh * c / n * o * (1 - o)],
            dim=2,
        ).to(gates.dtype)
        dx.append(da)
        dc, dn = dc * f, dn * f
        dh = torch.einsum("bhge,hgde->bhd", precise(da), precise(r))
    return torch.stack(dx[::-1], 1), dh, dc, dn


def _flops(shape: torch.Size) -> int:
    """One product with R a step, and about 40 FLOPs of gates and their derivatives a unit."""
    batch, time, heads, _, dim = shape
    return batch * time * heads * (8 * dim * dim + 40 * dim)


def _rule(*args: Any) -> list[Sharding]:
    """Batch, or heads with their blocks of R."""
    batch, time_heads, heads = Shard(0), Shard(2), Shard(1)
    return [
        ([batch] * 5, [batch, Replicate(), *[batch] * 4]),
        ([*[time_heads] * 3, heads, time_heads], [time_heads, Shard(0), *[heads] * 4]),
    ]


def _backward_rule(*args: Any) -> list[Sharding]:
    batch, time_heads, heads = Shard(0), Shard(2), Shard(1)
    return [
        ([batch] * 4, [*[batch] * 8, Replicate()]),
        ([time_heads, *[heads] * 3], [time_heads, heads, heads, *[time_heads] * 3, heads, heads, Shard(0)]),
    ]


def _wide(shape_of: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return shape_of.new_empty(shape, dtype=torch.promote_types(shape_of.dtype, torch.float32))


def _fake(x: torch.Tensor, *rest: Any) -> Any:
    batch, time, heads, _, dim = x.shape
    states = (_wide(x, (batch, time, heads, dim)) for _ in range(2))
    return (
        x.new_empty((batch, time, heads, dim)), *states, _wide(x, (batch, heads, dim)),
        x.new_empty((batch, time, heads, KEPT, dim)),
    )  # fmt: skip


slstm_op = define(
    "slstm", _slstm, fake=_fake, work=lambda x, *rest, out: streamed((x, *rest), out, _flops(x.shape)),
    sharding=_rule, kernels={"ours": lazily("triton_slstm", "slstm")},
)  # fmt: skip
slstm_backward = define(
    "slstm_backward", _slstm_backward,
    fake=lambda dhs, dc, dn, gates, cs, ns, c0, n0, r: (
        gates.new_empty((*gates.shape[:3], 4, gates.shape[4])), *(_wide(c0, tuple(c0.shape)) for _ in range(3)),
    ),
    work=lambda *args, out: streamed(args, out, _flops(args[3].shape)),
    sharding=_backward_rule, kernels={"ours": lazily("triton_slstm", "slstm_backward")},
)  # fmt: skip


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    _, r, h0, c0, n0, _ = inputs
    hs, cs, ns, m, gates = output
    ctx.save_for_backward(hs, cs, ns, gates, r, h0, c0, n0)
    ctx.mark_non_differentiable(m, gates)


def _backward(ctx: Any, dhs: Any, dcs: Any, dns: Any, *_: Any) -> Any:
    hs, cs, ns, gates, r, h0, c0, n0 = ctx.saved_tensors
    # Only the last c and n of a sequence leave the module (`slstm`), so only they have gradients.
    dx, dh0, dc0, dn0 = slstm_backward(dhs, dcs[:, -1], dns[:, -1], gates, cs, ns, c0, n0, r)
    before = torch.cat([h0.unsqueeze(1), hs[:, :-1]], dim=1)
    dr = torch.einsum("bthd,bthge->hgde", before, dx)
    return dx, dr, dh0.to(h0.dtype), dc0.to(c0.dtype), dn0.to(n0.dtype), None


slstm_op.register_autograd(_backward, setup_context=_save)


def slstm(x: torch.Tensor, r: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State]:
    """(h of every step, last (h, c, n, m)) of x (batch, time, heads, 4, D) and r (heads, 4, D, D), as in lstm.py."""
    if state is None:
        zero = x.new_zeros((x.shape[0], x.shape[2], x.shape[4]))
        wide = zero.to(torch.promote_types(x.dtype, torch.float32))
        state = zero, wide, wide, torch.full_like(wide, -torch.inf)
    hs, cs, ns, m, _ = slstm_op(x, r, *state)
    return hs, (hs[:, -1], cs[:, -1], ns[:, -1], m)
