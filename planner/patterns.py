"""Rows that whole sequences keep in wide groups, for what the relaxation divides too finely (relaxation.py).

A group holds one pattern: how many sequences of each of the longest lengths fit it together, by room and by time. Where
shares x spread over n groups so that no patterns of n groups would hold them, there are prices pi of lengths with
sum pi a <= 1 for every pattern a and

    sum_i pi x <= n

cuts the shares off, though every dispatch keeps it. The prices are dual values of the pattern program, which says how
many groups the shares need (Gilmore and Gomory 1961).

Legend: L long lengths, A patterns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.batch import IntArray, Points, Table
from planner.costmodel.keys import Array
from planner.program import SLACK, Matrix, solved

_WIDE = 16  # of so many groups side by side, and of more, whole sequences are not looked at
_LONG_FRAC = 0.08  # of a group's time, from which on lengths are long
_PATTERNS = 600  # at most; where there are more, fewer lengths are looked at
_VIOLATED_FRAC = 0.01  # of the groups that the shares need, from where on a row is worth its while


def wide(ranks_P: Array, num_ranks: float) -> IntArray:
    """The pairs whose groups are so wide that whole sequences matter."""
    return np.flatnonzero(ranks_P * _WIDE >= num_ranks)


def long_patterns(
    points: Points, table: Table, kind: int, fits_D: NDArray[np.bool_], last_s: float, lockstep: bool,
    most: int = _PATTERNS,
) -> tuple[IntArray, Array] | None:  # fmt: skip
    """Long lengths that have a class of their own, (L,), and their patterns in groups that last `last_s`, (A, L).

    None if a group holds none of them, or more than `most` patterns of the longest alone.
    """
    size = np.diff(np.append(points.first_C, len(points.count_D)))
    own = points.first_C[: int(np.argmax(size > 1)) if (size > 1).any() else len(size)]
    fixed, seconds = float(table.fixed_K[kind]), points.seconds_DK[own, kind]
    own = own[fits_D[own] & (seconds > _LONG_FRAC * (last_s - fixed))]
    room_L = points.tokens_D[own] / table.room_K[kind]
    found, spent, taken = np.zeros((1, 0)), np.full(1, fixed), np.zeros(1)
    for second, room, count in zip(points.seconds_DK[own, kind], room_L, points.count_D[own], strict=True):
        times = np.arange(1 + int(min(count, (last_s * SLACK - fixed) / max(second, 1e-12))))
        spent_AT, taken_AT = spent[:, None] + times * second, taken[:, None] + times * room
        more_s = np.where(taken_AT > SLACK, np.inf, 0.0) if lockstep else fixed * np.maximum(taken_AT - 1, 0.0)
        fits = spent_AT + more_s <= last_s * SLACK
        a, t = np.nonzero(fits)
        if len(a) > most:
            break
        found = np.column_stack([found[a], times[t]])
        spent, taken = spent_AT[fits], taken_AT[fits]
    return (own[: found.shape[1]], found) if found.shape[1] else None


def prices(patterns_AL: Array, shares_L: Array, num_groups: float) -> Array | None:
    """(L,): the prices pi of a row that the shares break; None if they break none by much."""
    import highspy

    untyped: Any = highspy
    longest = maximal(patterns_AL)
    rows, columns = np.nonzero(longest)
    matrix = Matrix()
    matrix.add(len(longest), (rows, columns, longest[rows, columns]))
    lp = untyped.HighsLp()
    lp.num_col_, lp.num_row_ = longest.shape[1], len(longest)
    lp.col_cost_ = -shares_L
    lp.col_lower_, lp.col_upper_ = np.zeros(longest.shape[1]), np.ones(longest.shape[1])
    lp.row_lower_, lp.row_upper_ = np.full(len(longest), -np.inf), np.ones(len(longest))
    solver = solved(lp, matrix, {"presolve": "off"})
    if solver is None:
        return None
    found = np.maximum(np.array(solver.getSolution().col_value), 0.0)
    found /= max(1.0, float((patterns_AL @ found).max()))  # whatever the solver's tolerances
    return found if found @ shares_L > num_groups * (1 + _VIOLATED_FRAC) else None


def maximal(patterns_AL: Array) -> Array:
    """Those that are not another less one sequence."""
    one_more_L = np.cumprod(np.append(1.0, patterns_AL.max(axis=0)[:-1] + 2))  # a number for every pattern
    number_A = patterns_AL @ one_more_L
    return patterns_AL[~np.isin(number_A[:, None] + one_more_L, number_A).any(axis=1)]
