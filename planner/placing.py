"""Sequences into groups below target times by best fit, and groups into micro-batches.

A sequence, longest first, takes its kinds in the order of the device time that they cost it; of a kind the open group
with the least time left that still has time and room. Of a large batch, short sequences of nearly the same length go
in bundles: what they cost and hold is the sum of what each does.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from planner.batch import IntArray, Table, fewest_steps
from planner.costmodel.sequences import Menu

_SCANNED = 12  # open groups of a kind looked at for room
_MOST_ITEMS = 4096  # from here on short sequences go in bundles:
_GRAINS = 32_768  # of at most this part of the batch's tokens,
_ROOM_GRAINS = 16  # and this part of the room of a group that holds one micro-batch, or half a micro-batch of others
_CHECKED = 4096  # sequences between looks at the clock


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedGroup:
    """A group's kind and the sequences (places in the table) of its micro-batches."""

    kind: int
    parts: tuple[tuple[int, ...], ...]
    time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Groups of every micro-step, and the sum of the slowest, the longest `Menu.longest_counts` times."""

    steps: tuple[tuple[PlacedGroup, ...], ...]
    time_s: float


class _Open:
    """Open groups: of each kind, sorted by the seconds they have left; and the free ranks of every micro-step.

    `room_K`, `more_K`: tokens of a micro-batch, and the seconds of one more; inf where a group has a single one.
    """

    def __init__(self, room_K: list[float], more_K: list[float], num_ranks: int, limits: tuple[float, ...]) -> None:
        self.by_kind: list[list[tuple[float, int]]] = [[] for _ in room_K]
        self.free, self.limits = [num_ranks] * len(limits), limits
        self.room_K, self.more_K = room_K, more_K
        self.kind: list[int] = []
        self.step: list[int] = []
        self.room: list[list[float]] = []  # of every micro-batch, ascending
        self.held: list[list[int]] = []

    def fit(self, kind: int, seconds: float, tokens: int) -> int | None:
        """Place in `by_kind[kind]` of the fullest group with time and room."""
        groups, room = self.by_kind[kind], self.room
        first = bisect_left(groups, (seconds, -1))
        more = seconds + self.more_K[kind]
        for at in range(first, min(first + _SCANNED, len(groups))):
            left, group = groups[at]
            if room[group][-1] >= tokens or left >= more:
                return at
        if len(groups) > first + _SCANNED:
            left, group = groups[-1]
            if self.room[group][-1] >= tokens or left >= more:
                return len(groups) - 1
        return None

    def add(self, kind: int, at: int, sequence: int, seconds: float, tokens: int) -> None:
        """Give `sequence` to the group at `by_kind[kind][at]`."""
        left, group = self.by_kind[kind].pop(at)
        room = self.room[group]
        if room[-1] < tokens:
            room.append(self.room_K[kind])
            left -= self.more_K[kind]
        if len(room) == 1:
            room[0] -= tokens
        else:
            insort(room, room.pop(bisect_left(room, tokens)) - tokens)
        self.held[group].append(sequence)
        insort(self.by_kind[kind], (left - seconds, group))

    def grow(self, num_ranks: int, limit: float) -> int:
        """One more micro-step; its place."""
        self.free.append(num_ranks)
        self.limits = (*self.limits, limit)
        return len(self.free) - 1

    def opens(self, ranks: int, seconds: float) -> int | None:
        """The micro-step to open a group in: the shortest with time and ranks, then the emptiest."""
        best: tuple[float, int, int] | None = None
        for step, free in enumerate(self.free):
            if free >= ranks and self.limits[step] >= seconds:
                key = (self.limits[step], -free, step)
                best = key if best is None or key < best else best
        return None if best is None else best[2]

    def open(self, kind: int, ranks: int, step: int, spent_s: float) -> int:
        """A new group of `kind` that has `spent_s` less than its micro-step; its place in `by_kind[kind]`."""
        group = len(self.kind)
        self.kind.append(kind)
        self.step.append(step)
        self.room.append([self.room_K[kind]])
        self.held.append([])
        self.free[step] -= ranks
        entry = (self.limits[step] - spent_s, group)
        insort(self.by_kind[kind], entry)
        return bisect_left(self.by_kind[kind], entry)


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How best fit goes about it: the kinds that it may use, and its patience.

    `patience`: while ranks are free, a sequence opens a group of its cheapest kind rather than join one where it costs
    more than this times as much device time.
    """

    kinds: tuple[int, ...]
    patience: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Costs:
    """(kind, device seconds, own, opening) of every item in the kinds that hold it, least device time first.

    `least_s`: the sum of the first.
    """

    rows: list[list[tuple[int, float, float, float]]]
    least_s: float


