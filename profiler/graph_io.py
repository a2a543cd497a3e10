"""ModelGraph as canonical JSON and back, without torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from typing import Any

import msgspec

from planner.costmodel import graph as records
from planner.costmodel.graph import LayerClass, ModelGraph
from planner.profiler.errors import GraphFileError

SCHEMA = "planner.graph/1"


def encode_graph(graph: ModelGraph) -> bytes:
    """`graph` as canonical JSON: sorted keys, two-space indent of one level, newline at the end."""
    body = msgspec.to_builtins(graph)
    text = json.dumps({"schema": SCHEMA, **body}, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return text.encode() + b"\n"


def decode_graph(data: bytes) -> ModelGraph:
    """The graph in `data`. Raises GraphFileError for broken JSON, another schema, unknown or missing keys."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise GraphFileError(f"graph file is not JSON: {error}") from None
    if not is_graph(body):
        found = body.get("schema") if isinstance(body, dict) else type(body).__name__
        raise GraphFileError(f"graph file has schema {found!r}, expected {SCHEMA!r}: trace the model again")
    del body["schema"]
    _refuse_unknown(body, ModelGraph, "graph")
    try:
        graph = msgspec.convert(body, ModelGraph, strict=True)
    except (msgspec.ValidationError, RecursionError) as error:
        raise GraphFileError(f"graph file does not fit schema {SCHEMA}: {error}") from None
    _check_indices(graph)
    return graph


def is_graph(body: object) -> bool:
    """Whether parsed JSON is a saved graph, by its schema key."""
    return isinstance(body, dict) and body.get("schema") == SCHEMA


def graph_sha256(graph: ModelGraph) -> str:
    """SHA-256 of the canonical JSON."""
    return hashlib.sha256(encode_graph(graph)).hexdigest()


def _refuse_unknown(value: Any, expected: Any, where: str) -> None:
    # msgspec refuses unknown keys for its own Structs only, not for dataclasses.
    origin = typing.get_origin(expected)
    if origin is tuple and isinstance(value, list):
        for i, item in enumerate(value):
            _refuse_unknown(item, typing.get_args(expected)[0], f"{where}[{i}]")
    elif origin is types.UnionType and value is not None:
        inner = next(arg for arg in typing.get_args(expected) if arg is not type(None))
        _refuse_unknown(value, inner, where)
    elif isinstance(expected, type) and dataclasses.is_dataclass(expected) and isinstance(value, dict):
        hints = _hints(expected)
        unknown = sorted(set(value) - set(hints))
        if unknown:
            raise GraphFileError(f"graph file has unknown key {unknown[0]!r} at {where}")
        for key, item in value.items():
            _refuse_unknown(item, hints[key], f"{where}.{key}")


_HINTS: dict[type, dict[str, Any]] = {}


def _hints(cls: type) -> dict[str, Any]:
    if cls not in _HINTS:
        _HINTS[cls] = typing.get_type_hints(cls, vars(records))
    return _HINTS[cls]


def _check_indices(graph: ModelGraph) -> None:
    for i, run in enumerate(graph.runs):
        if not 0 <= run.layer_class < len(graph.classes) or run.count != len(run.paths) or run.count < 1:
            raise GraphFileError(
                f"graph file: runs[{i}] names no class or its count is not its number of paths"
            )
    for layer in (graph.prologue, *graph.classes, graph.epilogue):
        _check_layer(layer)


def _check_layer(layer: LayerClass) -> None:
    for i, op in enumerate(layer.ops):
        if any(not 0 <= a < len(layer.activations) for a in (*op.inputs, *op.outputs)):
            raise GraphFileError(
                f"graph file: layer {layer.name!r} ops[{i}] names an activation that is not there"
            )
    for i, activation in enumerate(layer.activations):
        if not -1 <= activation.producer < len(layer.ops):
            raise GraphFileError(
                f"graph file: layer {layer.name!r} activations[{i}] names an op that is not there"
            )


__all__ = ["SCHEMA", "decode_graph", "encode_graph", "graph_sha256", "is_graph"]
