"""Rules of functions that multiply: linears with cut weights, products of activations, embedding, loss, attention.

Column-parallel: the input is gathered over the sequence (or its gradient summed), the output is sharded.
Row-parallel: the output is a partial sum, brought to the residual's layout at once (Shoeybi et al. 2019,
section 3; with sequence parallelism Korthikanti et al. 2022, arXiv 2205.05198, section 4.2).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from planner.kernels import dispatch, loss
from planner.kernels.op import precise
from planner.runtime import attention
from planner.runtime import collectives as c
from planner.runtime.errors import RuntimePlanError
from planner.runtime.rules import cut_of, local_operand, merged, rule, shared
from planner.runtime.sharded import (
    SEQ,
    SEQTP,
    TP,
    Context,
    Cut,
    Recut,
    Sharded,
    Split,
    Unshardable,
    gather_tp,
    on_tp,
    scatter_residual,
    wrap,
)


def column_input(x: torch.Tensor, ctx: Context) -> tuple[torch.Tensor, tuple[Split, ...]]:
    """(x whole over TP, its remaining splits): all-gather of the sequence, or gradient all-reduce.

    Linears that read the same x in a row (q, k, v; gate and up) share one.
    """
    if ctx.column is None or ctx.column[0] is not x:
        ctx.column = (x, *_whole_input(x, ctx))
    return ctx.column[1:]


def _whole_input(x: torch.Tensor, ctx: Context) -> tuple[torch.Tensor, tuple[Split, ...]]:
    splits = x.splits if isinstance(x, Sharded) else ()
    if any(s.axis == TP for s in splits):
        raise Unshardable("column-parallel linear of a sharded input", splits)
    if any(s.axis == SEQTP for s in splits):
        whole = gather_tp(x, partial_grad=True)  # type: ignore[arg-type]
        return (whole.local, whole.splits) if isinstance(whole, Sharded) else (whole, ())
    local = x.local if isinstance(x, Sharded) else x
    return c.copy_to(local, ctx.tp), splits


def _product(ctx: Context, x: torch.Tensor, weight: torch.Tensor, bias: Any, out_dim_of_weight: int) -> torch.Tensor:
    """X times a 2-D weight whose output dim is `out_dim_of_weight` (0: nn.Linear, 1: x @ w)."""

    def multiply(t: torch.Tensor, b: Any) -> torch.Tensor:
        return F.linear(t, weight if out_dim_of_weight == 0 else weight.t(), b)

    cut = cut_of(weight)
    splits = x.splits if isinstance(x, Sharded) else ()
    last = x.dim() - 1
    if cut is not None and cut.kind:
        dim = out_dim_of_weight if cut.kind != "row" else 1 - out_dim_of_weight
        if cut.dim != dim:
            raise Recut(cut.name, dim=dim)
    if cut is not None and cut.kind in ("column", "vocab"):
        local, left = column_input(x, ctx)
        out = multiply(local, bias)
        return wrap(out, (*left, Split(last, TP, cut.units, cut.outer, cut.name)), ctx)
    if cut is not None and cut.kind == "row":
        inner = next((s for s in splits if s.dim == last and s.axis == TP), None)
        if inner is None or inner.units != ctx.spec.tp or inner.outer != 1:
            raise Unshardable("row-parallel linear of an input that is not sharded", splits)
        left = tuple(s for s in splits if s is not inner)
        ctx.column = None
        with c.parts():
            part = multiply(x.local, None)  # type: ignore[attr-defined]
        out = scatter_residual(wrap(part, left, ctx), ctx, reduce=True)
        if bias is None:
            return out
        return wrap(_local(out) + local_operand(bias, ctx, out.dim(), _splits(out)), _splits(out), ctx)
    if any(s.dim == last for s in splits):
        raise Unshardable("whole linear of a sharded input", splits)
    if on_tp(splits):
        weight_, bias_ = shared(weight, weight, ctx), None if bias is None else shared(bias, bias, ctx)
        del weight_
        return wrap(multiply(_local(x), bias_), splits, ctx)
    return wrap(multiply(_local(x), bias), splits, ctx)


def _local(x: torch.Tensor) -> torch.Tensor:
    return x.local if isinstance(x, Sharded) else x


def _splits(x: torch.Tensor) -> tuple[Split, ...]:
    return x.splits if isinstance(x, Sharded) else ()


@rule("linear")
def linear(ctx: Context, func: Any, args: Any, kwargs: Any) -> Any:
    """X W^T + b."""
    x, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    return _product(ctx, x, weight, bias, 0)


@rule("addmm")
def addmm(ctx: Context, func: Any, args: Any, kwargs: Any) -> Any:
    """B + x W."""
    bias, x, weight = args[:3]
    return _product(ctx, x, weight, bias, 1)


@rule("matmul", "mm", "bmm", "rmatmul")
def matmul(ctx: Context, func: Any, args: Any, kwargs: Any) -> Any:
    """X W with a weight, or a batch of products of activations."""
    a, b = args[:2]
    if isinstance(b, torch.nn.Parameter) and b.dim() == 2:
        return _product(ctx, a, b, None, 1)
    width = max(a.dim(), b.dim())
    left = [s for s in _splits(a) if s.dim == a.dim() - 1]
    right = [s for s in _splits(b) if s.dim >= b.dim() - 2]
    if left or right:
        raise Unshardable("product over a sharded dim", (*left, *right))
    rows = [replace(s, dim=s.dim + width - a.dim()) for s in _splits(a) if s.dim == a.dim() - 2]
    batch = tuple(s for s in merged([_drop_rows(a), b], width))
    if rows and on_tp(tuple(rows)) and on_tp(batch):
        raise Unshardable("rows and batch both cut over TP", (*rows, *batch))
    splits = (*batch, *rows)
    out = func(
        local_operand(a, ctx, width, splits),
        local_operand(b, ctx, width, tuple(batch)) if batch or not on_tp(splits) else shared(_local(b), b, ctx),
    )
    return wrap(out, splits, ctx)


def _drop_rows(a: torch.Tensor) -> torch.Tensor:
    if not isinstance(a, Sharded):
        return a
    view = Sharded(a.local, a.splits, a.ctx)
    view.splits = tuple(s for s in a.splits if s.dim != a.dim() - 2)
    return view


@rule("einsum")
def einsum(ctx: Context, func: Any, args: Any, kwargs: Any) -> Any:
    """Letters: a cut letter stays cut in the output; contracted, it leaves a partial sum that a row cut owns."""
    equation, operands = args[0], list(args[1:] if not isinstance(args[1], list | tuple) else args[1])
    names, _, result = equation.replace(" ", "").partition("->")
    terms = names.split(",")
    if "." in equation or not result:
        raise Unshardable("einsum without an explicit output", ())
    cuts = [cut_of(x) for x in operands]
    column = next((i for i, cut in enumerate(cuts) if cut is not None and cut.kind == "column"), None)
    if column is not None:
        return _einsum_column(ctx, func, equation, terms, result, operands, column)
    letters: dict[str, Split] = {}
    for term, x in zip(terms, operands, strict=True):
        letters.update({term[s.dim]: s for s in _splits(x)})
    row = next((cut for cut in cuts if cut is not None and cut.kind == "row"), None)
    gone = [s for letter, s in letters.items() if letter not in result]
    if row is None and gone:
        raise Unshardable("einsum over a sharded dim", tuple(gone))
    if row is not None:
        _check_row(row, terms[cuts.index(row)], letters, tuple(gone))
    local = []
    for term, x, cut in zip(terms, operands, cuts, strict=True):
        want = tuple(replace(s, dim=term.index(letter)) for letter, s in letters.items() if letter in term)
        own = cut is not None and cut.kind == "row"
        whole = want or not on_tp(tuple(letters.values()))
        local.append(x if own else local_operand(x, ctx, x.dim(), want) if whole else shared(_local(x), x, ctx))
    out = func(equation, *local)
    splits = tuple(replace(s, dim=result.index(letter)) for letter, s in letters.items() if letter in result)
    return scatter_residual(wrap(out, splits, ctx), ctx, reduce=True) if row is not None else wrap(out, splits, ctx)


def _check_row(row: Cut, term: str, letters: dict[str, Split], gone: tuple[Split, ...]) -> None:
    letter = next((name for name, s in letters.items() if s.axis == TP and name in term), "")
    if len(gone) != 1 or not letter:
        raise Unshardable("row-parallel einsum of an input that is not sharded", gone)
    if row.dim != term.index(letter):
        raise Recut(row.name, dim=term.index(letter))


def _einsum_column(
    ctx: Context, func: Any, equation: str, terms: list[str], result: str, operands: list[Any], column: int
) -> torch.Tensor:
    cut, term = cut_of(operands[column]), terms[column]
    assert cut is not None and len(operands) == 2
    x, x_term = operands[1 - column], terms[1 - column]
    if term[cut.dim] not in result or term[cut.dim] in x_term:
        raise Unshardable("einsum cut along an input dim", (Split(0, TP, cut.units, 1, cut.name),))
    local, left = column_input(x, ctx)
    locals_ = [local, operands[column]] if column else [operands[column], local]
    out = func(equation, *locals_)
    kept = tuple(replace(s, dim=result.index(x_term[s.dim])) for s in left)
    return wrap(out, (*kept, Split(result.index(term[cut.dim]), TP, cut.units, cut.outer, cut.name)), ctx)


@rule("embedding")
def embedding(ctx: Context, func: Any, args: Any, kwargs: Any) -> Any:
    """Rows of a table. Cut over the vocabulary: own rows, zeros for the others, then the sum over TP."""
    tokens, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
    options = {k: v for k, v in kwargs.items() if k in ("padding_idx", "max_norm", "norm_type", "sparse")}
    cut, splits = cut_of(weight), _splits(tokens)
    if cut is None or cut.kind != "vocab":
        weight = shared(weight, weight, ctx) if on_tp(splits) else weight
        return wrap(F.embedding(_local(tokens), weight, *args[2:], **options), splits, ctx)
    local = _local(tokens)
    if any(s.axis == SEQTP for s in splits):
        assert tokens.wide is not None, "tokens are given to the model in both layouts"
        local = tokens.wide
        splits = tuple(replace(s, axis=SEQ, units=ctx.units(SEQ)) for s in splits) if ctx.cuts_sequence else ()
    if ctx.skip_embedding:
        return weight.new_zeros((), requires_grad=False).expand(*tokens.shape, weight.shape[1])
    first = ctx.tp_rank * weight.shape[0]
    own = (local >= first) & (local < first + weight.shape[0])
    rows = F.embedding((local - first).where(own, 0), weight) * own.unsqueeze(-1)
    return scatter_residual(wrap(rows, splits, ctx), ctx, reduce=True)


@rule("scaled_dot_product_attention")
def sdpa(ctx: Context, func: Any, args: Any, kwargs: Any) -> Any:
    """Attention on the local heads; over context ranks by Ulysses and ring."""
    names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    options = dict(zip(names, args[3:], strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    q, k, v = [*args[:3], *(kwargs[n] for n in ("query", "key", "value")[len(args[:3]) :])]
    heads = q.dim() - 3
    tp_splits = [s for x in (q, k, v) for s in _splits(x) if s.axis == TP]
    seqs = [[s for s in _splits(x) if s.axis in (SEQ, SEQTP)] for x in (q, k, v)]
    if any(s.dim != heads for s in tp_splits) or any(s.dim != heads + 1 for found in seqs for s in found):
        raise Unshardable("attention cut along something else than heads and sequence", tuple(tp_splits))
    if any(s.axis == SEQTP for found in seqs for s in found):
        raise Unshardable("attention over the sequence of sequence parallelism", _splits(q))
    want = max(tp_splits, key=lambda s: s.units, default=None)
    local = []
    for x in (q, k, v):
        units = () if want is None else (replace(want, dim=heads),)
        mine = next((s for s in _splits(x) if s.axis == TP), None)
        shares = mine is not None and want is not None and mine.units < want.units
        if shares and x.shape[heads] == mine.units:  # fewer KV heads than ranks: each keeps its own
            local.append(x.local)
        else:
            keep = (*units, *(s for s in _splits(x) if s.axis == SEQ))
            local.append(local_operand(x, ctx, x.dim(), keep))
    mask = options.get("attn_mask")
    if mask is not None:
        options["attn_mask"] = _mask(mask, ctx, want, q.dim())
    out = attention.attend(ctx, *local, **options) if any(seqs) else _plain(*local, options)
    return wrap(out, (*(() if want is None else (replace(want, dim=heads),)), *seqs[0]), ctx)


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    if q.shape[-3] != k.shape[-3]:
        options = {**options, "enable_gqa": True}
    return F.scaled_dot_product_attention(q, k, v, **options)


def _mask(mask: torch.Tensor, ctx: Context, want: Split | None, width: int) -> torch.Tensor:
    if want is None or mask.dim() < 3 or mask.shape[-3] == 1:
        return _local(mask)
    return local_operand(mask, ctx, mask.dim(), (replace(want, dim=mask.dim() - 3),))


def summed_loss(logits: torch.Tensor, target: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Sum over rows of the cross-entropy of whole rows of logits, in float32 at least, by the op that is chosen."""
    if dispatch.choice("ce_stats", logits.device.type) == "torch":
        return F.cross_entropy(precise(logits), target, ignore_index=ignore_index, reduction="sum")
    return loss.cross_entropy(logits, target, ignore_index=ignore_index).sum()


