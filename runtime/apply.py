"""parallelize(model, spec, graph): apply a plan to a model on this rank.

In this order: the dry pass settles TP cuts, a trial those of experts -> parameters become local parts -> FSDP/ZeRO ->
layers get their rules and recomputation -> pipeline stages. Every rank calls it with the same model and plan.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from planner.costmodel.graph import ModelGraph
from planner.costmodel.strategy import PlanSpec
from planner.plan import Plan
from planner.runtime import (
    chosen,
    expert_cuts,
    experts,
    gated,
    head,
    norms,
    rules_kernels,
    rules_math,
    rules_shape,
    zero,
)
from planner.runtime import cuts as cutting
from planner.runtime.chain import Chain
from planner.runtime.deferred import Tape
from planner.runtime.errors import RuntimePlanError
from planner.runtime.layers import adapt, plain_edge, slots_of
from planner.runtime.mesh import Mesh
from planner.runtime.optimizer import AdamWConfig, Owned, ShardedAdamW
from planner.runtime.packing import pack
from planner.runtime.parallel import Loss, Parallel, logits_of, next_token_loss
from planner.runtime.pipeline import StageModule, build_schedule, stages_of
from planner.runtime.rules import ShardMode
from planner.runtime.sharded import Context
from planner.runtime.support import COMPILED_EXPERTS, groups_unsupported, unsupported

assert rules_math and rules_shape and rules_kernels  # importing them registers the rules


def parallelize(
    model: nn.Module,
    spec: PlanSpec,
    graph: ModelGraph,
    *,
    seq_len: int | None = None,
    device: torch.device | None = None,
    loss: Loss = next_token_loss,
    input_name: str = "",
    precision: torch.dtype | None = None,
    adamw: AdamWConfig | None = None,
    packs: bool = False,
    tape: Tape | None = None,
    compiled: bool = False,
) -> Parallel:
    """Apply `spec` to `model`, whose parameters hold the whole model's values (equal on every rank).

    The model is changed in place. `seq_len`: tokens per sequence, the graph's by default. `precision`: dtype of
    parameters in forward and backward when it is not that of the model. `packs`: micro-batches will be packed documents
    on groups of data ranks (groups.py). `tape`: has the parameters' values when `model` is one of deferred.build.
    `compiled`: every layer's forward goes through torch.compile. RuntimePlanError in one line when the plan does not
    fit the model, the world or the runtime.
    """
    reason = unsupported(spec, compiled) or (groups_unsupported(spec, compiled) if packs else None)
    if reason is not None:
        raise RuntimePlanError(f"this plan is not executable: {reason}")
    device = device or torch.device("cpu")
    mesh = Mesh(spec, device.type)
    ctx = Context(
        spec=spec, tp_rank=mesh.position["tp"], ring_rank=mesh.position["ring"],
        ulysses_rank=mesh.position["ulysses"], tp=mesh.tp, ring=mesh.ring, ulysses=mesh.ulysses,
        seq_len=seq_len or graph.traced_seq_len, micro_batch_size=1 if packs else spec.micro_batch_size,
    )  # fmt: skip
    _check_shapes(model, spec, graph, ctx)
    table = cutting.cut_table(model, graph, spec)
    parallel = Parallel(
        model=model, spec=spec, graph=graph, mesh=mesh, ctx=ctx, chain=Chain(model, cutting.layer_paths(graph)),
        cuts=table, loss=loss, device=device, input_name=input_name or _input_name(model),
        dtype=precision, original=model.forward, packs=packs,
        full_shapes={n: tuple(p.shape) for n, p in cutting.named(model).items()},
    )  # fmt: skip
    parallel.norms, parallel.gated_mlps = use_kernels(model, device)
    _experts(parallel)
    if compiled and parallel.moe:
        raise RuntimePlanError(f"this plan is not executable: {COMPILED_EXPERTS}")
    _dry_pass(parallel)
    if spec.tp > 1:
        expert_cuts.settle(parallel.moe_blocks, table, cutting.alike(table, graph), spec.tp)
    _make_groups(parallel)
    _apply(parallel, precision, tape, compiled)
    _optimizer(parallel, adamw or AdamWConfig())
    return parallel


def use_kernels(model: nn.Module, device: torch.device) -> tuple[int, int]:
    """Let the chosen kernels stand for modules of `model`; how many RMSNorms and gated MLPs they stand for."""
    return (
        norms.install(model) if norms.chosen(device) else 0, gated.install(model) if gated.chosen(device) else 0
    )  # fmt: skip


def _experts(p: Parallel) -> None:
    p.moe = experts.find(p.model, p.cuts)
    if p.spec.ep > 1 and not p.moe:
        raise RuntimePlanError(f"ep = {p.spec.ep} but the model has no routed experts: plan again")
    for moe in p.moe_blocks:
        experts.install(moe, p.mesh.experts, p.ctx)


def _input_name(model: nn.Module) -> str:
    return next(iter(inspect.signature(model.forward).parameters))


def _check_shapes(model: nn.Module, spec: PlanSpec, graph: ModelGraph, ctx: Context) -> None:
    if graph.unit != "tokens" and (spec.cp > 1 or spec.sequence_parallel):
        raise RuntimePlanError("sequence and context parallelism need a model of token sequences")
    axis = ctx.seq_axis
    if axis and ctx.seq_len % ctx.units(axis):
        raise RuntimePlanError(
            f"seq_len {ctx.seq_len} is not divisible by {ctx.units(axis)} (context x sequence parallel parts)"
        )
    dropout = next((n for n, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0 and m.training), None)
    if dropout is not None and spec.tp > 1:
        raise RuntimePlanError(f"module {dropout} drops activations; under TP each rank would drop others: set p = 0")
    for first, _ in spec.stage_layers[1:]:
        layer, prev = (graph.classes[graph.layer_classes[i]] for i in (first, first - 1))
        if layer.input_bytes != prev.output_bytes:
            raise RuntimePlanError(
                f"more than the output of layer {first - 1} crosses the pipeline cut in front of layer {first} "
                f"({layer.input_bytes:,} bytes live, {prev.output_bytes:,} handed on): plan with --forbid pp"
            )


def _dry_pass(p: Parallel) -> None:
    """Run the model and its loss once on meta tensors: settles the cuts, records what the layers put out."""
    owners = [(owner, name) for owner in p.model.modules() for name in owner._parameters]
    whole = cutting.named(p.model)
    names = {id(param): name for name, param in whole.items()}
    before = {(o, n): o._parameters[n] for o, n in owners}
    buffers = {(o, n): b for o in p.model.modules() for n, b in o._buffers.items() if b is not None}

    def run() -> None:
        cutting.share_bias_cuts(p.cuts)
        for cut in p.cuts.values():
            cut.partial = cut.full = False
        local = cutting.meta_parameters(whole, p.cuts, p.ctx)
        for (owner, name), param in before.items():
            if param is not None:
                owner._parameters[name] = local[names[id(param)]]
        for (owner, name), buffer in buffers.items():
            owner._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")
        tokens = torch.empty((p.ctx.micro_batch_size, p.ctx.seq_len), dtype=torch.int64, device="meta")
        with torch.no_grad(), torch.device("meta"), p.chain.recording():
            with ShardMode(p.ctx) if p.uses_rules else nullcontext(), head.watching(p.model) as products:
                output = p.model(**{p.input_name: p.shard_tokens(tokens)})
                p.loss(output, p.shard_tokens(tokens))
        if p.spec.chunked_loss:
            own = p.loss is next_token_loss
            found = head.head_of(products, logits_of(output)) if own else (None, "the loss is not the runtime's own")
            p.head, p.plain_loss = found

    p.ctx.skip_embedding = False
    p.ctx.packed = pack([p.ctx.seq_len], (1, 1), 0, (None, None), 1, torch.device("cpu")) if p.packs else None
    try:
        with _unpacked(), unset_fake_temporarily():  # meta tensors are enough, and faster than a dry run's fake ones
            cutting.settle(p.cuts, cutting.alike(p.cuts, p.graph), run, p.ctx)
    finally:
        p.ctx.packed = None
        for (owner, name), param in before.items():
            owner._parameters[name] = param
        for (owner, name), buffer in buffers.items():
            owner._buffers[name] = buffer
    if len(p.chain.shapes) != len(p.chain.paths):
        raise RuntimePlanError("some layers of the plan are never called by the model's forward: plan again")


@contextmanager
def _unpacked() -> Iterator[None]:
    """Transformers looks at position ids for packed sequences, which have no values on meta: say there are none."""
    masks = sys.modules.get("transformers.masking_utils")
    found = getattr(masks, "find_packed_sequence_indices", None)
    if masks is None or found is None:
        yield
        return
    masks.find_packed_sequence_indices = lambda *_args, **_kwargs: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        masks.find_packed_sequence_indices = found  # type: ignore[attr-defined]


def _make_groups(p: Parallel) -> None:
    """Create what later steps need, in the same order on every rank."""
    assert p.mesh.data and p.mesh.pp
    for units in sorted({cut.units for cut in p.cuts.values() if cut.kind and cut.units < p.spec.tp}):
        p.mesh.tp_sharing(units)
    if p.spec.pp > 1 and p.graph.tied_params:
        assert p.mesh.ends is not None or p.mesh.position["pp"] >= 0


def tied_names(graph: ModelGraph, model: nn.Module) -> frozenset[str]:
    """Prologue parameters that the epilogue uses too, by their number."""
    if not graph.tied_params:
        return frozenset()
    params = cutting.named(model)
    names = [n for group in graph.prologue.params for n in group.names]
    found = [n for n in names if params[n].numel() == graph.tied_params]
    if len(found) != 1:
        raise RuntimePlanError("cannot tell which parameters of the prologue are tied to the head: untie them")
    return frozenset(found)


def owned_names(p: Parallel) -> tuple[frozenset[str], frozenset[str]]:
    """(parameters that this rank holds, those of them that the other end of the pipeline holds too)."""
    spec, rank = p.spec, p.mesh.position["pp"]
    ends = {False: [n for g in p.graph.prologue.params for n in g.names],
            True: [n for g in p.graph.epilogue.params for n in g.names]}  # fmt: skip
    tied = tied_names(p.graph, p.model)
    first, last = spec.rank_of(0), spec.rank_of(len(spec.stage_layers) - 1)
    found: set[str] = set(ends[False]) if rank == first else set()
    found |= set(ends[True]) | tied if rank == last else set()
    outside = set(ends[False]) | set(ends[True])
    layer_of = _layer_of(p)
    mine = set(spec.rank_layers(rank))
    found |= {n for n in p.cuts if n not in outside and layer_of[n] in mine and _holds_expert(p, n)}
    return frozenset(found), tied if first != last and rank in (first, last) else frozenset()


def _holds_expert(p: Parallel, name: str) -> bool:
    """Whether expert parallelism leaves a listed expert's parameter on this rank."""
    moe = p.moe.get(name)
    index = moe.expert_of(name) if moe is not None else None
    return moe is None or index is None or index * p.spec.ep // moe.num_experts == p.expert_rank


