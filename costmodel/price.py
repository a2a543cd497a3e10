"""Price one layer class under many parallel layouts at once.

Every function broadcasts over `Keys`, arrays of equal shape (K,). Times are for ONE micro-batch on ONE rank.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.costmodel import compute, layer_comm
from planner.costmodel.facts import KernelCalls, LayerFacts, LayoutBytes, Traffic
from planner.costmodel.graph import Op, OpKind, TpCut
from planner.costmodel.kernel_choice import RING_SCORE_BYTES, kernel_s
from planner.costmodel.kernels import BACKWARD_TRAFFIC, CHUNK_KERNELS, CHUNK_ROWS, PRODUCT_BYTES, weight_sum_bytes
from planner.costmodel.keys import Array, Keys, Machine

HOST_NORM = 4.0
# What a GEMM takes in a training step over the same GEMM alone in a benchmark: clocks under a power limit that other
# kernels use up too, cold caches, transposed operands in backward (MODELLED; fitted by reports/calibrate_engines.py).
# 8-bit GEMMs need no more: their benchmark includes a whole quantisation that training shares between GEMMs.
IN_STEP_GEMM = 1.14


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPrice:
    """Seconds and bytes of one layer on one rank for one micro-batch, arrays (K,).

    `*_f` forward, `*_b` backward with respect to inputs, `*_w` with respect to weights; communication is
    the exposed part. `launch_*`: what the host needs beyond the device. `saved` and `redo`: activation bytes
    kept and time redone in backward under recompute none, selective, full. `loss_bytes`: the part of `saved` that
    is log-probabilities or logits (with the chunked loss the head's gradient), and `loss_work_bytes` what the peak of
    the loss's backward needs beside it.
    """

    gemm_f: Array
    gemm_b: Array
    gemm_w: Array
    accumulate_w: Array
    attention_f: Array
    attention_b: Array
    memory_f: Array
    memory_b: Array
    launch_f: Array
    launch_b: Array
    tp_f: Array
    tp_b: Array
    cp_f: Array
    cp_b: Array
    ep_f: Array
    ep_b: Array
    saved: tuple[Array, Array, Array]
    redo: tuple[Array, Array, Array]
    loss_bytes: Array
    loss_work_bytes: Array
    boundary_bytes: Array
    dense_params: Array
    routed_params: Array
    frozen_params: Array

    @property
    def forward_s(self) -> Array:
        """Forward of one micro-batch."""
        parts = self.gemm_f + self.attention_f + self.memory_f + self.launch_f
        return parts + self.tp_f + self.cp_f + self.ep_f

    @property
    def backward_input_s(self) -> Array:
        """Backward with respect to inputs, without recomputation."""
        parts = self.gemm_b + self.attention_b + self.memory_b + self.launch_b
        return parts + self.tp_b + self.cp_b + self.ep_b

    @property
    def weight_s(self) -> Array:
        """Backward with respect to weights."""
        return self.gemm_w + self.accumulate_w

    def take(self, index: NDArray[np.int64]) -> LayerPrice:
        """The price at `index` of the key arrays."""
        values: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            values[item.name] = tuple(v[index] for v in value) if isinstance(value, tuple) else value[index]
        return LayerPrice(**values)


def host_bound_s(busy_s: Array, host_s: Array, blocking: bool) -> Array:
    """Seconds that a device waits for a host that needs `host_s` to issue what takes it `busy_s`.

    Short and long kernels alternate, so neither hides the other fully: the p-norm of both, less `busy_s`, p = 4
    (MODELLED; its test is the single-node rows of vTrain, between launch-bound and compute-bound). All of `host_s`
    when launches are `blocking`.
    """
    if blocking:
        return host_s
    both: Array = (busy_s**HOST_NORM + host_s**HOST_NORM) ** (1 / HOST_NORM)
    return both - busy_s


def price_layer(facts: LayerFacts, keys: Keys, machine: Machine) -> LayerPrice:
    """Time, activation bytes and parameters of a layer for every key."""
    gemm_f, gemm_b, gemm_w = _matmuls(facts, keys, machine)
    attention_f, attention_b = _attention(facts, keys, machine)
    memory_f = _traffic(facts.traffic, keys, machine) + _dropout(facts, keys, machine)
    memory_b = BACKWARD_TRAFFIC * memory_f + _kernels(facts.kernels, keys, machine, backward=True)
    memory_f = memory_f + _kernels(facts.kernels, keys, machine)
    sums_s, chunk_launches = _chunk_sums(facts, keys, machine)
    memory_f = memory_f + sums_s
    tp_f, tp_b = layer_comm.tensor_parallel_s(facts, keys, machine, gemm_f, gemm_b + gemm_w)
    cp_f, cp_b = layer_comm.context_parallel_s(facts, keys, machine, attention_f, attention_b)
    ep_f = layer_comm.expert_parallel_s(facts, keys, machine, gemm_f)
    dense, routed, frozen = _params(facts, keys)
    accumulated = (dense + routed) * machine.engine.accumulate_bytes
    accumulate_w = compute.memory_bound_s(machine.cluster.device, accumulated, 0)
    floor = facts.launches * machine.engine.host_launch_s + layer_comm.host_collectives_s(facts, keys, machine)
    cut_f, cut_b = layer_comm.host_cut_s(facts, keys, machine)
    cut_f = cut_f + chunk_launches * machine.engine.host_launch_s
    blocking = machine.engine.blocking_launches
    launch_f = host_bound_s(gemm_f + attention_f + memory_f + tp_f + cp_f + ep_f, floor + cut_f, blocking)
    busy_b = gemm_b + gemm_w + attention_b + memory_b + accumulate_w + tp_b + cp_b + ep_f
    launch_b = host_bound_s(busy_b, 2 * floor + cut_b, blocking)
    zero = np.zeros_like(keys.tp)
    selective = _traffic(facts.selective_traffic, keys, machine) + _kernels(facts.selective_kernels, keys, machine)
    if facts.selective_attention:
        selective = selective + attention_f
    if machine.engine.selective_gathers_again:
        gathers = sum((layer_comm.gather_s(num_bytes, keys, machine) for num_bytes in facts.gathered_bytes), start=zero)
        selective = selective + (1 - machine.engine.overlap_tp) * gathers
    full = gemm_f + attention_f + memory_f + launch_f + tp_f + cp_f + ep_f - _not_redone(facts, keys, machine)
    saved, loss_bytes, loss_work_bytes = _loss_memory(facts, keys, machine)
    return LayerPrice(
        gemm_f=gemm_f, gemm_b=gemm_b, gemm_w=gemm_w, accumulate_w=accumulate_w,
        attention_f=attention_f, attention_b=attention_b, memory_f=memory_f, memory_b=memory_b,
        launch_f=launch_f, launch_b=launch_b, tp_f=tp_f, tp_b=tp_b, cp_f=cp_f, cp_b=cp_b, ep_f=ep_f, ep_b=ep_f,
        saved=saved, redo=(zero, selective, full), loss_bytes=loss_bytes, loss_work_bytes=loss_work_bytes,
        boundary_bytes=facts.layer.input_bytes * keys.tokens / (keys.tp if machine.engine.p2p_scatter else keys.outer),
        dense_params=dense, routed_params=routed, frozen_params=frozen,
    )  # fmt: skip


def _not_redone(facts: LayerFacts, keys: Keys, machine: Machine) -> Array:
    """Seconds of forward that full recomputation leaves out: the layer's last GEMM and the sum of its partial results.

    0 for engines that redo the whole layer (`recompute_stops_early`).
    """
    seconds = np.zeros_like(keys.tp)
    if not machine.engine.recompute_stops_early:
        return seconds
    if facts.last_gemm is not None:
        dtype, slower = _gemm_dtype(facts.last_gemm, machine)
        seconds = slower * compute.gemm_s(machine.cluster.device, dtype, *rank_gemm(facts.last_gemm, keys))
    if facts.last_sum_bytes:
        seconds = seconds + (1 - machine.engine.overlap_tp) * layer_comm.reduce_s(facts.last_sum_bytes, keys, machine)
    return seconds


def _matmuls(facts: LayerFacts, keys: Keys, machine: Machine) -> tuple[Array, Array, Array]:
    device = machine.cluster.device
    totals = [np.zeros_like(keys.tp) for _ in range(3)]
    for op in facts.matmuls:
        batch, m, n, k = rank_gemm(op, keys)
        dtype, slower = _gemm_dtype(op, machine)
        totals[0] = totals[0] + slower * compute.gemm_s(device, dtype, batch, m, n, k)
        if op.backward_flops == 0:
            continue
        dgrad = slower * compute.gemm_s(device, dtype, batch, m, k, n)
        wgrad = slower * compute.gemm_s(device, dtype, batch, k, n, m)
        if op is facts.head:  # the chunked loss makes the gradients with the logits
            early = keys.chunked_loss > 0
            totals[0] = totals[0] + np.where(early, dgrad + wgrad, 0.0)
            dgrad, wgrad = np.where(early, 0.0, dgrad), np.where(early, 0.0, wgrad)
        if op.kind is OpKind.BMM:
            totals[1] = totals[1] + dgrad + wgrad
            continue
        if op.backward_flops >= 2 * op.flops:
            totals[1] = totals[1] + dgrad
        totals[2] = totals[2] + wgrad
    return totals[0], totals[1], totals[2]


def _gemm_dtype(op: Op, machine: Machine) -> tuple[str, float]:
    """(dtype, slow-down in a step) of a matmul.

    8-bit recipes keep the head, the router and products of activations in 16 bits (NVIDIA Transformer Engine).
    """
    if machine.dtype != "float8":
        return machine.dtype, IN_STEP_GEMM
    narrow = op.kind is OpKind.GEMM and op.cut in (TpCut.COLUMN, TpCut.ROW)
    return ("float8", 1.0) if narrow else ("bfloat16", IN_STEP_GEMM)


def rank_gemm(op: Op, keys: Keys) -> tuple[Array, Array, Array, Array]:
    """(batch, m, n, k) of one rank: tokens in m, TP in n (column, vocab), k (row) or the batch (heads)."""
    assert op.gemm is not None
    one = np.ones_like(keys.tp)
    batch, n, k = op.gemm.batch * one, op.gemm.n * one, op.gemm.k * one
    m = op.gemm.m * keys.tokens
    if op.routed:
        batch, m = batch / keys.ep, m * keys.ep
    if op.cut in (TpCut.COLUMN, TpCut.VOCAB):
        n = n / keys.cut(op.cut)
    elif op.cut is TpCut.ROW:
        k = k / keys.tp
    elif op.cut is TpCut.OUTER:
        m = m / keys.outer
    elif op.cut in (TpCut.HEAD, TpCut.INNER):
        batch, m = (batch / keys.tp, m) if op.gemm.batch > 1 else (batch, m / keys.tp)
    return batch, m, n, k


def _attention(facts: LayerFacts, keys: Keys, machine: Machine) -> tuple[Array, Array]:
    totals = [np.zeros_like(keys.tp) for _ in range(2)]
    for op in facts.attentions:
        a = op.attention
        assert a is not None
        cut = keys.cut(op.cut) * keys.ulysses
        share = keys.micro_batch_size / (cut * keys.ring)
        at_best = machine.engine.attention_flops_per_sm * machine.cluster.device.num_sms
        for i, backward in enumerate((False, True)):
            seconds = compute.attention_s(
                machine.cluster.device,
                machine.dtype,
                batch=a.batch * keys.micro_batch_size,
                q_heads=a.q_heads / cut,
                kv_heads=np.maximum(a.kv_heads / cut, 1.0),
                q_len=a.q_len / keys.ring,
                kv_len=a.kv_len * np.ones_like(keys.tp),
                head_dim_qk=a.head_dim_qk,
                head_dim_v=a.head_dim_v,
                causal_fraction=0.5 if a.causal else 1.0,
                implementation=machine.engine.attention,
                backward=backward,
            )
            flops = (op.backward_flops if backward else op.flops) * share
            totals[i] = totals[i] + np.maximum(seconds, flops / at_best) + _ring_scores(op, keys, machine, backward)
    return totals[0], totals[1]


def _ring_scores(op: Op, keys: Keys, machine: Machine, backward: bool) -> Array:
    """Seconds that torch's form of the ring step takes for its scores, where it is chosen over the kernel on a GPU.

    A CPU has no other form and its ring is priced as attention (reports/closed_loop.md judges that).
    """
    a, device = op.attention, machine.cluster.device
    chosen = machine.engine.kernels.get("ring_step_backward" if backward else "ring_step")
    if a is None or chosen != "torch" or device.name == "cpu":
        return np.zeros_like(keys.tp)
    rows = a.batch * keys.micro_batch_size * a.q_heads / (keys.cut(op.cut) * keys.ulysses) * a.q_len / keys.ring
    seconds = compute.memory_bound_s(device, RING_SCORE_BYTES[backward] * rows * a.kv_len, 0)
    return np.where(keys.ring > 1, seconds, 0.0)


def _traffic(traffic: tuple[Traffic, ...], keys: Keys, machine: Machine) -> Array:
    total = np.zeros_like(keys.tp)
    for part in traffic:
        num_bytes = part.num_bytes * keys.tokens / keys.cut(part.cut)
        total = total + compute.memory_bound_s(machine.cluster.device, num_bytes, part.num_kernels)
    return total


def _kernels(calls: tuple[KernelCalls, ...], keys: Keys, machine: Machine, backward: bool = False) -> Array:
    """Seconds of kernels of ours by the implementations chosen."""
    total = np.zeros_like(keys.tp)
    for part in calls:
        num_bytes = part.num_bytes * keys.tokens / keys.cut(part.cut)
        device = machine.cluster.device
        total = total + kernel_s(
            device, machine.dtype, part.kernel, part.choices, num_bytes, part.num_calls, backward=backward
        )
    return total


def _dropout(facts: LayerFacts, keys: Keys, machine: Machine) -> Array:
    """Dropout on the residual stream: a byte of mask per element, and one more pass unless it is fused."""
    passes = 0.0 if machine.engine.fuses_elementwise else 2.0
    num_bytes = facts.dropped_bytes * (passes + 1 / machine.dtype_bytes) * keys.tokens / keys.outer
    return compute.memory_bound_s(machine.cluster.device, num_bytes, 0)


def _saved(facts: LayerFacts, keys: Keys, machine: Machine) -> tuple[Array, Array, Array]:
    """Activation bytes kept for backward under recompute none, selective, full."""
    none, selective, full = (_layout_bytes(part, facts, keys, machine) for part in facts.saved)
    masks = facts.dropped_bytes / machine.dtype_bytes * keys.tokens / keys.outer
    none, selective = none + masks, selective + masks
    if machine.engine.attention == "unfused":
        # Korthikanti et al. 2022, section 4.1: softmax output, and with dropout its mask and output, of every score.
        per_score = 2 * machine.dtype_bytes + 1 if machine.engine.dropout else machine.dtype_bytes
        for op in facts.attentions:
            a = op.attention
            assert a is not None
            scores = a.batch * a.q_heads * a.q_len * a.kv_len * keys.micro_batch_size
            score_bytes = per_score * scores / (keys.cut(op.cut) * keys.cp)
            none = none + score_bytes
            if not facts.selective_attention:
                selective = selective + score_bytes
    return none, np.minimum(selective, none), np.minimum(full, none)


def _chunk_sums(facts: LayerFacts, keys: Keys, machine: Machine) -> tuple[Array, Array]:
    """(seconds, launches) that the chunked loss adds: sums of the head's gradient over chunks; 0 for the plain loss."""
    if facts.head is None or not keys.chunked_loss.any():
        return np.zeros_like(keys.tp), np.zeros_like(keys.tp)
    _, m, n, k = rank_gemm(facts.head, keys)
    chunks = np.ceil(m / CHUNK_ROWS)
    num_bytes = weight_sum_bytes(chunks, machine.dtype_bytes) * n * k
    products = np.ceil(machine.dtype_bytes * n * k / PRODUCT_BYTES) if machine.dtype_bytes < 4 else 1.0
    launches = (CHUNK_KERNELS + 2 * (products - 1)) * chunks
    seconds = compute.memory_bound_s(machine.cluster.device, num_bytes, launches)
    chunked = keys.chunked_loss > 0
    return np.where(chunked, seconds, 0.0), np.where(chunked, launches, 0.0)


def _loss_memory(facts: LayerFacts, keys: Keys, machine: Machine) -> tuple[tuple[Array, Array, Array], Array, Array]:
    """(`saved`, `loss_bytes`, `loss_work_bytes`) of LayerPrice.

    The chunked loss keeps the head's gradient instead of logits or log-probabilities (that of its input stands in the
    input's place). Beside it there are at its peak a chunk of logits, with the vocabulary cut two, the input, and the
    gradient once more: in float32 while it is summed (with a part of the last product in 16 bits, less what is kept in
    them) and converted, or scaled in backward.
    """
    saved = _saved(facts, keys, machine)
    loss, work = (x * keys.tokens / _logits_div(keys, machine) for x in (facts.loss_bytes, facts.loss_work_bytes))
    if facts.head is None or not keys.chunked_loss.any():
        return saved, loss, work
    _, m, n, k = rank_gemm(facts.head, keys)
    width, chunked = machine.dtype_bytes, keys.chunked_loss > 0
    kept = width * n * k
    logits = width * np.minimum(m, CHUNK_ROWS * np.where(keys.vocab_tp > 1, 2, 1)) * n
    summed = np.maximum(4 * n * k, 4 * n * k - kept + np.minimum(kept, PRODUCT_BYTES) + logits)
    beside = width * m * k + (summed if width < 4 else np.maximum(width * n * k, logits))
    none = np.where(chunked, saved[0] - _layout_bytes(facts.loss_saved, facts, keys, machine) + kept, saved[0])
    return (none, *saved[1:]), np.where(chunked, kept, loss), np.where(chunked, beside, work)


def _logits_div(keys: Keys, machine: Machine) -> Array:
    """Ranks that share a micro-batch's logits: by the vocabulary, or in our runtime by the sequence if that is cut."""
    return np.maximum(keys.vocab_tp, keys.outer) if machine.engine.gathers_copies else keys.vocab_tp


def _layout_bytes(part: LayoutBytes, facts: LayerFacts, keys: Keys, machine: Machine) -> Array:
    """Bytes of one rank. In an end of the model, what TP cuts is cut over the vocabulary."""
    inner = _logits_div(keys, machine) if any(op.cut is TpCut.VOCAB for op in facts.layer.ops) else keys.tp
    sharded_gather = (keys.sp > 0) & (not machine.engine.sp_saves_gathered)
    gathered = part.gathered_bytes / np.where(sharded_gather, keys.tp, 1.0)
    scaled = part.inner_bytes / inner + part.outer_bytes / keys.outer + gathered + part.replicated_bytes
    total: Array = scaled * keys.tokens + part.fixed_bytes
    return total


def _params(facts: LayerFacts, keys: Keys) -> tuple[Array, Array, Array]:
    """(dense trainable, routed trainable, frozen) parameters of one rank, before any ZeRO sharding."""
    sums = [np.zeros_like(keys.tp) for _ in range(3)]
    sharded = (TpCut.COLUMN, TpCut.ROW, TpCut.VOCAB, TpCut.HEAD)
    for group in facts.layer.params:
        count = group.num_params / (keys.cut(group.cut) if group.cut in sharded else 1.0)
        if group.routed:
            count = count / keys.ep
        which = 2 if not group.trainable else int(group.routed)
        sums[which] = sums[which] + count
    return sums[0], sums[1], sums[2]
