"""From a spec (searched or given) to the Plan record: derived views, predictions, certificate. No I/O."""

from __future__ import annotations

from dataclasses import dataclass

from planner.costmodel.cost import CostBreakdown
from planner.costmodel.estimate import Estimate, estimate, model_facts
from planner.costmodel.graph import LayerClass, ModelGraph, TpCut
from planner.costmodel.hardware import cluster_sha256
from planner.costmodel.keys import Machine
from planner.costmodel.strategy import PlanSpec
from planner.plan import (
    Alternative,
    Axis,
    Certificate,
    ClassCuts,
    Inputs,
    Mesh,
    ParamCut,
    Part,
    Plan,
    Predicted,
    RankMemory,
    Stage,
    graph_sha256,
)
from planner.simulated import SimulatedPlan, simulate_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a plan is made for."""

    graph: ModelGraph
    machine: Machine
    global_batch_size: int
    memory_margin_frac: float
    profile_sha256: str | None = None

    @property
    def memory_limit_bytes(self) -> float:
        """What one GPU may hold: the device's memory less the margin."""
        return self.machine.cluster.device.memory_bytes.value * (1 - self.memory_margin_frac)


def build_plan(
    job: Job,
    spec: PlanSpec,
    tool_version: str,
    executable_reasons: tuple[str, ...],
    certificate: Certificate | None = None,
    runners_up: tuple[PlanSpec, ...] = (),
) -> Plan:
    """Price and simulate `spec` and write down everything a reader or the runtime needs.

    `executable_reasons`: why the runtime cannot execute it, from planner.runtime.support; empty if it can.
    """
    facts = model_facts(job.graph, job.machine.engine)
    priced = estimate(job.graph, job.machine, spec, facts)
    return Plan(
        tool_version=tool_version,
        inputs=inputs_of(job),
        decisions=spec,
        mesh=mesh_of(spec),
        num_microbatches=spec.num_microbatches,
        stages=stages_of(job.graph, spec),
        tp_cuts=tp_cuts_of(job.graph),
        predicted=_predicted(job, spec, priced, simulate_plan(job.graph, job.machine, spec)),
        certificate=certificate,
        alternatives=tuple(
            alternative_of(other, estimate(job.graph, job.machine, other, facts)) for other in runners_up
        ),
        executable=not executable_reasons,
        executable_reasons=executable_reasons,
    )


def inputs_of(job: Job) -> Inputs:
    """The plan's inputs with their hashes."""
    return Inputs(
        graph=job.graph,
        graph_sha256=graph_sha256(job.graph),
        source_sha256=job.graph.source_sha256,
        cluster=job.machine.cluster,
        cluster_sha256=cluster_sha256(job.machine.cluster),
        engine=job.machine.engine,
        profile_sha256=job.profile_sha256,
        num_gpus=job.machine.num_gpus,
        seq_len=job.graph.traced_seq_len,
        global_batch_size=job.global_batch_size,
        memory_margin_frac=job.memory_margin_frac,
    )


def mesh_of(spec: PlanSpec) -> Mesh:
    """The ordered mesh: outermost axis first; experts on the ranks next to tp."""
    names = ("pp", "dp_replicate", "dp_shard", "ring", "ulysses", "tp")
    return Mesh(axes=tuple(Axis(name=n, size=getattr(spec, n)) for n in names), ep=spec.ep, ep_stride=spec.tp)


def stages_of(graph: ModelGraph, spec: PlanSpec) -> tuple[Stage, ...]:
    """Every virtual stage with the modules that it holds."""
    paths = [path for run in graph.runs for path in run.paths]
    last = len(spec.stage_layers) - 1
    return tuple(
        Stage(
            stage=s,
            pipeline_rank=spec.rank_of(s),
            first_layer=first,
            last_layer=end,
            modules=tuple(paths[first:end]),
            prologue=_param_names(graph.prologue) if s == 0 else (),
            epilogue=_param_names(graph.epilogue) if s == last else (),
        )
        for s, (first, end) in enumerate(spec.stage_layers)
    )


