"""What a packed micro-batch of sequences of different lengths costs on a group of data ranks.

A group of d = ulysses x ring ranks that holds sequences s_1, s_2, ... takes fixed_s + sum_i c(s_i): everything but
attention is linear in tokens (its slope and intercept are those of the cost model between a quarter and all of the
expected tokens per rank), attention is priced at every length on its own, so the sum carries both sum s and sum s^2
(SYSTEMS.md 3.3). Ulysses and ring communication cross the tiers that the group spans, none at degree 1; what a call
costs before its first byte is in fixed_s, once a pack. Ring transfers and activation swaps hide behind the compute of
their own sequence only (MODELLED, on the safe side; exact where one of both is longer for all sequences of the pack).
Memory is linear in the tokens of a group; every layer of a stage has the same strategy. With ep an expert group is
`ep` neighbouring data ranks, of whatever groups: rows are priced where they come from, as if every rank had as many
(balanced routing evens experts' work out over the ranks; that groups wait for each other at an exchange is not in).

Legend: U group shapes, S strategies, G lengths of the grid, P pipeline ranks, C layer classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from planner.costmodel import compute
from planner.costmodel.estimate import ModelFacts, price_model
from planner.costmodel.facts import LayerFacts
from planner.costmodel.graph import ModelGraph
from planner.costmodel.keys import Array, Keys, Machine
from planner.costmodel.layer_comm import exposed
from planner.costmodel.rates import Rates, build_rates
from planner.costmodel.sequence_attention import AttentionPrices
from planner.costmodel.state import StateLayout, step_sync
from planner.costmodel.strategy import STRATEGIES, LayerStrategy


@dataclass(frozen=True, slots=True, kw_only=True)
class DataShape:
    """The run's model-state layout: everything of a plan that does not follow the sequences.

    All data ranks share ZeRO shards; `zero_stage` 0 replicates. 1F1B, the same number of layers on every stage.
    `ep`: of the data ranks.
    """

    tp: int = 1
    sequence_parallel: bool = False
    vocab_parallel: bool = False
    pp: int = 1
    ep: int = 1
    zero_stage: int = 0
    offload_optimizer: bool = False

    @property
    def lockstep(self) -> bool:
        """Whether collectives over ranks of several groups in every micro-batch keep groups in step."""
        return self.zero_stage >= 2 or self.ep > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCost:
    """A kind of group: its shape, strategy, seconds and room.

    `per_token_s_G`: seconds per token of a sequence as long as `grid_G`, on the slowest stage, forward and backward;
    linear between, which is exact for what is quadratic in length. `capacity_tokens`: of the whole group.
    """

    ulysses: int
    ring: int
    strategy: LayerStrategy
    fixed_s: float
    grid_G: Array
    per_token_s_G: Array
    capacity_tokens: float

    @property
    def ranks(self) -> int:
        """Data ranks of the group."""
        return self.ulysses * self.ring

    def sequence_s(self, lengths: NDArray[np.int64] | Array) -> Array:
        """Seconds that each of `lengths` adds to its group."""
        per_token = np.interp(lengths, self.grid_G, self.per_token_s_G)
        return np.asarray(per_token * lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class Menu:
    """Kinds of groups that may share `num_ranks` data ranks; `step_s` is paid once per optimizer step.

    `lockstep`: groups wait for each other after every micro-batch. `pp`: micro-batches of a group go through a
    pipeline of so many stages.
    """

    groups: tuple[GroupCost, ...]
    num_ranks: int
    lockstep: bool
    pp: int
    step_s: float

    @property
    def longest_counts(self) -> int:
        """How often the longest micro-step counts: in lockstep, micro-steps go through one pipeline of all ranks."""
        return self.pp if self.lockstep else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stages:
    """Linear part of every stage at both token counts, arrays (2U,) per stage and strategy."""

    forward_PK: Array
    backward_PK: Array
    extra_PSK: Array
    peak_PSK: Array
    host_PSK: Array


def without_attention(facts: ModelFacts) -> ModelFacts:
    """The part of a model that is linear in tokens."""

    def lean(layer: LayerFacts) -> LayerFacts:
        return replace(layer, attentions=())

    return ModelFacts(
        prologue=lean(facts.prologue), classes=tuple(map(lean, facts.classes)), epilogue=lean(facts.epilogue)
    )


def menu(
    graph: ModelGraph, facts: ModelFacts, machine: Machine, shape: DataShape, degrees: tuple[tuple[int, int], ...],
    longest: int, tokens_per_step: float, usable_bytes: float, prices: AttentionPrices | None = None,
) -> Menu:  # fmt: skip
    """Every (ulysses, ring) of `degrees` under every strategy, with room for at least one token a rank.

    `longest`: tokens of the longest sequence; `tokens_per_step`: of a global batch, which says how full ranks are.
    `prices`: shared by the layouts of a run.
    ValueError: attention that is not fused (its scores do not grow linearly), or layers that pp does not divide.
    """
    if machine.engine.attention == "unfused":
        raise ValueError(f"engine {machine.engine.name} keeps attention scores: packed sequences need a fused kernel")
    if graph.num_layers % shape.pp:
        raise ValueError(f"pp = {shape.pp} does not divide {graph.num_layers} layers")
    ranks = machine.num_gpus // (shape.tp * shape.pp)
    expected = max(tokens_per_step / ranks, 64.0)
    lean = without_attention(facts)
    room = _rooms(graph, _linear(graph, lean, machine, shape, degrees, expected), usable_bytes, machine, expected)
    full = min(expected, max(float(room.max(initial=0.0)), 64.0))
    stages, rates = _linear(graph, lean, machine, shape, degrees, full)
    busy = int(np.argmax(stages.forward_PK[:, -1] + stages.backward_PK[:, -1]))
    prices = prices or AttentionPrices(facts, machine, longest)
    grid = prices.grid
    attention = _Attention(prices, shape, degrees, _counts(graph, shape.pp)[busy], machine.engine.overlap_cp)
    groups = []
    for s, strategy in enumerate(STRATEGIES):
        linear_s = stages.forward_PK[busy] + stages.backward_PK[busy] + stages.extra_PSK[busy, s]
        for u, (ulysses, ring) in enumerate(degrees):
            if room[s, u] < 1:
                continue
            low, high = linear_s[u], linear_s[len(degrees) + u]
            slope = max((high - low) / (0.75 * full), 0.0)
            own_s, base_s = attention.seconds(s, u)
            if strategy.offload_activations:
                own_s = own_s - _relief_s(rates, s, u, attention, full, machine)
            groups.append(
                GroupCost(
                    ulysses=ulysses, ring=ring, strategy=strategy, fixed_s=max(high - slope * full, 0.0) + base_s,
                    grid_G=grid, per_token_s_G=slope / (ulysses * ring) + own_s / grid,
                    capacity_tokens=float(room[s, u]) * ulysses * ring,
                )
            )  # fmt: skip
    step_s = _step_s(graph, rates, stages, machine, len(degrees))
    return Menu(groups=tuple(groups), num_ranks=ranks, lockstep=shape.lockstep, pp=shape.pp, step_s=step_s)


def without_dominated(found: Menu, spare_frac: float) -> Menu:
    """The menu less the kinds that another of as many ranks with as much room beats at every length.

    "Beats" leaves `spare_frac` to the worse one, so the best dispatch is at most that fraction slower.
    """
    kept: list[GroupCost] = []
    alike: dict[int, list[GroupCost]] = {}
    for group in sorted(found.groups, key=lambda g: (float(g.per_token_s_G.sum()) * g.ranks, -g.capacity_tokens)):
        others = alike.setdefault(group.ranks, [])
        if not any(_dominates(better, group, 1 + spare_frac) for better in others):
            kept.append(group)
            others.append(group)
    return replace(found, groups=tuple(kept))


def _dominates(better: GroupCost, group: GroupCost, factor: float) -> bool:
    fits = group.grid_G <= 2 * group.capacity_tokens  # one point beyond, for what lies between
    return (
        better.capacity_tokens >= group.capacity_tokens
        and better.fixed_s <= group.fixed_s * factor
        and bool((better.per_token_s_G[fits] <= group.per_token_s_G[fits] * factor).all())
    )


def core(found: Menu, typical: float) -> Menu:
    """A small menu: of each number of ranks under each strategy up to three shapes.

    The fastest for a `typical` sequence and for one that fills a quarter and all of the group.
    """
    kept: dict[tuple[int, int, LayerStrategy], GroupCost] = {}
    for strategy, ranks in dict.fromkeys((group.strategy, group.ranks) for group in found.groups):
        same = [g for g in found.groups if g.ranks == ranks and g.strategy == strategy]
        room = min(same[0].capacity_tokens, float(same[0].grid_G[-1]))
        for tokens in (typical, 0.25 * room, room):
            length = np.array([tokens])
            best = min(same, key=lambda group: float(group.sequence_s(length)[0]) + group.fixed_s)  # noqa: B023
            kept[best.ulysses, best.ring, strategy] = best
    return replace(found, groups=tuple(kept.values()))


def _keys(shape: DataShape, degrees: tuple[tuple[int, int], ...], batch: Array) -> Keys:
    """Keys of the degrees, as often as `batch` holds them."""
    times = len(batch) // len(degrees)
    ulysses, ring = (np.tile([float(d[i]) for d in degrees], times) for i in range(2))
    one = np.ones_like(batch)
    return Keys(
        tp=shape.tp * one, sp=float(shape.sequence_parallel) * one, ulysses=ulysses, ring=ring, ep=shape.ep * one,
        micro_batch_size=batch, vocab_parallel=float(shape.vocab_parallel) * one,
    )  # fmt: skip


def _linear(
    graph: ModelGraph, lean: ModelFacts, machine: Machine, shape: DataShape, degrees: tuple[tuple[int, int], ...],
    tokens_per_rank: float,
) -> tuple[_Stages, Rates]:  # fmt: skip
    """Stages at a quarter and all of `tokens_per_rank`."""
    cp = np.array([float(u * r) for u, r in degrees])
    traced = graph.traced_micro_batch_size * graph.traced_seq_len
    batch = np.concatenate([cp * (part * tokens_per_rank / traced) for part in (0.25, 1.0)])
    keys, one = _keys(shape, degrees, batch), np.ones(len(batch))
    ranks = machine.num_gpus // (shape.tp * shape.pp)
    sharded = shape.zero_stage > 0
    layout = StateLayout(
        tp=shape.tp * one, cp=one, ep=shape.ep * one, dp_replicate=(1 if sharded else ranks) * one,
        dp_shard=(ranks if sharded else 1) * one, zero=shape.zero_stage * one,
        offload_optimizer=float(shape.offload_optimizer) * one,
    )  # fmt: skip
    pipeline = (shape.pp * one, one, 2 * one)  # of two micro-batches the second finds gradients there
    rates = build_rates(graph, price_model(lean, keys, machine), layout, *pipeline, machine)
    return _stages(graph, rates, shape.pp), rates


def _counts(graph: ModelGraph, pp: int) -> Array:
    """Layers of each class on each stage, (P, C)."""
    each = np.eye(len(graph.classes))[list(graph.layer_classes)]
    return np.asarray(each.reshape(pp, -1, len(graph.classes)).sum(axis=1))


def _stages(graph: ModelGraph, r: Rates, pp: int) -> _Stages:
    held = _counts(graph, pp)
    present = held[:, :, None, None] > 0

    def total(of_layers: Array, name: str) -> Array:
        body = held @ of_layers
        body[0] += getattr(r.prologue, name)
        body[-1] += getattr(r.epilogue, name)
        return np.asarray(body)

    flight = (pp - np.arange(pp, dtype=float))[:, None, None]
    acts = flight * np.einsum("pc,csk->psk", held, r.activation_bytes_CSK)
    acts[0] += flight[0] * r.prologue.activation_bytes
    acts[-1] += r.epilogue.activation_bytes + r.epilogue.work_bytes
    work = np.max(np.where(present, r.work_bytes_CSK[None], 0.0), axis=1)
    states = total(r.state_bytes_CK, "state_bytes") + r.fixed_bytes_K
    host = total(r.host_state_bytes_CK, "host_bytes")
    return _Stages(
        forward_PK=total(r.forward_s_CK, "forward_s") + r.p2p_s_K,
        backward_PK=total(r.backward_s_CK, "backward_s") + total(r.weight_s_CK, "weight_s") + r.p2p_s_K,
        extra_PSK=np.einsum("pc,csk->psk", held, np.where(np.isfinite(r.extra_s_CSK), r.extra_s_CSK, 0.0)),
        peak_PSK=states[:, None] + acts + work,
        host_PSK=host[:, None] + flight * np.einsum("pc,csk->psk", held, r.host_bytes_CSK),
    )


def _rooms(
    graph: ModelGraph, linear: tuple[_Stages, Rates], usable_bytes: float, machine: Machine, tokens: float
) -> Array:
    """Tokens per rank that fit, (S, U): memory is linear in tokens, the fullest stage decides."""
    stages, _ = linear
    host = machine.cluster.host_memory_bytes_per_gpu.value
    half = stages.forward_PK.shape[1] // 2
    room = np.full((len(STRATEGIES), half), np.inf)
    for used_PSK, limit in ((stages.peak_PSK, usable_bytes), (stages.host_PSK, host)):
        low, high = used_PSK[..., :half], used_PSK[..., half:]
        slope = np.maximum((high - low) / (0.75 * tokens), 1e-9)
        fits = (limit - (high - slope * tokens)) / slope
        room = np.minimum(room, fits.min(axis=0))
    return np.asarray(np.maximum(room, 0.0))


class _Attention:
    """Attention and its communication on the busiest stage, by length and group shape.

    First what a pack pays once, then what a sequence of each length adds, arrays (1 + G, U). `held`: layers of each
    class on that stage. A ring's start is not hidden, its bytes are behind the attention of their own sequence.
    """

    def __init__(
        self, prices: AttentionPrices, shape: DataShape, degrees: tuple[tuple[int, int], ...], held: Array,
        overlap: float,
    ) -> None:  # fmt: skip
        self.grid, self.held, self.cp = prices.grid, held, np.array([float(u * r) for u, r in degrees])
        attention_f, attention_b, ulysses, ring = prices.of(_keys(shape, degrees, np.ones(len(degrees))))

        def whole(attention: Array, hops: Array) -> Array:
            sent = np.concatenate([hops[:1], exposed(hops[1:], attention[1:], overlap)])
            return np.asarray(np.einsum("c,gcu->gu", held, attention + ulysses + sent))

        self.forward, self.backward = whole(attention_f, ring), whole(attention_b, 2 * ring)
        self.core = np.einsum("c,gcu->gu", held * prices.redone, attention_f)

    def seconds(self, strategy: int, u: int) -> tuple[Array, float]:
        """(seconds that a sequence adds, by length; what a pack pays once)."""
        kind = STRATEGIES[strategy].recompute
        redo = {"none": 0.0 * self.core, "selective": self.core, "full": self.forward}[kind]
        total = (self.forward + self.backward + redo)[:, u]
        return total[1:], float(total[0])


def _relief_s(
    rates: Rates, s: int, u: int, attention: _Attention, full: float, machine: Machine
) -> Array:  # fmt: skip
    """What attention hides of a sequence's activation swap beyond what the linear part hides, by length.

    MEMO, section 4: a swap is free while it takes no longer than the layer's compute, which grows with s^2.
    """
    held = attention.held
    ranks, at = float(attention.cp[u]), len(attention.cp) + u
    copy = float(held @ compute.host_copy_s(machine.cluster.device, rates.host_bytes_CSK[:, s, at])) / full
    redo = rates.extra_s_CSK[:, STRATEGIES.index(replace(STRATEGIES[s], offload_activations=False)), at]
    forward = float(held @ rates.forward_s_CK[:, at]) / full
    backward = float(held @ (rates.backward_s_CK + rates.weight_s_CK)[:, at] + held @ redo) / full
    hidden = np.zeros_like(attention.grid)
    own_f = attention.forward[1:, u]
    own_s, _ = attention.seconds(s, u)
    for linear, more in ((forward, own_f), (backward, own_s - own_f)):
        hidden = hidden + np.minimum(copy, linear + more * ranks / attention.grid) - min(copy, linear)
    return np.asarray(machine.engine.overlap_offload * hidden * attention.grid / ranks)


def _step_s(graph: ModelGraph, rates: Rates, stages: _Stages, machine: Machine, half: int) -> float:
    """Gradient reduction, optimizer and parameter gather of the slowest stage, once per step, at degree 1."""
    held = _counts(graph, len(stages.forward_PK))
    dense, routed = held @ rates.dense_CK, held @ rates.routed_CK
    for name, total in (("dense", dense), ("routed", routed)):
        total[0] += getattr(rates.prologue, name)
        total[-1] += getattr(rates.epilogue, name)
    sync = step_sync(dense, routed, stages.forward_PK, stages.backward_PK, rates.layout, machine)
    return float((sync.total_s + rates.step_s_K)[:, half].max())
