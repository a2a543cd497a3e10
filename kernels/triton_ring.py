"""Triton kernels of ring.py: attention forward and backward that continue from (out, lse), and the merge.

A first small kernel finds, per tile, which span of the other side it can see; the loops run over that span only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from planner.kernels.op import like

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def span_kernel(
    pos_ptr, doc_ptr, other_pos_ptr, other_doc_ptr, span_ptr, length, other_length,
    QUERIES: tl.constexpr, CAUSAL: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """[first, last) index of the other side that any row of this tile may see; QUERIES: this side holds queries."""
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = at < length
    doc = tl.load(doc_ptr + at, mask=inside, other=0)
    pos = tl.load(pos_ptr + at, mask=inside, other=0)
    low_doc = tl.min(tl.where(inside, doc, 2147483647), axis=0)
    high_doc = tl.max(tl.where(inside, doc, -2147483647), axis=0)
    low_pos = tl.min(tl.where(inside, pos, 2147483647), axis=0)
    high_pos = tl.max(tl.where(inside, pos, -2147483647), axis=0)
    first = other_length
    last = 0
    for start in range(0, other_length, BLOCK):
        other = start + tl.arange(0, BLOCK)
        there = other < other_length
        other_doc = tl.load(other_doc_ptr + other, mask=there, other=0)
        other_pos = tl.load(other_pos_ptr + other, mask=there, other=0)
        seen = there & (other_doc >= low_doc) & (other_doc <= high_doc)
        if CAUSAL:
            if QUERIES:
                seen = seen & (other_pos <= high_pos)
            else:
                seen = seen & (other_pos >= low_pos)
        first = tl.minimum(first, tl.min(tl.where(seen, other, other_length), axis=0))
        last = tl.maximum(last, tl.max(tl.where(seen, other + 1, 0), axis=0))
    tl.store(span_ptr + tl.program_id(0) * 2, first)
    tl.store(span_ptr + tl.program_id(0) * 2 + 1, last)


@triton.jit
def step_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, new_out_ptr, new_lse_ptr, q_pos_ptr, k_pos_ptr, q_doc_ptr, k_doc_ptr,
    span_ptr, heads, group, q_len, k_len, scale,
    CAUSAL: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One program per tile of M queries of one head; the running maximum starts at the lse so far."""
    head = tl.program_id(1).to(tl.int64)
    kv_head = (head // heads) * (heads // group) + (head % heads) // group
    row = tl.program_id(0) * M + tl.arange(0, M)
    here = row < q_len
    d = tl.arange(0, D)
    at = (head * q_len + row)[:, None] * D + d[None, :]
    q = tl.load(q_ptr + at, mask=here[:, None], other=0.0)
    acc = tl.load(out_ptr + at, mask=here[:, None], other=0.0)
    lse = tl.load(lse_ptr + head * q_len + row, mask=here, other=float("-inf"))
    m = lse * _LOG2E
    total = tl.where(m == float("-inf"), 0.0, 1.0)
    q_pos = tl.load(q_pos_ptr + row, mask=here, other=0)
    q_doc = tl.load(q_doc_ptr + row, mask=here, other=0)
    first = tl.load(span_ptr + tl.program_id(0) * 2) // N * N
    last = tl.load(span_ptr + tl.program_id(0) * 2 + 1)
    for start in range(first, last, N):
        col = start + tl.arange(0, N)
        there = col < k_len
        k_pos = tl.load(k_pos_ptr + col, mask=there, other=0)
        k_doc = tl.load(k_doc_ptr + col, mask=there, other=0)
        mask = here[:, None] & there[None, :] & (q_doc[:, None] == k_doc[None, :])
        if CAUSAL:
            mask = mask & (q_pos[:, None] >= k_pos[None, :])
        k_at = (kv_head * k_len + col)[None, :] * D + d[:, None]
        k = tl.load(k_ptr + k_at, mask=there[None, :], other=0.0)
        s = tl.dot(q, k, input_precision="ieee") * (scale * _LOG2E)
        s = tl.where(mask, s, float("-inf"))
        new_m = tl.maximum(m, tl.max(s, axis=1))
        safe = tl.where(new_m == float("-inf"), 0.0, new_m)
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(m - safe)
        total = total * shrink + tl.sum(p, axis=1)
        v_at = (kv_head * k_len + col)[:, None] * D + d[None, :]
        v = tl.load(v_ptr + v_at, mask=there[:, None], other=0.0)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m = new_m
    seen = total > 0.0
    acc = acc / tl.where(seen, total, 1.0)[:, None]
    new_lse = tl.where(seen, m + tl.log2(tl.where(seen, total, 1.0)), float("-inf")) / _LOG2E
    tl.store(new_out_ptr + at, acc, mask=here[:, None])
    tl.store(new_lse_ptr + head * q_len + row, new_lse, mask=here)


@triton.jit
def dq_kernel(
    dout_ptr, delta_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, dq_ptr, q_pos_ptr, k_pos_ptr, q_doc_ptr, k_doc_ptr,
    span_ptr, heads, group, q_len, k_len, scale,
    CAUSAL: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The dq of one tile of M queries of one head."""
    head = tl.program_id(1).to(tl.int64)
    kv_head = (head // heads) * (heads // group) + (head % heads) // group
    row = tl.program_id(0) * M + tl.arange(0, M)
    here = row < q_len
    d = tl.arange(0, D)
    at = (head * q_len + row)[:, None] * D + d[None, :]
    q = tl.load(q_ptr + at, mask=here[:, None], other=0.0)
    dout = tl.load(dout_ptr + at, mask=here[:, None], other=0.0).to(q.dtype)
    delta = tl.load(delta_ptr + head * q_len + row, mask=here, other=0.0)
    lse = tl.load(lse_ptr + head * q_len + row, mask=here, other=0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse) * _LOG2E
    q_pos = tl.load(q_pos_ptr + row, mask=here, other=0)
    q_doc = tl.load(q_doc_ptr + row, mask=here, other=0)
    dq = tl.zeros([M, D], tl.float32)
    first = tl.load(span_ptr + tl.program_id(0) * 2) // N * N
    last = tl.load(span_ptr + tl.program_id(0) * 2 + 1)
    for start in range(first, last, N):
        col = start + tl.arange(0, N)
        there = col < k_len
        k_pos = tl.load(k_pos_ptr + col, mask=there, other=0)
        k_doc = tl.load(k_doc_ptr + col, mask=there, other=0)
        mask = here[:, None] & there[None, :] & (q_doc[:, None] == k_doc[None, :])
        if CAUSAL:
            mask = mask & (q_pos[:, None] >= k_pos[None, :])
        kv_at = (kv_head * k_len + col)[:, None] * D + d[None, :]
        k = tl.load(k_ptr + kv_at, mask=there[:, None], other=0.0)
        v = tl.load(v_ptr + kv_at, mask=there[:, None], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * _LOG2E)
        p = tl.where(mask, tl.exp2(s - lse[:, None]), 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None]) * scale
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    tl.store(dq_ptr + at, dq, mask=here[:, None])


@triton.jit
def dkv_kernel(
    dout_ptr, delta_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, dk_ptr, dv_ptr, q_pos_ptr, k_pos_ptr, q_doc_ptr, k_doc_ptr,
    span_ptr, heads, group, q_len, k_len, scale,
    CAUSAL: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The dk and dv of one tile of N keys of one key-value head, over the `group` query heads that share it."""
    kv_head = tl.program_id(1).to(tl.int64)
    kv_heads = heads // group
    col = tl.program_id(0) * N + tl.arange(0, N)
    there = col < k_len
    d = tl.arange(0, D)
    kv_at = (kv_head * k_len + col)[:, None] * D + d[None, :]
    k = tl.load(k_ptr + kv_at, mask=there[:, None], other=0.0)
    v = tl.load(v_ptr + kv_at, mask=there[:, None], other=0.0)
    k_pos = tl.load(k_pos_ptr + col, mask=there, other=0)
    k_doc = tl.load(k_doc_ptr + col, mask=there, other=0)
    dk = tl.zeros([N, D], tl.float32)
    dv = tl.zeros([N, D], tl.float32)
    first = tl.load(span_ptr + tl.program_id(0) * 2) // M * M
    last = tl.load(span_ptr + tl.program_id(0) * 2 + 1)
    for member in range(0, group):
        head = (kv_head // kv_heads) * heads + (kv_head % kv_heads) * group + member
        for start in range(first, last, M):
            row = start + tl.arange(0, M)
            here = row < q_len
            at = (head * q_len + row)[:, None] * D + d[None, :]
            q = tl.load(q_ptr + at, mask=here[:, None], other=0.0)
            dout = tl.load(dout_ptr + at, mask=here[:, None], other=0.0).to(q.dtype)
            delta = tl.load(delta_ptr + head * q_len + row, mask=here, other=0.0)
            lse = tl.load(lse_ptr + head * q_len + row, mask=here, other=0.0)
            lse = tl.where(lse == float("-inf"), 0.0, lse) * _LOG2E
            q_pos = tl.load(q_pos_ptr + row, mask=here, other=0)
            q_doc = tl.load(q_doc_ptr + row, mask=here, other=0)
            mask = here[None, :] & there[:, None] & (q_doc[None, :] == k_doc[:, None])
            if CAUSAL:
                mask = mask & (q_pos[None, :] >= k_pos[:, None])
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * _LOG2E)
            p = tl.where(mask, tl.exp2(s - lse[None, :]), 0.0)
            dv += tl.dot(p.to(dout.dtype), dout, input_precision="ieee")
            dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
            ds = p * (dp - delta[None, :]) * scale
            dk += tl.dot(ds.to(q.dtype), q, input_precision="ieee")
    tl.store(dk_ptr + kv_at, dk, mask=there[:, None])
    tl.store(dv_ptr + kv_at, dv, mask=there[:, None])


@triton.jit
def merge_kernel(a_ptr, lse_a_ptr, b_ptr, lse_b_ptr, out_ptr, lse_ptr, rows, dim, ROWS: tl.constexpr, D: tl.constexpr):
    """ROWS rows per program; a row that is empty on both sides stays empty."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    d = tl.arange(0, D)
    at = row.to(tl.int64)[:, None] * dim + d[None, :]
    inside = here[:, None] & (d < dim)[None, :]
    lse_a = tl.load(lse_a_ptr + row, mask=here, other=float("-inf"))
    lse_b = tl.load(lse_b_ptr + row, mask=here, other=float("-inf"))
    top = tl.maximum(lse_a, lse_b)
    safe = tl.where(top == float("-inf"), 0.0, top)
    weight_a = tl.exp(lse_a - safe)
    weight_b = tl.exp(lse_b - safe)
    total = weight_a + weight_b
    scale = 1.0 / tl.where(total == 0.0, 1.0, total)
    a = tl.load(a_ptr + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + at, mask=inside, other=0.0).to(tl.float32)
    out = a * (weight_a * scale)[:, None] + b * (weight_b * scale)[:, None]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)
    lse = tl.where(total == 0.0, float("-inf"), safe + tl.log(tl.where(total == 0.0, 1.0, total)))
    tl.store(lse_ptr + row, lse, mask=here)


def _spans(pos, doc, other_pos, other_doc, queries: bool, causal: bool, tile: int) -> torch.Tensor:
    length, tiles = pos.shape[0], triton.cdiv(pos.shape[0], tile)
    spans = torch.empty((max(tiles, 1), 2), dtype=torch.int32, device=pos.device)
    block = min(1024, triton.next_power_of_2(max(other_pos.shape[0], 1)))
    if tiles:
        span_kernel[(tiles,)](
            pos, doc, other_pos, other_doc, spans, length, other_pos.shape[0],
            QUERIES=queries, CAUSAL=causal, TILE=tile, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return spans


def _tiles(q: torch.Tensor) -> tuple[int, int, int, int]:
    """(queries, keys, warps, stages) per tile; small ones for float32 and for the interpreter's short tests."""
    dim = q.shape[-1]
    if dim & (dim - 1) or not 16 <= dim <= 256:
        raise ValueError(f"head dim {dim}; the Triton ring step takes 16, 32, 64, 128 or 256, choose 'torch'")
    if q.dtype == torch.float32 or dim > 128 or not q.is_cuda:
        return 32, 32, 4, 2
    return 128, 64, 8, 3 if dim == 64 else 2


def step(q, k, v, out, lse, q_pos, k_pos, q_doc, k_doc, scale, causal, pairs):
    """The op ring_step."""
    q, k, v, out, lse = (t.contiguous() for t in (q, k, v, out, lse))
    new_out, new_lse = like(out), like(lse)
    (batch, heads, q_len, dim), (kv_heads, k_len) = q.shape, k.shape[1:3]
    m, n, warps, stages = _tiles(q)
    spans = _spans(q_pos, q_doc, k_pos, k_doc, True, causal, m)
    if q.numel():
        step_kernel[(triton.cdiv(q_len, m), batch * heads)](
            q, k, v, out, lse, new_out, new_lse, q_pos, k_pos, q_doc, k_doc, spans,
            heads, heads // kv_heads, q_len, k_len, scale,
            CAUSAL=causal, M=m, N=n, D=dim, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return new_out, new_lse


def step_backward(dout, delta, q, k, v, lse, q_pos, k_pos, q_doc, k_doc, scale, causal, pairs):
    """The op ring_step_backward."""
    dout, delta, q, k, v, lse = (t.contiguous() for t in (dout, delta, q, k, v, lse))
    dq, dk, dv = (like(t, torch.float32) for t in (q, k, v))
    (batch, heads, q_len, dim), (kv_heads, k_len) = q.shape, k.shape[1:3]
    m, n, warps, _ = _tiles(q)
    m = min(m, 64)
    shapes = (heads, heads // kv_heads, q_len, k_len, scale)
    constants = dict(CAUSAL=causal, M=m, N=n, D=dim, num_warps=warps, num_stages=2)
    vectors = (q_pos, k_pos, q_doc, k_doc)
    if q.numel():
        spans = _spans(q_pos, q_doc, k_pos, k_doc, True, causal, m)
        grid = (triton.cdiv(q_len, m), batch * heads)
        dq_kernel[grid](dout, delta, q, k, v, lse, dq, *vectors, spans, *shapes, **constants)
    if k.numel():
        spans = _spans(k_pos, k_doc, q_pos, q_doc, False, causal, n)
        grid = (triton.cdiv(k_len, n), batch * kv_heads)
        dkv_kernel[grid](dout, delta, q, k, v, lse, dk, dv, *vectors, spans, *shapes, **constants)
    return dq, dk, dv


def merge(out_a, lse_a, out_b, lse_b):
    """The op merge_partials."""
    out_a, lse_a, out_b, lse_b = (t.contiguous() for t in (out_a, lse_a, out_b, lse_b))
    out, lse, dim = like(out_a), like(lse_a), out_a.shape[-1]
    rows, block = lse.numel(), triton.next_power_of_2(dim)
    tile = max(1, 4096 // block)
    if rows:
        merge_kernel[(triton.cdiv(rows, tile),)](
            out_a, lse_a, out_b, lse_b, out, lse, rows, dim, ROWS=tile, D=block, num_warps=8
        )
    return out, lse
