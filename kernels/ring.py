"""One step of ring attention, continuing from (out, lse), and the merge of partial results.

A step adds the keys and values of one block to the running softmax: with s = scale q k^T over visible pairs,
lse' = log(exp lse + sum exp s) and out' = out exp(lse - lse') + sum exp(s - lse') v (Liu et al. 2023, arXiv 2310.01889,
section 3; Dao et al. 2022, arXiv 2205.14135, section 3.1). A pair is visible if its documents are equal and, with
`causal`, the key is not after the query: position and document vectors express zigzag, packed and plain layouts alike.
Backward needs no merge: with the lse of the whole row and delta = sum(dout out) - dlse every block gives its part of
dq and its own dk and dv (appendix B.2 there). Rows that see nothing keep out = 0 and lse = -inf.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import Replicate, Shard

from planner.kernels.op import Sharding, Work, define, lazily, like, precise, streamed


def visible(
    q_pos: torch.Tensor, k_pos: torch.Tensor, q_doc: torch.Tensor, k_doc: torch.Tensor, causal: bool
) -> torch.Tensor:
    """(queries, keys): which pairs attend."""
    same = q_doc.unsqueeze(-1) == k_doc
    return same & (q_pos.unsqueeze(-1) >= k_pos) if causal else same


def visible_pairs(
    q_pos: torch.Tensor, k_pos: torch.Tensor, q_doc: torch.Tensor, k_doc: torch.Tensor, causal: bool
) -> int:
    """How many pairs attend: what a step's FLOPs are proportional to."""
    return int(visible(q_pos, k_pos, q_doc, k_doc, causal).sum())


