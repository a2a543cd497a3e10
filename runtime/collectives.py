"""Collectives that autograd sees, over the ops of torch's functional collectives.

Convention on the TP axis: a replicated value has its FULL gradient on every rank (Shoeybi et al. 2019,
Megatron-LM, section 3: the conjugate operators f and g). On meta tensors only shapes are computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # noqa: F401  # loads the ops

_OPS = torch.ops._c10d_functional


_parts = [False]


@contextmanager
def parts() -> Iterator[None]:
    """Inside, products are partial results whose sum over ranks is taken at once, and nothing else of them."""
    before, _parts[0] = _parts[0], True
    try:
        yield
    finally:
        _parts[0] = before


def makes_parts() -> bool:
    """Whether inside of `parts`."""
    return _parts[0]


def _call(op: Any, x: torch.Tensor, *args: Any) -> torch.Tensor:
    """Run a collective and wait for it. Autograd is ours alone: torch's own for these ops costs more host time."""
    with torch._C._AutoDispatchBelowAutograd():
        out: torch.Tensor = _OPS.wait_tensor(op(x.contiguous(), *args))
        return out


def all_reduce(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum over the group."""
    return x if x.is_meta or group.size() == 1 else _call(_OPS.all_reduce, x, "sum", group.group_name)


def all_gather(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Concatenation of the group's tensors along `dim`."""
    if group.size() == 1:
        return x
    if x.is_meta:
        return torch.cat([x] * group.size(), dim)
    out = _call(_OPS.all_gather_into_tensor, x, group.size(), group.group_name)
    return out if dim % x.dim() == 0 else torch.cat(out.chunk(group.size()), dim)


def reduce_scatter(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Part of this rank along `dim` of the sum over the group."""
    if x.is_meta or group.size() == 1:
        return x.chunk(group.size(), dim)[0].clone()
    rows = x if dim % x.dim() == 0 else torch.cat(x.chunk(group.size(), dim))
    return _call(_OPS.reduce_scatter_tensor, rows, "sum", group.size(), group.group_name)


def _part(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    return x.chunk(group.size(), dim)[group.rank()].contiguous()


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, group: Any) -> Any:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return all_reduce(grad, ctx.group), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, group: Any) -> Any:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, dim: int, group: Any, partial_grad: bool) -> Any:
        ctx.dim, ctx.group, ctx.partial_grad = dim, group, partial_grad
        return all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        back = reduce_scatter if ctx.partial_grad else _part
        return back(grad, ctx.dim, ctx.group), None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, dim: int, group: Any, reduce: bool) -> Any:
        ctx.dim, ctx.group = dim, group
        return reduce_scatter(x, dim, group) if reduce else _part(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return all_gather(grad, ctx.dim, ctx.group), None, None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, received: Any, sent: Any, group: Any) -> Any:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        return exchange(x, received, sent, group)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return exchange(grad, ctx.sent, ctx.received, ctx.group), None, None, None


def exchange(x: torch.Tensor, received: Any, sent: Any, group: Any) -> torch.Tensor:
    """As `all_to_all`, without autograd."""
    if x.is_meta:
        return x.new_empty((sum(received) if received else x.shape[0], *x.shape[1:]))
    even = [x.shape[0] // group.size()] * group.size()
    return _call(_OPS.all_to_all_single, x, received or even, sent or even, group.group_name)


def copy_to(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The same value, about to be used differently on each rank: gradients are summed."""
    return _CopyTo.apply(x, group)


def reduce_from(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum of partial values, used alike on each rank afterwards."""
    return _ReduceFrom.apply(x, group)


def gather(x: torch.Tensor, dim: int, group: dist.ProcessGroup, *, partial_grad: bool) -> torch.Tensor:
    """The whole tensor; `partial_grad`: ranks use it differently, so that gradients are reduce-scattered."""
    return _Gather.apply(x, dim, group, partial_grad)


def scatter(x: torch.Tensor, dim: int, group: dist.ProcessGroup, *, reduce: bool = False) -> torch.Tensor:
    """Part of this rank of a replicated value, or with `reduce` of the sum of partial ones."""
    return _Scatter.apply(x, dim, group, reduce)


def all_to_all(
    x: torch.Tensor, group: dist.ProcessGroup, received: list[int] | None = None, sent: list[int] | None = None
) -> torch.Tensor:
    """Rows of dim 0 exchanged within the group: equal parts, or `sent` and `received` rows per rank."""
    return _AllToAll.apply(x, received, sent, group)
