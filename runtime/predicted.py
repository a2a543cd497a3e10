"""What the cost model says one pipeline rank holds and sends, in the units that a dry run counts."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from planner.costmodel.estimate import estimate, machine_for, model_facts
from planner.costmodel.facts import LayerFacts
from planner.costmodel.graph import LayerClass, TpCut
from planner.costmodel.strategy import PlanSpec
from planner.plan import Plan

_LOSS_BYTES = 4  # rows of the loss are float32
_SHARDED = (TpCut.COLUMN, TpCut.ROW, TpCut.VOCAB, TpCut.HEAD)


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """Per-rank parameters and bytes; `notes` say what the prediction leaves out on purpose."""

    num_params: float
    shard_params: float
    activation_bytes: float
    sent_bytes: dict[str, float]
    notes: tuple[str, ...]


def _held(layer: LayerClass, spec: PlanSpec) -> tuple[float, float]:
    """(dense, routed) trainable parameters of a layer on one rank before ZeRO."""
    dense = routed = 0.0
    for group in layer.params:
        tp = spec.tp if group.cut in _SHARDED and (group.cut is not TpCut.VOCAB or spec.vocab_parallel) else 1
        if group.trainable and group.routed:
            routed += group.num_params / tp / spec.ep
        elif group.trainable:
            dense += group.num_params / tp
    return dense, routed


def _layer_bytes(facts: LayerFacts, spec: PlanSpec, scale: float, redo: bool) -> dict[str, float]:
    """Messages of a layer's TP communication in one micro-batch (costmodel.price._tensor_parallel)."""
    sent: dict[str, float] = defaultdict(float)
    if spec.tp == 1:
        return sent
    rows = sum(facts.row_bytes) + (facts.vocab_row_bytes if spec.vocab_parallel else 0.0)
    columns = sum(facts.gathered_bytes) + (facts.vocab_gathered_bytes if spec.vocab_parallel else 0.0)
    # Recomputation stops at the last tensor that backward needs, which is before the last row-parallel sum.
    redone_rows = sum(facts.row_bytes[:-1]) if redo else 0.0
    redone_columns = columns if redo else 0.0
    if spec.sequence_parallel:
        sent["all_gather"] += scale * (columns + redone_columns + rows)
        sent["reduce_scatter"] += scale * (rows + redone_rows + columns)
    else:
        sent["all_reduce"] += scale * (rows + redone_rows + columns)
    return sent


def predicted_rank(plan: Plan, rank: int) -> Predicted:
    """Parameters, activations and messages of pipeline rank `rank`, summed over its layers and ends."""
    graph, spec, inputs = plan.inputs.graph, plan.decisions, plan.inputs
    facts = model_facts(graph, inputs.engine)
    scale = spec.micro_batch_size / graph.traced_micro_batch_size / spec.cp
    kinds = graph.layer_classes
    parts = [
        (graph.classes[kinds[i]], facts.classes[kinds[i]], spec.layers[i].recompute == "full")
        for i in spec.rank_layers(rank)
    ]
    if rank == spec.rank_of(0):
        parts.append((graph.prologue, facts.prologue, False))
    if rank == spec.rank_of(len(spec.stage_layers) - 1):
        parts.append((graph.epilogue, facts.epilogue, False))
    micro: dict[str, float] = defaultdict(float)
    dense = routed = 0.0
    for layer, fact, redo in parts:
        d, r = _held(layer, spec)
        dense, routed = dense + d, routed + r
        for kind, num_bytes in _layer_bytes(fact, spec, scale, redo).items():
            micro[kind] += num_bytes
    m = spec.num_microbatches
    sent = defaultdict(float, {kind: m * num_bytes for kind, num_bytes in micro.items()})
    _zero_bytes(sent, dense, plan)
    shard = spec.dp_shard * spec.cp if spec.zero_stage else 1
    _unpriced(sent, [layer for layer, _, _ in parts], rank == spec.rank_of(len(spec.stage_layers) - 1), shard, plan)
    memory = estimate(
        graph, machine_for(graph, inputs.cluster, inputs.engine, inputs.num_gpus), spec, facts
    ).ranks[rank].memory  # fmt: skip
    return Predicted(
        num_params=dense + routed,
        shard_params=dense / shard + routed / max(shard / spec.ep, 1),
        activation_bytes=memory.activations_bytes / memory.in_flight,
        sent_bytes=dict(sent),
        notes=_notes(plan),
    )


def _zero_bytes(sent: dict[str, float], dense: float, plan: Plan) -> None:
    """Messages of ZeRO in one step (costmodel.state): whole tensors, weights and gradients in the engine's bytes."""
    spec, engine, m = plan.decisions, plan.inputs.engine, plan.decisions.num_microbatches
    shard = spec.dp_shard * spec.cp
    replicas = spec.dp * spec.cp if spec.zero_stage == 0 else spec.dp_replicate
    if spec.zero_stage and shard > 1:
        sent["all_gather"] += dense * engine.weight_bytes * (2 * m if spec.zero_stage == 3 else 1)
        sent["reduce_scatter"] += dense * engine.grad_bytes * (m if spec.zero_stage >= 2 else 1)
    if replicas > 1:
        times = m if spec.zero_stage >= 2 else 1
        sent["all_reduce"] += times * dense * engine.grad_bytes / (shard if spec.zero_stage else 1)


def _unpriced(sent: dict[str, float], layers: list[LayerClass], last: bool, shard: int, plan: Plan) -> None:
    """Small messages of the runtime that the cost model leaves out: the loss's row sums, gradients of norms."""
    spec, graph, m = plan.decisions, plan.inputs.graph, plan.decisions.num_microbatches
    tokens = spec.micro_batch_size * graph.traced_seq_len / spec.cp
    if last and spec.vocab_parallel:
        sent["all_gather"] += m * tokens * 3 * _LOSS_BYTES * spec.tp
    if not spec.sequence_parallel:
        return
    if last and not spec.vocab_parallel:
        sent["all_reduce"] += m * _LOSS_BYTES
    whole = sum(
        group.num_params for layer in layers for group in layer.params
        if group.trainable and not group.routed
        and (group.cut not in _SHARDED or group.cut is TpCut.VOCAB and not spec.vocab_parallel)
    )  # fmt: skip
    sent["all_reduce"] += whole / shard * plan.inputs.engine.grad_bytes


def _notes(plan: Plan) -> tuple[str, ...]:
    spec = plan.decisions
    found = []
    if spec.vocab_parallel:
        found.append("all_gather includes 3 numbers a token and rank for the loss, which the cost model does not price")
    if spec.cp > 1:
        found.append("messages of context parallelism are not compared yet")
    if spec.ep > 1:
        found.append("messages of expert parallelism depend on the routing and are not compared")
    if spec.sequence_parallel:
        found.append("all_reduce includes the gradients of uncut parameters over tp once a step, which is not priced")
    return tuple(found)
