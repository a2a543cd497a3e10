"""Triton kernels of lstm.py: one program per head and tile of the batch walks through time, R stays on the chip."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from planner.kernels.op import like

BATCH = 16  # the least a matrix instruction takes


@triton.jit
def tanh(x):
    """Hyperbolic tangent by one sigmoid."""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def blocks(ptr, D: tl.constexpr):
    """The blocks of R of the four gates."""
    return tl.load(ptr), tl.load(ptr + D * D), tl.load(ptr + 2 * D * D), tl.load(ptr + 3 * D * D)


@triton.jit
def load_gates(ptr, here, D: tl.constexpr):
    """The four gates of a step, in float32."""
    i = tl.load(ptr, mask=here, other=0.0).to(tl.float32)
    f = tl.load(ptr + D, mask=here, other=0.0).to(tl.float32)
    z = tl.load(ptr + 2 * D, mask=here, other=0.0).to(tl.float32)
    o = tl.load(ptr + 3 * D, mask=here, other=0.0).to(tl.float32)
    return i, f, z, o


@triton.jit
def store_gates(ptr, here, D: tl.constexpr, i, f, z, o):
    """Store the four gates of a step."""
    tl.store(ptr, i.to(ptr.dtype.element_ty), mask=here)
    tl.store(ptr + D, f.to(ptr.dtype.element_ty), mask=here)
    tl.store(ptr + 2 * D, z.to(ptr.dtype.element_ty), mask=here)
    tl.store(ptr + 3 * D, o.to(ptr.dtype.element_ty), mask=here)


@triton.jit
def through(di, df, dz, do, r_i, r_f, r_z, r_o):
    """Gradient of the state before a step, through the four products."""
    dh = tl.dot(di, r_i, input_precision="ieee") + tl.dot(df, r_f, input_precision="ieee")
    return dh + tl.dot(dz, r_z, input_precision="ieee") + tl.dot(do, r_o, input_precision="ieee")


@triton.jit
def forward_lstm_kernel(
    x_ptr, r_ptr, h0_ptr, c0_ptr, hs_ptr, cs_ptr, gates_ptr, batch, time, heads, B: tl.constexpr, D: tl.constexpr
):
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
    for t in range(0, time):
        at = ((row.to(tl.int64) * time + t) * heads + head)[:, None] * D
        gate = at * 4 + d[None, :]
        i, f, z, o = load_gates(x_ptr + gate, here, D)
        i = tl.sigmoid(i + tl.dot(h, r_i, input_precision="ieee"))
        f = tl.sigmoid(f + tl.dot(h, r_f, input_precision="ieee"))
        z = tanh(z + tl.dot(h, r_z, input_precision="ieee"))
        o = tl.sigmoid(o + tl.dot(h, r_o, input_precision="ieee"))
        c = f * c + i * z
        h = (o * tanh(c)).to(r_i.dtype)
        tl.store(hs_ptr + at + d[None, :], h.to(hs_ptr.dtype.element_ty), mask=here)
        tl.store(cs_ptr + at + d[None, :], c, mask=here)
        store_gates(gates_ptr + gate, here, D, i, f, z, o)


@triton.jit
def backward_lstm_kernel(
    dhs_ptr, dcs_ptr, gates_ptr, cs_ptr, c0_ptr, r_ptr, dx_ptr, dh0_ptr, dc0_ptr, batch, time, heads,
    B: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Gradients of the pre-activations of one step from dh and dc in registers, last step first."""
    head = tl.program_id(1)
    row = tl.program_id(0) * B + tl.arange(0, B)
    d = tl.arange(0, D)
    here = (row < batch)[:, None]
    turned_square = head * 4 * D * D + d[None, :] * D + d[:, None]
    r_i, r_f, r_z, r_o = blocks(r_ptr + turned_square, D)
    start = (row * heads + head)[:, None] * D + d[None, :]
    dh = tl.zeros([B, D], tl.float32)
    dc = tl.zeros([B, D], tl.float32)
    for back in range(0, time):
        t = time - 1 - back
        at = ((row.to(tl.int64) * time + t) * heads + head)[:, None] * D
        gate = at * 4 + d[None, :]
        i, f, z, o = load_gates(gates_ptr + gate, here, D)
        turned = tanh(tl.load(cs_ptr + at + d[None, :], mask=here, other=0.0))
        earlier = tl.load(cs_ptr + at - heads * D + d[None, :], mask=here & (t > 0), other=0.0)
        before = earlier + tl.load(c0_ptr + start, mask=here & (t == 0), other=0.0).to(tl.float32)
        dh += tl.load(dhs_ptr + at + d[None, :], mask=here, other=0.0).to(tl.float32)
        dc += tl.load(dcs_ptr + at + d[None, :], mask=here, other=0.0) + dh * o * (1.0 - turned * turned)
        di = (dc * z * i * (1.0 - i)).to(r_i.dtype)
        df = (dc * before * f * (1.0 - f)).to(r_i.dtype)
        dz = (dc * i * (1.0 - z * z)).to(r_i.dtype)
        do = (dh * turned * o * (1.0 - o)).to(r_i.dtype)
        store_gates(dx_ptr + gate, here, D, di, df, dz, do)
        dc = dc * f
        dh = through(di, df, dz, do, r_i, r_f, r_z, r_o)
    tl.store(dh0_ptr + start, dh, mask=here)
    tl.store(dc0_ptr + start, dc, mask=here)


def check_dim(dim: int) -> None:
    """ValueError for heads whose R does not fit on the chip or whose size no matrix instruction takes."""
    if dim & (dim - 1) or not 16 <= dim <= 64:
        raise ValueError(f"heads of {dim} units; the Triton LSTM takes 16, 32 or 64, choose 'torch'")


def lstm(x, r, h0, c0):
    """The op lstm."""
    x, r, h0, c0 = (t.contiguous() for t in (x, r.to(x.dtype), h0, c0))
    batch, time, heads, _, dim = x.shape
    check_dim(dim)
    hs, cs = (torch.empty((batch, time, heads, dim), dtype=t, device=x.device) for t in (x.dtype, torch.float32))
    gates = like(x)
    if x.numel():
        forward_lstm_kernel[(triton.cdiv(batch, BATCH), heads)](
            x, r, h0, c0, hs, cs, gates, batch, time, heads, B=BATCH, D=dim, num_warps=4
        )
    return hs, cs, gates


def lstm_backward(dhs, dcs, gates, cs, c0, r):
    """The op lstm_backward."""
    dhs, dcs, gates, cs, c0, r = (t.contiguous() for t in (dhs, dcs, gates, cs, c0, r.to(gates.dtype)))
    batch, time, heads, _, dim = gates.shape
    check_dim(dim)
    dx, dh0, dc0 = like(gates), *(torch.zeros_like(c0, dtype=torch.float32) for _ in range(2))
    if gates.numel():
        backward_lstm_kernel[(triton.cdiv(batch, BATCH), heads)](
            dhs, dcs, gates, cs, c0, r, dx, dh0, dc0, batch, time, heads, B=BATCH, D=dim, num_warps=4
        )
    return dx, dh0, dc0
