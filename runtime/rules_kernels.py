"""Rules of the ops of planner.kernels that a model may call, or that stand in for its modules (norms.py, gated.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from planner.runtime.rules import elementwise, local_operand, merged, rule, wrap_tree
from planner.runtime.sharded import Context, Sharded, Unshardable

rule("planner_kernels::swiglu")(elementwise)


@rule("planner_kernels::rms_norm", "planner_kernels::add_rms_norm")
def rms_norm(ctx: Context, func: Any, args: Any, kwargs: Any) -> Any:
    """(x, weight, eps) or (x, residual, weight, eps): rows must be whole, of every output too."""
    *rows, weight, eps = args
    splits = merged(rows, rows[0].dim())
    if any(s.dim == rows[0].dim() - 1 for s in splits):
        raise Unshardable("norm over a sharded dim", splits)
    local = [local_operand(x, ctx, rows[0].dim(), splits) for x in (*rows, weight)]
    return wrap_tree(func(*local, eps), splits, ctx)


@rule("planner_kernels::rope")
def rope(ctx: Context, func: Any, args: Any, kwargs: Any) -> Any:
    """(x (batch, sequence, heads, D), cos, sin (sequence, D/2), back): every position takes its own angles."""
    x, cos, sin, back = args
    if not isinstance(x, Sharded) or any(s.dim == 3 for s in x.splits):
        raise Unshardable("rotation of parts of a head", getattr(x, "splits", ()))
    positions = tuple(replace(s, dim=0) for s in x.splits if s.dim == 1)
    angles = [local_operand(t, ctx, 2, positions) for t in (cos, sin)]
    return wrap_tree(func(x.local, *angles, back), x.splits, ctx)
