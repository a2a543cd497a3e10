"""One candidate of the search: a cell and a state layout, as the inner problem to solve and as the plan it gives."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from planner.bottleneck import Partition
from planner.costmodel.graph import ModelGraph
from planner.costmodel.keys import Machine
from planner.costmodel.rates import Prices, Rates, build_rates
from planner.costmodel.state import StateLayout
from planner.costmodel.strategy import STRATEGIES, LayerStrategy, PlanSpec
from planner.partition import Inner
from planner.space import SCHEDULES, Cells, IntArray, Limits, allowed_strategies, uses
from planner.stages import stage_ranks, stage_sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Pairs of a cell and a layout, parallel arrays (K,): `cell` indexes Cells, `layout` holds LAYOUT_FIELDS."""

    cell: IntArray
    layout: IntArray

    def __len__(self) -> int:
        return len(self.cell)

    def take(self, index: IntArray) -> Candidates:
        """The candidates at `index`."""
        return Candidates(cell=self.cell[index], layout=self.layout[index])


def state_layout(cells: Cells, candidates: Candidates) -> StateLayout:
    """How model states lie in every candidate."""
    at = candidates.cell
    replicate, shard, zero, offload = (candidates.layout[:, i].astype(float) for i in range(4))
    return StateLayout(
        tp=cells.tp[at].astype(float), cp=(cells.ulysses[at] * cells.ring[at]).astype(float),
        ep=cells.ep[at].astype(float), dp_replicate=replicate, dp_shard=shard, zero=zero, offload_optimizer=offload,
    )  # fmt: skip


def candidate_rates(
    graph: ModelGraph, prices: Prices, key: IntArray, cells: Cells, candidates: Candidates, machine: Machine,
    limits: Limits, one_chunk: bool = False,
) -> Rates:  # fmt: skip
    """Rates of all candidates at once; `key[cell]` is the column of `prices`.

    Strategies that `limits` exclude take forever. `one_chunk`: as if vpp were 1.
    """
    at = candidates.cell
    layout = state_layout(cells, candidates)
    pp, vpp = cells.pp[at].astype(float), cells.vpp[at].astype(float)
    m = cells.num_microbatches[at].astype(float)
    rates = build_rates(graph, prices.take(key[at]), layout, pp, np.ones_like(vpp) if one_chunk else vpp, m, machine)
    used = uses(cells, at, candidates.layout)
    if one_chunk:  # stands for all schedules of its group: none of them excludes anything
        used = {name: on for name, on in used.items() if name not in {kind.value for kind in SCHEDULES}}
    allowed = allowed_strategies(used, limits)
    if allowed.all():
        return rates
    return replace(rates, extra_s_CSK=np.where(allowed, rates.extra_s_CSK, np.inf))


def plan_spec(inner: Inner, cells: Cells, candidates: Candidates, k: int, partition: Partition) -> PlanSpec:
    """The plan that `partition` makes of candidate `k`."""
    at = int(candidates.cell[k])
    replicate, shard, zero, offload = (int(x) for x in candidates.layout[k])
    sizes = stage_sizes(partition.num_layers, inner.vpp, inner.schedule)
    ends = np.cumsum(sizes)
    stages = tuple((int(end - size), int(end)) for end, size in zip(ends, sizes, strict=True))
    dp, m = int(cells.dp[at]), int(cells.num_microbatches[at])
    return PlanSpec(
        tp=int(cells.tp[at]), sequence_parallel=bool(cells.sp[at]), pp=inner.pp, vpp=inner.vpp,
        schedule=SCHEDULES[int(cells.schedule[at])], dp_replicate=replicate, dp_shard=shard, zero_stage=zero,
        ulysses=int(cells.ulysses[at]), ring=int(cells.ring[at]), ep=int(cells.ep[at]),
        micro_batch_size=int(cells.micro_batch_size[at]),
        global_batch_size=m * dp * int(cells.micro_batch_size[at]),
        vocab_parallel=bool(cells.vocab_parallel[at]), chunked_loss=bool(cells.chunked_loss[at]),
        offload_optimizer=bool(offload), stage_layers=stages,
        layers=_layer_strategies(inner, stages, partition),
    )  # fmt: skip


def _layer_strategies(
    inner: Inner, stages: tuple[tuple[int, int], ...], partition: Partition
) -> tuple[LayerStrategy, ...]:
    """Deal each rank's strategy counts to its layers; those that keep least come first in the rank."""
    held: list[list[int]] = [[] for _ in range(inner.pp)]
    for rank, (start, end) in zip(stage_ranks(inner.pp, inner.vpp, inner.schedule), stages, strict=True):
        held[rank] += range(start, end)
    chosen: dict[int, LayerStrategy] = {}
    kept = inner.rates.activation_bytes_CSK[:, :, 0]
    for rank, layers in enumerate(held):
        for c in range(inner.num_classes):
            own = [layer for layer in layers if inner.layer_classes[layer] == c]
            counts = partition.counts_PCS[rank, c]
            order = np.argsort(kept[c], kind="stable")
            dealt = [STRATEGIES[s] for s in order for _ in range(int(counts[s]))]
            chosen.update(zip(own, dealt, strict=True))
    return tuple(chosen[layer] for layer in range(len(inner.layer_classes)))
