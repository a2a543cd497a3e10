"""The LSTM recurrence over all time steps in one op, with a block-diagonal recurrent matrix (one block a head).

With pre-activations x_t = W input_t + b made beforehand by a GEMM: (i, f, z, o) = x_t + h_{t-1} R,
c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(z), h_t = sigmoid(o) tanh(c_t) (Hochreiter and Schmidhuber 1997; Gers et al.
2000 for f). Heads as in Beck et al. 2024, arXiv 2405.04517, section 2.2. The kernel keeps R and the state on the chip
for the whole sequence; backward walks back once for dx, and dR is one product over all steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import Replicate, Shard

from planner.kernels.op import Sharding, Work, define, lazily, like, precise, streamed

I, F, Z, O = range(4)  # noqa: E741  the gates' order


def _lstm(
    x: torch.Tensor, r: torch.Tensor, h0: torch.Tensor, c0: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    h, c, hs, cs, gates = h0, precise(c0), [], [], []
    for t in range(x.shape[1]):
        a = precise(x[:, t]) + torch.einsum("bhd,hgde->bhge", precise(h), precise(r))
        i, f, o, z = a[:, :, I].sigmoid(), a[:, :, F].sigmoid(), a[:, :, O].sigmoid(), a[:, :, Z].tanh()
        c = f * c + i * z
        h = (o * c.tanh()).to(x.dtype)
        hs.append(h)
        cs.append(c)
        gates.append(torch.stack([i, f, z, o], dim=2).to(x.dtype))
    return torch.stack(hs, 1), torch.stack(cs, 1), torch.stack(gates, 1)


def _lstm_backward(
    dhs: torch.Tensor, dcs: torch.Tensor, gates: torch.Tensor, cs: torch.Tensor, c0: torch.Tensor, r: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dh, dc = (torch.zeros_like(precise(c0)) for _ in range(2))
    dx: list[torch.Tensor] = []
    for t in reversed(range(gates.shape[1])):
        i, f, z, o = precise(gates[:, t]).unbind(dim=2)
        before, turned = precise(cs[:, t - 1] if t else c0), precise(cs[:, t]).tanh()
        dh = dh + precise(dhs[:, t])
        dc = dc + precise(dcs[:, t]) + dh * o * (1 - turned * turned)
        da = torch.stack(
            [dc * z * i * (1 - i), dc * before * f * (1 - f), dc * i * (1 - z * z), dh * turned * o * (1 - o)], dim=2
        ).to(gates.dtype)
        dx.append(da)
        dc = dc * f
        dh = torch.einsum("bhge,hgde->bhd", precise(da), precise(r))
    return torch.stack(dx[::-1], 1), dh, dc


def _flops(x: torch.Tensor) -> int:
    """One product with R a step, and about 30 FLOPs of gates and their derivatives a unit."""
    return 2 * x.numel() * x.shape[-1] + 30 * x.numel() // 4


def _work(x: torch.Tensor, r: torch.Tensor, h0: torch.Tensor, c0: torch.Tensor, out: Any) -> Work:
    return streamed((x, r, h0, c0), out, _flops(x))


def _backward_work(dhs: Any, dcs: Any, gates: Any, cs: Any, c0: Any, r: Any, out: Any) -> Work:
    return streamed((dhs, dcs, gates, cs, c0, r), out, _flops(gates))


def _rule(*args: Any) -> list[Sharding]:
    """Batch, or heads with their blocks of R."""
    batch, time_heads, heads = Shard(0), Shard(2), Shard(1)
    return [
        ([batch] * 3, [batch, Replicate(), batch, batch]),
        ([time_heads] * 3, [time_heads, Shard(0), heads, heads]),
    ]


def _backward_rule(*args: Any) -> list[Sharding]:
    batch, time_heads, heads = Shard(0), Shard(2), Shard(1)
    return [
        ([batch] * 3, [*[batch] * 5, Replicate()]),
        ([time_heads, heads, heads], [*[time_heads] * 4, heads, Shard(0)]),
    ]


def _wide(shape_of: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return shape_of.new_empty(shape, dtype=torch.promote_types(shape_of.dtype, torch.float32))


def _fake(x: torch.Tensor, r: torch.Tensor, h0: torch.Tensor, c0: torch.Tensor) -> Any:
    batch, time, heads, _, dim = x.shape
    return x.new_empty((batch, time, heads, dim)), _wide(x, (batch, time, heads, dim)), like(x)


lstm_op = define("lstm", _lstm, fake=_fake, work=_work, sharding=_rule, kernels={"ours": lazily("triton_lstm", "lstm")})
lstm_backward = define(
    "lstm_backward", _lstm_backward,
    fake=lambda dhs, dcs, gates, cs, c0, r: (like(gates), _wide(c0, c0.shape), _wide(c0, c0.shape)),
    work=_backward_work, sharding=_backward_rule, kernels={"ours": lazily("triton_lstm", "lstm_backward")},
)  # fmt: skip


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    _, r, h0, c0 = inputs
    ctx.save_for_backward(*output, r, h0, c0)
    ctx.mark_non_differentiable(output[2])


def _backward(ctx: Any, dhs: Any, dcs: Any, _: Any) -> Any:
    hs, cs, gates, r, h0, c0 = ctx.saved_tensors
    dx, dh0, dc0 = lstm_backward(dhs, dcs, gates, cs, c0, r)
    before = torch.cat([h0.unsqueeze(1), hs[:, :-1]], dim=1)
    dr = torch.einsum("bthd,bthge->hgde", before, dx)
    return dx, dr, dh0.to(h0.dtype), dc0.to(c0.dtype)


lstm_op.register_autograd(_backward, setup_context=_save)


def lstm(
    x: torch.Tensor, r: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """(h of every step (batch, time, heads, D), last (h, c)) of x (batch, time, heads, 4, D) and r (heads, 4, D, D).

    The gates stand in the order i, f, z, o; r[head, gate] maps h (a row) to the gate's pre-activation; no state: zeros.
    """
    if state is None:
        zero = x.new_zeros((x.shape[0], x.shape[2], x.shape[4]))
        state = zero, zero.to(torch.promote_types(x.dtype, torch.float32))
    hs, cs, _ = lstm_op(x, r, *state)
    return hs, (hs[:, -1], cs[:, -1])
