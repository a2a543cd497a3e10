"""Errors of the runtime. Each message is one line: what is wrong, where, and what to do."""

from __future__ import annotations


class RuntimePlanError(ValueError):
    """The plan cannot be applied to this model, this world or these files."""
