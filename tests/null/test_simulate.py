"""The simulator: laws of a valid schedule, cases by hand, memory, deadlock, speed, timeline."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.costmodel import simulate as simulate_module
from planner.costmodel.pipeline import ScheduleKind
from planner.costmodel.schedule import Action, actions, stage_of
from planner.costmodel.simulate import Simulation, memory_over_time, simulate
from planner.costmodel.timeline import chrome_trace

CHUNKS = {ScheduleKind.INTERLEAVED: 2, ScheduleKind.ZB_V: 2}


@st.composite
def _simulations(draw: st.DrawFn) -> tuple[Simulation, float]:
    """A simulation with random chunk times and bytes, and its p2p_s."""
    kind = draw(st.sampled_from(list(ScheduleKind)))
    p, v = draw(st.integers(2, 5)), CHUNKS.get(kind, 1)
    m = draw(st.integers(1, 12))
    m = {ScheduleKind.INTERLEAVED: p * (1 + m % 4), ScheduleKind.ZB_V: 2 * p + m}.get(kind, m)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    p2p_s = draw(st.sampled_from([0.0, 0.05, 1.0]))
    f, b, w = rng.uniform(0.1, 2, (3, p, v))
    return simulate(kind, f, b, w, m, p2p_s, rng.uniform(0, 5, (p, v)), rng.uniform(0, 9, p)), p2p_s


def _ends(simulation: Simulation) -> dict[tuple[str, int, int], tuple[float, float, int]]:
    """(F | B | W, stage, micro-batch) -> (start_s, end_s, rank); a BW counts as both B and W."""
    found = {}
    for k, order in enumerate(simulation.table):
        for action, start_s, end_s in zip(order, simulation.start_s[k], simulation.end_s[k], strict=True):
            stage = stage_of(simulation.kind, len(simulation.table), k, action.chunk)
            for op in ("B", "W") if action.op == "BW" else (action.op,):
                found[op, stage, action.microbatch] = (float(start_s), float(end_s), k)
    return found


@settings(max_examples=120, deadline=None, derandomize=True)
@given(drawn=_simulations())
def test_every_dependency_is_honoured(drawn: tuple[Simulation, float]) -> None:
    """Each F, B, W runs once, in an allowed order, one at a time per rank, and each start has a reason."""
    simulation, p2p_s = drawn
    found = _ends(simulation)
    depth = 1 + max(stage for _, stage, _ in found)
    m = 1 + max(i for _, _, i in found)
    assert len(found) == 3 * depth * m

    def arrival(op: str, stage: int, i: int, rank: int) -> float:
        _, end_s, source = found[op, stage, i]
        return end_s + (p2p_s if source != rank else 0.0)

    for (op, stage, i), (start_s, _, rank) in found.items():
        if op == "F" and stage > 0:
            assert start_s >= arrival("F", stage - 1, i, rank) - 1e-9
        if op == "B":
            assert start_s >= found["F", stage, i][1] - 1e-9
            if stage < depth - 1:
                assert start_s >= arrival("B", stage + 1, i, rank) - 1e-9
    for k, order in enumerate(simulation.table):
        starts, ends = simulation.start_s[k], simulation.end_s[k]
        assert (starts[1:] >= ends[:-1] - 1e-9).all()
        idle = np.flatnonzero(starts > np.append(0.0, ends[:-1]) + 1e-9)
        for j in idle:  # as soon as possible: whoever waited started when its input arrived
            stage = stage_of(simulation.kind, len(simulation.table), k, order[j].chunk)
            source = ("F", stage - 1) if order[j].op == "F" else ("B", stage + 1)
            assert starts[j] == pytest.approx(arrival(*source, order[j].microbatch, k), abs=1e-9)
    assert simulation.step_s == pytest.approx(max(end for _, end, _ in found.values()))
    assert simulation.busy_s + simulation.bubble_s == pytest.approx(simulation.step_s)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(drawn=_simulations())
def test_memory_adds_up(drawn: tuple[Simulation, float]) -> None:
    """The curve starts and ends at the static bytes, never falls below them, and its maximum is the peak."""
    simulation, _ = drawn
    for k in range(len(simulation.table)):
        times_s, held = memory_over_time(simulation, k)
        assert (np.diff(times_s) >= 0).all()
        assert held.max() == pytest.approx(simulation.peak_bytes[k])
        assert held[[0, -1]] == pytest.approx(simulation.static_bytes[k], abs=1e-9)
        assert held.min() >= simulation.static_bytes[k] - 1e-9


def test_two_ranks_by_hand() -> None:
    """1F1B, p = m = 2, F = 1, BW = 2, 0.5 s between ranks: every start written out."""
    one = np.ones((2, 1))
    simulation = simulate(ScheduleKind.ONE_F_ONE_B, one, one, one, 2, 0.5, [[10.0], [20.0]], [1.0, 2.0])
    assert [f"{a.op}{a.microbatch}" for a in simulation.table[0]] == ["F0", "F1", "BW0", "BW1"]
    assert simulation.start_s[0].tolist() == [0, 1, 5, 8]  # B0 of rank 1 ends at 4.5, B1 at 7.5
    assert simulation.start_s[1].tolist() == [1.5, 2.5, 4.5, 5.5]
    assert simulation.step_s == 10
    assert simulation.busy_s.tolist() == [6, 6] and simulation.bubble_s.tolist() == [4, 4]
    assert simulation.peak_bytes.tolist() == [21, 22]
    times_s, held = memory_over_time(simulation, 0)
    assert times_s.tolist() == [0, 0, 1, 7, 10] and held.tolist() == [1, 11, 21, 11, 1]


def test_weight_gradients_hold_memory() -> None:
    """ZB-H1 frees at W, not at B: the last rank holds p micro-batches where 1F1B holds one."""
    one = np.ones((4, 1))
    assert simulate(ScheduleKind.ONE_F_ONE_B, one, one, one, 8).in_flight.tolist() == [4, 3, 2, 1]
    assert simulate(ScheduleKind.ZB_H1, one, one, one, 8).in_flight.tolist() == [4, 4, 4, 4]


def test_chunks_of_the_same_rank_need_no_p2p() -> None:
    """The bottom of ZB-V's V lies on one rank: a micro-batch pays 2 (p-1) hops each way."""
    p, d = 3, 1e-3
    f, b, w = np.ones((p, 2)), np.ones((p, 2)), np.ones((p, 2))
    found = _ends(simulate(ScheduleKind.ZB_V, f, b, w, 6, d))
    assert found["F", 2 * p - 1, 0][1] >= 2 * p + 2 * (p - 1) * d - 1e-12
    assert found["F", p, 0][0] == pytest.approx(found["F", p - 1, 0][1])  # stages p-1 and p: rank p-1


