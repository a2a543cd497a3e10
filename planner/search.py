"""search(graph, machine, ...): the best plans of the declared space, with a proved bound on what is left.

Best-first with ever tighter bounds (SYSTEMS.md 4.5, 4.6): cells by a bound that knows no memory; cells by one that
gives each the best of all its state layouts at once; candidates (cell x layout); then the exact solution. It ends
when the smallest open bound meets the incumbent within the gap. Every candidate is solved, closed by a bound, or
does not fit; one that was solved under a restriction contributes its relaxation to the proved bound.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from planner import bounds, outline
from planner.candidate import Candidates, candidate_rates, plan_spec
from planner.costmodel.estimate import model_facts, price_model
from planner.costmodel.graph import ModelGraph
from planner.costmodel.keys import Array, Keys, Machine
from planner.costmodel.rates import Prices, Rates
from planner.costmodel.strategy import PlanSpec
from planner.partition import Inner, least_overflow_bytes, solve
from planner.space import SCHEDULES, Cells, IntArray, Limits, enumerate_cells, layouts

_KEY_FIELDS = ("tp", "sp", "vocab_parallel", "chunked_loss", "ulysses", "ring", "ep", "micro_batch_size")
_REFINED = (256, 8192)  # cells bounded with memory at once, first and at most
_EXPANDED = (16, 512)  # cells expanded into candidates at once
_DIVE = 3  # candidates solved right after an expansion, to get a good incumbent early


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """When to stop and how many plans to keep."""

    gap_frac: float = 0.01
    time_limit_s: float = 60.0
    top: int = 5
    memory_margin_frac: float = 0.08


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A plan with its predicted step time."""

    spec: PlanSpec
    step_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """State of a running search."""

    done: int
    total: int
    best_s: float | None
    bound_s: float
    elapsed_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """Plans best first and the certificate.

    `num_candidates` counts cells x state layouts; each stands for all its stage partitions and per-layer strategies.
    `ledger` says how many of them were closed by what. `stop_reason`: gap, exhausted, time_limit, interrupted, or
    infeasible. `shortfall_bytes`: when nothing fits, by how much the nearest candidate of a sample misses.
    """

    plans: tuple[Found, ...]
    lower_bound_s: float
    gap_frac: float
    num_candidates: int
    ledger: dict[str, int]
    stop_reason: str
    search_s: float
    shortfall_bytes: float | None
    refused: dict[str, int]


@dataclass(slots=True)
class _State:
    """What changes while the search runs."""

    best: list[Found] = field(default_factory=list)
    cells: list[tuple[float, int]] = field(default_factory=list)  # heap of (bound, cell)
    candidates: list[tuple[float, int, int, int]] = field(default_factory=list)  # heap of (bound, number, block, index)
    blocks: list[tuple[Candidates, Rates]] = field(default_factory=list)
    groups: dict[int, Array] = field(default_factory=dict)  # group -> bounds of its layouts under an ideal schedule
    position: int = 0  # in the order of cells
    refine: int = _REFINED[0]
    expand: int = _EXPANDED[0]
    number: int = 0
    solved: int = 0
    unfit: int = 0
    closed: int = 0  # candidates that a bound closed
    pending_s: float = np.inf  # bound of what the step at work has taken up
    lower_s: float = np.inf  # smallest relaxation of what was solved under a restriction

    @property
    def incumbent_s(self) -> float:
        return self.best[0].step_s if self.best else np.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class _Context:
    graph: ModelGraph
    machine: Machine
    limits: Limits
    options: SearchOptions
    cells: Cells
    key: IntArray
    group: IntArray  # cells of one group have equal key and pp
    prices: Prices
    bound_N: Array
    order: IntArray
    start_s: float
    clock: Callable[[], float]
    on_progress: Callable[[Progress], None] | None
    layouts: dict[tuple[int, int, int], IntArray] = field(default_factory=dict)  # of (dp, cp, ep), made on demand

    @property
    def usable_bytes(self) -> float:
        return self.machine.cluster.device.memory_bytes.value * (1 - self.options.memory_margin_frac)

    @property
    def host_bytes(self) -> float:
        return self.machine.cluster.host_memory_bytes_per_gpu.value


