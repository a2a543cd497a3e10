"""The independent verifier: it re-derives what a plan must satisfy and re-prices it by event simulation.

It shares no code with the search. From the cost model it takes what one layer costs; divisibility, coverage,
mesh arithmetic, memory over time and the certificate's arithmetic are its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise

from planner.costmodel import kernel_choice
from planner.costmodel.engine import EngineSpec
from planner.costmodel.estimate import machine_for
from planner.costmodel.graph import ModelGraph
from planner.costmodel.kernels import chunked_head
from planner.costmodel.pipeline import ScheduleKind, schedule_problem
from planner.costmodel.strategy import RECOMPUTE_KINDS, PlanSpec
from planner.plan import Inputs, Part, Plan
from planner.simulated import simulate_plan

# The closed form of the search against the simulator (costmodel/pipeline.py, `pipeline_s`): too short by 8 % at most
# (ZB-V with ranks of very different F:B:W), too long by up to 16 % where an interleaved end's chunk is the longest, by
# up to 26 % where ZeRO-3 gathers that end's weights besides (worst of the plans that tests/null/test_check.py draws).
TOO_LONG_FRAC, TOO_LONG_ZERO3_FRAC, TOO_SHORT_FRAC = 0.16, 0.27, 0.08
ROUNDING = 1e-9
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check: what was looked at, whether it holds, and the figures."""

    name: str
    ok: bool
    detail: str


def check_plan(plan: Plan) -> tuple[Finding, ...]:
    """Every finding; arithmetic on the plan's figures comes last and only if its structure holds."""
    structure = check_structure(plan.inputs, plan.decisions, searched=plan.certificate is not None)
    if not all(finding.ok for finding in structure):
        return structure
    figures = chain.from_iterable(check(plan) for check in (_views, _simulated, _certificate))
    return (*structure, *figures)


def check_structure(inputs: Inputs, spec: PlanSpec, searched: bool = False) -> tuple[Finding, ...]:
    """What must hold before a spec can be priced. `searched`: the engine's own restrictions bind too."""
    sizes = tuple(_sizes(inputs, spec))
    if not all(finding.ok for finding in sizes):
        return sizes
    return (*sizes, *check_model(inputs, spec, searched), *_layers(inputs.graph, spec), _schedule(spec))


