"""Explanations agree with the prices they explain; objectives, ways out and given layouts do what they say."""

from __future__ import annotations

import math
from dataclasses import replace

import plans
import pytest

from planner.costmodel.estimate import estimate
from planner.costmodel.pipeline import ScheduleKind
from planner.costmodel.presets import load_cluster
from planner.diff import cost_changes, decision_changes, input_changes
from planner.errors import UserError
from planner.explain import binding_lines, compare_leaves, sensitivities, time_grid, why_not
from planner.given import Given, given_spec
from planner.objective import Outcome, choose, gpu_counts
from planner.search import Found, SearchOptions, SearchResult, search
from planner.space import Limits
from planner.views import leaves, strong_frac
from planner.ways_out import ways_out


def test_more_of_anything_is_never_slower_and_compute_binds_here() -> None:
    found = sensitivities(plans.graph(), plans.job().machine, plans.plan().decisions)
    assert all(item.gain_frac >= -1e-12 for item in found)
    assert [item.gain_frac for item in found] == sorted((item.gain_frac for item in found), reverse=True)
    named = {item.what: item.gain_frac for item in found}
    assert named["compute (peak FLOP/s)"] > 0.01 and named["host link"] == 0
    assert set(named) >= {"nvlink bandwidth", "infiniband bandwidth", "memory bandwidth"}
    # No single resource can give more than all the time it could save.
    assert sum(named.values()) <= 1 - 1 / 1.1 + 1e-9


def test_the_time_tree_shows_all_of_the_time() -> None:
    part = plans.plan().predicted.breakdown
    rows = {row[0].strip(): row for row in time_grid(part).rows}
    assert rows["step"][2] == "100.0"
    shown = sum(float(rows[leaf.name][1]) for leaf in leaves(part) if leaf.time_s > 0)
    assert shown == pytest.approx(part.time_s, rel=2e-3)
    assert 0 < strong_frac(part) < 1


def test_binding_names_the_fullest_rank() -> None:
    plan = plans.plan()
    fullest = max(plan.predicted.memory, key=lambda rank: rank.peak_bytes)
    lines = binding_lines(plan, sensitivities(plans.graph(), plans.job().machine, plan.decisions))
    assert f"rank {fullest.rank}" in lines[0] and "does not bind" in lines[0]
    tight = replace(plan.predicted, memory_limit_bytes=fullest.peak_bytes)
    assert "memory   binds" in binding_lines(replace(plan, predicted=tight), ())[0]


def test_why_not_gives_the_difference_of_step_times() -> None:
    plan = plans.plan()
    other = plan.alternatives[0]
    text = why_not(plan, 2)
    change = other.step_s - plan.predicted.step_s
    assert f"by {abs(change):.3g} s" in text and ("slower" if change >= 0 else "faster") in text


def test_compare_leaves_by_hand() -> None:
    text = compare_leaves({"gemm": 10.0, "tp": 1.0, "bubble": 1.0}, {"gemm": 10.0, "tp": 3.0, "bubble": 0.5})
    assert text == "slower by 1.5 s (12.50 %): tp +2; gains bubble -0.5"
    assert compare_leaves({"gemm": 2.0}, {"gemm": 1.0}) == "faster by 1 s (50.00 %); gains gemm -1"


def test_diff_of_equal_plans_is_empty_and_of_others_sums_up() -> None:
    plan = plans.plan()
    assert input_changes(plan, plan) == () == decision_changes(plan, plan) and cost_changes(plan, plan) == ()
    first = replace(plan.decisions.layers[0], recompute="full")
    moved = replace(plan, decisions=replace(plan.decisions, layers=(first, *plan.decisions.layers[1:])))
    assert [change.field for change in decision_changes(plan, moved)] == ["recompute"]
    swapped = (plan.decisions.layers[1], first, *plan.decisions.layers[2:])
    again = replace(plan, decisions=replace(plan.decisions, layers=swapped))
    assert [change.after for change in decision_changes(moved, again)] == ["2 layers differ"]


# ---- objectives


def result(step_s: float | None, lower_s: float, reason: str = "gap") -> SearchResult:
    found = () if step_s is None else (Found(spec=plans.spec(), step_s=step_s, **_extra()),)
    return SearchResult(
        plans=found, lower_bound_s=lower_s, gap_frac=0.0, num_candidates=1, ledger={}, stop_reason=reason,
        search_s=0.0, shortfall_bytes=None, refused={},
    )  # fmt: skip


def _extra() -> dict[str, float]:
    return {"peak_memory_bytes": 1.0} if "peak_memory_bytes" in Found.__slots__ else {}


