"""Vocabulary-parallel cross-entropy against torch's, on one rank, on several, and in the Triton interpreter."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import check_compiles, check_op, max_error
from torch.utils._python_dispatch import TorchDispatchMode

from planner.kernels import dispatch, loss
from planner.kernels.counters import WorkCounter

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3}
OURS = dict.fromkeys(("ce_stats", "ce_combine", "ce_grad", "ce_grad_"), "ours")


def problem(rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, cols, generator=generator) * 4).to(dtype)
    target = torch.randint(0, cols, (rows,), generator=generator)
    target[::5] = loss.IGNORE_INDEX
    return logits, target


def exact(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = logits.double().requires_grad_()
    value = F.cross_entropy(x, target, reduction="none")
    value.backward(torch.linspace(0.5, 1.5, len(value), dtype=torch.float64))
    return value.detach(), x.grad


def in_parts(logits: torch.Tensor, target: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What ranks holding `sizes` columns compute, with the all-gather replaced by a stack."""
    parts = logits.split(sizes, dim=1)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    stats = torch.stack([loss.ce_stats(p, target, s) for p, s in zip(parts, starts, strict=True)])
    value, lse, kept = loss.ce_combine(stats, target, loss.IGNORE_INDEX)
    scale = torch.linspace(0.5, 1.5, len(target)).to(lse.dtype) * kept
    grads = [loss.ce_grad(p, target, lse, scale, s) for p, s in zip(parts, starts, strict=True)]
    return value, torch.cat(grads, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[130], [40, 40, 50], [1, 128, 1]])
def test_parts_of_the_vocabulary_give_the_whole_loss(sizes: list[int], dtype: torch.dtype) -> None:
    logits, target = problem(23, sum(sizes), dtype)
    value, grad = in_parts(logits, target, sizes)
    want_value, want_grad = exact(logits, target)
    assert max_error(value, want_value) < 1e-6
    assert max_error(grad, want_grad) < TOLERANCE[dtype]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_matches_float64(dtype: torch.dtype) -> None:
    logits, target = problem(12, 5000, dtype, seed=torch.seed() % 1000)
    with dispatch.using(OURS):
        value, grad = in_parts(logits, target, [4999, 1])
    want_value, want_grad = exact(logits, target)
    assert max_error(value, want_value) < 1e-6
    assert max_error(grad, want_grad) < TOLERANCE[dtype]


@pytest.mark.usefixtures("interpreted")
def test_triton_on_no_rows_masked_columns_and_in_place() -> None:
    logits, target = problem(4, 70, torch.float32)
    logits[:, 64:] = -torch.inf  # padded vocabulary
    target.clamp_(max=63)
    with dispatch.using(OURS):
        nothing = loss.ce_stats(logits[:0], target[:0], 0)
        assert nothing.shape == (0, 3)
        assert [x.shape for x in loss.ce_combine(nothing.unsqueeze(0), target[:0], 0)] == [(0,)] * 3
        masked = torch.tensor([[-torch.inf, 0.0, 0.0]]).expand(2, 1, 3)
        assert loss.ce_combine(masked, target[:1], 0)[1].item() == -torch.inf
        value, grad = in_parts(logits, target, [64, 6])  # the last part is fully masked
        _, lse, _ = loss.ce_combine(loss.ce_stats(logits, target, 0).unsqueeze(0), target, loss.IGNORE_INDEX)
        ones, copy = torch.ones(4), logits.clone()
        loss.ce_grad_(copy, target, lse, ones, 0)
        assert torch.equal(copy, loss.ce_grad(logits, target, lse, ones, 0))
    want_value, want_grad = exact(logits, target)
    assert max_error(value, want_value) < 1e-6
    assert max_error(grad, want_grad) < 1e-6


def test_layer_passes_every_check() -> None:
    logits, target = problem(6, 33, torch.float32)
    lse, scale = torch.logsumexp(logits, -1), torch.ones(6)
    check_op(loss.ce_stats, (logits, target, 7))
    check_op(loss.ce_combine, (loss.ce_stats(logits, target, 0).unsqueeze(0), target, -100))
    check_op(loss.ce_grad, (logits, target, lse, scale, 0))
    check_op(loss.ce_grad_, (logits.clone(), target, lse, scale, 0))
    check_compiles(lambda x: loss.cross_entropy(x, target), logits)


