"""What the cost model says one pipeline rank holds and sends, in the units that a dry run counts."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

from planner.costmodel.engine import EngineSpec
from planner.costmodel.estimate import machine_for, model_facts, price_model, spec_keys
from planner.costmodel.expert_facts import beside_experts, is_cut
from planner.costmodel.facts import LayerFacts
from planner.costmodel.graph import LayerClass, OpKind, TensorLayout, TpCut
from planner.costmodel.keys import Keys, Machine
from planner.costmodel.layer_comm import LOSS_STATS_BYTES, attention_bytes
from planner.costmodel.price import LayerPrice
from planner.costmodel.strategy import RECOMPUTE_KINDS, LayerStrategy, PlanSpec
from planner.plan import Plan

_LOSS_BYTES = 4  # rows of the loss are float32
_COUNT_BYTES = 8  # rows for each expert, int64
_SHARDED = (TpCut.COLUMN, TpCut.ROW, TpCut.VOCAB, TpCut.HEAD)


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """Per-rank parameters and bytes; `notes` say what the prediction leaves out on purpose."""

    num_params: float
    shard_params: float
    activation_bytes: float
    sent_bytes: dict[str, float]
    calls: dict[str, int]  # messages of context and expert parallelism
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A layer or an end of the model on one rank."""

    layer: LayerClass
    facts: LayerFacts
    price: LayerPrice
    strategy: LayerStrategy


_END = LayerStrategy(recompute="none")


def _parts(plan: Plan, rank: int, machine: Machine) -> list[_Part]:
    graph, spec = plan.inputs.graph, plan.decisions
    facts = model_facts(graph, plan.inputs.engine)
    prices = price_model(facts, spec_keys(spec), machine)
    kinds = graph.layer_classes
    parts = [
        _Part(layer=graph.classes[c], facts=facts.classes[c], price=prices.classes[c], strategy=spec.layers[i])
        for i, c in ((i, kinds[i]) for i in spec.rank_layers(rank))
    ]
    if rank == spec.rank_of(0):
        parts.append(_Part(layer=graph.prologue, facts=facts.prologue, price=prices.prologue, strategy=_END))
    if rank == spec.rank_of(len(spec.stage_layers) - 1):
        parts.append(_Part(layer=graph.epilogue, facts=facts.epilogue, price=prices.epilogue, strategy=_END))
    return parts


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


def _layer_bytes(
    facts: LayerFacts, spec: PlanSpec, scale: float, recompute: str, engine: EngineSpec
) -> dict[str, float]:
    """Messages of a layer's TP communication in one micro-batch (costmodel.price._tensor_parallel)."""
    sent: dict[str, float] = defaultdict(float)
    if spec.tp == 1:
        return sent
    rows = sum(facts.row_bytes) + (facts.vocab_row_bytes if spec.vocab_parallel else 0.0)
    columns = sum(facts.gathered_bytes) + (facts.vocab_gathered_bytes if spec.vocab_parallel else 0.0)
    skipped = facts.last_sum_bytes if engine.recompute_stops_early else 0.0
    redone_rows = rows - skipped if recompute == "full" else 0.0
    gathers_again = _gathers_again(recompute, engine)
    if spec.sequence_parallel:
        sent["all_gather"] += scale * (columns + gathers_again * columns + rows)
        sent["reduce_scatter"] += scale * (rows + redone_rows + columns)
    else:
        sent["all_reduce"] += scale * (rows + redone_rows + columns)
    if spec.vocab_parallel:
        sent["all_gather"] += scale * LOSS_STATS_BYTES * facts.loss_rows * spec.tp
    return sent


def _gathers_again(recompute: str, engine: EngineSpec) -> bool:
    return recompute == "full" or recompute == "selective" and engine.selective_gathers_again


def _shared_bytes(layer: LayerClass) -> float:
    """What TP ranks need whole beside the inputs of GEMMs, and whose gradient they sum: bytes at the traced shape.

    The weights of a router outside of its experts' block, and what all heads share of what each has its own of
    (the rotary part of the keys in latent attention).
    """
    sizes = [layer.activations[a] for a in _combined(layer)[1:2]]
    sizes += [
        layer.activations[a] for op in layer.ops if op.cut is TpCut.INNER for a in op.inputs
        if layer.activations[a].layout is TensorLayout.OUTER and layer.activations[a].scales_with_batch
    ]  # fmt: skip
    return float(sum(a.num_bytes for a in sizes))


