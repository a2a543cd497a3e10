"""estimate(graph, machine, spec): step time and memory of one plan, as a tree that sums exactly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from planner.costmodel.cost import CostBreakdown, MemoryBreakdown, leaf, node
from planner.costmodel.engine import EngineSpec
from planner.costmodel.evidence import Source
from planner.costmodel.facts import LayerFacts, layer_facts
from planner.costmodel.graph import ModelGraph
from planner.costmodel.hardware import ClusterSpec
from planner.costmodel.keys import Array, Keys, Machine
from planner.costmodel.layer_times import component_evidence, scaled_to_measured
from planner.costmodel.pipeline import in_flight, pipeline_s
from planner.costmodel.rates import Prices, Rates, build_rates
from planner.costmodel.state import StateLayout, StepSync, step_sync
from planner.costmodel.strategy import RECOMPUTE_KINDS, STRATEGIES, PlanSpec

_STRATEGY_INDEX = {strategy: s for s, strategy in enumerate(STRATEGIES)}
_RECOMPUTE_INDEX = [RECOMPUTE_KINDS.index(strategy.recompute) for strategy in STRATEGIES]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEstimate:
    """One pipeline rank: seconds per micro-batch, once-per-step seconds, memory."""

    forward_s: float
    backward_s: float
    extra_s: float
    weight_s: float
    sync_s: float
    memory: MemoryBreakdown

    @property
    def microbatch_s(self) -> float:
        """Forward, both backward parts and recomputation of one micro-batch."""
        return self.forward_s + self.backward_s + self.extra_s + self.weight_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a plan is predicted to do."""

    breakdown: CostBreakdown
    ranks: tuple[RankEstimate, ...]
    model_flops: float
    bottleneck: int

    @property
    def step_s(self) -> float:
        """Predicted seconds of one optimizer step."""
        return self.breakdown.time_s

    @property
    def peak_memory_bytes(self) -> float:
        """Largest predicted peak over the ranks."""
        return max(rank.memory.peak_bytes for rank in self.ranks)