def search(
    graph: ModelGraph,
    machine: Machine,
    global_batch_size: int,
    limits: Limits,
    options: SearchOptions,
    on_progress: Callable[[Progress], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> SearchResult:
    """Search the whole declared space. KeyboardInterrupt returns the best so far with its gap.

    Before anything is bounded there is nothing to return, and KeyboardInterrupt goes on to the caller.
    """
    start_s = clock()
    chunks = machine.engine.kernels.get("ce_stats") == "ours"
    cells = enumerate_cells(graph, machine.num_gpus, global_batch_size, limits, chunks)
    if not len(cells):
        return _empty(clock() - start_s)
    names = _KEY_FIELDS + ("piped",) * (machine.engine.host_collective_crossing_s > 0)
    key, keys = _unique_keys(cells, names)
    prices = price_model(model_facts(graph, machine.engine), keys, machine)
    bound = bounds.cell_bounds(graph, prices, key, cells, machine)
    context = _Context(
        graph=graph, machine=machine, limits=limits, options=options, cells=cells, key=key,
        group=key * (int(cells.pp.max()) + 1) + cells.pp, prices=prices, bound_N=bound,
        order=np.argsort(bound, kind="stable"), start_s=start_s, clock=clock, on_progress=on_progress,
    )  # fmt: skip
    state = _State()
    try:
        reason = _run(context, state)
    except KeyboardInterrupt:
        reason = "interrupted"
    return _result(context, state, reason)


def _unique_keys(cells: Cells, names: tuple[str, ...]) -> tuple[IntArray, Keys]:
    """(key of every cell, the distinct keys): what the fields `names` say."""
    code = np.zeros(len(cells), np.int64)
    for name in names:
        values = getattr(cells, name)
        levels = np.unique(values) if len(cells) < 1000 else np.flatnonzero(np.bincount(values))
        code = code * len(levels) + np.searchsorted(levels, values)
    _, first, key = np.unique(code, return_index=True, return_inverse=True)
    return key, Keys(**{name: getattr(cells, name)[first].astype(float) for name in names})


def _run(context: _Context, state: _State) -> str:
    """Work on whatever has the smallest bound: unrefined cells, cells, or candidates."""
    while True:
        target = _target(context, state)
        raw, cell, candidate = _open_bounds(context, state)
        least = min(raw, cell, candidate)
        if least >= target:
            return "exhausted" if context.options.gap_frac == 0 or least == np.inf else "gap"
        if context.clock() - context.start_s > context.options.time_limit_s:
            return "time_limit"
        state.pending_s = least  # an interrupted step has closed nothing that is better than this
        if raw == least:
            _refine(context, state, target)
        elif cell == least:
            _expand(context, state, target)
            for _ in range(_DIVE):
                if state.candidates and state.candidates[0][0] < _target(context, state):
                    _solve_next(context, state)
        else:
            _solve_next(context, state)
        state.pending_s = np.inf
        _report(context, state)


def _target(context: _Context, state: _State) -> float:
    """Bounds from here on are of no interest: the incumbent is proved good enough against them."""
    return state.incumbent_s * (1 - context.options.gap_frac) if state.best else np.inf


def _open_bounds(context: _Context, state: _State) -> tuple[float, float, float]:
    """Smallest bound of unrefined cells, of cells, of candidates."""
    more = state.position < len(context.order)
    raw = float(context.bound_N[context.order[state.position]]) if more else np.inf
    cell = state.cells[0][0] if state.cells else np.inf
    return raw, cell, state.candidates[0][0] if state.candidates else np.inf


def _refine(context: _Context, state: _State, target: float) -> None:
    """Bound the next cells by their layouts under an ideal schedule, once for all cells of a group."""
    block = context.order[state.position : state.position + state.refine]
    block = block[context.bound_N[block] < target]
    state.position += len(block)
    state.refine = min(2 * state.refine, _REFINED[1])
    group = context.group[block]
    new, first = np.unique(group, return_index=True)
    unseen = np.array([int(g) not in state.groups for g in new])
    candidates = _candidates(context, block[first[unseen]], None)
    found = np.zeros(0)
    if len(candidates):
        rates = _rates(context, candidates, one_chunk=True)
        shape = outline.ideal_shape(context.cells, candidates.cell)
        found = _candidate_bounds(context, rates, shape, target)
    start = 0
    for cell in block[first[unseen]]:
        size = len(_layouts(context, cell))
        state.groups[int(context.group[cell])] = found[start : start + size]
        start += size
    for cell, g in zip(block, group, strict=True):
        least = state.groups[int(g)].min(initial=np.inf)
        if least < target:
            heapq.heappush(state.cells, (max(float(least), float(context.bound_N[cell])), int(cell)))
        elif least == np.inf:
            state.unfit += len(_layouts(context, cell))
        else:
            state.closed += len(_layouts(context, cell))


def _candidates(context: _Context, block: IntArray, keep: list[IntArray] | None) -> Candidates:
    """Candidates of the cells in `block`; `keep` selects layouts per cell."""
    rows = [_layouts(context, cell) for cell in block]
    if keep is not None:
        rows = [r[k] for r, k in zip(rows, keep, strict=True)]
    cell = np.repeat(np.asarray(block, np.int64), [len(r) for r in rows])
    return Candidates(cell=cell, layout=np.concatenate([np.zeros((0, 4), np.int64), *rows]))


def _rates(context: _Context, candidates: Candidates, one_chunk: bool = False) -> Rates:
    return candidate_rates(
        context.graph, context.prices, context.key, context.cells, candidates, context.machine, context.limits,
        one_chunk,
    )  # fmt: skip


def _candidate_bounds(context: _Context, rates: Rates, shape: outline.Shape, target: float) -> Array:
    return bounds.candidate_bounds(context.graph, rates, shape, context.usable_bytes, context.machine, target)


def _expand(context: _Context, state: _State, target: float) -> None:
    """Bound the candidates of the next cells that their group's bound left open."""
    block: list[int] = []
    while state.cells and len(block) < state.expand and state.cells[0][0] < target:
        block.append(heapq.heappop(state.cells)[1])
    state.expand = min(2 * state.expand, _EXPANDED[1])
    ideal = [state.groups[int(context.group[cell])] for cell in block]
    state.unfit += sum(int(np.isinf(b).sum()) for b in ideal)
    state.closed += sum(int(((b >= target) & np.isfinite(b)).sum()) for b in ideal)
    candidates = _candidates(context, np.array(block), [np.flatnonzero(b < target) for b in ideal])
    if not len(candidates):
        return
    rates = _rates(context, candidates)
    shape = outline.shape_of(context.cells, candidates.cell, rates.p2p_s_K)
    found = _candidate_bounds(context, rates, shape, target)
    state.unfit += int(np.isinf(found).sum())
    keep = np.flatnonzero(found < target)
    state.closed += len(found) - len(keep) - int(np.isinf(found).sum())
    state.blocks.append((candidates.take(keep), rates.take(keep)))
    for i, bound in enumerate(found[keep]):
        heapq.heappush(state.candidates, (float(bound), state.number, len(state.blocks) - 1, i))
        state.number += 1


def _layouts(context: _Context, cell: int) -> IntArray:
    """State layouts of a cell."""
    cells = context.cells
    shape = int(cells.dp[cell]), int(cells.ulysses[cell] * cells.ring[cell]), int(cells.ep[cell])
    if shape not in context.layouts:
        context.layouts[shape] = layouts(*shape, context.limits)
    return context.layouts[shape]


def _solve_next(context: _Context, state: _State) -> None:
    _, _, block, index = heapq.heappop(state.candidates)
    candidates, rates = state.blocks[block]
    inner = _inner(context, candidates, rates.column(index), index)
    kept = state.best[context.options.top - 1].step_s if len(state.best) >= context.options.top else np.inf
    upper = min(kept, state.incumbent_s * 1.1)
    solved = solve(inner, upper, slack_frac=context.options.gap_frac / 10)
    partition = solved.partition
    state.solved += 1
    state.lower_s = min(state.lower_s, solved.lower_s)
    if partition is None:
        return
    spec = plan_spec(inner, context.cells, candidates, index, partition)
    state.best.append(Found(spec=spec, step_s=partition.step_s))
    state.best.sort(key=lambda found: found.step_s)
    del state.best[context.options.top :]


def _inner(context: _Context, candidates: Candidates, rates: Rates, index: int) -> Inner:
    cells, at = context.cells, int(candidates.cell[index])
    return Inner(
        layer_classes=context.graph.layer_classes, rates=rates, machine=context.machine,
        schedule=SCHEDULES[int(cells.schedule[at])], num_microbatches=int(cells.num_microbatches[at]),
        pp=int(cells.pp[at]), vpp=int(cells.vpp[at]), usable_bytes=context.usable_bytes,
        host_bytes=context.host_bytes,
    )  # fmt: skip


def _report(context: _Context, state: _State) -> None:
    if context.on_progress is not None:
        context.on_progress(
            Progress(
                done=state.position, total=len(context.cells), best_s=state.best[0].step_s if state.best else None,
                bound_s=_bound(context, state), elapsed_s=context.clock() - context.start_s,
            )
        )  # fmt: skip


def _bound(context: _Context, state: _State) -> float:
    """Smallest step time that anything not refuted could have."""
    closed = _target(context, state) if state.closed else np.inf
    return float(min(*_open_bounds(context, state), closed, state.pending_s, state.lower_s, state.incumbent_s))


def _result(context: _Context, state: _State, reason: str) -> SearchResult:
    lower = _bound(context, state)
    total = _num_candidates(context, np.arange(len(context.cells)))
    gap = 1 - lower / state.incumbent_s if state.best else float("nan")
    shortfall = None if state.best or reason != "exhausted" else _shortfall(context)
    if reason == "gap" and gap > context.options.gap_frac * (1 + 1e-9):
        reason = "exhausted"  # what was solved under a restriction keeps the gap open
    reason = "infeasible" if not state.best and reason == "exhausted" else reason
    unproved = reason in ("time_limit", "interrupted")
    left = total - state.solved - state.unfit - state.closed if unproved else 0
    ledger = {
        "solved": state.solved,
        "closed_by_bound": total - state.solved - state.unfit - left,
        "does_not_fit": state.unfit,
        "open": left,
    }
    return SearchResult(
        plans=tuple(state.best), lower_bound_s=lower, gap_frac=max(gap, 0.0) if state.best else gap,
        num_candidates=total, ledger=ledger, stop_reason=reason, search_s=context.clock() - context.start_s,
        shortfall_bytes=shortfall, refused={},
    )  # fmt: skip


def _empty(search_s: float) -> SearchResult:
    return SearchResult(
        plans=(), lower_bound_s=float("inf"), gap_frac=float("nan"), num_candidates=0, ledger={},
        stop_reason="infeasible", search_s=search_s, shortfall_bytes=None, refused={},
    )  # fmt: skip


def _num_candidates(context: _Context, at: IntArray) -> int:
    """Candidates of the cells `at`."""
    if not len(at):
        return 0
    cells = context.cells
    dp, ep, cp = cells.dp[at], cells.ep[at], cells.ulysses[at] * cells.ring[at]
    code = (dp * (int(cp.max()) + 1) + cp) * (int(ep.max()) + 1) + ep
    _, first, counts = np.unique(code, return_index=True, return_counts=True)
    return int(np.dot([len(_layouts(context, int(at[i]))) for i in first], counts))


def _shortfall(context: _Context) -> float | None:
    """Least overflow, in bytes, among the cells whose model states are spread the widest."""
    cells = context.cells
    spread = np.argsort(-(cells.tp * cells.pp * cells.dp), kind="stable")[:64]
    missing = []
    for cell in spread:
        rows = _layouts(context, cell)
        candidates = Candidates(cell=np.full(len(rows), cell), layout=rows)
        rates = _rates(context, candidates)
        missing += [
            least_overflow_bytes(_inner(context, candidates, rates.column(i), i)) for i in range(len(rows))
        ]
    return min(missing) if missing else None
