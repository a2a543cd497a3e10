"""State layouts that a run over a length distribution may have: what their groups cost, and what bounds them at once.

Declared space: tp x pp x ep x ZeRO stage (1F1B, as many layers on every stage; sequence and vocabulary parallel with
tp wherever they divide; states sharded over all data ranks), degrees that are powers of two, the same strategy for all
layers of a group, with ep full recomputation in all groups or in none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from planner.batch import IntArray
from planner.costmodel.estimate import model_facts
from planner.costmodel.graph import ModelGraph
from planner.costmodel.keys import Machine
from planner.costmodel.sequence_attention import AttentionPrices
from planner.costmodel.sequences import DataShape, GroupCost, Menu, core, menu, without_dominated
from planner.lengths import Lengths
from planner.pool import Pool, first_bound_s
from planner.space import Limits, enumerate_cells, strategy_uses

SPARE_FRAC = 0.01  # kinds within this of a better one are left out; bounds give up as much


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """A state layout: the kinds that are dispatched to, all kinds, and a bound on its expected step over them."""

    shape: DataShape
    menu: Menu
    kinds: Menu
    lower_bound_s: float


class NothingHolds(ValueError):
    """No layout holds the longest sequence; `longest_tokens` is what the best does, 0 if states alone do not fit."""

    def __init__(self, longest_tokens: int) -> None:
        super().__init__(f"longest sequence that fits any layout: {longest_tokens:,} tokens")
        self.longest_tokens = longest_tokens


def ideal_s(graph: ModelGraph, machine: Machine, batches: tuple[IntArray, ...]) -> float:
    """The batches' model FLOPs at the peak rate of all GPUs, mean: below every layout, priced or not.

    0 where measured tables set prices. No batch has a sequence longer than the traced one, so attention over a window
    counts for no more than it is.
    """
    device, traced = machine.cluster.device, graph.traced_seq_len
    if device.measured:
        return 0.0
    layers = [graph.prologue, graph.epilogue, *(graph.classes[c] for c in graph.layer_classes)]
    ops = [op for layer in layers for op in layer.ops]
    attention, others = (
        sum(op.flops + op.backward_flops for op in ops if (op.attention is not None) == wanted)
        / graph.traced_micro_batch_size
        for wanted in (True, False)
    )
    parts = [batch / traced for batch in batches]
    flops = np.mean([others * part.sum() + attention * (part**2).sum() for part in parts])
    rates = {dtype: rate.value for dtype, rate in device.peak_flops_per_s.items()}
    return float(flops) / (machine.num_gpus * rates.get(machine.dtype, max(rates.values())))


def priced(
    graph: ModelGraph, machine: Machine, lengths: Lengths, batches: tuple[IntArray, ...], limits: Limits,
    memory_margin_frac: float, late: Callable[[], bool],
) -> tuple[list[Layout], int]:  # fmt: skip
    """(layouts that hold the longest length, least bound first; how many there was no time to price).

    Pricing goes on until one holds. NothingHolds if none does.
    """
    facts, pool = model_facts(graph, machine.engine), Pool.of(batches)
    usable = machine.cluster.device.memory_bytes.value * (1 - memory_margin_frac)
    tokens = float(np.mean([batch.sum() for batch in batches]))
    longest = max(lengths.longest_tokens, int(pool.tokens_D[-1]))
    prices = AttentionPrices(facts, machine, longest)
    found: list[Layout] = []
    held, left = 0.0, shapes_of(graph, machine.num_gpus, limits)
    while left and not (found and late()):
        shape, degrees = left.pop(0)
        full = menu(graph, facts, machine, shape, degrees, longest, tokens, usable, prices)
        for alike in exchanging_alike(full, shape.ep):
            kinds = without_dominated(_allowed(alike, limits), SPARE_FRAC)
            room = max((g.capacity_tokens for g in kinds.groups), default=0.0)
            held = max(held, room)
            if room >= longest:
                found.append(_layout(shape, kinds, lengths.mean_tokens, longest, pool))
    if not found:
        raise NothingHolds(int(held))
    return sorted(found, key=lambda layout: layout.lower_bound_s), len(left)


def _layout(shape: DataShape, kinds: Menu, typical: float, longest: int, pool: Pool) -> Layout:
    small = core(kinds, typical)
    if max(g.capacity_tokens for g in small.groups) < longest:
        small = kinds
    bound = first_bound_s(kinds, pool) / (1 + SPARE_FRAC) + kinds.step_s
    return Layout(shape=shape, menu=small, kinds=kinds, lower_bound_s=bound)


def _allowed(found: Menu, limits: Limits) -> Menu:
    def fits(group: GroupCost) -> bool:
        strategy = group.strategy
        return (
            limits.allows("recompute", strategy.recompute)
            and limits.allows("offload_activations", int(strategy.offload_activations))
            and not strategy_uses(strategy) & limits.forbidden
            and not any(names <= strategy_uses(strategy) for names in limits.combinations)
        )

    return replace(found, groups=tuple(group for group in found.groups if fits(group)))


def exchanging_alike(found: Menu, ep: int) -> tuple[Menu, ...]:
    """With ep, the menu in two: groups whose backward runs forward and its exchanges of rows again, and the others.

    Ranks of an expert group may be in different groups, and must exchange equally often.
    """
    if ep == 1:
        return (found,)
    again = tuple(group for group in found.groups if group.strategy.recompute == "full")
    once = tuple(group for group in found.groups if group.strategy.recompute != "full")
    return replace(found, groups=once), replace(found, groups=again)


def shapes_of(
    graph: ModelGraph, num_gpus: int, limits: Limits
) -> list[tuple[DataShape, tuple[tuple[int, int], ...]]]:  # fmt: skip
    """(state layout, (ulysses, ring) of its groups) of the declared space under `limits`."""
    own: dict[str, int | str] = {"micro_batch_size": 1, "vpp": 1, "schedule": "1f1b"}
    cells = enumerate_cells(
        graph, num_gpus, num_gpus, Limits(fixed={**limits.fixed, **own}, forbidden=limits.forbidden)
    )
    groups: dict[tuple[int, int, int, int, int], set[tuple[int, int]]] = {}
    columns = (cells.tp, cells.sp, cells.vocab_parallel, cells.pp, cells.ep, cells.ulysses, cells.ring)
    for tp, sp, vocab, pp, ep, ulysses, ring in zip(*(c.tolist() for c in columns), strict=True):
        degree = ulysses * ring
        if graph.num_layers % pp == 0 and degree & (degree - 1) == 0 and ep & (ep - 1) == 0:
            groups.setdefault((tp, pp, ep, sp, vocab), set()).add((ulysses, ring))
    widest = {key[:2]: max(k[3:] for k in groups if k[:2] == key[:2]) for key in groups}
    found = []
    for (tp, pp, ep, sp, vocab), pairs in sorted(groups.items()):
        if widest[tp, pp] != (sp, vocab):
            continue
        for zero in (0, 1, 3):
            sharded = num_gpus // (tp * pp) > 1
            if (zero > 0) != sharded or zero not in limits.zero_stages or not limits.allows("zero", zero):
                continue
            shape = DataShape(
                tp=tp, sequence_parallel=bool(sp), vocab_parallel=bool(vocab), pp=pp, ep=ep, zero_stage=zero,
                offload_optimizer=limits.fixed.get("offload_optimizer", 0) == 1,
            )  # fmt: skip
            found.append((shape, tuple(sorted(pairs))))
    return found
