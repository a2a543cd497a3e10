"""What each torch function does on Sharded tensors and on cut parameters.

`apply` looks the function's name up in the tables of this file, rules_shape.py and rules_math.py. A function
without a rule, or one that would mix a sharded dim, raises Unshardable; outside strict mode its inputs are
gathered over the TP ranks first, which is right for any function and counted in `Context.gathered`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from planner.runtime import collectives as c
from planner.runtime import sharded
from planner.runtime.errors import RuntimePlanError
from planner.runtime.sharded import SEQ, SEQTP, TP, Context, Cut, Sharded, Split, Unshardable, on_tp, take, wrap

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register what is called with (ctx, func, args, kwargs) in place of torch functions of these names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def cut_of(value: object) -> Cut | None:
    """The Cut of a parameter, None for anything else."""
    return getattr(value, "planner_cut", None) if isinstance(value, torch.nn.Parameter) else None


def _leaves(args: Any, kwargs: Any) -> Iterator[Any]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value


class ShardMode(TorchFunctionMode):
    """Sends functions that meet a Sharded tensor or a cut parameter to their rules."""

    def __init__(self, ctx: Context) -> None:
        super().__init__()
        self.ctx = ctx

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in _leaves(args, kwargs):
            if isinstance(value, Sharded):
                return apply(func, args, kwargs, self.ctx)
            cut = getattr(value, "planner_cut", None) if isinstance(value, torch.Tensor) else None
            if cut is not None and cut.kind:
                return apply(func, args, kwargs, self.ctx)
        return func(*args, **kwargs)


def name_of(func: Any) -> str:
    """Plain name of a torch function or method, add for Tensor.__radd__ and Tensor.add_; of a custom op the whole."""
    if isinstance(func, torch._ops.OpOverload):
        return str(func.name())
    name: str = getattr(func, "__name__", str(func))
    if name == "__get__":
        return f".{func.__self__.__name__}"
    base = name.strip("_")
    return base[1:] if base in ("radd", "rmul", "rsub", "rtruediv", "rpow", "iadd", "imul", "isub") else base


def apply(func: Any, args: Any, kwargs: Any, ctx: Context | None = None) -> Any:
    """Run `func` by its rule."""
    first = next((v for v in _leaves(args, kwargs) if isinstance(v, Sharded)), None)
    ctx = ctx or (first.ctx if first is not None else None)
    assert ctx is not None
    name = name_of(func)
    if name.startswith(".") or name in _PLAIN:
        return _attribute(func, name, args, kwargs, first)
    with torch._C.DisableTorchFunction():  # inside a rule everything is local
        try:
            found = RULES.get(name)
            if found is None:
                raise Unshardable(f"{name} has no rule", first.splits if first is not None else ())
            return found(ctx, func, args, kwargs)
        except Unshardable as error:
            if ctx.strict:
                raise
            return _on_gathered(ctx, func, name, args, kwargs, error)


_PLAIN = frozenset(
    {"size", "dim", "numel", "is_floating_point", "is_complex", "stride", "element_size", "nelement", "len",
     "ndimension", "get_device", "is_contiguous", "hash", "repr", "format", "requires_grad", "is_inference", "bool"}
)  # fmt: skip


def _attribute(func: Any, name: str, args: Any, kwargs: Any, x: Sharded | None) -> Any:
    if name == ".requires_grad" or name == ".grad_fn":
        return getattr((x.local if x is not None else args[0]), name[1:])
    if name in (".T", ".mT", ".H", ".mH"):
        return args[0].transpose(-2, -1)
    if name == ".data" and x is not None:
        return x.detach()
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _on_gathered(ctx: Context, func: Any, name: str, args: Any, kwargs: Any, error: Unshardable) -> Any:
    """The function on tensors gathered over TP. RuntimePlanError if it mixes the context ranks' sequence."""
    if any(cut_of(v) is not None and cut_of(v).kind for v in _leaves(args, kwargs)):  # type: ignore[union-attr]
        raise RuntimePlanError(f"{name} with a cut parameter has no rule: {error}")
    # The gathered function is computed alike on every TP rank, so gradients come back whole.
    whole = tree_map(
        lambda v: sharded.gather_tp(v, partial_grad=False) if isinstance(v, Sharded) else v, (args, kwargs)
    )
    if any(isinstance(v, Sharded) for v in _leaves(*whole)):
        if whole == (args, kwargs):
            raise RuntimePlanError(f"{name} mixes positions that context parallelism keeps apart ({error})")
        return apply(func, whole[0], whole[1], ctx)
    ctx.gathered[name] = ctx.gathered.get(name, 0) + 1
    return func(*whole[0], **whole[1])


