"""Attention over context-parallel ranks: Ulysses all-to-all of heads, ring of keys and values, or both.

Ulysses (Jacobs et al. 2023, arXiv 2309.14509, section 3): heads for sequence and back. Ring (Liu et al. 2023,
arXiv 2310.01889) in zigzag order: rank r holds chunks r and 2R-1-r, so that causal work is equal; partial
results merge by their log-sum-exp, and backward passes dK and dV around with K and V.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.distributed_c10d import _resolve_process_group

from planner.runtime import collectives as c
from planner.runtime.sharded import Context, Unshardable


def attend(
    ctx: Context, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Attention of local (batch, heads, local sequence, dim) tensors over all context ranks' positions."""
    del enable_gqa
    if dropout_p:
        raise Unshardable("attention dropout under context parallelism", ())
    if attn_mask is not None and ctx.spec.ring > 1:
        raise Unshardable("a mask tensor under ring attention (causal or none)", ())
    ulysses = ctx.spec.ulysses
    if ulysses > 1:
        if k.shape[1] % ulysses:
            repeats = ulysses // k.shape[1]
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        q, k, v = (_heads_to_sequence(t, ctx.ulysses) for t in (q, k, v))
    if ctx.spec.ring > 1:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out = _Ring.apply(q, k, v, scale, is_causal, ctx.ring)
    else:
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=gqa)
    return _sequence_to_heads(out, ctx.ulysses) if ulysses > 1 else out


def _heads_to_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(b, h, s, d) -> (b, h/n, n s, d): rank i gets head block i of every rank's sequence."""
    n, (b, h, s, d) = group.size(), x.shape
    sent = x.reshape(b, n, h // n, s, d).permute(1, 0, 2, 3, 4)
    got = c.all_to_all(sent, group)  # (n, b, h/n, s, d), one sequence part from each rank
    return got.permute(1, 2, 0, 3, 4).reshape(b, h // n, n * s, d)


def _sequence_to_heads(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The inverse of `_heads_to_sequence`."""
    n, (b, h, s, d) = group.size(), x.shape
    sent = x.reshape(b, h, n, s // n, d).permute(2, 0, 1, 3, 4)
    got = c.all_to_all(sent, group)  # (n, b, h, s/n, d), one head block from each rank
    return got.permute(1, 0, 2, 3, 4).reshape(b, n * h, s // n, d)


@torch.library.custom_op("planner::ring_attention", mutates_args=())
def _ring_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, group_name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, log-sum-exp). One op, so that selective recomputation can keep it like any attention."""
    group = _resolve_process_group(group_name)
    out = lse = None
    dims = [k.shape[-1], v.shape[-1]]
    kv = torch.cat([k, v], -1)
    for step in range(group.size()):
        work, following = _pass_on(kv, group) if step + 1 < group.size() else (None, None)
        half_q, half_k, own = _halves(group.rank(), step, group.size(), causal)
        block = _forward_block(_part(q, half_q), *_part(kv, half_k).split(dims, -1), scale, own)
        out, lse = _merge(out, lse, *block, half_q, q)
        if work is not None:
            _wait(work)
            kv = following
    return out.to(q.dtype), lse


@_ring_attention.register_fake
def _(q: Any, k: Any, v: Any, scale: float, causal: bool, group_name: str) -> Any:
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1])


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, scale: float, causal: bool, group: Any) -> Any:
        out, lse = torch.ops.planner.ring_attention(q, k, v, scale, causal, group.group_name)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.causal, ctx.group = scale, causal, group
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        group, size = ctx.group, ctx.group.size()
        dims = [k.shape[-1], v.shape[-1]]
        kv, dq = torch.cat([k, v], -1), torch.zeros_like(q)
        delta = (grad * out).sum(dim=-1)
        home = dkv = torch.zeros_like(kv)  # of this rank's own K and V; the others' travel on, R-1 hops to their home
        for step in range(size):
            work, following = _pass_on(kv, group) if step + 1 < size else (None, None)
            half_q, half_k, own = _halves(group.rank(), step, size, ctx.causal)
            parts = [_part(t, half_q) for t in (q, grad)] + [_part_row(t, half_q) for t in (lse, delta)]
            block_q, *block_kv = _backward_block(*parts, *_part(kv, half_k).split(dims, -1), ctx.scale, own)
            _part(dq, half_q).add_(block_q)
            _part(dkv, half_k).add_(torch.cat(block_kv, -1))
            if step:
                grads, dkv = _pass_on(dkv, group)
                _wait(grads)
            else:
                dkv = torch.zeros_like(kv)
            if work is not None:
                _wait(work)
                kv = following
        dkv = dkv + home
        dk, dv = dkv.split(dims, -1)
        return dq, dk, dv, None, None, None


