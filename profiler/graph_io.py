"""ModelGraph as canonical JSON and back, without torch."""

from __future__ import annotations

import hashlib
import json

import msgspec

from planner.costmodel.graph import SCHEMA, ModelGraph, check_graph
from planner.costmodel.strict import canonical_json, refuse_unknown
from planner.profiler.errors import GraphFileError


def encode_graph(graph: ModelGraph) -> bytes:
    """`graph` as canonical JSON: sorted keys, newline at the end."""
    return canonical_json({"schema": SCHEMA, **msgspec.to_builtins(graph)})


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
    try:
        refuse_unknown(body, ModelGraph, "graph")
        graph = msgspec.convert(body, ModelGraph, strict=True)
        check_graph(graph)
    except (ValueError, RecursionError) as error:  # msgspec.ValidationError is a ValueError
        raise GraphFileError(f"graph file does not fit schema {SCHEMA}: {error}") from None
    return graph


def is_graph(body: object) -> bool:
    """Whether parsed JSON is a saved graph, by its schema key."""
    return isinstance(body, dict) and body.get("schema") == SCHEMA


def graph_sha256(graph: ModelGraph) -> str:
    """SHA-256 of the canonical JSON."""
    return hashlib.sha256(encode_graph(graph)).hexdigest()


__all__ = ["SCHEMA", "decode_graph", "encode_graph", "graph_sha256", "is_graph"]