def _param_names(layer: LayerClass) -> tuple[str, ...]:
    return tuple(name for group in layer.params for name in group.names)


def tp_cuts_of(graph: ModelGraph) -> tuple[ClassCuts, ...]:
    """How tensor parallelism cuts the parameters of every layer class, ends included."""
    ends_and_classes = (graph.prologue, *graph.classes, graph.epilogue)
    return tuple(
        ClassCuts(
            name=layer.name,
            reason=layer.tp_reason,
            params=tuple(
                ParamCut(cut=TpCut(group.cut), routed=group.routed, names=group.names) for group in layer.params
            ),
        )
        for layer in ends_and_classes
    )


def _predicted(job: Job, spec: PlanSpec, priced: Estimate, simulated: SimulatedPlan) -> Predicted:
    machine = job.machine
    peak = machine.cluster.device.peak_flops_per_s
    dense = peak.get(machine.dtype) or peak.get("bfloat16") or next(iter(peak.values()))
    samples_per_s = spec.global_batch_size / priced.step_s
    tree = part_of(priced.breakdown)
    return Predicted(
        step_s=tree.time_s,
        simulated_step_s=simulated.step_s,
        samples_per_s=samples_per_s,
        tokens_per_s=samples_per_s * job.graph.traced_seq_len,
        mfu_frac=priced.model_flops / (priced.step_s * machine.num_gpus * dense.value),
        model_flops=priced.model_flops,
        peak_memory_bytes=priced.peak_memory_bytes,
        memory_limit_bytes=job.memory_limit_bytes,
        breakdown=tree,
        memory=tuple(
            RankMemory(
                rank=k,
                states_bytes=m.states_bytes,
                activations_bytes=m.activations_bytes,
                work_bytes=m.work_bytes,
                fixed_bytes=m.fixed_bytes,
                host_bytes=m.host_bytes,
                in_flight=m.in_flight,
                peak_bytes=m.peak_bytes,
                simulated_peak_bytes=float(simulated.peak_bytes[k]),
            )
            for k, m in enumerate(rank.memory for rank in priced.ranks)
        ),
    )


def part_of(tree: CostBreakdown) -> Part:
    """The breakdown as it is written."""
    return Part(
        name=tree.name,
        time_s=tree.time_s,
        evidence=tree.source.name.lower(),
        children=tuple(part_of(child) for child in tree.children),
    )


def options_of(spec: PlanSpec) -> dict[str, int | str]:
    """The plan's options by their standard names, as tables and JSON print them."""
    kinds = {s.recompute for s in spec.layers}
    offloaded = sum(s.offload_activations for s in spec.layers)
    return {
        "pp": spec.pp,
        "vpp": spec.vpp,
        "schedule": spec.schedule.value,
        "dp_replicate": spec.dp_replicate,
        "dp_shard": spec.dp_shard,
        "zero_stage": spec.zero_stage,
        "cp": spec.cp,
        "ring": spec.ring,
        "ulysses": spec.ulysses,
        "tp": spec.tp,
        "sequence_parallel": int(spec.sequence_parallel),
        "vocab_parallel": int(spec.vocab_parallel),
        "chunked_loss": int(spec.chunked_loss),
        "ep": spec.ep,
        "micro_batch_size": spec.micro_batch_size,
        "num_microbatches": spec.num_microbatches,
        "recompute": kinds.pop() if len(kinds) == 1 else _mix(spec),
        "offload_activations_layers": offloaded,
        "offload_optimizer": int(spec.offload_optimizer),
    }


def _mix(spec: PlanSpec) -> str:
    """Layers by what they recompute: "60 none, 36 full"."""
    counts = {kind: sum(s.recompute == kind for s in spec.layers) for kind in ("none", "selective", "full")}
    return ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)


def alternative_of(spec: PlanSpec, priced: Estimate) -> Alternative:
    """A runner-up as it is written."""
    return Alternative(
        options=options_of(spec),
        step_s=priced.step_s,
        peak_memory_bytes=priced.peak_memory_bytes,
        leaves_s={leaf.name: leaf.leaf_s for leaf in priced.breakdown.leaves()},
    )
