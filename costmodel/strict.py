"""Strict records in JSON: canonical bytes out, unknown keys refused on the way in. Standard library only."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any


def canonical_json(body: Mapping[str, Any]) -> bytes:
    """`body` as the one JSON text of its value: sorted keys, no blanks, ASCII, a newline at the end."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode() + b"\n"


def refuse_unknown(value: Any, expected: Any, where: str) -> None:
    """ValueError that names the place of the first key of `value` that record type `expected` does not have.

    msgspec refuses unknown keys for its own Structs only, not for dataclasses.
    """
    origin = typing.get_origin(expected)
    if origin is tuple and isinstance(value, list):
        for i, item in enumerate(value):
            refuse_unknown(item, typing.get_args(expected)[0], f"{where}[{i}]")
    elif origin is types.UnionType and value is not None:
        inner = next(arg for arg in typing.get_args(expected) if arg is not type(None))
        refuse_unknown(value, inner, where)
    elif isinstance(expected, type) and dataclasses.is_dataclass(expected) and isinstance(value, dict):
        hints = _hints(expected)
        unknown = sorted(set(value) - set(hints))
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r} at {where}")
        for key, item in value.items():
            refuse_unknown(item, hints[key], f"{where}.{key}")


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)
