"""Bytes of tensors on real ranks fall as the plan says: ZeRO stages, recomputation, offload."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from memory_model import CHUNK_ROWS, LAYERS  # noqa: E402
from worlds import run_world  # noqa: E402

from planner.costmodel import price  # noqa: E402
from planner.costmodel.engine import get_engine  # noqa: E402
from planner.costmodel.estimate import estimate, machine_for  # noqa: E402
from planner.costmodel.graph import ModelGraph  # noqa: E402
from planner.costmodel.presets import load_cluster  # noqa: E402
from planner.costmodel.strategy import LayerStrategy, PlanSpec  # noqa: E402
from planner.profiler.graph_io import encode_graph  # noqa: E402
from planner.profiler.trace import trace_model  # noqa: E402

RANKS = 2


def spec(zero_stage: int = 1, recompute: str = "none", offload: bool = False, **options: int) -> PlanSpec:
    layer = LayerStrategy(recompute=recompute, offload_activations=offload)
    return PlanSpec(
        dp_shard=RANKS, zero_stage=zero_stage, global_batch_size=8, stage_layers=((0, LAYERS),),
        layers=(layer,) * LAYERS, **options,
    )  # fmt: skip


PLANS = {
    **{f"zero{stage}": spec(stage) for stage in range(4)},
    "host optimizer": spec(offload_optimizer=True),
    "none": spec(micro_batch_size=4),
    "selective": spec(recompute="selective", micro_batch_size=4),
    "full": spec(recompute="full", micro_batch_size=4),
    "offload": spec(offload=True, micro_batch_size=4),
}
# Of the model with a large vocabulary, by its loss.
HEADED = {chunked: spec(micro_batch_size=4, chunked_loss=chunked) for chunked in (False, True)}
FALLS = [("zero0", "zero1"), ("zero1", "zero2"), ("zero2", "zero3"), ("none", "selective")]
FALL_LIMIT = 0.2
# Plans that the cost model prices too high on a model this small: they must fall at least as far as it says.
FALLS_FURTHER = [("selective", "full"), ("none", "offload")]
PEAK_LIMIT = 0.10
STATE_BYTES = 12  # float32 masters and two moments


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, ModelGraph], list[list[list[int]]]]:
    """Graphs by builder, and what every rank measured of PLANS and then of HEADED."""
    source, folder, graphs, paths = Path(__file__).with_name("memory_model.py"), tmp_path_factory.mktemp("g"), {}, {}
    for builder in ("build_model", "build_headed"):
        graphs[builder] = trace_model(f"{source}:{builder}")
        paths[builder] = str(folder / builder)
        Path(paths[builder]).write_bytes(encode_graph(graphs[builder]))
    specs = [("build_model", plan) for plan in PLANS.values()] + [("build_headed", plan) for plan in HEADED.values()]
    payload = {"graphs": paths, "specs": [(builder, msgspec.to_builtins(plan)) for builder, plan in specs]}
    return graphs, run_world(RANKS, "memory_rank.run", payload)


def test_the_chunked_loss_keeps_no_logits(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it saves, beside what the cost model says; torch's own loss runs on a CPU."""
    graphs, ranks = measured
    graph = graphs["build_headed"]
    monkeypatch.setattr(price, "CHUNK_ROWS", CHUNK_ROWS)
    engine = get_engine("planner")
    engine = replace(engine, kernels=dict.fromkeys(engine.kernels, "torch"))
    machine = machine_for(graph, load_cluster("h100"), engine, RANKS)
    plain, chunked = (estimate(graph, machine, plan).ranks[0].memory.peak_bytes for plan in HEADED.values())
    peaks = [max(rank[len(PLANS) + i][0] for rank in ranks) for i in range(len(HEADED))]
    assert peaks[0] - peaks[1] == pytest.approx(plain - chunked, rel=FALL_LIMIT)


def test_peaks_fall_as_predicted(measured: Any) -> None:
    """The largest sum of tensors in a step, from the allocator, beside what the cost model says of the plan."""
    graphs, ranks = measured
    graph = graphs["build_model"]
    machine = machine_for(graph, load_cluster("h100"), get_engine("planner"), RANKS)
    wanted, peak, host = {}, {}, {}
    params = sum(g.num_params for c in graph.layer_classes for g in graph.classes[c].params)
    params += sum(g.num_params for g in graph.prologue.params) + sum(g.num_params for g in graph.epilogue.params)
    for i, (name, plan) in enumerate(PLANS.items()):
        memory = estimate(graph, machine, plan).ranks[0].memory
        wanted[name] = memory.peak_bytes - memory.fixed_bytes
        peak[name], host[name] = (max(rank[i][side] for rank in ranks) for side in (0, 1))
        shards = RANKS if plan.zero_stage else 1
        masters = 4 if plan.offload_optimizer else 0  # FSDP gathers from a float32 shard on the device as well
        between = max(rank[i][2] + rank[i][3] for rank in ranks)
        assert between == pytest.approx((STATE_BYTES + masters) * params / shards, rel=1e-3), name
    for more, less in FALLS:
        fall = (peak[more] - peak[less]) / (wanted[more] - wanted[less])
        assert fall == pytest.approx(1, abs=FALL_LIMIT), f"{more} -> {less}: {fall:.2f} of the predicted fall"
    for more, less in FALLS_FURTHER:
        assert peak[more] - peak[less] >= (1 - FALL_LIMIT) * (wanted[more] - wanted[less]) > 0, f"{more} -> {less}"
    for name in ("zero0", "zero1", "zero2", "zero3", "none", "selective"):
        assert peak[name] == pytest.approx(wanted[name], rel=PEAK_LIMIT), name
    assert all(host[name] == 0 for name in PLANS if name not in ("host optimizer", "offload"))
    # The moments leave the device, the float32 shard stays: 8 of the 12 bytes a parameter that the plan takes away.
    assert peak["zero1"] - peak["host optimizer"] == pytest.approx(8 * params / RANKS, rel=0.02)
    assert host["host optimizer"] == pytest.approx(STATE_BYTES * params / RANKS, rel=1e-3)
    assert host["offload"] == pytest.approx(peak["none"] - peak["offload"], rel=0.15)
