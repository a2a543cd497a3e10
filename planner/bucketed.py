"""search_lengths(...): one model-state layout for a run over a length distribution, and what each bucket does in it.

For every state layout (layouts.py) the dispatcher is run on the same sampled global batches; the expected step is their
mean. The layout with the least lower bound is next: its bound is raised (the quick bounds of its batches,
batch_bounds.bound_s, then relaxations, branching.tight_bound_s), and it is dispatched when nothing is left to raise it
by. The search ends when the least bound meets the incumbent: so the certificate covers every
layout, every kind of group and every dispatch, for these batches; of layouts that there was no time to price only the
model FLOPs are known. No batch is dispatched slower than by the best single kind of its layout (packing.py).
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from planner.batch import IntArray, table_of
from planner.batch_bounds import bound_s
from planner.branching import tight_bound_s
from planner.buckets import Edges, best_edges, bucket_of
from planner.costmodel.graph import ModelGraph
from planner.costmodel.keys import Machine
from planner.costmodel.sequences import DataShape, GroupCost, Menu
from planner.dispatch import Dispatch, dispatch
from planner.layouts import SPARE_FRAC, Layout, ideal_s, priced
from planner.lengths import Lengths
from planner.placing import Placed
from planner.pool import Single, best_single
from planner.space import Limits

_PRICING_FRAC = 0.5  # of the time limit, at most, before something is dispatched
_DISPATCH_FRAC = 0.5  # of the time that is left, for one layout; the rest is for bounds and other layouts
_STEP_LIMIT_S = 0.5  # of the dispatcher, per batch
_PROGRAMS, _ABOVE = 8, 1.1  # relaxations a batch, and how far above the incumbent's share a bound may say something


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthOptions:
    """`batches` are drawn with seeds `seed`, `seed` + 1, ...; buckets: the fewest within `bucket_error_frac`."""

    batches: int = 8
    seed: int = 0
    gap_frac: float = 0.01
    bucket_error_frac: float = 0.1
    most_buckets: int = 16
    memory_margin_frac: float = 0.08
    time_limit_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticPlan:
    """The best plan that runs every batch with groups of one kind which holds the longest sequence."""

    shape: DataShape
    group: GroupCost
    mean_step_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketChoice:
    """What carries most tokens of the bucket (low, high], and how: packs of `pack_tokens` per rank on average."""

    low: int
    high: int
    share_of_sequences: float
    share_of_tokens: float
    group: GroupCost
    share_of_group: float
    pack_tokens: float
    sequences_per_pack: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthResult:
    """The chosen layout with its dispatches. `lower_bound_s`: no layout's expected step is below it."""

    layout: Layout
    batches: tuple[IntArray, ...]
    dispatches: tuple[Dispatch, ...]
    lower_bound_s: float
    edges: Edges
    buckets: tuple[BucketChoice, ...]
    static: StaticPlan | None
    num_layouts: int
    num_solved: int
    stop_reason: str
    search_s: float

    @property
    def step_s(self) -> float:
        """Mean over the batches."""
        return float(np.mean([d.step_s for d in self.dispatches]))

    @property
    def gap_frac(self) -> float:
        """How much of the expected step could at most be saved."""
        return max(0.0, 1 - self.lower_bound_s / self.step_s)


