"""The plans of the closed loop: everything the runtime executes, priced, and best, worst and a spread of it chosen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from planner.build import Job, build_plan, inputs_of
from planner.check import check_structure, problems
from planner.costmodel.engine import get_engine
from planner.costmodel.estimate import estimate, estimate_many, machine_for
from planner.costmodel.graph import ModelGraph
from planner.costmodel.hardware import ClusterSpec
from planner.costmodel.keys import Machine
from planner.costmodel.profile import Profile, profile_sha256
from planner.costmodel.profiled import fit_cluster, in_lockstep
from planner.costmodel.profiled_engine import fit_engine
from planner.costmodel.simulate import on_shared_cores_s
from planner.costmodel.strategy import PlanSpec
from planner.errors import UserError
from planner.given import Given, given_spec
from planner.plan import Plan
from planner.runtime.support import reasons
from planner.simulated import simulate_plan

_SLOWEST = 8.0  # plans slower than this many times the best are not worth their run time
BEST, WORST = 2, 1  # of every number of ranks; the rest is spread between them


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """A plan and what is expected of it: seconds of a step as the cost model says, and on shared cores."""

    spec: PlanSpec
    step_s: float
    shared_s: float
    peak_bytes: float


def machine_of(
    graph: ModelGraph, cluster: ClusterSpec, profile: Profile, ranks: int, busy: int | None = None
) -> Machine:
    """`ranks` ranks on the machine as `profile` found it, with `busy` of them at work at once (default: all)."""
    busy = busy or ranks
    engine = fit_engine(get_engine("planner"), profile, cluster, busy)
    return machine_for(graph, fit_cluster(cluster, profile, busy), engine, ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """How ranks find `cores` that they share: as they all wait for each other, and with as many at work as cores."""

    cores: int
    lockstep: Machine
    alone: Machine


def shared_of(graph: ModelGraph, cluster: ClusterSpec, profile: Profile, ranks: int, cores: int) -> Shared:
    """Of `ranks` ranks on the machine as `profile` found it."""
    return Shared(
        cores=cores, lockstep=machine_of(graph, cluster, in_lockstep(profile), ranks),
        alone=machine_of(graph, cluster, profile, ranks, busy=min(cores, ranks)),
    )  # fmt: skip


def job_of(graph: ModelGraph, cluster: ClusterSpec, profile: Profile, ranks: int) -> Job:
    """The job of `ranks` ranks on that machine."""
    return Job(
        graph=graph, machine=machine_of(graph, cluster, profile, ranks),
        global_batch_size=graph.default_global_batch_size, memory_margin_frac=0.0,
        profile_sha256=profile_sha256(profile),
    )  # fmt: skip


def candidates(job: Job) -> list[PlanSpec]:
    """Every plan of the loop's space that is whole and that the runtime executes."""
    found: dict[PlanSpec, None] = {}
    for given in _space(job.machine.num_gpus):
        try:
            spec = given_spec(given, job.graph, job.machine.num_gpus, job.global_batch_size)
        except UserError:
            continue
        if not reasons(spec) and not problems(check_structure(inputs_of(job), spec)):
            found[spec] = None
    return list(found)


def _space(ranks: int) -> Iterator[Given]:
    degrees = [2**i for i in range(int(math.log2(ranks)) + 1)]
    for tp, pp, ulysses in itertools.product(degrees, degrees, (1, 2)):
        if ranks % (tp * pp * ulysses):
            continue
        for zero, size, recompute, sp, vpp in itertools.product(
            (0, 1, 2, 3), (1, 2, 4, 8), ("none", "full"), (False, True), (1, 2)
        ):
            if (sp and tp == 1) or (vpp > 1 and pp == 1):
                continue
            yield Given(tp=tp, pp=pp, ulysses=ulysses, zero_stage=zero, micro_batch_size=size, recompute=recompute,
                        sp=sp, vpp=vpp)  # fmt: skip


def price(job: Job, shared: Shared, specs: Sequence[PlanSpec]) -> list[Predicted]:
    """What is expected of every plan.

    The ranks of a plan without pipeline all wait for each other, and so do all once a step; where there are stages, one
    works while another waits.
    """
    found: list[Predicted] = []
    for spec, one in zip(specs, estimate_many(job.graph, job.machine, specs), strict=True):
        if spec.pp == 1:
            step_s = shared_s = estimate(job.graph, shared.lockstep, spec).step_s
        else:
            step_s, shared_s = one.step_s, shared_step_s(job.graph, job.machine, shared, spec)
        found.append(Predicted(spec=spec, step_s=step_s, shared_s=shared_s, peak_bytes=one.peak_memory_bytes))
    return found


def shared_step_s(graph: ModelGraph, machine: Machine, shared: Shared, spec: PlanSpec) -> float:
    """The step of a pipeline when more ranks than cores take turns: while one waits, others are faster.

    Kernels were measured with all ranks busy, each `ranks / cores` times slower than alone. Ranks have their cores in
    turn (profiler.profile.ranks_of), so that a stage of several ranks has as many, or all. A pipeline ends no sooner
    than with cores of its own for every stage, whose ranks wait for each other.
    """
    found, waiting, alone = (simulate_plan(graph, one, spec) for one in (machine, shared.lockstep, shared.alone))
    if shared.cores >= machine.num_gpus:
        return found.step_s
    stages_at_once = max(shared.cores * spec.pp // machine.num_gpus, 1)
    pipeline_s = max(on_shared_cores_s(found.simulation, stages_at_once), alone.simulation.step_s)
    return waiting.step_s - waiting.simulation.step_s + pipeline_s


def choose(priced: Sequence[Predicted], count: int) -> list[Predicted]:
    """The best, the worst of those not hopelessly slow, and plans evenly spread over ln(time) between them."""
    ordered = sorted(priced, key=lambda p: p.shared_s)
    ordered = [p for p in ordered if p.shared_s <= _SLOWEST * ordered[0].shared_s]
    if len(ordered) <= count:
        return ordered
    chosen = {id(p): p for p in (*ordered[:BEST], *ordered[-WORST:])}
    low, high = math.log(ordered[0].shared_s), math.log(ordered[-1].shared_s)
    steps = count - len(chosen)
    for i in range(steps):
        wanted = low + (high - low) * (i + 1) / (steps + 1)
        left = [p for p in ordered if id(p) not in chosen]
        near = min(left, key=lambda p: abs(math.log(p.shared_s) - wanted))
        chosen[id(near)] = near
    return list(chosen.values())


def written(job: Job, spec: PlanSpec) -> Plan:
    """The plan as the runtime reads it."""
    return build_plan(job, spec, "closed-loop", ())
