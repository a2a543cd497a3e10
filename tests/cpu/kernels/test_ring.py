"""Ring attention steps against whole attention in float64: zigzag, packed documents, grouped heads, empty rows."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import check_compiles, check_op, max_error

from planner.kernels import dispatch, ring

OURS = {op: "ours" for op in ("ring_step", "ring_step_backward", "merge_partials")}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}
Vectors = tuple[torch.Tensor, torch.Tensor]


def layout(length: int, ranks: int, lengths: list[int]) -> list[Vectors]:
    """Per rank its zigzag positions and the documents there; `lengths` of packed documents, [] for one."""
    documents = torch.zeros(length, dtype=torch.int32)
    if lengths:
        documents = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths))
    positions = [ring.zigzag_positions(length, r, ranks) for r in range(ranks)]
    return [(p, documents[p.long()]) for p in positions]


def whole_attention(q, k, v, documents, dout):
    """Output, lse and gradients by materialised scores, float64."""
    q, k, v = (t.double().requires_grad_() for t in (q, k, v))
    place = torch.arange(q.shape[2])
    mask = (documents[:, None] == documents) & (place[:, None] >= place)
    wide_k, wide_v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = (q @ wide_k.transpose(-2, -1) * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    out = scores.softmax(-1) @ wide_v
    return out.detach(), scores.logsumexp(-1).detach(), torch.autograd.grad(out, (q, k, v), dout.double())


def run_ring(q, k, v, ranks: list[Vectors], dout):
    """What the ranks compute together, forward by steps, backward with the final lse; results in sequence order."""
    out, lse, dq, dk, dv = (torch.zeros_like(t, dtype=torch.float32) for t in (q, q[..., 0], q, k, v))
    where = [p.long() for p, _ in ranks]
    scale = q.shape[-1] ** -0.5
    for mine, (q_pos, q_doc) in zip(where, ranks, strict=True):
        part = ring.start(q[:, :, mine])
        for theirs, (k_pos, k_doc) in zip(where, ranks, strict=True):
            vectors = (q_pos, k_pos, q_doc, k_doc)
            pairs = ring.visible_pairs(*vectors, True)
            part = ring.ring_step(q[:, :, mine], k[:, :, theirs], v[:, :, theirs], *part, *vectors, scale, True, pairs)
        out[:, :, mine], lse[:, :, mine] = part
        delta = (dout[:, :, mine].float() * part[0]).sum(-1)
        for theirs, (k_pos, k_doc) in zip(where, ranks, strict=True):
            vectors = (q_pos, k_pos, q_doc, k_doc)
            block = (q[:, :, mine], k[:, :, theirs], v[:, :, theirs])
            grads = ring.ring_step_backward(dout[:, :, mine], delta, *block, part[1], *vectors, scale, True, 0)
            dq[:, :, mine] += grads[0]
            dk[:, :, theirs] += grads[1]
            dv[:, :, theirs] += grads[2]
    return out, lse, (dq, dk, dv)


def compare(dtype: torch.dtype, ranks: int, lengths: list[int], length: int) -> None:
    q, k, v, dout = (torch.randn(2, h, length, 16).to(dtype) for h in (4, 2, 2, 4))
    vectors = layout(length, ranks, lengths)
    documents = torch.empty(length, dtype=torch.int32)
    for positions, docs in vectors:
        documents[positions.long()] = docs
    out, lse, grads = run_ring(q, k, v, vectors, dout)
    want_out, want_lse, want_grads = whole_attention(q, k, v, documents, dout)
    assert max_error(out, want_out) < TOLERANCE[dtype]
    assert max_error(lse, want_lse) < 1e-6
    for got, want in zip(grads, want_grads, strict=True):
        assert max_error(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ranks", "lengths"), [(1, []), (2, []), (4, []), (2, [40, 60, 4, 24]), (4, [1, 127])])
def test_steps_add_up_to_whole_attention(ranks: int, lengths: list[int], dtype: torch.dtype) -> None:
    compare(dtype, ranks, lengths, 128)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("dtype", "lengths"), [(torch.float32, [30, 21, 45]), (torch.bfloat16, [])])
def test_triton_steps_add_up_to_whole_attention(dtype: torch.dtype, lengths: list[int]) -> None:
    with dispatch.using(OURS):
        compare(dtype, 2, lengths, 96)  # 48 rows a rank: tiles of 32 have a tail


def partials(rows: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Two partial results whose rows are full, empty on one side or on both."""
    a, b = torch.randn(2, 1, 2, rows, 16).to(dtype).unbind(0)
    lse_a, lse_b = torch.randn(2, 1, 2, rows).unbind(0)
    for out, lse, empty in ((a, lse_a, slice(0, 2)), (b, lse_b, slice(1, 3))):
        out[:, :, empty] = 0
        lse[:, :, empty] = -torch.inf
    return [a, lse_a, b, lse_b]


