"""Runs plans on torch. `planner.runtime.parallelize` applies one; `python -m planner.runtime train` trains."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Load `parallelize` when it is asked for, since it imports torch."""
    if name == "parallelize":
        from planner.runtime.apply import parallelize_plan

        return parallelize_plan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
