"""Triton kernels of gla.py: the states walk through the chunks, scores and outputs take all chunks at once.

With b the running sum of the gates of a chunk, factors exp(b_i - m) and exp(m - b_j) of its middle m turn the scores
into one product, as long as neither leaves float32 (`_SPREAD`); beyond, key by key: the decay from key j to every later
query is summed from j on, so no exponent is above 0 nor the difference of large sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from planner.kernels.op import like

CHUNK = 64
_SPREAD = tl.constexpr(120.0)  # of the gates' sums over a chunk: factors up to exp(60); what overflows is masked


@triton.jit
def _tokens(pair, chunk, time, heads, C: tl.constexpr):
    """(index of each token of a chunk among all tokens and heads, whether it is there), (C, 1) each."""
    t = chunk * C + tl.arange(0, C)
    return (((pair // heads) * time + t) * heads + pair % heads)[:, None], (t < time)[:, None]


@triton.jit
def _tile(ptr, token, here, width: tl.constexpr, column):
    """A chunk's tile of `column` values of (tokens, width), float32, zero after the end."""
    return tl.load(ptr + token * width + column[None, :], mask=here, other=0.0).to(tl.float32)


@triton.jit
def _put(ptr, token, here, width: tl.constexpr, column, x):
    tl.store(ptr + token * width + column[None, :], x.to(ptr.dtype.element_ty), mask=here)


