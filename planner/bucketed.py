"""search_lengths(...): one model-state layout for a run over a length distribution, and what each bucket does in it.

For every state layout the dispatcher is run on the same sampled global batches; the expected step is their mean.
Layouts are taken in the order of a lower bound (the mean of the batches' quick bounds, batch_bounds.bound_s), which
relaxations raise before a layout is dispatched (branching.tight_bound_s), and the search ends when the next bound
meets the incumbent: so the certificate covers every layout, every kind of group and every dispatch, for these batches.
Declared space: tp x pp x ZeRO stage (1F1B, as many layers on every stage; sequence and
vocabulary parallel with tp wherever they divide; states sharded over all data ranks), degrees that are powers of
two, the same strategy for all layers of a group. Shapes: B batches, K kinds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from planner.batch import IntArray, fewest_steps, table_of
from planner.batch_bounds import bound_s
from planner.branching import tight_bound_s
from planner.buckets import Edges, best_edges, bucket_of
from planner.costmodel.estimate import model_facts
from planner.costmodel.graph import ModelGraph
from planner.costmodel.keys import Machine
from planner.costmodel.sequences import DataShape, GroupCost, Menu, core, menu, without_dominated
from planner.dispatch import Dispatch, dispatch, static_dispatch
from planner.lengths import Lengths
from planner.space import Limits, enumerate_cells, strategy_uses

_SPARE_FRAC = 0.01  # kinds within this of a better one are left out; bounds give up as much
_STATICS = 3  # kinds tried for the static plan of a layout, by a bound
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """A state layout, the kinds that are dispatched to, all kinds, and the bound on its expected step over them.

    `quick_bounds_s`: of every batch, without what is paid once per step.
    """

    shape: DataShape
    menu: Menu
    kinds: Menu
    quick_bounds_s: tuple[float, ...]
    lower_bound_s: float


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


class NothingHolds(ValueError):
    """No layout holds the longest sequence; `longest_tokens` is what the best does, 0 if states alone do not fit."""

    def __init__(self, longest_tokens: int) -> None:
        super().__init__(f"longest sequence that fits any layout: {longest_tokens:,} tokens")
        self.longest_tokens = longest_tokens


def search_lengths(
    graph: ModelGraph, machine: Machine, lengths: Lengths, tokens_per_step: int, limits: Limits,
    options: LengthOptions, clock: Callable[[], float] = time.perf_counter,
) -> LengthResult:  # fmt: skip
    """The layout with the least expected step. NothingHolds if the longest length fits none of them."""
    start_s = clock()
    end_s = start_s + options.time_limit_s
    batches = lengths.batches(options.batches, tokens_per_step, options.seed)
    layouts = _layouts(graph, machine, lengths, batches, limits, options)
    bounds = {layout: layout.lower_bound_s for layout in layouts}
    best: _Best | None = None
    static: StaticPlan | None = None
    reason, solved = "exhausted", 0
    for layout in layouts:
        if best is not None and clock() >= end_s:
            reason = "time_limit"
            break
        if best is not None and layout.lower_bound_s >= best.step_s * (1 - options.gap_frac):
            reason = "gap"
            break
        if best is not None:
            bounds[layout] = _tightened(layout, batches, best.step_s, end_s, clock)
            if bounds[layout] >= best.step_s * (1 - options.gap_frac):
                continue
        solved += 1
        found = _dispatched(layout, batches, options.gap_frac / 2, end_s, clock)
        mean_s = float(np.mean([d.step_s for d in found]))
        if best is None or mean_s < best.step_s:
            best = _Best(layout=layout, dispatches=found, step_s=mean_s)
        static = _static(layout, batches, lengths.longest_tokens, static, lambda: clock() >= end_s)
    assert best is not None
    bounds[best.layout] = max(bounds[best.layout], _tightened(best.layout, batches, best.step_s, end_s, clock))
    edges = _edges(best.layout.menu, lengths, options)
    return LengthResult(
        layout=best.layout, batches=batches, dispatches=best.dispatches,
        lower_bound_s=min(best.step_s, *bounds.values()), edges=edges,
        buckets=_buckets(best, batches, edges), static=static, num_layouts=len(layouts), num_solved=solved,
        stop_reason=reason, search_s=clock() - start_s,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Best:
    layout: Layout
    dispatches: tuple[Dispatch, ...]
    step_s: float


def _dispatched(
    layout: Layout, batches: tuple[IntArray, ...], gap_frac: float, end_s: float, clock: Callable[[], float]
) -> tuple[Dispatch, ...]:
    """Every batch dispatched, each in an equal part of the time that is left, and no more than a batch needs."""
    found = []
    for number, batch in enumerate(batches):
        limit_s = min(_STEP_LIMIT_S, max(end_s - clock(), 0.0) / (len(batches) - number))
        found.append(dispatch(layout.menu, batch, gap_frac=gap_frac, time_limit_s=limit_s, clock=clock))
    return tuple(found)


def _tightened(
    layout: Layout, batches: tuple[IntArray, ...], best_s: float, end_s: float, clock: Callable[[], float]
) -> float:
    """The layout's bound after a few relaxations of each batch over all its kinds, as far as time goes."""
    kinds = layout.kinds
    bounds = []
    for batch, quick_s in zip(batches, layout.quick_bounds_s, strict=True):
        programs = _PROGRAMS if clock() < end_s else 0
        upper_s = quick_s * max(best_s / layout.lower_bound_s, 1.0) * _ABOVE
        bounds.append(max(quick_s, tight_bound_s(kinds, table_of(kinds, batch), upper_s, programs)))
    return float(np.mean(bounds)) / (1 + _SPARE_FRAC) + kinds.step_s