# ---- alignment


def local_operand(x: torch.Tensor, ctx: Context, out_dim: int, splits: tuple[Split, ...]) -> torch.Tensor:
    """X as it enters an op whose output of `out_dim` dims is cut by `splits` (right-aligned broadcasting)."""
    own = cut_of(x)
    if own is not None and own.kind:
        return x  # already this rank's part
    have = {s.dim - x.dim(): s for s in x.splits} if isinstance(x, Sharded) else {}
    local = x.local if isinstance(x, Sharded) else x
    tp_cut = any(s.axis in (TP, SEQTP) for s in have.values())
    for s in splits:
        back = s.dim - out_dim
        mine = have.get(back)
        if mine is not None:
            refined = _refine(local, back, mine, s, ctx)
            if refined is not None:
                local, tp_cut = refined, tp_cut or s.axis in (TP, SEQTP)
            continue
        if -back <= x.dim() and x.shape[back] > 1:
            local = take(local, back, s, ctx)
            tp_cut |= s.axis in (TP, SEQTP)
    if on_tp(splits) and not tp_cut:
        local = shared(local, x, ctx)
    return local


def shared(local: torch.Tensor, x: torch.Tensor, ctx: Context) -> torch.Tensor:
    """A value that TP ranks have in common, used differently on each: gradients must be summed."""
    cut = cut_of(x)
    if cut is not None:
        cut.use(partial=True)
        return local
    return c.copy_to(local, ctx.tp) if local.requires_grad else local


def _refine(local: torch.Tensor, back: int, mine: Split, want: Split, ctx: Context) -> torch.Tensor | None:
    """Bring the split `mine` to `want`; None when they agree. Unshardable when they cannot."""
    if (mine.axis, mine.outer, mine.units) == (want.axis, want.outer, want.units):
        return None
    if mine.axis == SEQ and want.axis == SEQTP:
        return sharded._along(local, back % local.dim(), mine.outer, lambda t, d: sharded._tp_part(t, d, ctx))
    if mine.axis == want.axis == TP and want.units % mine.units == 0 and mine.outer == want.outer == 1:
        pieces = want.units // mine.units
        held = ctx.held(TP, want.units)[0] % pieces
        return local.chunk(pieces, back)[held]
    raise Unshardable("operands cut differently", (mine, want))


def merged(operands: list[torch.Tensor], out_dim: int) -> tuple[Split, ...]:
    """Splits of a broadcast result: the finest of each dim."""
    best: dict[int, Split] = {}
    for x in operands:
        if not isinstance(x, Sharded):
            continue
        for s in x.splits:
            dim = s.dim - x.dim() + out_dim
            old = best.get(dim)
            finer = old is None or s.units > old.units or (s.axis == SEQTP and old.axis == SEQ)
            if finer:
                best[dim] = replace(s, dim=dim)
    found = tuple(best.values())
    if sum(s.axis in (TP, SEQTP) for s in found) > 1:
        raise Unshardable("two dims cut over the TP ranks", found)
    return found


# ---- elementwise

_ELEMENTWISE = (
    "add sub mul div true_divide truediv floordiv pow neg exp log log1p expm1 sqrt rsqrt sigmoid tanh relu gelu silu "
    "softplus where masked_fill clamp clamp_min clamp_max float half bfloat16 double to type type_as contiguous clone "
    "detach abs maximum minimum eq ne lt gt le ge logical_not logical_and logical_or invert and or sin cos erf square "
    "reciprocal dropout addcmul addcdiv lerp leaky_relu zeros_like ones_like full_like empty_like mish hardswish "
    "relu6 elu isnan isinf fill zero int long requires_grad hardtanh logsigmoid nan_to_num sign floor round "
    "remainder fmod bool xor alpha_dropout feature_dropout mul_ div_ rsub sub_ copy softsign celu selu"
).split()  # fmt: skip