class BestFit:
    """Placements of one batch."""

    def __init__(self, menu: Menu, table: Table) -> None:
        self.menu, self.table = menu, table
        self.ranks = [int(r) for r in table.ranks_K]
        self.room = table.room_K.tolist()
        self.more = [math.inf] * len(self.ranks) if menu.lockstep else table.fixed_K.tolist()
        self.first_I = _bundles(menu, table)
        self.tokens = np.add.reduceat(table.tokens_N, self.first_I).tolist()
        self._costs: dict[tuple[int, ...], _Costs] = {}

    def anyhow(self) -> Placed | None:
        """A placement in as many micro-steps as it takes, whatever its time; None if a sequence fits no kind."""
        table, usable = self.table, self.table.usable()
        held = usable[np.isfinite(table.seconds_NK[0, usable])]
        longest_s = 1e3 * float(np.where(np.isfinite(table.seconds_NK), table.seconds_NK + table.fixed_K, 0.0).sum())
        fewest = fewest_steps(self.menu, table)
        for steps in range(fewest, len(self.tokens) + 1) if self.menu.lockstep else (1,):
            for kinds in (usable, held):
                placed = self.place((longest_s,) * steps, Way(kinds=tuple(kinds.tolist()), patience=math.inf))
                if placed is not None:
                    return placed
        return None

    def place(
        self, limits_s: tuple[float, ...], way: Way, late: Callable[[], bool] = lambda: False
    ) -> Placed | None:
        """Micro-steps of at most `limits_s` each; None if best fit finds no such placement before it is late."""
        state = _Open(self.room, self.more, self.menu.num_ranks, limits_s)
        if not self._fill(self._of(way.kinds), way.patience, state, late):
            return None
        return self._placed(state, len(limits_s))

    def grown(self, way: Way, longer: float, most_s: float) -> Placed | None:
        """Micro-steps as sequences need them, the longest first; None if together they last more than `most_s`.

        Each is `longer` times as long as the sequence that opens it takes alone where it costs least device time.
        """
        state = _Open(self.room, self.more, self.menu.num_ranks, ())
        if not self._fill(self._of(way.kinds), way.patience, state, lambda: False, (longer, most_s)):
            return None
        return self._placed(state, len(state.limits))

    def _of(self, kinds: tuple[int, ...]) -> _Costs:
        found = self._costs.get(kinds)
        if found is not None:
            return found
        table, columns = self.table, np.array(kinds)
        seconds, fixed = table.seconds_NK[:, columns], table.fixed_K[columns]
        # The first sequence of a group is its longest, so its last micro-batch leaves the pipeline no sooner than this.
        later = 0 if self.menu.lockstep else self.menu.pp - 1
        opening = fixed + later * np.where(np.isfinite(seconds), seconds + fixed, 0.0)
        opening, seconds = opening[self.first_I], np.add.reduceat(seconds, self.first_I, axis=0)
        device = seconds
        if not self.menu.lockstep:  # a micro-batch costs by how much of it is taken
            tokens = np.add.reduceat(table.tokens_N, self.first_I)
            device = seconds + fixed * (tokens[:, None] / table.room_K[columns])
        device = device * table.ranks_K[columns]
        order = np.argsort(device, axis=1, kind="stable")
        device, seconds, opening = (np.take_along_axis(a, order, axis=1) for a in (device, seconds, opening))
        holds = np.isfinite(device).sum(axis=1).tolist()
        columns_IK = zip(*(a.tolist() for a in (columns[order], device, seconds, opening)), strict=True)
        found = self._costs[kinds] = _Costs(
            rows=[list(zip(*row, strict=True))[:n] for n, row in zip(holds, columns_IK, strict=True)],
            least_s=float(device[:, 0].sum()),
        )
        return found

    def _fill(
        self, costs: _Costs, patience: float, state: _Open, late: Callable[[], bool],
        growth: tuple[float, float] | None = None,
    ) -> bool:  # fmt: skip
        """Every item into `state`, or False as soon as one finds no group or the ranks have too little time left.

        `growth`: (longer, most_s) of `grown`.
        """
        longest, most_s = (max(state.limits), sum(state.limits)) if growth is None else (math.inf, growth[1])
        spare_s = self.menu.num_ranks * most_s - costs.least_s  # device time beyond the least
        by_kind, fit = state.by_kind, state.fit
        for i, (tokens, row) in enumerate(zip(self.tokens, costs.rows, strict=True)):
            if i % _CHECKED == _CHECKED - 1 and late():
                return False
            chosen: tuple[int, int] | None = None
            opened: tuple[int, int, float, float, float] | None = None
            for kind, device_s, own, opening in row:
                if own + opening > longest:
                    continue
                if opened is not None and device_s > patience * opened[2]:
                    break
                at = fit(kind, own, tokens) if by_kind[kind] else None
                if at is not None:
                    chosen, spent_s, own_s = (kind, at), device_s, own
                    break
                if opened is None:
                    step = state.opens(self.ranks[kind], own + opening)
                    if step is not None:
                        opened = kind, step, device_s, own, opening
            if chosen is None:
                if opened is None:
                    if growth is None or not row:
                        return False
                    kind, device_s, own, opening = row[0]
                    opened = kind, state.grow(self.menu.num_ranks, growth[0] * (own + opening)), device_s, own, opening
                    if sum(state.limits) > most_s:
                        return False
                kind, step, spent_s, own_s, opening = opened
                chosen = kind, state.open(kind, self.ranks[kind], step, opening)
                spent_s += self.ranks[kind] * opening
            spare_s -= spent_s - row[0][1]
            if spare_s < 0:
                return False
            state.add(*chosen, i, own_s, tokens)
        return True

    def _placed(self, state: _Open, steps: int) -> Placed:
        rows: list[list[PlacedGroup]] = [[] for _ in range(steps)]
        ends = np.append(self.first_I[1:], len(self.table.tokens_N))
        for kind, step, held in zip(state.kind, state.step, state.held, strict=True):
            if held:
                sequences = [i for item in held for i in range(int(self.first_I[item]), int(ends[item]))]
                rows[step].append(placed_group(self.menu, self.table, kind, sequences))
        return placed(self.menu, rows)


