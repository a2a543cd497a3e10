"""Gated linear attention in chunks, and its state exchange over ranks that hold parts of the sequence.

S_t = diag(exp g_t) S_{t-1} + k_t^T v_t, o_t = scale q_t S_t, with log gates g <= 0 per key dim (Yang et al. 2024,
arXiv 2312.06635, section 4). With b_t the sum of g since the chunk began, key j reaches query i >= j of its chunk with
exp(b_i - b_j). Sub-blocks of SUB rows keep every exponent at or below 0, so that strong gates cannot overflow: between
sub-blocks both factors refer to the start of the query's one; inside one the difference itself is exponentiated.
LASP-2 (Sun et al. 2025, arXiv 2502.07563, section 3): a rank's final state from zero and its total decay are gathered
once; the states before it then give its start state. Backward gathers once more.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard

from planner.kernels.collective import finish, start_gather
from planner.kernels.op import Sharding, Work, define, lazily, like, nbytes, precise, streamed

CHUNK, SUB = 64, 16


def _blocks(b: torch.Tensor, row: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Decay factors of the sub-block of queries at `row`: within it (i, j, K), to its start, from earlier keys."""
    lower = torch.ones(SUB, SUB, dtype=torch.bool, device=b.device).tril().unsqueeze(-1)
    here = b[..., row : row + SUB, :]
    inside = (here.unsqueeze(-2) - here.unsqueeze(-3)).masked_fill(~lower, -torch.inf).exp()
    if not row:
        return inside, None, None
    start = b[..., row - 1 : row, :]
    return inside, (here - start).exp(), (start - b[..., :row, :]).exp()


