"""Mixture-of-experts blocks: local tensors at their edge, and experts spread over ranks by all-to-all.

Two forms are known, as in profiler/moe.py: a module with stacked [E, ., .] parameters that is handed the chosen
experts and their weights, and a list of equal experts in a block that routes by itself. Every rank of an
expert group sends each token row to the rank that holds its expert and gets the result back (Lepikhin et al.
2020, GShard, arXiv 2006.16668, section 3.2). No capacity: nothing is dropped.

Under TP every rank of a TP group takes all tokens of the group and has a part of every expert (expert_cuts.py), so
that what the block puts out is a partial sum; it is summed once, behind the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from planner.kernels.exchange import moe_permute, moe_unpermute
from planner.runtime import collectives as c
from planner.runtime.errors import RuntimePlanError
from planner.runtime.layers import leave_marks, marks_of, rewrap, unwrap
from planner.runtime.selective import forget_product
from planner.runtime.sharded import Context, Cut, scatter_residual, whole_for_parts

_LISTS = (nn.ModuleList, nn.ModuleDict)


@dataclass(slots=True)
class Moe:
    """One block: the module whose forward changes, its path, its number of experts, its list of experts if any.

    `original`: the block's own forward, which knows of `num_here` experts; `call`: the (args, kwargs) that the model
    hands it, as meta tensors. `spread`: stacked biases behind the experts' last product, of which each TP rank adds
    its own columns.
    """

    block: nn.Module
    path: str
    num_experts: int
    experts: nn.Module | None
    original: Callable[..., Any]
    num_here: int
    spread: tuple[str, ...] = ()
    call: Any = None

    def expert_of(self, name: str) -> int | None:
        """Index of the listed expert that holds parameter `name`, None for stacked parameters."""
        if self.experts is None:
            return None
        inside = next(n for n, m in self.block.named_children() if m is self.experts)
        key = name.removeprefix(f"{self.path}.{inside}.").split(".")[0]
        return [n for n, _ in self.experts.named_children()].index(key)


def find(model: nn.Module, cuts: dict[str, Cut]) -> dict[str, Moe]:
    """Routed parameter -> its block."""
    found: dict[str, Moe] = {}
    made: dict[str, Moe] = {}
    for name in (n for n, cut in cuts.items() if cut.routed):
        parts = name.split(".")[:-1]
        listed = next(
            (i for i in range(len(parts), 0, -1) if isinstance(model.get_submodule(".".join(parts[:i])), _LISTS)), 0
        )
        # The innermost list around a stacked parameter is the list of layers, whose children are no experts.
        chain = ".".join(parts[: listed + 1])
        holder = model.get_submodule(".".join(parts))
        stacked = any(p.dim() == 3 for p in holder.parameters(recurse=False)) and chain != ".".join(parts)
        path = ".".join(parts) if stacked else ".".join(parts[: listed - 1])
        if path not in made:
            block = model.get_submodule(path)
            experts = None if stacked else model.get_submodule(".".join(parts[:listed]))
            count = model.get_parameter(name).shape[0] if experts is None else len(list(experts.children()))
            spread_biases = _spread(block, path, cuts) if stacked else ()
            made[path] = Moe(block, path, count, experts, block.forward, count, spread_biases)
        found[name] = made[path]
    return found


def _spread(block: nn.Module, path: str, cuts: dict[str, Cut]) -> tuple[str, ...]:
    own = block.named_parameters(recurse=False)
    return tuple(name for name, param in own if param.dim() == 2 and cuts[f"{path}.{name}"].kind == "row")


def spread(bias: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """A part of the columns of `bias` in its place among zeros: over the ranks the whole."""
    size = bias.shape[-1]
    return F.pad(bias, (rank * size, (ranks - 1 - rank) * size))


def install(moe: Moe, group: dist.ProcessGroup, ctx: Context) -> None:
    """Replace the block's forward by one on local tensors; over `group` when it has more than one rank."""
    if group.size() > 1 and moe.num_experts % group.size():
        raise RuntimePlanError(f"{moe.num_experts} experts of {moe.path} do not divide over ep = {group.size()} ranks")
    run: Callable[..., torch.Tensor] = moe.original
    if group.size() > 1:
        run = (_stacked if moe.experts is None else _listed)(moe, moe.original, group)

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(x.is_meta for x in tensors):  # the dry pass: routing needs values
            if group.size() > 1 and moe.experts is None and len(tensors) != 3:
                raise RuntimePlanError(f"{moe.path} stacks experts and routes by itself: plan with --forbid ep")
            moe.call = tree_map_only(torch.Tensor, _shape_alone, (args, kwargs))
            return torch.zeros_like(tensors[0])
        marks = marks_of(moe.block)
        with torch._C.DisableTorchFunction():
            if marks is not None:
                args, kwargs = rewrap((args, kwargs), marks, ctx)
            local, inner = unwrap(tree_map_only(torch.Tensor, lambda x: whole_for_parts(x, ctx), (args, kwargs)))
            with _spread_biases(moe, ctx):
                out = run(*local[0], **local[1])
            out = rewrap(out, inner[:1], ctx)  # lies like the first input
            if ctx.spec.tp > 1:
                out = scatter_residual(out, ctx, reduce=True)
            if marks is not None:
                out, outer = unwrap(out)
                out = out.clone() if out._is_view() else out  # FSDP warns of a view that goes out
                leave_marks(moe.block, outer)
        return out

    moe.block.forward = forward  # type: ignore[method-assign]


