"""Sharded: a tensor that shows the model its whole shape while this rank holds a part of it.

The model's own code runs unchanged on such tensors: every torch function that meets one goes through a rule
(rules.py) that works on the local parts. A dim is cut into `units` equal parts inside each of `outer` equal
pieces; which units a rank holds depends on the axis:
  tp    unit rank * units // tp; fewer units than ranks means that ranks share one (KV heads)
  seq   sequence over context ranks, in the zigzag of ring attention (chunks r and 2 ring - 1 - r), Ulysses inside
  seqtp the same and then over the TP ranks: the residual stream under sequence parallelism
Packed documents are a sequence as long as the longest of them, of whose positions (units) a rank holds some several
times: what depends on the position alone (rotary tables, learned positions) is looked up there by any model's code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from planner.costmodel.strategy import LayerStrategy, PlanSpec
from planner.runtime import collectives as c
from planner.runtime.errors import RuntimePlanError

if TYPE_CHECKING:
    from planner.runtime.packing import Packed

TP, SEQ, SEQTP = "tp", "seq", "seqtp"


@dataclass(frozen=True, slots=True)
class Split:
    """How one dim is cut. `origin` names the parameter whose cut made a TP split."""

    dim: int
    axis: str
    units: int
    outer: int = 1
    origin: str = ""


class Unshardable(Exception):
    """An op would need whole rows of a sharded tensor; `origins` are the column cuts that made it."""

    def __init__(self, what: str, splits: tuple[Split, ...]) -> None:
        super().__init__(what)
        self.origins = tuple(dict.fromkeys(s.origin for s in splits if s.origin))


class Recut(Exception):
    """The cut of parameter `origin` must change to `units` or `outer` pieces, or to lie on `dim`."""

    def __init__(self, origin: str, *, units: int = 0, outer: int = 0, dim: int = -1) -> None:
        super().__init__(origin)
        self.origin, self.units, self.outer, self.dim = origin, units, outer, dim


@dataclass(slots=True)
class Cut:
    """What the runtime knows of a parameter: how TP cuts it, and how its gradient arises.

    kind: "column", "row", "vocab" or "" (whole). dim, units, outer as in Split. `partial` and `full` are set by
    the rules when the parameter is used on sharded resp. whole activations: a partial gradient is summed over
    the TP ranks at the end of the step.
    """

    name: str
    kind: str = ""
    dim: int = 0
    units: int = 1
    outer: int = 1
    routed: bool = False
    candidates: list[int] = field(default_factory=list)  # other dims that the cut might lie on
    partial: bool = False
    full: bool = False

    def use(self, partial: bool) -> None:
        """Note a use. RuntimePlanError when it is used both ways, which no single reduction can serve."""
        self.partial |= partial
        self.full |= not partial
        if self.partial and self.full:
            raise RuntimePlanError(
                f"parameter {self.name} is used on sharded and on whole activations, so that its gradient has no "
                "single reduction: plan with --forbid sp"
            )


@dataclass(slots=True)
class Context:
    """Degrees, positions and groups that the rules need. One per plan and rank."""

    spec: PlanSpec
    tp_rank: int
    ring_rank: int
    ulysses_rank: int
    tp: dist.ProcessGroup
    ring: dist.ProcessGroup
    ulysses: dist.ProcessGroup
    seq_len: int
    micro_batch_size: int
    column: tuple[torch.Tensor, torch.Tensor, tuple[Split, ...]] | None = None  # last column input, made whole
    skip_embedding: bool = False  # a later stage: what the prologue embeds is thrown away
    strict: bool = True  # refuse instead of gathering what no rule can shard
    gathered: dict[str, int] = field(default_factory=dict)  # ops that ran on gathered tensors, with their count
    packed: Packed | None = None  # the micro-batch at hand, when it is packed documents on a group of ranks
    strategy: LayerStrategy | None = None  # of every layer, when the micro-batch at hand has its own
    memory: dict[Any, Any] = field(default_factory=dict)  # of rules, what follows from shapes

    @property
    def cuts_sequence(self) -> bool:
        """Whether a rank holds some of a sequence's positions only."""
        return self.packed is not None or self.spec.cp > 1

    @property
    def groups(self) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
        """(Ulysses, ring) group of this rank now, None for one of a single rank."""
        if self.packed is not None:
            return self.packed.ulysses, self.packed.ring
        return self.ulysses if self.spec.ulysses > 1 else None, self.ring if self.spec.ring > 1 else None

    @property
    def seq_axis(self) -> str:
        """How the residual stream is cut over the sequence; '' = whole."""
        if self.spec.sequence_parallel:
            return SEQTP
        return SEQ if self.cuts_sequence else ""

    def units(self, axis: str) -> int:
        """Units of a split along `axis` (TP: when every rank has its own)."""
        s = self.spec
        if self.packed is not None and axis != TP:
            return self.packed.length
        context = s.ulysses * (2 * s.ring if s.ring > 1 else 1)
        return {TP: s.tp, SEQ: context, SEQTP: context * s.tp}[axis]

    def held(self, axis: str, units: int) -> list[int] | torch.Tensor:
        """Units that this rank holds, in local order."""
        s = self.spec
        if axis == TP:
            return [self.tp_rank * units // s.tp]
        if self.packed is not None:
            held = self.packed.held
            return held.chunk(s.tp)[self.tp_rank] if axis == SEQTP else held
        if s.ring > 1:
            chunk = units // (2 * s.ring)
            chunks = (self.ring_rank, 2 * s.ring - 1 - self.ring_rank)
            mine = [i for k in chunks for i in range(k * chunk, (k + 1) * chunk)]
        else:
            mine = list(range(units))
        parts, part = s.ulysses, self.ulysses_rank
        if axis == SEQTP:
            parts, part = parts * s.tp, part * s.tp + self.tp_rank
        size = len(mine) // parts
        return mine[part * size : (part + 1) * size]

    def residual(self, shape: tuple[int, ...]) -> tuple[Split, ...]:
        """Splits of a residual-stream tensor of this whole shape ([b, s, ...] or [b s, ...])."""
        axis = self.seq_axis
        if not axis:
            return ()
        units = self.units(axis)
        return (place(shape, self.micro_batch_size, Split(0, axis, units)),)


def place(shape: tuple[int, ...], left: int, split: Split) -> Split:
    """The split that has `left` elements before its units, on the dim of `shape` that holds it. Unshardable if none."""
    before = 1
    for dim, size in enumerate(shape):
        fits = left % before == 0 and before <= left and (size * before) % (left * split.units) == 0
        if fits and size > 1 and size * before >= left * split.units:
            return replace(split, dim=dim, outer=left // before)
        before *= size
    if split.axis == TP and split.origin:
        before = 1
        for size in shape:
            if left == before and size > 1:
                shares = split.units % size == 0
                raise Recut(split.origin, units=size) if shares else Recut(split.origin, outer=split.outer * size)
            before *= size
    raise Unshardable(f"view to {tuple(shape)}", (split,))


class Sharded(torch.Tensor):
    """The wrapper: `local` is this rank's part, `splits` how it was cut. `wide`: the SEQ part of a SEQTP tensor."""

    local: torch.Tensor
    splits: tuple[Split, ...]
    ctx: Context
    wide: torch.Tensor | None

    @staticmethod
    def __new__(
        cls: type[Sharded], local: torch.Tensor, splits: tuple[Split, ...], ctx: Context,
        wide: torch.Tensor | None = None,
    ) -> Sharded:  # fmt: skip
        """Wrap `local`; the whole shape follows from the splits."""
        shape = list(local.shape)
        for s in splits:
            shape[s.dim] = shape[s.dim] * s.units // len(ctx.held(s.axis, s.units))
        self: Sharded = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, tuple(shape), dtype=local.dtype, device=local.device, requires_grad=False
        )
        self.local, self.splits, self.ctx, self.wide = local, splits, ctx, wide
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Sharded({tuple(self.local.shape)} of {tuple(self.shape)}, {self.splits})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from planner.runtime.rules import apply

        return apply(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} reached a Sharded tensor without a rule")


def wrap(local: torch.Tensor, splits: tuple[Split, ...], ctx: Context) -> torch.Tensor:
    """Sharded, or the tensor itself when nothing is cut."""
    return Sharded(local, splits, ctx) if splits else local


def on_tp(splits: tuple[Split, ...]) -> bool:
    """Whether TP ranks hold different parts."""
    return any(s.axis in (TP, SEQTP) for s in splits)


def take(x: torch.Tensor, dim: int, split: Split, ctx: Context) -> torch.Tensor:
    """Part of this rank of a whole tensor along `dim`; the gradient is whole over TP and partial over context."""
    dim = dim % x.dim()
    if split.axis == SEQTP:
        context = ctx.units(SEQ)
        part = take(x, dim, replace(split, axis=SEQ, units=context), ctx) if context > 1 else x
        return _along(part, dim, split.outer, lambda t, d: _tp_part(t, d, ctx))
    held = ctx.held(split.axis, split.units)
    if split.axis == TP and split.units == ctx.spec.tp:
        return _along(x, dim, split.outer, lambda t, d: _tp_part(t, d, ctx))
    if split.axis == TP and x.requires_grad:
        x = c.copy_to(x, ctx.tp)

    def pick(t: torch.Tensor, d: int) -> torch.Tensor:
        size = t.shape[d] // split.units
        if isinstance(held, torch.Tensor):
            return t.index_select(d, held.to(t.device))
        if held == list(range(held[0], held[0] + len(held))):
            return t.narrow(d, held[0] * size, len(held) * size)
        return torch.cat([t.narrow(d, i * size, size) for i in held], d)

    return _along(x, dim, split.outer, pick)


def _tp_part(x: torch.Tensor, dim: int, ctx: Context) -> torch.Tensor:
    if x.requires_grad:
        return c.scatter(x, dim, ctx.tp)
    return x.chunk(ctx.spec.tp, dim)[ctx.tp_rank]


def _along(x: torch.Tensor, dim: int, outer: int, work: Callable[[torch.Tensor, int], torch.Tensor]) -> torch.Tensor:
    """`work` on the inner part of a dim that is `outer` pieces."""
    if outer == 1:
        return work(x, dim)
    return work(x.unflatten(dim, (outer, -1)), dim + 1).flatten(dim, dim + 1)


def gather_tp(x: Sharded, *, partial_grad: bool) -> torch.Tensor:
    """X without its splits over TP ranks: SEQTP becomes SEQ, TP goes. The context split stays."""
    local, left = x.local, []
    ctx = x.ctx
    for s in x.splits:
        if s.axis == SEQ:
            left.append(s)
            continue
        if s.axis == TP and s.units < ctx.spec.tp:
            raise Unshardable("gathering shared KV heads", x.splits)
        local = _along(local, s.dim, s.outer, lambda t, d: c.gather(t, d, ctx.tp, partial_grad=partial_grad))
        if s.axis == SEQTP and ctx.cuts_sequence:
            left.append(replace(s, axis=SEQ, units=ctx.units(SEQ)))
    return wrap(local, tuple(left), ctx)


def whole_for_parts(x: torch.Tensor, ctx: Context) -> torch.Tensor:
    """X whole over TP, for parts of a result: every rank has a part of its gradient, which backward sums."""
    if ctx.spec.tp == 1:
        return x
    splits, local = (x.splits, x.local) if isinstance(x, Sharded) else ((), x)
    if isinstance(x, Sharded) and on_tp(splits):
        return gather_tp(x, partial_grad=True)
    return wrap(c.copy_to(local, ctx.tp), splits, ctx) if local.requires_grad else x


def scatter_residual(x: torch.Tensor, ctx: Context, *, reduce: bool) -> torch.Tensor:
    """A tensor that is whole (or with `reduce` a partial sum) over TP, in the layout of the residual stream."""
    splits = x.splits if isinstance(x, Sharded) else ()
    local = x.local if isinstance(x, Sharded) else x
    if not ctx.spec.sequence_parallel:
        return wrap(c.reduce_from(local, ctx.tp) if reduce else local, splits, ctx)
    (seq,) = ctx.residual(tuple(x.shape))
    part = _along(local, seq.dim, seq.outer, lambda t, d: c.scatter(t, d, ctx.tp, reduce=reduce))
    return wrap(part, (seq,), ctx)
