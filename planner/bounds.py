"""Valid lower bounds on the step time, for all cells or candidates at once.

`cell_bounds` knows no state layout and no memory limit: balanced ranks, with whole layers where the model has one
class (SYSTEMS.md 4.5, bound 0). `candidate_bounds` adds both, for a cell's own schedule or for the IDEAL one that
bounds all cells of equal key and pp at once: with theta the bottleneck, rank k can hold work worth
at most cap_k(theta) seconds, by weak LP duality over its time and memory rows (bound 1); theta is too small while
the caps sum to less than the model. Shapes: N cells, K candidates, C classes, S strategies, G groups of ranks.
"""

from __future__ import annotations

import numpy as np

from planner.capacity import Caps, Group, rank_groups
from planner.costmodel.graph import ModelGraph
from planner.costmodel.keys import Array, Machine
from planner.costmodel.pipeline import ScheduleKind
from planner.costmodel.rates import Prices, Rates, boundary_bytes, p2p_s
from planner.costmodel.state import step_sync
from planner.outline import (
    IDEAL,
    Shape,
    Work,
    class_counts,
    shape_of,
    step_s,
    theta_for,
    work_of_prices,
    work_of_rates,
)
from planner.space import SCHEDULES, Cells, IntArray

_HALVINGS = 6  # of the interval of theta; ordering only, any number is valid
_LONG_S = 1e9  # a bottleneck that leaves only memory to decide
_SAFE = 1 - 1e-9  # bounds give up this much to rounding


def least_theta(shape: Shape, work: Work, counts: Array) -> Array:
    """Smallest bottleneck of any partition, memory left aside; `counts` (C,) layers of each class."""
    average = work.total_s / shape.pp + shape.p2p_s
    theta = np.maximum(average, np.max(work.layer_s_CN, axis=0) + shape.p2p_s)
    main = int(np.argmax(counts))
    return np.asarray(np.maximum(theta, _whole_layers(shape, work, main, counts[main])))


def _whole_layers(shape: Shape, work: Work, main: int, num_layers: float) -> Array:
    """Smallest theta at which whole layers of class `main` fit: sum_k floor((theta - ends_k) / t) >= their number.

    With one class a rank holds vpp equal chunks, so that vpp layers come at a time.
    """
    unit = shape.vpp if len(work.layer_s_CN) == 1 else np.ones_like(shape.vpp)
    t = np.maximum(work.layer_s_CN[main], 1e-12) * unit
    needed = num_layers / unit
    both = (shape.schedule == SCHEDULES.index(ScheduleKind.ZB_V)) | (shape.pp == 1)
    placed = shape.schedule != IDEAL
    first = placed * (work.first_s + np.where(both, work.last_s, 0.0))
    last = np.where(both, 0.0, work.last_s) * placed
    middle = np.where(both, shape.pp - 1, shape.pp - 2)
    # From least on, within one t every rank gains one unit, and a rank gains it at its end plus a multiple of t.
    least = np.maximum((needed * t + first + last) / shape.pp, np.maximum(first, last))
    best = np.full_like(t, np.inf)
    for end in (np.zeros_like(t), first, last):
        theta = end + np.ceil((least - end) / t - 1e-9) * t
        room = middle * np.floor(theta / t + 1e-9) + np.floor(np.maximum(theta - first, 0) / t + 1e-9)
        room = room + np.where(both, 0.0, np.floor(np.maximum(theta - last, 0) / t + 1e-9))
        best = np.where((room >= needed - 1e-9) & (theta < best), theta, best)
    return np.asarray(np.where(np.isfinite(best), best, least) + shape.p2p_s)


def cell_bounds(graph: ModelGraph, prices: Prices, key: IntArray, cells: Cells, machine: Machine) -> Array:
    """Lower bound on the step time of every cell, (N,); `key[cell]` is its column in `prices`."""
    work = work_of_prices(graph, prices)
    boundary = boundary_bytes(prices)
    bound = np.empty(len(cells))
    for start in range(0, len(cells), 200_000):
        at = np.arange(start, min(start + 200_000, len(cells)))
        column = key[at]
        here = Work(
            forward_s=work.forward_s[column], backward_s=work.backward_s[column], weight_s=work.weight_s[column],
            layer_s_CN=work.layer_s_CN[:, column], first_s=work.first_s[column], last_s=work.last_s[column],
        )  # fmt: skip
        pp, vpp = cells.pp[at].astype(float), cells.vpp[at].astype(float)
        shape = shape_of(cells, at, p2p_s(boundary[column], pp, vpp, machine))
        bound[at] = step_s(shape, here, least_theta(shape, here, class_counts(graph))) * _SAFE
    return bound


