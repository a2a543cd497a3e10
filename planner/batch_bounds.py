"""Bounds on any dispatch of a batch by what its sequences cost and hold alone, in milliseconds (SYSTEMS.md 4.4).

Legend: D distinct lengths, K kinds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from planner.batch import Points, Table, fewest_steps, points_of
from planner.costmodel.keys import Array
from planner.costmodel.sequences import Menu

_HALVINGS = 30
_TOLERANCE = 1e-4
_MULTIPLIERS = (0.0, 1.0, 0.5, 2.0, 4.0)  # of memory, in units of a call's fixed time
_SLACK = 1 + 1e-9


def bound_s(menu: Menu, table: Table) -> float:
    """No dispatch of the batch over the kinds takes less; inf if a sequence has no kind."""
    points = points_of(table)
    if not menu.lockstep:
        return steps_bound_s(menu, table, points, 1)
    fewest = fewest_steps(menu, table)
    more = steps_bound_s(menu, table, points, fewest + 3, at_least=True)
    return min(*(steps_bound_s(menu, table, points, fewest + i) for i in range(3)), more)


def steps_bound_s(menu: Menu, table: Table, points: Points, steps: int, *, at_least: bool = False) -> float:
    """No dispatch in `steps` micro-steps takes less (without lockstep: however many micro-batches a group has).

    In T seconds a sequence can only use kinds in which it alone takes no longer, and the ranks offer N T device
    seconds. Each micro-batch costs a rank at least `fixed`; a rank holds at most `room` tokens in each, a row that
    enters with a multiplier (weak duality), so the best of several multipliers stays valid. `at_least`: in more steps
    neither; what the multipliers 0 and 1 prove grows with the steps.
    """
    usable = table.usable()
    if not len(usable) or np.isinf(points.seconds_DK.min(axis=1)).any():
        return math.inf
    fixed = float(table.fixed_K[usable].min())
    alone_DK = points.seconds_DK + table.fixed_K
    alone_DK = alone_DK + (steps - 1) * fixed if menu.lockstep else alone_DK * menu.pp
    device_DK = points.seconds_DK * table.ranks_K
    hold_DK = points.tokens_D[:, None] * (table.ranks_K / table.room_K)
    multipliers = _MULTIPLIERS[:2] if at_least else _MULTIPLIERS

    def needed(limit: float) -> float:
        mask = alone_DK <= limit * _SLACK
        if not menu.lockstep:
            full = _work(points, np.where(mask, device_DK + table.fixed_K * hold_DK, np.inf)) / menu.num_ranks
            work = _work(points, np.where(mask, device_DK, np.inf)) / menu.num_ranks
            return max(full, pipeline_s(work, fixed, menu.pp))
        whole = table.ranks_K == menu.num_ranks
        alone = not mask[0, ~whole].any()  # the longest sequence has a micro-step's ranks all to its group
        joined = np.where(mask & whole, device_DK, np.inf).min(axis=1) if alone else None
        most = 0.0
        for m in multipliers:
            cost = np.where(mask, device_DK + m * fixed * hold_DK, np.inf).min(axis=1)
            most = max(most, float(points.count_D @ cost) / menu.num_ranks + (1 - m) * fixed * steps)
            if joined is not None:  # others join it, or share the memory of the other micro-steps
                both = np.minimum(cost, joined)
                work = float(points.count_D @ both + joined[0] - both[0])
                most = max(most, work / menu.num_ranks + fixed * (steps - m * (steps - 1)))
        return most

    total = _least(needed, float(alone_DK.min(axis=1).max()))
    longest = float((points.seconds_DK + table.fixed_K).min(axis=1).max())
    return total + (menu.longest_counts - 1) * (longest if at_least else max(longest, total / steps))


def _work(points: Points, cost_DK: Array) -> float:
    return float(points.count_D @ cost_DK.min(axis=1))


def _least(needed: Callable[[float], float], low: float) -> float:
    """The least T from `low` on with needed(T) <= T, by bisection: `needed` falls with T."""
    if needed(low) <= low:
        return low
    high = max(needed(math.inf), low)
    while needed(high) > high:
        high *= 2
    for _ in range(_HALVINGS):
        if high < low * (1 + _TOLERANCE):
            break
        middle = (low + high) / 2
        low, high = (low, middle) if needed(middle) <= middle else (middle, high)
    return low


def pipeline_s(work_s: float, fixed_s: float, pp: int) -> float:
    """Least sum t_j + (pp - 1) max t_j over equal micro-batches of `work_s` in all, each `fixed_s` longer."""
    if pp == 1:
        return work_s + fixed_s
    best = math.sqrt((pp - 1) * work_s / fixed_s) if fixed_s > 0 else math.inf
    if math.isinf(best):
        return work_s
    counts = {max(1, math.floor(best)), math.ceil(best) or 1}
    return min((work_s + n * fixed_s) * (1 + (pp - 1) / n) for n in counts)
