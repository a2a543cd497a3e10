"""Run by test_two_ranks.py: kernels over two gloo ranks. Prints nothing if everything holds."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor, init_device_mesh

from planner.kernels import exchange, gla, loss, lstm, norm, pointwise, ring, slstm
from planner.kernels.counters import WorkCounter
from planner.kernels.op import OPS

RANKS = 2


def cross_entropy(rank: int, group: Any) -> None:
    """Uneven vocabulary parts: loss and gradients as torch's, one collective of 12 bytes a row, none in backward."""
    torch.manual_seed(0)
    x, w, target = torch.randn(10, 6), torch.randn(15, 6), torch.randint(0, 15, (10,))
    target[4] = loss.IGNORE_INDEX
    x_ref, w_ref = x.clone().requires_grad_(), w.clone().requires_grad_()
    logits_ref = x_ref @ w_ref.t()
    logits_ref.retain_grad()
    want = F.cross_entropy(logits_ref, target, reduction="none")
    want.sum().backward()
    start, part = 7 * rank, slice(0, 7) if rank == 0 else slice(7, 15)
    logits = logits_ref.detach()[:, part].clone().requires_grad_()
    with WorkCounter() as counted:
        got = loss.cross_entropy(logits, target, vocab_start=start, group=group)
        got.sum().backward()
    torch.testing.assert_close(got, want.detach())
    torch.testing.assert_close(logits.grad, logits_ref.grad[:, part])
    assert (counted.collectives, counted.sent_bytes) == (1, 12 * 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's own
        compiled = torch.compile(loss.cross_entropy, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(logits, target, vocab_start=start, group=group), got)
    x_ours, w_ours = x.clone().requires_grad_(), w[part].clone().requires_grad_()
    with WorkCounter() as counted:
        total = loss.linear_cross_entropy(x_ours, w_ours, target, chunk_rows=4, vocab_start=start, group=group)
        total.backward()
    assert counted.collectives == 3  # one a chunk
    dist.all_reduce(x_ours.grad)  # this rank's part of a sum
    torch.testing.assert_close(total, want.detach().sum())
    torch.testing.assert_close(x_ours.grad, x_ref.grad)
    torch.testing.assert_close(w_ours.grad, w_ref.grad[part])


def linear_attention(rank: int, group: Any) -> None:
    """Two parts of a sequence equal the whole, forward and backward, with one all-gather each way."""
    torch.manual_seed(1)
    parts = [torch.randn(1, 40, 2, 4) for _ in range(3)] + [-torch.rand(1, 40, 2, 4)]
    whole = [x.clone().requires_grad_() for x in parts]
    out, _ = gla.gated_linear_attention(*whole)
    grad = torch.randn_like(out)
    out.backward(grad)
    mine = slice(20 * rank, 20 * rank + 20)
    local = [x[:, mine].clone().requires_grad_() for x in parts]
    with WorkCounter() as counted:
        got, _ = gla.gated_linear_attention(*local, group=group)
        got.backward(grad[:, mine])
    assert counted.collectives == 2
    torch.testing.assert_close(got, out.detach()[:, mine])
    for a, b in zip(local, whole, strict=True):
        torch.testing.assert_close(a.grad, b.grad[:, mine], atol=1e-5, rtol=1e-4)


REPLICATED_ONLY = {"quantize_blocks", "dequantize_sum"}  # a flat tensor in blocks: no dim to split along
tested: set[str] = set()


def sharded(mesh: Any, op: Any, args: list[Any], placements: list[Any], expected: list[Any]) -> None:
    """`op` on DTensors: what it puts out or writes to is placed as expected without a collective, and as of wholes."""
    tested.add(op._name)
    spread = [
        distribute_tensor(a, mesh, [p]) if isinstance(a, torch.Tensor) else a
        for a, p in zip(args, placements, strict=True)
    ]
    want = op(*args)
    with WorkCounter() as counted:
        got = op(*spread)
    assert counted.collectives == 0, op
    got, want = (spread[0], args[0]) if want is None else (got, want)
    got, want = ((x,) if isinstance(x, torch.Tensor) else x for x in (got, want))
    for g, w, e in zip(got, want, expected, strict=True):
        assert g.placements == (e,), (op, g.placements, e)
        with WorkCounter() as counted:
            whole = g.full_tensor()
        assert counted.collectives == (0 if g.placements == (Replicate(),) else 1)
        torch.testing.assert_close(whole, w)


def dtensors(mesh: Any) -> None:
    """Every op's sharding rule."""
    torch.manual_seed(2)
    s, r, none = Shard, Replicate(), None
    x, h = torch.randn(4, 6, 8), torch.randn(4, 6, 8)
    w, rstd = torch.randn(8), torch.rand(4, 6)
    sharded(mesh, norm.rms_norm_op, [x, w, 1e-6], [s(1), r, none], [s(1), s(1)])
    sharded(mesh, norm.add_rms_norm_op, [x, h, w, 1e-6], [s(0), s(0), r, none], [s(0)] * 3)
    sharded(mesh, norm.rms_norm_backward, [x, h, h, w, rstd], [s(1)] * 3 + [r, s(1)], [s(1), Partial("sum")])
    sharded(mesh, norm.rms_norm_backward, [x, None, h, w, rstd], [s(1), none, s(1), r, s(1)], [s(1), Partial("sum")])
    sharded(mesh, pointwise.swiglu, [x, h], [s(2), s(2)], [s(2)])
    sharded(mesh, pointwise.swiglu_backward, [x, h, h], [s(2)] * 3, [s(2)] * 2)
    heads, cos = torch.randn(2, 6, 4, 8), torch.randn(6, 4)
    sharded(mesh, pointwise.rope_op, [heads, cos, cos, False], [s(2), r, r, none], [s(2)])
    sharded(mesh, pointwise.rope_op, [heads, cos, cos, False], [s(1), s(0), s(0), none], [s(1)])
    logits, target, lse, ones = torch.randn(6, 9), torch.randint(0, 9, (6,)), torch.randn(6), torch.ones(6)
    sharded(mesh, loss.ce_stats, [logits, target, 0], [s(0), s(0), none], [s(0)])
    sharded(mesh, loss.ce_grad, [logits, target, lse, ones, 0], [s(0)] * 4 + [none], [s(0)])
    sharded(mesh, loss.ce_grad_, [logits.clone(), target, lse, ones, 0], [s(0)] * 4 + [none], [s(0)])
    stats = torch.stack([logits.amax(1), torch.rand(6) + 1, logits[:, 0]], 1)
    sharded(mesh, loss.ce_combine, [stats[None], target, -100], [s(1), s(0), none], [s(0)] * 3)
    attention(mesh, heads)
    packed = torch.randn(2, 2, 3, 2, 8)
    sharded(mesh, exchange.pack_heads, [heads, 2], [s(0), none], [s(1)])
    sharded(mesh, exchange.unpack_sequence, [packed], [s(4)], [s(3)])
    sharded(mesh, exchange.pack_sequence, [heads, 2], [s(3), none], [s(4)])
    sharded(mesh, exchange.unpack_heads, [packed], [s(1)], [s(0)])
    chosen = torch.tensor([[0, 1], [2, 0], [1, 2]])
    tokens = torch.randn(3, 8)
    sharded(mesh, exchange.moe_permute_op, [tokens, chosen, 3], [s(1), r, none], [s(1), r, r])
    y, order, _ = exchange.moe_permute(tokens, chosen, 3)
    weights = torch.rand(3, 2)
    sharded(mesh, exchange.moe_unpermute, [y, order, weights], [s(1), r, r], [s(1)])
    ins = [s(1), s(1), r, r]
    sharded(mesh, exchange.moe_unpermute_backward, [tokens, y, order, weights], ins, [s(1), Partial("sum")])
    assert tested == OPS.keys() - REPLICATED_ONLY, OPS.keys() ^ tested


def attention(mesh: Any, x: torch.Tensor) -> None:
    s, r = Shard, Replicate()
    q, lse = x.transpose(1, 2).contiguous(), torch.randn(2, 4, 6)
    place, docs = torch.arange(6, dtype=torch.int32), torch.zeros(6, dtype=torch.int32)
    rest, rest_places = [place, place, docs, docs, 0.5, True, 21], [r, r, r, r, None, None, None]
    sharded(mesh, ring.ring_step, [q, q, q, q, lse, *rest], [s(1)] * 5 + rest_places, [s(1)] * 2)
    sharded(mesh, ring.ring_step_backward, [q, lse, q, q, q, lse, *rest], [s(0)] * 6 + rest_places, [s(0)] * 3)
    sharded(mesh, ring.merge_partials, [q, lse, q * 2, lse + 1], [s(1)] * 4, [s(1)] * 2)
    sharded(mesh, ring.merge_partials_backward, [q, lse] * 4, [s(1)] * 8, [s(1)] * 4)
    h0, x4, recurrent = torch.randn(2, 4, 8), torch.randn(2, 6, 4, 4, 8), torch.randn(4, 4, 8, 8)
    sharded(mesh, lstm.lstm_op, [x4, recurrent, h0, h0], [s(2), s(0), s(1), s(1)], [s(2)] * 3)
    ins = [s(0)] * 5 + [r]
    sharded(mesh, lstm.lstm_backward, [x, x, x4.sigmoid(), x, h0, recurrent], ins, [s(0)] * 3)
    start, kept = [h0, h0, h0.abs() + 1, h0], torch.rand(2, 6, 4, slstm.KEPT, 8)
    places = [*[s(2)] * 3, s(1), s(2)]
    sharded(mesh, slstm.slstm_op, [x4, recurrent, *start], [s(2), s(0), *[s(1)] * 4], places)
    given = [x, h0, h0, kept, x, x.abs() + 1, h0, h0.abs() + 1, recurrent]
    ins = [s(2), s(1), s(1), *[s(2)] * 3, s(1), s(1), s(0)]
    sharded(mesh, slstm.slstm_backward, given, ins, [s(2), *[s(1)] * 3])
    state, gates = torch.randn(2, 4, 8, 8), -x.abs()
    sharded(mesh, gla.gla_op, [x, x, x, gates, state, 1.0], [s(2)] * 4 + [s(1), None], [s(2), s(1)])
    ins = [s(2), s(1), s(2), s(2), s(2), s(2), s(1), None]
    sharded(mesh, gla.gla_backward, [x, state, x, x, x, gates, state, 1.0], ins, [s(2)] * 4 + [s(1)])


def main(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    cross_entropy(rank, dist.group.WORLD)
    linear_attention(rank, dist.group.WORLD)
    dtensors(init_device_mesh("cpu", (RANKS,)))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    pid = os.fork()  # torch is imported once
    main(int(pid == 0), str(folder / "store"))
    if pid:
        _, status = os.waitpid(pid, 0)
        sys.exit(os.waitstatus_to_exitcode(status))
