"""The record of a run, read like a published run and predicted with the plan that is in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import plans
import pytest
from test_accuracy import run

from planner.plan import plan_body
from planner.reports.accuracy import evaluate
from planner.reports.run_rows import read_runs, run_files


def record(folder: Path, slower: float = 1.0, **changes: Any) -> Path:
    """A run.json of the plan on `plans`, whose steps took `slower` times what was predicted."""
    plan = plans.plan()
    data = {
        "schema": "planner.run/1", "plan": plan_body(plan), "device_type": "cuda",
        "step_time_s": slower * plan.predicted.step_s, "peak_tensor_bytes": [2**30, 3 * 2**30], **changes,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.json"
    path.write_text(json.dumps(data))
    return path


def test_a_run_is_predicted_as_its_plan_was(tmp_path: Path) -> None:
    path = record(tmp_path / "a", 2.0)
    (prediction,) = evaluate(path).predictions
    assert prediction.step_s == pytest.approx(plans.plan().predicted.step_s, rel=1e-9)
    assert prediction.time_error == pytest.approx(-0.5, rel=1e-6)
    assert prediction.measured_bytes == pytest.approx(3 * 2**30, rel=1e-9)
    assert prediction.memory_bytes < plans.plan().predicted.peak_memory_bytes  # allocated, not the process
    record(tmp_path / "b", 4.0)
    both = evaluate(tmp_path)
    assert both.score["time"]["rows"] == 2 and both.score["by_arch"]["dense"]["time"]["rows"] == 2
    assert run("--runs", str(tmp_path)) == 0


def test_runs_that_say_nothing_are_skipped_with_the_reason(tmp_path: Path) -> None:
    record(tmp_path / "short", step_time_s=None)
    record(tmp_path / "elsewhere", device_type="cpu")
    cases, skipped = read_runs(run_files(tmp_path))
    assert not cases
    assert skipped == {"no step after the warm-up": 1, "ran on cpu, planned for h100-80gb": 1}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"schema": "planner.run/0"}, "no record of a run"),
        ({"plan": None}, "not a plan"),
        ({"step_time_s": -1.0}, "not a positive number"),
        ({"peak_tensor_bytes": "much"}, "not a positive number"),
    ],
)
def test_damaged_records_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], text: str
) -> None:
    path = record(tmp_path, **changes)
    assert run("--runs", str(path)) == 2
    message = capsys.readouterr().err
    assert text in message and str(path) in message and message.count("\n") == 1
    path.write_text("{")
    assert run("--runs", str(path)) == 2
    assert run("--runs", str(tmp_path / "none.json")) == 2
    (tmp_path / "empty").mkdir()
    assert run("--runs", str(tmp_path / "empty")) == 2
