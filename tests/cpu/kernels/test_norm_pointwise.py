"""RMSNorm, SwiGLU and RoPE against torch's own definitions, and their Triton kernels against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import check_compiles, check_op, max_error, value_and_grads

from planner.kernels import dispatch, norm, pointwise

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2}
NORM = {op: "ours" for op in ("rms_norm", "add_rms_norm", "rms_norm_backward")}
POINTWISE = {op: "ours" for op in ("swiglu", "swiglu_backward", "rope")}


def rms_exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps=1e-6)


def add_rms_exact(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return rms_exact(x + residual, weight), x + residual


def swiglu_exact(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def rope_exact(x: torch.Tensor) -> torch.Tensor:
    """By complex multiplication."""
    cos, sin = angles(x.shape[1], x.shape[-1])
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin).to(torch.complex128)[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


def angles(length: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    frequency = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    turn = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    return turn.cos(), turn.sin()


def rope_ours(x: torch.Tensor) -> torch.Tensor:
    return pointwise.rope(x, *angles(x.shape[1], x.shape[-1]))


CASES: list[tuple[Callable, Callable, list[tuple[int, ...]]]] = [
    (norm.rms_norm, rms_exact, [(7, 300), (300,)]),
    (norm.rms_norm, rms_exact, [(2, 3, 4097), (4097,)]),
    (norm.add_rms_norm, add_rms_exact, [(37, 65), (37, 65), (65,)]),
    (pointwise.swiglu, swiglu_exact, [(5, 3, 70), (5, 3, 70)]),
    (pointwise.swiglu, swiglu_exact, [(2, 3000), (2, 3000)]),
    (rope_ours, rope_exact, [(2, 5, 3, 24)]),
]
NAMES = ["rms", "rms-long", "add-rms", "swiglu", "swiglu-long", "rope"]


def compare(ours: Callable, exact: Callable, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    found = value_and_grads(ours, *inputs)
    wanted = value_and_grads(exact, *(x.double() for x in inputs))
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == dtype
        assert max_error(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ours", "exact", "shapes"), CASES, ids=NAMES)
def test_reference_matches_float64(ours: Callable, exact: Callable, shapes: list, dtype: torch.dtype) -> None:
    compare(ours, exact, shapes, dtype)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ours", "exact", "shapes"), CASES, ids=NAMES)
def test_triton_matches_float64(ours: Callable, exact: Callable, shapes: list, dtype: torch.dtype) -> None:
    with dispatch.using(NORM | POINTWISE):
        compare(ours, exact, shapes, dtype)


@pytest.mark.usefixtures("interpreted")
def test_triton_takes_halves_of_a_projection_transposed_and_empty_tensors() -> None:
    both, turned = torch.randn(6, 64), torch.randn(40, 6).t()
    with dispatch.using(NORM | POINTWISE):
        got = pointwise.swiglu(*both.chunk(2, dim=-1))
        torch.testing.assert_close(got, swiglu_exact(*both.chunk(2, dim=-1)))
        torch.testing.assert_close(norm.rms_norm(turned, torch.ones(40)), rms_exact(turned, torch.ones(40)))
        x = torch.randn(0, 8, requires_grad=True)
        w = torch.ones(8, requires_grad=True)
        norm.rms_norm(x, w).sum().backward()
        assert x.grad.shape == (0, 8)
        assert torch.equal(w.grad, torch.zeros(8))
        assert pointwise.swiglu(x, x).shape == (0, 8)


@pytest.mark.usefixtures("interpreted")
def test_bf16_arithmetic_without_a_conversion_is_refused() -> None:
    """The repaired interpreter raises where the stock one computes on bit patterns."""
    import interpreter_repair
    import triton
    import triton.language as tl

    @triton.jit
    def careless(x_ptr):
        x = tl.load(x_ptr + tl.arange(0, 4))
        tl.store(x_ptr + tl.arange(0, 4), x + x)

    with pytest.raises(Exception, match="bfloat16") as caught:
        careless[(1,)](torch.ones(4, dtype=torch.bfloat16))
    assert isinstance(caught.value.__cause__ or caught.value, interpreter_repair.Bf16ArithmeticError)


def test_ops_pass_every_check() -> None:
    x, r, w = (torch.randn(s, requires_grad=True) for s in ((3, 4, 8), (3, 4, 8), (8,)))
    check_op(norm.rms_norm_op, (x, w, 1e-6))
    check_op(norm.add_rms_norm_op, (x, r, w, 1e-6))
    h, rstd = torch.randn(3, 4, 8), torch.rand(3, 4)
    check_op(norm.rms_norm_backward, (h, None, h, torch.ones(8), rstd))
    check_op(norm.rms_norm_backward, (h, h, h, torch.ones(8), rstd))
    check_op(pointwise.swiglu, (x, r))
    check_op(pointwise.swiglu_backward, (h, h, h))
    check_op(pointwise.rope_op, (torch.randn(2, 3, 2, 8, requires_grad=True), *angles(3, 8), False))


def test_compile_without_graph_breaks() -> None:
    x, r, w = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    check_compiles(norm.add_rms_norm, x, r, w)
    check_compiles(lambda a, b, c: pointwise.swiglu(norm.rms_norm(a, c), b), x, r, w)
    check_compiles(rope_ours, torch.randn(2, 3, 2, 8))


def test_gradients_of_one_output_alone() -> None:
    x, r, w = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 6), (3, 6), (6,)))
    assert torch.autograd.gradcheck(lambda *a: norm.add_rms_norm(*a)[0], (x, r, w))
    assert torch.autograd.gradcheck(lambda *a: norm.add_rms_norm(*a)[1], (x, r, w))
