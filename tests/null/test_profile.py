"""Profiles: the file, merging and comparing, tables and fits, evidence, the choice of what to measure."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import graph, job, spec

from planner.costmodel import comm
from planner.costmodel.compute import gemm_s, memory_bound_s
from planner.costmodel.estimate import estimate, machine_for, model_facts, price_model, spec_keys
from planner.costmodel.evidence import Source
from planner.costmodel.hardware import ClusterSpec, cluster_from_dict, cluster_sha256, cluster_to_dict
from planner.costmodel.layer_times import layer_name
from planner.costmodel.measured import along, between, covered, make_table
from planner.costmodel.presets import load_cluster
from planner.costmodel.profile import (
    DIMS,
    Conditions,
    Profile,
    ProfileError,
    Sample,
    decode_profile,
    encode_profile,
    make_profile,
    merge,
    profile_sha256,
)
from planner.costmodel.profile_diff import compare, differences, doubts
from planner.costmodel.profiled import describes, fit_cluster
from planner.costmodel.profiled_engine import fit_engine, hidden_frac
from planner.profiler.cases import Case, comm_cases, layer_cases, op_cases, weighted
from planner.profiler.choose import Chooser

H100 = Conditions(
    platform="cuda", device="NVIDIA H100 80GB HBM3", devices_per_node=8, memory_bytes=85_000_000_000, backend="nccl",
    ranks=8, threads=1, software={"torch": "2.13.0"},
)  # fmt: skip
CPU = replace(H100, platform="cpu", device="some CPU", backend="gloo", ranks=2)


def sample(kind: str, sizes: tuple[float, ...], time_s: float, name: str = "", **changes: object) -> Sample:
    values = {"dtype": "bfloat16", "spread_frac": 0.02, "repeats": 5, "condition": 0, "source": Source.MEASURED}
    values |= {"measured_on": "2026-11-24", **changes}
    return Sample(kind=kind, name=name, dims=dict(zip(DIMS[kind], sizes, strict=True)), time_s=time_s, **values)  # type: ignore[arg-type]


def profile(*samples: Sample, where: Conditions = H100) -> Profile:
    return make_profile("1", (where,), samples)


# ---- the file


def test_a_profile_is_read_as_it_was_written() -> None:
    made = profile(sample("gemm", (1, 512, 512, 512), 1e-5), sample("gemm", (1, 1024, 512, 512), 2e-5))
    data = encode_profile(made)
    assert decode_profile(data, "p") == made
    assert encode_profile(decode_profile(data, "p")) == data
    assert made.curves[0].unit == "flops" and made.curves[0].samples == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: b[: len(b) // 2], "not a profile"),
        (lambda b: b.replace(b'"repeats"', b'"repeat"'), "unknown key repeat"),
        (lambda b: b.replace(b'"time_s":1e-05', b'"time_s":NaN'), "NaN is not JSON"),
        (lambda b: b.replace(b'"time_s":1e-05', b'"time_s":-1.0'), "must be > 0"),
        (lambda b: b.replace(b'"condition":0', b'"condition":7'), "condition 7 is not there"),
        (lambda b: b.replace(b"planner.profile/1", b"planner.plan/1"), "no schema"),
        (lambda b: b.replace(b'"gemm"', b'"gamm"'), "unknown kind"),
        (lambda b: b"[1]", "no schema"),
    ],
)
def test_damage_is_one_line_with_the_place(change: object, said: str) -> None:
    data = encode_profile(profile(sample("gemm", (1, 512, 512, 512), 1e-5)))
    with pytest.raises(ProfileError, match=said) as error:
        decode_profile(change(data), "p.json")  # type: ignore[operator]
    assert "\n" not in str(error.value) and "p.json" in str(error.value) and not error.value.stale


def test_another_version_is_stale() -> None:
    data = encode_profile(profile(sample("launch", (), 1e-6)))
    with pytest.raises(ProfileError, match="profile again") as error:
        decode_profile(data.replace(b"planner.profile/1", b"planner.profile/2"), "p")
    assert error.value.stale


def test_merging_keeps_the_last_of_equal_samples() -> None:
    one = profile(sample("gemm", (1, 64, 64, 64), 1e-5), sample("launch", (), 5e-6))
    two = profile(sample("gemm", (1, 64, 64, 64), 2e-5))
    other = profile(sample("gemm", (1, 64, 64, 64), 9e-5), where=CPU)
    both = merge(one, two, other, tool_version="1")
    times = {(both.where(s).platform, s.kind): s.time_s for s in both.samples}
    assert times == {("cuda", "gemm"): 2e-5, ("cuda", "launch"): 5e-6, ("cpu", "gemm"): 9e-5}
    assert merge(both, both, tool_version="1") == both


def test_the_hash_is_of_the_content() -> None:
    one = profile(sample("launch", (), 1e-6))
    assert profile_sha256(one) == profile_sha256(decode_profile(encode_profile(one), "p"))
    assert profile_sha256(one) != profile_sha256(profile(sample("launch", (), 2e-6)))


# ---- has the machine changed?


def noisy(factor: float, seed: int) -> Profile:
    noise = np.random.default_rng(seed).normal(0, 0.02, 12)
    sizes = [(1.0, 256.0 * (i + 1), 512.0, 512.0) for i in range(12)]
    return profile(*(sample("gemm", s, factor * 1e-5 * s[1] * math.exp(x)) for s, x in zip(sizes, noise, strict=True)))


@pytest.mark.parametrize(("factor", "changed"), [(1.0, False), (1.2, True), (0.8, True), (1.03, False)])
def test_a_change_is_told_from_noise(factor: float, changed: bool) -> None:
    (found,) = compare(noisy(1.0, 1), noisy(factor, 2))
    assert found.changed is changed and found.samples == 12
    assert found.ratio == pytest.approx(factor, rel=0.03)


def test_other_conditions_are_not_compared_but_named() -> None:
    old, new = profile(sample("launch", (), 1e-6)), profile(sample("launch", (), 1e-6), where=CPU)
    assert compare(old, new) == ()
    assert any("NVIDIA H100" in text for text in differences(old, new))


def test_doubts() -> None:
    made = profile(sample("launch", (), 1e-6, note="noisy"), sample("gemm", (1, 8, 8, 8), 1e-6))
    assert doubts(made, "2026-11-25") == ("1 of 2 samples were noisy: other work ran beside them",)
    assert any("days old" in text for text in doubts(made, "2027-11-25"))


# ---- tables


@given(
    st.dictionaries(
        st.tuples(st.sampled_from((1.0, 2.0, 4.0, 8.0)), st.sampled_from((1.0, 3.0, 9.0))),
        st.floats(1e-6, 1e-2), min_size=1, max_size=8,
    ),
    st.tuples(st.floats(0.5, 16), st.floats(0.5, 16)),
    st.tuples(st.floats(1, 4), st.floats(1, 4)),
)  # fmt: skip
def test_what_lies_between_measured_times_is_monotone(
    times: dict[tuple[float, ...], float], at: tuple[float, float], grow: tuple[float, float]
) -> None:
    table = make_table(("m", "n"), times)

    def time_s(m: float, n: float) -> float:
        return float(between(table, (m, n), np.asarray(1e-5 * m * n)))

    assert time_s(at[0] * grow[0], at[1] * grow[1]) >= time_s(*at) * (1 - 1e-12)
    for sizes, settled in zip(table.dims, table.time_s, strict=True):
        assert time_s(*sizes) == pytest.approx(settled)


@given(st.lists(st.tuples(st.floats(1, 1e9), st.floats(1e-6, 1)), min_size=1, max_size=6), st.floats(0.1, 1e10))
def test_curves_are_monotone_and_exact(rows: list[tuple[float, float]], size: float) -> None:
    table = make_table(("num_bytes",), {(x,): t for x, t in rows})
    assert float(along(table, 1.3 * size)) >= float(along(table, size)) * (1 - 1e-9)
    assert np.allclose(along(table, [row[0] for row in table.dims]), table.time_s)


def test_consistent_times_are_kept_and_contradictions_meet_in_the_middle() -> None:
    assert make_table(("m",), {(1.0,): 1.0, (2.0,): 3.0}).time_s == (1.0, 3.0)
    assert make_table(("m",), {(1.0,): 4.0, (2.0,): 1.0}).time_s == pytest.approx((2.0, 2.0))


def test_coverage() -> None:
    table = make_table(("m", "n"), {(1.0, 1.0): 1.0, (4.0, 4.0): 2.0})
    assert covered(table, (4.0, 4.0)) is Source.MEASURED
    assert covered(table, (2.0, 3.0)) is Source.INTERPOLATED
    assert covered(table, (8.0, 3.0)) is Source.MODELLED
    assert covered(None, (8.0, 3.0)) is Source.MODELLED


# ---- fits


def other_machine() -> ClusterSpec:
    """An H100 cluster unlike the preset: slower GEMMs and links."""
    base = load_cluster("h100")
    fit = base.device.gemm["bfloat16"]
    fit = replace(fit, peak_frac=0.6 * fit.peak_frac, sustained_frac=0.6 * fit.sustained_frac, overhead_s=9e-6)
    memory = replace(base.device.memory, hbm_frac=0.5)
    tier = base.tiers[0]
    link = replace(tier.collectives["all_gather"], efficiency=0.3, base_s=0.0, step_s=4e-6)
    tier = replace(tier, collectives={**tier.collectives, "all_gather": link})
    device = replace(base.device, gemm={"bfloat16": fit}, memory=memory)
    return replace(base, device=device, tiers=(tier, *base.tiers[1:]))


def measured_there(shapes: list[tuple[float, float, float]]) -> Profile:
    there = other_machine()
    gemms = [sample("gemm", (1, *s), float(gemm_s(there.device, "bfloat16", 1, *s, heat=0.0))) for s in shapes]
    traffic = [
        sample("memory", (b,), float(memory_bound_s(there.device, b, 1)), "elementwise") for b in (1e4, 1e6, 1e8, 1e9)
    ]
    links = [
        sample("collective", (b, 8, 1), float(comm.all_gather_s(there, (8, 8), b, 1, 8)), "all_gather")
        for b in 2.0 ** np.arange(12, 29, 2)
    ]
    return profile(*gemms, *traffic, *links)


def test_a_fit_finds_the_machine_that_was_measured() -> None:
    shapes = [(2.0**i, 2.0**j, 4096.0) for i in range(9, 14) for j in range(10, 14)]
    there, fitted = other_machine(), fit_cluster(load_cluster("h100"), measured_there(shapes), 8)
    for m, n, k in ((3000.0, 1500.0, 6000.0), (700.0, 9000.0, 3000.0)):
        bare = replace(fitted.device, measured={})
        assert float(gemm_s(bare, "bfloat16", 1, m, n, k)) == pytest.approx(
            float(gemm_s(there.device, "bfloat16", 1, m, n, k)), rel=0.06
        )
    assert float(memory_bound_s(fitted.device, 3e8, 1)) == pytest.approx(
        float(memory_bound_s(there.device, 3e8, 1)), rel=0.05
    )
    assert float(comm.all_gather_s(fitted, (8, 8), 1e7, 1, 8)) == pytest.approx(
        float(comm.all_gather_s(there, (8, 8), 1e7, 1, 8)),
        rel=0.06,
    )
    assert fitted.device.gemm["bfloat16"].evidence is Source.INTERPOLATED


def test_measured_points_are_exact_and_others_keep_the_preset() -> None:
    made = measured_there([(512.0, 1024.0, 4096.0), (2048.0, 1024.0, 4096.0), (8192.0, 8192.0, 4096.0)])
    base = load_cluster("h100")
    fitted = fit_cluster(base, made, 8)
    for s in made.samples:
        if s.kind == "gemm":
            assert float(gemm_s(fitted.device, "bfloat16", *s.sizes)) == pytest.approx(s.time_s)
        if s.kind == "collective":
            assert float(comm.all_gather_s(fitted, (8, 8), s.dims["num_bytes"], 1, 8)) == pytest.approx(s.time_s)
    assert fitted.tiers[0].collectives["all_to_all"] == base.tiers[0].collectives["all_to_all"]
    assert fitted.tiers[1] == base.tiers[1]
    assert cluster_from_dict(cluster_to_dict(fitted)) == fitted
    assert cluster_sha256(fitted) != cluster_sha256(base)


def test_a_cluster_without_a_profile_keeps_its_hash() -> None:
    assert "measured" not in cluster_to_dict(load_cluster("h100"))


def test_only_samples_of_the_device_count() -> None:
    made = profile(sample("launch", (), 1e-6))
    assert describes(H100, load_cluster("h100")) and not describes(H100, load_cluster("a100-80gb"))
    assert not describes(replace(H100, memory_bytes=40 * 2**30), load_cluster("h100"))
    with pytest.raises(ProfileError, match=r"of NVIDIA H100 80GB HBM3, not of cpu"):
        fit_cluster(load_cluster("cpu-gloo"), made, 2)


def test_ranks_that_share_a_cpu_are_told_apart() -> None:
    made = merge(
        profile(sample("gemm", (1, 64, 64, 64), 1e-4, dtype="float32"), where=replace(CPU, ranks=1)),
        profile(sample("gemm", (1, 64, 64, 64), 4e-4, dtype="float32"), where=replace(CPU, ranks=8)),
        tool_version="1",
    )
    for gpus, time_s in ((1, 1e-4), (8, 4e-4)):
        device = fit_cluster(load_cluster("cpu-gloo"), made, gpus).device
        assert float(gemm_s(device, "float32", 1, 64, 64, 64)) == pytest.approx(time_s)


def test_kernels_of_busy_cores_hold_for_more_ranks_in_turns() -> None:
    """Two ranks on two cores take a GEMM's time, four of them twice as long; what fewer ranks took says nothing."""
    where = replace(CPU, devices_per_node=2)
    sizes, other = (1.0, 512.0, 512.0, 512.0), (1.0, 256.0, 512.0, 512.0)

    def taken(ranks: int, time_s: float, shape: tuple[float, ...] = sizes) -> Profile:
        return profile(sample("gemm", shape, time_s, dtype="float32"), where=replace(where, ranks=ranks))

    def times(*profiles: Profile) -> dict[tuple[float, ...], float]:
        table = fit_cluster(load_cluster("cpu-gloo"), merge(*profiles, tool_version="1"), 4).device.measured
        return dict(zip(table["gemm/float32"].dims, table["gemm/float32"].time_s, strict=True))

    assert times(taken(2, 1e-3), taken(4, 5e-4, other)) == pytest.approx({sizes: 2e-3, other: 5e-4})
    assert times(taken(2, 1e-3), taken(4, 3e-3)) == pytest.approx({sizes: 3e-3})  # its own sample goes first
    assert times(taken(1, 1e-4), taken(4, 5e-4, other)) == pytest.approx({other: 5e-4})  # one rank left a core idle