def _layer_of(p: Parallel) -> dict[str, int]:
    """Layer index of every parameter that a layer's class lists."""
    found: dict[str, int] = {}
    for i, (path, c) in enumerate(zip(p.chain.paths, p.graph.layer_classes, strict=True)):
        for group in p.graph.classes[c].params:
            for short in group.names:
                full = f"{path}.{short}" if path else short
                found[full if full in p.cuts else short] = i
    return found


def _apply(p: Parallel, precision: torch.dtype | None, tape: Tape | None, compiled: bool) -> None:
    names = {id(param): name for name, param in cutting.named(p.model).items()}
    mine, tied = owned_names(p)
    ghosts = _localise(p, names, mine, tape)
    names = {id(o._parameters[n]): names_ for (o, n, names_) in p.places}
    spec, mesh = p.spec, p.mesh
    layers = sorted(spec.rank_layers(mesh.position["pp"]))
    sharded = spec.dp * spec.cp > 1 or precision is not None
    per_layer = {i: slots_of(p.chain.layer(i), "", p.cuts, names) for i in layers}
    dense = mesh.dense_mesh()
    if sharded:
        for holder in _expert_holders(p, names, mine):
            zero.shard(holder, p.mesh.expert_mesh(), spec, precision, ghosts)
        for i in layers:
            zero.shard(p.chain.layer(i), dense, spec, precision, ghosts)
        if p.model not in [p.chain.layer(i) for i in layers]:
            zero.shard(p.model, dense, spec, precision, ghosts)
    if p.uses_rules:
        for moe in (m for m in p.moe_blocks if m.experts is None):
            plain_edge(moe.block, p.ctx)
    for i in layers:
        if compiled:
            layer = p.chain.layer(i)
            layer.forward = torch.compile(layer.forward, dynamic=False)
        adapt(p.chain.layer(i), p.ctx, per_layer[i], spec.layers[i], p.uses_rules, p.chain.layer(i) is p.model)
    if p.head is not None:
        head.leave_at(p.head)
    p.original = p.model.forward
    p.model.forward = p._forward  # type: ignore[method-assign]
    inside = {(id(o), n) for found in per_layer.values() for o, n, _ in found}
    p.slots = [(o, n, p.cuts[name]) for o, n, name in p.places if name in mine and (id(o), n) not in inside]
    seen: set[str] = set()
    for owner, attribute, name in p.places:
        if name in mine and name not in seen:
            seen.add(name)
            param = owner._parameters[attribute]
            assert param is not None
            if param.requires_grad:
                p.owned.append(Owned(name, param, p.cuts[name], name in tied))
    if spec.pp > 1 and not p.packs:
        _pipeline(p)


