"""The closed loop and the GPU check, whole, at their smallest size: every step is run, no figure is judged."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from plans import graph

from planner.costmodel.profile import Profile, decode_profile
from planner.profiler.profile import INTERRUPTED, Outcome
from planner.reports import closed_loop

pytestmark = pytest.mark.alone
COMMAND = [sys.executable, "-c", "import sys; from planner.cli import entry; sys.exit(entry())"]


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=560, check=False,
                          env=environment)  # fmt: skip


def test_the_loop_closes(tmp_path: Path) -> None:
    done = run(
        tmp_path, *COMMAND, "calibrate-loop", "--ranks", "2", "--models", "narrow", "--plans", "3", "--rounds", "2",
        "--steps", "1", "--budget", "20s", "--parts", "0.9", "-o", "loop.md", "--record", "record",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "record" / "closed_loop.json").read_text())["rows"]
    assert len(rows) == 3 and all(not row["failed"] and len(row["rounds_s"]) == 2 for row in rows), (rows, done.stderr)
    assert all(row["peak_bytes"] > 0 for row in rows)
    assert decode_profile((tmp_path / "record" / "closed_loop_profile.json").read_bytes(), "p").samples
    assert "## Against the targets" in (tmp_path / "loop.md").read_text()


def test_an_interruption_while_it_profiles_ends_the_loop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nothing = Profile(tool_version="1", conditions=(), samples=())
    stopped = Outcome(profile=nothing, measured=0, settled=False, failed=(), died=INTERRUPTED)
    monkeypatch.setattr(closed_loop, "run_profile", lambda request, known: stopped)
    monkeypatch.setattr(closed_loop, "trace_model", lambda source, seq_len: graph())
    parser = argparse.ArgumentParser()
    closed_loop.add_arguments(parser)
    record = tmp_path / "loop"  # where no --record is given
    args = parser.parse_args(["--ranks", "2", "-o", str(tmp_path / "loop.md")])
    with pytest.raises(KeyboardInterrupt):
        closed_loop.main(args)
    assert (record / "progress").is_dir()
    assert not list(record.glob("closed_loop*")) and not list(record.glob("progress/profile-*"))


def test_the_gpu_check_runs_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "planner.reports.gpu_check", "--out", "found"]
    done = run(tmp_path, *command, "--tiny", "--limit", "1", "--budget", "12")  # seconds: no figure is judged
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "found" / "cases.json").read_text())["rows"]
    assert row["failed"] == "" and row["step_s"] > 0 and row["peak_bytes"] > 0
    assert (tmp_path / "found" / "profile.json").exists() and (tmp_path / "found" / "README.md").exists()


def test_without_a_gpu_the_check_says_so_in_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, sys.executable, "-m", "planner.reports.gpu_check", "--out", "found", "--cluster", "h200")
    assert done.returncode == 2 and "no GPU here" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "found").exists()