def targets(labels: torch.Tensor, rows: tuple[Split, ...], ctx: Context) -> torch.Tensor:
    """The labels of the rows of logits that lie on this rank."""
    if isinstance(labels, Sharded) and on_tp(labels.splits) and not on_tp(rows):
        assert labels.wide is not None, "labels are given to the loss in both layouts"
        return labels.wide
    return local_operand(labels, ctx, labels.dim(), rows)


@rule("cross_entropy")
def cross_entropy(ctx: Context, func: Any, args: Any, kwargs: Any) -> Any:
    """Sum or mean over the local rows; logits (rows, vocabulary), whole or cut over the vocabulary."""
    logits, labels = args[:2]
    ignore, reduction = kwargs.get("ignore_index", -100), kwargs.get("reduction", "mean")
    plain = kwargs.get("weight") is None and not kwargs.get("label_smoothing")
    if len(args) > 2 or not plain or reduction == "none" or logits.dim() != 2:
        raise Unshardable("this form of cross-entropy", _splits(logits))
    vocab = next((s for s in _splits(logits) if s.dim == 1), None)
    rows = tuple(s for s in _splits(logits) if s.dim == 0)
    target = targets(labels, rows, ctx)
    if vocab is not None:
        first = ctx.tp_rank * logits.local.shape[1]
        total = loss.cross_entropy(
            logits.local, target, vocab_start=first, group=ctx.tp, ignore_index=ignore  # no rank holds whole logits
        ).sum()
    else:
        total = summed_loss(_local(logits), target, ignore)
    if any(s.axis == SEQTP for s in rows):
        total = c.reduce_from(total, ctx.tp)
    if reduction == "sum":
        return total
    if ctx.packed is not None:
        raise RuntimePlanError("packed documents need a loss that is the sum over tokens, this cross-entropy is a mean")
    count = (target != ignore).sum()
    if rows:
        for group in (ctx.tp if any(s.axis == SEQTP for s in rows) else None, ctx.ulysses, ctx.ring):
            count = c.all_reduce(count, group) if group is not None else count
    return total / count