def _expert_holders(p: Parallel, names: dict[int, str], mine: frozenset[str]) -> list[nn.Module]:
    """Modules with routed parameters on this rank: each listed expert, or the module that stacks them."""
    found: dict[int, nn.Module] = {}
    for name, moe in p.moe.items():
        if name in mine:
            index = moe.expert_of(name)
            holder = moe.block if moe.experts is None or index is None else list(moe.experts.children())[index]
            found[id(holder)] = holder
    return list(found.values())


def _localise(p: Parallel, names: dict[int, str], mine: frozenset[str], tape: Tape | None) -> set[nn.Parameter]:
    """Replace every parameter by this rank's part, or by one without memory if another stage has it."""
    spec = p.spec
    made: dict[str, nn.Parameter] = {}
    ghosts: set[nn.Parameter] = set()
    for owner in p.model.modules():
        for attribute, param in list(owner._parameters.items()):
            if param is None:
                continue
            name = names[id(param)]
            if name not in made:
                if name in mine:
                    whole = param.detach() if tape is None else tape.value(param)
                    part = cutting.local_part(whole, p.cuts[name], p.ctx)
                    if name in p.moe and p.moe[name].experts is None:
                        part = part.chunk(spec.ep)[p.expert_rank]
                    made[name] = nn.Parameter(part.to(p.device).clone().contiguous(), requires_grad=param.requires_grad)
                else:
                    dtype = (p.dtype or param.dtype) if param.is_floating_point() else param.dtype
                    nothing = torch.zeros((), dtype=dtype, device=p.device).expand(param.shape)
                    made[name] = nn.Parameter(nothing, requires_grad=False)
                    ghosts.add(made[name])
            owner._parameters[attribute] = made[name]
            p.places.append((owner, attribute, name))
    for owner in p.model.modules():
        for attribute, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[attribute] = buffer.to(p.device)
    return ghosts