@rule(*_ELEMENTWISE)
def elementwise(ctx: Context, func: Any, args: Any, kwargs: Any) -> Any:
    """Broadcasting: every operand is brought to the parts of the finest one."""
    operands = [v for v in _leaves(args, kwargs) if isinstance(v, torch.Tensor)]
    if len(operands) == 1 and operands[0] is args[0] and isinstance(args[0], Sharded):  # spares half the host's time
        return wrap_tree(func(args[0].local, *args[1:], **kwargs), args[0].splits, ctx)
    out_dim = max(v.dim() for v in operands)
    splits = merged(operands, out_dim)

    def own(v: Any) -> Any:
        if isinstance(v, list | tuple):
            return type(v)(map(own, v))
        return local_operand(v, ctx, out_dim, splits) if isinstance(v, torch.Tensor) else v

    return wrap_tree(func(*map(own, args), **{name: own(v) for name, v in kwargs.items()}), splits, ctx)


def wrap_tree(out: Any, splits: tuple[Split, ...], ctx: Context) -> Any:
    """Wrap every tensor of a result alike."""
    if isinstance(out, torch.Tensor):
        return wrap(out, splits, ctx)
    return tree_map(lambda t: wrap(t, splits, ctx) if isinstance(t, torch.Tensor) else t, out)


# ---- along a dim that must be whole

_ALONG = {
    "softmax": 1, "log_softmax": 1, "mean": 1, "sum": 1, "var": 1, "std": 1, "amax": 1, "amin": 1, "cumsum": 1,
    "argmax": 1, "max": 1, "min": 1, "norm": 2, "logsumexp": 1, "sort": 1, "normalize": 2, "glu": 1, "topk": 2,
}  # fmt: skip


@rule(*_ALONG)
def along_dim(ctx: Context, func: Any, args: Any, kwargs: Any) -> Any:
    """Reductions and softmaxes over dims that are not cut; without a dim only sums and means."""
    x, name = args[0], name_of(func)
    at = _ALONG[name]
    dims = kwargs.get("dim", args[at] if len(args) > at else None)
    if isinstance(dims, torch.Tensor):
        return elementwise(ctx, func, args, kwargs)
    if dims is None:
        return _total(ctx, func, name, args, kwargs)
    dims = [d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)]
    if any(s.dim in dims for s in x.splits):
        raise Unshardable(f"{name} over a sharded dim", x.splits)
    out = func(x.local, *args[1:], **kwargs)
    first = out if isinstance(out, torch.Tensor) else out[0]
    removed = sorted(dims) if first.dim() < x.dim() else []
    splits = tuple(replace(s, dim=s.dim - sum(d < s.dim for d in removed)) for s in x.splits)
    wrapped = [wrap(t, splits, ctx) for t in ([out] if isinstance(out, torch.Tensor) else out)]
    return wrapped[0] if isinstance(out, torch.Tensor) else type(out)(wrapped)


def _total(ctx: Context, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    x = args[0]
    if name not in ("sum", "mean") or len(args) > 1:
        raise Unshardable(f"{name} over all dims", x.splits)
    total = func(x.local, **kwargs)
    if name == "mean" and ctx.packed is not None:
        raise RuntimePlanError("a mean over all positions mixes packed documents: the loss must be a sum over tokens")
    if name == "mean":
        total = total * (x.local.numel() / x.numel())
    return c.reduce_from(total, ctx.tp) if on_tp(x.splits) else total


@rule("layer_norm", "rms_norm", "native_layer_norm")
def norm(ctx: Context, func: Any, args: Any, kwargs: Any) -> Any:
    """Normalisation over the last dims, which must be whole."""
    x = args[0]
    shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    first = x.dim() - (1 if isinstance(shape, int) else len(shape))
    if any(s.dim >= first for s in x.splits):
        raise Unshardable("norm over a sharded dim", x.splits)
    use = functools.partial(local_operand, ctx=ctx, out_dim=x.dim(), splits=x.splits)
    replaced = tree_map(lambda v: use(v) if isinstance(v, torch.Tensor) else v, (args[1:], kwargs))
    return wrap(func(x.local, *replaced[0], **replaced[1]), x.splits, ctx)


__all__ = ["RULES", "SEQ", "ShardMode", "apply", "cut_of", "elementwise", "local_operand", "merged", "rule", "shared"]
