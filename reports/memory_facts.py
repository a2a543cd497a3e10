"""The first stage's memory that Korthikanti et al. 2022 print, against our ledger.

Their figures count transformer layers alone (12 L h^2 parameters, no embedding, no allocator), so do ours here.
"""

from __future__ import annotations

import csv
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from planner.costmodel.engine import get_engine
from planner.costmodel.estimate import machine_for, model_facts, price_model, spec_keys, spec_layout
from planner.costmodel.pipeline import ScheduleKind, in_flight
from planner.costmodel.presets import load_cluster
from planner.costmodel.rates import build_rates
from planner.costmodel.strategy import STRATEGIES, LayerStrategy, PlanSpec
from planner.costmodel.units import GIB
from planner.reports import stages
from planner.reports.shapes import Shape, build_graph

PATH = Path(__file__).resolve().parent / "published_memory.csv"
SEQ_LEN, VOCAB = 2048, 51_200


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One printed figure and what the ledger says, in bytes."""

    label: str
    published_bytes: float
    predicted_bytes: float

    @property
    def error(self) -> float:
        """Predicted over published, minus one."""
        return self.predicted_bytes / self.published_bytes - 1


def memory_facts() -> list[Fact]:
    """All figures of published_memory.csv."""
    with PATH.open(newline="", encoding="utf-8") as file:
        return [_fact(row) for row in csv.DictReader(file)]


def _fact(row: dict[str, str]) -> Fact:
    shape = Shape(
        num_layers=int(row["num_layers"]), hidden=int(row["hidden"]), ffn=4 * int(row["hidden"]),
        heads=int(row["heads"]), kv_heads=int(row["heads"]), head_dim=int(row["hidden"]) // int(row["heads"]),
        vocab=VOCAB, seq_len=SEQ_LEN, gated=False, tied=True, rotary=False, dtype="float16",
    )  # fmt: skip
    graph, spec = build_graph(shape), _spec(row, shape)
    engine = dataclasses.replace(get_engine("megatron-2022"), fragmentation_frac=0.0)
    machine = machine_for(graph, load_cluster("a100-80gb"), engine, spec.num_gpus)
    prices = price_model(model_facts(graph, engine), spec_keys(spec), machine)
    pipeline = (_one(spec.pp), _one(spec.vpp), _one(10 * spec.pp))
    rates = build_rates(graph, prices, spec_layout(spec), *pipeline, machine)
    layers = len(spec.rank_layers(0))
    if row["quantity"] == "states":
        predicted = layers * float(rates.state_bytes_CK[0, 0])
    else:
        per_layer = float(rates.activation_bytes_CSK[0, STRATEGIES.index(spec.layers[0]), 0])
        alive = in_flight(spec.schedule, 10 * spec.pp, spec.pp, spec.vpp)[0]
        predicted = layers * float(alive) * per_layer
    label = f"{row['model']} {row['quantity']}" + ("" if row["quantity"] == "states" else f", {row['recompute']}")
    return Fact(label=label, published_bytes=float(row["gib"]) * GIB, predicted_bytes=predicted)


def _one(value: int) -> np.ndarray[Any, Any]:
    return np.array([float(value)])


def _spec(row: dict[str, str], shape: Shape) -> PlanSpec:
    pp, vpp, micro = int(row["pp"]), int(row["vpp"]), int(row["micro_batch"])
    return PlanSpec(
        tp=int(row["tp"]), sequence_parallel=row["sequence_parallel"] == "1", pp=pp, vpp=vpp,
        schedule=ScheduleKind.INTERLEAVED if vpp > 1 else ScheduleKind.ONE_F_ONE_B, micro_batch_size=micro,
        global_batch_size=10 * pp * micro, vocab_parallel=True,
        stage_layers=stages.even(shape.num_layers, pp * vpp),
        layers=(LayerStrategy(recompute=row["recompute"]),) * shape.num_layers,
    )  # fmt: skip
