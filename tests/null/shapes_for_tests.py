"""Graphs and plans that several tests share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from planner.costmodel.graph import ModelGraph, TpCut
from planner.costmodel.keys import Array, Keys
from planner.costmodel.strategy import LayerStrategy, PlanSpec
from planner.reports.shapes import Shape, build_graph

GPT = Shape(num_layers=8, hidden=1024, ffn=4096, heads=16, kv_heads=16, head_dim=64, vocab=51_200, seq_len=2048,
            gated=False, tied=True, rotary=False)  # fmt: skip
LLAMA = Shape(num_layers=8, hidden=1024, ffn=2816, heads=16, kv_heads=4, head_dim=64, vocab=32_000, seq_len=2048,
              gated=True, tied=False, rotary=True)  # fmt: skip

MOE = replace(LLAMA, num_experts=8, top_k=2)


def graph(shape: Shape = GPT) -> ModelGraph:
    return build_graph(shape)


def with_module_head(graph: ModelGraph) -> ModelGraph:
    """The graph with its head as a tracer names a module's product."""
    ops = graph.epilogue.ops
    named = tuple(replace(op, name="head.mm") if op.cut is TpCut.VOCAB and op.gemm else op for op in ops)
    return replace(graph, epilogue=replace(graph.epilogue, ops=named))


def one(value: float) -> Array:
    return np.array([float(value)])


def keys(**changes: float) -> Keys:
    values = {"tp": 1, "sp": 0, "ulysses": 1, "ring": 1, "ep": 1, "micro_batch_size": 1, "vocab_parallel": 0} | changes
    return Keys(**{name: one(value) for name, value in values.items()})


def plan(**changes: Any) -> PlanSpec:
    pp, layers = changes.get("pp", 1), changes.pop("num_layers", 8)
    size = layers // pp
    values: dict[str, Any] = {
        "global_batch_size": 64,
        "stage_layers": tuple((i * size, (i + 1) * size) for i in range(pp)),
        "layers": (LayerStrategy(recompute=changes.pop("recompute", "none")),) * layers,
    }
    return PlanSpec(**(values | changes))
