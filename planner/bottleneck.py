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
from planner.costmodel.price import Array

IntArray = NDArray[np.int64]
TIE = 1 + 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """A solution: layers per rank in pipeline order, strategy counts (P, C, S), predicted seconds.

    `lower_s` is a proved bound for this cell and layout; equal to `step_s` when solved exactly.
    """

    step_s: float
    lower_s: float
    num_layers: tuple[int, ...]
    counts_PCS: IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """Of every rank and piece (start, length): seconds, extra seconds with its bound, sync; inf = not allowed."""

    num_layers: int
    lengths_N: IntArray
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
        return float(np.max(self.a * theta_s + self.const_R + self.extra_R * extra_s)) + sync_s + self.step_s


def search_caps(goal: Objective, tables: Tables, upper_s: float, slack_frac: float) -> Partition | None:
    """The best partition below `upper_s`: caps on delta (outer, the loosest first) and theta (inner).

    `slack_frac`: leave trades between theta and delta that can gain no more than this fraction; `lower_s` stays
    valid.
    """
    exact = bool(np.array_equal(tables.extra_PIN, tables.extra_lower_PIN))
    finite = np.isfinite(tables.time_PIN)
    if not finite.any():
        return None
    best: tuple[float, list[int], list[int]] | None = None
    limit, lower = upper_s, np.inf
    caps = np.unique(tables.sync_PIN[finite])
    floor = float(caps[0])
    cap = float(caps[-1])
    while True:
        found, bound = _search_theta(goal, tables, cap, floor, limit)
        lower = min(lower, bound)
        if found is not None and found[0] < limit:
            best, limit = found, found[0]
        # Plans whose delta is below what was just reached may still win by trading theta for delta.
        reached = cap if found is None else _reached(tables, found[1], found[2])
        below = caps[caps < reached / TIE]
        if not len(below) or bound == np.inf or bound >= limit * (1 - slack_frac):
            break
        cap = float(below[-1])
    if best is None:
        return None
    if not exact:
        relaxed = _relaxed_bound(goal, tables, floor)
        lower = min(lower, relaxed)
    _, starts, picks = best
    choices = [tables.choices[tables.choice_IN[i, n]] for i, n in zip(starts, picks, strict=True)]
    return Partition(
        step_s=best[0],
        lower_s=min(lower, best[0]) if (slack_frac or not exact) else best[0],
        num_layers=tuple(int(tables.lengths_N[n]) for n in picks),
        counts_PCS=np.stack([choice.counts[k] for k, choice in enumerate(choices)]),
    )


def _reached(tables: Tables, starts: list[int], picks: list[int]) -> float:
    return max(float(tables.sync_PIN[k, i, n]) for k, (i, n) in enumerate(zip(starts, picks, strict=True)))


def _search_theta(
    goal: Objective, tables: Tables, cap: float, floor: float, limit: float
) -> tuple[tuple[float, list[int], list[int]] | None, float]:
    """(best plan with delta <= cap, bound on every such plan that assumes delta = floor)."""
    allowed = (tables.sync_PIN <= cap * TIE) & np.isfinite(tables.time_PIN)
    values = np.unique(tables.time_PIN[allowed])
    start = _first_feasible(tables, allowed, values)
    if start == len(values):
        return None, np.inf
    best: tuple[float, list[int], list[int]] | None = None
    bound = np.inf
    for theta in values[start:]:
        if goal.value(float(theta), 0.0, floor) >= limit:
            break
        extra, starts, picks = _least_extra(tables, allowed & (tables.time_PIN <= theta * TIE))
        bound = min(bound, goal.value(float(theta), extra, floor))
        reached = max(float(tables.time_PIN[k, i, n]) for k, (i, n) in enumerate(zip(starts, picks, strict=True)))
        value = goal.value(reached, extra, _reached(tables, starts, picks))
        if value < limit:
            best, limit = (value, starts, picks), value
        if extra <= 0:
            break
    return best, bound


def _relaxed_bound(goal: Objective, tables: Tables, floor: float) -> float:
    """Bound with the LP extra seconds instead of the rounded ones."""
    slow = tables.base_PIN + tables.extra_lower_PIN
    allowed = np.isfinite(slow)
    values = np.unique(slow[allowed])
    relaxed = replace(tables, time_PIN=slow, extra_PIN=tables.extra_lower_PIN)
    bound = np.inf
    for theta in values[_first_feasible(relaxed, allowed, values) :]:
        if goal.value(float(theta), 0.0, floor) >= bound:
            break
        extra, _, _ = _least_extra(relaxed, allowed & (slow <= theta * TIE))
        bound = min(bound, goal.value(float(theta), extra, floor))
    return bound


def _first_feasible(tables: Tables, allowed: NDArray[np.bool_], values: Array) -> int:
    """Index of the smallest cap on theta under which the layers can be placed; len(values) if none."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        if np.isfinite(_least_extra(tables, allowed & (tables.time_PIN <= values[middle] * TIE))[0]):
            high = middle
        else:
            low = middle + 1
    return low


def _least_extra(tables: Tables, allowed: NDArray[np.bool_]) -> tuple[float, list[int], list[int]]:
    """(least sum of extra seconds, start index, length index of every rank) by DP over end positions."""
    cost = np.where(allowed, tables.extra_PIN, np.inf)
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