def placed(menu: Menu, rows: Iterable[Iterable[PlacedGroup]]) -> Placed:
    """The groups of every micro-step, less the empty ones, in the order that the price of a pipeline assumes."""
    steps = [groups for row in rows if (groups := tuple(row))]
    lasts = [max(group.time_s for group in groups) for groups in steps]
    if menu.longest_counts > 1:  # longest first 1F1B takes no longer than is priced
        steps = [steps[i] for i in sorted(range(len(steps)), key=lambda i: -lasts[i])]
    return Placed(steps=tuple(steps), time_s=sum(lasts) + (menu.longest_counts - 1) * max(lasts))


def _bundles(menu: Menu, table: Table) -> IntArray:
    """Where items begin: every sequence its own, or, of a large batch, short neighbours together as they are."""
    tokens = table.tokens_N
    if len(tokens) <= _MOST_ITEMS:
        return np.arange(len(tokens))
    most = float(tokens.sum()) / _GRAINS
    most = min(most, float(table.room_K.min()) / (_ROOM_GRAINS if menu.lockstep else 2))
    bundle = np.floor(np.cumsum(np.where(tokens <= most, tokens, 0)) / most)
    own = tokens > most
    return np.flatnonzero(own | (np.diff(bundle, prepend=-1.0) != 0) | np.append(True, own[:-1]))


