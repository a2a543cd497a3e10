"""Attention over context-parallel ranks: Ulysses all-to-all of heads, ring of keys and values, or both.

Ulysses (Jacobs et al. 2023, arXiv 2309.14509, section 3): heads for sequence and back, packed by kernels/exchange.py.
Ring (Liu et al. 2023, arXiv 2310.01889): keys and values go around, kernels/ring.py adds one block a turn to the
running softmax; position and document vectors say who sees whom, so that zigzag sequences and packed documents run
alike (packing.py). Backward passes dK and dV around with K and V.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.distributed_c10d import _resolve_process_group

from planner.kernels import exchange
from planner.kernels import ring as ring_kernels
from planner.runtime import collectives as c
from planner.runtime.packing import Ring, whole_sequence
from planner.runtime.sharded import Context, Unshardable


def attend(
    ctx: Context, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Attention of local (batch, heads, local sequence, dim) tensors over all positions of the context ranks.

    With packed documents a query sees the keys of its own document only.
    """
    del enable_gqa
    packed, (ulysses, ring) = ctx.packed, ctx.groups
    if dropout_p:
        raise Unshardable("attention dropout under context parallelism or packing", ())
    if attn_mask is not None and (ring is not None or packed is not None):
        raise Unshardable("a mask tensor under ring attention or packed documents (causal or none)", ())
    if ulysses is not None:
        if k.shape[1] % ulysses.size():
            repeats = ulysses.size() // k.shape[1]
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        q, k, v = (_heads_to_sequence(t, ulysses) for t in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if packed is not None and ring is None and q.device.type != "cuda":
        out = _each_document(q, k, v, packed.cuts, is_causal, scale)
    elif packed is not None or ring is not None:
        turns = packed.turns(is_causal) if packed is not None else _turns(ctx, q, is_causal)
        out = _Ring.apply(q, k, v, turns, scale, is_causal, ring)
    else:
        out = _sdpa(q, k, v, attn_mask, is_causal, scale)
    return _sequence_to_heads(out, ulysses) if ulysses is not None else out


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float
) -> torch.Tensor:
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=gqa)


def _each_document(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cuts: list[int], causal: bool, scale: float
) -> torch.Tensor:
    """Attention of documents that lie one after the other, `cuts` tokens each: work grows with the sum of squares."""
    parts = zip(*(t.split(cuts, 2) for t in (q, k, v)), strict=True)
    return torch.cat([_sdpa(*part, None, causal, scale) for part in parts], 2)


def _turns(ctx: Context, q: torch.Tensor, causal: bool) -> Ring:
    return whole_sequence(q.shape[2] * ctx.spec.ring, ctx.ring_rank, ctx.spec.ring, causal, q.device)


class _Ulysses(torch.autograd.Function):
    """(b, s, h, d) -> (b, n s, h/n, d) or, with `back`, the inverse; each is the other's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Any, group: Any, back: bool) -> Any:
        ctx.group, ctx.back = group, back
        return _exchange(x, group, back)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return _exchange(grad, ctx.group, not ctx.back), None, None


def _exchange(x: torch.Tensor, group: dist.ProcessGroup, back: bool) -> torch.Tensor:
    pack, unpack = (
        (exchange.pack_sequence, exchange.unpack_heads) if back else (exchange.pack_heads, exchange.unpack_sequence)
    )
    with torch._C._AutoDispatchBelowAutograd():  # the gradient is ours: the ops' own costs more host time
        return unpack(c.exchange(pack(x, group.size()), None, None, group))


def _heads_to_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(b, h, s, d) -> (b, h/n, n s, d): rank i gets head block i of every rank's sequence."""
    out: torch.Tensor = _Ulysses.apply(x.transpose(1, 2), group, False)
    return out.transpose(1, 2)


