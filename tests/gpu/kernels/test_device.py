"""On a GPU: every kernel of the bench, and every installed backend of a dispatched op, against float64."""

from __future__ import annotations

import pytest
import torch

from planner.kernels import dispatch
from planner.reports import kernel_bench
from planner.reports.kernel_cases import CASES, Case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ours_is_the_definition(case: Case) -> None:
    assert kernel_bench.worst_error(case, case.ours, "cuda") < case.tolerance


@pytest.mark.parametrize("op", ["rms_norm", "rms_norm_backward", "swiglu", "gla"])
def test_other_backends_have_the_same_contract(op: str) -> None:
    case = next(c for c in CASES if op.startswith(c.name))
    for backend in dispatch.available(op):
        with dispatch.using({op: backend}):
            assert kernel_bench.worst_error(case, case.ours, "cuda") < case.tolerance, backend