def test_deadlock_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks that wait for each other, and a W before its B, are bugs of a table."""
    one = np.ones((2, 1))
    waits = ((Action("F", 0, 0), Action("BW", 0, 0), Action("F", 0, 1), Action("BW", 0, 1)),) * 2
    late = (waits[0], (Action("F", 0, 1), Action("BW", 0, 1), Action("F", 0, 0), Action("BW", 0, 0)))
    early = ((Action("F", 0, 0), Action("W", 0, 0), Action("B", 0, 0)),) * 2
    for table, says in (
        (late, "deadlock: rank 0 at its action 1"),
        (early, "deadlock: rank 0 at its action 1"),
    ):
        monkeypatch.setattr(simulate_module, "actions", lambda *_, table=table: table)
        with pytest.raises(AssertionError, match=says):
            simulate(ScheduleKind.ONE_F_ONE_B, one, one, one, 2)


def test_impossible_schedule_is_refused() -> None:
    """The table's ValueError carries schedule_problem's line."""
    with pytest.raises(ValueError, match="6 % 4 = 2"):
        actions(ScheduleKind.INTERLEAVED, 6, 4, 2)


@pytest.mark.parametrize(
    ("kind", "p", "m", "v", "limit_s"),
    [("1f1b", 64, 512, 1, 1.0), ("interleaved", 16, 256, 8, 2.0), ("zb_v", 32, 512, 2, 2.0)],
)
def test_speed(kind: str, p: int, m: int, v: int, limit_s: float) -> None:
    """About 1e5 actions: 0.1 to 0.2 s on one core."""
    one = np.ones((p, v))
    start = time.process_time()
    simulate(ScheduleKind(kind), one, one, one, m)
    assert time.process_time() - start < limit_s


@pytest.mark.parametrize("kind", list(ScheduleKind))
def test_chrome_trace(kind: ScheduleKind) -> None:
    """One X event per action in microseconds, C events that reach the peak, M names; same JSON twice."""
    p, v, m = 3, CHUNKS.get(kind, 1), 6
    times = np.full((p, v), 2e-3)
    simulation = simulate(kind, times, times, times, m, 1e-4, np.full((p, v), 7.0), np.full(p, 5.0))
    trace = chrome_trace(simulation, "test", ["a", "b", "c"])
    by_phase: dict[str, list[dict]] = {}
    for event in trace["traceEvents"]:
        by_phase.setdefault(event["ph"], []).append(event)
    assert set(by_phase) == {"M", "X", "C"}
    assert len(by_phase["X"]) == sum(len(order) for order in simulation.table)
    assert max(e["ts"] + e["dur"] for e in by_phase["X"]) == pytest.approx(simulation.step_s * 1e6)
    for k in range(p):
        held = [e["args"]["bytes"] for e in by_phase["C"] if e["pid"] == k]
        assert max(held) == simulation.peak_bytes[k]
    names = [e["args"]["name"] for e in by_phase["M"] if e["name"] == "process_name"]
    assert names == ["a", "b", "c"]
    assert {e["args"]["stage"] for e in by_phase["X"]} == set(range(p * v))
    assert json.dumps(trace) == json.dumps(chrome_trace(simulation, "test", ["a", "b", "c"]))
