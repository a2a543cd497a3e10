"""Sequences into groups below a target time, and the bound that no placement beats (SYSTEMS.md 4.4).

`Table` holds the batch sorted longest first. `place` is best fit: kinds in the order of the device time that they
cost a sequence; of a kind the open group with the least time left that still has time and room.

Legend: N sequences, K kinds.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from planner.costmodel.keys import Array
from planner.costmodel.sequences import Menu

IntArray = NDArray[np.int64]
_SCANNED = 12  # open groups of a kind looked at for room
_HALVINGS = 30
_MULTIPLIERS = (0.0, 0.5, 1.0, 2.0, 4.0)  # of memory, in units of a call's fixed time
_SLACK = 1 + 1e-9
_MORE_STEPS = 2  # micro-steps tried beyond the fewest
_LEADS = (0.3, 0.5, 0.7, 0.85)
_PATIENCE = (1.1, math.inf, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A batch, longest first. `seconds_NK`: inf where a kind has no room. `order[i]`: place of i in the batch."""

    order: IntArray
    tokens_N: IntArray
    seconds_NK: Array
    ranks_K: Array
    fixed_K: Array
    room_K: Array

    def restricted(self, kinds: tuple[int, ...]) -> Table:
        """Only `kinds` may be used; their numbers stay."""
        keep = np.zeros(len(self.ranks_K), bool)
        keep[list(kinds)] = True
        return replace(self, seconds_NK=np.where(keep, self.seconds_NK, np.inf))

    def usable(self) -> IntArray:
        """Kinds that hold some sequence."""
        return np.flatnonzero(np.isfinite(self.seconds_NK).any(axis=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedGroup:
    """A group's kind and the sequences (places in the table) of its micro-batches."""

    kind: int
    parts: tuple[tuple[int, ...], ...]
    time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Groups of every micro-step, and the sum of the slowest."""

    steps: tuple[tuple[PlacedGroup, ...], ...]
    time_s: float


def table_of(menu: Menu, lengths: IntArray) -> Table:
    """The batch under the menu."""
    order = np.argsort(-lengths, kind="stable")
    tokens = lengths[order]
    distinct, where = np.unique(tokens, return_inverse=True)
    seconds = np.stack([group.sequence_s(distinct)[where] for group in menu.groups], axis=1)
    room = np.array([group.capacity_tokens for group in menu.groups])
    return Table(
        order=order, tokens_N=tokens, seconds_NK=np.where(tokens[:, None] <= room, seconds, np.inf),
        ranks_K=np.array([float(group.ranks) for group in menu.groups]),
        fixed_K=np.array([group.fixed_s for group in menu.groups]), room_K=room,
    )  # fmt: skip


# ---- bound


def fewest_steps(menu: Menu, table: Table) -> int:
    """Micro-steps that the batch needs if every rank holds as much as any kind allows."""
    usable = table.usable()
    per_rank = float((table.room_K[usable] / table.ranks_K[usable]).max())
    return max(1, math.ceil(float(table.tokens_N.sum()) / (per_rank * menu.num_ranks) - 1e-9))


def bound_s(menu: Menu, table: Table) -> float:
    """No dispatch of the batch over the kinds takes less; inf if a sequence has no kind.

    In T seconds a sequence can only use kinds in which it alone takes no longer, and the ranks offer N T device
    seconds. Each micro-batch costs a rank at least `fixed`; a rank holds at most `room` tokens in each, a row that
    enters with a multiplier (weak duality), so the best of several multipliers stays valid.
    """
    usable = table.usable()
    if not len(usable) or np.isinf(table.seconds_NK.min(axis=1)).any():
        return math.inf
    fixed = float(table.fixed_K[usable].min())
    if not menu.lockstep:
        return _least_time(menu, table, fixed, 0)
    fewest = fewest_steps(menu, table)
    bounds = [_least_time(menu, table, fixed, steps) for steps in range(fewest, fewest + 3)]
    more = _least_time(menu, table, fixed, fewest + 3, multipliers=(0.0, 1.0))
    return min(*bounds, more)


def _least_time(
    menu: Menu, table: Table, fixed: float, steps: int, multipliers: tuple[float, ...] = _MULTIPLIERS
) -> float:
    """Least T of `steps` micro-steps in lockstep (0: groups on their own), by bisection on `needed(T) <= T`."""
    alone_NK = table.seconds_NK + table.fixed_K
    alone_NK = alone_NK + (steps - 1) * fixed if steps else alone_NK * menu.pp
    device_NK = table.seconds_NK * table.ranks_K
    hold_NK = table.tokens_N[:, None] * (table.ranks_K / table.room_K)
    whole = table.ranks_K == menu.num_ranks
    low = float(alone_NK.min(axis=1).max())

    def needed(limit: float) -> float:
        mask = alone_NK <= limit * _SLACK

        def least(cost_NK: Array, kinds: NDArray[np.bool_] = mask) -> Array:
            return np.asarray(np.where(kinds, cost_NK, np.inf).min(axis=1))

        if not steps:
            full = least(device_NK + table.fixed_K * hold_NK).sum() / menu.num_ranks
            return max(float(full), pipeline_s(float(least(device_NK).sum()) / menu.num_ranks, fixed, menu.pp))
        most = 0.0
        alone = not mask[0, ~whole].any()  # the longest sequence has a micro-step's ranks all to its group
        joined = least(device_NK, mask & whole) if alone else None
        for m in multipliers:
            cost = least(device_NK + m * fixed * hold_NK)
            most = max(most, float(cost.sum()) / menu.num_ranks + (1 - m) * fixed * steps)
            if joined is not None:  # others join it, or share the memory of the other micro-steps
                work = float(joined[0] + np.minimum(cost, joined)[1:].sum())
                most = max(most, work / menu.num_ranks + fixed * (steps - m * (steps - 1)))
        return most

    if needed(low) <= low:
        return low
    high = max(needed(math.inf), low)
    while needed(high) > high:
        high *= 2
    for _ in range(_HALVINGS):
        if high < low * (1 + 1e-4):
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


# ---- placement


class _Open:
    """Open groups: of each kind, sorted by the seconds they have left; and the free ranks of every micro-step."""

    def __init__(self, num_kinds: int, free: list[int], limits: list[float]) -> None:
        self.by_kind: list[list[tuple[float, int]]] = [[] for _ in range(num_kinds)]
        self.free, self.limits = free, limits
        self.kind: list[int] = []
        self.step: list[int] = []
        self.room: list[float] = []
        self.held: list[list[int]] = []

    def fit(self, kind: int, seconds: float, tokens: int) -> int | None:
        """Place in `by_kind[kind]` of the fullest group with time and room."""
        groups = self.by_kind[kind]
        first = bisect_left(groups, (seconds, -1))
        for at in range(first, min(first + _SCANNED, len(groups))):
            if self.room[groups[at][1]] >= tokens:
                return at
        last = len(groups) - 1
        return last if last >= first + _SCANNED and self.room[groups[last][1]] >= tokens else None

    def add(self, kind: int, at: int, sequence: int, seconds: float, tokens: int) -> None:
        """Give `sequence` to the group at `by_kind[kind][at]`."""
        left, group = self.by_kind[kind].pop(at)
        self.room[group] -= tokens
        self.held[group].append(sequence)
        insort(self.by_kind[kind], (left - seconds, group))

    def opens(self, ranks: int, seconds: float) -> int | None:
        """The micro-step to open a group in: the shortest with time and ranks, then the emptiest."""
        best: tuple[float, int, int] | None = None
        for step, free in enumerate(self.free):
            if free >= ranks and self.limits[step] >= seconds:
                key = (self.limits[step], -free, step)
                best = key if best is None or key < best else best
        return None if best is None else best[2]

    def open(self, kind: int, ranks: int, step: int, room: float, left: float) -> int:
        """A new group of `kind`; its place in `by_kind[kind]`."""
        group = len(self.kind)
        self.kind.append(kind)
        self.step.append(step)
        self.room.append(room)
        self.held.append([])
        self.free[step] -= ranks
        insort(self.by_kind[kind], (left, group))
        return bisect_left(self.by_kind[kind], (left, group))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How a placement goes about it.

    `kinds`: those it may use. `steps`: micro-steps. `lead_ranks`: the first of them lasts as long as the longest
    sequence takes on so many ranks; 0: as long as the others, and `lead_frac` of the way from there to all that they
    can spare. `patience`: while ranks are free, a sequence opens a group of its cheapest kind rather than join one
    where it costs more than this times as much device time.
    """

    kinds: tuple[int, ...]
    steps: int
    lead_ranks: int
    lead_frac: float
    patience: float


def rules(menu: Menu, table: Table) -> list[Rule]:
    """Rules worth trying, in the order in which they tend to be good: of each strategy alone, and of all."""
    found: list[tuple[float, int, Rule]] = []
    for kinds in _families(menu, table):
        only = table.restricted(kinds)
        fewest = fewest_steps(menu, only)
        work = float((only.seconds_NK * only.ranks_K).min(axis=1).sum()) / menu.num_ranks
        fixed = float(table.fixed_K[list(kinds)].min())
        ranks = sorted({int(table.ranks_K[k]) for k in np.flatnonzero(np.isfinite(only.seconds_NK[0]))})
        leads = [(0, 0.0), *((lead, 0.0) for lead in ranks), *((0, frac) for frac in _LEADS)]
        for p, patience in enumerate(_PATIENCE):
            for steps in range(fewest, fewest + _MORE_STEPS + 1) if menu.lockstep else (1,):
                for lead, frac in leads if steps > 1 else leads[:1]:
                    rule = Rule(kinds=kinds, steps=steps, lead_ranks=lead, lead_frac=frac, patience=patience)
                    found.append((p + (work + steps * fixed) / (work + fixed), len(found), rule))
    return [rule for _, _, rule in sorted(found, key=lambda item: item[:2])]


def _families(menu: Menu, table: Table) -> list[tuple[int, ...]]:
    """Kinds of one strategy if those hold every sequence, and all kinds."""
    usable = [int(k) for k in table.usable()]
    families = [tuple(usable)]
    for strategy in dict.fromkeys(menu.groups[k].strategy for k in usable):
        kinds = tuple(k for k in usable if menu.groups[k].strategy == strategy)
        if kinds not in families and np.isfinite(table.seconds_NK[0, list(kinds)]).any():
            families.append(kinds)
    return families


def place_somehow(menu: Menu, table: Table) -> Placed | None:
    """A placement in as many micro-steps as it takes, whatever its time; None if a sequence fits no kind."""
    target_s = 1e3 * float(np.where(np.isfinite(table.seconds_NK), table.seconds_NK + table.fixed_K, 0.0).sum())
    for steps in range(fewest_steps(menu, table), len(table.tokens_N) + 1) if menu.lockstep else (1,):
        for kinds in _families(menu, table):
            rule = Rule(kinds=kinds, steps=steps, lead_ranks=0, lead_frac=0.0, patience=math.inf)
            placed = place(menu, table, target_s, rule)
            if placed is not None:
                return placed
    return None


def place(menu: Menu, table: Table, target_s: float, rule: Rule) -> Placed | None:
    """A dispatch of at most `target_s` (under lockstep; else about that), or None if best fit finds none."""
    table = table.restricted(rule.kinds)
    limits = _limits(table, target_s, rule)
    if limits is None:
        return None
    seconds_NK, fixed_K, room_K = table.seconds_NK, table.fixed_K, table.room_K
    if not menu.lockstep:
        # Micro-batches follow later: until then they cost by how full they are, and a group holds any number.
        seconds_NK = seconds_NK + fixed_K * (table.tokens_N[:, None] / table.room_K)
        fixed_K, room_K = np.zeros_like(fixed_K), np.full_like(room_K, np.inf)
    # The first sequence of a group is its longest, so its last micro-batch leaves the pipeline no sooner than this.
    drain_NK = (menu.pp - 1) * np.where(np.isfinite(table.seconds_NK), table.seconds_NK + table.fixed_K, 0.0)
    state = _Open(len(fixed_K), [menu.num_ranks] * rule.steps, limits)
    if not _fill(table, limits, rule.patience, seconds_NK, drain_NK + fixed_K, room_K, state):
        return None
    return _placed(menu, table, state, rule.steps)


def _limits(table: Table, target_s: float, rule: Rule) -> list[float] | None:
    """Seconds of every micro-step; None if the rule asks for what the target does not leave."""
    alone = table.seconds_NK[0] + table.fixed_K
    equal, least = target_s / rule.steps, float(alone.min()) * _SLACK
    if rule.lead_ranks:
        least = float(alone[table.ranks_K == rule.lead_ranks].min()) * _SLACK
    spare = target_s - (rule.steps - 1) * float(table.fixed_K.min()) - equal
    first = max(equal + rule.lead_frac * max(spare, 0.0), least)
    if first > target_s or (rule.lead_frac and first == least) or (rule.lead_ranks and least <= equal):
        return None
    rest = (target_s - first) / (rule.steps - 1) if rule.steps > 1 else 0.0
    return [first] + [rest] * (rule.steps - 1)


def _fill(
    table: Table, limits: list[float], patience: float, seconds_NK: Array, opening_NK: Array, room_K: Array,
    state: _Open,
) -> bool:  # fmt: skip
    """Every sequence into `state`, or False at the first that finds no group.

    `opening_NK`: seconds that a group opened by a sequence needs beside those of its sequences.
    """
    usable = table.usable()
    device_NK = (seconds_NK * table.ranks_K)[:, usable]
    order_NK = np.argsort(device_NK, axis=1, kind="stable")
    device, kinds = np.take_along_axis(device_NK, order_NK, axis=1).tolist(), usable[order_NK].tolist()
    ranks, opening, room = [int(r) for r in table.ranks_K], opening_NK.tolist(), room_K.tolist()
    tokens, seconds = table.tokens_N.tolist(), seconds_NK.tolist()
    longest = max(limits)
    for i, (row, cost) in enumerate(zip(kinds, device, strict=True)):
        chosen: tuple[int, int] | None = None
        opened: tuple[int, int] | None = None
        opened_s = math.inf
        for kind, device_s in zip(row, cost, strict=True):
            own = seconds[i][kind]
            if own + opening[i][kind] > longest:
                continue
            if device_s > patience * opened_s:
                break
            at = state.fit(kind, own, tokens[i])
            if at is not None:
                chosen = (kind, at)
                break
            if opened is None:
                step = state.opens(ranks[kind], own + opening[i][kind])
                if step is not None:
                    opened, opened_s = (kind, step), device_s
        if chosen is None:
            if opened is None:
                return False
            kind, step = opened
            chosen = kind, state.open(kind, ranks[kind], step, room[kind], limits[step] - opening[i][kind])
        state.add(*chosen, i, seconds[i][chosen[0]], tokens[i])
    return True


def _placed(menu: Menu, table: Table, state: _Open, steps: int) -> Placed:
    rows: list[list[PlacedGroup]] = [[] for _ in range(steps)]
    for kind, step, held in zip(state.kind, state.step, state.held, strict=True):
        rows[step].append(_group(menu, table, kind, held))
    used = tuple(tuple(row) for row in rows if row)
    return Placed(steps=used, time_s=sum(max(group.time_s for group in row) for row in used))


def _group(menu: Menu, table: Table, kind: int, held: list[int]) -> PlacedGroup:
    """The group with its sequences packed into micro-batches."""
    own, fixed = table.seconds_NK[held, kind], float(table.fixed_K[kind])
    if menu.lockstep:
        return PlacedGroup(kind=kind, parts=(tuple(held),), time_s=float(own.sum()) + fixed)
    tokens, room = table.tokens_N[held], float(table.room_K[kind])
    fewest = max(1, math.ceil(float(tokens.sum()) / room - 1e-9))
    best: PlacedGroup | None = None
    for count in _part_counts(fewest, len(held), menu.pp):
        packed = _pack(own.tolist(), tokens.tolist(), room, count)
        if packed is None:
            continue
        times = [fixed + sum(float(own[i]) for i in part) for part in packed]
        time_s = sum(times) + (menu.pp - 1) * max(times)
        if best is None or time_s < best.time_s:
            best = PlacedGroup(kind=kind, parts=tuple(tuple(held[i] for i in part) for part in packed), time_s=time_s)
    assert best is not None  # one sequence a micro-batch always fits
    return best


def _part_counts(fewest: int, most: int, pp: int) -> list[int]:
    """Numbers of micro-batches to try: the fewest, more for pipelines, and in the end one per sequence."""
    tries = [fewest, fewest + 1, fewest + 2]
    if pp > 1:
        tries += [math.ceil(fewest * f) for f in (1.5, 2, 3, 4, 6, 8, 12, 16)] + [pp, 2 * pp, 4 * pp, 8 * pp]
    return sorted({min(t, most) for t in tries if t >= min(fewest, most)} | {most})[: 40 if pp > 1 else 4]


def _pack(seconds: list[float], tokens: list[int], room: float, count: int) -> list[list[int]] | None:
    """Longest first into the micro-batch with the least time that has room (LPT); None if that leaves one out."""
    parts: list[list[int]] = [[] for _ in range(count)]
    time, left = [0.0] * count, [room] * count
    for i in range(len(seconds)):
        fits = [p for p in range(count) if left[p] >= tokens[i]]
        if not fits:
            return None
        p = min(fits, key=time.__getitem__)
        parts[p].append(i)
        time[p] += seconds[i]
        left[p] -= tokens[i]
    return [part for part in parts if part]
