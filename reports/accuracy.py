"""`planner accuracy`: predictions against published and measured runs, and the gate that keeps them.

    planner accuracy                                  every run there is
    planner accuracy --source vTrain --per group      regret per group of alternative plans
    planner accuracy --against reports/baseline.json  exit code 5 when a partition got worse
    python -m planner.reports.accuracy --write        regenerate reports/accuracy.md, its plots and both baselines

Exit codes: 0 done, 2 unusable arguments or files, 5 the gate failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.reports import gate, metrics, tables
from planner.reports.predict import Prediction, predict, predict_cases
from planner.reports.rows import read_rows
from planner.reports.run_rows import read_runs, run_files

HERE = Path(__file__).resolve().parent
PUBLISHED = HERE / "published.csv"
SHARED_RUNS = HERE.parents[1] / "shared" / "data" / "runs.csv"
PER = ("component", "source", "gpu", "arch", "engine", "group")
FORMATS = ("table", "json", "md")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Predictions of one file of runs and how long they took."""

    path: Path
    predictions: list[Prediction]
    score: dict[str, Any]
    elapsed_s: float

    def json(self) -> dict[str, Any]:
        """The machine-readable report."""
        count = len(self.predictions)
        return {"runs": self.path.name, "estimates_per_s": count / max(self.elapsed_s, 1e-9), **self.score}


def default_runs() -> Path:
    """The full set of runs where it is checked out beside the project, else the table that comes with it."""
    return SHARED_RUNS if SHARED_RUNS.is_file() else PUBLISHED


def evaluate(path: Path, source: str = "") -> Result:
    """Predict every row of `path` whose source contains `source`; ValueError for an unusable file or no row.

    `path`: a CSV, or a run.json of planner.runtime, or a folder with such.
    """
    if path.is_dir() or path.suffix == ".json":
        return _evaluate_runs(path)
    rows = [row for row in read_rows(path) if source.lower() in row.source.lower()]
    if not rows:
        raise ValueError(f"{path}: no row" + (f" has a source with {source!r} in its name" if source else ""))
    started = time.perf_counter()
    predictions, skipped = predict(rows)
    elapsed_s = time.perf_counter() - started
    return Result(path=path, predictions=predictions, score=metrics.full_score(predictions, skipped),
                  elapsed_s=elapsed_s)  # fmt: skip


def _evaluate_runs(path: Path) -> Result:
    started = time.perf_counter()
    cases, skipped = read_runs(run_files(path))
    predictions, unpriced = predict_cases(cases)
    elapsed_s = time.perf_counter() - started
    return Result(path=path, predictions=predictions, score=metrics.full_score(predictions, skipped + unpriced),
                  elapsed_s=elapsed_s)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    runs = "runs in the schema of reports/SCHEMA.md, or the run.json of a run, or a folder with such"
    parser.add_argument("--runs", type=Path, metavar="FILE", help=runs)
    parser.add_argument("--source", default="", metavar="TEXT", help="only sources with this in their name")
    parser.add_argument("--per", choices=PER, default="source", help="what a line of the table stands for")
    parser.add_argument("--against", type=Path, metavar="BASELINE.json", help="fail (exit 5) where it got worse")
    parser.add_argument("--format", choices=FORMATS, default="table")


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    try:
        baseline = _read_baseline(args.against) if args.against else None
        result = evaluate(args.runs or default_runs(), args.source)
    except ValueError as error:
        print(f"planner accuracy: {error}", file=sys.stderr)
        return 2
    if args.format == "json":
        print(json.dumps(result.json(), indent=1))
    else:
        lines = tables.summary(result.predictions, result.score, result.elapsed_s, result.path.name)
        print("\n".join([*lines, "", *tables.per(result.predictions, args.per, markdown=args.format == "md")]))
    if baseline is None:
        return 0
    lines = gate.regressions(result.score, baseline)
    for line in lines:
        print(f"worse: {line}", file=sys.stderr)
    print(f"gate: {'FAILED, ' + str(len(lines)) + ' figures' if lines else 'passed'}", file=sys.stderr)
    return 5 if lines else 0


def _read_baseline(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read baseline {path}: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(data, dict) or not all(isinstance(part, dict) for part in data.values()):
        raise ValueError(f"{path} is no baseline; write one with python -m planner.reports.accuracy --write")
    return data


def _entry(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="planner accuracy", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add_arguments(parser)
    parser.add_argument("--write", action="store_true", help="rewrite the committed report, plots and baselines")
    args = parser.parse_args(argv)
    if args.write:
        from planner.reports.write import write_report

        return write_report()
    return main(args)


if __name__ == "__main__":
    sys.exit(_entry())
