"""The bottleneck DP: which pieces of the layer chain go to which rank, given what every piece costs there.

minimise  max_r (a theta + const_r + c_r X) + delta,  theta = max_k T_k, X = sum_k extra_k, delta = max_k sync_k
(SYSTEMS.md 4.2). For caps on theta and delta a DP over positions gives the least X; the caps run over the values
that occur. Shapes: P ranks, I start positions (1 if only lengths matter), N lengths, C classes, S strategies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from planner import knapsack
from planner.costmodel.keys import Array

IntArray = NDArray[np.int64]
TIE = 1 + 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """A solution: layers per rank in pipeline order, strategy counts (P, C, S), predicted seconds."""

    step_s: float
    num_layers: tuple[int, ...]
    counts_PCS: IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """The best partition below a limit, if there is one, and a bound on those that a restriction left out.

    `lower_s` is inf when nothing was left out.
    """

    partition: Partition | None
    lower_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Late:
    """What an end's chunk takes longer than the chunks of the slowest rank (costmodel/pipeline.py, `pipeline_s`).

    `end_P`: seconds of a rank's ends, left out of its time and counted here, 0 where the schedule has no such term;
    `weight`: extra seconds that one such second costs.
    """

    end_P: Array
    vpp: int
    weight: float

    def extra_s(self, time_s: Array, theta_s: float) -> Array:
        """Extra seconds of ranks (P, ...) that take `time_s` when the slowest takes `theta_s`."""
        end = self.end_P.reshape(-1, *(1,) * (time_s.ndim - 1))
        longer = np.maximum((time_s - theta_s) / self.vpp + end, 0.0)
        return np.asarray(np.where(end > 0, self.weight * longer, 0.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """Of every rank and piece (start, length): seconds, extra seconds with its bound, sync; inf = not allowed."""

    num_layers: int
    lengths_N: IntArray
    late: Late
    base_PIN: Array
    time_PIN: Array
    extra_PIN: Array
    extra_lower_PIN: Array
    sync_PIN: Array
    choice_IN: IntArray  # index into `choices`
    choices: tuple[knapsack.Choice, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """max_r (a theta + const_r + c_r X) + delta + step."""

    a: float
    const_R: Array
    extra_R: Array
    step_s: float

    def value(self, theta_s: float, extra_s: float, sync_s: float) -> float:
        """Step seconds."""
        if extra_s == np.inf:
            return np.inf
        return float(np.max(self.a * theta_s + self.const_R + self.extra_R * extra_s)) + sync_s + self.step_s


def search_caps(goal: Objective, tables: Tables, upper_s: float, slack_frac: float) -> Solved:
    """The best partition below `upper_s`: caps on delta (outer, the loosest first) and theta (inner).

    `slack_frac`: leave trades between theta and delta that can gain no more than this fraction; then `lower_s` says
    how much they could.
    """
    finite = np.isfinite(tables.time_PIN)
    exact = np.array_equal(tables.extra_PIN, tables.extra_lower_PIN)
    if not finite.any():
        return Solved(partition=None, lower_s=np.inf if exact else _relaxed_bound(goal, tables))
    caps = np.unique(tables.sync_PIN[finite])
    floor = _least_sync(tables, finite)
    best: _Found | None = None
    limit, lower, cap = upper_s, np.inf, float(caps[-1])
    while True:
        sweep = _sweep_theta(goal, tables, cap, floor, limit)
        if sweep.best is not None:
            best, limit = sweep.best, sweep.best.value_s
        # A tighter cap on delta changes nothing until it forbids something that was used.
        below = caps[caps < sweep.used_s / TIE]
        if not len(below) or sweep.bound_s >= limit:
            break
        if sweep.bound_s >= limit * (1 - slack_frac):
            lower = sweep.bound_s
            break
        cap = float(below[-1])
    if not exact:
        lower = min(lower, _relaxed_bound(goal, tables))
    if best is None:
        return Solved(partition=None, lower_s=lower)
    choices = [tables.choices[tables.choice_IN[i, n]] for i, n in zip(best.starts, best.picks, strict=True)]
    partition = Partition(
        step_s=best.value_s,
        num_layers=tuple(int(tables.lengths_N[n]) for n in best.picks),
        counts_PCS=np.stack([choice.counts[k] for k, choice in enumerate(choices)]),
    )
    return Solved(partition=partition, lower_s=lower)


def _reached(tables: Tables, starts: list[int], picks: list[int]) -> float:
    return max(float(tables.sync_PIN[k, i, n]) for k, (i, n) in enumerate(zip(starts, picks, strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A partition: start and length index of every rank."""

    value_s: float
    starts: list[int]
    picks: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sweep:
    """All caps on theta under one cap on delta: the best partition below the limit, a bound on all of them that takes
    delta at its floor, and the largest delta that any of them used.
    """

    best: _Found | None
    bound_s: float
    used_s: float


