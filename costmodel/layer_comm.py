"""What a layer communicates in a micro-batch under TP, CP and EP: exposed seconds, arrays (K,), and their bytes."""

from __future__ import annotations

import numpy as np

from planner.costmodel import comm
from planner.costmodel.facts import LayerFacts
from planner.costmodel.graph import Attention
from planner.costmodel.keys import Array, Keys, Machine

LOSS_STATS_BYTES = 12.0  # of a row of logits and rank: three float32


def exposed(comm_s: Array, compute_s: Array, overlap: float) -> Array:
    """What is left of `comm_s` when a fraction `overlap` of the possible hiding really happens."""
    hidden: Array = comm_s - overlap * np.minimum(comm_s, compute_s)
    return hidden


def host_collectives_s(facts: LayerFacts, keys: Keys, machine: Machine) -> Array:
    """Seconds that the host needs to issue the tensor-parallel collectives of a forward pass."""
    engine = machine.engine
    crossing = (keys.piped > 0) & (machine.num_gpus > machine.cluster.node_size)
    call_s = engine.host_collective_s + np.where(crossing, engine.host_collective_crossing_s * keys.tp, 0.0)
    collectives = len(facts.row_bytes) + len(facts.gathered_bytes) * (keys.sp > 0)
    return np.where(keys.tp > 1, collectives * call_s, 0.0)


def host_cut_s(facts: LayerFacts, keys: Keys, machine: Machine) -> tuple[Array, Array]:
    """Seconds (forward, backward) that the host needs more for a layer because it works on parts of tensors."""
    used = {"tp": (keys.tp > 1) & (keys.sp == 0), "sp": (keys.tp > 1) & (keys.sp > 0), "cp": keys.cp > 1}
    found = [np.zeros_like(keys.tp), np.zeros_like(keys.tp)]
    for name, both in machine.engine.host_cut_s.items():
        per_layer = [facts.launches * seconds for seconds in both]
        found = [old + np.where(used[name], new, 0.0) for old, new in zip(found, per_layer, strict=True)]
    return found[0], found[1]


def tensor_parallel_s(
    facts: LayerFacts, keys: Keys, machine: Machine, forward_s: Array, backward_s: Array
) -> tuple[Array, Array]:
    """Exposed TP communication (Shoeybi et al. 2019, section 3; with SP Korthikanti et al. 2022, section 4.2).

    Without SP: all-reduce of row outputs forward, of column inputs' gradients backward. With SP: all-gather
    of column inputs and reduce-scatter of row outputs forward; the mirror image backward, plus the gather of
    column inputs again unless the engine saved them. What a column-parallel GEMM communicates in backward may run
    beside its own weight gradient (`overlap_tp_column`).
    """
    redo_gather = 0.0 if machine.engine.sp_saves_gathered else 1.0

    fwd, bwd, beside = np.zeros_like(keys.tp), np.zeros_like(keys.tp), np.zeros_like(keys.tp)
    for num_bytes in facts.row_bytes:
        fwd = fwd + reduce_s(num_bytes, keys, machine)
        bwd = bwd + gather_s(num_bytes, keys, machine)
    for num_bytes in facts.gathered_bytes:
        gather = gather_s(num_bytes, keys, machine)
        fwd = fwd + gather
        beside = beside + reduce_s(num_bytes, keys, machine) + redo_gather * gather
    shared = keys.vocab_parallel > 0
    if facts.vocab_row_bytes:
        fwd = fwd + np.where(shared, reduce_s(facts.vocab_row_bytes, keys, machine), 0.0)
        bwd = bwd + np.where(shared, gather_s(facts.vocab_row_bytes, keys, machine), 0.0)
    if facts.vocab_gathered_bytes:
        gather = gather_s(facts.vocab_gathered_bytes, keys, machine)
        fwd = fwd + gather
        bwd = bwd + np.where(shared, reduce_s(facts.vocab_gathered_bytes, keys, machine) + redo_gather * gather, gather)
    engine = machine.engine
    if facts.loss_rows and engine.kernels:  # kernels/loss.py: maximum, sum and the target's logit of every rank's part
        stats = LOSS_STATS_BYTES * facts.loss_rows * keys.tokens * keys.tp
        gather = comm.all_gather_s(machine.cluster, machine.domains, stats, np.ones_like(keys.tp), keys.tp)
        fwd = fwd + np.where(shared, gather, 0.0)
    beside = exposed(beside, backward_s, max(engine.overlap_tp_column, engine.overlap_tp))
    return exposed(fwd, forward_s, engine.overlap_tp), exposed(bwd, backward_s, engine.overlap_tp) + beside


