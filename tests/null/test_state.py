"""Model states under ZeRO and what keeps them in step."""

from __future__ import annotations

import dataclasses

import pytest
from shapes_for_tests import one

from planner.costmodel import comm
from planner.costmodel.engine import get_engine
from planner.costmodel.hardware import Table
from planner.costmodel.keys import Machine
from planner.costmodel.presets import load_cluster
from planner.costmodel.state import StateLayout, gather_s, replicate_s, scatter_s, state_bytes, step_sync

NONE = one(0)


def machine(**traits: float) -> Machine:
    cluster = load_cluster("a100-80gb")
    engine = dataclasses.replace(get_engine("megatron-core"), **traits)
    return Machine(cluster=cluster, domains=cluster.domain_sizes(64), num_gpus=64, engine=engine, dtype="bfloat16",
                   dtype_bytes=2)  # fmt: skip


def layout(**changes: float) -> StateLayout:
    values = {"tp": 1, "cp": 1, "ep": 1, "dp_replicate": 1, "dp_shard": 8, "zero": 0, "offload_optimizer": 0} | changes
    return StateLayout(**{name: one(value) for name, value in values.items()})


@pytest.mark.parametrize(("zero", "per_param"), [(0, 18.0), (1, 6 + 12 / 8), (2, 2 + 16 / 8), (3, 18 / 8)])
def test_zero_shards_states_then_gradients_then_weights(zero: int, per_param: float) -> None:
    """Rajbhandari et al. 2020, section 5, with float32 gradients: 18 bytes per parameter over 8 ranks."""
    assert state_bytes(one(1e9), NONE, NONE, layout(zero=zero), machine()) == pytest.approx(per_param * 1e9)


def test_offloaded_optimizer_leaves_the_gpu() -> None:
    held = state_bytes(one(1e9), NONE, NONE, layout(offload_optimizer=1), machine())
    assert held == pytest.approx(6e9)


@pytest.mark.parametrize(
    ("dtype", "zero", "ranks", "per_param"),
    [
        ("float32", 0, 8, 4 + 4 + 4 + 8), ("float32", 1, 8, 4 + 4 + 12 / 8), ("float32", 2, 8, 4 + 16 / 8),
        ("float32", 3, 8, 16 / 8), ("float32", 0, 1, 16),
        ("bfloat16", 1, 8, 2 + 4 + 12 / 8), ("bfloat16", 3, 8, 16 / 8),
    ],
)  # fmt: skip
def test_fsdp2_holds_what_it_steps_on_and_copies_of_it(dtype: str, zero: int, ranks: int, per_param: float) -> None:
    """Copies for the step until ZeRO-3, gradients, what is stepped on, moments (12 bytes of both in 16 bits)."""
    states = {"weight_bytes": 4.0, "grad_bytes": 4.0, "optimizer_bytes": 8.0} if dtype == "float32" else {}
    where = dataclasses.replace(machine(gathers_copies=True, **states), dtype=dtype)
    held = state_bytes(one(1e9), NONE, NONE, layout(zero=zero, dp_shard=ranks), where)
    assert held == pytest.approx(per_param * 1e9)


def test_a_cpu_is_its_own_host() -> None:
    """An offloaded step there is the step, as measured, and the copy of the weights; no transfer of gradients."""
    cluster = load_cluster("cpu-gloo")
    tables = {"optimizer": Table(axes=("num_params",), dims=((1e6,), (2e6,)), time_s=(0.01, 0.02)),
              "copy": Table(axes=("num_bytes",), dims=((1e6,), (1e8,)), time_s=(0.001, 0.1))}  # fmt: skip
    cluster = dataclasses.replace(cluster, device=dataclasses.replace(cluster.device, measured=tables))
    here = dataclasses.replace(machine(weight_bytes=4.0), cluster=cluster, domains=cluster.domain_sizes(1), num_gpus=1)
    sync = step_sync(one(2e6), NONE, NONE, NONE, layout(dp_shard=1, offload_optimizer=1), here)
    assert (sync.optimizer_s, sync.host_s) == (0, pytest.approx(0.02 + 0.008))
    assert step_sync(one(2e6), NONE, NONE, NONE, layout(dp_shard=1), here).optimizer_s == pytest.approx(0.02)


def test_gradients_go_in_buckets_that_each_pay_the_latency() -> None:
    m = machine(bucket_params=1e8)
    where = layout(dp_shard=64, dp_replicate=1, zero=1)
    one_call = comm.reduce_scatter_s(m.cluster, m.domains, 4.0 * 1e8, one(1), one(64))
    assert scatter_s(one(5e8), NONE, where, m) == pytest.approx(5 * one_call)
    # Buckets are at least a million parameters per rank: 64 ranks and 1e6 make 64e6.
    grown = machine(bucket_params=1e6)
    one_call = comm.all_gather_s(m.cluster, m.domains, 2.0 * 64e6, one(1), one(64))
    assert gather_s(one(128e6), NONE, where, grown) == pytest.approx(2 * one_call)
    assert scatter_s(NONE, NONE, where, m) == 0


def test_replicas_reduce_whole_gradients_without_zero_and_shards_with_it() -> None:
    m = machine(bucket_params=1e12)
    whole = comm.all_reduce_s(m.cluster, m.domains, 4e9, one(1), one(64))
    assert replicate_s(one(1e9), NONE, layout(dp_shard=1, dp_replicate=64), m) == pytest.approx(whole)
    part = comm.all_reduce_s(m.cluster, m.domains, 4e9 / 8, one(8), one(8))
    assert replicate_s(one(1e9), NONE, layout(dp_shard=8, dp_replicate=8, zero=1), m) == pytest.approx(part)


def test_reduction_hides_behind_backward_as_far_as_the_engine_manages() -> None:
    where = layout(dp_shard=1, dp_replicate=64)
    bare, half = machine(overlap_grad_reduce=0.0), machine(overlap_grad_reduce=0.5)
    full = step_sync(one(1e9), NONE, one(1), one(100), where, bare).reduce_s
    assert step_sync(one(1e9), NONE, one(1), one(100), where, half).reduce_s == pytest.approx(full / 2)
    short = full / 4
    assert step_sync(one(1e9), NONE, one(1), short, where, half).reduce_s == pytest.approx(full - short / 2)