# ---- layouts


def _layouts(
    graph: ModelGraph, machine: Machine, lengths: Lengths, batches: tuple[IntArray, ...], limits: Limits,
    options: LengthOptions,
) -> list[Layout]:  # fmt: skip
    """Every layout that holds the longest length, least bound first."""
    facts = model_facts(graph, machine.engine)
    usable = machine.cluster.device.memory_bytes.value * (1 - options.memory_margin_frac)
    tokens = float(np.mean([batch.sum() for batch in batches]))
    longest = max(lengths.longest_tokens, max(int(batch.max()) for batch in batches))
    found, held = [], 0.0
    for shape, degrees in shapes_of(graph, machine.num_gpus, limits):
        full = menu(graph, facts, machine, shape, degrees, longest, tokens, usable)
        kinds = without_dominated(_allowed(full, limits), _SPARE_FRAC)
        room = max((g.capacity_tokens for g in kinds.groups), default=0.0)
        held = max(held, room)
        if room < longest:
            continue
        quick = tuple(bound_s(kinds, table_of(kinds, batch)) for batch in batches)
        bound = float(np.mean(quick)) / (1 + _SPARE_FRAC)
        small = core(kinds, lengths.mean_tokens)
        if max(g.capacity_tokens for g in small.groups) < longest:
            small = kinds
        found.append(
            Layout(
                shape=shape, menu=small, kinds=kinds, quick_bounds_s=quick, lower_bound_s=bound + kinds.step_s
            )
        )  # fmt: skip
    if not found:
        raise NothingHolds(int(held))
    return sorted(found, key=lambda layout: layout.lower_bound_s)


def _allowed(found: Menu, limits: Limits) -> Menu:
    def fits(group: GroupCost) -> bool:
        strategy = group.strategy
        return (
            limits.allows("recompute", strategy.recompute)
            and limits.allows("offload_activations", int(strategy.offload_activations))
            and not strategy_uses(strategy) & limits.forbidden
            and not any(names <= strategy_uses(strategy) for names in limits.combinations)
        )

    groups = tuple(group for group in found.groups if fits(group))
    return Menu(groups=groups, num_ranks=found.num_ranks, lockstep=found.lockstep, pp=found.pp, step_s=found.step_s)


def shapes_of(
    graph: ModelGraph, num_gpus: int, limits: Limits
) -> list[tuple[DataShape, tuple[tuple[int, int], ...]]]:  # fmt: skip
    """(state layout, (ulysses, ring) of its groups) of the declared space under `limits`."""
    own: dict[str, int | str] = {"micro_batch_size": 1, "vpp": 1, "schedule": "1f1b", "ep": 1}
    cells = enumerate_cells(
        graph, num_gpus, num_gpus, Limits(fixed={**limits.fixed, **own}, forbidden=limits.forbidden)
    )
    groups: dict[tuple[int, int, int, int], set[tuple[int, int]]] = {}
    columns = (cells.tp, cells.sp, cells.vocab_parallel, cells.pp, cells.ulysses, cells.ring)
    for tp, sp, vocab, pp, ulysses, ring in zip(*(c.tolist() for c in columns), strict=True):
        degree = ulysses * ring
        if graph.num_layers % pp == 0 and degree & (degree - 1) == 0:
            groups.setdefault((tp, pp, sp, vocab), set()).add((ulysses, ring))
    widest = {key[:2]: max(k[2:] for k in groups if k[:2] == key[:2]) for key in groups}
    found = []
    for (tp, pp, sp, vocab), pairs in sorted(groups.items()):
        if widest[tp, pp] != (sp, vocab):
            continue
        for zero in (0, 1, 3):
            sharded = num_gpus // (tp * pp) > 1
            if (zero > 0) != sharded or zero not in limits.zero_stages or not limits.allows("zero", zero):
                continue
            shape = DataShape(
                tp=tp, sequence_parallel=bool(sp), vocab_parallel=bool(vocab), pp=pp, zero_stage=zero,
                offload_optimizer=limits.fixed.get("offload_optimizer", 0) == 1,
            )  # fmt: skip
            found.append((shape, tuple(sorted(pairs))))
    return found


# ---- static plan and buckets


def _static(
    layout: Layout, batches: tuple[IntArray, ...], longest: int, best: StaticPlan | None, late: Callable[[], bool]
) -> StaticPlan | None:
    """The best static plan of the layout, or `best` if that is no slower; kinds by a bound, a few of them run.

    Once there is one, it ends when it is late.
    """
    menu_ = layout.menu
    tables = [table_of(menu_, batch) for batch in batches]

    def least_s(kind: int) -> float:
        group = menu_.groups[kind]
        means = []
        for table in tables:
            only = table.restricted((kind,))
            work = float(table.seconds_NK[:, kind].sum()) * group.ranks / menu_.num_ranks
            means.append(work + group.fixed_s * fewest_steps(menu_, only))
        return float(np.mean(means)) + menu_.step_s

    holds = [k for k, group in enumerate(menu_.groups) if group.capacity_tokens >= longest]
    for bound, kind in sorted((least_s(kind), kind) for kind in holds)[:_STATICS]:
        if best is not None and (bound >= best.mean_step_s or late()):
            break
        found = [static_dispatch(menu_, batch, kind) for batch in batches]
        if any(d is None for d in found):
            continue
        mean_s = float(np.mean([d.step_s for d in found if d is not None]))
        if best is None or mean_s < best.mean_step_s:
            best = StaticPlan(shape=layout.shape, group=menu_.groups[kind], mean_step_s=mean_s)
    return best


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