def _combined(layer: LayerClass) -> tuple[int, ...]:
    """(results, weights, choice) that the combination of experts reads, if they come from outside of the block."""
    if not is_cut(layer) or beside_experts(layer):
        return ()
    return next(op.inputs for op in reversed(layer.ops) if op.kind is OpKind.PERMUTE)


def _small_bytes(layer: LayerClass, spec: PlanSpec, scale: float, gathers_again: bool) -> dict[str, float]:
    """Messages over TP of one micro-batch that the cost model leaves out."""
    if spec.tp == 1:
        return {}
    shared = scale * _shared_bytes(layer)
    if not spec.sequence_parallel:
        return {"all_reduce": shared}
    chosen = scale * sum(layer.activations[a].num_bytes for a in _combined(layer)[2:])
    return {"all_gather": (1 + gathers_again) * (shared + chosen), "reduce_scatter": shared}


def _exchanges(part: _Part, keys: Keys, machine: Machine) -> list[tuple[str, float]]:
    """(kind, bytes) of each message of context and expert parallelism in one micro-batch (price._context_parallel)."""
    ulysses, ring, ep = (int(n[0]) for n in (keys.ulysses, keys.ring, keys.ep))
    again = part.strategy.recompute == "full"
    found: list[tuple[str, float]] = []
    for op in part.facts.attentions:
        assert op.attention is not None
        a = op.attention
        (before, after), hop = attention_bytes(a, keys, machine)
        keys_part = a.head_dim_qk / (a.head_dim_qk + a.head_dim_v)
        if ulysses > 1:
            sizes = (before - hop, hop * keys_part, hop * (1 - keys_part), after)
            found += [("all_to_all", float(n[0])) for n in sizes] * (2 + again)
        found += [("send_recv", float(hop[0]))] * ((ring - 1) * (3 + again))
    if ep > 1:
        rows = [("all_to_all", num_bytes * float(keys.tokens[0])) for num_bytes in part.facts.permute_bytes]
        counts = [("all_to_all", float(part.layer.num_experts * _COUNT_BYTES))] * bool(rows)
        found += rows * (2 + again) + counts * (1 + again)
    return found


def predicted_rank(plan: Plan, rank: int, uneven: tuple[float, float] = (0.0, 0.0)) -> Predicted:
    """Parameters, activations and messages of pipeline rank `rank`, summed over its layers and ends.

    `uneven`: parameters that ZeRO adds where rows do not divide over its ranks, in messages and on the first rank.
    """
    graph, spec, inputs = plan.inputs.graph, plan.decisions, plan.inputs
    machine = machine_for(graph, inputs.cluster, inputs.engine, inputs.num_gpus)
    parts, keys, m = _parts(plan, rank, machine), spec_keys(spec), spec.num_microbatches
    scale = spec.micro_batch_size / graph.traced_micro_batch_size / spec.cp
    sent: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    dense = routed = kept = 0.0
    for part in parts:
        d, r = _held(part.layer, spec)
        dense, routed = dense + d, routed + r
        for kind, num_bytes in _layer_bytes(part.facts, spec, scale, part.strategy.recompute, inputs.engine).items():
            sent[kind] += m * num_bytes
        again = _gathers_again(part.strategy.recompute, inputs.engine)
        for kind, num_bytes in _small_bytes(part.layer, spec, scale, again).items():
            sent[kind] += m * num_bytes
        for kind, num_bytes in _exchanges(part, keys, machine):
            sent[kind] += m * num_bytes
            calls[kind] += m
        if not part.strategy.offload_activations:
            kept += float(part.price.saved[RECOMPUTE_KINDS.index(part.strategy.recompute)][0])
    _zero_bytes(sent, dense + uneven[0], routed, plan)
    shard = spec.dp_shard * spec.cp if spec.zero_stage else 1
    _unpriced(sent, [part.layer for part in parts], rank == spec.rank_of(len(spec.stage_layers) - 1), shard, plan)
    return Predicted(
        num_params=dense + routed,
        shard_params=dense / shard + routed / max(shard / spec.ep, 1) + uneven[1],
        activation_bytes=kept,
        sent_bytes=dict(sent),
        calls=dict(calls),
        notes=(*_notes(plan), *_padding(uneven)),
    )


