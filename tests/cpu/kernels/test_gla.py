"""Gated linear attention in chunks against the recurrence in float64, weak to strong gates, and parts of a sequence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_checks import check_compiles, check_op, max_error

from planner.kernels import dispatch, gla
from planner.kernels.counters import WorkCounter


def inputs(time: int, gate: float, dtype: torch.dtype = torch.float32, values: int = 7) -> list[torch.Tensor]:
    q, k = torch.randn(2, 2, time, 3, 5).to(dtype).unbind(0)
    v = torch.randn(2, time, 3, values).to(dtype)
    return [q, k, v, (-gate * torch.rand(2, time, 3, 5)).to(dtype)]


def recurrence(q, k, v, g, state, scale: float):
    outs = []
    for t in range(q.shape[1]):
        update = k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        state = g[:, t].exp().unsqueeze(-1) * state + update
        outs.append(scale * (q[:, t].unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outs, dim=1), state


@pytest.mark.parametrize("gate", [0.01, 1.0, 30.0, 500.0])
@pytest.mark.parametrize("time", [1, 64, 150])
def test_chunks_equal_the_recurrence(time: int, gate: float) -> None:
    parts = [*inputs(time, gate), torch.randn(2, 3, 5, 7)]
    ours = [x.clone().requires_grad_() for x in parts]
    exact = [x.double().requires_grad_() for x in parts]
    found, wanted = gla.gla_op(*ours, 0.3), recurrence(*exact, 0.3)
    grads = [torch.randn_like(x) for x in found]
    found_grads = torch.autograd.grad(found, ours, grads)
    wanted_grads = torch.autograd.grad(wanted, exact, [x.double() for x in grads])
    bound = 1e-5 + 2**-24 * gla.CHUNK * gate  # exponents are differences of float32 sums over up to a chunk
    for got, want in zip((*found, *found_grads), (*wanted, *wanted_grads), strict=True):
        turned = (exact[0] * wanted_grads[0]).abs().max().item()  # dg is a difference of such terms
        floor = turned if want is wanted_grads[3] else 0.0
        assert max_error(got, want, floor) < bound


def test_bf16_inputs() -> None:
    parts = inputs(100, 2.0, torch.bfloat16)
    out, state = gla.gated_linear_attention(*parts)
    want, want_state = recurrence(*(x.double() for x in parts), torch.zeros(2, 3, 5, 7).double(), 5**-0.5)
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert max_error(out, want) < 8e-3
    assert max_error(state, want_state) < 1e-5


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("time", "gate"), [(130, 0.05), (70, 3.0), (64, 500.0)])
def test_triton_matches_float64(time: int, gate: float, dtype: torch.dtype, bound: float) -> None:
    """Tails of chunks; gates whose sums over a chunk stay in range, leave it in some key dims, or are absurd."""
    shape = (1, time, 2)
    q, k = torch.randn(2, *shape, 32).to(dtype).unbind(0)
    g = -gate * torch.rand(*shape, 32) * torch.linspace(0, 1, 32)  # weak and strong ones side by side
    parts = [q, k, torch.randn(*shape, 16).to(dtype), g.to(dtype), torch.randn(1, 2, 32, 16)]
    exact = [x.double().requires_grad_() for x in parts]
    wanted = recurrence(*exact, 0.3)
    grads = [torch.randn_like(wanted[0]).to(dtype), torch.randn_like(wanted[1]).float()]
    wanted_grads = torch.autograd.grad(wanted, exact, [x.double() for x in grads])
    above_the_diagonal = np.errstate(over="ignore", invalid="ignore")
    with above_the_diagonal, dispatch.using({"gla": "ours", "gla_backward": "ours"}):
        found = gla.gla_op(*parts, 0.3)
        found_grads = gla.gla_backward(*grads, *parts, 0.3)
    assert [x.dtype for x in (*found, *found_grads)] == [dtype, torch.float32, *[dtype] * 4, torch.float32]
    turned = (exact[0] * wanted_grads[0]).abs().max().item()  # dg is a difference of such terms
    for got, want in zip((*found, *found_grads), (*wanted, *wanted_grads), strict=True):
        assert max_error(got, want, turned if want is wanted_grads[3] else 0.0) < bound


@pytest.mark.usefixtures("interpreted")
def test_triton_on_blocks_of_the_head_dim_and_on_nothing() -> None:
    q, k, v = torch.randn(3, 1, 20, 1, 128).unbind(0)
    g, state = -torch.rand(1, 20, 1, 128), torch.randn(1, 1, 128, 128)
    with dispatch.using({"gla": "ours", "gla_backward": "ours"}):
        found = (*gla.gla_op(q, k, v, g, state, 1.0), *gla.gla_backward(v, state, q, k, v, g, state, 1.0))
        empty = [x[:, :0] for x in (q, k, v, g)]
        nothing = (*gla.gla_op(*empty, state, 1.0), *gla.gla_backward(empty[2], state, *empty, state, 1.0))
        with pytest.raises(ValueError, match="multiples of 16"):
            gla.gla_op(q[..., :8], k[..., :8], v, g[..., :8], state[:, :, :8], 1.0)
    wanted = (*gla.gla_op(q, k, v, g, state, 1.0), *gla.gla_backward(v, state, q, k, v, g, state, 1.0))
    assert all(max_error(got, want) < 1e-5 for got, want in zip(found, wanted, strict=True))
    assert torch.equal(nothing[1], state) and torch.equal(nothing[-1], state)


def test_gradients_by_finite_differences() -> None:
    parts = [x.double().requires_grad_() for x in (*inputs(20, 1.0)[:4], torch.randn(2, 3, 5, 7))]
    small = [x.detach()[:1, ..., :1, :2].contiguous().requires_grad_() for x in parts[:4]]
    state = torch.randn(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: gla.gla_op(*t, 0.5), (*small, state), fast_mode=True)


def test_parts_with_exchanged_states_equal_the_whole() -> None:
    """The exchange's arithmetic, its all-gather replaced by a stack."""
    parts = inputs(96, 1.0)
    whole, final = gla.gated_linear_attention(*parts)
    pieces = [[x[:, s : s + 24] for x in parts] for s in range(0, 96, 24)]
    states, decays = (torch.stack(t) for t in zip(*(gla._local_state(*p[1:]) for p in pieces), strict=True))
    outs = []
    for rank, piece in enumerate(pieces):
        out, state = gla.gla_op(*piece, gla.prefix(states, decays, rank), 5**-0.5)
        outs.append(out)
    exact, exact_state = recurrence(*(x.double() for x in parts), torch.zeros(2, 3, 5, 7).double(), 5**-0.5)
    for got, got_state in ((whole, final), (torch.cat(outs, dim=1), state)):
        assert max_error(got, exact) < 1e-5
        assert max_error(got_state, exact_state) < 1e-5


def test_ops_pass_every_check() -> None:
    parts = [x[:, :20].contiguous().requires_grad_() for x in inputs(20, 1.0)]
    state = gla.empty_state(parts[0], parts[2]).requires_grad_()
    check_op(gla.gla_op, (*parts, state, 0.5))
    plain = [x.detach() for x in (*parts, state)]
    check_op(gla.gla_backward, (plain[2], plain[4], *plain, 0.5))
    check_compiles(lambda q, k, v, g: gla.gated_linear_attention(q, k, v, g), *plain[:4])


def test_flops_by_hand() -> None:
    """One batch, one head, 64 tokens: 64 * 65 / 2 pairs over K + V, and K V into and out of the state, a token."""
    q, v = torch.randn(1, 64, 1, 8), torch.randn(1, 64, 1, 4)
    with WorkCounter() as counted:
        gla.gla_op(q, q, v, -q.abs(), gla.empty_state(q, v), 1.0)
    assert counted.total.flops == 2 * (64 * 65 // 2) * (8 + 4) + 64 * 2 * 2 * 8 * 4
    with pytest.raises(ValueError, match="start state together with a group"):
        gla.gated_linear_attention(q, q, v, q, state=gla.empty_state(q, v), group=object())
