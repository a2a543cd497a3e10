"""The inner problem, exactly: layers to pipeline ranks and a strategy to every layer, for one cell and layout.

Time, the least recomputation that fits the memory (knapsack.py) and the once-per-step work of a rank depend only
on what it holds; bottleneck.py chooses who holds what.

With several chunks per rank, a rank's chunks are equal (stages.py says why), so that with one layer class only the
number of layers per rank matters; with several classes the declared space is the partitions of `even_counts`.

Shapes: P ranks, C classes, S strategies, L layers, I start positions (1 if only lengths matter), N lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner import knapsack
from planner.bottleneck import TIE, Late, Objective, Partition, Solved, Tables, search_caps
from planner.costmodel.keys import Array, Machine
from planner.costmodel.pipeline import ScheduleKind, in_flight, rows
from planner.costmodel.rates import EndRates, Rates
from planner.costmodel.state import step_sync
from planner.stages import even_counts, stage_ranks, stage_sizes

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    """One cell and layout: `rates` has K = 1; `usable_bytes` and `host_bytes` are what one rank may use."""

    layer_classes: tuple[int, ...]
    rates: Rates
    machine: Machine
    schedule: ScheduleKind
    num_microbatches: int
    pp: int
    vpp: int
    usable_bytes: float
    host_bytes: float

    @property
    def last_rank(self) -> int:
        """Pipeline rank that holds the epilogue."""
        return 0 if self.schedule is ScheduleKind.ZB_V else self.pp - 1

    @property
    def num_classes(self) -> int:
        """Layer classes of the model."""
        return len(self.rates.state_bytes_CK)


def objective(inner: Inner) -> Objective:
    """The closed form of the inner problem's schedule with everything that no decision changes summed up."""
    rates, p = inner.rates, inner.pp
    counts = np.bincount(inner.layer_classes, minlength=inner.num_classes).astype(float)
    p2p = float(rates.p2p_s_K[0]) * inner.vpp * p
    ends = (rates.prologue, rates.epilogue)
    fwd = counts @ rates.forward_s_CK[:, 0] + sum(float(e.forward_s[0]) for e in ends) + p2p
    bwd = counts @ rates.backward_s_CK[:, 0] + sum(float(e.backward_s[0]) for e in ends) + p2p
    wgt = counts @ rates.weight_s_CK[:, 0] + sum(float(e.weight_s[0]) for e in ends)
    table = [[float(x) for x in row] for row in rows(inner.schedule, inner.num_microbatches, p, inner.vpp)]
    const = np.array([c_f * fwd + c_b * bwd + c_w * wgt for _, c_f, c_b, c_w in table])
    extra = np.array([max(c_b, 0.0) for _, _, c_b, _ in table])
    return Objective(a=table[0][0], const_R=const, extra_R=extra, step_s=float(rates.step_s_K[0]))


def solve(inner: Inner, upper_s: float, slack_frac: float = 0.0) -> Solved:
    """The best partition below `upper_s`, if there is one, and a bound on what a restriction left out.

    `slack_frac`: leave trades between theta and delta that can gain no more than this fraction. Pieces are limited to
    those that a plan below `upper_s` can hold.
    """
    goal = objective(inner)
    theta_cap = (upper_s - goal.step_s - float(goal.const_R.max())) / max(goal.a, 1e-9)
    if inner.vpp > 1 and inner.num_classes > 1:
        return _best_even(inner, goal, upper_s)
    tables = _tables(inner, theta_cap)
    if tables is None:
        return Solved(partition=None, lower_s=np.inf)
    return search_caps(goal, tables, upper_s, slack_frac)


def late_of(inner: Inner) -> Late:
    """The ends of an interleaved schedule's first and last rank; nothing for the others."""
    end = np.zeros(inner.pp)
    if inner.schedule is not ScheduleKind.INTERLEAVED:
        return Late(end_P=end, vpp=1, weight=0.0)
    for rank, part in ((0, inner.rates.prologue), (inner.last_rank, inner.rates.epilogue)):
        end[rank] += float(part.forward_s[0] + part.backward_s[0] + part.weight_s[0])
    goal = objective(inner)
    return Late(end_P=end, vpp=inner.vpp, weight=goal.a / float(goal.extra_R[0]))


# ---- tables