def _zero_bytes(sent: dict[str, float], dense: float, routed: float, plan: Plan) -> None:
    """Messages of ZeRO in one step (costmodel.state): whole tensors, weights and gradients in the engine's bytes."""
    spec, engine, m = plan.decisions, plan.inputs.engine, plan.decisions.num_microbatches
    ranks = spec.dp * spec.cp
    for params, ep in ((dense, 1), (routed, spec.ep)):
        shard = max(spec.dp_shard * spec.cp // ep, 1) if spec.zero_stage else 1
        if shard > 1:
            sent["all_gather"] += params * engine.weight_bytes * (2 * m if spec.zero_stage == 3 else 1)
            sent["reduce_scatter"] += params * engine.grad_bytes * (m if spec.zero_stage >= 2 else 1)
        if ranks > ep * shard:
            times = m if spec.zero_stage >= 2 else 1
            sent["all_reduce"] += times * params * engine.grad_bytes / shard


def _unpriced(sent: dict[str, float], layers: list[LayerClass], last: bool, shard: int, plan: Plan) -> None:
    """Small messages of the runtime that the cost model leaves out: gradients of norms and routers."""
    spec, graph, m = plan.decisions, plan.inputs.graph, plan.decisions.num_microbatches
    if not spec.sequence_parallel:
        routers = sum(map(_router_params, layers)) if spec.tp > 1 else 0
        sent["all_reduce"] += routers / shard * plan.inputs.engine.grad_bytes
        return
    if last and not spec.vocab_parallel:
        sent["all_reduce"] += m * _LOSS_BYTES
    # A table that is not read by tokens (learned positions) adds whole rows: their gradient is gathered instead.
    tables = [
        op for layer in layers for op in layer.ops
        if op.kind is OpKind.EMBEDDING and not any(layer.activations[a].scales_with_batch for a in op.inputs)
    ]  # fmt: skip
    rows = [layer.activations[a].num_bytes for layer in layers for op in layer.ops if op in tables for a in op.outputs]
    sent["all_gather"] += m * sum(rows) / spec.cp
    whole = sum(
        group.num_params for layer in layers for group in layer.params
        if group.trainable and not group.routed
        and (group.cut not in _SHARDED or group.cut is TpCut.VOCAB and not spec.vocab_parallel)
    ) - sum(rows) / graph.dtype_bytes  # fmt: skip
    sent["all_reduce"] += whole / shard * plan.inputs.engine.grad_bytes


def _router_params(layer: LayerClass) -> int:
    """Parameters of the router and gates of a block that routes by itself: TP ranks have parts of their gradient."""
    if not is_cut(layer) or not beside_experts(layer):
        return 0
    gemms = [op.gemm for op in layer.ops if op.gemm is not None and not op.routed]
    return sum(g.n * g.k for g in gemms if g.n in (1, layer.num_experts))


def _padding(uneven: tuple[float, float]) -> tuple[str, ...]:
    if not any(uneven):
        return ()
    return (f"rows that do not divide over ZeRO's ranks are padded: {uneven[0]:,.0f} parameters more in its messages, "
            f"{uneven[1]:,.0f} more on the first rank",)  # fmt: skip


def _notes(plan: Plan) -> tuple[str, ...]:
    spec = plan.decisions
    found = []
    if spec.vocab_parallel:
        found.append("all_gather includes 3 numbers a token and rank for the loss")
    if spec.cp > 1 and any(x.recompute != "full" for x in spec.layers):
        found.append("context parallelism keeps attention's output before and after it is exchanged or laid out anew")
    if spec.ep > 1:
        found.append("expert parallelism: routing taken as balanced; all_to_all includes the rows of each expert")
    routed = [group for layer in plan.inputs.graph.classes for group in layer.params if group.routed]
    if any(part.isdecimal() for group in routed for name in group.names for part in name.split(".")):
        found.append("experts in a list: what their block's own code keeps around them is not traced (index_add_ keeps "
                     "the rows that it adds)")  # fmt: skip
    if spec.tp > 1 and any(is_cut(layer) or _shared_bytes(layer) for layer in plan.inputs.graph.classes):
        found.append("messages over tp include a router's weights and choice, or its gradient, and what attention "
                     "heads share, which is not priced")  # fmt: skip
    if spec.sequence_parallel:
        found.append("all_reduce includes the gradients of uncut parameters over tp once a step, which is not priced")
    return tuple(found)
