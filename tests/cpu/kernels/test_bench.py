"""The GPU command without a GPU: its cases hold on the CPU, its counts are right, its refusal is one line."""

from __future__ import annotations

import time

import pytest
import torch

from planner.kernels import ring
from planner.reports import kernel_bench, kernel_extras, kernel_targets, kernels
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


def test_the_whole_command_at_tiny_shapes() -> None:
    """What a GPU will be asked, asked of a CPU: every row is there, and every target finds its figure."""
    flush = torch.zeros(8)
    bench = kernel_bench.Bench(device="cpu", small=True, flush=flush, peers_until_s=time.monotonic() + 60)
    saved: list[int] = []
    report = kernel_bench.run(bench, CASES, lambda so_far: saved.append(len(so_far["kernels"])))
    assert saved == [*range(1, len(CASES) + 1), len(CASES)]
    assert all(row["errors"]["ours"] < row["tolerance"] for row in report["kernels"])
    loss = next(row for row in report["kernels"] if row["name"] == "cross_entropy")
    assert loss["errors"]["loss_parallel"] < loss["tolerance"]
    assert report["memory"]["extra_chunks"] > 2  # of which 4 * 32 / 16 are the float32 sum
    judged = {row["what"]: row for row in kernel_targets.judged(report)}
    assert len(judged) == len(kernel_targets.TARGETS)
    missing = [what for what, row in judged.items() if row["met"] is None]
    assert [what for what in missing if not what.endswith(("fla over ours", "flashrnn over ours"))] == []
    text = kernel_bench.table(report)
    assert text.count("not measured") == len(missing) and "ring step of 2048 over 2048 keys" in text


def test_after_the_time_for_peers_ours_is_measured_alone() -> None:
    bench = kernel_bench.Bench(device="cpu", small=True, flush=torch.zeros(8), peers_until_s=time.monotonic() - 1)
    row = kernel_bench.measure(bench, CASES[0], {"copy": 1e9, "gemm": 1e9})
    assert list(row["passes"]["forward"]["seconds"]) == ["ours"]
    assert row["errors"]["eager"] == "left out: the time for peers was over"


@pytest.mark.parametrize(
    ("ours_s", "liger_s", "frac", "met"), [(1.0, 1.1, 0.9, (True, True)), (1.2, 1.1, 0.8, (False, False))]
)
def test_targets_are_judged_by_what_is_there(
    ours_s: float, liger_s: float, frac: float, met: tuple[bool, bool]
) -> None:
    found = {"seconds": {"ours": ours_s, "eager": 3.0, "liger": liger_s}, "roof_frac": frac}
    report = {"kernels": [{"name": "swiglu", "passes": {"forward": found}}], "ring": [], "memory": None}
    judged = {row["what"]: row for row in kernel_targets.judged(report) if row["met"] is not None}
    assert judged.keys() == {"swiglu forward, of the roof", "swiglu forward, the best peer over ours"}
    assert tuple(row["met"] for row in judged.values()) == met


def test_torchs_merge_and_ours_agree() -> None:
    q, k, v = torch.randn(3, 1, 2, 8, 16).unbind(0)
    parts = [torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, keys, v)[:2] for keys in (k, k + 1)]
    merger = kernel_extras.torch_merger(*parts[0])
    merger.step(*parts[1], partial=False)
    for got, wanted in zip(merger.results(), ring.merge_partials(*parts[0], *parts[1]), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernel_bench.main([]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
