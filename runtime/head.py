"""The head and the loss as one op, a chunk of rows at a time, so that there are never logits of a whole micro-batch.

The model's forward is left when it reaches its head, with what would have gone in; kernels/loss.py makes the loss of
that and the head's weight. Right for a model whose head is an nn.Linear without bias and whose logits go nowhere but
into the runtime's own loss: the dry pass looks. Any other model keeps the plain way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from planner.costmodel.kernels import CHUNK_ROWS
from planner.kernels import loss
from planner.runtime import collectives as c
from planner.runtime.rules import cut_of, shared
from planner.runtime.rules_math import column_input, targets
from planner.runtime.sharded import SEQTP, Context, Sharded, on_tp

Product = tuple[nn.Linear, torch.Tensor, int]  # a linear module, what it put out, and how often that was written to


class HeadReached(BaseException):
    """Carries the head's input out of the model's forward."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@contextmanager
def watching(model: nn.Module) -> Iterator[list[Product]]:
    """What the linear modules of `model` put out inside."""
    products: list[Product] = []

    def note(module: nn.Module, _inputs: Any, out: Any) -> None:
        products.append((module, out, _local(out)._version))  # type: ignore[arg-type]

    hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, nn.Linear)]
    try:
        yield products
    finally:
        for hook in hooks:
            hook.remove()


def head_of(products: list[Product], logits: torch.Tensor) -> tuple[nn.Linear | None, str]:
    """(the module that put out `logits`, '') or (None, why the chunked loss cannot take its place)."""
    local = _local(logits)
    made = [(module, version) for module, out, version in products if _local(out) is local]
    if not made or made[0][1] != local._version:
        return None, "the loss does not read what a linear module puts out, as it puts it out"
    head = made[0][0]
    if head.bias is not None:
        return None, "the head has a bias"
    if sum(module is head for module, *_ in products) > 1:
        return None, "the head is used more than once"
    cut = cut_of(head.weight)
    if logits.dim() != 3 or cut is not None and cut.kind not in ("", "vocab"):
        return None, "the head's logits are no (batch, sequence, vocabulary)"
    return head, ""


def leave_at(head: nn.Linear) -> None:
    """Let the model's forward end in front of `head`, in HeadReached."""

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        raise HeadReached(hidden)

    head.forward = forward  # type: ignore[method-assign]


def chunked_loss(ctx: Context, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of the cross-entropy of hidden @ weight^T, as the rules of linear and cross_entropy have it."""
    with torch._C.DisableTorchFunction():
        splits = hidden.splits if isinstance(hidden, Sharded) else ()
        local, first, group, cut = _local(hidden), 0, None, cut_of(weight)
        if cut is not None and cut.kind:
            local, splits = column_input(hidden, ctx)
            first, group, ctx.column = ctx.tp_rank * weight.shape[0], ctx.tp, None
        elif on_tp(splits):
            weight = shared(weight, weight, ctx)
        total = loss.linear_cross_entropy(
            local.flatten(0, 1), weight, targets(labels, splits, ctx).flatten(), chunk_rows=CHUNK_ROWS,
            vocab_start=first, group=group,
        )  # fmt: skip
        return c.reduce_from(total, ctx.tp) if any(s.axis == SEQTP for s in splits) else total


def _local(x: torch.Tensor) -> torch.Tensor:
    return x.local if isinstance(x, Sharded) else x
