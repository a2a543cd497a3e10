"""Errors of the profiler. Each message is one line: what is wrong, where, and what to do."""

from __future__ import annotations


def one_line(text: str) -> str:
    """`text` on one line, cut at 600 characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= 600 else flat[:597] + "..."


class TraceError(ValueError):
    """The model could not be turned into a graph."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class GraphFileError(TraceError):
    """A saved graph could not be read."""
