"""A layer's forward as the plan wants it: plain local tensors at its edge, the rules and the strategy inside."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from planner.costmodel.strategy import LayerStrategy
from planner.runtime.recompute import strategy_body
from planner.runtime.rules import ShardMode
from planner.runtime.sharded import Context, Cut, Sharded, wrap
from planner.runtime.support import ZERO_BUBBLE

_META = "_planner_sharded_inputs"


def unwrap(tree: Any) -> tuple[Any, list[Any]]:
    """The tree with plain local tensors, and the Sharded ones that were there by position."""
    leaves, spec = tree_flatten(tree)
    marks = [(x.splits, x.wide) if isinstance(x, Sharded) else None for x in leaves]
    return tree_unflatten([x.local if isinstance(x, Sharded) else x for x in leaves], spec), marks


def rewrap(tree: Any, marks: list[Any], ctx: Context) -> Any:
    """The tree with Sharded tensors where there are marks (`unwrap`)."""
    leaves, spec = tree_flatten(tree)
    whole = [x if m is None else Sharded(x, m[0], ctx, m[1]) for x, m in zip(leaves, marks, strict=True)]
    return tree_unflatten(whole, spec)


def mark_parameters(slots: list[tuple[nn.Module, str, Cut]]) -> None:
    """Write every parameter's Cut on the tensor that stands in its slot now (FSDP swaps them)."""
    for owner, name, cut in slots:
        param = owner._parameters[name]
        if param is not None:
            param.planner_cut = cut  # type: ignore[attr-defined]


def slots_of(module: nn.Module, prefix: str, cuts: dict[str, Cut], names: dict[int, str]) -> Any:
    """(owner, attribute, Cut) of every parameter inside `module`; `names` maps shared ones to canonical names."""
    found = []
    for _, owner in module.named_modules():
        for attribute, param in owner._parameters.items():
            if param is not None and id(param) in names:
                found.append((owner, attribute, cuts[names[id(param)]]))
    return found


def adapt(layer: nn.Module, ctx: Context, slots: Any, strategy: LayerStrategy, uses_rules: bool, whole: bool) -> None:
    """Replace the forward of `layer`. Call it after fully_shard: inputs are unwrapped before FSDP's hooks.

    `whole`: the layer is the model itself, which has no tensors of ours at its edge.
    """
    original = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        marks = marks_of(layer)
        leaves, spec = tree_flatten((args, kwargs))
        out_marks: list[Any] = []

        def body(values: list[Any]) -> Any:
            mark_parameters(slots)
            with ShardMode(ctx) if uses_rules else nullcontext():
                tree = tree_unflatten(values, spec)
                inputs = rewrap(tree, marks, ctx) if marks is not None else tree
                out = original(*inputs[0], **inputs[1])
                ctx.column = None
            if whole:
                return out
            local, out_marks[:] = unwrap(out)
            return local

        out = strategy_body(body, ctx.strategy or strategy, once=ctx.spec.schedule not in ZERO_BUBBLE)(leaves)
        leave_marks(layer, out_marks)
        return out

    layer.forward = forward  # type: ignore[method-assign]
    if uses_rules and not whole:
        plain_edge(layer, ctx)


def plain_edge(module: nn.Module, ctx: Context) -> None:
    """Unwrap what goes into `module` before FSDP's hooks see it, and wrap what comes out after them.

    The module's forward takes the marks of its inputs (`marks_of`) and leaves those of its outputs (`leave_marks`).
    """
    module.register_forward_pre_hook(_enter, prepend=True, with_kwargs=True)
    module.register_forward_hook(_leave(ctx))


def marks_of(module: nn.Module) -> list[Any] | None:
    """What was sharded among the leaves of (args, kwargs), None when the edge is not plain."""
    return module.__dict__.pop(_META, None)


def leave_marks(module: nn.Module, marks: list[Any]) -> None:
    """Say what is sharded among the leaves of the output."""
    module.__dict__[_META + "_out"] = marks


def _enter(layer: nn.Module, args: Any, kwargs: Any) -> Any:
    (args, kwargs), marks = unwrap((args, kwargs))
    layer.__dict__[_META] = marks
    return args, kwargs


def _leave(ctx: Context) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(layer: nn.Module, _args: Any, out: Any) -> Any:
        return rewrap(out, layer.__dict__.pop(_META + "_out"), ctx)

    return hook


__all__ = ["adapt", "mark_parameters", "slots_of", "torch", "wrap"]
