"""The sLSTM recurrence against its definition without a stabiliser in float64, and its Triton kernels."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import check_compiles, check_op, max_error

from planner.kernels import dispatch, slstm


def inputs(batch: int, time: int, heads: int, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """x, r and a state that earlier steps could have left (n at least 1 at its own scale)."""
    state = (batch, heads, dim)
    x, r = torch.randn(batch, time, heads, 4, dim).to(dtype), torch.randn(heads, 4, dim, dim) * dim**-0.5
    return [x, r.to(dtype), torch.randn(state).to(dtype), torch.randn(state), 1 + torch.rand(state), torch.randn(state)]


def by_definition(
    x: torch.Tensor, r: torch.Tensor, h: torch.Tensor, c: torch.Tensor, n: torch.Tensor, m: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h of every step, last c and n times exp(m): exponential input gate, sigmoid forget gate, h = o c / n."""
    c, n, hs = c * m.exp(), n * m.exp(), []
    for t in range(x.shape[1]):
        i, f, z, o = (x[:, t] + torch.einsum("bhd,hgde->bhge", h, r)).unbind(2)
        c = f.sigmoid() * c + i.exp() * z.tanh()
        n = f.sigmoid() * n + i.exp()
        h = o.sigmoid() * c / n
        hs.append(h)
    return torch.stack(hs, 1), c, n


def compare(dtype: torch.dtype, batch: int, time: int, tolerance: float) -> None:
    *parts, m0 = inputs(batch, time, 2, 16, dtype)
    ours = [x.clone().requires_grad_() for x in parts]
    exact = [x.double().requires_grad_() for x in parts]
    hs, (_, c, n, m) = slstm.slstm(ours[0], ours[1], (*ours[2:], m0))
    want_hs, want_c, want_n = by_definition(*exact, m0.double())
    scale = m.detach().double().exp()
    grads = [torch.randn_like(x) for x in (hs, c, n)]
    found = torch.autograd.grad((hs, c, n), ours, grads)
    # c and n at the scale exp(m), held fixed
    wanted = torch.autograd.grad((want_hs, want_c / scale, want_n / scale), exact, [g.double() for g in grads])
    outs = (want_hs, want_c / scale, want_n / scale)
    for got, expected in zip((hs, c, n, *found), (*outs, *wanted), strict=True):
        assert max_error(got, expected) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 3e-2)])
def test_equals_the_definition(dtype: torch.dtype, tolerance: float) -> None:
    compare(dtype, 3, 12, tolerance)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 3e-2)])
def test_triton_equals_the_definition(dtype: torch.dtype, tolerance: float) -> None:
    with dispatch.using({"slstm": "ours", "slstm_backward": "ours"}):
        compare(dtype, 17, 5, tolerance)  # a tile of 16 and a tail


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("backend", ["torch", "ours"])
def test_strong_gates_and_an_empty_start_stay_finite(backend: str) -> None:
    """exp of 300 overflows float32; the stabilised form does not, and h stays below 1."""
    x, r, *_ = inputs(2, 6, 1, 16, torch.float32)
    x[:, 1, :, 0], x[:, 2, :, 0], x[:, 3, :, 1] = 300.0, -300.0, -300.0
    x = x.requires_grad_()
    with dispatch.using({"slstm": backend, "slstm_backward": backend}):
        hs, state = slstm.slstm(x, r)
        (grad,) = torch.autograd.grad(hs.sum(), x)
    assert all(t.isfinite().all() for t in (hs, grad, *state))
    assert hs.abs().max() <= 1
    assert (state[2] >= 1).all()


def test_ops_pass_every_check() -> None:
    x, r, h0, c0, n0, m0 = inputs(2, 3, 2, 4, torch.float32)
    leaves = [t.requires_grad_() for t in (x, r, h0, c0, n0)]
    check_op(slstm.slstm_op, (*leaves, m0))
    hs, cs, ns, _, gates = slstm.slstm_op(*(t.detach() for t in leaves), m0)
    check_op(slstm.slstm_backward, (hs, cs[:, -1], ns[:, -1], gates, cs, ns, c0.detach(), n0.detach(), r.detach()))
    check_compiles(lambda x, r: slstm.slstm(x, r)[0], x.detach(), r.detach())
