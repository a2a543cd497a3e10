"""Groups in whole numbers for micro-steps of given seconds, by a small mixed-integer program, and sequences into them.

The relaxation (relaxation.py) divides groups as well as sequences; where a few wide groups matter, best fit then opens
others than it means. Here the seconds T_t of every span are given, so that what a group offers is a constant:

    x_ikt >= 0, sum_kt x = 1              a sequence's shares
    n_kt whole, sum_k r n <= N count      groups; the ranks of each span
    the relaxation's rows of time, of room and of whole sequences, with w = T_t n
    minimise sum r s x + r f n            device time, so that most is left for what packing wastes

Only the kinds that the relaxation prices lowest are in it. It proves nothing: its groups are filled by their shares,
and sequences moved and swapped until no group is far beyond its end.

Legend: C classes of lengths, P pairs of a kind and a span, I items of best fit, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.batch import IntArray, Points, Table
from planner.costmodel.keys import Array
from planner.costmodel.sequences import Menu
from planner.placing import BestFit, Placed, PlacedGroup, placed, placed_group
from planner.relaxation import families, solved

_OPTIONS = {"mip_rel_gap": 0.02, "mip_max_nodes": 60, "time_limit": 0.15}  # seconds
_MOVES = 200
_SLACK = 1 + 1e-9


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
    alone = points.seconds_DK[:, kind] + table.fixed_K[kind]
    fits = (alone if menu.lockstep else alone * menu.pp) <= last_S[span] * _SLACK
    some = fits.any(axis=0)
    kind, span, fits = kind[some], span[some], fits[:, some]
    if not fits.any(axis=1).all():
        return None
    c, p = np.nonzero(fits[points.first_C])
    values = _solved(menu, table, points, (kind, span, fits), (c, p), last_S, count_S)
    if values is None:
        return None
    share = np.zeros((len(points.first_C), len(kind)))
    share[c, p] = values[: len(c)]
    counts = np.rint(values[len(c) :]).astype(int)
    steps = _in_steps(menu.num_ranks, table.ranks_K[kind], span, counts, count_S.tolist())
    return Whole(limits_s=limits_s, kind_P=kind, share_CP=share, steps_P=steps)


def _solved(
    menu: Menu, table: Table, points: Points, pairs: tuple[IntArray, IntArray, NDArray[np.bool_]],
    entries: tuple[IntArray, IntArray], last_S: Array, count_S: IntArray,
) -> Array | None:  # fmt: skip
    """Values of x for every entry (class, pair), then of n. Rows: classes, the families', ranks."""
    import highspy

    (kind, span, fits), (c, p) = pairs, entries
    ranks, last, x, n = table.ranks_K[kind], last_S[span], np.arange(len(c)), len(c) + np.arange(len(kind))
    row = len(points.first_C)
    parts = [(c, x, np.ones(len(c)))]
    for family in families(menu, points, table, kind, last, fits):
        parts.append((row + p, x, points.mean(family.of_DP)[c, p]))
        parts.append((row + n - n[0], n, family.groups_P + last * family.lasting_P))
        row += len(kind)
    parts.append((row + span, n, ranks))
    rows, columns, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((rows, columns))
    order = order[values[order] != 0]
    untyped: Any = highspy
    lp = untyped.HighsLp()
    lp.num_col_, lp.num_row_ = len(c) + len(kind), row + len(last_S)
    seconds = points.mean(np.where(fits, points.seconds_DK[:, kind], 0.0))
    lp.col_cost_ = np.concatenate([seconds[c, p] * ranks[p], ranks * table.fixed_K[kind]])
    lp.col_lower_, lp.col_upper_ = np.zeros(lp.num_col_), np.full(lp.num_col_, np.inf)
    below, above = np.full(lp.num_row_, -np.inf), np.zeros(lp.num_row_)
    below[: len(points.first_C)] = above[: len(points.first_C)] = np.add.reduceat(points.count_D, points.first_C)
    above[row:] = menu.num_ranks * count_S
    lp.row_lower_, lp.row_upper_ = below, above
    free, whole = highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger
    lp.integrality_ = [free] * len(c) + [whole] * len(kind)
    solver = solved(lp, (rows[order], columns[order], values[order]), _OPTIONS)
    return None if solver is None else np.array(solver.getSolution().col_value)


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


