"""The table of what the runtime executes: every option of a plan, and every two of them, by the parity cases.

    python tests/cpu/runtime/cells.py        writes reports/runtime_cells.md

A cell passes when a parity case uses both options (test_parity.py runs every case); it is not executable when
runtime/support.py gives a reason for a plan with just these two; a plan has one ZeRO stage and one schedule.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

from cases import ALONE, DRAWN, TOGETHER, drawn, spec

from planner.costmodel.pipeline import ScheduleKind
from planner.costmodel.strategy import PlanSpec
from planner.files import write_atomic
from planner.runtime.support import COMBINATIONS, OPTIONS, reasons

TABLE = Path(__file__).parents[3] / "reports" / "runtime_cells.md"
PASSES, NOT_EXECUTABLE, NOT_COVERED, CONTRADICTION = "passes", "not executable", "not covered", "one or the other"
MARKS = {PASSES: "+", NOT_EXECUTABLE: "x", NOT_COVERED: "?", CONTRADICTION: ""}
# The least plan that uses an option; two of them together are the plan of a pair.
LEAST: dict[str, dict[str, object]] = {
    "dp": {"dp_shard": 2},
    "dp_replicate": {"dp_replicate": 2, "dp_shard": 2, "zero_stage": 1},
    **{f"zero{stage}": {"dp_shard": 2, "zero_stage": stage} for stage in (1, 2, 3)},
    "tp": {"tp": 2},
    "sp": {"tp": 2, "sequence_parallel": True},
    "vocab_parallel": {"tp": 2, "vocab_parallel": True},
    "chunked_loss": {"chunked_loss": True},
    "pp": {"pp": 2},
    "interleaved": {"pp": 2, "vpp": 2, "schedule": ScheduleKind.INTERLEAVED},
    "zb_h1": {"pp": 2, "schedule": ScheduleKind.ZB_H1},
    "zb_v": {"pp": 2, "vpp": 2, "schedule": ScheduleKind.ZB_V},
    "ulysses": {"ulysses": 2},
    "ring": {"ring": 2},
    "ep": {"dp_shard": 2, "ep": 2},
    "selective": {"recompute": "selective"},
    "full": {"recompute": "full"},
    "offload_optimizer": {"dp_shard": 2, "zero_stage": 1, "offload_optimizer": True},
    "offload_activations": {"offload": True},
}
ONE_OF = ({"zero1", "zero2", "zero3"}, {"interleaved", "zb_h1", "zb_v"})


def cases() -> dict[str, PlanSpec]:
    """Every parity case by name."""
    found = {name: plan for name, (_, _, plan) in (ALONE | TOGETHER).items()}
    for model, ranks, count in DRAWN:
        found |= {f"drawn for {model} on {ranks}: {name}": plan for name, plan in drawn(model, ranks, count, ranks)}
    return found


def least(*names: str) -> PlanSpec:
    """The least plan that uses these options; the ZeRO stage is the last one named."""
    merged: dict[str, object] = {}
    for name in sorted(names, key=lambda n: n.startswith("zero")):
        merged |= LEAST[name]
    return spec(**merged)


def cell(names: tuple[str, ...], plans: dict[str, PlanSpec]) -> tuple[str, str]:
    """(state, the first case or the reason) of one option or of two together."""
    used = {o.name: o.used for o in OPTIONS}
    if any(len(group & {*names}) > 1 for group in ONE_OF):
        return CONTRADICTION, ""
    found = next((case for case, plan in plans.items() if all(used[n](plan) for n in names)), None)
    if found is not None:
        return PASSES, found
    why = reasons(least(*names))
    return (NOT_EXECUTABLE, why[0]) if why else (NOT_COVERED, "")


def render() -> str:
    """The table as Markdown."""
    plans, names = cases(), [o.name for o in OPTIONS]
    alone = {name: cell((name,), plans) for name in names}
    pairs = {pair: cell(pair, plans) for pair in combinations(names, 2)}
    count = {state: sum(found == state for found, _ in pairs.values()) for state in MARKS}
    lines = [
        "# What the runtime executes", "",
        "Written by `python tests/cpu/runtime/cells.py` from runtime/support.py and the parity cases of",
        "tests/cpu/runtime/cases.py. Every case runs in CI: loss, gradients and parameters after three optimizer steps",
        "equal those of one process in float64.", "",
        f"{len(plans)} cases; {sum(state == PASSES for state, _ in alone.values())} of {len(names)} options pass. Of "
        f"{len(pairs)} pairs {count[PASSES]} pass, {count[NOT_EXECUTABLE]} are not executable, {count[NOT_COVERED]} "
        f"have no case, {count[CONTRADICTION]} contradict each other.", "",
        "## Options", "", "| option | state | first case, or why not |", "| --- | --- | --- |",
        *(f"| {name} | {state} | {what} |" for name, (state, what) in alone.items()), "",
        "## Pairs", "", "`+` passes, `x` not executable, `?` not covered, blank: a plan has one or the other.", "",
        "| | " + " | ".join(names) + " |", "| --- |" + " :-: |" * len(names),
    ]  # fmt: skip
    for i, row in enumerate(names):
        marks = [MARKS[pairs[(row, col)][0]] if j > i else "" for j, col in enumerate(names)]
        lines.append(f"| {row} | " + " | ".join(marks) + " |")
    lines += ["", "## Not executable", ""]
    lines += [f"- {' with '.join(c.names)}: {c.reason}" for c in COMBINATIONS]
    lines += [f"- {o.name}: {o.reason}" for o in OPTIONS if o.reason]
    missing = [f"- {' with '.join(pair)}" for pair, (state, _) in pairs.items() if state == NOT_COVERED]
    lines += ["", "## Not covered", "", *(missing or ["None."])]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    write_atomic(TABLE, render().encode())