def _sweep_theta(goal: Objective, tables: Tables, cap: float, floor: float, limit: float) -> _Sweep:
    allowed = (tables.sync_PIN <= cap * TIE) & np.isfinite(tables.time_PIN)
    values = np.unique(tables.time_PIN[allowed])
    best: _Found | None = None
    bound, used = np.inf, 0.0
    for theta in values[_first_feasible(tables, allowed, values) :]:
        if goal.value(float(theta), 0.0, floor) >= limit:
            bound = min(bound, limit)
            break
        extra, starts, picks = _least_extra(tables, float(theta), allowed & (tables.time_PIN <= theta * TIE))
        bound = min(bound, goal.value(float(theta), extra, floor))
        sync = _reached(tables, starts, picks)
        used = max(used, sync)
        value = _value(goal, tables, starts, picks, sync)
        if value < limit:
            best, limit = _Found(value_s=value, starts=starts, picks=picks), value
        if extra <= 0:
            break
    return _Sweep(best=best, bound_s=bound, used_s=used)


def _value(goal: Objective, tables: Tables, starts: list[int], picks: list[int], sync_s: float) -> float:
    """Step seconds of a partition."""
    ranks = np.arange(len(picks))
    time = tables.time_PIN[ranks, starts, picks]
    theta = float(time.max())
    extra = tables.extra_PIN[ranks, starts, picks].sum() + tables.late.extra_s(time, theta).sum()
    return goal.value(theta, float(extra), sync_s)


def _least_sync(tables: Tables, allowed: NDArray[np.bool_]) -> float:
    """Smallest cap on delta under which the layers can be placed; inf if there is none."""
    caps = np.unique(tables.sync_PIN[allowed])
    low, high = 0, len(caps)
    while low < high:
        middle = (low + high) // 2
        within = allowed & (tables.sync_PIN <= caps[middle] * TIE)
        if np.isfinite(_least_extra(tables, 0.0, within)[0]):
            high = middle
        else:
            low = middle + 1
    return float(caps[low]) if low < len(caps) else float(np.inf)


def _relaxed_bound(goal: Objective, tables: Tables) -> float:
    """Bound with the LP extra seconds instead of the rounded ones."""
    slow = tables.base_PIN + tables.extra_lower_PIN
    allowed = np.isfinite(slow)
    values = np.unique(slow[allowed])
    relaxed = replace(tables, time_PIN=slow, extra_PIN=tables.extra_lower_PIN)
    floor = _least_sync(relaxed, allowed)
    bound = np.inf
    for theta in values[_first_feasible(relaxed, allowed, values) :]:
        if goal.value(float(theta), 0.0, floor) >= bound:
            break
        extra, _, _ = _least_extra(relaxed, float(theta), allowed & (slow <= theta * TIE))
        bound = min(bound, goal.value(float(theta), extra, floor))
    return bound


def _first_feasible(tables: Tables, allowed: NDArray[np.bool_], values: Array) -> int:
    """Index of the smallest cap on theta under which the layers can be placed; len(values) if none."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        within = allowed & (tables.time_PIN <= values[middle] * TIE)
        if np.isfinite(_least_extra(tables, float(values[middle]), within)[0]):
            high = middle
        else:
            low = middle + 1
    return low


def _least_extra(
    tables: Tables, theta: float, allowed: NDArray[np.bool_]
) -> tuple[float, list[int], list[int]]:
    """(least sum of extra seconds, start index, length index of every rank) by DP over end positions."""
    late = tables.late.extra_s(np.where(allowed, tables.time_PIN, 0.0), theta)
    cost = np.where(allowed, tables.extra_PIN + late, np.inf)
    p, starts, _ = cost.shape
    lengths = tables.lengths_N
    layers = tables.num_layers
    end = np.arange(layers + 1)
    before = end[None, :] - lengths[:, None]  # (N, L+1) start position of a piece that ends there
    valid = before >= 0
    position = np.maximum(before, 0)
    least = np.full(layers + 1, np.inf)
    least[0] = 0.0
    picks = np.zeros((p, layers + 1), np.int64)
    row = np.arange(len(lengths))[:, None]
    for k in range(p):
        piece = cost[k, np.minimum(position, starts - 1), row]
        total = np.where(valid, least[position] + piece, np.inf)
        picks[k] = np.argmin(total, axis=0)
        least = total[picks[k], end]
    return float(least[layers]), *_trace_back(picks, lengths, layers, starts)


def _trace_back(picks: IntArray, lengths: IntArray, layers: int, starts: int) -> tuple[list[int], list[int]]:
    begin: list[int] = []
    chosen: list[int] = []
    end = layers
    for k in range(len(picks) - 1, -1, -1):
        n = int(picks[k, end])
        end = max(end - int(lengths[n]), 0)
        begin.append(min(end, starts - 1))
        chosen.append(n)
    return begin[::-1], chosen[::-1]
