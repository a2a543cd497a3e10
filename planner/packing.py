"""A batch over groups of one kind, as a system with a single degree would pack it; and the kind that does best.

Greedy rules, each for several numbers of micro-steps, and the best of them (no solver, milliseconds):

- LPT (Graham 1969): longest first into the least busy of all groups with room; the busiest groups then share a
  micro-step, which is the least sum of slowest groups that these groups allow;
- step by step: the longest sequences first, a micro-step as long as its longest sequence or its share of what is
  left, whichever is longer, a little more each time;
- best fit by tokens, where memory is so tight that the others leave a sequence out.

Groups on their own have one micro-step: LPT, and micro-batches inside each group (placing.py).
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count

import numpy as np

from planner.batch import Table
from planner.batch_bounds import pipeline_s
from planner.costmodel.keys import Array
from planner.costmodel.sequences import Menu
from planner.placing import Placed, fill, part_counts, placed, placed_group

_MORE_STEPS = 3  # than the fewest in which the batch is packed
_LONGER = (0.0, 0.01, 0.03, 0.08)  # than a micro-step's share


@dataclass(frozen=True, slots=True, kw_only=True)
class _Items:
    """Sequences, longest first: seconds in the kind, tokens; `num_groups` side by side, each with `room` tokens.

    `longest_counts`: of micro-steps (Menu.longest_counts).
    """

    seconds: list[float]
    tokens: list[int]
    num_groups: int
    room: float
    fixed_s: float
    longest_counts: int

    def least_s(self, steps: int) -> float:
        """What so many micro-steps cannot beat."""
        total = max(sum(self.seconds) / self.num_groups, self.seconds[0]) + steps * self.fixed_s
        return total + (self.longest_counts - 1) * max(self.seconds[0] + self.fixed_s, total / steps)


def single_bounds_s(menu: Menu, table: Table) -> Array:
    """(K,): what groups of one kind alone cannot beat, and come close to; inf if a sequence does not fit them."""
    side = menu.num_ranks // table.ranks_K
    work, longest = table.seconds_NK.sum(axis=0) / side, table.seconds_NK.max(axis=0)
    filled = float(table.tokens_N.sum()) / (table.room_K * side)
    steps = np.maximum(1.0, np.ceil(filled - 1e-9)) if menu.lockstep else 1.0
    waits = steps if menu.lockstep else filled
    total = np.maximum(work + table.fixed_K * waits, longest + table.fixed_K * steps)
    if menu.pp == 1:
        return np.asarray(total)
    tail = longest + table.fixed_K  # without lockstep that of the group with the longest, which may not be the busiest
    total = total + (menu.pp - 1) * tail if menu.lockstep else np.maximum(total, menu.pp * tail)
    piped = [pipeline_s(w, f, menu.pp) for w, f in zip(work.tolist(), table.fixed_K.tolist(), strict=True)]
    return np.asarray(np.maximum(total, piped))


def best_packed(
    menu: Menu, table: Table, late: Callable[[], bool] = lambda: False, best: Placed | None = None
) -> Placed | None:
    """The shortest packing over one kind, or `best` if none is shorter. None if no kind holds every sequence.

    Kinds are packed in the order of their bounds, until that is above the best; once there is one, until it is late.
    """
    bounds = single_bounds_s(menu, table)
    for kind in np.argsort(bounds, kind="stable").tolist():
        if not np.isfinite(bounds[kind]) or (best is not None and (bounds[kind] >= best.time_s or late())):
            break
        found = packed(menu, table, kind)
        if found is not None and (best is None or found.time_s < best.time_s):
            best = found
    return best


def packed(menu: Menu, table: Table, kind: int) -> Placed | None:
    """The best of the packings over groups of `kind`; None if a sequence does not fit the kind."""
    own = table.seconds_NK[:, kind]
    if not np.isfinite(own).all():
        return None
    room, fixed = float(table.room_K[kind]), float(table.fixed_K[kind])
    groups = int(menu.num_ranks // table.ranks_K[kind])
    if not menu.lockstep:
        own = own + fixed * table.tokens_N / room  # micro-batches cost by how much of them is taken
    items = _Items(
        seconds=own.tolist(), tokens=table.tokens_N.tolist(), num_groups=groups, room=room, fixed_s=fixed,
        longest_counts=menu.longest_counts,
    )  # fmt: skip
    if not menu.lockstep:
        parts = _lpt(items, groups, math.inf)
        assert parts is not None
        return _placed(menu, table, kind, [parts])
    best: Placed | None = None
    fewest = max(1, math.ceil(sum(items.tokens) / (groups * room) - 1e-9))
    tries: Sequence[int] = range(fewest, fewest + _MORE_STEPS + 1)
    if menu.pp > 1:  # more micro-steps shorten the tail
        tries = part_counts(fewest, len(items.tokens), menu.pp)
    for steps in chain(tries, count(tries[-1] + 1)):
        if best is not None and steps > tries[-1]:
            break
        if best is not None and items.least_s(steps) >= best.time_s:
            continue
        for found in _in_steps(items, steps):
            new = _placed(menu, table, kind, found)
            best = new if best is None or new.time_s < best.time_s else best
    return best


def _in_steps(items: _Items, steps: int) -> Iterator[list[list[list[int]]]]:
    """Micro-steps of groups of sequences, at most `steps`, by each rule that leaves no sequence out."""
    parts = _lpt(items, steps * items.num_groups, items.room)
    if parts is not None:
        yield _chopped(items, parts)
    some = parts is not None
    for longer in _LONGER if steps > 1 else ():
        found = _step_by_step(items, steps, 1 + longer)
        if found is not None:
            some = True
            yield found
    if not some:
        parts = _best_fit(items, steps * items.num_groups)
        if parts is not None:
            yield _chopped(items, parts)


def _lpt(items: _Items, count: int, room: float) -> list[list[int]] | None:
    """Into `count` parts, the least busy with room each time; None if one has no room."""
    parts, left = fill(items.seconds, items.tokens, range(len(items.tokens)), count, room)
    return None if left else parts


def _chopped(items: _Items, parts: list[list[int]]) -> list[list[list[int]]]:
    """Parts as micro-steps: the busiest together."""
    parts = sorted((part for part in parts if part), key=lambda part: -sum(items.seconds[i] for i in part))
    return [parts[at : at + items.num_groups] for at in range(0, len(parts), items.num_groups)]


def _step_by_step(items: _Items, steps: int, longer: float) -> list[list[list[int]]] | None:
    """One micro-step after the other; None if the last leaves a sequence out."""
    left, found = list(range(len(items.tokens))), []
    for step in range(steps):
        if not left:
            break
        share = sum(items.seconds[i] for i in left) / ((steps - step) * items.num_groups)
        limit = max(items.seconds[left[0]], share * longer) if step < steps - 1 else math.inf
        parts, left = fill(items.seconds, items.tokens, left, items.num_groups, items.room, limit)
        found.append([part for part in parts if part])
    return None if left else found


def _best_fit(items: _Items, count: int) -> list[list[int]] | None:
    """Into at most `count` parts, the fullest with room each time; None if one has no room."""
    parts: list[list[int]] = []
    free: list[tuple[float, int]] = []
    for i, tokens in enumerate(items.tokens):
        at = bisect_left(free, (tokens, -1))
        if at == len(free):
            if len(parts) == count:
                return None
            free.append((items.room, len(parts)))
            parts.append([])
            at = len(free) - 1
        spare, p = free.pop(at)
        parts[p].append(i)
        insort(free, (spare - tokens, p))
    return parts


def _placed(menu: Menu, table: Table, kind: int, steps: list[list[list[int]]]) -> Placed:
    return placed(menu, ((placed_group(menu, table, kind, part) for part in step if part) for step in steps))
