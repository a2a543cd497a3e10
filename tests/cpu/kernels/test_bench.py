"""The GPU command without a GPU: its cases hold on the CPU, its counts are right, its refusal is one line."""

from __future__ import annotations

import pytest
import torch

from planner.reports import kernel_bench, kernels
from planner.reports.kernel_cases import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ours_is_the_definition(case: Case) -> None:
    assert kernel_bench.worst_error(case, case.ours, "cpu") < case.tolerance


def test_a_wrong_kernel_is_seen() -> None:
    case = CASES[0]
    assert kernel_bench.worst_error(case, lambda x, w: case.ours(x, w) * 1.05, "cpu") > case.tolerance


def test_the_committed_counts_are_not_stale() -> None:
    """reports/kernels.md is what its command writes now, and says what the goals say."""
    lines = kernels.text()
    assert lines == kernels.PATH.read_text(), "run `python -m planner.reports.kernels`"
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines.splitlines() if line[:1] == "|"]
    rows = {name: rest for name, *rest in cells}
    assert float(rows["cross_entropy"][0]) == pytest.approx(6.0, abs=0.05)
    assert float(rows["cross_entropy"][1]) == pytest.approx(44.0, abs=0.2)
    assert float(rows["merge_partials"][0]) < float(rows["merge_partials"][1]) / 4
    over_ranks = [rows[f"cross_entropy, {whose}"] for whose in ("ours", "torch's loss_parallel")]
    assert [row[2] for row in over_ranks] == ["1", "3"]
    assert [round(float(row[0].split()[0])) for row in over_ranks] == [6, 92]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernel_bench.main([]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