def _tables(inner: Inner, theta_cap: float) -> Tables | None:
    layers, p = len(inner.layer_classes), inner.pp
    per_layer = _layer_seconds(inner)
    shortest = min(per_layer)
    longest = layers if shortest <= 0 else int(min(layers, theta_cap / shortest * TIE + 1e-9))
    low = max(inner.vpp, layers - (p - 1) * longest)
    high = min(longest, layers - (p - 1) * inner.vpp)
    if low > high:
        return None
    lengths = np.arange(-(-low // inner.vpp) * inner.vpp, high + 1, inner.vpp)
    if not len(lengths):
        return None
    starts = [0] if inner.num_classes == 1 else list(range(layers))
    held = _pieces(inner, starts, lengths)  # (I, N, C), -1 = beyond the end
    flat = held.reshape(-1, inner.num_classes)
    unique, inverse = np.unique(flat, axis=0, return_inverse=True)
    time, sync = _piece_costs(inner, unique)
    over = (unique[:, 0] < 0) | (time.min(axis=0) > theta_cap * TIE)
    choices: list[knapsack.Choice] = []
    shape = (p, len(unique))
    extra, lower = np.full(shape, np.inf), np.full(shape, np.inf)
    number = np.full(len(unique), -1)
    for piece in np.flatnonzero(~over):
        choice = _choose(inner, unique[piece])
        number[piece] = len(choices)
        choices.append(choice)
        extra[:, piece], lower[:, piece] = choice.extra_s, choice.lower_s
    full = (p, len(starts), len(lengths))
    late = late_of(inner)
    time = time - late.end_P[:, None]
    return Tables(
        num_layers=layers,
        lengths_N=lengths,
        late=late,
        base_PIN=time[:, inverse].reshape(full),
        time_PIN=(time + extra)[:, inverse].reshape(full),
        extra_PIN=extra[:, inverse].reshape(full),
        extra_lower_PIN=lower[:, inverse].reshape(full),
        sync_PIN=sync[:, inverse].reshape(full),
        choice_IN=number[inverse].reshape(full[1:]),
        choices=tuple(choices),
    )


def _layer_seconds(inner: Inner) -> list[float]:
    r = inner.rates
    total = r.forward_s_CK[:, 0] + r.backward_s_CK[:, 0] + r.weight_s_CK[:, 0]
    return [float(t) for t in total]


def _pieces(inner: Inner, starts: list[int], lengths: IntArray) -> IntArray:
    """Layers of each class in [start, start + length), (I, N, C); -1 where that is beyond the last layer."""
    layers, c = len(inner.layer_classes), inner.num_classes
    if len(starts) == 1:
        return lengths.reshape(1, -1, 1)
    prefix = np.zeros((layers + 1, c), np.int64)
    prefix[1:] = np.cumsum(np.eye(c, dtype=np.int64)[list(inner.layer_classes)], axis=0)
    first = np.array(starts)[:, None]
    end = first + lengths[None, :]
    held = prefix[np.minimum(end, layers)] - prefix[first]
    held[end > layers] = -1
    return np.asarray(held)


def _ends(inner: Inner, rank: int) -> list[EndRates]:
    return [inner.rates.prologue] * (rank == 0) + [inner.rates.epilogue] * (rank == inner.last_rank)


def _kinds(inner: Inner) -> list[tuple[int, ...]]:
    """Ranks that hold the same ends: rank 0, the last, the others."""
    ends = {0, inner.last_rank}
    middle = tuple(k for k in range(inner.pp) if k not in ends)
    return [(k,) for k in sorted(ends)] + ([middle] if middle else [])


def _piece_costs(inner: Inner, pieces: IntArray) -> tuple[Array, Array]:
    """(seconds per micro-batch without recomputation, once-per-step sync) of U pieces on every rank, (P, U)."""
    r = inner.rates
    held = np.maximum(pieces, 0).astype(float)
    p2p = float(r.p2p_s_K[0]) * inner.vpp
    time, sync = (np.zeros((inner.pp, len(pieces))) for _ in range(2))
    for ranks in _kinds(inner):
        ends = _ends(inner, ranks[0])
        fwd = held @ r.forward_s_CK[:, 0] + sum(e.forward_s[0] for e in ends) + p2p
        bwd = held @ r.backward_s_CK[:, 0] + sum(e.backward_s[0] for e in ends) + p2p
        wgt = held @ r.weight_s_CK[:, 0] + sum(e.weight_s[0] for e in ends)
        dense = held @ r.dense_CK[:, 0] + sum(e.dense[0] for e in ends)
        routed = held @ r.routed_CK[:, 0] + sum(e.routed[0] for e in ends)
        time[list(ranks)] = fwd + bwd + wgt
        sync[list(ranks)] = step_sync(dense, routed, fwd, bwd + wgt, r.layout, inner.machine).total_s
    return time, sync


def options(rates: Rates) -> knapsack.Options:
    """The strategies of every class at K = 1."""
    return knapsack.Options(
        extra_s=rates.extra_s_CSK[:, :, 0],
        activation_bytes=rates.activation_bytes_CSK[:, :, 0],
        host_bytes=rates.host_bytes_CSK[:, :, 0],
        work_bytes=rates.work_bytes_CSK[:, :, 0],
    )


def budgets(inner: Inner, held: IntArray | Array, flight: Array) -> tuple[Array, Array]:
    """Bytes left on GPU and host for the activations of `held` (C,) layers, on every rank (P,)."""
    r = inner.rates
    gpu = np.full(inner.pp, inner.usable_bytes - float(r.fixed_bytes_K[0]) - float(held @ r.state_bytes_CK[:, 0]))
    host = np.full(inner.pp, inner.host_bytes - float(held @ r.host_state_bytes_CK[:, 0]))
    first, last = r.prologue, r.epilogue
    gpu[0] -= float(first.state_bytes[0]) + flight[0] * float(first.activation_bytes[0])
    host[0] -= float(first.host_bytes[0])
    at_end = float(last.state_bytes[0]) + float(last.activation_bytes[0]) + float(last.work_bytes[0])
    gpu[inner.last_rank] -= at_end
    host[inner.last_rank] -= float(last.host_bytes[0])
    return gpu, host


def _choose(inner: Inner, held: IntArray) -> knapsack.Choice:
    flight = in_flight(inner.schedule, inner.num_microbatches, inner.pp, inner.vpp)
    gpu, host = budgets(inner, held, flight)
    return knapsack.solve(held, options(inner.rates), flight, gpu, host)


def least_overflow_bytes(inner: Inner) -> float:
    """By how many bytes the fullest rank misses its memory when layers are spread evenly and all are recomputed."""
    flight = in_flight(inner.schedule, inner.num_microbatches, inner.pp, inner.vpp)
    even = next(even_counts(len(inner.layer_classes), inner.pp, 1), (len(inner.layer_classes),) * inner.pp)
    least = inner.rates.activation_bytes_CSK[:, :, 0].min(axis=1)
    share = np.bincount(inner.layer_classes, minlength=inner.num_classes) / len(inner.layer_classes)
    missing = -np.inf
    for rank, layers in enumerate(even):
        held = share * layers
        gpu, _ = budgets(inner, held, flight)
        missing = max(missing, float(flight[rank] * (held @ least) - gpu[rank]))
    return missing


# ---- chunked schedules of models with several layer classes


def _best_even(inner: Inner, goal: Objective, upper_s: float) -> Solved:
    """Evaluate every even partition; each rank's strategies are still chosen best."""
    best: Partition | None = None
    lower = np.inf
    flight = in_flight(inner.schedule, inner.num_microbatches, inner.pp, inner.vpp)
    ranks, late = stage_ranks(inner.pp, inner.vpp, inner.schedule), late_of(inner)
    for num_layers in even_counts(len(inner.layer_classes), inner.pp, inner.vpp):
        held = np.zeros((inner.pp, inner.num_classes), np.int64)
        position = 0
        for stage, size in enumerate(stage_sizes(num_layers, inner.vpp, inner.schedule)):
            for layer in range(position, position + size):
                held[ranks[stage], inner.layer_classes[layer]] += 1
            position += size
        time, sync = _piece_costs(inner, held)
        own = np.arange(inner.pp)
        picked = [_choose_rank(inner, held[k], k, flight) for k in range(inner.pp)]
        extra = np.array([float(c.extra_s[0]) for c in picked])
        low = np.array([float(c.lower_s[0]) for c in picked])
        delta = float(sync[own, own].max())
        base = time[own, own] - late.end_P

        def value_of(more: Array, base: Array = base, delta: float = delta) -> float:
            theta = float((base + more).max())
            if theta == np.inf:
                return theta
            return goal.value(theta, float((more + late.extra_s(base + more, theta)).sum()), delta)

        if not np.array_equal(low, extra):
            lower = min(lower, value_of(low))
        value = value_of(extra)
        if value < (best.step_s if best else upper_s):
            counts = np.concatenate([c.counts for c in picked])
            best = Partition(step_s=value, num_layers=num_layers, counts_PCS=counts)
    return Solved(partition=best, lower_s=lower)


def _choose_rank(inner: Inner, held: IntArray, rank: int, flight: Array) -> knapsack.Choice:
    gpu, host = budgets(inner, held, flight)
    one = slice(rank, rank + 1)
    return knapsack.solve(held, options(inner.rates), flight[one], gpu[one], host[one])
