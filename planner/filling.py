"""Sequences into groups whose kinds and numbers are given (rounding.py), near to their micro-steps' ends.

By their shares first, longest first; then sequences are moved and swapped until no group is far beyond its end, and on
until no micro-step gets shorter by it.

Legend: C classes of lengths, P pairs of a kind and a span, I items of best fit, G groups, M items of one group.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable
from operator import add
from typing import Any

import numpy as np

from planner.batch import IntArray, Points, Table
from planner.costmodel.keys import Array
from planner.costmodel.sequences import Menu
from planner.placing import BestFit, Placed, PlacedGroup, placed, placed_group
from planner.rounding import Whole

_MOVES = 200
_MOST_AT_ONCE = 1024  # items
_SCANNED = 24  # groups looked at for room
_SWAPS = 1 << 17  # pairs of sequences that are looked at for a swap, at most
_SLACK = 1 + 1e-9


class Filling:
    """Groups with what they hold; `over_G`: seconds beyond the end of their micro-step.

    A group takes `own_IP` for every item and `fixed_G` for every micro-batch, in lockstep for its only one. `room_RIP`:
    what an item is of a micro-batch by each row of `_rooms`, of which none may sum to more than one.
    """

    def __init__(self, fit: BestFit, whole: Whole) -> None:
        table = fit.table
        self.fit, self.whole = fit, whole
        self.tokens_I = np.array(fit.tokens, float)
        self.own_IP = np.add.reduceat(table.seconds_NK[:, whole.kind_P], fit.first_I, axis=0)
        self.pair_G = np.repeat(np.arange(len(whole.kind_P)), [len(steps) for steps in whole.steps_P])
        self.step_G = np.concatenate(whole.steps_P).astype(int)
        self.kind_G = whole.kind_P[self.pair_G]
        self.fixed_G = table.fixed_K[self.kind_G]
        self.room_RIP = _rooms(table, fit.first_I, self.tokens_I, table.room_K[whole.kind_P])
        if fit.menu.lockstep:  # one micro-batch: what tokens say is all
            self.room_RIP = self.room_RIP[:1]
        self.ranks_P, self.ranks_G = table.ranks_K[whole.kind_P], table.ranks_K[self.kind_G]
        self.busy_G = -np.array(whole.limits_s)[self.step_G]
        self.held_RG = np.zeros((len(self.room_RIP), len(self.kind_G)))
        self.over_G = self.busy_G + self.fixed_G
        self.group_I = np.full(len(self.tokens_I), -1)

    def _over(self, busy: Array, held: Array, those: Any) -> Array:
        """Seconds beyond the end of `those` groups if items take `busy` and are `held` of a micro-batch.

        inf without the room.
        """
        parts = held.max(axis=0) / _SLACK
        if self.fit.menu.lockstep:
            return np.asarray(np.where(parts > 1, np.inf, busy + self.fixed_G[those]))
        return np.asarray(busy + self.fixed_G[those] * np.maximum(np.ceil(parts), 1.0))

    def _with(self, own: Any, room: Array, those: slice) -> Array:
        """`_over` of `those` groups if one more item takes `own` and is `room` of a micro-batch."""
        if self.fit.menu.lockstep:
            return np.asarray(np.where(self.held_RG[0, those] + room[0] > _SLACK, np.inf, self.over_G[those] + own))
        return self._over(self.busy_G[those] + own, self.held_RG[:, those] + room, those)

    def fill(self, points: Points) -> bool:
        """Every item, longest first, into a group of the pair that its class has a share of; False if none has room.

        If no group of that pair has time, into the cheapest group that has, or the one that ends first: at once of a
        small batch, of a large one when all others are in, which takes less time too.
        """
        class_I = self._classes(points)
        if len(class_I) > _MOST_AT_ONCE:
            pair_I = self._pairs(class_I)
            left = sorted(i for p in range(len(self.ranks_P)) for i in self._best_fit(p, np.flatnonzero(pair_I == p)))
            return all(self._put_anywhere(i) for i in left)
        left_CP, first_P = self.whole.share_CP.copy(), np.searchsorted(self.pair_G, np.arange(len(self.ranks_P) + 1))
        for i, c in enumerate(class_I.tolist()):
            p = int(left_CP[c].argmax())
            those = slice(first_P[p], first_P[p + 1])
            over = self._with(self.own_IP[i, p], self.room_RIP[:, i, p, None], those)
            if len(over) and over.min() <= 0:
                self._put(i, int(those.start) + int(over.argmin()))
            elif not self._put_anywhere(i):
                return False
            left_CP[c, self.pair_G[self.group_I[i]]] -= 1
        return True

    def _put_anywhere(self, i: int) -> bool:
        """Item i into the cheapest group that has time, or the one that ends first; False if none has room."""
        own_G = self.own_IP[i, self.pair_G]
        over = self._with(own_G, self.room_RIP[:, i, self.pair_G], slice(None))
        device_s = np.where(over <= 0, own_G * self.ranks_G, np.inf)
        g = int(device_s.argmin() if over.min() <= 0 else over.argmin())
        if np.isinf(over[g]):
            return False
        self._put(i, g)
        return True

    def _classes(self, points: Points) -> IntArray:
        """The class of every item."""
        longest = self.fit.table.tokens_N[self.fit.first_I]
        return np.searchsorted(points.first_C, np.searchsorted(-points.tokens_D, -longest), "right") - 1

    def _pairs(self, class_I: IntArray) -> IntArray:
        """The pair of every item: of a class the longest go to the widest pair that has a share of it."""
        first_I = self.fit.first_I
        many_I = np.diff(np.append(first_I, len(self.fit.table.tokens_N)))
        widest = np.argsort(-self.ranks_P, kind="stable")
        pair_I = np.zeros(len(first_I), int)
        for c, share in enumerate(self.whole.share_CP):
            items = np.flatnonzero(class_I == c)
            ends = np.cumsum(share[widest])
            middle = np.cumsum(many_I[items]) - many_I[items] / 2
            pair_I[items] = widest[np.minimum(np.searchsorted(ends, middle), int(ends.argmax()))]
        return pair_I

    def _best_fit(self, p: int, items: IntArray) -> list[int]:
        """Items into the fullest groups of pair p that they leave within time and room; those that found none."""
        groups = np.flatnonzero(self.pair_G == p).tolist()
        if not groups:
            return [int(i) for i in items]
        fixed, lockstep, left = float(self.fixed_G[groups[0]]), self.fit.menu.lockstep, []
        none = (0.0,) * len(self.room_RIP)
        busy, held = {g: float(self.busy_G[g]) for g in groups}, dict.fromkeys(groups, none)
        order = sorted((-busy[g] - fixed, g) for g in groups)  # seconds left, at most
        own_I, room_RI = self.own_IP[items, p].tolist(), self.room_RIP[:, items, p].tolist()
        for i, own, *room in zip(items.tolist(), own_I, *room_RI, strict=True):
            first = bisect_left(order, (own, -1))
            for at in range(first, min(first + _SCANNED, len(order))):
                g = order[at][1]
                now = tuple(map(add, held[g], room))
                parts = max(now) / _SLACK
                over = busy[g] + own + fixed * max(1, math.ceil(parts))
                if over <= 0 and (parts <= 1 or not lockstep):
                    del order[at]
                    busy[g] += own
                    held[g] = now
                    insort(order, (-over, g))
                    self.group_I[i] = g
                    break
            else:
                left.append(i)
        for g in groups:
            self.busy_G[g], self.held_RG[:, g] = busy[g], held[g]
        self.over_G[groups] = self._over(self.busy_G[groups], self.held_RG[:, groups], groups)
        return left

    def _put(self, i: int, g: int) -> None:
        old = int(self.group_I[i])
        for group, sign in ((old, -1), (g, 1)):
            if group >= 0:
                self.busy_G[group] += sign * self.own_IP[i, self.pair_G[group]]
                self.held_RG[:, group] += sign * self.room_RIP[:, i, self.pair_G[group]]
                if self.fit.menu.lockstep:  # what it held before had room, and what it will hold has
                    self.over_G[group] = self.busy_G[group] + self.fixed_G[group]
                else:
                    self.over_G[group] = self._over(self.busy_G[group], self.held_RG[:, group], group)
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

        False if that is no less than it is of `g`. `over_G` may count from another end than `self.over_G` does.
        """
        most, mine = over_G[g], np.flatnonzero(self.group_I == g)
        if not len(mine):
            return False
        later_G = over_G - self.over_G
        own_MP, room_RMP, p = self.own_IP[mine], self.room_RIP[:, mine], self.pair_G[g]
        busy_M, held_RM = self.busy_G[g] - own_MP[:, p], self.held_RG[:, g, None] - room_RMP[:, :, p]
        held = self.held_RG[:, None] + room_RMP[:, :, self.pair_G]
        moved = self._over(self.busy_G + own_MP[:, self.pair_G], held, slice(None)) + later_G
        moved[:, g] = np.inf
        moved = np.maximum(moved, (self._over(busy_M, held_RM, g) + later_G[g])[:, None])
        m, h = np.unravel_index(moved.argmin(), moved.shape)
        theirs = self.group_I if len(mine) * len(self.group_I) <= _SWAPS else np.zeros(0, int)
        items, pair = np.arange(len(theirs)), self.pair_G[theirs]
        busy = self.busy_G[theirs] - self.own_IP[items, pair] + own_MP[:, pair]
        held = (self.held_RG[:, theirs] - self.room_RIP[:, items, pair])[:, None] + room_RMP[:, :, pair]
        swapped = self._over(busy, held, theirs) + later_G[theirs]
        held = held_RM[:, :, None] + self.room_RIP[:, items, p][:, None]
        given = self._over(busy_M[:, None] + self.own_IP[items, p], held, g) + later_G[g]
        swapped = np.where(theirs != g, np.maximum(swapped, given), np.inf)
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


def _rooms(table: Table, first_I: IntArray, tokens_I: Array, room_P: Array) -> Array:
    """(R, I, P): items by their tokens, those longer than half a micro-batch as a whole, than a third of it as half."""
    longest = table.tokens_N[first_I][:, None] / room_P
    tokens = tokens_I[:, None] / room_P
    return np.stack([tokens, longest > 0.5 * _SLACK, np.floor(3 * longest / _SLACK) / 2])


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