def reduce_s(num_bytes: float, keys: Keys, machine: Machine) -> Array:
    """Sum over the TP ranks of a tensor of `num_bytes`: reduce-scatter under SP, else all-reduce."""
    args = (machine.cluster, machine.domains, num_bytes * keys.tokens, np.ones_like(keys.tp), keys.tp)
    return np.where(keys.sp > 0, comm.reduce_scatter_s(*args), comm.all_reduce_s(*args))


def gather_s(num_bytes: float, keys: Keys, machine: Machine) -> Array:
    """All-gather over the TP ranks of a tensor of `num_bytes` under SP, 0 without."""
    args = (machine.cluster, machine.domains, num_bytes * keys.tokens, np.ones_like(keys.tp), keys.tp)
    return np.where(keys.sp > 0, comm.all_gather_s(*args), 0.0)


def context_parallel_s(
    facts: LayerFacts, keys: Keys, machine: Machine, attention_f: Array, attention_b: Array
) -> tuple[Array, Array]:
    """Exposed CP communication of the attention ops: the ring's hops are hidden behind attention."""
    ulysses_s, ring_s = context_calls_s(facts, keys, machine)
    overlap = machine.engine.overlap_cp
    return ulysses_s + exposed(ring_s, attention_f, overlap), ulysses_s + exposed(2 * ring_s, attention_b, overlap)


def context_calls_s(facts: LayerFacts, keys: Keys, machine: Machine) -> tuple[Array, Array]:
    """Seconds of a forward pass's (all-to-alls, ring hops) of the attention ops, hidden or not.

    Ulysses (Jacobs et al. 2023, section 3): all-to-all of q, k, v before and of the output after attention, both ways;
    KV heads are replicated up to the degree. Ring (Liu et al. 2023, section 3): ring-1 hops of the local K and V
    forward; backward twice as many, K and V and their gradients. A ring's turn lasts as long as its slowest hop: the
    one from its last rank to its first crosses whatever the ring spans.
    """
    ulysses_s, ring_s = np.zeros_like(keys.tp), np.zeros_like(keys.tp)
    for op in facts.attentions:
        a = op.attention
        assert a is not None
        u_fwd, hop_bytes = attention_bytes(a, keys, machine)
        sizes = (keys.tp, keys.ulysses)
        calls = [comm.all_to_all_s(machine.cluster, machine.domains, b, *sizes) for b in u_fwd]
        ulysses_s = ulysses_s + np.where(keys.ulysses > 1, calls[0] + calls[1], 0.0)
        stride, hops = keys.tp * keys.ulysses, keys.ring - 1
        ring_s = ring_s + hops * comm.send_recv_s(machine.cluster, machine.domains, hop_bytes, stride * hops)
    return ulysses_s, ring_s


def attention_bytes(a: Attention, keys: Keys, machine: Machine) -> tuple[tuple[Array, Array], Array]:
    """((bytes of q,k,v and of the output in a Ulysses all-to-all), bytes of K and V per ring hop), per rank."""
    heads = a.q_heads / keys.tp
    kv_heads = np.maximum(a.kv_heads, keys.tp * keys.ulysses) / keys.tp
    kv_heads = np.minimum(kv_heads, np.maximum(heads, 1.0))
    rows = a.batch * keys.micro_batch_size * machine.dtype_bytes
    q_rows, kv_rows = rows * a.q_len / keys.cp, rows * a.kv_len / keys.cp
    kv_bytes = kv_rows * kv_heads * (a.head_dim_qk + a.head_dim_v)
    before = q_rows * heads * a.head_dim_qk + kv_bytes
    return (before, q_rows * heads * a.head_dim_v), kv_bytes


def expert_parallel_s(facts: LayerFacts, keys: Keys, machine: Machine, forward_s: Array) -> Array:
    """Exposed all-to-all of dispatch and combine over the EP group (Lepikhin et al. 2020, section 3.2)."""
    total = np.zeros_like(keys.tp)
    for num_bytes in facts.permute_bytes:
        size = num_bytes * keys.tokens
        call = comm.all_to_all_s(machine.cluster, machine.domains, size, keys.tp, keys.ep)
        total = total + np.where(keys.ep > 1, call, 0.0)
    return exposed(total, forward_s, machine.engine.overlap_ep)
