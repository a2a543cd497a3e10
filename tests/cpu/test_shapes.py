"""Graphs built from a published shape against traced ones of the same architecture."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from planner.costmodel.graph import LayerClass, ModelGraph, Op, TensorLayout, TpCut
from planner.profiler.trace import trace_model
from planner.reports.shapes import Shape, build_graph

ROOT = Path(__file__).parents[2]
HF = "tests/corpus/hf"
GPT3 = Shape(num_layers=96, hidden=12_288, ffn=49_152, heads=96, kv_heads=96, head_dim=128, vocab=51_200,
             seq_len=2048, gated=False, tied=True, rotary=False)
LLAMA3 = Shape(num_layers=32, hidden=4096, ffn=14_336, heads=32, kv_heads=8, head_dim=128, vocab=128_256,
               seq_len=4096, gated=True, tied=False, rotary=True)
MIXTRAL = dataclasses.replace(LLAMA3, vocab=32_000, num_experts=8, top_k=2)
QWEN3 = Shape(num_layers=48, hidden=2048, ffn=768, heads=32, kv_heads=4, head_dim=128, vocab=151_936, seq_len=4096,
              gated=True, tied=False, rotary=True, qk_norm=True, num_experts=128, top_k=8)


def layers(graph: ModelGraph) -> tuple[LayerClass, ...]:
    return (graph.prologue, *graph.classes, graph.epilogue)


def cost_of(op: Op) -> tuple[object, ...]:
    """Everything of an op that pricing reads."""
    numbers = (op.flops, op.backward_flops, op.flops_counted, op.bytes_moved, op.weight_bytes)
    return (op.kind, op.cut, op.gemm, op.attention, op.routed, *numbers)


def saved_bytes(layer: LayerClass) -> dict[tuple[TensorLayout, bool], int]:
    sums: dict[tuple[TensorLayout, bool], int] = {}
    for a in layer.activations:
        if a.saved:
            key = (a.layout, a.scales_with_batch)
            sums[key] = sums.get(key, 0) + a.num_bytes
    return sums


def params(layer: LayerClass) -> dict[tuple[TpCut, bool], int]:
    return {(group.cut, group.routed): group.num_params for group in layer.params}


TRACED = [("examples/gpt3_175b.py", GPT3), ("examples/llama3.py:build_8b", LLAMA3)]
CONFIGS = [("llama3_8b", LLAMA3), ("mixtral_8x7b", MIXTRAL), ("qwen3_30b_a3b", QWEN3)]


@pytest.mark.parametrize(("source", "shape"), TRACED)
def test_dense_graph_equals_the_traced_one(source: str, shape: Shape) -> None:
    traced = trace_model(str(ROOT / source), seq_len=shape.seq_len)
    built = build_graph(shape)
    assert built.num_params == traced.num_params
    assert (built.num_layers, built.tied_params) == (traced.num_layers, traced.tied_params)
    for mine, theirs in zip(layers(built)[1:], layers(traced)[1:], strict=True):
        assert [cost_of(op) for op in mine.ops] == [cost_of(op) for op in theirs.ops]
        assert (mine.tp_divides, mine.kv_heads) == (theirs.tp_divides, theirs.kv_heads)
        assert (mine.input_bytes, mine.output_bytes) == (theirs.input_bytes, theirs.output_bytes)
        assert saved_bytes(mine) == saved_bytes(theirs)
        assert params(mine) == params(theirs)
    # The tracer also sees the rotary tables and position numbers that the prologue makes once.
    mine, theirs = built.prologue, traced.prologue
    kept = [op for op in theirs.ops if op.cut is not TpCut.REPLICATED]
    assert [cost_of(op) for op in mine.ops] == [cost_of(op) for op in kept]
    assert params(mine) == params(theirs)


@pytest.mark.parametrize(("config", "shape"), CONFIGS)
def test_hugging_face_graph_has_the_same_matmuls_and_parameters(config: str, shape: Shape) -> None:
    """Its eager RMSNorm and router are made of more small ops than native ones: those are not compared."""
    traced = trace_model(str(ROOT / HF / f"{config}.json"), seq_len=shape.seq_len)
    built = build_graph(shape)
    assert built.num_params == traced.num_params
    for mine, theirs in zip(layers(built), layers(traced), strict=True):
        assert params(mine) == params(theirs)
        matmuls = [[cost_of(op) for op in layer.ops if op.gemm or op.attention] for layer in (mine, theirs)]
        assert matmuls[0] == matmuls[1]
        assert (mine.tp_divides, mine.kv_heads) == (theirs.tp_divides, theirs.kv_heads)
        assert (mine.num_experts, mine.experts_per_token) == (theirs.num_experts, theirs.experts_per_token)
    inner = (TensorLayout.INNER, True)
    if not shape.qk_norm:
        assert saved_bytes(built.classes[0])[inner] == saved_bytes(traced.classes[0])[inner]


def test_joined_projections_change_neither_flops_nor_parameters() -> None:
    apart, joined = (build_graph(dataclasses.replace(LLAMA3, fused_projections=f)) for f in (False, True))
    assert apart.num_params == joined.num_params
    flops = [sum(op.flops for op in graph.classes[0].ops) for graph in (apart, joined)]
    assert flops[0] == flops[1]
    gemms = [sum(op.gemm is not None for op in graph.classes[0].ops) for graph in (apart, joined)]
    assert gemms == [7, 4]