class Filling:
    """Groups with what they hold. `over_G`: seconds beyond the micro-step's end; `own_IG`: of an item in a group."""

    def __init__(self, fit: BestFit, whole: Whole) -> None:
        table, lockstep = fit.table, fit.menu.lockstep
        self.fit, self.whole = fit, whole
        self.tokens_I = np.array(fit.tokens, float)
        own = np.add.reduceat(table.seconds_NK, fit.first_I, axis=0)[:, whole.kind_P]
        if not lockstep:  # a micro-batch costs by how much of it is taken
            own = own + table.fixed_K[whole.kind_P] * (self.tokens_I[:, None] / table.room_K[whole.kind_P])
        self.pair_G = np.repeat(np.arange(len(whole.kind_P)), [len(steps) for steps in whole.steps_P])
        self.step_G = np.concatenate(whole.steps_P).astype(int)
        self.kind_G = whole.kind_P[self.pair_G]
        self.own_IG = own[:, self.pair_G]
        self.room_G = table.room_K[self.kind_G] if lockstep else np.full(len(self.kind_G), np.inf)
        self.over_G = table.fixed_K[self.kind_G] - np.array(whole.limits_s)[self.step_G]
        self.ranks_G = table.ranks_K[self.kind_G]
        self.group_I = np.full(len(self.tokens_I), -1)

    def fill(self, points: Points) -> bool:
        """Every item, longest first, into the least busy group of the pair that most of its share is left of.

        If that has no room or time, the cheapest group that has, or the one that ends first. False if none has room.
        """
        longest = self.fit.table.tokens_N[self.fit.first_I]
        class_I = np.searchsorted(points.first_C, np.searchsorted(-points.tokens_D, -longest), "right") - 1
        left = self.whole.share_CP.copy()
        for i, c in enumerate(class_I.tolist()):
            over = np.where(self.room_G >= self.tokens_I[i], self.over_G + self.own_IG[i], np.inf)
            g = int(np.where(self.pair_G == left[c].argmax(), over, np.inf).argmin())
            if over[g] > 0:
                device_s = np.where(over <= 0, self.own_IG[i] * self.ranks_G, np.inf)
                g = int(over.argmin() if np.isinf(device_s).all() else device_s.argmin())
            if np.isinf(over[g]):
                return False
            left[c, self.pair_G[g]] -= 1
            self._put(i, g)
        return True

    def _put(self, i: int, g: int) -> None:
        old = self.group_I[i]
        if old >= 0:
            self.over_G[old] -= self.own_IG[i, old]
            self.room_G[old] += self.tokens_I[i]
        self.over_G[g] += self.own_IG[i, g]
        self.room_G[g] -= self.tokens_I[i]
        self.group_I[i] = g

    def level(self, late: Callable[[], bool]) -> None:
        """Move or swap sequences of the group that is furthest beyond its end, until none is or that does not help."""
        for _ in range(_MOVES):
            g = int(self.over_G.argmax())
            most = self.over_G[g]
            if most <= 0 or late():
                return
            mine = np.flatnonzero(self.group_I == g)
            less = most - self.own_IG[mine, g]
            moved = np.where(self.room_G >= self.tokens_I[mine, None], self.over_G + self.own_IG[mine], np.inf)
            moved[:, g] = np.inf
            moved = np.maximum(moved, less[:, None])
            m, h = np.unravel_index(moved.argmin(), moved.shape)
            theirs, every = self.group_I, np.arange(len(self.group_I))
            swapped = self.over_G[theirs] - self.own_IG[every, theirs] + self.own_IG[mine][:, theirs]
            swapped = np.maximum(swapped, less[:, None] + self.own_IG[:, g])
            held, given = self.tokens_I, self.tokens_I[mine, None]
            fits = (self.room_G[theirs] + held >= given) & (self.room_G[g] + given >= held) & (theirs != g)
            swapped = np.where(fits, swapped, np.inf)
            n, j = np.unravel_index(swapped.argmin(), swapped.shape)
            if min(moved[m, h], swapped[n, j]) >= most * (1 - 1e-6):
                return
            if moved[m, h] <= swapped[n, j]:
                self._put(int(mine[m]), int(h))
            else:
                other = int(theirs[j])
                self._put(int(j), g)
                self._put(int(mine[n]), other)

    def placed(self) -> Placed:
        """The groups, with their sequences in micro-batches."""
        fit = self.fit
        ends = np.append(fit.first_I[1:], len(fit.table.tokens_N))
        rows: list[list[PlacedGroup]] = [[] for _ in self.whole.limits_s]
        for g, step in enumerate(self.step_G.tolist()):
            items = np.flatnonzero(self.group_I == g)
            if len(items):
                sequences = [i for item in items for i in range(int(fit.first_I[item]), int(ends[item]))]
                rows[step].append(placed_group(fit.menu, fit.table, int(self.kind_G[g]), sequences))
        return placed(fit.menu, rows)


def filled(fit: BestFit, points: Points, whole: Whole, late: Callable[[], bool] = lambda: False) -> Placed | None:
    """Every sequence in the groups of `whole`, near to its micro-steps' ends; None if one finds no room."""
    filling = Filling(fit, whole)
    if not filling.fill(points):
        return None
    filling.level(late)
    return filling.placed()