def test_autograd_matches_torch_and_finite_differences() -> None:
    logits, target = problem(5, 11, torch.float64)
    x = logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss.cross_entropy(x, target), (x,))
    torch.testing.assert_close(loss.cross_entropy(x, target), F.cross_entropy(x, target, reduction="none"))


@pytest.mark.parametrize("chunk_rows", [4, 9, 64])
def test_linear_form_matches_torch(chunk_rows: int) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(27, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    w = torch.randn(50, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 50, (27,), generator=generator)
    target[3] = loss.IGNORE_INDEX
    want = torch.autograd.grad(F.cross_entropy(x @ w.t(), target, reduction="sum") * 0.25, (x, w))
    got_loss = loss.linear_cross_entropy(x, w, target, chunk_rows=chunk_rows)
    torch.testing.assert_close(got_loss, F.cross_entropy(x @ w.t(), target, reduction="sum"))
    torch.testing.assert_close(torch.autograd.grad(got_loss * 0.25, (x, w)), want)


class LiveLogits(TorchDispatchMode):
    """Most chunks of logits alive at once when a further op is dispatched."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape, self.alive, self.most = shape, weakref.WeakSet(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and tuple(out.shape) == self.shape:
            self.alive.add(out.untyped_storage())
        self.most = max(self.most, len(self.alive))
        return out


def test_linear_form_holds_one_chunk_of_logits_and_two_where_one_is_on_its_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, w = torch.randn(40, 6, requires_grad=True), torch.randn(30, 6, requires_grad=True)
    for group, most in ((None, 1), ("ranks", 2)):
        monkeypatch.setattr(loss, "start_gather", lambda stats, group: stats.unsqueeze(0))
        monkeypatch.setattr(loss, "finish", lambda gathered, group: gathered)
        with LiveLogits((8, 30)) as live:
            loss.linear_cross_entropy(x, w, torch.arange(40) % 30, chunk_rows=8, group=group).backward()
        assert live.most == most


def test_the_products_of_the_weights_gradient_are_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit the same sum, from products of three rows of the weight, and of the rest."""
    x, w = (torch.randn(rows, 6).bfloat16().requires_grad_() for rows in (40, 31))
    target = torch.arange(40) % 31
    grads = []
    for most in (loss.PRODUCT_BYTES, 3 * 2 * 6):
        monkeypatch.setattr(loss, "PRODUCT_BYTES", most)
        grads.append(torch.autograd.grad(loss.linear_cross_entropy(x, w, target, chunk_rows=8), (x, w)))
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)


def test_linear_form_compiles() -> None:
    target = torch.tensor([0, 5, -100, 2, 1])
    x, w = torch.randn(5, 8), torch.randn(6, 8)
    check_compiles(lambda x, w: loss.linear_cross_entropy(x, w, target, chunk_rows=2), x, w)


def test_work_is_six_bytes_a_logit_and_six_nhv() -> None:
    """Read and written bytes of bf16 logits: 2 + 2 + 2 (torch: 44 with a float32 copy), plus small vectors."""
    rows, cols, width = 64, 4096, 32
    logits = torch.randn(rows, cols).bfloat16().requires_grad_()
    target = torch.randint(0, cols, (rows,))
    with WorkCounter() as ours:
        loss.cross_entropy(logits, target).sum().backward()
    with WorkCounter() as torchs:
        F.cross_entropy(logits.float(), target, reduction="none").sum().backward()
    per_logit = ours.total.moved_bytes / logits.numel()
    assert 6.0 <= per_logit < 6.2
    assert torchs.total.moved_bytes / logits.numel() > 5 * per_logit
    x, w = torch.randn(rows, width, requires_grad=True), torch.randn(cols, width, requires_grad=True)
    with WorkCounter() as linear:
        loss.linear_cross_entropy(x, w, target, chunk_rows=16).backward()
    pointwise = 8 * logits.numel()
    assert linear.total.flops == 6 * rows * width * cols + pointwise