def test_overlap_is_capped_by_what_was_hidden() -> None:
    rows = (
        sample("gemm", (1, 64, 64, 64), 1e-3, dtype="float32"),
        sample("collective", (1e6, 8, 1), 2e-3, "all_reduce", dtype="float32"),
        sample("collective_gemm", (1e6, 8, 1, 64, 64, 64), 2.6e-3, "all_reduce", dtype="float32"),
        sample("launch", (), 7e-6),
    )
    assert hidden_frac(rows) == pytest.approx(0.4)
    engine = fit_engine(job().machine.engine, profile(*rows), load_cluster("h100"), 8)
    assert engine.overlap_zero3 == pytest.approx(0.4) and engine.overlap_tp == 0.0
    assert engine.host_launch_s == pytest.approx(7e-6)


# ---- prices and evidence


def layer_profile(factor: float) -> Profile:
    """Every layer `factor` times slower than the preset prices it, on one H100 at micro-batches 1 and 4."""
    machine = machine_for(graph(), load_cluster("h100"), job().machine.engine, 1)
    facts = model_facts(graph(), machine.engine)
    sizes = np.array([1.0, 4.0])
    keys = spec_keys(*(spec(gpus=1, micro_batch_size=int(s)) for s in sizes))
    prices = price_model(facts, keys, machine)
    samples = []
    layers = ((facts.prologue, prices.prologue), *zip(facts.classes, prices.classes, strict=True),
              (facts.epilogue, prices.epilogue))  # fmt: skip
    for of_layer, price in layers:
        ways = {"forward": price.forward_s, "backward": price.backward_input_s + price.weight_s}
        for way, times in ways.items():
            name = f"{layer_name((of_layer.traced or of_layer).layer)}/{way}"
            samples += [
                sample("layer", (s, graph().traced_seq_len), factor * float(t), name)
                for s, t in zip(sizes, times, strict=True)
            ]
    return profile(*samples, where=replace(H100, ranks=1))


