"""dispatch(menu, lengths): one global batch of real lengths as groups of unequal size over the same data ranks.

Pure. A step is one or more micro-steps; a micro-step cuts the data ranks into groups, each of a kind of the menu
(ulysses x ring, strategy), and every group works through its own micro-batches of packed sequences. Under lockstep
(ZeRO-2/3 collectives in every micro-batch) a group has one micro-batch in a micro-step and the step is the sum of
the slowest groups; otherwise there is one micro-step, groups run their micro-batches on their own, and with pp > 1
a group is a pipeline: sum t_j + (pp - 1) max t_j of its micro-batches (flow shop with equal stages).

Lengths are never rounded. The answer carries a proved lower bound on every dispatch of the menu (placing.bound_s)
and is not slower than the static plan, if one is given. Equal inputs, equal answer, unless time runs out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.costmodel.sequences import Menu
from planner.placing import Placed, Rule, Table, bound_s, place, place_somehow, rules, table_of

IntArray = NDArray[np.int64]
_GROWTH = (1.05, 1.1, 1.2, 1.4, 1.8, 2.6, 4.2, 7.4, 14.0, 28.0)  # of the bound, until a target is met
_HALVINGS = 7  # of the interval between a target that failed and one that held, afterwards


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Ranks [first_rank, first_rank + ranks of its kind) and the sequences of each of its micro-batches."""

    kind: int
    first_rank: int
    micro_batches: tuple[tuple[int, ...], ...]
    time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroStep:
    """Groups side by side; ranks that no group names have nothing to do but take part in collectives."""

    groups: tuple[Group, ...]

    @property
    def time_s(self) -> float:
        """Seconds of the slowest group."""
        return max(group.time_s for group in self.groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """Every sequence of a batch in one group. `step_s` includes what the menu pays once per step.

    `method`: what found it. `lower_bound_s`: no dispatch of this batch over this menu takes less.
    """

    steps: tuple[MicroStep, ...]
    step_s: float
    lower_bound_s: float
    method: str
    search_s: float

    @property
    def gap_frac(self) -> float:
        """How much of the step could at most be saved."""
        return max(0.0, 1 - self.lower_bound_s / self.step_s)


class DoesNotFit(ValueError):
    """A sequence that no group of the menu can hold."""


def checked(menu: Menu, lengths: IntArray) -> None:
    """ValueError for an empty batch or a sequence without tokens; DoesNotFit with the longest that does fit."""
    if not len(lengths):
        raise ValueError("the batch is empty: it needs at least one sequence")
    if int(lengths.min()) < 1:
        at = int(np.flatnonzero(lengths < 1)[0])
        raise ValueError(f"sequence {at} has {int(lengths[at])} tokens; every sequence needs at least 1")
    room = max((group.capacity_tokens for group in menu.groups), default=0.0)
    if int(lengths.max()) > room:
        at = int(lengths.argmax())
        raise DoesNotFit(
            f"sequence {at} has {int(lengths[at]):,} tokens, the longest that fits any group is {int(room):,}: "
            "cut it (--max-seq-len), use more GPUs, or free memory (ZeRO-3, recomputation, offload)"
        )


def dispatch(
    menu: Menu,
    lengths: IntArray,
    *,
    gap_frac: float = 0.01,
    time_limit_s: float = 0.5,
    static_kind: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Dispatch:
    """The best dispatch found: stops at `gap_frac` of the bound or at `time_limit_s`, whichever is first.

    `static_kind`: also try every group of this kind, so that the answer is not slower than the static plan.
    ValueError, DoesNotFit: see `checked`.
    """
    checked(menu, lengths)
    start_s = clock()
    table = table_of(menu, lengths)
    bound = bound_s(menu, table)
    best: Placed | None = None
    method = "best fit"
    if static_kind is not None:
        best, method = homogeneous(menu, table, static_kind), "static"
    end_s = start_s + time_limit_s
    found = _shorten(menu, table, bound, best, gap_frac, lambda: clock() > end_s)
    if found is not best:
        best, method = found, "best fit"
    if best is None:
        raise AssertionError("no dispatch found for a batch whose sequences all fit")
    return _written(menu, table, best, bound, method, clock() - start_s)


def static_dispatch(menu: Menu, lengths: IntArray, kind: int) -> Dispatch | None:
    """Every group of one kind: what a static plan does with the batch. None if a sequence does not fit it."""
    start_s = time.perf_counter()
    checked(menu, lengths)
    if int(lengths.max()) > menu.groups[kind].capacity_tokens:
        return None
    table = table_of(menu, lengths)
    placed = homogeneous(menu, table, kind)
    if placed is None:
        return None
    return _written(menu, table, placed, bound_s(menu, table), "static", time.perf_counter() - start_s)


def placed_dispatch(menu: Menu, lengths: IntArray, change: Callable[[Table], Table]) -> Dispatch:
    """The dispatch under a table that `change` restricts: what a rule of somebody else's would do with the batch.

    `lower_bound_s` is that of the unrestricted batch. ValueError if the restriction leaves a sequence no kind.
    """
    start_s = time.perf_counter()
    checked(menu, lengths)
    table = table_of(menu, lengths)
    only = change(table)
    bound = bound_s(menu, only)
    placed = None if bound == np.inf else _shorten(menu, only, bound, None, 0.002, lambda: False)
    if placed is None:
        raise ValueError("the restriction leaves a sequence no group")
    return _written(menu, table, placed, bound_s(menu, table), "restricted", time.perf_counter() - start_s)


def homogeneous(menu: Menu, table: Table, kind: int) -> Placed | None:
    """The best of balanced packings over groups of `kind` alone; None if a sequence does not fit it."""
    only = table.restricted((kind,))
    bound = bound_s(menu, only)
    return None if bound == np.inf else _shorten(menu, only, bound, None, 0.002, lambda: False)


def _shorten(
    menu: Menu, table: Table, bound: float, best: Placed | None, gap_frac: float, late: Callable[[], bool]
) -> Placed | None:
    """The shortest placement found, `best` if none is shorter.

    Targets grow from the bound until some rule meets one, then halve back towards the last that none met. Once
    there is an answer, it ends when that is within `gap_frac` of the bound or it is late.
    """
    tried = rules(menu, table)
    low, high = bound, np.inf
    for growth in _GROWTH:
        target = bound * growth
        if best is not None and (best.time_s <= max(target, bound / (1 - gap_frac)) or late()):
            break
        found = _first(menu, table, target, tried, late if best is not None else lambda: False)
        if found is not None:
            best, high = _shorter(best, found), target
            break
        low = target
    best = best or place_somehow(menu, table)
    for _ in range(_HALVINGS):
        if best is None or best.time_s <= bound / (1 - gap_frac) or late() or high < low * 1.002:
            break
        target = (low + min(high, best.time_s)) / 2
        found = _first(menu, table, target, tried, late)
        if found is None:
            low = target
        else:
            best, high = _shorter(best, found), target
    return best


def _shorter(best: Placed | None, found: Placed) -> Placed:
    return found if best is None or found.time_s < best.time_s else best


def _first(menu: Menu, table: Table, target: float, tried: list[Rule], late: Callable[[], bool]) -> Placed | None:
    """What the first rule that meets the target makes; it comes first from then on."""
    for at, rule in enumerate(tried):
        placed = place(menu, table, target, rule)
        if placed is not None:
            tried.insert(0, tried.pop(at))
            return placed
        if late():
            return None
    return None


def _written(menu: Menu, table: Table, placed: Placed, bound: float, method: str, search_s: float) -> Dispatch:
    """The placement with ranks: in a micro-step larger groups come first, so that powers of two are aligned."""
    steps = []
    for groups in placed.steps:
        rank, row = 0, []
        for group in sorted(groups, key=lambda g: -menu.groups[g.kind].ranks):
            row.append(
                Group(
                    kind=group.kind,
                    first_rank=rank,
                    micro_batches=tuple(tuple(int(table.order[i]) for i in part) for part in group.parts),
                    time_s=group.time_s,
                )
            )
            rank += menu.groups[group.kind].ranks
        steps.append(MicroStep(groups=tuple(row)))
    return Dispatch(
        steps=tuple(steps), step_s=placed.time_s + menu.step_s, lower_bound_s=bound + menu.step_s, method=method,
        search_s=search_s,
    )  # fmt: skip


def token_weights(dispatched: Dispatch, lengths: IntArray) -> tuple[tuple[float, ...], ...]:
    """By how much each group's mean loss counts, by micro-step: its share of the batch's tokens (sums to 1).

    Gradients weighted so are those of the mean over all tokens, however sequences were dealt (ByteScale, 3.2).
    """
    total = float(lengths.sum())
    return tuple(
        tuple(float(sum(lengths[list(part)].sum() for part in group.micro_batches)) / total for group in step.groups)
        for step in dispatched.steps
    )
