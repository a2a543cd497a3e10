"""Groups in whole numbers for micro-steps of given seconds, by a small mixed-integer program, and sequences' shares.

The relaxation (relaxation.py) divides groups as well as sequences; where a few wide groups matter, best fit then opens
others than it means. Here the seconds T_t of every span are given, so that what a group offers is a constant:

    x_ikt >= 0, sum_kt x = 1              a sequence's shares
    n_kt whole, sum_k r n <= N count      groups; the ranks of each span
    m_kta whole, sum_a m <= n             groups that hold each pattern of the longest lengths (patterns.py), and
    sum_a a_i m >= x_ikt                  what they hold of them: in wide groups of large batches
    the relaxation's rows of time, of room and of whole sequences, with w = T_t n
    minimise sum r s x + r f n            device time, so that most is left for what packing wastes

Only the kinds that the relaxation prices lowest are in it. It proves nothing: its groups are filled (filling.py).

Legend: C classes of lengths, P pairs of a kind and a span, L long lengths, A patterns.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.batch import IntArray, Points, Table
from planner.costmodel.keys import Array
from planner.costmodel.sequences import Menu
from planner.patterns import long_patterns, maximal, wide
from planner.program import Matrix, families, fitting, solved

_OPTIONS = {"mip_rel_gap": 0.02, "mip_max_nodes": 10}  # no clock: the answer is a function of the batch
_SMALL = 1024  # sequences of a small batch
_LOOKS, _LOOKS_LARGE = 12, 40  # of the solver at whether it may go on; most programs need 4 or 5, some would need 30
_FEW, _LONGEST = 2, 6  # in small batches: sequences of a class that are not divided either, and of how many classes
_PATTERNS = 200  # in large ones: of the longest sequences in a wide group


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """Seconds of the micro-steps; of each pair its kind, every class's share, and the micro-step of every group."""

    limits_s: tuple[float, ...]
    kind_P: IntArray
    share_CP: Array
    steps_P: list[list[int]]


def whole_groups(
    menu: Menu, table: Table, points: Points, limits_s: tuple[float, ...], kinds: tuple[int, ...]
) -> Whole | None:
    """None if there are no such groups, or none were found in a moment.

    `limits_s`: seconds of every micro-step, equal ones next to each other.
    """
    spans = [(last, len(list(same))) for last, same in groupby(limits_s)]
    last_S, count_S = (np.array(column) for column in zip(*spans, strict=True))
    kind, span = np.repeat(np.array(kinds), len(spans)), np.tile(np.arange(len(spans)), len(kinds))
    fits = fitting(menu, points, table, kind, last_S[span])
    some = fits.any(axis=0)
    kind, span, fits = kind[some], span[some], fits[:, some]
    if not fits.any(axis=1).all():
        return None
    values = _solved(menu, table, points, (kind, span, fits), last_S, count_S)
    if values is None:
        return None
    share, classes = np.zeros((len(points.first_C), len(kind))), fits[points.first_C]
    share[classes] = values[: classes.sum()]
    counts = np.rint(values[classes.sum() :]).astype(int)
    steps = _in_steps(menu.num_ranks, table.ranks_K[kind], span, counts, count_S.tolist())
    return Whole(limits_s=limits_s, kind_P=kind, share_CP=share, steps_P=steps)


def _solved(
    menu: Menu, table: Table, points: Points, pairs: tuple[IntArray, IntArray, NDArray[np.bool_]], last_S: Array,
    count_S: IntArray,
) -> Array | None:  # fmt: skip
    """Values of x for every class and pair that it fits, then of n. Rows: classes, the families', ranks."""
    import highspy

    kind, span, fits = pairs
    c, p = np.nonzero(fits[points.first_C])
    ranks, last, size = table.ranks_K[kind], last_S[span], len(c) + len(kind)
    matrix, numbers = Matrix(), np.add.reduceat(points.count_D, points.first_C)
    matrix.add_shares(points, list(families(menu, points, table, kind, last, fits)), fits[points.first_C], last)
    single, small = len(last_S) == 1, len(table.tokens_N) <= _SMALL
    columns = size
    for at in wide(ranks, menu.num_ranks) if single and not small else ():
        found = long_patterns(points, table, int(kind[at]), fits[:, at], float(last[at]), menu.lockstep, _PATTERNS)
        if found is not None:
            classes = np.searchsorted(points.first_C, found[0])
            x = np.flatnonzero(p == at)[np.searchsorted(c[p == at], classes)]
            columns += _add_patterns(matrix, maximal(found[1]), x, len(c) + int(at), columns)
    matrix.add(len(last_S), (span, np.arange(len(c), size), ranks))
    untyped: Any = highspy
    lp = untyped.HighsLp()
    lp.num_col_, lp.num_row_ = columns, matrix.num_rows
    seconds = points.mean(np.where(fits, points.seconds_DK[:, kind], 0.0))
    lp.col_cost_ = np.concatenate([seconds[c, p] * ranks[p], ranks * table.fixed_K[kind], np.zeros(columns - size)])
    lp.col_lower_, lp.col_upper_ = np.zeros(columns), np.full(columns, np.inf)
    below, above = np.full(lp.num_row_, -np.inf), np.zeros(lp.num_row_)
    below[: len(numbers)] = above[: len(numbers)] = numbers
    above[-len(last_S) :] = menu.num_ranks * count_S
    lp.row_lower_, lp.row_upper_ = below, above
    free, whole = highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger
    few = (numbers <= _FEW) & (np.arange(len(numbers)) < _LONGEST) & (single and small)
    lp.integrality_ = [whole if alone else free for alone in few[c]] + [whole] * (len(kind) + columns - size)
    solver = solved(lp, matrix, _OPTIONS, _LOOKS if small else _LOOKS_LARGE)
    return None if solver is None else np.array(solver.getSolution().col_value)[:size]


def _add_patterns(matrix: Matrix, patterns_AL: Array, x_L: IntArray, n: int, first: int) -> int:
    """Rows sum_a m a >= x and sum_a m <= n, for numbers m of groups that hold each pattern, from column `first` on."""
    own, size = first + np.arange(len(patterns_AL)), len(x_L)
    length, pattern = np.nonzero(patterns_AL.T)
    held = (length, own[pattern], -patterns_AL.T[length, pattern])
    matrix.add(size, (np.arange(size), x_L, np.ones(size)), held)
    matrix.add(1, (0 * own, own, np.ones(len(own))), (np.zeros(1, int), np.array([n]), -np.ones(1)))
    return len(own)


def _in_steps(
    num_ranks: int, ranks_P: Array, span_P: IntArray, count_P: IntArray, steps_S: list[int]
) -> list[list[int]]:  # fmt: skip
    """The micro-step of every group of each pair: widest first into the first of the span with free ranks."""
    free = [[num_ranks] * count for count in steps_S]
    first = np.cumsum([0, *steps_S])
    found: list[list[int]] = [[] for _ in ranks_P]
    for p in np.argsort(-ranks_P, kind="stable").tolist():
        for _ in range(int(count_P[p])):
            step = next((s for s, ranks in enumerate(free[span_P[p]]) if ranks >= ranks_P[p]), None)
            if step is not None:
                free[span_P[p]][step] -= int(ranks_P[p])
                found[p].append(int(first[span_P[p]]) + step)
    return found