def test_layers_take_what_was_measured() -> None:
    made = layer_profile(1.7)
    cluster = fit_cluster(load_cluster("h100"), made, 1)
    machine = machine_for(graph(), cluster, job().machine.engine, 1)
    facts = model_facts(graph(), machine.engine)
    price = price_model(facts, spec_keys(spec(gpus=1, micro_batch_size=4)), machine).classes[0]
    times = {s.name: s.time_s for s in made.samples if s.dims["micro_batch_size"] == 4}
    name = layer_name(facts.classes[0].layer)
    assert float(price.forward_s[0]) == pytest.approx(times[f"{name}/forward"])
    assert float((price.backward_input_s + price.weight_s)[0]) == pytest.approx(times[f"{name}/backward"])


def test_leaves_say_what_they_rest_on() -> None:
    cluster = fit_cluster(load_cluster("h100"), layer_profile(1.0), 1)
    ours = job().machine.engine  # its loss is not the one that was measured
    traced = replace(ours, kernels={})
    for engine, gpus, mbs, tp, evidence in (
        (traced, 1, 4, 1, Source.MEASURED), (ours, 1, 4, 1, Source.INTERPOLATED),
        (traced, 1, 2, 1, Source.INTERPOLATED), (traced, 2, 4, 2, Source.INTERPOLATED),
    ):  # fmt: skip
        machine = machine_for(graph(), cluster, engine, gpus)
        tree = estimate(graph(), machine, spec(gpus=gpus, micro_batch_size=mbs, tp=tp)).breakdown
        found = {leaf.name: leaf.source for leaf in tree.leaves()}
        assert found["gemm"] is evidence
        assert found["attention"] is (Source.MEASURED if engine is ours else evidence)  # of layers run as measured
        assert found["bubble"] is Source.MODELLED
    plain = estimate(graph(), machine_for(graph(), load_cluster("h100"), job().machine.engine, 1), spec(gpus=1))
    assert all(leaf.source is not Source.MEASURED for leaf in plain.breakdown.leaves())


