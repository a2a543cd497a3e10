"""The choice of implementations as data."""

from __future__ import annotations

import importlib.util
import json

import pytest

from planner.kernels import (  # noqa: F401  declare ops
    dispatch,
    exchange,
    gla,
    norm,
)

HAS_TRITON = importlib.util.find_spec("triton") is not None


def test_cpu_runs_torch_and_cuda_ours_where_there_is_one() -> None:
    assert set(dispatch.table("cpu").values()) == {"torch"}
    cuda = dispatch.table("cuda")
    assert json.loads(json.dumps(cuda)) == cuda
    assert cuda["rms_norm"] == ("ours" if HAS_TRITON else "torch")
    assert cuda["moe_permute"] == "torch"  # index_select is a kernel of torch's own


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
        ({"moe_permute": "ours"}, "cannot run on 'ours'; here it has: torch"),
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
