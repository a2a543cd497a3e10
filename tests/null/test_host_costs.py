"""What the runtime costs the host: taken from a profile, and charged to the plans that use it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from shapes_for_tests import graph, keys

from planner.costmodel.engine import get_engine
from planner.costmodel.estimate import machine_for
from planner.costmodel.evidence import Source
from planner.costmodel.facts import layer_facts
from planner.costmodel.layer_comm import host_cut_s
from planner.costmodel.presets import load_cluster
from planner.costmodel.price import price_layer
from planner.costmodel.profile import DIMS, Conditions, Profile, Sample, make_profile
from planner.costmodel.profiled import fit_cluster, in_lockstep
from planner.costmodel.profiled_engine import fit_engine
from planner.costmodel.rates import p2p_s
from planner.costmodel.state import StateLayout, gather_s, layer_sync_s, once_s, step_sync

CPU = Conditions(platform="cpu", device="some CPU", devices_per_node=2, memory_bytes=2**34, backend="gloo", ranks=2,
                 threads=1, software={})  # fmt: skip
WAYS = ("forward", "backward")


def sample(kind: str, name: str, sizes: tuple[float, ...], time_s: float) -> Sample:
    dims = dict(zip(DIMS[kind], sizes, strict=True))
    return Sample(kind=kind, name=name, dtype="float32", dims=dims, time_s=time_s, spread_frac=0.0, repeats=5,
                  condition=0, source=Source.MEASURED, measured_on="2026-11-25")  # fmt: skip


def profile() -> Profile:
    """8 layers of 15 ops; milliseconds chosen so that each part comes out round."""
    ms = {"plain": (8.0, 16.0), "shard": (12.0, 18.0), "sync": (28.0, 50.0), "tp": (40.0, 32.0),
          "sp": (64.0, 8.0), "cp": (60.0, 58.0)}  # fmt: skip
    rows = [
        sample("runtime", f"{option}/{way}", (8, 15), t / 1e3)
        for option, both in ms.items()
        for way, t in zip(WAYS, both, strict=True)
    ]
    rows.append(sample("runtime", "pp/step", (8, 15), 0.1))
    rows += [
        sample("collective", name, (num_bytes, 2, 1), num_bytes / 4096 * 1e-3)
        for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv")
        for num_bytes in (4096, 65536)
    ]
    return make_profile("1", (CPU,), tuple(rows))


def test_host_times_are_what_is_left_beside_kernels_and_collectives() -> None:
    engine = fit_engine(get_engine("planner"), profile(), load_cluster("cpu-gloo"), 2)
    assert engine.host_shard_s == pytest.approx((4e-3 / 8, 2e-3 / 8))
    assert engine.host_sync_s == pytest.approx((16e-3 / 8 - 1e-3, 32e-3 / 8 - 1e-3))  # a gather, a reduction of 1 ms
    assert engine.host_cut_s["tp"] == pytest.approx(((32e-3 / 8 - 2e-3) / 15, 0.0))  # 2 all-reduces of 1 ms a layer
    assert engine.host_cut_s["sp"] == pytest.approx(((56e-3 / 8 - 4e-3) / 15, 0.0))
    # Ulysses: 4 exchanges, and context ranks are data ranks to FSDP2
    assert engine.host_cut_s["cp"] == pytest.approx(((52e-3 / 8 - 4.5e-3) / 15, (42e-3 / 8 - 4.25e-3) / 15))
    # 4 micro-batches on 2 stages take 5 passes of 20 ms, 12 of them kernels, 2 messages
    assert engine.host_stage_s == pytest.approx((20e-3 - 12e-3) / 2 - 1e-3)
    assert engine.overlap_zero3 == engine.overlap_grad_reduce == engine.overlap_param_gather == 0.0
    eight = replace(profile(), conditions=(*profile().conditions, replace(CPU, ranks=8)))
    assert fit_engine(get_engine("planner"), eight, load_cluster("cpu-gloo"), 8).host_shard_s == pytest.approx(
        tuple(4 * s for s in engine.host_shard_s)  # not measured with 8 ranks, which take turns
    )
    one_core = replace(profile(), conditions=(replace(CPU, devices_per_node=1),))  # works for both stages in turn
    assert fit_engine(get_engine("planner"), one_core, load_cluster("cpu-gloo"), 2).host_stage_s == pytest.approx(
        (100e-3 / 4 - 12e-3) / 2 - 1e-3
    )
    gpu = replace(CPU, platform="cuda", device="NVIDIA H100", memory_bytes=0)
    two_nodes = replace(profile(), conditions=(replace(gpu, devices_per_node=1),))  # no GPU is shared
    assert fit_engine(get_engine("planner"), two_nodes, load_cluster("h100"), 2).host_stage_s == engine.host_stage_s
    other = replace(profile(), conditions=(gpu, replace(CPU, ranks=8)))  # the small model ran on another device
    assert fit_engine(get_engine("planner"), other, load_cluster("cpu-gloo"), 8).host_cut_s == {}
    none = make_profile("1", (CPU,), tuple(s for s in profile().samples if s.kind != "runtime"))
    assert fit_engine(get_engine("planner"), none, load_cluster("cpu-gloo"), 2).host_cut_s == {}


def test_plans_that_cut_tensors_pay_for_it() -> None:
    engine = fit_engine(get_engine("planner"), profile(), load_cluster("cpu-gloo"), 2)
    model = graph()
    machine = machine_for(model, load_cluster("cpu-gloo"), engine, 2)
    facts = layer_facts(model.classes[0], engine)
    free = replace(machine, engine=replace(engine, host_cut_s={}, host_shard_s=(0.0, 0.0)))
    for name, layout in {"tp": keys(tp=2), "sp": keys(tp=2, sp=1), "cp": keys(ulysses=2)}.items():
        forward, backward = engine.host_cut_s[name]
        assert host_cut_s(facts, layout, machine)[0] == pytest.approx(facts.launches * forward)
        paid, not_paid = price_layer(facts, layout, machine), price_layer(facts, layout, free)
        assert paid.forward_s - not_paid.forward_s == pytest.approx(facts.launches * forward)
        assert paid.backward_input_s - not_paid.backward_input_s == pytest.approx(facts.launches * backward)
        assert paid.redo[2] - not_paid.redo[2] == pytest.approx(facts.launches * forward)  # recomputed by the rules too
    assert host_cut_s(facts, keys(), machine)[0] == 0


def test_stages_pay_for_every_pass() -> None:
    engine = fit_engine(get_engine("planner"), profile(), load_cluster("cpu-gloo"), 2)
    machine = machine_for(graph(), load_cluster("cpu-gloo"), engine, 2)
    free = replace(machine, engine=replace(engine, host_stage_s=0.0))
    both = [p2p_s(np.ones(2) * 4096, np.array([1.0, 2.0]), np.ones(2), one) for one in (machine, free)]
    assert (both[0] - both[1]).tolist() == pytest.approx([0.0, engine.host_stage_s])


def layout(dp: int, zero: int) -> StateLayout:
    one = np.ones(1)
    return StateLayout(tp=one, cp=one, ep=one, dp_replicate=one, dp_shard=dp * one, zero=zero * one,
                       offload_optimizer=0 * one)  # fmt: skip


def test_layers_under_fsdp_pay_for_its_hooks_and_copies() -> None:
    engine = fit_engine(get_engine("planner"), profile(), load_cluster("cpu-gloo"), 2)
    machine = machine_for(graph(), load_cluster("cpu-gloo"), engine, 2)
    params, none, second = np.array([1e6]), np.zeros(1), np.ones(1)
    assert [float(s[0]) for s in layer_sync_s(params, none, second, second, layout(2, 0), machine)] == pytest.approx(
        list(engine.host_shard_s)
    )
    assert sum(layer_sync_s(params, none, second, second, layout(1, 0), machine)) == 0
    gathered, reduced = engine.host_sync_s
    flat = replace(machine, engine=replace(engine, host_sync_s=(0.0, 0.0)))
    for zero, more in ((1, (0.0, 0.0)), (2, (0.0, reduced)), (3, (gathered, gathered + reduced))):
        paid, free = (layer_sync_s(params, none, second, second, layout(2, zero), one) for one in (machine, flat))
        assert [float((a - b)[0]) for a, b in zip(paid, free, strict=True)] == pytest.approx(list(more))
    flat = replace(machine, engine=replace(engine, gathers_copies=False))
    assert gather_s(params, none, layout(2, 1), machine) > gather_s(params, none, layout(2, 1), flat)
    assert gather_s(params, none, layout(1, 1), machine) == gather_s(params, none, layout(1, 1), flat)


def test_layers_are_gathered_and_reduced_one_by_one() -> None:
    """Every layer's latencies of 1 ms, and the host's time, which the calls of the whole step do not have."""
    engine = fit_engine(get_engine("planner"), profile(), load_cluster("cpu-gloo"), 2)
    machine = machine_for(graph(), fit_cluster(load_cluster("cpu-gloo"), profile(), 2), engine, 2)
    ten, (gathered, reduced) = np.array([10.0]), engine.host_sync_s
    for zero, host_s, calls in ((0, gathered + reduced, 1), (1, gathered + reduced, 2), (2, gathered, 1), (3, 0.0, 0)):
        expected_s = 10 * host_s + 9 * calls * 1e-3
        assert once_s(ten, layout(2, zero), machine) == pytest.approx(expected_s, rel=0.01), zero
    copies = replace(layout(1, 0), dp_replicate=2 * np.ones(1))
    assert once_s(ten, copies, machine) == pytest.approx(10 * (gathered + reduced) + 9e-3, rel=0.01)  # all-reduces
    assert once_s(ten, layout(1, 0), machine) == 0
    for other in ("blocking_launches", "gathers_copies"):  # a host that is ahead; other engines' calls are in buckets
        assert once_s(ten, layout(2, 1), replace(machine, engine=replace(engine, **{other: False}))) == 0


def test_weights_are_copied_once_a_step_even_where_nothing_is_cut() -> None:
    engine = fit_engine(get_engine("planner"), profile(), load_cluster("cpu-gloo"), 2)
    machine = machine_for(graph(), load_cluster("cpu-gloo"), engine, 2)
    many, none = np.array([1e7]), np.zeros(1)
    alone, copies = layout(1, 0), replace(layout(1, 0), dp_replicate=2 * np.ones(1))
    gather_s = [float(step_sync(many, none, none, none, where, machine).gather_s[0]) for where in (alone, copies)]
    assert gather_s[0] == 0 < gather_s[1]


def test_ranks_in_lockstep_find_what_the_wall_clock_shows() -> None:
    known = profile()
    slow = replace(known, samples=tuple(replace(s, wall_s=2 * s.time_s) for s in known.samples))
    by_wall = in_lockstep(slow)
    assert [s.time_s for s in by_wall.samples] == [2 * s.time_s for s in known.samples]
    assert in_lockstep(known) == known  # every rank has a core: there is one time
