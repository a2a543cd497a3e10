"""The accuracy gate: scores against a committed baseline, partition by partition."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# How much worse a partition may get: a tenth of its value, at least one point.
TOLERANCE_FRAC = 0.10
TOLERANCE_MIN = 0.01
# (measure, figure, whether more is better)
FIGURES = (
    ("time", "mape", False), ("time", "median", False), ("memory", "mape", False), ("regret", "mean", False),
    ("rank", "spearman_mean", True), ("feasibility", "balanced_accuracy", True),
)  # fmt: skip
ROWS = (("time", "rows"), ("memory", "rows"), ("regret", "groups"), ("feasibility", "rows"))


def baseline_of(score: Mapping[str, Any]) -> dict[str, Any]:
    """What the gate keeps of a full score: the compared figures and the row counts of every partition."""
    kept: dict[str, Any] = {}
    for name, part in partitions(score):
        kept[name] = {
            f"{measure}.{figure}": part[measure][figure]
            for measure, figure in (*((m, f) for m, f, _ in FIGURES), *ROWS)
            if part[measure][figure] is not None
        }
    return kept


def partitions(score: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """("all", score) and ("source/NAME", its score) and so on."""
    yield "all", score
    for key, parts in score.items():
        if key.startswith("by_"):
            for name, part in parts.items():
                yield f"{key[3:]}/{name}", part


def regressions(score: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[str]:
    """One line for every figure that got worse by more than its tolerance or row that is no longer predicted."""
    now, lines = baseline_of(score), []
    better = {f"{measure}.{figure}" for measure, figure, more in FIGURES if more}
    for name, kept in baseline.items():
        if name not in now:
            lines.append(f"{name}: no row of it is predicted any more")
            continue
        for figure, old in kept.items():
            new = now[name].get(figure)
            if new is None:
                lines.append(f"{name}: {figure} was {old:.4g}, now there is none")
            elif figure.endswith((".rows", ".groups")):
                if new < old:
                    lines.append(f"{name}: {figure} fell from {old} to {new}")
            elif (old - new if figure in better else new - old) > max(TOLERANCE_MIN, TOLERANCE_FRAC * abs(old)):
                lines.append(f"{name}: {figure} went from {old:.4g} to {new:.4g}")
    return lines