def _scores(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    s = precise(q) @ precise(_wide(k, q.shape[1])).transpose(-2, -1) * scale
    return s.masked_fill(~mask, -torch.inf)


def _wide(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _finite(lse: torch.Tensor) -> torch.Tensor:
    return torch.where(lse == -torch.inf, 0, lse)


def _step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    q_pos: torch.Tensor, k_pos: torch.Tensor, q_doc: torch.Tensor, k_doc: torch.Tensor,
    scale: float, causal: bool, pairs: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    s = _scores(q, k, visible(q_pos, k_pos, q_doc, k_doc, causal), scale)
    new = torch.logaddexp(lse, s.logsumexp(dim=-1))
    safe = _finite(new)
    p = (s - safe.unsqueeze(-1)).exp()
    return out * (lse - safe).exp().unsqueeze(-1) + p @ precise(_wide(v, q.shape[1])), new


def _step_backward(
    dout: torch.Tensor, delta: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lse: torch.Tensor,
    q_pos: torch.Tensor, k_pos: torch.Tensor, q_doc: torch.Tensor, k_doc: torch.Tensor,
    scale: float, causal: bool, pairs: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    heads, kv_heads, dout = q.shape[1], k.shape[1], precise(dout)
    s = _scores(q, k, visible(q_pos, k_pos, q_doc, k_doc, causal), scale)
    p = (s - _finite(lse).unsqueeze(-1)).exp()
    ds = p * (dout @ precise(_wide(v, heads)).transpose(-2, -1) - delta.unsqueeze(-1)) * scale
    dk, dv = ds.transpose(-2, -1) @ precise(q), p.transpose(-2, -1) @ dout
    if heads != kv_heads:
        dk, dv = (t.unflatten(1, (kv_heads, -1)).sum(dim=2) for t in (dk, dv))
    return ds @ precise(_wide(k, heads)), dk, dv


def _merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    lse = torch.logaddexp(lse_a, lse_b)
    a, b = ((x - _finite(lse)).exp().unsqueeze(-1) for x in (lse_a, lse_b))
    return (precise(out_a) * a + precise(out_b) * b).to(out_a.dtype), lse


def _merge_backward(
    dout: torch.Tensor, dlse: torch.Tensor, out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor,
    lse_b: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    wide = precise(dout)
    delta = (wide * precise(out)).sum(dim=-1) - dlse
    found = []
    for part, part_lse in ((out_a, lse_a), (out_b, lse_b)):
        weight = (part_lse - _finite(lse)).exp()
        found += [(weight.unsqueeze(-1) * wide).to(part.dtype), weight * ((wide * precise(part)).sum(dim=-1) - delta)]
    return tuple(found)


def _attention_work(matmuls: int, at: int, kernels: int) -> Any:
    def work(*args: Any, out: Any) -> Work:
        q, pairs = args[at], args[-1]
        return streamed(args, out, 2 * q.shape[0] * q.shape[1] * pairs * matmuls * q.shape[-1], kernels)

    return work


def _batch_or_heads(outs: int, ins: int) -> Any:
    def rule(*args: Any) -> list[Sharding]:
        vectors = [Replicate()] * 4 + [None] * 3 if len(args) > ins else []
        return [([Shard(d)] * outs, [Shard(d)] * ins + vectors) for d in (0, 1)]

    return rule


def _float(x: torch.Tensor) -> torch.Tensor:
    return like(x, torch.promote_types(x.dtype, torch.float32))


ring_step = define(
    "ring_step", _step, fake=lambda q, k, v, out, lse, *rest: (like(out), like(lse)),
    work=_attention_work(2, 0, 2), sharding=_batch_or_heads(2, 5), kernels={"ours": lazily("triton_ring", "step")},
)  # fmt: skip
ring_step_backward = define(
    "ring_step_backward", _step_backward, fake=lambda dout, delta, q, k, v, *rest: (_float(q), _float(k), _float(v)),
    work=_attention_work(5, 2, 4), sharding=_batch_or_heads(3, 6),
    kernels={"ours": lazily("triton_ring", "step_backward")},
)  # fmt: skip
merge_partials = define(
    "merge_partials", _merge, fake=lambda out_a, lse_a, *rest: (like(out_a), like(lse_a)),
    work=lambda *args, out: streamed(args, out, 3 * out[0].numel()), sharding=_batch_or_heads(2, 4),
    kernels={"ours": lazily("triton_ring", "merge")},
)  # fmt: skip
merge_partials_backward = define(
    "merge_partials_backward", _merge_backward,
    fake=lambda dout, dlse, out_a, lse_a, out_b, lse_b, *rest: (like(out_a), like(lse_a), like(out_b), like(lse_b)),
    work=lambda *args, out: streamed(args, out, 8 * args[0].numel(), kernels=13), sharding=_batch_or_heads(4, 8),
)  # fmt: skip


def _save_step(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:9], *output)
    ctx.static = inputs[9:]


def _backward_of_step(ctx: Any, dout: Any, dlse: Any) -> Any:
    q, k, v, out, lse, *vectors, new_out, new_lse = ctx.saved_tensors
    delta = (dout * new_out).sum(dim=-1) - dlse
    grads = ring_step_backward(dout, delta, q, k, v, new_lse, *vectors, *ctx.static)
    weight = (lse - _finite(new_lse)).exp()
    before = weight.unsqueeze(-1) * dout, weight * ((dout * out).sum(dim=-1) - delta)
    return (*(g.to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), *before, *[None] * 7)


ring_step.register_autograd(_backward_of_step, setup_context=_save_step)
merge_partials.register_autograd(
    lambda ctx, dout, dlse: merge_partials_backward(dout, dlse, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)


def start(q: torch.Tensor, dim: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of no keys: zeros (batch, heads, queries, dim) and -inf, float32."""
    shape = (*q.shape[:-1], q.shape[-1] if dim is None else dim)
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_zeros(shape, dtype=dtype), q.new_full(q.shape[:-1], -torch.inf, dtype=dtype)


def zigzag_positions(length: int, rank: int, ranks: int) -> torch.Tensor:
    """Positions (int32) that `rank` holds of a sequence of `length`: chunks rank and 2 ranks - 1 - rank of 2 ranks."""
    if length % (2 * ranks):
        raise ValueError(f"a sequence of {length} does not split into {2 * ranks} zigzag chunks of {ranks} ranks")
    chunks = torch.arange(length, dtype=torch.int32).view(2 * ranks, -1)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]])
