"""A whole plan's price: sums, many at once, and laws."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes_for_tests import GPT, LLAMA, graph, plan

from planner.costmodel.engine import get_engine
from planner.costmodel.estimate import estimate, estimate_many, machine_for
from planner.costmodel.hardware import ClusterSpec
from planner.costmodel.pipeline import ScheduleKind
from planner.costmodel.presets import load_cluster
from planner.costmodel.strategy import PlanSpec

PLANS = (
    plan(tp=8, vocab_parallel=True),
    plan(tp=2, pp=4, dp_replicate=2, vocab_parallel=True),
    plan(tp=2, pp=2, dp_shard=4, zero_stage=1, sequence_parallel=True, vocab_parallel=True, recompute="selective"),
    plan(dp_shard=16, zero_stage=3, recompute="full"),
    plan(pp=4, schedule=ScheduleKind.ZB_H1, dp_replicate=4),
    plan(ring=2, ulysses=2, dp_shard=4, zero_stage=2),
)


def priced(spec: PlanSpec, cluster: ClusterSpec | None = None, engine: str = "planner") -> float:
    machine = machine_for(graph(), cluster or load_cluster("a100-80gb"), get_engine(engine), spec.num_gpus)
    return estimate(graph(), machine, spec).step_s


@pytest.mark.parametrize("spec", PLANS)
def test_leaves_sum_to_the_root_and_nothing_is_negative(spec: PlanSpec) -> None:
    machine = machine_for(graph(), load_cluster("a100-80gb"), get_engine("planner"), spec.num_gpus)
    result = estimate(graph(), machine, spec)
    leaves = list(result.breakdown.leaves())
    assert math.fsum(leaf.leaf_s for leaf in leaves) == result.step_s
    assert all(leaf.leaf_s > -1e-9 for leaf in leaves)
    assert len(result.ranks) == spec.pp
    assert result.peak_memory_bytes == max(rank.memory.peak_bytes for rank in result.ranks)


def test_many_plans_at_once_cost_what_each_costs_alone() -> None:
    specs = [spec for spec in PLANS if spec.num_gpus == 16]
    assert len(specs) > 3
    machine = machine_for(graph(), load_cluster("a100-80gb"), get_engine("planner"), 16)
    together = estimate_many(graph(), machine, specs)
    for spec, result in zip(specs, together, strict=True):
        alone = estimate(graph(), machine, spec)
        assert result.step_s == pytest.approx(alone.step_s, rel=1e-12)
        assert result.peak_memory_bytes == pytest.approx(alone.peak_memory_bytes, rel=1e-12)


def faster(cluster: ClusterSpec, factor: float, *, links: bool) -> ClusterSpec:
    def scaled(quantity: object) -> object:
        return dataclasses.replace(quantity, value=quantity.value * factor)  # type: ignore[attr-defined, type-var]

    if links:
        rates = [scaled(tier.bandwidth_bytes_per_s) for tier in cluster.tiers]
        pairs = zip(cluster.tiers, rates, strict=True)
        tiers = tuple(dataclasses.replace(tier, bandwidth_bytes_per_s=rate) for tier, rate in pairs)
        return dataclasses.replace(cluster, tiers=tiers)
    device = cluster.device
    peaks = {name: scaled(rate) for name, rate in device.peak_flops_per_s.items()}
    device = dataclasses.replace(device, peak_flops_per_s=peaks, hbm_bytes_per_s=scaled(device.hbm_bytes_per_s))
    return dataclasses.replace(cluster, device=device)


@settings(max_examples=25, deadline=None)
@given(spec=st.sampled_from(PLANS), factor=st.floats(1.0, 8.0), links=st.booleans(),
       engine=st.sampled_from(["planner", "nanotron", "megatron-2021"]))  # fmt: skip
def test_a_faster_device_or_link_is_never_slower(spec: PlanSpec, factor: float, links: bool, engine: str) -> None:
    cluster = load_cluster("a100-80gb")
    assert priced(spec, faster(cluster, factor, links=links), engine) <= priced(spec, cluster, engine) * (1 + 1e-9)


def test_full_recomputation_trades_time_for_memory() -> None:
    machine = machine_for(graph(), load_cluster("a100-80gb"), get_engine("planner"), 8)
    none, full = (estimate(graph(), machine, plan(tp=8, recompute=r)) for r in ("none", "full"))
    assert full.step_s > none.step_s
    assert full.peak_memory_bytes < none.peak_memory_bytes


def test_model_flops_are_six_per_parameter_and_token_beside_attention() -> None:
    """Kaplan et al. 2020: 6 N per token; attention adds 12 L s h, halved by the causal mask."""
    shape = dataclasses.replace(LLAMA, kv_heads=LLAMA.heads)
    model = graph(shape)
    machine = machine_for(model, load_cluster("h100"), get_engine("planner"), 8)
    got = estimate(model, machine, plan(tp=8)).model_flops
    tokens = 64 * shape.seq_len
    norms = (2 * shape.num_layers + 1) * shape.hidden
    weights = model.num_params - norms - shape.vocab * shape.hidden  # embedding look-ups cost no FLOPs
    by_hand = tokens * (6 * weights + 6 * shape.num_layers * shape.seq_len * shape.hidden)
    assert got == pytest.approx(by_hand, rel=1e-12)
    assert GPT.tied


def test_gradients_of_the_only_micro_batch_take_the_place_of_activations() -> None:
    """FSDP2 allocates a gradient in its backward: with one micro-batch the peak is before there are any."""
    machine = machine_for(graph(), load_cluster("h100"), get_engine("planner"), 8)
    one, two = (
        estimate(graph(), machine, plan(dp_shard=8, zero_stage=1, micro_batch_size=8, global_batch_size=64 * m))
        for m in (1, 2)
    )
    layers = 12 * GPT.num_layers * GPT.hidden**2  # not the embedding: its gradients outweigh its activations
    assert two.peak_memory_bytes - one.peak_memory_bytes == pytest.approx(4 * layers, rel=0.01)


def test_a_pipeline_keeps_what_it_receives_of_every_micro_batch() -> None:
    """Twice the micro-batches, twice the buffers: nothing else of a 1F1B pipeline grows with their number."""
    machine = machine_for(graph(), load_cluster("h100"), get_engine("planner"), 8)
    memory = [
        estimate(graph(), machine, plan(pp=4, dp_replicate=2, global_batch_size=2 * m)).ranks[0].memory for m in (8, 16)
    ]
    boundary = 2048 * 1024 * 2
    assert memory[1].peak_bytes - memory[0].peak_bytes == pytest.approx(8 * boundary)
    assert memory[0].fixed_bytes - machine.engine.context_bytes == pytest.approx(8 * boundary)