def run(objective: str, steps: dict[int, SearchResult], max_step_s: float = math.inf) -> Outcome:
    return choose(objective, sorted(steps), max_step_s, lambda n: steps[n])


def test_gpu_counts_are_whole_nodes_or_parts_of_one() -> None:
    assert gpu_counts(load_cluster("h100"), 48) == [1, 2, 4, 8, 16, 24, 48]
    assert gpu_counts(load_cluster("h100"), 6) == [1, 2]
    assert gpu_counts(load_cluster("gb200-nvl72"), 72) == [1, 2, 4, 8, 12, 24, 36, 72]


def test_fewest_gpus_stops_at_the_first_count_that_works() -> None:
    steps = {1: result(None, math.inf, "infeasible"), 2: result(8.0, 7.9), 4: result(4.0, 3.9), 8: result(2.0, 1.9)}
    free = run("gpus", steps)
    assert free.best is not None and free.best.num_gpus == 2 == free.lower_bound and len(free.trials) == 2
    bound = run("gpus", steps, 3.0)
    assert bound.best is not None and bound.best.num_gpus == 8 == bound.lower_bound
    # 4 GPUs are not refuted when their bound is below the limit.
    open_ = run("gpus", {**steps, 4: result(4.0, 2.5)}, 3.0)
    assert open_.best is not None and (open_.best.num_gpus, open_.lower_bound) == (8, 4)
    assert run("gpus", steps, 1.0).best is None


def test_cheapest_step_carries_the_bound_of_every_count() -> None:
    steps = {1: result(None, math.inf, "infeasible"), 2: result(8.0, 7.0), 4: result(3.9, 3.8), 8: result(2.2, 2.1)}
    found = run("cost", steps)
    assert found.best is not None and found.best.num_gpus == 4
    assert found.best.gpu_seconds == pytest.approx(15.6) and found.lower_bound == pytest.approx(14.0)
    interrupted = run("cost", {2: result(8.0, 7.0, "interrupted"), 4: result(1.0, 1.0)})
    assert len(interrupted.trials) == 1


# ---- ways out


def test_ways_out_are_sorted_and_each_of_them_fits() -> None:
    job = replace(plans.job(gpus=2), memory_margin_frac=0.95)
    limits = Limits(fixed={"tp": 1}, forbidden=frozenset({"zero", "offload_optimizer", "pp"}))
    options = SearchOptions(memory_margin_frac=0.95)
    assert not search(job.graph, job.machine, job.global_batch_size, limits, options).plans
    found = ways_out(job, limits)
    assert 1 <= len(found) <= 3
    assert [(w.num_gpus, w.step_s) for w in found] == sorted((w.num_gpus, w.step_s) for w in found)
    assert any("--memory-margin 0.02" in way.text for way in found)


# ---- layouts given by degrees


def test_dp_fills_the_mesh_and_zero_decides_what_it_is() -> None:
    graph = plans.graph()
    spec = given_spec(Given(tp=2, pp=2, dp_replicate=2), graph, 16, 64)
    assert (spec.dp_replicate, spec.dp_shard, spec.zero_stage) == (2, 2, 1)
    assert given_spec(Given(tp=2, zero_stage=0), graph, 16, 64).dp_replicate == 8
    alone = given_spec(Given(tp=16, zero_stage=3), graph, 16, 64)
    assert (alone.dp, alone.zero_stage) == (1, 0)
    assert given_spec(Given(pp=2, vpp=2), graph, 16, 64).schedule is ScheduleKind.INTERLEAVED


def test_odd_layers_go_to_the_middle() -> None:
    graph = replace(plans.graph(), runs=(replace(plans.graph().runs[0], count=7, paths=tuple("abcdefg")),))
    sizes = [end - first for first, end in given_spec(Given(pp=4), graph, 16, 64).stage_layers]
    assert sizes == [1, 2, 2, 2] or sizes == [2, 2, 2, 1]
    assert sum(sizes) == 7


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Given(tp=3), "not a multiple of tp x pp"),
        (Given(dp_replicate=3), "dp_replicate = 3"),
        (Given(micro_batch_size=5), "global batch 64"),
        (Given(pp=16), "8 layers cannot fill"),
        (Given(vpp=2), "interleaved needs pp >= 2"),
    ],
)
def test_layouts_that_do_not_come_out_even(given: Given, words: str) -> None:
    with pytest.raises(UserError, match=words):
        given_spec(given, plans.graph(), 16, 64)


def test_a_given_layout_is_priced_as_it_is() -> None:
    spec = plans.spec(**plans.SPEC)
    assert estimate(plans.graph(), plans.job().machine, spec).step_s == plans.plan().predicted.step_s
