"""Errors of the runtime. Each message is one line: what is wrong, where, and what to do."""

from __future__ import annotations

from planner.errors import BUG, UserError


class RuntimePlanError(UserError):
    """The plan cannot be applied to this model, this world or these files."""


class TrainingError(UserError):
    """Training cannot go on: the loss is not a number, data ended early."""

    exit_code = BUG


class CheckpointError(UserError):
    """A checkpoint that is not there, not whole, or of another model."""
