"""Scores by hand, the gate, the command, and the accuracy that the project holds itself to."""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest

from planner.reports import accuracy, gate, metrics
from planner.reports.accuracy import HERE, PUBLISHED, SHARED_RUNS, Result, evaluate
from planner.reports.memory_facts import memory_facts
from planner.reports.metrics import errors, spearman
from planner.reports.write import searched_step_s


@pytest.fixture(scope="module")
def published() -> Result:
    return evaluate(PUBLISHED)


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    accuracy.add_arguments(parser)
    return accuracy.main(parser.parse_args(argv))


def test_errors_by_hand() -> None:
    e = errors([0.1, -0.3, 0.2])
    assert e["rows"] == 3
    assert e["mape"] == pytest.approx(0.2)
    assert e["median"] == pytest.approx(0.2)
    assert e["p90"] == pytest.approx(0.28)
    assert e["bias"] == pytest.approx(0.0)
    assert errors([]) == {"rows": 0, "mape": None, "median": None, "p90": None, "bias": None}


def test_spearman_by_hand() -> None:
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    # 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15)
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(0.8660254)  # ties share rank 1.5
    assert spearman([1, 1], [1, 2]) == 0.0


def test_every_published_row_is_predicted(published: Result) -> None:
    assert published.score["skipped"] == {}
    assert published.score["time"]["rows"] == 73
    assert set(published.score) >= {"time", "memory", "regret", "rank", "feasibility", "skipped",
                                    "by_source", "by_gpu", "by_arch"}  # fmt: skip
    assert json.loads(json.dumps(published.json()))["estimates_per_s"] > 0


def test_megatron_and_korthikanti_step_times_are_within_15_per_cent_on_average(published: Result) -> None:
    rows = [p for p in published.predictions if p.row.source.startswith(("Megatron SC21", "Korthikanti"))]
    assert len(rows) == 25
    assert metrics.time_errors(rows)["mape"] < 0.15


@pytest.mark.parametrize("row_id", ["SC21-0004", "SC21-0006", "KORTH-0002", "KORTH-0004"])
def test_searched_plan_is_predicted_no_slower_than_the_published_one(published: Result, row_id: str) -> None:
    row = next(p for p in published.predictions if p.row.id == row_id)
    assert searched_step_s(row.case) <= row.step_s


def test_memory_constants_of_korthikanti_come_out() -> None:
    facts = memory_facts()
    assert len(facts) == 12
    for fact in facts:
        assert abs(fact.error) < 0.002, fact.label


def test_regret_is_over_the_best_and_at_least_one(published: Result) -> None:
    groups = metrics.plan_groups(published.predictions)
    assert groups
    for members in groups.values():
        chosen = min(members, key=lambda p: (not p.fits, p.step_s))
        assert metrics.regret_of(members) == chosen.measured_s / min(p.measured_s for p in members) >= 1


def test_published_table_passes_its_gate(published: Result) -> None:
    baseline = json.loads((HERE / "baseline_published.json").read_text())
    assert gate.regressions(published.score, baseline) == []


@pytest.mark.skipif(not SHARED_RUNS.is_file(), reason="the full set of runs is not checked out beside the project")
def test_full_set_passes_its_gate_within_a_cpu_minute() -> None:
    started = time.process_time()  # not the wall clock: other work on the machine is no regression
    result = evaluate(SHARED_RUNS)
    baseline = json.loads((HERE / "baseline.json").read_text())
    assert gate.regressions(result.score, baseline) == []
    assert time.process_time() - started < 60


def worse(score: dict[str, Any], part: str, measure: str, figure: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(score)
    node = changed if part == "all" else changed[f"by_{part.split('/')[0]}"][part.split("/")[1]]
    node[measure][figure] = value
    return changed


def test_gate_names_what_got_worse(published: Result) -> None:
    baseline = gate.baseline_of(published.score)
    assert gate.regressions(published.score, baseline) == []
    name = "source/Korthikanti 2022 (activation recomputation)"
    slower = worse(published.score, name, "time", "mape", published.score["time"]["mape"] + 0.5)
    assert [line.split(": ")[0] for line in gate.regressions(slower, baseline)] == [name]
    fewer = worse(published.score, "all", "time", "rows", 72)
    assert gate.regressions(fewer, baseline) == ["all: time.rows fell from 73 to 72"]
    lost = copy.deepcopy(published.score)
    del lost["by_gpu"]["V100-32GB-SXM3"]
    assert gate.regressions(lost, baseline) == ["gpu/V100-32GB-SXM3: no row of it is predicted any more"]
    within = worse(published.score, "all", "time", "mape", published.score["time"]["mape"] + 0.005)
    assert gate.regressions(within, baseline) == []
    ranked = worse(published.score, "all", "rank", "spearman_mean", 0.1)
    assert "spearman_mean" in gate.regressions(ranked, baseline)[0]


def test_command_prints_tables_and_fails_the_gate_with_exit_code_5(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for per in accuracy.PER:
        assert run("--runs", str(PUBLISHED), "--per", per) == 0
        assert all(len(line) <= 112 for line in capsys.readouterr().out.splitlines())
    assert run("--runs", str(PUBLISHED), "--format", "json", "--source", "korth") == 0
    assert json.loads(capsys.readouterr().out)["time"]["rows"] == 9
    baseline = json.loads((HERE / "baseline_published.json").read_text())
    baseline["all"]["time.mape"] = 0.0
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps(baseline))
    assert run("--runs", str(PUBLISHED), "--against", str(path)) == 5
    assert "worse: all: time.mape went from 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--runs", "nowhere.csv"), "cannot read nowhere.csv: No such file"),
        (("--runs", str(PUBLISHED), "--source", "nobody"), "no row has a source with 'nobody'"),
        (("--runs", str(PUBLISHED), "--against", str(PUBLISHED)), "cannot read baseline"),
        (("--runs", str(PUBLISHED), "--against", "nowhere.json"), "cannot read baseline nowhere.json: No such file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*argv) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
