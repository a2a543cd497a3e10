"""What stands before and after an all-to-all: Ulysses pack and unpack, MoE permute and unpermute.

Ulysses (Jacobs et al. 2023, arXiv 2309.14509, section 3) sends heads and receives sequence: `pack_heads` lays a local
(batch, sequence, heads, dim) out as (ranks, batch, sequence, heads/ranks, dim), one contiguous block a rank;
`unpack_sequence` joins the received blocks along the sequence. On the way back each op is the other's gradient.
MoE: `moe_permute` sorts the tokens' copies by expert; `moe_unpermute` sums each token's copies by their weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard

from planner.kernels.op import Sharding, Work, define, lazily, nbytes, precise, streamed


def _copied(x: torch.Tensor) -> torch.Tensor:
    """A contiguous copy, also of what is contiguous (a batch of one): an op's output must not be its input's memory."""
    return x.clone(memory_format=torch.contiguous_format)


def _pack_heads(x: torch.Tensor, ranks: int) -> torch.Tensor:
    return _copied(x.unflatten(2, (ranks, -1)).permute(2, 0, 1, 3, 4))


def _unpack_heads(x: torch.Tensor) -> torch.Tensor:
    return _copied(x.permute(1, 2, 0, 3, 4)).flatten(2, 3)


def _pack_sequence(x: torch.Tensor, ranks: int) -> torch.Tensor:
    return _copied(x.unflatten(1, (ranks, -1)).transpose(0, 1))


def _unpack_sequence(x: torch.Tensor) -> torch.Tensor:
    return _copied(x.transpose(0, 1)).flatten(1, 2)


def _copy_work(x: torch.Tensor, *ranks: int, out: torch.Tensor) -> Work:
    return streamed((x,), out)


def _batch_and_dim(to_packed: bool) -> Any:
    """The batch and the head dim may be split; the packed form has the ranks in front."""

    def rule(x: Any, *rest: Any) -> list[Sharding]:
        pairs = [(0, 1), (3, 4)]
        return [([Shard(p if to_packed else u)], [Shard(u if to_packed else p)]) for u, p in pairs]

    return rule


def _packer(name: str, pack: Any, unpack: Any, split_dim: int) -> tuple[Any, Any]:
    def packed_shape(x: torch.Tensor, ranks: int) -> torch.Tensor:
        shape = list(x.shape)
        shape[split_dim] //= ranks
        return x.new_empty((ranks, *shape))

    def unpacked_shape(x: torch.Tensor) -> torch.Tensor:
        ranks, *shape = x.shape
        shape[split_dim] *= ranks
        return x.new_empty(shape)

    ours, ours_back = ({"ours": lazily("triton_exchange", f"{way}_{name}")} for way in ("pack", "unpack"))
    forward = define(
        f"pack_{name}", pack, fake=packed_shape, work=_copy_work, sharding=_batch_and_dim(True), kernels=ours
    )
    back = define(
        f"unpack_{name}", unpack, fake=unpacked_shape, work=_copy_work, sharding=_batch_and_dim(False),
        kernels=ours_back,
    )  # fmt: skip
    forward.register_autograd(lambda ctx, grad: (back(grad), None))
    back.register_autograd(
        lambda ctx, grad: forward(grad, ctx.ranks),
        setup_context=lambda ctx, inputs, output: setattr(ctx, "ranks", inputs[0].shape[0]),
    )
    return forward, back


pack_heads, unpack_heads = _packer("heads", _pack_heads, _unpack_heads, 2)
pack_sequence, unpack_sequence = _packer("sequence", _pack_sequence, _unpack_sequence, 1)


def _permute(
    x: torch.Tensor, experts: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    flat = experts.reshape(-1)
    order = flat.argsort(stable=True)
    return x[order // experts.shape[1]], order, torch.bincount(flat, minlength=num_experts)


def _unpermute(y: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    copies = torch.empty_like(y).index_copy_(0, order, y).view(*weights.shape, y.shape[-1])
    return (precise(copies) * precise(weights).unsqueeze(-1)).sum(dim=1).to(y.dtype)


def _unpermute_backward(
    dx: torch.Tensor, y: torch.Tensor, order: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    grad = precise(dx)[order // weights.shape[1]]
    dy = (grad * precise(weights).flatten()[order].unsqueeze(-1)).to(y.dtype)
    dw = (grad * precise(y)).sum(dim=-1)
    return dy, torch.empty_like(dw).index_copy_(0, order, dw).view(weights.shape).to(weights.dtype)


def _permute_work(x: torch.Tensor, experts: torch.Tensor, num_experts: int, out: Any) -> Work:
    read = nbytes(out[0]) + nbytes(experts)  # every copy is read from its token
    return Work(read_bytes=read, written_bytes=nbytes(*out), kernels=3)


def _width(outs: list[Any], ins: list[Any]) -> Any:
    """Only the hidden dim may be split: the order of the rows is global."""
    return lambda *args: [(outs, ins)]


_R = Replicate()
moe_permute_op = define(
    "moe_permute", _permute,
    fake=lambda x, experts, num_experts: (
        x.new_empty((experts.numel(), x.shape[1])), experts.new_empty(experts.numel()), experts.new_empty(num_experts),
    ),
    work=_permute_work, sharding=_width([Shard(1), _R, _R], [Shard(1), _R, None]),
    kernels={"ours": lazily("triton_exchange", "moe_permute")},
)  # fmt: skip
moe_unpermute = define(
    "moe_unpermute", _unpermute, fake=lambda y, order, weights: y.new_empty((weights.shape[0], y.shape[1])),
    work=lambda y, order, weights, out: streamed((y, order, weights), out, 2 * y.numel()),
    sharding=_width([Shard(1)], [Shard(1), _R, _R]), kernels={"ours": lazily("triton_exchange", "moe_unpermute")},
)  # fmt: skip
moe_unpermute_backward = define(
    "moe_unpermute_backward", _unpermute_backward,
    fake=lambda dx, y, order, weights: (torch.empty_like(y), torch.empty_like(weights)),
    work=lambda dx, y, order, weights, out: Work(
        flops=3 * y.numel(), read_bytes=2 * nbytes(y) + nbytes(order, weights), written_bytes=nbytes(*out), kernels=1
    ),
    sharding=_width([Shard(1), Partial("sum")], [Shard(1), Shard(1), _R, _R]),
    kernels={"ours": lazily("triton_exchange", "moe_unpermute_backward")},
)  # fmt: skip


def _save_order(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output[1])
    ctx.rows, ctx.copies = inputs[1].shape
    ctx.mark_non_differentiable(output[1], output[2])


def _permute_backward(ctx: Any, grad: Any, *rest: Any) -> Any:
    (order,) = ctx.saved_tensors
    return moe_unpermute(grad, order, grad.new_ones((ctx.rows, ctx.copies))), None, None


moe_permute_op.register_autograd(_permute_backward, setup_context=_save_order)


def _backward_of_unpermute(ctx: Any, dx: Any) -> Any:
    dy, dw = moe_unpermute_backward(dx, *ctx.saved_tensors)
    return dy, None, dw


moe_unpermute.register_autograd(
    _backward_of_unpermute, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


def moe_permute(
    x: torch.Tensor, experts: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(copies sorted by expert, order, tokens per expert) of x (tokens, hidden) with experts (tokens, top_k).

    Row i of the copies is copy order[i] of the flattened choices, so token order[i] // top_k; the counts are the
    group sizes of a grouped GEMM and the splits of the all-to-all.
    """
    return moe_permute_op(x, experts, num_experts)