def candidate_bounds(
    graph: ModelGraph, rates: Rates, shape: Shape, usable_bytes: float, machine: Machine, target_s: float,
) -> Array:  # fmt: skip
    """Lower bound on the step time of every candidate, (K,); +inf where nothing fits the memory.

    Bounds above `target_s` may be understated, never below it.
    """
    work = work_of_rates(graph, rates)
    low = least_theta(shape, work, class_counts(graph))
    target = np.full_like(low, target_s) if np.isfinite(target_s) else 4 * step_s(shape, work, low) + 4 * rates.step_s_K
    high = theta_for(shape, work, target - rates.step_s_K)
    sync = _least_sync(graph, rates, shape, high, machine)
    bound = step_s(shape, work, low) + rates.step_s_K + sync
    groups = rank_groups(rates, shape)
    room = [usable_bytes - rates.fixed_bytes_K - g.end_bytes for g in groups]
    open_ = (bound < target) & (np.min(np.stack(room), axis=0) >= 0)
    result = np.where(bound < target, np.inf, bound)
    at = np.flatnonzero(open_)
    if len(at):
        result[at] = _memory_bound(graph, rates, shape, work, groups, room, low, high, sync, at)
    return result * _SAFE


def _memory_bound(
    graph: ModelGraph, rates: Rates, shape: Shape, work: Work, groups: list[Group], room: list[Array],
    low: Array, high: Array, sync: Array, at: IntArray,
) -> Array:  # fmt: skip
    """Bisect theta between `low` and `high` for the candidates `at` by the summed caps of all ranks."""
    caps = Caps(graph, rates, shape, groups, room, at)
    here = shape.take(at)
    part = Work(
        forward_s=work.forward_s[at], backward_s=work.backward_s[at], weight_s=work.weight_s[at],
        layer_s_CN=work.layer_s_CN[:, at], first_s=work.first_s[at], last_s=work.last_s[at],
    )  # fmt: skip
    lo, hi = low[at].copy(), high[at].copy()
    possible = caps.enough(hi)
    at_low = caps.enough(lo)
    for _ in range(_HALVINGS):
        middle = 0.5 * (lo + hi)
        ok = caps.enough(middle)
        hi, lo = np.where(ok, middle, hi), np.where(ok, lo, middle)
    theta = np.where(at_low, low[at], lo)
    value = step_s(here, part, theta) + rates.step_s_K[at] + sync[at]
    beyond = step_s(here, part, high[at]) + rates.step_s_K[at] + sync[at]
    fits = caps.enough(np.full(len(at), _LONG_S))
    return np.where(possible, value, np.where(fits, beyond, np.inf))


def _least_sync(graph: ModelGraph, rates: Rates, shape: Shape, theta_s: Array, machine: Machine) -> Array:
    """Once-per-step work of a rank that holds the average parameters, hidden behind windows no rank exceeds.

    Some rank holds at least the average of dense and some of routed parameters, and the work grows with both, so the
    larger of the two is a bound.
    """
    counts = class_counts(graph)
    window = np.maximum(theta_s, 0.0)
    zero = np.zeros_like(window)
    dense = (counts @ rates.dense_CK + rates.prologue.dense + rates.epilogue.dense) / shape.pp
    routed = (counts @ rates.routed_CK + rates.prologue.routed + rates.epilogue.routed) / shape.pp
    of_dense = step_sync(dense, zero, window, window * _backward_frac(rates), rates.layout, machine).total_s
    if not routed.any():
        return of_dense
    of_routed = step_sync(zero, routed, window, window * _backward_frac(rates), rates.layout, machine).total_s
    return np.maximum(of_dense, of_routed)


def _backward_frac(rates: Rates) -> Array:
    """Largest share of a rank's time that is backward: that of some layer, or half of a transfer's."""
    ends = (rates.prologue, rates.epilogue)
    forward = [*rates.forward_s_CK, *(e.forward_s for e in ends)]
    backward = [*(rates.backward_s_CK + rates.weight_s_CK), *(e.backward_s + e.weight_s for e in ends)]
    shares = [b / np.maximum(f + b, 1e-12) for f, b in zip(forward, backward, strict=True)]
    return np.asarray(np.max(np.stack(shares), axis=0, initial=0.5))
