"""The choice of implementations as data."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from planner.costmodel.kernel_choice import KERNELS, OPS, PACKAGES, RING_SCORE_BYTES, kernels_on
from planner.costmodel.kernels import CHUNK_KERNELS, PRODUCT_BYTES, weight_sum_bytes
from planner.kernels import (  # noqa: F401  declare ops
    dispatch,
    exchange,
    gla,
    loss,
    lstm,
    norm,
    pointwise,
    quantize,
    ring,
    slstm,
)
from planner.kernels.counters import WorkCounter
from planner.kernels.op import Work

HAS_TRITON = importlib.util.find_spec("triton") is not None


def test_cpu_runs_torch_and_cuda_ours_where_there_is_one() -> None:
    assert set(dispatch.table("cpu").values()) == {"torch"}
    cuda = dispatch.table("cuda")
    assert json.loads(json.dumps(cuda)) == cuda
    assert cuda["rms_norm"] == ("ours" if HAS_TRITON else "torch")
    assert cuda["gla_backward"] == cuda["rms_norm"]


def test_a_plan_chooses_among_what_is_declared() -> None:
    """The cost model's list of ops and implementations is that of the kernels, and so are the packages they need."""
    assert {op: tuple(OPS[op]) for op in sorted(OPS)} == dict(sorted(dispatch._DECLARED.items()))
    assert {op for op, how in kernels_on("h100-80gb").items() if how == "ours"} == {
        op for op, has in dispatch._DECLARED.items() if "ours" in has
    }
    assert set(kernels_on("cpu").values()) == {"torch"}
    assert {how: name.replace("-", "_").removesuffix("_core") for how, name in PACKAGES.items()} == {
        how: name for how, name in dispatch._NEEDS.items() if how != "torch"
    }


def work_of(call: Callable[..., Any], *args: Any) -> Work:
    with WorkCounter() as counted:
        call(*args)
    return counted.total


def kernel_calls() -> dict[str, tuple[int, list[tuple[Any, Any, tuple[Any, ...]]]]]:
    """By kernel: bytes that ours moves forward, and (op, its torch form, arguments) forward and backward."""
    x, other, dy, dh = (torch.randn(64, 4096).bfloat16() for _ in range(4))
    weight, rstd = torch.randn(4096).bfloat16(), torch.rand(64)
    head, turn = torch.randn(1, 256, 8, 128).bfloat16(), torch.rand(256, 64)
    logits, target, ones = torch.randn(64, 4096).bfloat16(), torch.zeros(64, dtype=torch.int64), torch.ones(64)
    parts = [-torch.rand(1, 256, 2, 128).bfloat16() for _ in range(4)]
    state = gla.empty_state(parts[0], parts[2])

    def loss_by(stats: Any, combine: Any) -> Any:
        return lambda: combine(stats(logits, target, 0).unsqueeze(0), target, -100)

    back = (norm.rms_norm_backward, norm._rms_backward)
    found = {
        "rms_norm": [(norm.rms_norm_op, norm._rms, (x, weight, 1e-6)), (*back, (dy, None, x, weight, rstd))],
        "add_rms_norm": [
            (norm.add_rms_norm_op, norm._add_rms, (x, other, weight, 1e-6)), (*back, (dy, dh, x, weight, rstd)),
        ],
        "swiglu": [
            (pointwise.swiglu, pointwise._swiglu, (x, other)),
            (pointwise.swiglu_backward, pointwise._swiglu_backward, (dy, x, other)),
        ],
        "rope": [(pointwise.rope_op, pointwise._rope, (head, turn, turn, back)) for back in (False, True)],
        "cross_entropy": [
            (loss_by(loss.ce_stats, loss.ce_combine), loss_by(loss._stats, loss._combine), ()),
            (loss.ce_grad, loss._grad, (logits, target, ones, ones, 0)),
        ],
        "gla": [
            (gla.gla_op, gla._gla, (*parts, state, 1.0)),
            (gla.gla_backward, gla._gla_backward, (parts[2], state, *parts, state, 1.0)),
        ],
    }  # fmt: skip
    return {name: (work_of(ways[0][0], *ways[0][2]).moved_bytes, ways) for name, ways in found.items()}


