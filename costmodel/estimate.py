"""estimate(graph, machine, spec): step time and memory of one plan, as a tree that sums exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.costmodel import compute
from planner.costmodel.cost import CostBreakdown, MemoryBreakdown, leaf, node
from planner.costmodel.engine import EngineSpec
from planner.costmodel.evidence import Source, weakest
from planner.costmodel.facts import LayerFacts, layer_facts
from planner.costmodel.graph import ModelGraph
from planner.costmodel.hardware import ClusterSpec
from planner.costmodel.pipeline import in_flight, pipeline_s
from planner.costmodel.price import Array, Keys, LayerPrice, Machine, price_layer
from planner.costmodel.rates import EndRates, Prices, Rates, build_rates
from planner.costmodel.state import StateLayout, StepSync, step_sync
from planner.costmodel.strategy import RECOMPUTE_KINDS, STRATEGIES, PlanSpec


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
    """The machine that `num_gpus` GPUs of `cluster` make under `engine`; ValueError if they fill no whole nodes."""
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
        prologue=price_layer(facts.prologue, keys, machine),
        classes=tuple(price_layer(f, keys, machine) for f in facts.classes),
        epilogue=price_layer(facts.epilogue, keys, machine),
    )


def step_flops(graph: ModelGraph, global_batch_size: int) -> float:
    """Model FLOPs of one step, forward and backward, causal attention halved, recomputation not counted."""
    layers = [graph.prologue, graph.epilogue]
    layers += [graph.classes[run.layer_class] for run in graph.runs for _ in range(run.count)]
    per_traced = sum(op.flops + op.backward_flops for layer in layers for op in layer.ops)
    return per_traced * global_batch_size / graph.traced_micro_batch_size


def spec_keys(spec: PlanSpec) -> Keys:
    """The K = 1 key of a plan."""

    def one(value: float) -> Array:
        return np.array([float(value)])

    return Keys(
        tp=one(spec.tp),
        sp=one(spec.sequence_parallel),
        ulysses=one(spec.ulysses),
        ring=one(spec.ring),
        ep=one(spec.ep),
        micro_batch_size=one(spec.micro_batch_size),
        vocab_parallel=one(spec.vocab_parallel),
    )


def spec_layout(spec: PlanSpec) -> StateLayout:
    """The K = 1 state layout of a plan."""

    def one(value: float) -> Array:
        return np.array([float(value)])

    return StateLayout(
        tp=one(spec.tp),
        cp=one(spec.cp),
        ep=one(spec.ep),
        dp_replicate=one(spec.dp_replicate),
        dp_shard=one(spec.dp_shard),
        zero=one(spec.zero_stage),
        offload_optimizer=one(spec.offload_optimizer),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rank:
    """Work of one rank: layers by (class, strategy), which ends it holds, and its seconds by component."""

    counts_CS: Array
    first: bool
    last: bool
    parts: dict[str, float]
    forward_s: float
    backward_s: float
    extra_s: float
    weight_s: float
    sync: StepSync


def estimate(graph: ModelGraph, machine: Machine, spec: PlanSpec, facts: ModelFacts | None = None) -> Estimate:
    """Predict step time and memory of `spec`.

    Assumes a valid spec (planner.check says what is wrong with one). Step = pipeline closed form over the
    ranks' micro-batch times + the slowest rank's once-per-step work (docs in pipeline.py and state.py).
    """
    facts = facts or model_facts(graph, machine.engine)
    prices = price_model(facts, spec_keys(spec), machine)
    pp, vpp = np.array([float(spec.pp)]), np.array([float(spec.vpp)])
    rates = build_rates(graph, prices, spec_layout(spec), pp, vpp, machine)
    ranks = [_rank_work(graph, spec, rank, prices, rates, machine) for rank in range(spec.pp)]
    m = spec.num_microbatches
    names = ("forward_s", "backward_s", "weight_s", "extra_s")
    fwd, bwd, wgt, extra = (np.array([getattr(r, name) for r in ranks]) for name in names)
    pipe_s = float(pipeline_s(spec.schedule, fwd, bwd, wgt, m, spec.vpp, extra))
    flight = in_flight(spec.schedule, m, spec.pp, spec.vpp)
    total = fwd + bwd + wgt + extra
    bottleneck = int(np.argmax(total))
    slowest = max(ranks, key=lambda r: float(r.sync.total_s[0]))
    tree = _breakdown(ranks[bottleneck], slowest, m, pipe_s - m * float(total[bottleneck]), rates, machine)
    return Estimate(
        breakdown=tree,
        ranks=tuple(
            RankEstimate(
                forward_s=r.forward_s,
                backward_s=r.backward_s,
                extra_s=r.extra_s,
                weight_s=r.weight_s,
                sync_s=float(r.sync.total_s[0] + rates.step_s_K[0]),
                memory=_memory(r, rates, float(flight[k])),
            )
            for k, r in enumerate(ranks)
        ),
        model_flops=step_flops(graph, spec.global_batch_size),
        bottleneck=bottleneck,
    )


def _rank_work(
    graph: ModelGraph, spec: PlanSpec, rank: int, prices: Prices, rates: Rates, machine: Machine
) -> _Rank:
    counts = np.zeros((len(graph.classes), len(STRATEGIES)))
    classes = graph.layer_classes
    for layer in spec.rank_layers(rank):
        counts[classes[layer], STRATEGIES.index(spec.layers[layer])] += 1
    n_c = counts.sum(axis=1)
    first = rank == spec.rank_of(0)
    last = rank == spec.rank_of(len(spec.stage_layers) - 1)
    ends = [rates.prologue] * first + [rates.epilogue] * last
    end_prices = [prices.prologue] * first + [prices.epilogue] * last
    p2p = float(rates.p2p_s_K[0]) * spec.vpp
    fwd = float(n_c @ rates.forward_s_CK[:, 0]) + sum(float(e.forward_s[0]) for e in ends) + p2p
    plain_b = float(n_c @ rates.backward_s_CK[:, 0]) + sum(float(e.backward_s[0]) for e in ends) + p2p
    extra = float((counts * rates.extra_s_CSK[:, :, 0]).sum())
    wgt = float(n_c @ rates.weight_s_CK[:, 0]) + sum(float(e.weight_s[0]) for e in ends)
    dense = n_c @ rates.dense_CK + sum(e.dense for e in ends)
    routed = n_c @ rates.routed_CK + sum(e.routed for e in ends)
    window_b = np.array([plain_b + wgt])
    sync = step_sync(dense, routed, np.array([fwd]), window_b, rates.layout, machine)
    parts = _parts(n_c, counts, prices, end_prices, rates, ends)
    parts["p2p"] = 2 * p2p
    return _Rank(
        counts_CS=counts, first=first, last=last, parts=parts, forward_s=fwd,
        backward_s=plain_b, extra_s=extra, weight_s=wgt, sync=sync,
    )  # fmt: skip


_COMPONENTS = {
    "gemm": ("gemm_f", "gemm_b", "gemm_w"),
    "attention": ("attention_f", "attention_b"),
    "memory_bound": ("memory_f", "memory_b"),
    "launch": ("launch_f", "launch_b"),
    "tp": ("tp_f", "tp_b"),
    "cp": ("cp_f", "cp_b"),
    "ep": ("ep_f", "ep_b"),
}


def _parts(
    n_c: Array, counts: Array, prices: Prices, end_prices: list[LayerPrice], rates: Rates, ends: list[EndRates]
) -> dict[str, float]:
    """Seconds per micro-batch of one rank by component."""
    weighted = [*zip(n_c, prices.classes, strict=True), *((1.0, price) for price in end_prices)]
    parts = {
        name: float(sum(n * getattr(price, field)[0] for n, price in weighted for field in names))
        for name, names in _COMPONENTS.items()
    }
    zero = n_c @ (rates.zero_f_CK[:, 0] + rates.zero_b_CK[:, 0])
    parts["zero"] = float(zero) + sum(float(e.zero_f[0] + e.zero_b[0]) for e in ends)
    extra = counts * rates.extra_s_CSK[:, :, 0]
    redo = np.array([[p.redo[RECOMPUTE_KINDS.index(s.recompute)][0] for s in STRATEGIES] for p in prices.classes])
    parts["recompute"] = float((counts * redo).sum())
    parts["offload"] = float(extra.sum()) - parts["recompute"]
    return parts


def _breakdown(
    rank: _Rank, slowest: _Rank, m: int, bubble_s: float, rates: Rates, machine: Machine
) -> CostBreakdown:
    gemm = compute.gemm_evidence(machine.cluster.device, machine.dtype)
    modelled = Source.MODELLED
    link = weakest(fit.evidence for tier in machine.cluster.tiers for fit in tier.collectives.values())
    part = {name: m * value for name, value in rank.parts.items()}
    sync = slowest.sync
    return node(
        "step",
        node(
            "compute",
            leaf("gemm", part["gemm"], gemm),
            leaf("attention", part["attention"], modelled),
            leaf("memory_bound", part["memory_bound"], modelled),
            leaf("launch", part["launch"], modelled),
            leaf("recompute", part["recompute"], modelled),
        ),
        node(
            "exposed_comm",
            leaf("tp", part["tp"], link),
            leaf("cp", part["cp"], link),
            leaf("ep", part["ep"], link),
            leaf("p2p", part["p2p"], link),
            leaf("zero_per_microbatch", part["zero"], link),
            leaf("grad_reduce", float(sync.reduce_s[0]), link),
            leaf("param_gather", float(sync.gather_s[0]), link),
            leaf("step_sync", float(rates.step_s_K[0]), link),
        ),
        leaf("bubble", bubble_s, modelled),
        node(
            "optimizer",
            leaf("update", float(sync.optimizer_s[0]), modelled),
            leaf("host_offload", float(sync.host_s[0]), modelled),
        ),
        leaf("activation_offload", part["offload"], modelled),
    )


def _memory(rank: _Rank, rates: Rates, flight: float) -> MemoryBreakdown:
    """Peak of one rank: states + in-flight activations + the largest transient (SYSTEMS 2.4's ledger)."""
    counts, n_c = rank.counts_CS, rank.counts_CS.sum(axis=1)
    ends = [rates.prologue] * rank.first + [rates.epilogue] * rank.last
    states = float(n_c @ rates.state_bytes_CK[:, 0]) + sum(float(e.state_bytes[0]) for e in ends)
    host = float(n_c @ rates.host_state_bytes_CK[:, 0]) + sum(float(e.host_bytes[0]) for e in ends)
    acts = flight * float((counts * rates.activation_bytes_CSK[:, :, 0]).sum())
    host += flight * float((counts * rates.host_bytes_CSK[:, :, 0]).sum())
    work = float(np.max(np.where(counts > 0, rates.work_bytes_CSK[:, :, 0], 0.0), initial=0.0))
    if rank.first:
        acts += flight * float(rates.prologue.activation_bytes[0])
    if rank.last:
        acts += float(rates.epilogue.activation_bytes[0])
        work += float(rates.epilogue.work_bytes[0])
    return MemoryBreakdown(
        states_bytes=states,
        activations_bytes=acts,
        work_bytes=work,
        fixed_bytes=float(rates.fixed_bytes_K[0]),
        host_bytes=host,
        in_flight=flight,
    )