def _pass_on(x: torch.Tensor, group: dist.ProcessGroup) -> tuple[list[dist.Work], torch.Tensor]:
    """Send to the next rank of the ring, receive from the previous one."""
    rank, size = group.rank(), group.size()
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    send = dist.P2POp(dist.isend, x.contiguous(), group=group, group_peer=(rank + 1) % size)
    receive = dist.P2POp(dist.irecv, received, group=group, group_peer=(rank - 1) % size)
    return dist.batch_isend_irecv([send, receive] if rank % 2 == 0 else [receive, send]), received


def _wait(work: list[dist.Work]) -> None:
    for item in work:
        item.wait()


def _halves(rank: int, step: int, size: int, causal: bool) -> tuple[str, str, bool]:
    """(part of q, part of k and v, causal mask) of the block with K and V of rank (rank - step) % size."""
    source = (rank - step) % size
    if not causal or source == rank:
        return "all", "all", causal
    return ("all", "first", False) if source < rank else ("second", "all", False)


def _part(x: torch.Tensor, half: str) -> torch.Tensor:
    """(b, h, s, d): all of s, its first or its second half."""
    size = x.shape[2] // 2
    return x if half == "all" else x[:, :, :size] if half == "first" else x[:, :, size:]


def _part_row(x: torch.Tensor, half: str) -> torch.Tensor:
    return _part(x.unsqueeze(-1), half).squeeze(-1)


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    scores = (q @ k.transpose(-2, -1)) * scale
    if causal:
        scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1), float("-inf"))
    return scores


def _wide(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _forward_block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, log-sum-exp) of one block, by materialised scores."""
    scores = _scores(q, _wide(k, q.shape[1]), scale, causal)
    lse = scores.logsumexp(dim=-1)
    return (scores - lse.unsqueeze(-1)).exp() @ _wide(v, q.shape[1]), lse


def _merge(out: Any, lse: Any, block: torch.Tensor, block_lse: torch.Tensor, half: str, q: torch.Tensor) -> Any:
    """Add a block to the running result (Liu et al. 2023, section 3; Dao et al. 2022, equation 3)."""
    if out is None:
        return block, block_lse
    old, old_lse = _part(out, half), _part_row(lse, half)
    new_lse = torch.logaddexp(old_lse, block_lse)
    new = old * (old_lse - new_lse).exp().unsqueeze(-1) + block * (block_lse - new_lse).exp().unsqueeze(-1)
    if half == "all":
        return new, new_lse
    size = q.shape[2] // 2
    return torch.cat([out[:, :, :size], new], 2), torch.cat([lse[:, :, :size], new_lse], 2)


def _backward_block(
    q: torch.Tensor, grad: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor,
    k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dq, dk, dv) of one block from the whole row's log-sum-exp (Dao et al. 2022, section B.4)."""
    heads, kv_heads = q.shape[1], k.shape[1]
    wide_k, wide_v = _wide(k, heads), _wide(v, heads)
    p = (_scores(q, wide_k, scale, causal) - lse.unsqueeze(-1)).exp()
    ds = p * (grad @ wide_v.transpose(-2, -1) - delta.unsqueeze(-1)) * scale
    dk, dv = ds.transpose(-2, -1) @ q, p.transpose(-2, -1) @ grad
    if heads != kv_heads:
        dk, dv = (t.unflatten(1, (kv_heads, -1)).sum(dim=2) for t in (dk, dv))
    return ds @ wide_k, dk, dv