def _sequence_to_heads(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The inverse of `_heads_to_sequence`."""
    out: torch.Tensor = _Ulysses.apply(x.transpose(1, 2), group, True)
    return out.transpose(1, 2)


@torch.library.custom_op("planner::ring_attention", mutates_args=())
def _ring_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, documents: torch.Tensor,
    blocks: list[int], scale: float, causal: bool, group_name: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(output, log-sum-exp). One op, so that selective recomputation can keep it like any attention."""
    rank, size = _place(group_name)
    out, lse = ring_kernels.start(q, v.shape[-1])
    dims = [k.shape[-1], v.shape[-1]]
    kv = torch.cat([k, v], -1)
    for turn in range(size):
        work, following = _pass_on(kv, group_name) if turn + 1 < size else ([], kv)
        source = (rank - turn) % size
        for mine, theirs, pairs in _calls(blocks, turn):
            block_k, block_v = kv[:, :, theirs].split(dims, -1)
            vectors = _vectors(positions, documents, rank, source, mine, theirs)
            out[:, :, mine], lse[:, :, mine] = ring_kernels.ring_step(
                q[:, :, mine], block_k, block_v, out[:, :, mine], lse[:, :, mine], *vectors, scale, causal, pairs
            )
        _wait(work)
        kv = following
    return out.to(q.dtype), lse


@_ring_attention.register_fake
def _(q: Any, k: Any, v: Any, *rest: Any) -> Any:
    lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty((*q.shape[:-1], v.shape[-1])), lse


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, turns: Ring, scale: float, causal: bool, group: Any) -> Any:
        static = (turns.positions, turns.documents, turns.blocks, scale, causal, group.group_name if group else "")
        out, lse = torch.ops.planner.ring_attention(q, k, v, *static)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.static = static
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return *_backward(grad, *ctx.saved_tensors, *ctx.static), None, None, None, None


def _backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    positions: torch.Tensor, documents: torch.Tensor, blocks: list[int], scale: float, causal: bool, group_name: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of q, k and v: K and V go around again, and dK and dV with them, R - 1 hops to their home."""
    rank, size = _place(group_name)
    dims = [k.shape[-1], v.shape[-1]]
    delta = (grad.to(lse.dtype) * out).sum(dim=-1)
    kv = torch.cat([k, v], -1)
    dq = torch.zeros_like(q, dtype=lse.dtype)
    home = dkv = torch.zeros_like(kv, dtype=lse.dtype)  # of this rank's own K and V
    for turn in range(size):
        work, following = _pass_on(kv, group_name) if turn + 1 < size else ([], kv)
        source = (rank - turn) % size
        for mine, theirs, pairs in _calls(blocks, turn):
            block_k, block_v = kv[:, :, theirs].split(dims, -1)
            vectors = _vectors(positions, documents, rank, source, mine, theirs)
            block_dq, *block_dkv = ring_kernels.ring_step_backward(
                grad[:, :, mine], delta[:, :, mine], q[:, :, mine], block_k, block_v, lse[:, :, mine], *vectors,
                scale, causal, pairs,
            )  # fmt: skip
            dq[:, :, mine] += block_dq
            dkv[:, :, theirs] += torch.cat(block_dkv, -1)
        if turn:
            sent, dkv = _pass_on(dkv.to(kv.dtype), group_name)  # on the wire as K and V, summed more precisely
            _wait(sent)
            dkv = dkv.to(lse.dtype)
        elif size > 1:
            dkv = torch.zeros_like(dkv)
        _wait(work)
        kv = following
    dk, dv = (dkv + home if size > 1 else home).split(dims, -1)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _place(group_name: str) -> tuple[int, int]:
    """(rank, ranks) of the ring; without a group this rank is alone."""
    if not group_name:
        return 0, 1
    group = _resolve_process_group(group_name)
    return group.rank(), group.size()


def _calls(blocks: list[int], turn: int) -> list[tuple[slice, slice, int]]:
    """(queries, keys, visible pairs) of each kernel call of a turn."""
    rows = [blocks[i : i + 6] for i in range(0, len(blocks), 6)]
    return [(slice(q0, q1), slice(k0, k1), pairs) for t, q0, q1, k0, k1, pairs in rows if t == turn]


def _vectors(
    positions: torch.Tensor, documents: torch.Tensor, rank: int, source: int, mine: slice, theirs: slice
) -> list[torch.Tensor]:
    return [row for x in (positions, documents) for row in (x[rank, mine], x[source, theirs])]


def _pass_on(x: torch.Tensor, group_name: str) -> tuple[list[dist.Work], torch.Tensor]:
    """Send to the next rank of the ring, receive from the previous one."""
    group = _resolve_process_group(group_name)
    rank, size = group.rank(), group.size()
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    send = dist.P2POp(dist.isend, x.contiguous(), group=group, group_peer=(rank + 1) % size)
    receive = dist.P2POp(dist.irecv, received, group=group, group_peer=(rank - 1) % size)
    return dist.batch_isend_irecv([send, receive] if rank % 2 == 0 else [receive, send]), received


def _wait(work: list[dist.Work]) -> None:
    for item in work:
        item.wait()
