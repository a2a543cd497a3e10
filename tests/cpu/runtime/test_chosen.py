"""--kernels from the flag to the kernel that runs: plan, price, runtime. Liger is a stand-in: it needs a GPU."""

from __future__ import annotations

import argparse
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

import train_model  # noqa: E402
from cases import traced  # noqa: E402

from planner.cli import entry  # noqa: E402
from planner.costmodel.kernel_choice import kernels_on  # noqa: E402
from planner.files import read_plan  # noqa: E402
from planner.kernels import dispatch, norm  # noqa: E402
from planner.plan import Plan  # noqa: E402
from planner.profiler.graph_io import encode_graph  # noqa: E402
from planner.runtime.apply import parallelize_plan  # noqa: E402
from planner.runtime.chosen import adopt  # noqa: E402
from planner.runtime.errors import RuntimePlanError  # noqa: E402
from planner.runtime.mesh import forget_groups  # noqa: E402
from planner.runtime.train import add_arguments, main  # noqa: E402
from planner.views import kernels_text  # noqa: E402

MODEL = Path(__file__).with_name("train_model.py")


@pytest.fixture(scope="module")
def graph_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "model.graph.json"
    path.write_bytes(encode_graph(traced(str(MODEL), 16)))
    return path


def planned(graph: Path, kernels: str) -> Plan:
    path = graph.with_name(f"{kernels.replace(',', ' ')}.json")
    command = ["estimate", str(graph), "--gpus", "1", "--global-batch", "8", "--kernels", kernels, "--quiet"]
    assert entry([*command, "-o", str(path)]) == 0
    return read_plan(path)


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A module that is called as Liger 0.8 is, computes in torch and writes down its calls."""
    calls: list[str] = []

    def module(name: str, **content: object) -> None:
        made = types.ModuleType(name)
        made.__spec__ = importlib.machinery.ModuleSpec(name, None)
        made.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, made)

    def forward(x, w, eps, offset, mode, row_mode):  # type: ignore[no-untyped-def]
        assert (offset, mode, row_mode) == (0.0, "gemma", None)
        calls.append("forward")
        flat = x.view(-1, x.shape[-1])
        y, rstd = norm._rms(flat, w, eps)
        return y.view(x.shape), flat, rstd, 1, 1, 1

    def backward(dy, x, w, rstd, offset, mode, block, warps, in_place, row_mode):  # type: ignore[no-untyped-def]
        assert (offset, mode, block, warps, in_place, row_mode) == (0.0, 1, 64, 4, False, None)
        calls.append("backward")
        return norm._rms_backward(dy.view(x.shape), None, x, w, rstd)

    for name in ("liger_kernel", "liger_kernel.ops"):
        module(name)
    module("liger_kernel.ops.utils", calculate_settings=lambda cols: (64, 4))
    modes = {"llama": 0, "gemma": 1, "none": -1}
    norms = {"rms_norm_forward": forward, "rms_norm_backward": backward, "_str_to_casting_mode": modes}
    module("liger_kernel.ops.rms_norm", **norms)
    dispatch.installed.cache_clear()
    yield calls
    dispatch.choose({})
    dispatch.installed.cache_clear()


def test_from_the_flag_to_the_kernel_that_runs(
    graph_file: Path, liger: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(graph_file, "torch,rms_norm=liger")
    assert plan.inputs.engine.kernels == kernels_on("cpu") | dict.fromkeys(("rms_norm", "rms_norm_backward"), "liger")
    assert kernels_text(plan.inputs) == "torch; rms_norm liger, rms_norm_backward liger"
    torch.manual_seed(0)
    model, own = train_model.build_model(), train_model.build_model()
    own.load_state_dict(model.state_dict())
    adopt(plan, "cuda")  # as a GPU's process does; tensors stay here
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    tokens = torch.arange(8 * 17).view(8, 17) % 96
    try:
        parallel = parallelize_plan(model, plan)
        assert (parallel.norms, parallel.gated_mlps) == (9, 0)
        result = parallel.step(tokens[:, :-1], tokens[:, 1:])
    finally:
        dist.destroy_process_group()
        forget_groups()
    assert liger.count("forward") == liger.count("backward") == 8 * 9  # micro-batches of one
    logits = own(tokens[:, :-1])
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert result.loss == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert dispatch.table("cpu")["rms_norm_backward"] == "liger"  # the step record's


def test_the_price_follows_the_choice(graph_file: Path) -> None:
    """Liger's norm moves a third more backward than ours; torch's are the model's own chains."""
    parts = {}
    for kernels in ("ours", "rms_norm=liger", "ours,swiglu=torch", "torch", "auto"):
        plan = planned(graph_file, kernels)
        parts[kernels] = sum(p.time_s for p in plan.predicted.breakdown.children if p.name)
    assert parts["auto"] == parts["ours"] < parts["rms_norm=liger"] < parts["torch"]
    assert parts["ours"] < parts["ours,swiglu=torch"] < parts["torch"]


def test_what_cannot_run_is_said_before_anything_is_loaded(
    graph_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(graph_file, "torch,swiglu=liger")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "installed", lambda backend: backend == "torch")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    path = graph_file.with_name("torch swiglu=liger.json")
    args = parser.parse_args(["no such model.py", "--plan", str(path), "--out", str(tmp_path / "out")])
    with pytest.raises(RuntimePlanError, match="swiglu on 'liger', .*: pip install liger-kernel, or plan") as error:
        main(args)
    assert error.value.exit_code == 2 and "\n" not in str(error.value)
    plan = read_plan(path)
    engine = replace(plan.inputs.engine, kernels={"swiglu": "fla", "swigl": "ours"})
    with pytest.raises(RuntimePlanError, match="kernels has no op 'swigl'"):
        adopt(replace(plan, inputs=replace(plan.inputs, engine=engine)), "cuda")
