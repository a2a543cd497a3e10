"""The GPU command without a GPU: its cases hold on the CPU, its counts are right, its refusal is one line."""

from __future__ import annotations

import pytest
import torch

from planner.reports import kernel_bench
from planner.reports.kernel_cases import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ours_is_the_definition(case: Case) -> None:
    assert kernel_bench.worst_error(case, case.ours, "cpu") < case.tolerance


def test_a_wrong_kernel_is_seen() -> None:
    case = CASES[0]
    assert kernel_bench.worst_error(case, lambda x, w: case.ours(x, w) * 1.05, "cpu") > case.tolerance


def test_counts_at_the_goals_shapes() -> None:
    rows = {r.split("|")[1].strip(): r.split("|")[2:] for r in kernel_bench.counts_table().splitlines()[2:]}
    ours, torchs = (float(x) for x in rows["cross_entropy"][:2])
    assert ours == pytest.approx(6.0, abs=0.05)
    assert torchs == pytest.approx(44.0, abs=0.2)
    assert float(rows["merge_partials"][0]) < float(rows["merge_partials"][1]) / 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernel_bench.main([]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
