"""Search over a length distribution: its bound and its plan, the longest that fits, and the plan file's buckets."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from planner.batch import table_of
from planner.batch_bounds import bound_s
from planner.bucketed import LengthOptions, LengthResult, search_lengths
from planner.build import Job
from planner.check import check_plan, problems
from planner.cli import entry
from planner.commands.sequences import lengths_of, plan_lengths, sequence_parts
from planner.costmodel.engine import get_engine
from planner.costmodel.estimate import machine_for
from planner.costmodel.graph import ModelGraph
from planner.costmodel.presets import load_cluster
from planner.distributions import named
from planner.errors import InfeasibleError, PlanFileError, UserError
from planner.layouts import NothingHolds, shapes_of
from planner.menus import dispatching_of, drift
from planner.plan import Plan, decode_plan, encode_plan
from planner.reports.shapes import Shape, build_graph
from planner.space import Limits

LONGEST, TOKENS = 16_384, 100_000
WIKIPEDIA = named("wikipedia").cut(LONGEST)
OPTIONS = LengthOptions(batches=2, time_limit_s=1e9)


SHAPE = Shape(num_layers=4, hidden=2048, ffn=8192, heads=16, kv_heads=16, head_dim=128, vocab=32_000, seq_len=LONGEST,
              gated=False, tied=False, rotary=False)  # fmt: skip


@cache
def graph() -> ModelGraph:
    return build_graph(SHAPE)


@cache
def job() -> Job:
    machine = machine_for(graph(), load_cluster("a100-40gb"), get_engine("planner"), 8)
    return Job(graph=graph(), machine=machine, global_batch_size=8, memory_margin_frac=0.08)


@cache
def result() -> LengthResult:
    return search_lengths(graph(), job().machine, WIKIPEDIA, TOKENS, Limits(forbidden=frozenset({"pp"})), OPTIONS)


def test_a_search_out_of_time_has_one_layout_and_a_bound_below_every_other() -> None:
    limits = Limits(forbidden=frozenset({"pp"}))
    found = search_lengths(graph(), job().machine, WIKIPEDIA, TOKENS, limits, replace(OPTIONS, time_limit_s=0.0))
    assert found.stop_reason == "time_limit" and found.num_solved == 1
    assert found.num_layouts == result().num_layouts
    assert 0 < found.lower_bound_s <= result().step_s <= found.step_s * (1 + 1e-9)


def test_bound_is_below_every_dispatch_and_the_mean_of_the_batches_own() -> None:
    found = result()
    assert 0 < found.lower_bound_s <= found.step_s
    menu = found.layout.menu
    own = np.mean([bound_s(menu, table_of(menu, batch)) for batch in found.batches]) + menu.step_s
    assert found.layout.lower_bound_s <= own * (1 + 1e-3)  # the layout's bound is over more kinds
    assert all(d.step_s >= d.lower_bound_s for d in found.dispatches)


def test_no_layout_alone_is_better_than_the_bound() -> None:
    for shape, _ in shapes_of(graph(), 8, Limits(forbidden=frozenset({"pp"}))):
        limits = Limits(fixed={"tp": shape.tp, "pp": shape.pp, "zero": shape.zero_stage})
        alone = search_lengths(graph(), job().machine, WIKIPEDIA, TOKENS, limits, OPTIONS)
        assert alone.step_s >= result().lower_bound_s * (1 - 1e-9)


def test_buckets_cover_the_batches_and_long_ones_get_more_ranks() -> None:
    buckets = result().buckets
    assert sum(b.share_of_tokens for b in buckets) == pytest.approx(1.0)
    assert sum(b.share_of_sequences for b in buckets) == pytest.approx(1.0)
    assert buckets[0].group.ranks <= buckets[-1].group.ranks
    assert all(b.low < b.high for b in buckets)


def test_limits_hold_for_groups() -> None:
    limits = Limits(fixed={"tp": 1, "recompute": "full"}, forbidden=frozenset({"pp", "ring", "offload_activations"}))
    found = search_lengths(graph(), job().machine, WIKIPEDIA, TOKENS, limits, OPTIONS)
    groups = found.layout.menu.groups
    assert {g.ring for g in groups} == {1} and {g.strategy.recompute for g in groups} == {"full"}
    assert not any(g.strategy.offload_activations for g in groups)


def test_too_long_says_the_longest_that_fits() -> None:
    long = replace(WIKIPEDIA, tokens_N=np.array([100, 2**26]), share_N=np.array([0.5, 0.5]))
    with pytest.raises(NothingHolds) as caught:
        search_lengths(graph(), job().machine, long, TOKENS, Limits(), OPTIONS)
    assert 1e5 < caught.value.longest_tokens < 2**26


def arguments(**changes: object) -> argparse.Namespace:
    given = {
        "seq_dist": "wikipedia", "max_seq_len": LONGEST, "tokens_per_step": TOKENS, "global_batch": None, "gap": 0.01,
        "time_limit": 60.0, "executable_only": False, "objective": "step_s", "seq_len": None,
    }  # fmt: skip
    return argparse.Namespace(**{**given, **changes})


def test_the_plan_passes_the_checker_and_its_file_keeps_the_buckets() -> None:
    args = arguments()
    lengths = lengths_of(args)
    assert lengths is not None and args.seq_len == LONGEST
    plan = plan_lengths(args, job(), lengths, Limits(fixed={"tp": 1, "pp": 1}))
    assert plan.sequences is not None and not problems(check_plan(plan))
    assert plan.executable and not plan.executable_reasons
    assert decode_plan(encode_plan(plan), "x").sequences == plan.sequences
    text = " ".join(part for part in sequence_parts(plan.sequences) if isinstance(part, str))
    assert "best static plan" in text and "lower bound" in text and "rounding lengths" in text


@pytest.mark.parametrize(("changes", "said"), [
    ({"seq_dist": None}, "go with --seq-dist"),
    ({"objective": "gpus"}, "does not go with --objective"),
    ({"seq_len": 2048}, "--max-seq-len instead of --seq-len"),
])  # fmt: skip
def test_flags_that_do_not_go_together(changes: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        lengths_of(arguments(**changes))


def test_what_the_command_refuses() -> None:
    with pytest.raises(UserError, match="needs --tokens-per-step"):
        plan_lengths(arguments(tokens_per_step=None), job(), WIKIPEDIA, Limits())
    long = replace(WIKIPEDIA, tokens_N=np.array([2**26]), share_N=np.array([1.0]))
    with pytest.raises(InfeasibleError, match="the longest that does is .*--max-seq-len"):
        plan_lengths(arguments(), job(), long, Limits())


@pytest.fixture(scope="module")
def bucket_plan() -> Plan:
    args = arguments()
    return plan_lengths(args, job(), lengths_of(args), Limits(fixed={"tp": 1}))


def test_plans_with_pipelines_and_with_experts_are_executable() -> None:
    args = arguments(gap=0.2)
    lengths = lengths_of(args)
    piped = plan_lengths(args, job(), lengths, Limits(fixed={"tp": 1, "pp": 2, "zero": 3}))
    assert piped.executable and piped.decisions.pp == 2 and dispatching_of(piped).menu.pp == 2
    wide = replace(SHAPE, ffn=2048, num_experts=8, top_k=2)
    experts = build_graph(wide)
    machine = machine_for(experts, load_cluster("a100-40gb"), get_engine("planner"), 8)
    sparse = replace(job(), graph=experts, machine=machine)
    routed = plan_lengths(args, sparse, lengths, Limits(fixed={"ep": 8, "zero": 1}))
    assert routed.executable and routed.decisions.ep == 8 and routed.decisions.pp == 1
    found = dispatching_of(decode_plan(encode_plan(routed), "x")).menu
    assert found.lockstep and len({group.strategy.recompute == "full" for group in found.groups}) == 1
    with pytest.raises(PlanFileError, match="no multiple of ep 8"):
        dispatching_of(routed, 4)
    assert not problems(check_plan(routed))


def test_compiled_layers_are_not_executed_in_groups() -> None:
    args = arguments()
    engine = replace(get_engine("planner"), compiles=True)
    compiled = replace(job(), machine=machine_for(graph(), load_cluster("a100-40gb"), engine, 8))
    plan = plan_lengths(args, compiled, lengths_of(args), Limits(fixed={"tp": 1, "pp": 1, "zero": 3}))
    assert not plan.executable and "groups with compiled layers" in plan.executable_reasons[0]


def test_the_menu_of_the_file_is_the_searchs(bucket_plan: Plan) -> None:
    found = dispatching_of(decode_plan(encode_plan(bucket_plan), "x"))
    kinds = bucket_plan.sequences.kinds
    assert len(found.menu.groups) == len(kinds) and found.static_kind is not None
    room = {(k.ulysses, k.ring, k.recompute, k.offload_activations): k.capacity_tokens for k in kinds}
    for group in found.menu.groups:
        s = group.strategy
        wanted = room[group.ulysses, group.ring, s.recompute, s.offload_activations]
        assert group.capacity_tokens == pytest.approx(wanted, rel=0.02)
    half = dispatching_of(bucket_plan, bucket_plan.inputs.num_gpus // 2)
    assert half.menu.num_ranks == found.menu.num_ranks // 2
    with pytest.raises(PlanFileError, match="--seq-dist"):
        dispatching_of(replace(bucket_plan, sequences=None))


def test_drift_is_said_and_a_sample_is_none(bucket_plan: Plan) -> None:
    planned, lengths = bucket_plan.sequences, WIKIPEDIA.cut(LONGEST)
    assert all(drift(planned, lengths.sample(4096, seed)) is None for seed in range(20))
    assert "drift" in str(drift(planned, lengths.sample(4096, 1) * 2))
    assert drift(planned, np.array([], np.int64)) is None


def test_the_verb_prints_groups_and_bound(
    bucket_plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, lengths = tmp_path / "plan.json", tmp_path / "lengths.txt"
    plan.write_bytes(encode_plan(bucket_plan))
    batch = WIKIPEDIA.cut(LONGEST).sample(40, 3)
    lengths.write_text("\n".join(map(str, batch)))
    code = "import sys; from planner.cli import entry; sys.exit(entry(sys.argv[1:]))"  # a solver greets a new process
    command = [sys.executable, "-c", code, "dispatch", str(plan), str(lengths), "--format", "json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)
    held = sorted(i for step in found["steps"] for g in step for part in g["micro_batches"] for i in part)
    assert held == list(range(40)) and found["lower_bound_s"] <= found["step_s"]
    assert entry(["dispatch", str(plan), str(lengths)]) == 0
    assert "lower bound" in capsys.readouterr().out
    for text, code, said in (("5\n0\n", 2, "sequence 1 has 0 tok"), ("", 2, "empty"), (f"{2**34}", 3, "the longest")):
        lengths.write_text(text)
        assert entry(["dispatch", str(plan), str(lengths)]) == code
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
