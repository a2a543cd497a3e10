"""The choice of implementations as data."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from torch._library.custom_ops import CustomOpDef

from planner.costmodel.kernels import CHUNK_KERNELS, LOSS_PASSES, kernels_on, weight_sum_bytes
from planner.kernels import (  # noqa: F401  declare ops
    dispatch,
    exchange,
    gla,
    loss,
    norm,
    pointwise,
    ring,
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
    """The cost model's list of ops is that of the modules that the runtime uses, as a GPU and as a CPU run them."""
    used = (exchange, loss, norm, pointwise, ring)
    ops = {v._name for m in used for v in vars(m).values() if isinstance(v, CustomOpDef)}
    ours = {op for op in ops if "ours" in dispatch._DECLARED[op]}
    assert kernels_on("h100-80gb") == dict.fromkeys(sorted(ours), "ours")
    assert set(kernels_on("cpu").values()) == {"torch"}


def test_the_cost_model_has_the_passes_of_the_loss() -> None:
    logits, target = torch.randn(16, 4096).bfloat16().requires_grad_(), torch.zeros(16, dtype=torch.int64)
    with WorkCounter() as counted:
        loss.cross_entropy(logits, target).sum().backward()
    assert counted.total.moved_bytes / (2 * logits.numel()) == pytest.approx(LOSS_PASSES["ours"], rel=0.02)


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