def machine_for(graph: ModelGraph, cluster: ClusterSpec, engine: EngineSpec, num_gpus: int) -> Machine:
    """The machine that `num_gpus` GPUs of `cluster` make under `engine`; ValueError if they fill no whole nodes.

    A model in float32 has no copies in other widths (weight, gradient, two moments: 16 bytes a parameter), and a
    CPU no context of a driver, no caching allocator and no Triton kernels.
    """
    if graph.dtype == "float32":
        engine = replace(engine, weight_bytes=4.0, grad_bytes=4.0, reduce_bytes=4.0, optimizer_bytes=8.0)
    if cluster.device.name == "cpu":
        engine = replace(engine, context_bytes=0.0, fragmentation_frac=0.0)
        engine = replace(engine, kernels=dict.fromkeys(engine.kernels, "torch"))
    return Machine(
        cluster=cluster,
        domains=cluster.domain_sizes(num_gpus),
        num_gpus=num_gpus,
        engine=engine,
        dtype=graph.dtype,
        dtype_bytes=graph.dtype_bytes,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Facts of every layer class of a model under one engine."""

    prologue: LayerFacts
    classes: tuple[LayerFacts, ...]
    epilogue: LayerFacts


def model_facts(graph: ModelGraph, engine: EngineSpec) -> ModelFacts:
    """Sum up every class once."""
    return ModelFacts(
        prologue=layer_facts(graph.prologue, engine),
        classes=tuple(layer_facts(c, engine) for c in graph.classes),
        epilogue=layer_facts(graph.epilogue, engine),
    )


def price_model(facts: ModelFacts, keys: Keys, machine: Machine) -> Prices:
    """Price every class of a model at K keys."""
    return Prices(
        prologue=scaled_to_measured(facts.prologue, keys, machine),
        classes=tuple(scaled_to_measured(f, keys, machine) for f in facts.classes),
        epilogue=scaled_to_measured(facts.epilogue, keys, machine),
    )


def step_flops(graph: ModelGraph, global_batch_size: int) -> float:
    """Model FLOPs of one step, forward and backward, causal attention halved, recomputation not counted."""
    layers = [graph.prologue, graph.epilogue]
    layers += [graph.classes[run.layer_class] for run in graph.runs for _ in range(run.count)]
    per_traced = sum(op.flops + op.backward_flops for layer in layers for op in layer.ops)
    return per_traced * global_batch_size / graph.traced_micro_batch_size


def spec_keys(*specs: PlanSpec) -> Keys:
    """The keys of plans, K = one each."""
    return Keys(
        tp=_column(s.tp for s in specs),
        sp=_column(s.sequence_parallel for s in specs),
        ulysses=_column(s.ulysses for s in specs),
        ring=_column(s.ring for s in specs),
        ep=_column(s.ep for s in specs),
        micro_batch_size=_column(s.micro_batch_size for s in specs),
        vocab_parallel=_column(s.vocab_parallel for s in specs),
        piped=_column(s.pp > 1 for s in specs),
        chunked_loss=_column(s.chunked_loss for s in specs),
    )


def spec_layout(*specs: PlanSpec) -> StateLayout:
    """The state layouts of plans, K = one each."""
    return StateLayout(
        tp=_column(s.tp for s in specs),
        cp=_column(s.cp for s in specs),
        ep=_column(s.ep for s in specs),
        dp_replicate=_column(s.dp_replicate for s in specs),
        dp_shard=_column(s.dp_shard for s in specs),
        zero=_column(s.zero_stage for s in specs),
        offload_optimizer=_column(s.offload_optimizer for s in specs),
    )


def _column(values: Iterable[float]) -> Array:
    return np.array([float(value) for value in values])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ranks:
    """Work of the P ranks of a plan: layers by (class, strategy), the ends, seconds of a micro-batch, sync."""

    counts_PCS: Array
    first: int
    last: int
    forward_s: Array
    backward_s: Array
    extra_s: Array
    weight_s: Array
    sync: StepSync


def estimate(graph: ModelGraph, machine: Machine, spec: PlanSpec, facts: ModelFacts | None = None) -> Estimate:
    """Predict step time and memory of `spec`.

    Assumes a valid spec (planner.check says what is wrong with one). Step = pipeline closed form over the
    ranks' micro-batch times + the slowest rank's once-per-step work (docs in pipeline.py and state.py).
    """
    return estimate_many(graph, machine, (spec,), facts)[0]


def estimate_many(
    graph: ModelGraph, machine: Machine, specs: Sequence[PlanSpec], facts: ModelFacts | None = None
) -> list[Estimate]:
    """`estimate` of every spec, with layers priced for all of them at once."""
    facts = facts or model_facts(graph, machine.engine)
    prices = price_model(facts, spec_keys(*specs), machine)
    pp, vpp = _column(s.pp for s in specs), _column(s.vpp for s in specs)
    m = _column(s.num_microbatches for s in specs)
    rates = build_rates(graph, prices, spec_layout(*specs), pp, vpp, m, machine)
    return [
        _estimate(graph, machine, spec, facts, prices.take(np.array([k])), rates.column(k))
        for k, spec in enumerate(specs)
    ]


def _estimate(
    graph: ModelGraph, machine: Machine, spec: PlanSpec, facts: ModelFacts, prices: Prices, rates: Rates
) -> Estimate:
    ranks = _rank_work(graph, spec, rates, machine)
    m = spec.num_microbatches
    fwd, bwd, wgt, extra = ranks.forward_s, ranks.backward_s, ranks.weight_s, ranks.extra_s
    pipe_s = float(pipeline_s(spec.schedule, fwd, bwd, wgt, m, spec.vpp, extra, _end_s(spec, ranks, rates)))
    total = fwd + bwd + wgt + extra
    bottleneck = int(np.argmax(total))
    sync_s = ranks.sync.total_s
    parts = _parts(ranks, bottleneck, prices, rates)
    parts["p2p"] = 2 * float(rates.p2p_s_K[0]) * spec.vpp
    sync = {f.name: float(getattr(ranks.sync, f.name)[np.argmax(sync_s)]) for f in fields(StepSync)}
    layers = (facts.prologue, *facts.classes, facts.epilogue)
    sources = component_evidence(layers, spec_keys(spec), machine)
    tree = _breakdown(parts, sync, m, pipe_s - m * float(total[bottleneck]), rates, sources)
    memory = _memory(ranks, rates, in_flight(spec.schedule, m, spec.pp, spec.vpp))
    return Estimate(
        breakdown=tree,
        ranks=tuple(
            RankEstimate(
                forward_s=float(fwd[p]),
                backward_s=float(bwd[p]),
                extra_s=float(extra[p]),
                weight_s=float(wgt[p]),
                sync_s=float(sync_s[p] + rates.step_s_K[0]),
                memory=memory[p],
            )
            for p in range(spec.pp)
        ),
        model_flops=step_flops(graph, spec.global_batch_size),
        bottleneck=bottleneck,
    )


def _rank_work(graph: ModelGraph, spec: PlanSpec, rates: Rates, machine: Machine) -> _Ranks:
    counts = np.zeros((spec.pp, len(graph.classes), len(STRATEGIES)))
    classes = graph.layer_classes
    for stage, (start, end) in enumerate(spec.stage_layers):
        for layer in range(start, end):
            counts[spec.rank_of(stage), classes[layer], _STRATEGY_INDEX[spec.layers[layer]]] += 1
    n_pc = counts.sum(axis=2)
    first, last = spec.rank_of(0), spec.rank_of(len(spec.stage_layers) - 1)
    p2p = float(rates.p2p_s_K[0]) * spec.vpp

    def total(of_layers: Array, name: str) -> Array:
        return _with_ends(n_pc @ of_layers[:, 0], rates, name, first, last)

    fwd, bwd = total(rates.forward_s_CK, "forward_s") + p2p, total(rates.backward_s_CK, "backward_s") + p2p
    wgt, extra = total(rates.weight_s_CK, "weight_s"), (counts * rates.extra_s_CSK[:, :, 0]).sum(axis=(1, 2))
    dense, routed = total(rates.dense_CK, "dense"), total(rates.routed_CK, "routed")
    sync = step_sync(dense, routed, fwd, bwd + wgt, rates.layout, machine)
    return _Ranks(
        counts_PCS=counts, first=first, last=last, forward_s=fwd, backward_s=bwd, extra_s=extra, weight_s=wgt,
        sync=sync,
    )  # fmt: skip


def _with_ends(body: Array, rates: Rates, name: str, first: int, last: int) -> Array:
    """`body` (P,) plus the `name` of the prologue on the first rank and of the epilogue on the last."""
    body[first] += float(getattr(rates.prologue, name)[0])
    body[last] += float(getattr(rates.epilogue, name)[0])
    return body


def _end_s(spec: PlanSpec, ranks: _Ranks, rates: Rates) -> Array:
    """By how much the chunk with the prologue or epilogue outlasts the other chunks of its rank, seconds, (P,).

    A chunk with fewer layers than those gives its end room: as many layers of the rank's mean time.
    """
    end = np.zeros_like(ranks.forward_s)
    layer_C = (rates.forward_s_CK + rates.backward_s_CK + rates.weight_s_CK)[:, 0]
    n_pc = ranks.counts_PCS.sum(axis=2)
    sizes = [b - a for a, b in spec.stage_layers]
    for stage, rank, part in ((0, ranks.first, rates.prologue), (len(sizes) - 1, ranks.last, rates.epilogue)):
        others = [size for k, size in enumerate(sizes) if k != stage and spec.rank_of(k) == rank]
        mean_s = float(n_pc[rank] @ layer_C) / max(float(n_pc[rank].sum()), 1.0)
        end[rank] += float(part.forward_s[0] + part.backward_s[0] + part.weight_s[0])
        end[rank] += (sizes[stage] - sum(others) / len(others)) * mean_s if others else 0.0
    return end


_COMPONENTS = {
    "gemm": ("gemm_f", "gemm_b", "gemm_w"),
    "attention": ("attention_f", "attention_b"),
    "memory_bound": ("memory_f", "memory_b", "accumulate_w"),
    "launch": ("launch_f", "launch_b"),
    "tp": ("tp_f", "tp_b"),
    "cp": ("cp_f", "cp_b"),
    "ep": ("ep_f", "ep_b"),
}


def _parts(ranks: _Ranks, p: int, prices: Prices, rates: Rates) -> dict[str, float]:
    """Seconds per micro-batch of rank `p` by component."""
    counts = ranks.counts_PCS[p]
    n_c = counts.sum(axis=1)
    ends = [rates.prologue] * (p == ranks.first) + [rates.epilogue] * (p == ranks.last)
    end_prices = [prices.prologue] * (p == ranks.first) + [prices.epilogue] * (p == ranks.last)
    weighted = [*zip(n_c, prices.classes, strict=True), *((1.0, price) for price in end_prices)]
    parts = {
        name: float(sum(n * getattr(price, field)[0] for n, price in weighted for field in names))
        for name, names in _COMPONENTS.items()
    }
    zero = n_c @ (rates.zero_f_CK[:, 0] + rates.zero_b_CK[:, 0])
    parts["zero"] = float(zero) + sum(float(e.zero_f[0] + e.zero_b[0]) for e in ends)
    redo = np.array([[price.redo[kind][0] for kind in _RECOMPUTE_INDEX] for price in prices.classes])
    parts["recompute"] = float((counts * redo).sum())
    parts["offload"] = float(ranks.extra_s[p]) - parts["recompute"]
    return parts


def _breakdown(
    parts: dict[str, float],
    sync: dict[str, float],
    m: int,
    bubble_s: float,
    rates: Rates,
    sources: Mapping[str, Source],
) -> CostBreakdown:
    def part(name: str) -> CostBreakdown:
        return leaf(name, m * parts[name], sources[name])

    link = sources["link"]
    return node(
        "step",
        node("compute", *(part(name) for name in ("gemm", "attention", "memory_bound", "launch", "recompute"))),
        node(
            "exposed_comm",
            *(leaf(name, m * parts[name], link) for name in ("tp", "cp", "ep", "p2p")),
            leaf("zero_per_microbatch", m * parts["zero"], link),
            leaf("grad_reduce", sync["reduce_s"], link),
            leaf("param_gather", sync["gather_s"], link),
            leaf("step_sync", float(rates.step_s_K[0]), link),
        ),
        leaf("bubble", bubble_s, Source.MODELLED),
        node(
            "optimizer",
            leaf("update", sync["optimizer_s"], sources["optimizer"]),
            leaf("host_offload", sync["host_s"], Source.MODELLED),
        ),
        leaf("activation_offload", m * parts["offload"], Source.MODELLED),
    )


def _memory(ranks: _Ranks, rates: Rates, flight: Array) -> tuple[MemoryBreakdown, ...]:
    """Peaks of the ranks: states + in-flight activations + the largest transient (SYSTEMS 2.4's ledger)."""
    counts, n_pc = ranks.counts_PCS, ranks.counts_PCS.sum(axis=2)
    first, last = ranks.first, ranks.last
    states = _with_ends(n_pc @ rates.state_bytes_CK[:, 0], rates, "state_bytes", first, last)
    host = _with_ends(n_pc @ rates.host_state_bytes_CK[:, 0], rates, "host_bytes", first, last)
    host = host + flight * (counts * rates.host_bytes_CSK[:, :, 0]).sum(axis=(1, 2))
    acts = flight * (counts * rates.activation_bytes_CSK[:, :, 0]).sum(axis=(1, 2))
    work = np.max(np.where(counts > 0, rates.work_bytes_CSK[:, :, 0], 0.0), axis=(1, 2), initial=0.0)
    acts[first] += flight[first] * float(rates.prologue.activation_bytes[0])
    acts[last] += float(rates.epilogue.activation_bytes[0])
    work[last] += float(rates.epilogue.work_bytes[0])
    return tuple(
        MemoryBreakdown(
            states_bytes=float(states[p]),
            activations_bytes=float(acts[p]),
            work_bytes=float(work[p]),
            fixed_bytes=float(rates.fixed_bytes_K[0]),
            host_bytes=float(host[p]),
            in_flight=float(flight[p]),
        )
        for p in range(len(flight))
    )
