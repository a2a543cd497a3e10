"""Which implementation of a kernel runs: what it costs, measured or by what it moves, and what auto makes of that."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from shapes_for_tests import LLAMA, graph, keys
from test_profile import H100, profile, sample

from planner.commands.kernels import chosen
from planner.costmodel.compute import memory_bound_s
from planner.costmodel.engine import get_engine
from planner.costmodel.estimate import machine_for
from planner.costmodel.facts import layer_facts
from planner.costmodel.graph import LayerClass
from planner.costmodel.kernel_choice import KERNELS, OPS, fastest, kernel_s, kernels_on, problems, sample_names
from planner.costmodel.presets import load_cluster
from planner.costmodel.price import price_layer
from planner.costmodel.profile import Sample
from planner.costmodel.profiled import fit_cluster
from planner.profiler.cases import kernel_cases

CLUSTER = load_cluster("h100")
SIZES = (2.0**20, 2.0**24)


def measured(times: dict[str, float]) -> list[Sample]:
    """Samples of kernels at SIZES, in seconds a byte."""
    return [sample("kernel", (n,), rate * n, name) for name, rate in times.items() for n in SIZES]


def test_a_kernel_takes_what_was_measured_else_what_it_moves() -> None:
    device = fit_cluster(CLUSTER, profile(*measured({"rms_norm/forward/liger": 3e-12})), 8).device
    liger = kernel_s(device, "bfloat16", "rms_norm", ("liger", "liger"), [2 * SIZES[0]], 2, backward=False)
    assert liger == pytest.approx([2 * 3e-12 * SIZES[0]])
    for how in ("ours", "liger", "torch"):
        passes, launches = KERNELS["rms_norm"].moves[1][how]
        back = kernel_s(device, "bfloat16", "rms_norm", ("", how), [2 * SIZES[0]], 2, backward=True)
        assert back == pytest.approx(memory_bound_s(device, [passes * 2 * SIZES[0]], 2 * launches))
    assert float(kernel_s(device, "float32", "rms_norm", ("liger", ""), SIZES[0], 1, backward=False)) == pytest.approx(
        float(memory_bound_s(device, SIZES[0], 1))
    )


def test_auto_is_the_fastest_that_was_measured() -> None:
    samples = measured({
        "rms_norm/forward/ours": 2e-12, "rms_norm/forward/liger": 1e-12, "rms_norm/forward/torch": 1e-13,
        "rms_norm/backward/ours": 2e-12, "rms_norm/backward/liger": 3e-12, "swiglu/forward/ours": 1e-12,
    })  # fmt: skip
    fitted = fit_cluster(CLUSTER, profile(*samples), 8)
    assert fastest(fitted.device.measured) == {"rms_norm": "liger", "rms_norm_backward": "ours", "swiglu": "ours"}
    auto = chosen(None, get_engine("planner"), fitted).kernels
    assert auto == kernels_on("h100") | {"rms_norm": "liger"}
    assert chosen("ours", get_engine("planner"), fitted).kernels == kernels_on("h100")
    assert chosen("auto,rms_norm=torch", get_engine("planner"), fitted).kernels["rms_norm"] == "torch"
    assert chosen(None, get_engine("planner"), load_cluster("cpu-gloo")).kernels == kernels_on("cpu")


def layer_of(kernel: str) -> LayerClass:
    """One that has a norm as torch's module has it, one whose code calls a kernel of ours, one with a loss."""
    traced = graph(LLAMA)
    if kernel == "cross_entropy":
        return traced.epilogue
    was, now = {"rms_norm": ("norm1", "norm1.rms_norm"), "swiglu": ("mul", "mlp.planner_kernels::swiglu")}[kernel]
    ops = tuple(replace(op, name=now) if op.name == was else op for op in traced.classes[0].ops)
    return replace(traced.classes[0], ops=ops)


@pytest.mark.parametrize("kernel", ["rms_norm", "swiglu", "cross_entropy"])
def test_a_layer_is_priced_by_the_chosen_implementation(kernel: str) -> None:
    """Its measured time moves the layer's by as much, in each direction; torch leaves what a module does by itself."""
    engine, traced, layer = get_engine("planner"), graph(LLAMA), layer_of(kernel)
    plain = machine_for(traced, CLUSTER, engine, 8)
    facts = layer_facts(layer, engine)
    (calls,) = (c for c in facts.kernels if c.kernel == kernel)
    at = keys(micro_batch_size=4)
    before = price_layer(facts, at, plain)
    names = [name for name in sample_names() if name.startswith(f"{kernel}/") and name.endswith("/ours")]
    there = fit_cluster(CLUSTER, profile(*measured(dict.fromkeys(names, 1e-11)), where=replace(H100, ranks=1)), 8)
    after = price_layer(facts, at, machine_for(traced, there, engine, 8))
    each = 4 * calls.num_bytes / calls.num_calls
    for backward, (x, y) in enumerate(((before.memory_f, after.memory_f), (before.memory_b, after.memory_b))):
        passes, launches = KERNELS[kernel].moves[backward]["ours"]
        roofline = memory_bound_s(plain.cluster.device, passes * each, launches)
        assert y - x == pytest.approx(calls.num_calls * (1e-11 * each - roofline))
    torchs = replace(engine, kernels=kernels_on("cpu"))
    left = [(c.kernel, c.choices) for c in layer_facts(layer, torchs).kernels]
    assert left == ([("swiglu", ("torch", "torch"))] if kernel == "swiglu" else [])


def test_torchs_ring_step_pays_for_its_scores() -> None:
    traced = graph(LLAMA)
    times = {}
    for text in ("ours", "ours,ring_step=torch"):
        engine = chosen(text, get_engine("planner"), CLUSTER)
        machine = machine_for(traced, CLUSTER, engine, 8)
        facts = layer_facts(traced.classes[0], engine)
        times[text] = [price_layer(facts, keys(ring=ring), machine).attention_f for ring in (1, 4)]
    assert times["ours"][0] == times["ours,ring_step=torch"][0]
    scores = LLAMA.heads * LLAMA.seq_len**2 / 4
    more = times["ours,ring_step=torch"][1] - times["ours"][1]
    assert more == pytest.approx(62 * scores / (CLUSTER.device.hbm_bytes_per_s.value * CLUSTER.device.memory.hbm_frac))


def test_a_profile_on_gpus_times_what_is_installed() -> None:
    names = {case.name for case in kernel_cases("bfloat16", 80e9, ("torch", "ours", "fla"))}
    assert {name for name in sample_names() if name.startswith("gla")} - names == {
        "gla/forward/torch", "gla/backward/torch",  # thousands of launches
    }  # fmt: skip
    assert not any(name.endswith("/liger") for name in names) and "rms_norm/backward/torch" in names


def test_what_a_plan_cannot_have() -> None:
    assert problems(kernels_on("h100")) == problems({}) == []
    assert len(problems({"rms": "ours", "swiglu_backward": "liger", "gla": "fla"})) == 2
    assert all(how in OPS[op] for k in KERNELS.values() for op, m in zip(k.ops, k.moves, strict=True) for how in m)
    assert np.all([len(k.moves[0]) >= 2 for k in KERNELS.values()])