def _inside(q: torch.Tensor, k: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Scores (..., C, C) of a chunk's queries and keys (..., C, K), by pairs of sub-blocks."""
    scores = q.new_zeros((*q.shape[:-1], q.shape[-2]))
    for row in range(0, q.shape[-2], SUB):
        rows, (decay, to_start, from_keys) = slice(row, row + SUB), _blocks(b, row)
        scores[..., rows, rows] = torch.einsum("...ik,...jk,...ijk->...ij", q[..., rows, :], k[..., rows, :], decay)
        if row:
            earlier = (k[..., :row, :] * from_keys).transpose(-2, -1)
            scores[..., rows, :row] = (q[..., rows, :] * to_start) @ earlier
    return scores


def _inside_backward(
    ds: torch.Tensor, q: torch.Tensor, k: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dq, dk) of the scores' gradient `ds`, zero above the diagonal."""
    dq, dk = torch.empty_like(q), torch.zeros_like(k)
    for row in range(0, q.shape[-2], SUB):
        rows, (decay, to_start, from_keys) = slice(row, row + SUB), _blocks(b, row)
        own = ds[..., rows, rows]
        dq[..., rows, :] = torch.einsum("...ij,...jk,...ijk->...ik", own, k[..., rows, :], decay)
        dk[..., rows, :] += torch.einsum("...ij,...ik,...ijk->...jk", own, q[..., rows, :], decay)
        if row:
            others = ds[..., rows, :row]
            dq[..., rows, :] += (others @ (k[..., :row, :] * from_keys)) * to_start
            dk[..., :row, :] += (others.transpose(-2, -1) @ (q[..., rows, :] * to_start)) * from_keys
    return dq, dk


def _chunks(x: torch.Tensor) -> torch.Tensor:
    """(batch, time, heads, d) -> (chunks, batch, heads, CHUNK, d), zeros after the end."""
    wide = torch.nn.functional.pad(precise(x), (0, 0, 0, 0, 0, -x.shape[1] % CHUNK))
    return wide.unflatten(1, (-1, CHUNK)).permute(1, 0, 3, 2, 4)


def _joined(chunks: list[torch.Tensor], like_this: torch.Tensor) -> torch.Tensor:
    """The inverse of `_chunks`, in the shape and type of `like_this`."""
    whole = torch.stack(chunks).permute(1, 0, 3, 2, 4).flatten(1, 2)
    return whole[:, : like_this.shape[1]].to(like_this.dtype)


def _next_state(k: torch.Tensor, v: torch.Tensor, b: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    last = b[..., -1:, :]
    return last.transpose(-2, -1).exp() * state + (k * (last - b).exp()).transpose(-2, -1) @ v


def _gla(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    outs = []
    for q_c, k_c, v_c, g_c in zip(*map(_chunks, (q, k, v, g)), strict=True):
        b = g_c.cumsum(dim=-2)
        outs.append((_inside(q_c, k_c, b) @ v_c + (q_c * b.exp()) @ state) * scale)
        state = _next_state(k_c, v_c, b, state)
    return _joined(outs, v), state.clone()


def _gla_backward(
    do: torch.Tensor, dstate: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor,
    state: torch.Tensor, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    parts = list(zip(*map(_chunks, (q, k, v, g, do)), strict=True))
    states = [state]
    for _, k_c, v_c, g_c, _ in parts[:-1]:
        states.append(_next_state(k_c, v_c, g_c.cumsum(dim=-2), states[-1]))
    grads: list[tuple[torch.Tensor, ...]] = []
    for (q_c, k_c, v_c, g_c, do_c), before in zip(reversed(parts), reversed(states), strict=True):
        *found, dstate = _chunk_backward(q_c, k_c, v_c, g_c.cumsum(dim=-2), do_c * scale, before, dstate)
        grads.append(tuple(found))
    dq, dk, dv, dg = (_joined(list(x)[::-1], w) for x, w in zip(zip(*grads, strict=True), (q, k, v, g), strict=True))
    return dq, dk, dv, dg, dstate.clone()


def _chunk_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, b: torch.Tensor, do: torch.Tensor, state: torch.Tensor,
    dstate: torch.Tensor,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """(dq, dk, dv, dg, dstate before) of one chunk; b enters q by +b and k by -b, so db = q dq - k dk."""
    last = b[..., -1:, :]
    rest, decayed = (last - b).exp(), last.transpose(-2, -1).exp()
    dq, dk = _inside_backward((do @ v.transpose(-2, -1)).tril(), q, k, b)
    dq = dq + (do @ state.transpose(-2, -1)) * b.exp()
    dk_state = (v @ dstate.transpose(-2, -1)) * rest
    dv = _inside(q, k, b).transpose(-2, -1) @ do + (k * rest) @ dstate
    dk = dk + dk_state
    db = q * dq - k * dk
    dlast = (k * dk_state).sum(dim=-2) + (decayed * state * dstate).sum(dim=-1)
    db[..., -1, :] += dlast
    dg = db.flip(-2).cumsum(dim=-2).flip(-2)
    return dq, dk, dv, dg, (q * b.exp()).transpose(-2, -1) @ do + decayed * dstate


def _flops(q: torch.Tensor, v: torch.Tensor) -> int:
    """Scores and their product with v over the lower half of each chunk, state in and state out."""
    batch, time, heads, keys = q.shape
    values = v.shape[-1]
    inside = (CHUNK + 1) * (keys + values)  # 2 FLOPs for (C + 1) / 2 pairs a row
    return batch * time * heads * (inside + 4 * keys * values)


def _work(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor, scale: float, out: Any
) -> Work:
    """States in front of every chunk, scores, outputs: each a kernel, whose result the next one reads."""
    between = _between(q, v)
    again = Work(read_bytes=between + nbytes(q, k, v, g, g), written_bytes=between)
    return streamed((q, k, v, g, state), out, _flops(q, v), kernels=3) + again


def _backward_work(do: Any, dstate: Any, *saved: Any, out: Any) -> Work:
    """Every product twice, and the forward's states and scores again."""
    q, k, v, g = saved[:4]
    between = 2 * _between(q, v)  # and their gradients
    again = Work(read_bytes=between + nbytes(do, do, do, q, q, k, k, k, v, v, *(g,) * 4), written_bytes=between)
    return streamed((do, dstate, *saved), out, 3 * _flops(q, v), kernels=6) + again


def _between(q: torch.Tensor, v: torch.Tensor) -> int:
    """Bytes of a state for every chunk in float32, and of the scores, in 16 bits where the inputs have so few."""
    batch, time, heads, keys = q.shape
    states = 4 * batch * heads * -(-time // CHUNK) * keys * v.shape[-1]
    return states + min(q.element_size(), 4) * batch * time * heads * CHUNK


def _batch_or_heads(outs: list[int], ins: list[int]) -> Any:
    """The sequence tensors have their heads in dim 2, the state in dim 1; batch is dim 0 of both."""

    def rule(*args: Any) -> list[Sharding]:
        return [([Shard(0)] * len(outs), [Shard(0)] * len(ins)), ([Shard(d) for d in outs], [Shard(d) for d in ins])]

    return rule


gla_op = define(
    "gla", _gla, fake=lambda q, k, v, g, state, scale: (like(v), like(state)), work=_work,
    sharding=lambda *args: [(o, [*i, None]) for o, i in _batch_or_heads([2, 1], [2, 2, 2, 2, 1])()],
    kernels={"ours": lazily("triton_gla", "gla"), "fla": lazily("peers", "fla_gla")},
)  # fmt: skip
gla_backward = define(
    "gla_backward", _gla_backward, fake=lambda do, dstate, *saved: tuple(map(like, saved[:5])), work=_backward_work,
    sharding=lambda *args: [(o, [*i, None]) for o, i in _batch_or_heads([2, 2, 2, 2, 1], [2, 1, 2, 2, 2, 2, 1])()],
    kernels={"ours": lazily("triton_gla", "gla_backward")},
)  # fmt: skip


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.scale = inputs[5]


gla_op.register_autograd(
    lambda ctx, do, dstate: (*gla_backward(do, dstate, *ctx.saved_tensors, ctx.scale), None), setup_context=_save
)


def empty_state(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The state before the first token: zeros (batch, heads, K, V), float32 (float64 for float64)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_zeros((q.shape[0], q.shape[2], q.shape[3], v.shape[3]), dtype=dtype)


def gated_linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, *, scale: float | None = None,
    state: torch.Tensor | None = None, group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(out (batch, time, heads, V), state after this rank's tokens) of q, k, g (batch, time, heads, K).

    With `group` its ranks hold consecutive parts of the sequence in rank order and `state` must be None.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    zero = empty_state(q, v)
    if group is None:
        return gla_op(q, k, v, g, zero if state is None else state, scale)
    if state is not None:
        raise ValueError("a start state together with a group: the state before a rank comes from the ranks before it")
    # out is linear in the start state, so a second pass over q alone would do; the op runs once, from the right state.
    local, decay = _local_state(k, v, g)
    return gla_op(q, k, v, g, _Exchange.apply(local, decay, group), scale)


def _local_state(k: torch.Tensor, v: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """State after these tokens from zero, and the log of their total decay (batch, heads, K): one product."""
    b = precise(g).cumsum(dim=1)
    last = b[:, -1]
    kept = precise(k) * (last.unsqueeze(1) - b).exp()
    return torch.einsum("bthk,bthv->bhkv", kept, precise(v)), last


def prefix(states: torch.Tensor, decays: torch.Tensor, rank: int) -> torch.Tensor:
    """State before `rank` from every rank's state (ranks, ..., K, V) and log decay (ranks, ..., K)."""
    total = torch.zeros_like(states[0])
    for earlier in range(rank):
        total = decays[earlier].exp().unsqueeze(-1) * total + states[earlier]
    return total


class _Exchange(torch.autograd.Function):
    """Start state of this rank; one all-gather each way, joined by every rank (else the others wait for ever)."""

    @staticmethod
    def forward(ctx: Any, local: Any, decay: Any, group: Any) -> Any:
        states, decays = _gather_pairs(local, decay, group)
        ctx.save_for_backward(states, decays)
        ctx.group = group
        return prefix(states, decays, dist.get_rank(group))

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        states, decays = ctx.saved_tensors
        group = ctx.group
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        grads = finish(start_gather(grad, group), group)
        # Gradient of the state after this rank: that of the start states behind it, decayed on the way back.
        after = torch.zeros_like(grad)
        for later in range(ranks - 1, rank, -1):
            after = grads[later] + decays[later].exp().unsqueeze(-1) * after
        before = prefix(states, decays, rank)
        return after, decays[rank].exp() * (after * before).sum(dim=-1), None


def _gather_pairs(local: torch.Tensor, decay: torch.Tensor, group: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Both tensors of every rank in one collective."""
    both = torch.cat([local, decay.unsqueeze(-1)], dim=-1)
    gathered = finish(start_gather(both, group), group)
    return gathered[..., :-1], gathered[..., -1]
