"""The closed loop's scores and its report. No I/O."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from planner.costmodel.strategy import PlanSpec
from planner.reports.metrics import spearman

TARGETS = {"spearman": 0.9, "regret": 1.05, "time": 0.12, "memory": 0.05}
_QUIET_LOAD = 0.5  # processes that may run beside us


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One plan: predicted before it ran, and measured; seconds by round, bytes of the fullest rank."""

    model: str
    ranks: int
    options: str
    predicted_s: float
    shared_s: float
    predicted_bytes: float
    rounds_s: tuple[float, ...]
    peak_bytes: float
    failed: str

    @property
    def data(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)

    @property
    def measured_s(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.rounds_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """How well a group of plans was predicted, and how well any prediction could do: the noise between rounds."""

    plans: int
    spearman: float
    regret: float
    time_error: float
    memory_error: float | None
    noise: float
    noise_spearman: float


def options(spec: PlanSpec) -> str:
    """A plan in a few words."""
    parts = [f"tp{spec.tp}" + "+sp" * spec.sequence_parallel, f"pp{spec.pp}" + f"v{spec.vpp}" * (spec.vpp > 1),
             f"dp{spec.dp}", f"zero{spec.zero_stage}", f"u{spec.ulysses}", f"mbs{spec.micro_batch_size}",
             spec.layers[0].recompute]  # fmt: skip
    plain = ("tp1", "pp1", "dp1", "zero0", "u1", "none")
    return " ".join(part for part in parts if part not in plain)


def scores(rows: Sequence[Row], shared: bool) -> Scores:
    """Scores of the rows that ran, by the plain prediction or by the one for shared cores."""
    predicted = [row.shared_s if shared else row.predicted_s for row in rows]
    measured = [row.measured_s for row in rows]
    first = min(range(len(rows)), key=lambda i: predicted[i])
    memory = [abs(row.predicted_bytes / row.peak_bytes - 1) for row in rows if row.peak_bytes]
    again = [row for row in rows if len(row.rounds_s) > 1]
    return Scores(
        plans=len(rows), spearman=spearman(predicted, measured), regret=measured[first] / min(measured),
        time_error=_median_off(predicted, measured),
        memory_error=statistics.median(memory) if memory else None,
        noise=statistics.median(max(r.rounds_s) / min(r.rounds_s) - 1 for r in again) if again else 0.0,
        noise_spearman=spearman([r.rounds_s[0] for r in again], [r.rounds_s[-1] for r in again]) if again else 0.0,
    )  # fmt: skip


def median_error(rows: Sequence[Row]) -> float:
    """Median relative error of the step time on shared cores."""
    return _median_off([row.shared_s for row in rows], [row.measured_s for row in rows])


def _median_off(predicted: Sequence[float], measured: Sequence[float]) -> float:
    return statistics.median(abs(p / m - 1) for p, m in zip(predicted, measured, strict=True))


def markdown(rows: Sequence[Row], facts: dict[str, Any]) -> str:
    """The whole report."""
    ran = [row for row in rows if row.rounds_s]
    lines = [*_head(facts), "", *_score_table(ran), "", *_judgement(ran), "", *_curve(facts["curve"])]
    lines += [*_misses(ran), "", *_plans(ran), ""]
    failed = [row for row in rows if row.failed]
    if failed:
        lines += ["## Plans that did not run", ""]
        lines += [f"- {row.model}, {row.ranks} ranks, {row.options}: {row.failed}" for row in failed]
    return "\n".join(lines).rstrip() + "\n"


def _head(facts: dict[str, Any]) -> list[str]:
    load = max(facts["load_before"], facts["load_after"])
    busy = facts["load_before"] > _QUIET_LOAD
    lines = [
        "# The closed loop: measured, planned, run, compared",
        "",
        "Written by `planner calibrate-loop` (reports/closed_loop.py); raw figures in "
        "reports/measured/closed_loop.json, drawn in plots/closed_loop.png. Nothing is fitted to the runs.",
        "",
        f"{facts['date']}, {facts['device']}, {facts['cores']} cores, gloo; profile of {facts['samples']} samples in "
        f"{facts['profile_s']:.0f} s; {facts['rounds']} rounds of at least {facts['steps']} timed steps, interleaved; "
        f"load average before the start {facts['load_before']:.1f}, highest {load:.1f}.",
    ]
    if busy:
        lines += ["", "**The machine was busy with other work: these timings show that the loop works, not how good "
                  "the predictions are. Run it again on a quiet machine before quoting a figure.**"]  # fmt: skip
    return lines


def _score_table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| model | ranks | prediction | plans | Spearman | regret of first choice | median time error | "
        "median memory error | noise between rounds | Spearman of two rounds |",
        "|:--|:--|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for model in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == model]
        groups = [
            ("all", mine),
            *((str(n), [r for r in mine if r.ranks == n]) for n in sorted({r.ranks for r in mine})),
        ]
        for name, group in groups:
            for shared in (False, True):
                s = scores(group, shared)
                memory = "" if s.memory_error is None else f"{s.memory_error:.1%}"
                lines.append(
                    f"| {model} | {name} | {'shared cores' if shared else 'plain'} | {s.plans} | {s.spearman:.3f} | "
                    f"{s.regret:.3f} | {s.time_error:.1%} | {memory} | {s.noise:.1%} | {s.noise_spearman:.3f} |"
                )
    return [
        *lines,
        "",
        "`plain`: the cost model as it prices any cluster; plans without a pipeline, whose ranks all wait for each "
        "other, by the wall clock of the profile. `shared cores`: with the idle time of ranks that wait given "
        "to those that share their core (reports/loop_plans.py), which only a machine with more ranks than cores has.",
    ]


def _judgement(rows: Sequence[Row]) -> list[str]:
    lines = ["## Against the targets", ""]
    for model in dict.fromkeys(row.model for row in rows):
        s = scores([row for row in rows if row.model == model], True)
        memory = math.inf if s.memory_error is None else s.memory_error
        found = (
            ("Spearman", s.spearman >= TARGETS["spearman"], f"{s.spearman:.3f}, wanted {TARGETS['spearman']}"),
            ("regret", s.regret <= TARGETS["regret"], f"{s.regret:.3f}, wanted {TARGETS['regret']}"),
            ("time", s.time_error <= TARGETS["time"], f"{s.time_error:.1%}, wanted {TARGETS['time']:.0%}"),
            ("memory", memory <= TARGETS["memory"], f"{memory:.1%}, wanted {TARGETS['memory']:.0%}"),
        )  # fmt: skip
        said = "; ".join(f"{name} {'met' if ok else 'MISSED'} ({text})" for name, ok, text in found)
        lines.append(f"- {model} ({s.plans} plans): {said}")
    return lines


def _curve(points: Sequence[dict[str, Any]]) -> list[str]:
    """What a smaller profile costs; nothing if only one was made."""
    if len(points) < 2:
        return []
    models = list(points[0]["error"])
    lines = ["## What the profile's budget buys", "",
             f"| budget s | samples | {' | '.join(f'{m}: median time error' for m in models)} |",
             f"|--:|--:|{'--:|' * len(models)}"]  # fmt: skip
    for point in points:
        errors = " | ".join(f"{point['error'][m]:.1%}" for m in models)
        lines.append(f"| {point['budget_s']:g} | {point['samples']} | {errors} |")
    worst = max(points[1]["error"][m] - points[0]["error"][m] for m in models)
    return [*lines, "", f"From the whole budget to the next the worst model loses {100 * worst:.1f} points (wanted: at "
            "most 3 for half of it). Each profile was measured by itself.", ""]  # fmt: skip


def _misses(rows: Sequence[Row]) -> list[str]:
    """The five plans that were predicted worst."""
    worst = sorted(rows, key=lambda r: -abs(r.shared_s / r.measured_s - 1))[:5]
    lines = ["## Where it missed most", ""]
    return lines + [
        f"- {r.model}, {r.ranks} ranks, {r.options}: predicted {r.shared_s:.3f} s, measured {r.measured_s:.3f} s "
        f"({r.shared_s / r.measured_s - 1:+.0%})"
        for r in worst
    ]


def _plans(rows: Sequence[Row]) -> list[str]:
    lines = [
        "## Plan by plan",
        "",
        "| model | ranks | plan | predicted s | shared s | measured s | error | rounds s | predicted MB | "
        "measured MB | error |",
        "|:--|--:|:--|--:|--:|--:|--:|:--|--:|--:|--:|",
    ]
    for r in rows:
        rounds = " ".join(f"{t:.3f}" for t in r.rounds_s)
        memory = f"{r.peak_bytes / 1e6:.1f} | {r.predicted_bytes / r.peak_bytes - 1:+.0%}" if r.peak_bytes else " | "
        lines.append(
            f"| {r.model} | {r.ranks} | {r.options} | {r.predicted_s:.3f} | {r.shared_s:.3f} | {r.measured_s:.3f} | "
            f"{r.shared_s / r.measured_s - 1:+.0%} | {rounds} | {r.predicted_bytes / 1e6:.1f} | {memory} |"
        )
    return lines
