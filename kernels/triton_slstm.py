"""Triton kernels of slstm.py: one program per head and tile of the batch walks through time, R stays on the chip."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from planner.kernels.triton_lstm import BATCH, blocks, check_dim, load_gates, store_gates, tanh, through

_KEPT = tl.constexpr(5)


@triton.jit
def forward_slstm_kernel(
    x_ptr, r_ptr, h0_ptr, c0_ptr, n0_ptr, m0_ptr, hs_ptr, cs_ptr, ns_ptr, m_ptr, gates_ptr, batch, time, heads,
    B: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Gates of one step from the state in registers; each R block is loaded once."""
    head = tl.program_id(1)
    row = tl.program_id(0) * B + tl.arange(0, B)
    d = tl.arange(0, D)
    here = (row < batch)[:, None]
    square = head * 4 * D * D + d[:, None] * D + d[None, :]
    r_i, r_f, r_z, r_o = blocks(r_ptr + square, D)
    start = (row * heads + head)[:, None] * D + d[None, :]
    h = tl.load(h0_ptr + start, mask=here, other=0.0).to(r_i.dtype)
    c = tl.load(c0_ptr + start, mask=here, other=0.0).to(tl.float32)
    n = tl.load(n0_ptr + start, mask=here, other=0.0).to(tl.float32)
    m = tl.load(m0_ptr + start, mask=here, other=0.0).to(tl.float32)
    for t in range(0, time):
        at = ((row.to(tl.int64) * time + t) * heads + head)[:, None] * D
        gate = at * 4 + d[None, :]
        i, f, z, o = load_gates(x_ptr + gate, here, D)
        i += tl.dot(h, r_i, input_precision="ieee")
        f += tl.dot(h, r_f, input_precision="ieee")
        z = tanh(z + tl.dot(h, r_z, input_precision="ieee"))
        o = tl.sigmoid(o + tl.dot(h, r_o, input_precision="ieee"))
        # log sigmoid(f) without overflow
        decayed = tl.minimum(f, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(f))) + m
        m = tl.maximum(decayed, i)
        i = tl.exp(i - m)
        keep = tl.exp(decayed - m)
        c = keep * c + i * z
        n = keep * n + i
        h = (o * c / n).to(r_i.dtype)
        tl.store(hs_ptr + at + d[None, :], h.to(hs_ptr.dtype.element_ty), mask=here)
        tl.store(cs_ptr + at + d[None, :], c, mask=here)
        tl.store(ns_ptr + at + d[None, :], n, mask=here)
        kept = at * _KEPT + d[None, :]
        store_gates(gates_ptr + kept, here, D, i, keep, z, o)
        tl.store(gates_ptr + kept + 4 * D, tl.sigmoid(-f).to(gates_ptr.dtype.element_ty), mask=here)
    tl.store(m_ptr + start, m, mask=here)


@triton.jit
def backward_slstm_kernel(
    dhs_ptr, dc_ptr, dn_ptr, gates_ptr, cs_ptr, ns_ptr, c0_ptr, n0_ptr, r_ptr, dx_ptr, dh0_ptr, dc0_ptr, dn0_ptr,
    batch, time, heads, B: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Gradients of the pre-activations of one step from dh, dc and dn in registers, last step first."""
    head = tl.program_id(1)
    row = tl.program_id(0) * B + tl.arange(0, B)
    d = tl.arange(0, D)
    here = (row < batch)[:, None]
    turned_square = head * 4 * D * D + d[None, :] * D + d[:, None]
    r_i, r_f, r_z, r_o = blocks(r_ptr + turned_square, D)
    start = (row * heads + head)[:, None] * D + d[None, :]
    dh = tl.zeros([B, D], tl.float32)
    dc = tl.load(dc_ptr + start, mask=here, other=0.0).to(tl.float32)
    dn = tl.load(dn_ptr + start, mask=here, other=0.0).to(tl.float32)
    for back in range(0, time):
        t = time - 1 - back
        at = ((row.to(tl.int64) * time + t) * heads + head)[:, None] * D
        kept = at * _KEPT + d[None, :]
        i, f, z, o = load_gates(gates_ptr + kept, here, D)
        rest = tl.load(gates_ptr + kept + 4 * D, mask=here, other=0.0).to(tl.float32)
        now = at + d[None, :]
        c = tl.load(cs_ptr + now, mask=here, other=0.0)
        n = tl.load(ns_ptr + now, mask=here, other=1.0)
        earlier = here & (t > 0)
        first = here & (t == 0)
        before = tl.load(cs_ptr + now - heads * D, mask=earlier, other=0.0)
        before += tl.load(c0_ptr + start, mask=first, other=0.0).to(tl.float32)
        norm = tl.load(ns_ptr + now - heads * D, mask=earlier, other=0.0)
        norm += tl.load(n0_ptr + start, mask=first, other=0.0).to(tl.float32)
        dh += tl.load(dhs_ptr + now, mask=here, other=0.0).to(tl.float32)
        ratio = c / n
        dc += dh * o / n
        dn -= dh * o * ratio / n
        di = ((dc * z + dn) * i).to(r_i.dtype)
        df = ((dc * before + dn * norm) * f * rest).to(r_i.dtype)
        dz = (dc * i * (1.0 - z * z)).to(r_i.dtype)
        do = (dh * ratio * o * (1.0 - o)).to(r_i.dtype)
        gate = at * 4 + d[None, :]
        store_gates(dx_ptr + gate, here, D, di, df, dz, do)
        dc = dc * f
        dn = dn * f
        dh = through(di, df, dz, do, r_i, r_f, r_z, r_o)
    tl.store(dh0_ptr + start, dh, mask=here)
    tl.store(dc0_ptr + start, dc, mask=here)
    tl.store(dn0_ptr + start, dn, mask=here)


def slstm(x, r, h0, c0, n0, m0):
    """The op slstm."""
    x, r, h0, c0, n0, m0 = (t.contiguous() for t in (x, r.to(x.dtype), h0, c0, n0, m0))
    batch, time, heads, _, dim = x.shape
    check_dim(dim)
    shape = (batch, time, heads, dim)
    hs, cs, ns = (torch.empty(shape, dtype=t, device=x.device) for t in (x.dtype, torch.float32, torch.float32))
    m = m0.to(torch.float32, copy=True)
    gates = x.new_empty((batch, time, heads, 5, dim))
    if x.numel():
        forward_slstm_kernel[(triton.cdiv(batch, BATCH), heads)](
            x, r, h0, c0, n0, m0, hs, cs, ns, m, gates, batch, time, heads, B=BATCH, D=dim, num_warps=4
        )
    return hs, cs, ns, m, gates


def slstm_backward(dhs, dc, dn, gates, cs, ns, c0, n0, r):
    """The op slstm_backward."""
    given = (dhs, dc, dn, gates, cs, ns, c0, n0, r.to(gates.dtype))
    dhs, dc, dn, gates, cs, ns, c0, n0, r = (t.contiguous() for t in given)
    batch, time, heads, _, dim = gates.shape
    check_dim(dim)
    dx = gates.new_empty((batch, time, heads, 4, dim))
    dh0, dc0, dn0 = (torch.zeros_like(c0, dtype=torch.float32) for _ in range(3))
    if gates.numel():
        backward_slstm_kernel[(triton.cdiv(batch, BATCH), heads)](
            dhs, dc, dn, gates, cs, ns, c0, n0, r, dx, dh0, dc0, dn0, batch, time, heads, B=BATCH, D=dim, num_warps=4
        )
    return dx, dh0, dc0, dn0
