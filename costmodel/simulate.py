"""What a pipeline schedule takes in time and memory: the exact max-plus recurrence over its action table.

An action starts when the rank's previous action has ended and its inputs have arrived: F of stage s needs F
of stage s-1, B (or BW) of stage s needs B of stage s+1 and its own F, W needs its B. Between two ranks an
input takes `p2p_s` more; sends overlap with compute. Shapes: P ranks, V chunks of a rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planner.costmodel.pipeline import ScheduleKind
from planner.costmodel.schedule import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    Action,
    Table,
    actions,
    stage_of,
)

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """One simulated step. `start_s[k][i]` and `end_s[k][i]` are those of `table[k][i]`.

    `in_flight` counts activations from the start of F to the end of W (or BW), in micro-batches of the whole
    rank (a chunk counts 1/V); `peak_bytes` weighs them with each chunk's bytes and adds the static bytes.
    """

    kind: ScheduleKind
    table: Table
    start_s: tuple[FloatArray, ...]
    end_s: tuple[FloatArray, ...]
    step_s: float
    busy_s: FloatArray  # (P,)
    bubble_s: FloatArray  # (P,) step_s - busy_s
    in_flight: FloatArray  # (P,) peak
    activation_bytes: FloatArray  # (P, V)
    static_bytes: FloatArray  # (P,)
    peak_bytes: FloatArray  # (P,)


def simulate(
    kind: ScheduleKind,
    fwd_s: ArrayLike,
    bwd_input_s: ArrayLike,
    bwd_weight_s: ArrayLike,
    m: int,
    p2p_s: float = 0.0,
    activation_bytes: ArrayLike | None = None,
    static_bytes: ArrayLike | None = None,
) -> Simulation:
    """Run `m` micro-batches; the times are seconds of one micro-batch of a chunk, shape (P, V).

    `activation_bytes` (P, V) is what a chunk keeps of one micro-batch, `static_bytes` (P,) what a rank always
    holds; both 0 if left out. ValueError if the schedule does not exist for these sizes.
    """
    f, b, w = (np.atleast_2d(np.asarray(x, float)) for x in (fwd_s, bwd_input_s, bwd_weight_s))
    assert f.shape == b.shape == w.shape, (f.shape, b.shape, w.shape)
    p, v = f.shape
    table = actions(kind, m, p, v)
    seconds = {FORWARD: f.tolist(), BACKWARD_INPUT: b.tolist(), BACKWARD_WEIGHT: w.tolist()}
    seconds[BACKWARD] = (b + w).tolist()
    durations = [[seconds[a.op][k][a.chunk] for a in order] for k, order in enumerate(table)]
    starts, ends = _run(_links(kind, table, m, v), durations, p2p_s)
    start_s, end_s = (tuple(np.array(row) for row in rows) for rows in (starts, ends))
    busy_s = np.array([sum(d) for d in durations])
    step_s = max(float(e[-1]) for e in end_s)
    act = np.zeros((p, v)) if activation_bytes is None else np.asarray(activation_bytes, float).reshape(p, v)
    static = np.zeros(p) if static_bytes is None else np.asarray(static_bytes, float)
    return Simulation(
        kind=kind,
        table=table,
        start_s=start_s,
        end_s=end_s,
        step_s=step_s,
        busy_s=busy_s,
        bubble_s=step_s - busy_s,
        in_flight=np.array([_peak(order, np.full(v, 1 / v)) for order in table]),
        activation_bytes=act,
        static_bytes=static,
        peak_bytes=static + np.array([_peak(order, act[k]) for k, order in enumerate(table)]),
    )


def _links(kind: ScheduleKind, table: Table, m: int, v: int) -> list[list[tuple[int, int, bool]]]:
    """Per rank and action: (result it needs or -1, result it gives, whether the need is on another rank).

    One need is enough: B of a stage comes after F of the same stage through B and F of the stages below it.
    """
    p = len(table)
    depth = p * v
    stages = [[stage_of(kind, p, k, c) for c in range(v)] for k in range(p)]
    rank_of = {stage: k for k, chunks in enumerate(stages) for stage in chunks}
    links: list[list[tuple[int, int, bool]]] = [[] for _ in table]
    for k, order in enumerate(table):
        for op, chunk, i in order:
            stage = stages[k][chunk]
            forward, backward, weight = (kept * depth * m + stage * m + i for kept in range(3))
            if op == FORWARD:
                need, give, source = forward - m if stage else -1, forward, stage - 1
            elif op == BACKWARD_WEIGHT:
                need, give, source = backward, weight, stage
            elif stage == depth - 1:
                need, give, source = forward, backward, stage
            else:
                need, give, source = backward + m, backward, stage + 1
            links[k].append((need, give, need >= 0 and rank_of[source] != k))
    return links


def _run(
    links: list[list[tuple[int, int, bool]]], durations: list[list[float]], p2p_s: float
) -> tuple[list[list[float]], list[list[float]]]:
    """Start and end of every action. AssertionError if the table deadlocks: that is a bug of the table.

    Each rank runs until an input is missing and sleeps on it; whoever gives the input wakes it. Work is
    linear in the number of actions.
    """
    starts: list[list[float]] = [[] for _ in links]
    ends: list[list[float]] = [[] for _ in links]
    ready: dict[int, float] = {-1: 0.0}
    sleeping: dict[int, int] = {}
    awake = list(range(len(links)))
    while awake:
        k = awake.pop()
        for i in range(len(ends[k]), len(links[k])):
            need, give, hop = links[k][i]
            if need not in ready:
                sleeping[need] = k
                break
            arrived = ready[need] + p2p_s if hop else ready[need]
            start = max(arrived, ends[k][-1]) if i else arrived
            ready[give] = start + durations[k][i]
            starts[k].append(start)
            ends[k].append(ready[give])
            if give in sleeping:
                awake.append(sleeping.pop(give))
    stuck = [
        f"rank {k} at its action {len(ends[k])}" for k in range(len(links)) if len(ends[k]) < len(links[k])
    ]
    assert not stuck, f"deadlock: {', '.join(stuck)}"
    return starts, ends


def on_shared_cores_s(simulation: Simulation, cores: int) -> float:
    """Seconds of a simulated step whose P ranks share fewer `cores`, rank k the core k mod `cores`.

    The durations hold while all are busy; a rank goes as much faster as others on its core wait.
    """
    table, (p, v) = simulation.table, simulation.activation_bytes.shape
    links = _links(simulation.kind, table, 1 + max(action.microbatch for action in table[0]), v)
    durations = [(simulation.end_s[k] - simulation.start_s[k]).tolist() for k in range(p)]
    given, done, now_s = {-1}, [0] * p, 0.0
    left_s: dict[int, float] = {}
    while True:
        for k in range(p):
            if k not in left_s and done[k] < len(links[k]) and links[k][done[k]][0] in given:
                left_s[k] = durations[k][done[k]]
        if not left_s:
            return now_s
        busy = Counter(k % cores for k in left_s)
        speeds = {k: len(range(k % cores, p, cores)) / busy[k % cores] for k in left_s}
        wait_s = min(s / speeds[k] for k, s in left_s.items())
        now_s += wait_s
        ended = [k for k, s in left_s.items() if s <= wait_s * speeds[k] * (1 + 1e-9)]
        left_s = {k: s - wait_s * speeds[k] for k, s in left_s.items() if k not in ended}
        for k in ended:
            given.add(links[k][done[k]][1])
            done[k] += 1


def _peak(order: Sequence[Action], weight: FloatArray) -> float:
    """Largest sum of weight[chunk] over the activations alive at once in one rank's order."""
    gain = {FORWARD: 1.0, BACKWARD_INPUT: 0.0}
    return float(np.cumsum([gain.get(a.op, -1.0) * weight[a.chunk] for a in order]).max())


def memory_over_time(simulation: Simulation, rank: int) -> tuple[FloatArray, FloatArray]:
    """(times_s, bytes) of a rank, both (E,): from times_s[i] until times_s[i+1] it holds bytes[i].

    An activation is held from the start of its F to the end of its W (or BW).
    """
    times: list[float] = [0.0]
    change: list[float] = [float(simulation.static_bytes[rank])]
    size = simulation.activation_bytes[rank]
    for i, action in enumerate(simulation.table[rank]):
        if action.op == FORWARD:
            times.append(float(simulation.start_s[rank][i]))
            change.append(float(size[action.chunk]))
        elif action.op != BACKWARD_INPUT:
            times.append(float(simulation.end_s[rank][i]))
            change.append(-float(size[action.chunk]))
    return np.array(times), np.cumsum(change)