def _pipeline(p: Parallel) -> None:
    spec = p.spec
    modules = {}
    for stage in stages_of(spec, p.mesh.position["pp"]):

        def run(*args: Any, stage: int = stage, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            out = p.run(stage, args[0] if args else None, tokens, labels)
            return out / p.scale if stage == len(spec.stage_layers) - 1 else out

        first, last = spec.stage_layers[stage]
        layer_of, ends = _layer_of(p), set(p.cuts) - set(_layer_of(p))
        modules[stage] = StageModule(
            run,
            lambda first=first, last=last, layer_of=layer_of, ends=ends: [
                o._parameters[n] for o, n, name in p.places
                if o._parameters[n].requires_grad and (name in ends or first <= layer_of[name] < last)
            ],
        )  # fmt: skip
    edges = [torch.empty(0, device="meta")]
    for first, _ in spec.stage_layers[1:]:
        shape = p.chain.shapes[first - 1]
        local = p.residual_shape(shape.size)
        edges.append(torch.empty(local, dtype=p.dtype or shape.dtype, device="meta", requires_grad=True))
    p.schedule = build_schedule(spec, modules, edges, p.device, p.mesh.pp)


def _optimizer(p: Parallel, config: AdamWConfig) -> None:
    p.optimizer = ShardedAdamW(p.owned, p.mesh, config, p.spec.offload_optimizer)


def parallelize_plan(model: nn.Module, plan: Plan, **options: Any) -> Parallel:
    """Apply a Plan (planner.plan) to `model`; options are those of `parallelize`.

    On a GPU the plan's choice of kernels holds from now on. RuntimePlanError when it cannot be honoured here.
    """
    chosen.adopt(plan, options.get("device", torch.device("cpu")).type)
    options.setdefault("seq_len", plan.inputs.seq_len)
    options.setdefault("compiled", plan.inputs.engine.compiles)
    return parallelize(model, plan.decisions, plan.inputs.graph, **options)
