"""dispatch(menu, lengths): one global batch of real lengths as groups of unequal size over the same data ranks.

Pure. A step is one or more micro-steps; a micro-step cuts the data ranks into groups, each of a kind of the menu
(ulysses x ring, strategy), and every group works through its own micro-batches of packed sequences. Under lockstep
(ZeRO-2/3 collectives in every micro-batch) a group has one micro-batch in a micro-step and the step is the sum of
the slowest groups; otherwise there is one micro-step, groups run their micro-batches on their own. With pp > 1 a group,
in lockstep all of them together, is a pipeline: sum t_j + (pp - 1) max t_j of its micro-batches (flow shop with equal
stages), which 1F1B does not exceed when they go longest first, as they do here.

Lengths are never rounded. The answer carries a proved lower bound on every dispatch of the menu (branching.py)
and starts from the best single kind (packing.py), so it is not slower than the static plan. Equal inputs, equal answer,
unless time runs out.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from planner.batch import IntArray, Table, fewest_steps, table_of
from planner.batch_bounds import bound_s
from planner.branching import Guide, Tree
from planner.costmodel.sequences import Menu
from planner.descent import Descents
from planner.filling import filled
from planner.packing import best_packed, packed
from planner.placing import BestFit, Placed, Way
from planner.rounding import whole_groups

_GROWTH = (1.05, 1.12, 1.2, 1.4, 1.8, 3.0, 7.0, 28.0)  # of the bound, until a first target is met
_FIRST_STEPS, _LEADS = 7, (1.0, 1.5, 3.0)  # micro-steps from the fewest on, and how much longer the first lasts
_LONGER = (0.004, 0.01, 0.02, 0.035, 0.06, 0.1, 0.17, 0.28, 0.45)  # than relaxed, targets
_LONGER_FIRST, _TRIES = (0.03, 0.1, 0.3), 2  # of a new guide, and targets of all after each relaxation
_LONGER_WHOLE, _ALIKE_WHOLE = (0.004, 0.012, 0.025, 0.05), 1  # kinds of each number of ranks beside those used
_RULE_GAP_FRAC = 0.002  # of its bound, where a rule of somebody else's stops
_RELAXATIONS, _ALL_FOLLOWED = 96, 8  # at most, and the first of them that best fit follows all
_PROMISING = 1.02  # times the bound, at most, of a single micro-step for which whole groups are looked for
_SHORTER = 0.998  # times the shortest placement, at most, that whole groups are looked for
_GROWN = 1.12  # times the shortest placement, at most, where micro-steps grow
_CHANGES = 60  # of a placement, tried after each relaxation
_RESERVE_FRAC = 0.1  # of the time, for what no look at the clock interrupts
_WHOLE_FRAC = 0.7  # of the time, after which no program for whole groups begins
_SINGLE_FRAC = 0.05  # of the time, at most, for groups of a single kind
_STRATEGIES = 2  # of those that a relaxation uses, tried with all of their kinds


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Late:
    """Whether a part of the time is over."""

    clock: Callable[[], float]
    start_s: float
    limit_s: float

    def __call__(self, part: float = 1 - _RESERVE_FRAC) -> bool:
        return self.clock() > self.start_s + part * self.limit_s


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
    start: Placed | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Dispatch:
    """The best dispatch found: stops at `gap_frac` of the bound or at `time_limit_s`, whichever is first.

    `static_kind`: looked at first, so that the answer is not slower than the static plan however short the time;
    `start`: a placement that is known instead.
    ValueError, DoesNotFit: see `checked`.
    """
    checked(menu, lengths)
    start_s = clock()
    table, late = table_of(menu, lengths), _Late(clock=clock, start_s=start_s, limit_s=time_limit_s)
    if start is None and static_kind is not None:
        start = packed(menu, table, static_kind)
    best = best_packed(menu, table, lambda: late(_SINGLE_FRAC), start)
    method = "one kind"
    found, bound = _shorten(menu, table, best, gap_frac, late)
    if found is not best:
        best, method = found, "best fit"
    if best is None:
        raise AssertionError("no dispatch found for a batch whose sequences all fit")
    return _written(menu, table, best, bound, method, clock() - start_s)


def static_dispatch(menu: Menu, lengths: IntArray, kind: int) -> Dispatch | None:
    """Every group of one kind: what a static plan does with the batch. None if a sequence does not fit it."""
    start_s = time.perf_counter()
    checked(menu, lengths)
    table = table_of(menu, lengths)
    placed = packed(menu, table, kind)
    if placed is None:
        return None
    return _written(menu, table, placed, bound_s(menu, table), "static", time.perf_counter() - start_s)


def placed_dispatch(
    menu: Menu,
    lengths: IntArray,
    change: Callable[[Table], Table],
    *,
    time_limit_s: float = 0.5,
    clock: Callable[[], float] = time.perf_counter,
) -> Dispatch:
    """The dispatch under a table that `change` restricts: what a rule of somebody else's would do with the batch.

    `lower_bound_s` is that of the unrestricted batch. ValueError if the restriction leaves a sequence no kind.
    """
    checked(menu, lengths)
    start_s = clock()
    table, late = table_of(menu, lengths), _Late(clock=clock, start_s=start_s, limit_s=time_limit_s)
    placed, _ = _shorten(menu, change(table), None, _RULE_GAP_FRAC, late)
    if placed is None:
        raise ValueError("the restriction leaves a sequence no group")
    return _written(menu, table, placed, bound_s(menu, table), "restricted", clock() - start_s)


def _shorten(
    menu: Menu, table: Table, start: Placed | None, gap_frac: float, late: _Late
) -> tuple[Placed | None, float]:
    """The shortest placement found, `start` if none is shorter, and a bound on all of them.

    Relaxations (branching.py) say how long micro-steps would last and which kinds they would use. A single one is made
    by whole groups (rounding.py) and by best fit, a little longer each time, the shortest target first; several in
    lockstep by best fit too, and from there and from micro-steps that grow by descent (descent.py). Later on every
    second relaxation only raises the bound, as does one whose micro-steps last like those of another before. It ends
    when the answer is within `gap_frac` of the bound, nothing is left to try, or, once there is an answer, it is late.
    """
    tree, fit = Tree(menu, table), BestFit(menu, table)
    descents = Descents(fit)
    found = start or _first_placed(fit, tree.bound_s)
    if found is None:
        return None, tree.bound_s
    best = found
    tries: list[_Try] = []
    followed: set[tuple[int, ...]] = set()
    single: list[Guide] = []  # those of a single micro-step whose whole groups were not looked for yet
    relaxations = iter(range(_RELAXATIONS))

    def open_(placed: Placed) -> bool:
        return placed.time_s > tree.bound_s / (1 - gap_frac) and not late()

    while open_(best):
        number = next(relaxations, _RELAXATIONS)
        guide = tree.expand(best.time_s) if number < _RELAXATIONS else None
        if guide is not None and (number < _ALL_FOLLOWED or number % 2) and guide.alike not in followed:
            followed.add(guide.alike)
            best = _quickly(fit, guide, best, late)
            if len(guide.lasts_s) == 1:
                single.append(guide)
                target = guide.time_s * (1 + _LONGER[0])
                heapq.heappush(tries, _Try(target_s=target, number=next(tree.number), guide=guide))
            if menu.lockstep:
                used = guide.relaxed.kinds[: len(guide.relaxed.groups)]
                best = descents.grow([menu.groups[k].strategy for k in used], _GROWN, best)
        while single and not tree.roots(best.time_s):
            best = _in_whole_groups(fit, tree, single.pop(), best, late)
        for _ in range(_TRIES):
            if tries and open_(best):
                best = _follow(fit, tries, best, tree.bound_s / (1 - gap_frac), late)
        if menu.lockstep and open_(best):
            best = descents.more(best, _CHANGES, late)
        if guide is None and not tries and (not menu.lockstep or descents.ended):
            break
    return best, min(tree.bound_s, best.time_s)


def _quickly(fit: BestFit, guide: Guide, best: Placed, late: Callable[[], bool]) -> Placed:
    """What best fit without patience makes of a new guide, at few targets: an answer early on."""
    families = list(dict.fromkeys(way.kinds for way in _ways(fit.menu, guide)))
    for longer in _LONGER_FIRST:
        target = guide.time_s * (1 + longer)
        for kinds in families:
            if target >= best.time_s or late():
                return best
            limits = tuple(last * (1 + longer) for last in guide.lasts_s)
            found = fit.place(limits, Way(kinds=kinds, patience=np.inf), late)
            if found is not None:
                return found if found.time_s < best.time_s else best
    return best


def _in_whole_groups(fit: BestFit, tree: Tree, guide: Guide, best: Placed, late: _Late) -> Placed:
    """What the guide's groups in whole numbers make, in the shortest micro-step that has such groups, and longer ones.

    Only of a guide that may be among the shortest.
    """
    if guide.relaxed.bound_s > _PROMISING * tree.bound_s:
        return best
    least_s = max(guide.time_s, guide.relaxed.bound_s, tree.bound_s)
    for longer in _LONGER_WHOLE:
        target = least_s * (1 + longer)
        if target >= _SHORTER * best.time_s or late(_WHOLE_FRAC):
            break
        limits = tuple(last * target / guide.time_s for last in guide.lasts_s)
        whole = whole_groups(fit.menu, fit.table, tree.points, limits, _whole_kinds(fit.menu, guide))
        if whole is not None:
            found = filled(fit, tree.points, whole, late)
            best = found if found is not None and found.time_s < best.time_s else best
    return best


def _whole_kinds(menu: Menu, guide: Guide) -> tuple[int, ...]:
    """The kinds that the relaxation uses, and the cheapest others of each number of ranks."""
    kinds, used = guide.relaxed.kinds, len(guide.relaxed.groups)
    found, alike = list(kinds[:used]), Counter[int]()
    for k in kinds[used:]:
        alike[menu.groups[k].ranks] += 1
        if alike[menu.groups[k].ranks] <= _ALIKE_WHOLE:
            found.append(k)
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class _Try:
    """The next target for a guide; `level`: of `_LONGER`."""

    target_s: float
    number: int
    guide: Guide = field(compare=False)
    level: int = field(default=0, compare=False)


def _follow(fit: BestFit, tries: list[_Try], best: Placed, goal_s: float, late: Callable[[], bool]) -> Placed:
    """Best fit for the shortest target; a guide that fails is tried longer later on, others are done with."""
    now = heapq.heappop(tries)
    if now.target_s >= best.time_s:
        return best
    found = _first(fit, now.guide, now.target_s, late)
    if found is None:
        if now.level + 1 < len(_LONGER):
            target = now.guide.time_s * (1 + _LONGER[now.level + 1])
            heapq.heappush(tries, _Try(target_s=target, number=now.number, guide=now.guide, level=now.level + 1))
        return best
    best = found if found.time_s < best.time_s else best
    if best.time_s > goal_s and now.level:
        between = now.guide.time_s * (1 + (_LONGER[now.level - 1] + _LONGER[now.level]) / 2)
        found = _first(fit, now.guide, between, late)
    return found if found is not None and found.time_s < best.time_s else best


def _first_placed(fit: BestFit, bound_s: float) -> Placed | None:
    """Some placement near the bound: equal micro-steps, or a longer one first; None if a sequence fits no kind."""
    if bound_s == np.inf:
        return None
    fewest = fewest_steps(fit.menu, fit.table)
    families = _same_strategy(fit.menu, tuple(fit.table.usable().tolist()))
    shapes = [(1, 1.0)]
    if fit.menu.lockstep:
        steps = range(fewest, fewest + _FIRST_STEPS)
        shapes = [(n, lead) for n in steps for lead in (_LEADS if n > 1 else _LEADS[:1])]
    for growth in _GROWTH:
        for n, lead in shapes:
            last = bound_s * growth / (n - 1 + lead * fit.menu.longest_counts)
            for kinds in families:
                placed = fit.place((last * lead, *([last] * (n - 1))), Way(kinds=kinds, patience=np.inf))
                if placed is not None:
                    return placed
    return fit.anyhow()


def _same_strategy(menu: Menu, kinds: tuple[int, ...]) -> list[tuple[int, ...]]:
    """`kinds` by their strategy, in the order in which strategies first occur."""
    strategies = dict.fromkeys(menu.groups[k].strategy for k in kinds)
    return [tuple(k for k in kinds if menu.groups[k].strategy == strategy) for strategy in strategies]


def _ways(menu: Menu, guide: Guide) -> list[Way]:
    """The kinds that the relaxation uses, those and the next cheapest, and all of each strategy that it uses."""
    kinds, used = guide.relaxed.kinds, len(guide.relaxed.groups)
    if len(kinds) == 1:
        return [Way(kinds=kinds, patience=np.inf)]
    lead = {menu.groups[k].strategy for k in kinds[:used]}
    whole = [f for f in _same_strategy(menu, kinds) if menu.groups[f[0]].strategy in lead][:_STRATEGIES]
    found = [(kinds[:used], np.inf), *((f, np.inf) for f in whole), (kinds[: used + 3], np.inf)]
    found += [(f, 1.0) for f in whole]
    return [Way(kinds=family, patience=patience) for family, patience in dict.fromkeys(found)]


def _first(fit: BestFit, guide: Guide, target_s: float, late: Callable[[], bool]) -> Placed | None:
    """What the first way that meets the target makes, micro-steps lasting in the guide's proportion."""
    limits = tuple(last * target_s / guide.time_s for last in guide.lasts_s)
    for way in _ways(fit.menu, guide):
        placed = fit.place(limits, way, late)
        if placed is not None or late():
            return placed
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