@triton.jit
def _key(k_ptr, g_ptr, pair, t, time, heads, K: tl.constexpr, kd):
    """The key and the gates of one token, float32, zero after the end."""
    row = (((pair // heads) * time + t) * heads + pair % heads) * K + kd
    k = tl.load(k_ptr + row, mask=t < time, other=0.0).to(tl.float32)
    return k, tl.load(g_ptr + row, mask=t < time, other=0.0).to(tl.float32)


@triton.jit
def _part(V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Key dims and value dims of the part of a state that a program walks with, and where it lies in the state."""
    kd = tl.program_id(0) // (V // BV) * BK + tl.arange(0, BK)
    vd = tl.program_id(0) % (V // BV) * BV + tl.arange(0, BV)
    return kd, vd, kd[:, None] * V + vd[None, :]


@triton.jit
def _rest(g):
    """Sum of the gates after each row."""
    return tl.cumsum(g, axis=0, reverse=True) - g


@triton.jit
def states_kernel(
    k_ptr, v_ptr, g_ptr, state_ptr, states_ptr, final_ptr, time, heads,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state in front of every chunk, (BK, BV) of it a program."""
    pair = tl.program_id(1).to(tl.int64)
    kd, vd, square = _part(V, BK, BV)
    state = tl.load(state_ptr + pair * K * V + square).to(tl.float32)
    chunks = tl.cdiv(time, C)
    for chunk in range(0, chunks):
        tl.store(states_ptr + (pair * chunks + chunk) * K * V + square, state)
        token, here = _tokens(pair, chunk, time, heads, C)
        g = _tile(g_ptr, token, here, K, kd)
        k = _tile(k_ptr, token, here, K, kd) * tl.exp(_rest(g))
        v = _tile(v_ptr, token, here, V, vd)
        state = state * tl.exp(tl.sum(g, axis=0))[:, None] + tl.dot(tl.trans(k), v, input_precision=PRECISION)
    tl.store(final_ptr + pair * K * V + square, state)


@triton.jit
def dstates_kernel(
    q_ptr, do_ptr, g_ptr, dfinal_ptr, dstates_ptr, dstate_ptr, time, heads, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the state behind every chunk, last chunk first."""
    pair = tl.program_id(1).to(tl.int64)
    kd, vd, square = _part(V, BK, BV)
    state = tl.load(dfinal_ptr + pair * K * V + square).to(tl.float32)
    chunks = tl.cdiv(time, C)
    for back in range(0, chunks):
        chunk = chunks - 1 - back
        tl.store(dstates_ptr + (pair * chunks + chunk) * K * V + square, state)
        token, here = _tokens(pair, chunk, time, heads, C)
        g = _tile(g_ptr, token, here, K, kd)
        q = _tile(q_ptr, token, here, K, kd) * tl.exp(tl.cumsum(g, axis=0))
        do = _tile(do_ptr, token, here, V, vd) * scale
        state = state * tl.exp(tl.sum(g, axis=0))[:, None] + tl.dot(tl.trans(q), do, input_precision=PRECISION)
    tl.store(dstate_ptr + pair * K * V + square, state)


@triton.jit
def scores_kernel(
    q_ptr, k_ptr, g_ptr, scores_ptr, time, heads,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Decayed products of a chunk's queries and keys, zero above the diagonal."""
    pair, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0)
    token, here = _tokens(pair, chunk, time, heads, C)
    i = tl.arange(0, C)
    scores = tl.zeros([C, C], tl.float32)
    for start in range(0, K, BK):
        kd = start + tl.arange(0, BK)
        q = _tile(q_ptr, token, here, K, kd)
        g = _tile(g_ptr, token, here, K, kd)
        total = tl.sum(g, axis=0)
        if tl.max(-total, axis=0) < _SPREAD:
            b = tl.cumsum(g, axis=0) - 0.5 * total[None, :]
            k = _tile(k_ptr, token, here, K, kd) * tl.exp(-b)
            scores += tl.dot(q * tl.exp(b), tl.trans(k), input_precision=PRECISION)
        else:
            decay = tl.zeros([C, BK], tl.float32)
            for back in range(0, C):
                j = C - 1 - back
                k_j, g_j = _key(k_ptr, g_ptr, pair, chunk * C + j, time, heads, K, kd)
                column = tl.sum(q * k_j[None, :] * tl.exp(decay), axis=1)
                scores += tl.where((i == j)[None, :], column[:, None], 0.0)
                decay += tl.where((i >= j)[:, None], g_j[None, :], 0.0)
    scores = tl.where(i[:, None] >= i[None, :], scores, 0.0)
    _put(scores_ptr, token, here, C, i, scores)


@triton.jit
def out_kernel(
    q_ptr, v_ptr, g_ptr, scores_ptr, states_ptr, out_ptr, time, heads, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A chunk's outputs: scores times values, and decayed queries times the state in front."""
    pair, chunk = tl.program_id(2).to(tl.int64), tl.program_id(0)
    token, here = _tokens(pair, chunk, time, heads, C)
    vd = tl.program_id(1) * BV + tl.arange(0, BV)
    scores = _tile(scores_ptr, token, here, C, tl.arange(0, C))
    out = tl.dot(scores, _tile(v_ptr, token, here, V, vd), input_precision=PRECISION)
    states_ptr += (pair * tl.num_programs(0) + chunk) * K * V
    for start in range(0, K, BK):
        kd = start + tl.arange(0, BK)
        b = tl.cumsum(_tile(g_ptr, token, here, K, kd), axis=0)
        q = _tile(q_ptr, token, here, K, kd) * tl.exp(b)
        state = tl.load(states_ptr + kd[:, None] * V + vd[None, :])
        out += tl.dot(q, state, input_precision=PRECISION)
    _put(out_ptr, token, here, V, vd, out * scale)


@triton.jit
def dscores_kernel(
    do_ptr, v_ptr, dscores_ptr, time, heads, scale,
    V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a chunk's scores, zero above the diagonal."""
    pair, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0)
    token, here = _tokens(pair, chunk, time, heads, C)
    i = tl.arange(0, C)
    scores = tl.zeros([C, C], tl.float32)
    for start in range(0, V, BV):
        vd = start + tl.arange(0, BV)
        v = _tile(v_ptr, token, here, V, vd)
        scores += tl.dot(_tile(do_ptr, token, here, V, vd), tl.trans(v), input_precision=PRECISION)
    _put(dscores_ptr, token, here, C, i, tl.where(i[:, None] >= i[None, :], scores * scale, 0.0))


@triton.jit
def dv_kernel(
    k_ptr, g_ptr, do_ptr, scores_ptr, dstates_ptr, dv_ptr, time, heads, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A chunk's dv: through its own scores, and through the state behind it."""
    pair, chunk = tl.program_id(2).to(tl.int64), tl.program_id(0)
    token, here = _tokens(pair, chunk, time, heads, C)
    vd = tl.program_id(1) * BV + tl.arange(0, BV)
    scores = _tile(scores_ptr, token, here, C, tl.arange(0, C))
    dv = tl.dot(tl.trans(scores), _tile(do_ptr, token, here, V, vd) * scale, input_precision=PRECISION)
    dstates_ptr += (pair * tl.num_programs(0) + chunk) * K * V
    for start in range(0, K, BK):
        kd = start + tl.arange(0, BK)
        k = _tile(k_ptr, token, here, K, kd) * tl.exp(_rest(_tile(g_ptr, token, here, K, kd)))
        dstate = tl.load(dstates_ptr + kd[:, None] * V + vd[None, :])
        dv += tl.dot(k, dstate, input_precision=PRECISION)
    _put(dv_ptr, token, here, V, vd, dv)


@triton.jit
def dqk_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, do_ptr, states_ptr, dstates_ptr, dscores_ptr, dq_ptr, dk_ptr, dg_ptr,
    time, heads, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A chunk's dq, dk and dg of BK key dims."""
    pair, chunk = tl.program_id(2).to(tl.int64), tl.program_id(0)
    token, here = _tokens(pair, chunk, time, heads, C)
    i = tl.arange(0, C)
    kd = tl.program_id(1) * BK + tl.arange(0, BK)
    square = (pair * tl.num_programs(0) + chunk) * K * V + kd[:, None] * V
    dq = tl.zeros([C, BK], tl.float32)
    dk = tl.zeros([C, BK], tl.float32)
    crossing = tl.zeros([BK], tl.float32)
    for start in range(0, V, BV):
        vd = start + tl.arange(0, BV)
        state = tl.load(states_ptr + square + vd[None, :])
        dstate = tl.load(dstates_ptr + square + vd[None, :])
        crossing += tl.sum(state * dstate, axis=1)
        do = _tile(do_ptr, token, here, V, vd) * scale
        dq += tl.dot(do, tl.trans(state), input_precision=PRECISION)
        dk += tl.dot(_tile(v_ptr, token, here, V, vd), tl.trans(dstate), input_precision=PRECISION)
    q = _tile(q_ptr, token, here, K, kd)
    k = _tile(k_ptr, token, here, K, kd)
    g = _tile(g_ptr, token, here, K, kd)
    total = tl.sum(g, axis=0)
    dq = dq * tl.exp(tl.cumsum(g, axis=0))
    dk = dk * tl.exp(_rest(g))
    dlast = tl.sum(k * dk, axis=0) + tl.exp(total) * crossing
    if tl.max(-total, axis=0) < _SPREAD:
        b = tl.cumsum(g, axis=0) - 0.5 * total[None, :]
        dscores = _tile(dscores_ptr, token, here, C, i)
        dq += tl.dot(dscores, k * tl.exp(-b), input_precision=PRECISION) * tl.exp(b)
        dk += tl.dot(tl.trans(dscores), q * tl.exp(b), input_precision=PRECISION) * tl.exp(-b)
    else:
        decay = tl.zeros([C, BK], tl.float32)
        for back in range(0, C):
            j = C - 1 - back
            k_j, g_j = _key(k_ptr, g_ptr, pair, chunk * C + j, time, heads, K, kd)
            weight = tl.load(dscores_ptr + token * C + j, mask=here, other=0.0).to(tl.float32) * tl.exp(decay)
            dq += weight * k_j[None, :]
            dk += tl.where((i == j)[:, None], tl.sum(weight * q, axis=0)[None, :], 0.0)
            decay += tl.where((i >= j)[:, None], g_j[None, :], 0.0)
    dg = tl.cumsum(q * dq - k * dk, axis=0, reverse=True) + dlast[None, :]
    _put(dq_ptr, token, here, K, kd, dq)
    _put(dk_ptr, token, here, K, kd, dk)
    _put(dg_ptr, token, here, K, kd, dg)


def _block(dim: int) -> int:
    """Dims of a tile. ValueError for a head dim that tiles do not divide."""
    block = next((b for b in (64, 32, 16) if dim % b == 0), 0)
    if not block:
        raise ValueError(f"head dim {dim}; the Triton gated linear attention takes multiples of 16, choose 'torch'")
    return block


class _Launch:
    """Grids and constants of one call; (batch, time, heads, K or V) tensors are contiguous."""

    def __init__(self, q: torch.Tensor, v: torch.Tensor) -> None:
        self.batch, self.time, self.heads, self.keys = q.shape
        self.values = v.shape[-1]
        self.bk, self.bv, self.chunks = _block(self.keys), _block(self.values), triton.cdiv(self.time, CHUNK)
        self.pairs = self.batch * self.heads
        self.kept = torch.float32 if q.dtype == torch.float32 else torch.bfloat16  # of scores between kernels
        self.common = {"C": CHUNK, "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32", "num_warps": 4}
        self.both = {"K": self.keys, "V": self.values, "BK": self.bk, "BV": self.bv, **self.common}
        self.walk = (self.keys // self.bk * (self.values // self.bv), self.pairs)

    def states(self, x: torch.Tensor) -> torch.Tensor:
        """Room for a state of every chunk."""
        return x.new_empty((self.pairs, self.chunks, self.keys, self.values), dtype=torch.float32)

    def scores(self, q: torch.Tensor, k: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """The scores of every chunk, (batch, time, heads, CHUNK)."""
        scores = q.new_empty((*q.shape[:3], CHUNK), dtype=self.kept)
        scores_kernel[(self.chunks, self.pairs)](
            q, k, g, scores, self.time, self.heads, K=self.keys, BK=self.bk, **self.common
        )
        return scores

    def forward_states(self, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """(states in front of every chunk, state after the last)."""
        states, final = self.states(k), like(state)
        states_kernel[self.walk](k, v, g, state, states, final, self.time, self.heads, **self.both)
        return states, final


def gla(q, k, v, g, state, scale):
    """The op gla."""
    q, k, v, g, state = (t.contiguous() for t in (q, k, v, g, state))
    run, out = _Launch(q, v), like(v)
    if not q.numel():
        return out, state.clone()
    states, final = run.forward_states(k, v, g, state)
    scores = run.scores(q, k, g)
    grid = (run.chunks, run.values // run.bv, run.pairs)
    out_kernel[grid](q, v, g, scores, states, out, run.time, run.heads, scale, **run.both)
    return out, final


def gla_backward(do, dstate, q, k, v, g, state, scale):
    """The op gla_backward."""
    do, dstate, q, k, v, g, state = (t.contiguous() for t in (do, dstate, q, k, v, g, state))
    run, (dq, dk, dv, dg, dstart) = _Launch(q, v), map(like, (q, k, v, g, state))
    if not q.numel():
        return dq, dk, dv, dg, dstate.clone()
    sizes = (run.time, run.heads)
    states, _ = run.forward_states(k, v, g, state)
    dstates = run.states(q)
    dstates_kernel[run.walk](q, do, g, dstate, dstates, dstart, *sizes, scale, **run.both)
    scores = run.scores(q, k, g)
    dscores = torch.empty_like(scores)
    dscores_kernel[(run.chunks, run.pairs)](
        do, v, dscores, *sizes, scale, V=run.values, BV=run.bv, **run.common
    )
    grid = (run.chunks, run.values // run.bv, run.pairs)
    dv_kernel[grid](k, g, do, scores, dstates, dv, *sizes, scale, **run.both)
    bk = min(run.bk, 32)  # what its registers hold without spilling
    dqk_kernel[(run.chunks, run.keys // bk, run.pairs)](
        q, k, v, g, do, states, dstates, dscores, dq, dk, dg, *sizes, scale, **run.both | {"BK": bk, "num_warps": 8}
    )
    return dq, dk, dv, dg, dstart