# ---- what to measure


def test_cases_are_the_shapes_of_the_plan_space() -> None:
    cases = op_cases(graph(), "bfloat16", 4, 80e9)
    shapes = {case.key[3] for case in cases if case.kind == "gemm"}
    assert (1.0, 2048.0, 8192.0, 2048.0) in shapes  # FFN up, whole
    assert (1.0, 2048.0, 2048.0, 2048.0) in shapes  # over tp 4
    assert all(size == int(size) for shape in shapes for size in shape)
    assert {case.kind for case in layer_cases(graph(), "m.py")} == {"layer"}
    kinds = {case.kind for case in weighted([*cases, *layer_cases(graph(), "m.py")])}
    assert kinds == {"gemm", "attention", "memory", "optimizer", "copy", "launch", "layer"}


def test_groups_that_lie_alike_are_measured_once() -> None:
    groups = {case.key[3][1:] for case in comm_cases(load_cluster("h100"), 16, 80e9)
              if case.kind == "collective" and case.name == "all_reduce"}  # fmt: skip
    assert groups == {(2.0, 1.0), (4.0, 1.0), (8.0, 1.0), (16.0, 1.0), (2.0, 8.0), (4.0, 4.0), (8.0, 2.0)}
    assert comm_cases(load_cluster("h100"), 1, 80e9) == []


def cases_on_a_line(weights: list[float]) -> list[Case]:
    return [
        Case(kind="memory", name="norm", dtype="float32", dims={"num_bytes": 2.0**i}, weight=w)
        for i, w in enumerate(weights)
    ]


def test_the_heaviest_comes_first_and_then_the_farthest() -> None:
    chooser = Chooser(cases_on_a_line([1.0] * 4 + [1.5] + [1.0] * 8))
    assert chooser.next() == 4
    chooser.measured(4, 0.01)
    assert chooser.next() in (11, 12)  # out of reach of what is known
    left = chooser.left
    chooser.measured(12, 0.01)
    assert chooser.left < left


def test_it_ends_when_nothing_is_uncertain() -> None:
    chooser = Chooser(cases_on_a_line([1.0] * 20))
    count = 0
    while (index := chooser.next()) is not None:
        chooser.measured(index, 0.01)
        count += 1
    assert 5 <= count < 20
    noisy_ones = Chooser(cases_on_a_line([1.0] * 20))
    for i in range(20):
        noisy_ones.measured(i, 0.3)
    assert noisy_ones.next() is None  # measured is measured, however noisy
