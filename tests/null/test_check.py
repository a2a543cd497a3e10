"""The checker finds every way in which a plan can be wrong, and the simulator agrees with the closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import plans
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.build import build_plan, inputs_of
from planner.check import TOO_SHORT_FRAC, check_plan, check_structure, problems, too_long_frac
from planner.costmodel.estimate import estimate
from planner.costmodel.pipeline import ScheduleKind, schedule_problem
from planner.costmodel.strategy import LayerStrategy, PlanSpec
from planner.plan import Plan
from planner.simulated import simulate_plan

Change = Callable[[Plan], Plan]


def decisions(**changes: object) -> Change:
    return lambda plan: replace(plan, decisions=replace(plan.decisions, **changes))  # type: ignore[arg-type]


def certificate(**changes: object) -> Change:
    def change(plan: Plan) -> Plan:
        assert plan.certificate is not None
        return replace(plan, certificate=replace(plan.certificate, **changes))  # type: ignore[arg-type]

    return change


def inputs(**changes: object) -> Change:
    return lambda plan: replace(plan, inputs=replace(plan.inputs, **changes))  # type: ignore[arg-type]


def predicted(**changes: object) -> Change:
    return lambda plan: replace(plan, predicted=replace(plan.predicted, **changes))  # type: ignore[arg-type]


def test_a_good_plan_holds() -> None:
    findings = check_plan(plans.plan())
    assert not problems(findings)
    assert len({finding.name for finding in findings}) == len(findings) == 21


LAYERS = plans.spec(**plans.SPEC).layers
WRONG: dict[str, tuple[Change, str]] = {
    "zero degree": (decisions(tp=0), "degrees"),
    "negative degree": (decisions(dp_shard=-2), "degrees"),
    "mesh too small": (decisions(dp_shard=1), "mesh"),
    "other GPU count": (inputs(num_gpus=8), "mesh"),
    "half a node": (inputs(num_gpus=12), "nodes"),
    "batch": (decisions(micro_batch_size=3), "batch"),
    "other batch": (decisions(global_batch_size=128), "batch"),
    "heads": (decisions(tp=32, pp=1, dp_shard=1, stage_layers=((0, 8),)), "mesh"),
    "sp without tp": (decisions(tp=1, dp_shard=4, vocab_parallel=False), "tp"),
    "vocabulary": (decisions(tp=1, dp_shard=4, sequence_parallel=False), "tp"),
    "experts in a dense model": (decisions(ep=2), "ep"),
    "zero 4": (decisions(zero_stage=4), "zero"),
    "shard without zero": (decisions(zero_stage=0), "zero"),
    "zero alone": (decisions(dp_shard=1, dp_replicate=2), "zero"),
    "too few stages": (decisions(stage_layers=((0, 4), (4, 6), (6, 8))), "stages"),
    "a gap between stages": (decisions(stage_layers=((0, 2), (2, 4), (5, 6), (6, 8))), "coverage"),
    "an empty stage": (decisions(stage_layers=((0, 2), (2, 2), (2, 6), (6, 8))), "coverage"),
    "layers left over": (decisions(stage_layers=((0, 2), (2, 4), (4, 6), (6, 7))), "coverage"),
    "strategies": (decisions(layers=LAYERS[1:]), "strategies"),
    "unknown recompute": (decisions(layers=(LayerStrategy(recompute="some"), *LAYERS[1:])), "strategies"),
    "zb_v with one chunk": (decisions(schedule=ScheduleKind.ZB_V), "schedule"),
    "mesh order": (lambda p: replace(p, mesh=replace(p.mesh, axes=p.mesh.axes[::-1])), "mesh order"),
    "expert stride": (lambda p: replace(p, mesh=replace(p.mesh, ep_stride=1)), "mesh order"),
    "modules": (lambda p: replace(p, stages=p.stages[::-1]), "modules"),
    "tp cuts": (lambda p: replace(p, tp_cuts=p.tp_cuts[1:]), "tp cuts"),
    "memory": (inputs(memory_margin_frac=0.97), "memory"),
    "step time": (predicted(step_s=1.2 * plans.plan().predicted.step_s), "step time"),
    "breakdown": (predicted(step_s=1.001 * plans.plan().predicted.step_s), "breakdown"),
    "bound above the plan": (certificate(lower_bound_s=1.1 * plans.plan().predicted.step_s), "certificate"),
    "another gap": (certificate(gap_frac=0.002), "certificate"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_found(case: str) -> None:
    change, name = WRONG[case]
    found = problems(check_plan(change(plans.plan())))
    assert name in {finding.name for finding in found}, found
    assert all("\n" not in finding.detail for finding in found)


def test_model_limits_of_experts_and_context() -> None:
    job = plans.job(plans.MOE)
    spec = plans.spec(plans.MOE, ep=8)
    assert not problems(check_structure(inputs_of(job), spec))
    for bad, words in (
        (replace(spec, ep=16), "8 experts % ep"),
        (replace(spec, ulysses=8, dp_shard=2, ep=1, tp=4), "mesh"),
        (replace(spec, ring=16, dp_shard=1, ep=32), "% ep"),
    ):
        found = problems(check_structure(inputs_of(job), bad))
        assert any(words in f"{finding.name} {finding.detail}" for finding in found), found
    context = plans.spec(ulysses=8, tp=2)
    assert not problems(check_structure(inputs_of(plans.job()), context))
    wide = replace(context, ulysses=16, dp_shard=1, tp=1)
    assert not problems(check_structure(inputs_of(plans.job()), wide))
    wider = replace(context, ulysses=8, tp=4, dp_shard=1)
    found = problems(check_structure(replace(inputs_of(plans.job()), num_gpus=32), wider))
    assert any("16 heads" in finding.detail for finding in found)


def test_the_engine_binds_searched_plans_only() -> None:
    job = plans.job(engine="megatron-core")
    spec = plans.spec(zero_stage=3)
    assert not problems(check_structure(inputs_of(job), spec))
    found = problems(check_structure(inputs_of(job), spec, searched=True))
    assert [finding.name for finding in found] == ["zero"]


def test_host_memory_is_checked() -> None:
    job = plans.job()
    cluster = job.machine.cluster
    small = replace(cluster, host_memory_bytes_per_gpu=replace(cluster.host_memory_bytes_per_gpu, value=1e6))
    poor = replace(job, machine=replace(job.machine, cluster=small))
    plan = build_plan(poor, plans.spec(offload_optimizer=True), "0.1.0", ())
    assert [finding.name for finding in problems(check_plan(plan))] == ["host memory"]


SPECS = st.fixed_dictionaries(
    {
        "tp": st.sampled_from([1, 2, 4]),
        "pp": st.sampled_from([1, 2, 4]),
        "vpp": st.sampled_from([1, 2]),
        "schedule": st.sampled_from([kind.value for kind in ScheduleKind if kind is not ScheduleKind.GPIPE]),
        "micro_batch_size": st.sampled_from([1, 2]),
        "recompute": st.sampled_from(["none", "selective", "full"]),
        "zero_stage": st.integers(0, 3),
        "offload_activations": st.booleans(),
        "offload_optimizer": st.booleans(),
    }
)


def valid(given_: dict[str, object]) -> PlanSpec | None:
    kind = ScheduleKind(str(given_["schedule"]))
    pp, tp, mbs = (int(str(given_[name])) for name in ("pp", "tp", "micro_batch_size"))
    vpp = 2 if kind is ScheduleKind.ZB_V else int(str(given_["vpp"]))
    m = plans.BATCH // (plans.GPUS // (pp * tp) * mbs)
    return None if schedule_problem(kind, pp, vpp, m) else plans.spec(**given_)


@settings(max_examples=60, deadline=None)
@given(SPECS)
def test_simulation_and_closed_form_agree(given_: dict[str, object]) -> None:
    spec = valid(given_)
    if spec is None:
        return
    job = plans.job()
    closed, simulated = estimate(job.graph, job.machine, spec), simulate_plan(job.graph, job.machine, spec)
    off = closed.step_s / simulated.step_s - 1
    assert -TOO_SHORT_FRAC <= off <= too_long_frac(spec)
    if spec.pp == 1:
        assert closed.step_s == pytest.approx(simulated.step_s, rel=1e-9)
    for rank, peak in zip(closed.ranks, simulated.peak_bytes, strict=True):
        assert peak == pytest.approx(rank.memory.peak_bytes, rel=0.1)
        if spec.vpp == 1:
            assert peak <= rank.memory.peak_bytes * (1 + 1e-9)
    for rank, host in zip(closed.ranks, simulated.host_bytes, strict=True):
        assert host <= rank.memory.host_bytes * 1.1 + 1
