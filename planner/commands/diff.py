"""planner diff: what differs between two plans, and what the difference costs."""

from __future__ import annotations

import argparse
from pathlib import Path

from planner.commands import arguments
from planner.diff import Change, cost_changes, decision_changes, input_changes
from planner.files import read_plan
from planner.render import Grid, Report, gib, seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("before", type=Path, help="plan.json")
    parser.add_argument("after", type=Path, help="another plan.json")
    arguments.add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Print what differs; exit code 0 whether or not anything does."""
    a, b = read_plan(args.before), read_plan(args.after)
    changes = (*input_changes(a, b), *decision_changes(a, b))
    costs = cost_changes(a, b)
    step_a, step_b = a.predicted.step_s, b.predicted.step_s
    peak_a, peak_b = a.predicted.peak_memory_bytes, b.predicted.peak_memory_bytes
    parts: list[str | Grid] = [_grid(changes)] if changes else ["same     inputs and decisions are equal"]
    if costs:
        rows = tuple((name, f"{x:.4g}", f"{y:.4g}", f"{y - x:+.4g}") for name, x, y in costs)
        parts.append(Grid(columns=("<seconds", "before", "after", "change"), rows=rows))
    parts.append(
        f"step     {seconds(step_a)} -> {seconds(step_b)} ({100 * (step_b / step_a - 1):+.2f} %); peak "
        f"{gib(peak_a)} -> {gib(peak_b)} GiB"
    )
    data = {
        "schema": "planner.diff/1",
        "changes": [{"field": c.field, "before": c.before, "after": c.after} for c in changes],
        "change_s": {name: y - x for name, x, y in costs},
        "step_s": [step_a, step_b],
        "peak_memory_bytes": [peak_a, peak_b],
    }
    arguments.answer(Report(parts=tuple(parts), data=data), args)
    return 0


def _grid(changes: tuple[Change, ...]) -> Grid:
    return Grid(columns=("<field", "<before", "<after"), rows=tuple((c.field, c.before, c.after) for c in changes))
