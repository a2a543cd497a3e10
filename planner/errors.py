"""Errors that a user sees: each is one line that says what is wrong, where and what to do, with an exit code."""

from __future__ import annotations

OK, BUG, USAGE, INFEASIBLE, STALE, INTERRUPTED = 0, 1, 2, 3, 4, 130


class UserError(ValueError):
    """Input that cannot be used; `exit_code` is what the command ends with."""

    exit_code = USAGE


class PlanFileError(UserError):
    """A plan file that is not JSON, not a plan, damaged or of unknown shape."""


class StalePlanError(UserError):
    """A plan of another schema version, model, cluster or cost model than the one at hand."""

    exit_code = STALE


class InfeasibleError(UserError):
    """Nothing in the declared space fits."""

    exit_code = INFEASIBLE


def one_line(text: str) -> str:
    """`text` on one line, cut at 600 characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= 600 else flat[:597] + "..."