def test_the_cost_model_has_the_bytes_and_launches_of_implementations() -> None:
    """Ours and torch's, counted in 16 bits. Torch's linear attention launches by the chunk: its launches grow."""
    found = kernel_calls()
    assert found.keys() == KERNELS.keys()
    for name, (num_bytes, ways) in found.items():
        for (op, plain, args), moves in zip(ways, KERNELS[name].moves, strict=True):
            for how, call in (("ours", op), ("torch", plain)):
                work, (passes, launches) = work_of(call, *args), moves[how]
                rel = 0.1 if name == "gla" else 0.02  # the states at both ends weigh more in a short sequence
                assert work.moved_bytes / num_bytes == pytest.approx(passes, rel=rel), (name, how)
                grows = (name, how) == ("gla", "torch")
                assert work.kernels == launches or grows and work.kernels < launches, (name, how)


def test_the_cost_model_has_the_score_bytes_of_torchs_ring_step() -> None:
    q, place = torch.randn(1, 4, 512, 64).bfloat16(), torch.arange(512, dtype=torch.int32)
    where = (place, place, place * 0, place * 0, 0.1, True, 512 * 513 // 2)
    forward = work_of(ring._step, q, q, q, *ring.start(q), *where)
    out, lse = ring._step(q, q, q, *ring.start(q), *where)
    backward = work_of(ring._step_backward, out, lse, q, q, q, lse, *where)
    found = [work.moved_bytes / (4 * 512 * 512) for work in (forward, backward)]
    assert found == pytest.approx(RING_SCORE_BYTES, rel=0.02)


def test_the_cost_model_has_the_sums_of_the_chunked_loss() -> None:
    """What a further chunk moves per weight, the weight itself read by two products aside, and what it launches."""

    def work(chunk_rows: int) -> Work:
        x, w = (torch.randn(rows, 32).bfloat16().requires_grad_() for rows in (64, 8192))
        with WorkCounter() as counted:
            loss.linear_cross_entropy(x, w, torch.zeros(64, dtype=torch.int64), chunk_rows=chunk_rows).backward()
        return counted.total

    one, four = work(64), work(16)
    sums = weight_sum_bytes(np.array([1.0, 2.0]), 2)
    further = (four.moved_bytes - one.moved_bytes) / 3 / (8192 * 32)
    assert further == pytest.approx(2 * 2 + sums[1] - sums[0], rel=0.02)
    assert four.kernels - one.kernels == 3 * CHUNK_KERNELS
    assert loss.PRODUCT_BYTES == PRODUCT_BYTES


def test_choices_of_another_machine_hold_for_fake_tensors() -> None:
    with dispatch.pretending({"gla": "fla"}):
        assert dispatch.choice("gla", "cpu") == "fla"
        with dispatch.pretending({"gla": "torch"}):
            assert dispatch.choice("gla", "cpu") == "torch"
        assert dispatch.choice("gla", "cpu") == "fla"
    assert dispatch.choice("gla", "cpu") == "torch"


def test_a_choice_holds_inside_its_block_and_is_recorded() -> None:
    with dispatch.using({"rms_norm": "torch"}):
        with dispatch.using({"gla": "torch"}):
            assert dispatch.table("cuda")["rms_norm"] == "torch"
        assert dispatch.table("cuda")["rms_norm"] == "torch"
    assert dispatch.table("cuda")["rms_norm"] == ("ours" if HAS_TRITON else "torch")


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"rmsnorm": "ours"}, "no kernel op 'rmsnorm'"),
        ({"gla_backward": "liger"}, "cannot run on 'liger'; here it has: torch"),
    ],
)
def test_bad_choice_is_refused_and_changes_nothing(chosen: dict[str, str], message: str) -> None:
    before = dispatch.table("cuda")
    with pytest.raises(dispatch.DispatchError, match=message):
        dispatch.choose({"rms_norm": "torch"} | chosen)
    assert dispatch.table("cuda") == before


@pytest.mark.skipif(importlib.util.find_spec("fla") is not None, reason="fla is installed")
def test_a_library_that_is_missing_cannot_be_chosen() -> None:
    with pytest.raises(dispatch.DispatchError, match="'gla' cannot run on 'fla'"):
        dispatch.choose({"gla": "fla"})