def merge_exact(a: torch.Tensor, lse_a: torch.Tensor, b: torch.Tensor, lse_b: torch.Tensor):
    weights = torch.stack([lse_a, lse_b]).double().exp()
    total = weights.sum(0)
    out = (weights.unsqueeze(-1) * torch.stack([a, b]).double()).sum(0) / total.clamp_min(1e-300).unsqueeze(-1)
    return out, total.log()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "ours"])
def test_merge_of_full_and_empty_rows(backend: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    if backend == "ours":
        request.getfixturevalue("interpreted")
    parts = partials(5, dtype)
    with dispatch.using({"merge_partials": backend}):
        out, lse = ring.merge_partials(*parts)
    want_out, want_lse = merge_exact(*parts)
    assert max_error(out, want_out) < (1e-6 if dtype == torch.float32 else 8e-3)
    assert max_error(lse, want_lse) < 1e-6


def step_inputs(dtype: torch.dtype) -> tuple:
    q, k, v = (torch.randn(1, h, 6, 4, dtype=dtype, requires_grad=True) for h in (2, 1, 1))
    out = torch.randn(1, 2, 6, 4, dtype=dtype, requires_grad=True)
    lse = torch.randn(1, 2, 6, dtype=dtype, requires_grad=True)
    place, docs = torch.arange(6, dtype=torch.int32), torch.tensor([0, 0, 1, 1, 2, 3], dtype=torch.int32)
    other = torch.tensor([0, 0, 1, 1, 2, 2], dtype=torch.int32)
    return q, k, v, out, lse, place, place, docs, other


def test_gradients_by_finite_differences() -> None:
    q, k, v, out, lse, *vectors = step_inputs(torch.float64)
    for causal in (True, False):
        step = lambda *t, c=causal: ring.ring_step(*t, *vectors, 0.5, c, 7)  # noqa: E731
        assert torch.autograd.gradcheck(step, (q, k, v, out, lse))
    b, lse_b = torch.randn_like(out, requires_grad=True), torch.randn_like(lse, requires_grad=True)
    assert torch.autograd.gradcheck(ring.merge_partials, (out, lse, b, lse_b))


def test_ops_pass_every_check() -> None:
    q, k, v, out, lse, *vectors = step_inputs(torch.float32)
    pairs = ring.visible_pairs(*vectors, True)
    assert pairs == 3 + 3 + 1  # documents 0, 1 and 2; the last query's document is not here
    check_op(ring.ring_step, (q, k, v, out, lse, *vectors, 0.5, True, pairs))
    plain = [t.detach() for t in (q, k, v, out, lse)]
    check_op(ring.ring_step_backward, (plain[3], plain[4], *plain[:3], plain[4], *vectors, 0.5, True, pairs))
    check_op(ring.merge_partials, (out, lse, out.detach(), lse.detach()))
    check_op(ring.merge_partials_backward, (plain[3], plain[4], *plain[3:5] * 2, *plain[3:5]))
    check_compiles(lambda out, lse: ring.merge_partials(out, lse, out * 2, lse + 1), *plain[3:5])
    check_compiles(lambda q, k, v: ring.ring_step(q, k, v, *plain[3:5], *vectors, 0.5, True, pairs), *plain[:3])


def test_flops_count_visible_pairs_only() -> None:
    """A causal step of a sequence of 8 with itself: 36 of 64 pairs, two products forward and five backward."""
    q = torch.randn(2, 3, 8, 16, requires_grad=True)
    place, docs = torch.arange(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    pairs = ring.visible_pairs(place, place, docs, docs, True)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        out, _ = ring.ring_step(q, q, q, *ring.start(q), place, place, docs, docs, 0.25, True, pairs)
        out.sum().backward()
    assert pairs == 36
    assert counter.get_total_flops() == (2 + 5) * 2 * 2 * 3 * 36 * 16


def test_uneven_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="100 does not split into 8"):
        ring.zigzag_positions(100, 0, 4)
