"""Runs of planner.runtime as rows: a run.json (planner.run/1) holds its plan, so it is predicted with the plan's own
model, cluster and engine (a measured profile is in those two), never with a preset that resembles them.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from planner.costmodel.units import GIB
from planner.plan import MAX_BYTES, Plan, decode_plan
from planner.reports.cases import Case
from planner.reports.rows import Row, Skip
from planner.reports.systems import Software

SCHEMA = "planner.run/1"
SOURCE = "planner.runtime"


def run_files(path: Path) -> list[Path]:
    """Every run.json at or under `path`; ValueError if there is none."""
    found = sorted(path.rglob("run.json")) if path.is_dir() else [path]
    if not found:
        raise ValueError(f"{path}: no run.json in this folder; `python -m planner.runtime train` writes one")
    return found


def read_runs(paths: Iterable[Path]) -> tuple[list[Case], Counter[str]]:
    """(cases, runs skipped by reason). ValueError of one line for a file that is no record of a run."""
    cases: list[Case] = []
    skipped: Counter[str] = Counter()
    for path in paths:
        try:
            cases.append(_case(path, _read(path)))
        except Skip as reason:
            skipped[str(reason)] += 1
    return cases, skipped


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = json.loads(file.read(MAX_BYTES + 1))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"{path}: no record of a run: schema is not {SCHEMA}; run it again with this version")
    return data


def _case(path: Path, data: dict[str, Any]) -> Case:
    plan = decode_plan(json.dumps(data.get("plan")).encode(), f"{path} (plan)")
    inputs = plan.inputs
    if (data.get("device_type") == "cuda") == inputs.cluster.device.name.startswith("cpu"):
        raise Skip(f"ran on {data.get('device_type')}, planned for {inputs.cluster.device.name}")
    if data.get("step_time_s") is None:
        raise Skip("no step after the warm-up")
    return Case(
        row=Row(_cells(path, plan, data)), software=Software(engine=inputs.engine.name, memory="allocated"),
        graph=inputs.graph, cluster=inputs.cluster, engine=inputs.engine, spec=plan.decisions,
    )  # fmt: skip


def _cells(path: Path, plan: Plan, data: dict[str, Any]) -> dict[str, str]:
    inputs = plan.inputs
    routed = any(group.routed for layer in inputs.graph.classes for group in layer.params)
    work = f"{inputs.graph_sha256[:12]} {inputs.num_gpus} {inputs.seq_len} {inputs.global_batch_size}"
    cells = {
        "id": str(path), "source": SOURCE, "outcome": "ok", "gpu": inputs.cluster.device.name,
        "arch": "moe" if routed else "dense", "model_name": inputs.graph.name, "engine": inputs.engine.name,
        "plan_group": f"{inputs.cluster.name} {work}", "step_time_s": _number(path, data, "step_time_s", 1.0),
    }  # fmt: skip
    peaks = data.get("peak_tensor_bytes")
    if peaks is not None:
        data = {"peak": max(peaks) if isinstance(peaks, list) and peaks else peaks}
        cells["peak_memory_gb"] = _number(path, data, "peak", 1 / GIB)
    return cells


def _number(path: Path, data: dict[str, Any], key: str, unit: float) -> str:
    value = data[key]
    if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{path}: {key} is {value!r}, not a positive number: the record is damaged")
    return f"{value * unit:.12f}"