def problems(findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
    """What does not hold."""
    return tuple(finding for finding in findings if not finding.ok)


def _sizes(inputs: Inputs, spec: PlanSpec) -> Iterator[Finding]:
    names = ("tp", "pp", "vpp", "dp_replicate", "dp_shard", "ulysses", "ring", "ep", "micro_batch_size")
    small = [name for name in names if getattr(spec, name) < 1]
    yield Finding(name="degrees", ok=not small, detail=f"below 1: {', '.join(small)}" if small else "all at least 1")
    if small:
        return
    factors = (spec.pp, spec.dp_replicate, spec.dp_shard, spec.ring, spec.ulysses, spec.tp)
    product = math.prod(factors)
    yield Finding(
        name="mesh",
        ok=product == inputs.num_gpus,
        detail=f"pp x dp_replicate x dp_shard x ring x ulysses x tp = {' x '.join(map(str, factors))} = {product}, "
        f"GPUs {inputs.num_gpus}",
    )
    try:
        domains = inputs.cluster.domain_sizes(inputs.num_gpus)
        yield Finding(name="nodes", ok=True, detail=f"domains of {', '.join(map(str, domains))} GPUs")
    except ValueError as error:
        yield Finding(name="nodes", ok=False, detail=str(error))
    share = spec.dp_replicate * spec.dp_shard * spec.micro_batch_size
    batch = spec.global_batch_size
    yield Finding(
        name="batch",
        ok=batch > 0 and batch == inputs.global_batch_size and batch % share == 0,
        detail=f"global batch {batch} (inputs: {inputs.global_batch_size}) over dp x micro-batch = {share}",
    )


def check_model(inputs: Inputs, spec: PlanSpec, searched: bool = False) -> Iterator[Finding]:
    """Whether the degrees divide what they must of the model, and the kernels exist."""
    graph = inputs.graph
    wrong = kernel_choice.problems(inputs.engine.kernels)
    yield Finding(name="kernels", ok=not wrong, detail="; ".join(wrong) or "every op has what is chosen for it")
    yield _whole("tp", _tp_problems(graph, spec))
    yield _whole("cp", _cp_problems(graph, spec))
    yield _whole("ep", _ep_problems(graph, spec))
    yield _whole("zero", _zero_problems(inputs.engine if searched else None, spec))
    if spec.chunked_loss:
        yield _whole("chunked loss", _loss_problems(inputs))


def _whole(name: str, found: list[str]) -> Finding:
    return Finding(name=name, ok=not found, detail="; ".join(found) or "divides what it must")


def _tp_problems(graph: ModelGraph, spec: PlanSpec) -> list[str]:
    found = []
    cuttable = [layer for layer in graph.classes if not layer.tp_reason]
    if spec.tp > 1 and not cuttable:
        found.append(f"tp = {spec.tp}, but no layer can be cut: {graph.classes[0].tp_reason}")
    for layer in cuttable:
        found += [
            f"{layer.name}: {size} % tp = {size % spec.tp}" for size in layer.tp_divides if size % spec.tp
        ]
    if spec.sequence_parallel and spec.tp == 1:
        found.append("sequence parallelism needs tp > 1")
    if spec.vocab_parallel and (spec.tp == 1 or graph.vocab_size == 0 or graph.vocab_size % spec.tp):
        found.append(f"vocab_parallel: {graph.vocab_size} entries over tp = {spec.tp}")
    for _, kv_heads, lengths in _attentions(graph):
        if kv_heads % spec.tp and spec.tp % kv_heads:
            found.append(f"{kv_heads} KV heads and tp = {spec.tp}: one must divide the other")
        if spec.sequence_parallel:
            found += [f"length {n} % (tp cp) != 0" for n in lengths if n % (spec.tp * spec.cp)]
    return sorted(set(found))


def _attentions(graph: ModelGraph) -> list[tuple[int, int, tuple[int, int]]]:
    """(query heads, KV heads, lengths) of every attention in the layers."""
    ops = [op.attention for layer in graph.classes for op in layer.ops]
    return [(a.q_heads, a.kv_heads, (a.q_len, a.kv_len)) for a in ops if a is not None]


def _cp_problems(graph: ModelGraph, spec: PlanSpec) -> list[str]:
    if spec.cp == 1:
        return []
    layers = (graph.prologue, *graph.classes, graph.epilogue)
    found = [f"{layer.name}: {layer.cp_reason}" for layer in layers if layer.cp_reason]
    attentions = _attentions(graph)
    if not attentions:
        found.append("the model has no attention to spread over context ranks")
    for q_heads, kv_heads, lengths in attentions:
        found += [f"length {n} % (2 cp) != 0" for n in lengths if n % (2 * spec.cp)]
        group = spec.tp * spec.ulysses
        if q_heads % group:
            found.append(f"{q_heads} heads % (tp ulysses) != 0")
        if spec.ulysses > 1 and kv_heads % group and group % kv_heads:
            found.append(f"{kv_heads} KV heads and tp ulysses = {group}: one must divide the other")
    return sorted(set(found))


def _ep_problems(graph: ModelGraph, spec: PlanSpec) -> list[str]:
    if spec.ep == 1:
        return []
    experts = sorted({layer.num_experts for layer in graph.classes if layer.num_experts > 1})
    ranks = spec.dp_replicate * spec.dp_shard * spec.ring * spec.ulysses
    found = [f"{n} experts % ep = {n % spec.ep}" for n in experts if n % spec.ep]
    found += [] if experts else [f"ep = {spec.ep}, but the model has no experts"]
    found += [f"{ranks} data and context ranks % ep = {ranks % spec.ep}"] if ranks % spec.ep else []
    width = spec.dp_shard * spec.ring * spec.ulysses
    if width % spec.ep and spec.ep % width:
        found.append(f"ep = {spec.ep} and shard group {width}: one must divide the other")
    return found


def _zero_problems(engine: EngineSpec | None, spec: PlanSpec) -> list[str]:
    width = spec.dp_shard * spec.ring * spec.ulysses
    found = [] if spec.zero_stage in (0, 1, 2, 3) else [f"zero_stage {spec.zero_stage} does not exist"]
    if spec.zero_stage and width == 1:
        found.append(f"ZeRO {spec.zero_stage} needs more than one rank to shard over")
    if spec.zero_stage == 0 and spec.dp_shard > 1:
        found.append(f"dp_shard = {spec.dp_shard} without ZeRO shards nothing: use dp_replicate")
    # A plan given by hand is the user's own, who knows what the engine can do.
    if engine and spec.zero_stage and spec.zero_stage not in engine.zero_stages:
        found.append(f"engine {engine.name} has ZeRO stages {', '.join(map(str, engine.zero_stages))}")
    return found


def _loss_problems(inputs: Inputs) -> list[str]:
    found = [] if inputs.engine.kernels else [f"engine {inputs.engine.name} has no chunked loss"]
    if chunked_head(inputs.graph.epilogue) is None:
        found.append("chunked_loss: what the loss reads is not just what a linear module without bias puts out")
    return found


def _layers(graph: ModelGraph, spec: PlanSpec) -> Iterator[Finding]:
    stages, total = spec.stage_layers, sum(run.count for run in graph.runs)
    counted = len(stages) == spec.pp * spec.vpp
    yield Finding(name="stages", ok=counted, detail=f"{len(stages)} stages for pp x vpp = {spec.pp} x {spec.vpp}")
    ends = [stages[0][0] if stages else 0, stages[-1][1] if stages else 0]
    covered = ends == [0, total] and all(a[1] == b[0] for a, b in pairwise(stages))
    covered = covered and all(first < last for first, last in stages)
    detail = f"stages cover layers {ends[0]} to {ends[1]} of {total}, none empty"
    yield Finding(name="coverage", ok=covered, detail=detail)
    known = all(strategy.recompute in RECOMPUTE_KINDS for strategy in spec.layers)
    yield Finding(
        name="strategies",
        ok=known and len(spec.layers) == total,
        detail=f"{len(spec.layers)} strategies for {total} layers",
    )


def _schedule(spec: PlanSpec) -> Finding:
    problem = schedule_problem(ScheduleKind(spec.schedule), spec.pp, spec.vpp, spec.num_microbatches)
    detail = f"{spec.schedule.value}, {spec.num_microbatches} micro-batches over {spec.pp} ranks x {spec.vpp} chunks"
    return Finding(name="schedule", ok=problem is None, detail=problem or detail)


def _views(plan: Plan) -> Iterator[Finding]:
    """The plan's derived parts say what its decisions say."""
    spec, graph = plan.decisions, plan.inputs.graph
    axes = [(axis.name, axis.size) for axis in plan.mesh.axes]
    order = ["pp", "dp_replicate", "dp_shard", "ring", "ulysses", "tp"]
    ok = axes == [(name, getattr(spec, name)) for name in order]
    ok = ok and (plan.mesh.ep, plan.mesh.ep_stride) == (spec.ep, spec.tp)
    yield Finding(name="mesh order", ok=ok, detail=" > ".join(f"{name} {size}" for name, size in axes))
    paths = [path for run in graph.runs for path in run.paths]
    held = [path for stage in plan.stages for path in stage.modules]
    ranges = [(stage.first_layer, stage.last_layer) for stage in plan.stages]
    ok = held == paths and ranges == list(spec.stage_layers)
    detail = f"{len(held)} modules on {len(plan.stages)} stages, in the model's order"
    yield Finding(name="modules", ok=ok, detail=detail)
    cuts = [(g.cut, g.names) for c in (graph.prologue, *graph.classes, graph.epilogue) for g in c.params]
    written = [(p.cut, p.names) for c in plan.tp_cuts for p in c.params]
    yield Finding(name="tp cuts", ok=cuts == written, detail=f"{len(written)} parameter groups")


def too_long_frac(spec: PlanSpec) -> float:
    """By how much the closed form may exceed the simulated step."""
    return TOO_LONG_ZERO3_FRAC if spec.vpp > 1 and spec.zero_stage == 3 else TOO_LONG_FRAC


def _simulated(plan: Plan) -> Iterator[Finding]:
    spec, inputs, predicted = plan.decisions, plan.inputs, plan.predicted
    machine = machine_for(inputs.graph, inputs.cluster, inputs.engine, inputs.num_gpus)
    result = simulate_plan(inputs.graph, machine, spec)
    device = inputs.cluster.device.memory_bytes.value
    limit, peak = device * (1 - inputs.memory_margin_frac), float(result.peak_bytes.max())
    margin = f"{device / GIB:.1f} GiB less {100 * inputs.memory_margin_frac:g} %"
    yield Finding(
        name="memory",
        ok=peak <= limit * (1 + ROUNDING),
        detail=f"simulated peak {peak / GIB:.2f} GiB on rank {int(result.peak_bytes.argmax())}, "
        f"limit {limit / GIB:.2f} GiB ({margin})",
    )
    host, host_limit = float(result.host_bytes.max()), inputs.cluster.host_memory_bytes_per_gpu.value
    yield Finding(
        name="host memory",
        ok=host <= host_limit * (1 + ROUNDING),
        detail=f"{host / GIB:.2f} GiB of {host_limit / GIB:.2f} GiB per GPU",
    )
    off = predicted.step_s / result.step_s - 1
    yield Finding(
        name="step time",
        ok=-TOO_SHORT_FRAC <= off <= too_long_frac(spec),
        detail=f"closed form {predicted.step_s:.4g} s, simulated {result.step_s:.4g} s: {100 * off:+.2f} % "
        f"(allowed -{100 * TOO_SHORT_FRAC:g} to +{100 * too_long_frac(spec):g} %)",
    )
    leaves = math.fsum(part.time_s for part in _leaves(plan))
    yield Finding(
        name="breakdown",
        ok=leaves == predicted.step_s,
        detail=f"leaves sum to {leaves!r} s, step is {predicted.step_s!r} s",
    )


def _leaves(plan: Plan) -> list[Part]:
    open_parts, found = [plan.predicted.breakdown], []
    while open_parts:
        part = open_parts.pop()
        open_parts += part.children
        found += [] if part.children else [part]
    return found


def _certificate(plan: Plan) -> Iterator[Finding]:
    proof, step_s = plan.certificate, plan.predicted.step_s
    if proof is None:
        yield Finding(name="certificate", ok=True, detail="none: the plan was given, not searched")
        return
    bound = proof.lower_bound_s
    gap = 1 - bound / step_s
    ok = 0 < bound <= step_s * (1 + ROUNDING) and abs(gap - proof.gap_frac) <= 1e-6
    yield Finding(
        name="certificate",
        ok=ok,
        detail=f"lower bound {bound:.6g} s <= step {step_s:.6g} s, gap {100 * gap:.3f} % (written "
        f"{100 * proof.gap_frac:.3f} %), {proof.num_candidates:,} candidates, stopped by {proof.stop_reason}",
    )
