"""A simulated pipeline step as a Chrome trace, which Perfetto and chrome://tracing open."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planner.costmodel.schedule import BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, Action, stage_of
from planner.costmodel.simulate import Simulation, memory_over_time
from planner.costmodel.units import US

_WORDS = {
    FORWARD: "forward",
    BACKWARD: "backward",
    BACKWARD_INPUT: "backward input",
    BACKWARD_WEIGHT: "backward weight",
}


def chrome_trace(
    simulation: Simulation, name: str = "pipeline", rank_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """The simulation in the Trace Event Format (Google 2016), for `json.dump`; times become microseconds.

    One process per pipeline rank (pid) with one compute stream (tid 0): `M` events name them, an `X` event is
    an action, and `C` events are the predicted memory in bytes wherever it changes. `rank_names` (P,) takes
    the place of "rank 0", "rank 1", ...
    """
    ranks = range(len(simulation.table))
    names = rank_names or [f"rank {k}" for k in ranks]
    events = [event for k in ranks for event in _rank_events(simulation, k, names[k])]
    other = {"schedule": simulation.kind.value, "step_s": simulation.step_s, "name": name}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": other}


def _rank_events(simulation: Simulation, rank: int, rank_name: str) -> list[dict[str, Any]]:
    where = {"pid": rank, "tid": 0}
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", **where, "args": {"name": rank_name}},
        {"ph": "M", "name": "process_sort_index", **where, "args": {"sort_index": rank}},
        {"ph": "M", "name": "thread_name", **where, "args": {"name": "compute"}},
    ]
    spans = zip(simulation.table[rank], simulation.start_s[rank], simulation.end_s[rank], strict=True)
    for action, start_s, end_s in spans:
        span = {"ts": float(start_s) / US, "dur": float(end_s - start_s) / US}
        events.append({"ph": "X", "cat": action.op, **_label(simulation, rank, action), **where, **span})
    for time_s, held_bytes in zip(*memory_over_time(simulation, rank), strict=True):
        counter = {"ph": "C", "name": "predicted memory", "ts": float(time_s) / US}
        events.append({**counter, **where, "args": {"bytes": float(held_bytes)}})
    return events


def _label(simulation: Simulation, rank: int, action: Action) -> dict[str, Any]:
    stage = stage_of(simulation.kind, len(simulation.table), rank, action.chunk)
    args = {"stage": stage, "chunk": action.chunk, "microbatch": action.microbatch}
    return {"name": f"{_WORDS[action.op]} {action.microbatch}", "args": args}