def placed_group(menu: Menu, table: Table, kind: int, held: list[int]) -> PlacedGroup:
    """The group with its sequences packed into micro-batches."""
    own, fixed = table.seconds_NK[held, kind], float(table.fixed_K[kind])
    if menu.lockstep:
        return PlacedGroup(kind=kind, parts=(tuple(held),), time_s=float(own.sum()) + fixed)
    tokens, room = table.tokens_N[held], float(table.room_K[kind])
    if menu.pp == 1:
        parts = _fewest_parts(tokens.tolist(), room)
        time_s = float(own.sum()) + fixed * len(parts)
        return PlacedGroup(kind=kind, parts=tuple(tuple(held[i] for i in part) for part in parts), time_s=time_s)
    fewest = max(1, math.ceil(float(tokens.sum()) / room - 1e-9))
    best: PlacedGroup | None = None
    for count in part_counts(fewest, len(held), menu.pp):
        packed = _pack(own.tolist(), tokens.tolist(), room, count)
        if packed is None:
            continue
        times = [fixed + sum(float(own[i]) for i in part) for part in packed]
        time_s = sum(times) + (menu.pp - 1) * max(times)
        if best is None or time_s < best.time_s:
            longest_first = (packed[j] for j in sorted(range(len(packed)), key=lambda j: -times[j]))  # noqa: B023
            best = PlacedGroup(kind=kind, parts=tuple(tuple(held[i] for i in p) for p in longest_first), time_s=time_s)
    assert best is not None  # one sequence a micro-batch always fits
    return best


def _fewest_parts(tokens: list[int], room: float) -> list[list[int]]:
    """Best fit, longest first: about as few micro-batches as can be, which is all that counts without a pipeline."""
    parts: list[list[int]] = []
    left: list[tuple[float, int]] = []
    for i in sorted(range(len(tokens)), key=lambda i: -tokens[i]):
        at = bisect_left(left, (tokens[i], -1))
        if at == len(left):
            left.append((room, len(parts)))
            parts.append([])
        spare, part = left.pop(at)
        parts[part].append(i)
        insort(left, (spare - tokens[i], part))
    return parts


def part_counts(fewest: int, most: int, pp: int) -> list[int]:
    """Numbers of micro-batches to try in a pipeline: from the fewest on, and in the end one per sequence."""
    tries = [fewest, fewest + 1, fewest + 2, *(math.ceil(fewest * f) for f in (1.5, 2, 3, 4, 6, 8, 12, 16))]
    tries += [pp, 2 * pp, 4 * pp, 8 * pp]
    return sorted({min(t, most) for t in tries if t >= min(fewest, most)} | {most})


def _pack(seconds: list[float], tokens: list[int], room: float, count: int) -> list[list[int]] | None:
    """Longest first into the micro-batch with the least time that has room (LPT); None if that leaves one out."""
    parts, left = fill(seconds, tokens, range(len(seconds)), count, room)
    return None if left else [part for part in parts if part]


def fill(
    seconds: list[float], tokens: list[int], those: Iterable[int], count: int, room: float, limit_s: float = math.inf
) -> tuple[list[list[int]], list[int]]:
    """`those`, longest first, into `count` parts, the least busy with room each time, up to `limit_s` each.

    (parts, what no part has time and room for).
    """
    parts: list[list[int]] = [[] for _ in range(count)]
    free = [room] * count
    busy = [(0.0, p) for p in range(count)]
    left = []
    for i in those:
        full = []
        while busy and free[busy[0][1]] < tokens[i]:
            entry = heapq.heappop(busy)
            if free[entry[1]] >= tokens[-1]:  # the shortest may still fit
                full.append(entry)
        if busy and busy[0][0] + seconds[i] <= limit_s:
            spent, p = busy[0]
            heapq.heapreplace(busy, (spent + seconds[i], p))
            parts[p].append(i)
            free[p] -= tokens[i]
        else:
            left.append(i)
        for entry in full:
            heapq.heappush(busy, entry)
    return parts, left
