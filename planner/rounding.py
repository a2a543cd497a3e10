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
from planner.program import Matrix, families, fitting, solved

_OPTIONS = {"mip_rel_gap": 0.02, "mip_max_nodes": 10}  # no clock: the answer is a function of the batch
_FEW, _LONGEST = 2, 6  # sequences of a class that are not divided either, and of how many classes
_MOST_SEQUENCES = 4096  # of a batch that this is done for, in one micro-step: for others it takes too long
_MOVES = 200
_SWAPS = 1 << 17  # pairs of sequences that are looked at for a swap, at most


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
    matrix.add(len(last_S), (span, np.arange(len(c), size), ranks))
    untyped: Any = highspy
    lp = untyped.HighsLp()
    lp.num_col_, lp.num_row_ = size, matrix.num_rows
    seconds = points.mean(np.where(fits, points.seconds_DK[:, kind], 0.0))
    lp.col_cost_ = np.concatenate([seconds[c, p] * ranks[p], ranks * table.fixed_K[kind]])
    lp.col_lower_, lp.col_upper_ = np.zeros(size), np.full(size, np.inf)
    below, above = np.full(lp.num_row_, -np.inf), np.zeros(lp.num_row_)
    below[: len(numbers)] = above[: len(numbers)] = numbers
    above[-len(last_S) :] = menu.num_ranks * count_S
    lp.row_lower_, lp.row_upper_ = below, above
    free, whole = highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger
    quick = len(last_S) == 1 and len(table.tokens_N) <= _MOST_SEQUENCES
    few = (numbers <= _FEW) & (np.arange(len(numbers)) < _LONGEST) & quick
    lp.integrality_ = [whole if single else free for single in few[c]] + [whole] * len(kind)
    solver = solved(lp, matrix, _OPTIONS)
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
    """Groups with what they hold. `over_G`: seconds beyond the micro-step's end; `own_IP`: of an item in a pair."""

    def __init__(self, fit: BestFit, whole: Whole) -> None:
        table, lockstep = fit.table, fit.menu.lockstep
        self.fit, self.whole = fit, whole
        self.tokens_I = np.array(fit.tokens, float)
        own = np.add.reduceat(table.seconds_NK[:, whole.kind_P], fit.first_I, axis=0)
        if not lockstep:  # a micro-batch costs by how much of it is taken
            own = own + table.fixed_K[whole.kind_P] * (self.tokens_I[:, None] / table.room_K[whole.kind_P])
        self.pair_G = np.repeat(np.arange(len(whole.kind_P)), [len(steps) for steps in whole.steps_P])
        self.step_G = np.concatenate(whole.steps_P).astype(int)
        self.kind_G = whole.kind_P[self.pair_G]
        self.own_IP = own
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
        left, first_P = self.whole.share_CP.copy(), np.searchsorted(self.pair_G, np.arange(len(self.whole.kind_P) + 1))
        for i, c in enumerate(class_I.tolist()):
            p = int(left[c].argmax())
            g = self._least_busy(i, slice(first_P[p], first_P[p + 1]))
            if g is None or self.over_G[g] + self.own_IP[i, p] > 0:
                own_G = self.own_IP[i, self.pair_G]
                over = np.where(self.room_G >= self.tokens_I[i], self.over_G + own_G, np.inf)
                device_s = np.where(over <= 0, own_G * self.ranks_G, np.inf)
                g = int(over.argmin() if np.isinf(device_s).all() else device_s.argmin())
                if np.isinf(over[g]):
                    return False
            left[c, self.pair_G[g]] -= 1
            self._put(i, g)
        return True

    def _least_busy(self, i: int, those: slice) -> int | None:
        """The least busy of `those` groups with room for item i."""
        over = np.where(self.room_G[those] >= self.tokens_I[i], self.over_G[those], np.inf)
        if not len(over) or np.isinf(over[at := int(over.argmin())]):
            return None
        return int(those.start) + at

    def _put(self, i: int, g: int) -> None:
        old = self.group_I[i]
        if old >= 0:
            self.over_G[old] -= self.own_IP[i, self.pair_G[old]]
            self.room_G[old] += self.tokens_I[i]
        self.over_G[g] += self.own_IP[i, self.pair_G[g]]
        self.room_G[g] -= self.tokens_I[i]
        self.group_I[i] = g

    def level(self, late: Callable[[], bool]) -> None:
        """Move or swap sequences of the group that is furthest beyond its end, until none is or that does not help."""
        for _ in range(_MOVES):
            g = int(self.over_G.argmax())
            if self.over_G[g] <= 0 or late() or not self._relieve(g, self.over_G):
                return

    def shorten(self, late: Callable[[], bool]) -> None:
        """Move or swap sequences of each micro-step's slowest group, until no micro-step gets shorter by it."""
        last_S = np.full(len(self.whole.limits_s), -np.inf)
        stuck = np.zeros(len(last_S), bool)
        for _ in range(_MOVES):
            last_S[:] = -np.inf
            np.maximum.at(last_S, self.step_G, self.over_G)
            if stuck.all() or late():
                return
            step = int(np.where(stuck, -np.inf, np.array(self.whole.limits_s) + last_S).argmax())
            mine = self.step_G == step
            if not mine.any():
                stuck[step] = True
                continue
            g = int(np.where(mine, self.over_G, -np.inf).argmax())
            if self._relieve(g, self.over_G - last_S[self.step_G]):
                stuck[:] = False
            stuck[step] |= self.over_G[g] == last_S[step]

    def _relieve(self, g: int, over_G: Array) -> bool:
        """The move or swap after which the most of what is `over_G` of the groups it concerns is least.

        False if that is no less than it is of `g`.
        """
        most, mine = over_G[g], np.flatnonzero(self.group_I == g)
        if not len(mine):
            return False
        own_MP, less = self.own_IP[mine], most - self.own_IP[mine, self.pair_G[g]]
        moved = np.where(self.room_G >= self.tokens_I[mine, None], over_G + own_MP[:, self.pair_G], np.inf)
        moved[:, g] = np.inf
        moved = np.maximum(moved, less[:, None])
        m, h = np.unravel_index(moved.argmin(), moved.shape)
        theirs = self.group_I if len(mine) * len(self.group_I) <= _SWAPS else np.zeros(0, int)
        own, every = self.own_IP[: len(theirs), self.pair_G[g]], np.arange(len(theirs))
        pair = self.pair_G[theirs]
        swapped = over_G[theirs] - self.own_IP[every, pair] + own_MP[:, pair]
        swapped = np.maximum(swapped, less[:, None] + own)
        held, given = self.tokens_I[: len(theirs)], self.tokens_I[mine, None]
        fits = (self.room_G[theirs] + held >= given) & (self.room_G[g] + given >= held) & (theirs != g)
        swapped = np.where(fits, swapped, np.inf)
        least = float(swapped.min(initial=np.inf))
        if min(moved[m, h], least) >= most - 1e-6 * self.whole.limits_s[self.step_G[g]]:
            return False
        if moved[m, h] <= least:
            self._put(int(mine[m]), int(h))
        else:
            n, j = np.unravel_index(swapped.argmin(), swapped.shape)
            other = int(theirs[j])
            self._put(int(j), g)
            self._put(int(mine[n]), other)
        return True

    def placed(self) -> Placed:
        """The groups, with their sequences in micro-batches."""
        fit = self.fit
        ends = np.append(fit.first_I[1:], len(fit.table.tokens_N))
        rows: list[list[PlacedGroup]] = [[] for _ in self.whole.limits_s]
        for g, step in enumerate(self.step_G.tolist()):
            items = np.flatnonzero(self.group_I == g)
            if len(items):
                sequences = [i for item in items for i in range(int(fit.first_I[item]), int(ends[item]))]
                kind = _fastest(fit.menu, fit.table, int(self.kind_G[g]), sequences)
                rows[step].append(placed_group(fit.menu, fit.table, kind, sequences))
        return placed(fit.menu, rows)


def _fastest(menu: Menu, table: Table, kind: int, held: list[int]) -> int:
    """The kind of no more ranks than `kind` in which a group that holds `held` ends first."""
    if menu.pp > 1 and not menu.lockstep:  # there its time is not a sum
        return kind
    filled = float(table.tokens_N[held].sum()) / table.room_K
    calls = np.where(filled > 1, np.inf, 1.0) if menu.lockstep else np.maximum(np.ceil(filled), 1.0)
    time_K = table.seconds_NK[held].sum(axis=0) + table.fixed_K * calls
    time_K = np.where(table.ranks_K <= table.ranks_K[kind], time_K, np.inf)
    best = int(time_K.argmin())
    return best if time_K[best] < time_K[kind] else kind


def filled(fit: BestFit, points: Points, whole: Whole, late: Callable[[], bool] = lambda: False) -> Placed | None:
    """Every sequence in the groups of `whole`, near to its micro-steps' ends; None if one finds no room."""
    filling = Filling(fit, whole)
    if not filling.fill(points):
        return None
    filling.level(late)
    filling.shorten(late)
    return filling.placed()