def search_lengths(
    graph: ModelGraph, machine: Machine, lengths: Lengths, tokens_per_step: int, limits: Limits,
    options: LengthOptions, clock: Callable[[], float] = time.perf_counter,
) -> LengthResult:  # fmt: skip
    """The layout with the least expected step. layouts.NothingHolds if the longest length fits none of them."""
    start_s = clock()
    batches = lengths.batches(options.batches, tokens_per_step, options.seed)
    late = _Late(end_s=start_s + _PRICING_FRAC * options.time_limit_s, clock=clock)
    layouts, unpriced = priced(graph, machine, lengths, batches, limits, options.memory_margin_frac, late)
    late = replace(late, end_s=start_s + options.time_limit_s)
    run = _Run(batches=batches, longest=lengths.longest_tokens, options=options, late=late)
    reason = run.over(layouts)
    best = run.best
    assert best is not None
    edges = _edges(best.layout.menu, lengths, options)
    unpriced_s = ideal_s(graph, machine, batches) if unpriced else np.inf
    return LengthResult(
        layout=best.layout, batches=batches, dispatches=best.dispatches,
        lower_bound_s=min(best.step_s, run.bound_s, unpriced_s), edges=edges,
        buckets=_buckets(best, batches, edges), static=run.static, num_layouts=len(layouts) + unpriced,
        num_solved=run.num_solved, stop_reason="time_limit" if unpriced else reason, search_s=clock() - start_s,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Late:
    """Whether the time is over."""

    end_s: float
    clock: Callable[[], float]

    def __call__(self) -> bool:
        return self.clock() >= self.end_s

    def part_s(self, parts: float) -> float:
        """Seconds that are left, divided."""
        return max(self.end_s - self.clock(), 0.0) / parts


@dataclass(frozen=True, slots=True, kw_only=True)
class _Best:
    layout: Layout
    dispatches: tuple[Dispatch, ...]
    step_s: float


@dataclass(slots=True, kw_only=True, order=True)
class _Node:
    """A layout and the best bound on it so far; `level`: how many means have been used to raise it.

    `quick_s`: the batches' bounds, without what is paid once per step, once they are known.
    """

    bound_s: float
    number: int
    layout: Layout = field(compare=False)
    level: int = field(default=0, compare=False)
    dispatched: bool = field(default=False, compare=False)
    quick_s: tuple[float, ...] = field(default=(), compare=False)


@dataclass(slots=True, kw_only=True)
class _Run:
    """Best first over the layouts: the incumbent, the best static plan, and `bound_s` on every layout."""

    batches: tuple[IntArray, ...]
    longest: int
    options: LengthOptions
    late: _Late
    best: _Best | None = None
    static: StaticPlan | None = None
    num_solved: int = 0
    bound_s: float = 0.0

    def over(self, layouts: list[Layout]) -> str:
        """Search them; why it ended."""
        nodes = [_Node(bound_s=layout.lower_bound_s, number=n, layout=layout) for n, layout in enumerate(layouts)]
        heapq.heapify(nodes)
        done: list[_Node] = []
        reason = "exhausted"
        while nodes:
            if self.best is not None and self.late():
                reason = "time_limit"
                break
            if self._met(nodes[0]):
                reason = "gap" if all(map(self._met, done)) else reason
                break
            node = heapq.heappop(nodes)
            if self.late() or not self._raised(node):
                if node.dispatched:
                    done.append(node)
                    continue
                self._dispatch(node.layout)
                node.dispatched = True
            heapq.heappush(nodes, node)
        self.bound_s = min(node.bound_s for node in (*nodes, *done))
        for node in sorted(nodes):
            if self.late() or (self.static is not None and node.layout.lower_bound_s >= self.static.mean_step_s):
                break
            self._best_kind(node.layout)
        return reason

    def _met(self, node: _Node) -> bool:
        return self.best is not None and node.bound_s >= self.best.step_s * (1 - self.options.gap_frac)

    def _raised(self, node: _Node) -> bool:
        """Raise the bound by the next means; False if there is none (relaxations need an incumbent)."""
        kinds, level = node.layout.kinds, node.level
        if level > 1 or (level == 1 and self.best is None):
            return False
        bounds = []
        for number, batch in enumerate(self.batches):
            if self.late():
                return True
            table = table_of(kinds, batch)
            if level == 0:
                bounds.append(bound_s(kinds, table))
            else:
                assert self.best is not None
                upper_s = node.quick_s[number] * max(self.best.step_s / node.bound_s, 1.0) * _ABOVE
                bounds.append(max(node.quick_s[number], tight_bound_s(kinds, table, upper_s, _PROGRAMS)))
        node.level += 1
        node.quick_s = tuple(bounds)
        node.bound_s = max(node.bound_s, float(np.mean(bounds)) / (1 + SPARE_FRAC) + kinds.step_s)
        return True

    def _dispatch(self, layout: Layout) -> None:
        """Every batch dispatched, each in an equal part of the layout's time, and no more than a batch needs.

        The layout's best single kind joins the menu, and no dispatch is slower than its.
        """
        self.num_solved += 1
        menu, found = layout.menu, []
        starts: tuple[Placed | None, ...] = (None,) * len(self.batches)
        single = self._best_kind(layout)
        if single is not None:
            menu, starts = single.joined(menu)
        until = replace(self.late, end_s=self.late.clock() + self.late.part_s(1 / _DISPATCH_FRAC))
        for number, (batch, start) in enumerate(zip(self.batches, starts, strict=True)):
            limit_s = min(_STEP_LIMIT_S, until.part_s(len(self.batches) - number))
            found.append(
                dispatch(
                    menu, batch, gap_frac=self.options.gap_frac / 2, time_limit_s=limit_s, start=start,
                    clock=self.late.clock,
                )
            )  # fmt: skip
        mean_s = float(np.mean([d.step_s for d in found]))
        if self.best is None or mean_s < self.best.step_s:
            self.best = _Best(layout=replace(layout, menu=menu), dispatches=tuple(found), step_s=mean_s)

    def _best_kind(self, layout: Layout) -> Single | None:
        """The kind that does best alone, None if none holds the longest length; `static` is kept up to date."""
        found = best_single(layout.kinds, self.batches, self.longest, self.late)
        if found is not None and (self.static is None or found.mean_s < self.static.mean_step_s):
            self.static = StaticPlan(shape=layout.shape, group=found.group, mean_step_s=found.mean_s)
        return found


# ---- buckets


def _edges(found: Menu, lengths: Lengths, options: LengthOptions) -> Edges:
    """Edges by the device time of a sequence in its cheapest kind that holds it."""
    tokens = lengths.tokens_N
    cost = np.full(len(tokens), np.inf)
    for group in found.groups:
        device = group.sequence_s(tokens) * group.ranks
        cost = np.where(tokens <= group.capacity_tokens, np.minimum(cost, device), cost)
    return best_edges(lengths, np.maximum.accumulate(cost), options.bucket_error_frac, options.most_buckets)


def _buckets(best: _Best, batches: tuple[IntArray, ...], edges: Edges) -> tuple[BucketChoice, ...]:
    groups, size = best.layout.menu.groups, len(edges.tokens)
    tokens, packs, packed = (np.zeros((size, len(groups))) for _ in range(3))
    count = np.zeros((size, len(groups)))
    for batch, dispatched in zip(batches, best.dispatches, strict=True):
        where = bucket_of(edges, batch)
        for group in (g for step in dispatched.steps for g in step.groups):
            for part in group.micro_batches:
                held = batch[list(part)]
                inside = np.bincount(where[list(part)], weights=held, minlength=size)
                tokens[:, group.kind] += inside
                count[:, group.kind] += np.bincount(where[list(part)], minlength=size)
                packs[:, group.kind] += inside * (held.sum() / groups[group.kind].ranks)
                packed[:, group.kind] += inside * len(part)
    found = []
    for b, high in enumerate(edges.tokens):
        total = float(tokens[b].sum())
        if total == 0:  # no batch had a sequence of this bucket
            continue
        k = int(tokens[b].argmax())
        found.append(
            BucketChoice(
                low=edges.tokens[b - 1] if b else 0, high=high, share_of_sequences=float(count[b].sum() / count.sum()),
                share_of_tokens=total / float(tokens.sum()), group=groups[k],
                share_of_group=float(tokens[b, k]) / total, pack_tokens=float(packs[b, k] / tokens[b, k]),
                sequences_per_pack=float(packed[b, k] / tokens[b, k]),
            )
        )  # fmt: skip
    return tuple(found)