def _shape_alone(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(tuple(x.shape), dtype=x.dtype, device="meta")


@contextmanager
def _spread_biases(moe: Moe, ctx: Context) -> Iterator[None]:
    slots = moe.block._parameters
    kept = {name: slots[name] for name in moe.spread}
    for name, param in kept.items():
        assert param is not None
        slots[name] = spread(param, ctx.tp_rank, ctx.spec.tp)  # type: ignore[assignment]
    try:
        yield
    finally:
        slots.update(kept)


def _exchange_counts(counts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(ranks, local experts) rows that this rank will receive, from the rows per expert it sends."""
    return c.all_to_all(counts, group).view(group.size(), -1)


def _stacked(moe: Moe, original: Callable[..., Any], group: dist.ProcessGroup) -> Callable[..., torch.Tensor]:
    ranks, per_rank = group.size(), moe.num_experts // group.size()
    moe.num_here = per_rank
    for name, value in vars(moe.block).items():
        if name in ("num_experts", "num_local_experts", "n_experts") and value == moe.num_experts:
            setattr(moe.block, name, per_rank)

    def run(hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows, top_k = hidden.reshape(-1, hidden.shape[-1]), chosen.shape[-1]
        copies, order, counts = moe_permute(rows, chosen.reshape(-1, top_k), moe.num_experts)
        received = _exchange_counts(counts, group)
        sent = counts.view(ranks, per_rank).sum(dim=1).tolist()
        took = received.sum(dim=1).tolist()
        arrived = c.all_to_all(copies, group, took, sent)
        local = torch.arange(per_rank, device=counts.device).repeat(ranks).repeat_interleave(received.reshape(-1))
        done = arrived  # without rows a block may cut the graph, and this rank would miss backward's exchanges
        if len(local):
            done = original(arrived, local.unsqueeze(-1), torch.ones_like(local, dtype=rows.dtype).unsqueeze(-1))
            forget_product()
        back = c.all_to_all(done, group, sent, took)
        out = moe_unpermute(back, order, weights.reshape(-1, top_k))
        return out if out.shape == hidden.shape else out.view(hidden.shape)  # FSDP warns of a view that goes out

    return run


class _Stand(nn.Module):
    """Stands in for an expert: writes down its rows in the first pass, hands out its result in the second."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: torch.Tensor | None = None
        self.result: torch.Tensor | None = None

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the width of the input, without values until there is a result."""
        if self.result is not None:
            return self.result
        self.rows = rows
        return torch.zeros_like(rows)


def _listed(moe: Moe, original: Callable[..., Any], group: dist.ProcessGroup) -> Callable[..., torch.Tensor]:
    """The block's own forward runs twice: once to learn which rows go where, once with the experts' results."""
    ranks, per_rank = group.size(), moe.num_experts // group.size()
    assert moe.experts is not None
    holder = moe.experts
    names = [name for name, _ in holder.named_children()]
    own = [holder._modules[n] for n in names[group.rank() * per_rank : (group.rank() + 1) * per_rank]]

    def forward_with(stands: list[_Stand], *args: Any, **kwargs: Any) -> torch.Tensor:
        real = dict(holder._modules)
        holder._modules.update(zip(names, stands, strict=True))
        try:
            out: torch.Tensor = original(*args, **kwargs)
        finally:
            holder._modules.update(real)
        return out

    def run(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        stands = [_Stand() for _ in names]
        forward_with(stands, hidden, *args, **kwargs)
        none = hidden.reshape(-1, hidden.shape[-1])[:0]
        rows = [none if stand.rows is None else stand.rows for stand in stands]
        counts = torch.tensor([len(r) for r in rows], device=hidden.device)
        received = _exchange_counts(counts, group)
        sent, took = counts.view(ranks, per_rank).sum(dim=1).tolist(), received.sum(dim=1).tolist()
        parts = c.all_to_all(torch.cat(rows), group, took, sent).split(received.reshape(-1).tolist())
        done = []
        for i, expert in enumerate(own):
            assert expert is not None
            mine = parts[i::per_rank]
            done.append(expert(torch.cat(mine)).split([len(m) for m in mine]))
            forget_product()
        results = torch.cat([done[i][source] for source in range(ranks) for i in range(per_rank)])
        back = c.all_to_all(results, group, sent, took).split(counts.tolist())
        for stand, result in zip(stands, back, strict=True):
            stand.result = result
        return forward_with(stands, hidden, *args, **kwargs)

    return run
