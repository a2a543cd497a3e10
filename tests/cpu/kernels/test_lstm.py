"""The LSTM recurrence against torch.nn.LSTM in float64, and its Triton kernels."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import check_compiles, check_op, max_error

from planner.kernels import dispatch, lstm


def inputs(batch: int, time: int, heads: int, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    shapes = ((batch, time, heads, 4, dim), (heads, 4, dim, dim), (batch, heads, dim))
    x, r, h0 = (torch.randn(s).to(dtype) for s in shapes)
    return [x, (r.float() * dim**-0.5).to(dtype), h0, torch.randn(shapes[2])]


def by_torch(x: torch.Tensor, r: torch.Tensor, h0: torch.Tensor, c0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each head as a torch LSTM cell whose input weights are the identity."""
    heads, dim = r.shape[0], r.shape[-1]
    hs, last = [], []
    for head in range(heads):
        w_ih = torch.eye(4 * dim, dtype=x.dtype)
        w_hh = r[head].transpose(1, 2).reshape(4 * dim, dim)
        state = (h0[None, :, head].contiguous(), c0[None, :, head].to(x.dtype).contiguous())
        out, _, c = torch.lstm(x[:, :, head].flatten(2), state, [w_ih, w_hh], False, 1, 0.0, False, False, True)
        hs.append(out)
        last.append(c[0])
    return torch.stack(hs, 2), torch.stack(last, 1)


def compare(dtype: torch.dtype, batch: int, time: int, tolerance: float) -> None:
    parts = inputs(batch, time, 2, 16, dtype)
    ours = [x.clone().requires_grad_() for x in parts]
    exact = [x.double().requires_grad_() for x in parts]
    hs, (_, c) = lstm.lstm(ours[0], ours[1], (ours[2], ours[3]))
    want = by_torch(*exact)
    grads = [torch.randn_like(x) for x in (hs, c)]
    found = torch.autograd.grad((hs, c), ours, grads)
    wanted = torch.autograd.grad(want, exact, [g.double() for g in grads])
    for got, expected in zip((hs, c, *found), (*want, *wanted), strict=True):
        assert max_error(got, expected) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 3e-2)])
def test_equals_torch_lstm(dtype: torch.dtype, tolerance: float) -> None:
    compare(dtype, 3, 12, tolerance)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 3e-2)])
def test_triton_equals_torch_lstm(dtype: torch.dtype, tolerance: float) -> None:
    with dispatch.using({"lstm": "ours", "lstm_backward": "ours"}):
        compare(dtype, 17, 5, tolerance)  # a tile of 16 and a tail


def test_ops_pass_every_check() -> None:
    x, r, h0, c0 = (t.requires_grad_() for t in inputs(2, 3, 2, 4, torch.float32))
    check_op(lstm.lstm_op, (x, r, h0, c0))
    hs, cs, gates = lstm.lstm_op(x.detach(), r.detach(), h0.detach(), c0.detach())
    check_op(lstm.lstm_backward, (hs, cs, gates, cs, c0.detach(), r.detach()))
    check_compiles(lambda x, r: lstm.lstm(x, r)[0], x.detach(), r.detach())


def test_gradients_by_finite_differences() -> None:
    x, r, h0, c0 = (t.double().requires_grad_() for t in inputs(1, 3, 1, 2, torch.float64))
    assert torch.autograd.gradcheck(lambda *t: lstm.lstm_op(*t)[:2], (x, r, h0, c0))
