"""Prices of torch's own ops, which its FlopCounterMode gets wrong, by hand arithmetic."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from planner.kernels.counters import WorkCounter, flop_mapping


def counted(call: object) -> int:
    with FlopCounterMode(display=False, custom_mapping=flop_mapping()) as counter:
        call()
    with WorkCounter() as ours:
        call()
    assert ours.total.flops == counter.get_total_flops()
    return ours.total.flops


@pytest.mark.parametrize("causal", [False, True])
def test_attention_on_cpu(causal: bool) -> None:
    batch, heads, length, dim = 2, 3, 8, 16
    q, k, v = torch.randn(3, batch, heads, length, dim).unbind(0)
    pairs = length * (length + 1) // 2 if causal else length * length
    forward = 4 * batch * heads * pairs * dim
    assert counted(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal)) == forward

    def both() -> None:
        x = q.clone().requires_grad_()
        F.scaled_dot_product_attention(x, k, v, is_causal=causal).sum().backward()

    assert counted(both) == forward + forward * 5 // 2


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_on_cuda_shapes(causal: bool) -> None:
    q = torch.empty(2, 3, 8, 16, device="meta", dtype=torch.bfloat16)
    pairs = 36 if causal else 64
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    assert counted(lambda: attend(q, q, q, 0.0, causal)) == 4 * 6 * pairs * 16


def test_grouped_mm_charges_each_row_once() -> None:
    a, b = torch.randn(32, 16).bfloat16(), torch.randn(4, 16, 24).bfloat16()
    offsets = torch.tensor([8, 8, 20, 32], dtype=torch.int32)
    assert counted(lambda: F.grouped_mm(a, b, offs=offsets)) == 2 * 32 * 16 * 24


def test_chunked_linear_cross_entropy() -> None:
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    rows, width, cols = 64, 8, 32
    target = torch.randint(0, cols, (rows,))
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=16)
    x, w = torch.randn(rows, width), torch.randn(cols, width)
    logits = 2 * rows * width * cols
    assert counted(lambda: F.linear_cross_entropy(x, w, target, options=options)) == logits
    x.requires_grad_()
    assert counted(lambda: F.linear_cross_entropy(x, w, target, options=options)) == 2 * logits
    w.requires_grad_()
    assert counted(lambda: F.linear_cross_entropy(x, w, target, options=options)) == 3 * logits


def test_views_and_allocations_cost_nothing_and_pointwise_moves_its_bytes() -> None:
    x = torch.randn(4, 8)
    with WorkCounter() as views:
        x.view(8, 4).t()
        torch.empty_like(x)
    assert views.total.moved_bytes == views.total.kernels == 0
    with WorkCounter() as pointwise:
        x + 1
    assert (pointwise.total.read_bytes, pointwise.total.written_bytes, pointwise.total.kernels) == (128, 128, 1)
