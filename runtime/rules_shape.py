"""Rules of functions that only rearrange: views, transposes, chunks, concatenation, indexing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from planner.runtime.rules import local_operand, merged, name_of, rule
from planner.runtime.sharded import (
    SEQ,
    TP,
    Context,
    Recut,
    Sharded,
    Split,
    Unshardable,
    place,
    whole_for_parts,
    wrap,
)


def _left(x: Sharded, split: Split) -> int:
    return math.prod(x.shape[: split.dim]) * split.outer


def _local_shape(shape: tuple[int, ...], splits: tuple[Split, ...], ctx: Context) -> list[int]:
    local = list(shape)
    for s in splits:
        local[s.dim] = local[s.dim] // s.units * len(ctx.held(s.axis, s.units))
    return local


def _remembered(
    ctx: Context, name: str, x: Sharded, rest: tuple[Any, ...], options: dict[str, Any], follow: Callable[[], Any]
) -> Any:
    """The result of `follow`, which depends on shapes and numbers alone, from the last time they were the same."""
    if ctx.packed is not None or any(isinstance(a, torch.Tensor) for a in rest):
        return follow()
    key = (name, x.shape, x.splits, str(rest), str(options))
    if key not in ctx.memory:
        ctx.memory[key] = follow()
    return ctx.memory[key]


@rule("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as", "ravel")
def reshape(ctx: Context, func: Any, args: Any, kwargs: Any) -> Any:
    """The split follows its units to the dim that now holds them."""
    x = args[0]
    if len(args) > 1 and isinstance(args[1], torch.dtype):
        raise Unshardable("view as another dtype", x.splits)
    rest = [torch.empty(a.shape, device="meta") if isinstance(a, torch.Tensor) else a for a in args[1:]]

    def follow() -> tuple[tuple[int, ...], tuple[Split, ...], list[int]]:
        shape = tuple(func(torch.empty(x.shape, device="meta"), *rest, **kwargs).shape)
        splits = tuple(place(shape, _left(x, s), s) for s in x.splits)
        return shape, splits, _local_shape(shape, splits, ctx)

    shape, splits, mine = _remembered(ctx, name_of(func), x, args[1:], kwargs, follow)
    local = x.local.reshape(mine)
    if x.wide is None:
        return wrap(local, splits, ctx)
    wide = tuple(replace(s, axis=SEQ, units=ctx.units(SEQ)) for s in splits if ctx.cuts_sequence)
    return Sharded(local, splits, ctx, x.wide.reshape(_local_shape(shape, wide, ctx)))


@rule("transpose", "swapaxes", "swapdims", "t", "permute", "movedim", "moveaxis")
def transpose(ctx: Context, func: Any, args: Any, kwargs: Any) -> Any:
    """Dims move, and their splits with them."""
    x = args[0]

    def follow() -> tuple[Split, ...]:
        marks = torch.empty([i + 2 for i in range(x.dim())], device="meta")  # a dim's size tells where it came from
        order = [size - 2 for size in func(marks, *args[1:], **kwargs).shape]
        return tuple(replace(s, dim=order.index(s.dim)) for s in x.splits)

    splits = _remembered(ctx, name_of(func), x, args[1:], kwargs, follow)
    return wrap(func(x.local, *args[1:], **kwargs), splits, ctx)


@rule("expand", "expand_as", "broadcast_to")
def expand(ctx: Context, func: Any, args: Any, kwargs: Any) -> Any:
    """New leading dims and dims of size 1 grow; cut dims keep their parts."""
    x = args[0]
    rest = [torch.empty(a.shape, device="meta") if isinstance(a, torch.Tensor) else a for a in args[1:]]
    shape = tuple(func(torch.empty(x.shape, device="meta"), *rest, **kwargs).shape)
    splits = tuple(replace(s, dim=s.dim + len(shape) - x.dim()) for s in x.splits)
    return wrap(x.local.expand(_local_shape(shape, splits, ctx)), splits, ctx)


@rule("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split")
def chunk(ctx: Context, func: Any, args: Any, kwargs: Any) -> Any:
    """Along a cut dim only equal pieces, each cut in itself: the fused projections of q, k, v or gate and up."""
    x = args[0]
    dim = kwargs.get("dim", args[2] if len(args) > 2 else 0) % x.dim()
    mine = next((s for s in x.splits if s.dim == dim), None)
    if mine is None:
        return tuple(wrap(t, x.splits, ctx) for t in func(x.local, *args[1:], **kwargs))
    parts = func(torch.empty(x.shape, device="meta"), *args[1:], **kwargs)
    if len({t.shape[dim] for t in parts}) != 1:
        raise Unshardable("unequal pieces of a sharded dim", x.splits)
    if mine.outer % len(parts):
        if mine.axis == TP and mine.origin:
            raise Recut(mine.origin, outer=len(parts))
        raise Unshardable("pieces of a sharded dim", x.splits)
    splits = tuple(replace(s, outer=s.outer // len(parts)) if s is mine else s for s in x.splits)
    return tuple(wrap(t, splits, ctx) for t in x.local.chunk(len(parts), dim))


@rule("unbind", "iter")
def unbind(ctx: Context, func: Any, args: Any, kwargs: Any) -> Any:
    """One tensor per index of a whole dim."""
    x = args[0]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % x.dim()
    splits = _without(x, dim)
    found = tuple(wrap(t, splits, ctx) for t in x.local.unbind(dim))
    return iter(found) if name_of(func) == "iter" else found


def _without(x: Sharded, dim: int) -> tuple[Split, ...]:
    for s in x.splits:
        if s.dim == dim:
            if s.axis == TP and s.origin and s.outer == 1:
                raise Recut(s.origin, outer=x.shape[dim])
            raise Unshardable("indexing a sharded dim", x.splits)
    return tuple(replace(s, dim=s.dim - (s.dim > dim)) for s in x.splits)


@rule("select")
def select(ctx: Context, func: Any, args: Any, kwargs: Any) -> Any:
    """One index of a whole dim."""
    x, dim = args[0], args[1] % args[0].dim()
    return wrap(func(x.local, *args[1:], **kwargs), _without(x, dim), ctx)


@rule("getitem")
def getitem(ctx: Context, func: Any, args: Any, kwargs: Any) -> Any:
    """Slices and integers on whole dims; on cut dims only everything."""
    x, index = args
    if not isinstance(x, Sharded):
        raise Unshardable("indexing by a sharded tensor", ())
    items = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(i, torch.Tensor | list) for i in items):
        raise Unshardable("indexing by a tensor", x.splits)
    if Ellipsis in items:
        at = items.index(Ellipsis)
        used = sum(i is not None and i is not Ellipsis for i in items)
        items[at : at + 1] = [slice(None)] * (x.dim() - used)
    splits, dim, out_dim = [], 0, 0
    for item in items:
        if item is None:
            out_dim += 1
            continue
        mine = [s for s in x.splits if s.dim == dim]
        if mine and item != slice(None) and not _everything(item, x.shape[dim]):
            raise Unshardable("slicing a sharded dim", x.splits)
        splits += [replace(s, dim=out_dim) for s in mine]
        out_dim += isinstance(item, slice)
        dim += 1
    splits += [replace(s, dim=s.dim - dim + out_dim) for s in x.splits if s.dim >= dim]
    cut = {s.dim for s in x.splits}
    local: list[Any] = []
    dim = 0
    for item in items:
        local.append(slice(None) if item is not None and dim in cut else item)
        dim += item is not None
    return wrap(x.local[tuple(local)], tuple(splits), ctx)


def _everything(item: Any, size: int) -> bool:
    return isinstance(item, slice) and item.indices(size) == (0, size, 1)


@rule("narrow")
def narrow(ctx: Context, func: Any, args: Any, kwargs: Any) -> Any:
    """A range of a whole dim."""
    x, dim = args[0], args[1] % args[0].dim()
    if any(s.dim == dim for s in x.splits):
        raise Unshardable("narrowing a sharded dim", x.splits)
    return wrap(func(x.local, *args[1:], **kwargs), x.splits, ctx)


@rule("cat", "concat", "concatenate", "stack")
def cat(ctx: Context, func: Any, args: Any, kwargs: Any) -> Any:
    """Concatenation along a whole dim of tensors brought to the same parts."""
    tensors = list(args[0] if args else kwargs["tensors"])
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    width = tensors[0].dim()
    new = name_of(func) == "stack"
    dim = dim % (width + new)
    heads = next((s for t in tensors if isinstance(t, Sharded) for s in t.splits if s.axis == TP), None)
    if heads is not None:
        tensors = [_for_each_head(t, heads, ctx) for t in tensors]
    splits = merged(tensors, width)
    if not new and any(s.dim == dim for s in splits):
        raise Unshardable("concatenation along a sharded dim", splits)
    out = func([local_operand(t, ctx, width, splits) for t in tensors], dim)
    moved = tuple(replace(s, dim=s.dim + (new and s.dim >= dim)) for s in splits)
    return wrap(out, moved, ctx)


def _for_each_head(x: torch.Tensor, heads: Split, ctx: Context) -> torch.Tensor:
    """The heads of this rank of X, with all positions, if X is repeated along the dim of `heads`; else X itself.

    (The rotary part of the keys in latent attention, which all heads share.)
    """
    splits, local = (x.splits, x.local) if isinstance(x, Sharded) else ((), x)
    if local.shape[heads.dim] == 1 or local.stride(heads.dim) != 0 or any(s.dim == heads.dim for s in splits):
        return x
    whole = whole_for_parts(wrap(local.narrow(heads.dim, 0, 1), splits, ctx), ctx)
    splits, local = (whole.splits, whole.local) if isinstance(whole, Sharded) else ((), whole)
    sizes = list(local.shape)
    sizes[heads.dim] = x.shape[heads.dim] // heads.units * len(ctx.held(TP, heads.units))
    return Sharded(local.expand(sizes), (*splits, heads), ctx)


@rule("repeat_interleave")
def repeat_interleave(ctx: Context, func: Any, args: Any, kwargs: Any) -> Any:
    """Every element repeated in place: parts stay parts."""
    x = args[0]
    if len(args) < 2 and "repeats" not in kwargs or not isinstance(args[1] if len(args) > 1 else 1, int):
        raise Unshardable("repeat_interleave by a tensor", x.splits)
    return wrap(func(x.local, *args[1:], **kwargs), x.splits, ctx)
