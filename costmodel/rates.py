"""Rates: everything about one plan layout that does not depend on which rank holds which layers.

Arrays are indexed C (layer class), S (strategy, in the order of strategy.STRATEGIES), K (plan layouts priced at
once). The search and the estimate of a single plan (K = 1) both start here, so they cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from planner.costmodel import comm, compute
from planner.costmodel.graph import ModelGraph
from planner.costmodel.keys import Array, Machine
from planner.costmodel.layer_comm import exposed
from planner.costmodel.price import LayerPrice
from planner.costmodel.state import StateLayout, grad_bytes, host_state_bytes, layer_sync_s, once_s, state_bytes
from planner.costmodel.strategy import RECOMPUTE_KINDS, STRATEGIES


@dataclass(frozen=True, slots=True, kw_only=True)
class EndRates:
    """The prologue on the first rank or the epilogue on the last; arrays (K,)."""

    forward_s: Array
    backward_s: Array
    weight_s: Array
    zero_f: Array
    zero_b: Array
    state_bytes: Array
    host_bytes: Array
    activation_bytes: Array
    work_bytes: Array
    dense: Array
    routed: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Per-layer and per-rank constants of K layouts.

    `forward_s_CK`, `backward_s_CK` (inputs), `weight_s_CK`: one layer, one micro-batch, exposed ZeRO
    communication included, recomputation and offload excluded; these are `extra_s_CSK`, added to backward.
    `activation_bytes_CSK`, `host_bytes_CSK`: one layer, one micro-batch in flight. `work_bytes_CSK`: transient
    while one such layer runs backward. `fixed_bytes_K`: per rank whatever it holds. `p2p_s_K`: blocking
    point-to-point time of one chunk and direction. `step_s_K`: once per step on every rank.
    """

    forward_s_CK: Array
    backward_s_CK: Array
    weight_s_CK: Array
    zero_f_CK: Array
    zero_b_CK: Array
    extra_s_CSK: Array
    activation_bytes_CSK: Array
    host_bytes_CSK: Array
    work_bytes_CSK: Array
    state_bytes_CK: Array
    host_state_bytes_CK: Array
    dense_CK: Array
    routed_CK: Array
    prologue: EndRates
    epilogue: EndRates
    fixed_bytes_K: Array
    p2p_s_K: Array
    step_s_K: Array
    layout: StateLayout

    def take(self, index: NDArray[np.int64]) -> Rates:
        """The rates of the layouts at `index`."""
        return _take(self, index)

    def column(self, k: int) -> Rates:
        """The rates of layout k alone, K = 1."""
        return _take(self, np.array([k]))


def _take(value: Rates, index: NDArray[np.int64]) -> Rates:
    def pick(item: object) -> object:
        if isinstance(item, np.ndarray):
            return item[..., index]
        assert isinstance(item, (EndRates, StateLayout))
        return type(item)(**{f.name: pick(getattr(item, f.name)) for f in fields(item)})  # type: ignore[arg-type]

    return Rates(**{f.name: pick(getattr(value, f.name)) for f in fields(value)})  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Layer prices of a model at K keys: one per class, and the two ends."""

    prologue: LayerPrice
    classes: tuple[LayerPrice, ...]
    epilogue: LayerPrice

    def take(self, index: NDArray[np.int64]) -> Prices:
        """The prices at `index` of the key arrays."""
        classes = tuple(price.take(index) for price in self.classes)
        return Prices(prologue=self.prologue.take(index), classes=classes, epilogue=self.epilogue.take(index))


def build_rates(
    graph: ModelGraph,
    prices: Prices,
    layout: StateLayout,
    pp: Array,
    vpp: Array,
    num_microbatches: Array,
    machine: Machine,
) -> Rates:
    """Combine layer prices (K,) with a model-state layout (K,), the pipeline shape (K,) and micro-batches a step."""
    synced = [_synced(price, layout, machine) for price in prices.classes]
    options = [
        _options(price, fwd, bwd, machine) for price, (fwd, bwd) in zip(prices.classes, synced, strict=True)
    ]
    extra, act, host, work = (np.stack([o[i] for o in options]) for i in range(4))
    price_c = prices.classes
    grads = [_late_grads(p.dense_params, p.routed_params, layout, num_microbatches, machine) for p in price_c]
    act = np.maximum(act, np.stack(grads)[:, None])
    tied = np.where(pp > 1, float(graph.tied_params) / _vocab_div(prices, graph), 0.0)
    epilogue = _end(prices.epilogue, tied, layout, num_microbatches, machine)
    if machine.engine.transients_in_turn:
        work = work + sum(_zero_bytes(prices, layout, machine))
        gone = np.where(pp > 1, 0.0, epilogue.activation_bytes + epilogue.work_bytes)  # before the first layer's turn
        work = np.maximum(work - gone, 0.0)
        # Ranks are not told apart here: the last one of a pipeline adds both, less what any layer has.
        both = np.where(pp > 1, np.minimum(work.min(axis=(0, 1)), epilogue.work_bytes), 0.0)
        epilogue = replace(epilogue, work_bytes=epilogue.work_bytes - both)
    return Rates(
        forward_s_CK=np.stack([p.forward_s + f for p, (f, _) in zip(price_c, synced, strict=True)]),
        backward_s_CK=np.stack([p.backward_input_s + b for p, (_, b) in zip(price_c, synced, strict=True)]),
        weight_s_CK=np.stack([p.weight_s for p in price_c]),
        zero_f_CK=np.stack([f for f, _ in synced]),
        zero_b_CK=np.stack([b for _, b in synced]),
        extra_s_CSK=extra,
        activation_bytes_CSK=act,
        host_bytes_CSK=host,
        work_bytes_CSK=work,
        state_bytes_CK=np.stack(
            [
                state_bytes(p.dense_params, p.routed_params, p.frozen_params, layout, machine) - late
                for p, late in zip(price_c, grads, strict=True)
            ]
        ),
        host_state_bytes_CK=np.stack(
            [host_state_bytes(p.dense_params, p.routed_params, layout, machine) for p in price_c]
        ),
        dense_CK=np.stack([p.dense_params for p in price_c]),
        routed_CK=np.stack([p.routed_params for p in price_c]),
        prologue=_end(prices.prologue, np.zeros_like(tied), layout, num_microbatches, machine),
        epilogue=epilogue,
        fixed_bytes_K=_fixed_bytes(prices, layout, pp, vpp, num_microbatches, machine),
        p2p_s_K=p2p_s(boundary_bytes(prices), pp, vpp, machine),
        step_s_K=_step_s(tied, pp, machine) + once_s(graph.num_layers / pp, layout, machine),
        layout=layout,
    )


def _late_grads(dense: Array, routed: Array, layout: StateLayout, num_microbatches: Array, machine: Machine) -> Array:
    """Gradients that take the place of activations in backward: there are none before, in the only micro-batch.

    A layer's share of the peak is then the larger of both, not their sum.
    """
    late = machine.engine.gathers_copies & (num_microbatches == 1)
    return np.where(late, grad_bytes(dense, routed, layout, machine), 0.0)


def _synced(price: LayerPrice, layout: StateLayout, machine: Machine) -> tuple[Array, Array]:
    backward = price.backward_input_s + price.weight_s
    return layer_sync_s(price.dense_params, price.routed_params, price.forward_s, backward, layout, machine)


def _options(price: LayerPrice, sync_f: Array, sync_b: Array, machine: Machine) -> tuple[Array, ...]:
    """(extra seconds, activation bytes, host bytes, work bytes), each (S, K).

    Offloaded activations leave during forward and come back during backward (MEMO, section 4), hidden behind
    the layer's own time as far as the engine manages; two layers' worth of buffers stay on the GPU.
    """
    engine, device = machine.engine, machine.cluster.device
    keep = 1.0 + engine.fragmentation_frac
    forward = price.forward_s + sync_f
    backward = price.backward_input_s + price.weight_s + sync_b
    rows: list[tuple[Array, Array, Array, Array]] = []
    for strategy in STRATEGIES:
        kind = RECOMPUTE_KINDS.index(strategy.recompute)
        saved, redo = price.saved[kind], price.redo[kind]
        work = keep * np.maximum(price.saved[0] - saved, 0.0)
        if engine.transients_in_turn:  # gradients of the widest activations, as many as two of them
            work = work + 0.5 * keep * price.saved[0]
        if not strategy.offload_activations:
            rows.append((redo, keep * saved, np.zeros_like(saved), work))
            continue
        copy = compute.host_copy_s(device, saved)
        moved = exposed(copy, forward, engine.overlap_offload)
        moved = moved + exposed(copy, backward + redo, engine.overlap_offload)
        rows.append((redo + moved, np.zeros_like(saved), saved, work + 2 * keep * saved))
    return tuple(np.stack([row[i] for row in rows]) for i in range(4))


def _vocab_div(prices: Prices, graph: ModelGraph) -> Array:
    """By how much the embedding is sharded: its parameters over those of one rank."""
    held = prices.prologue.dense_params + prices.prologue.frozen_params
    ratio: Array = np.maximum(graph.prologue.num_params / np.maximum(held, 1.0), 1.0)
    return ratio


def _end(
    price: LayerPrice, tied: Array, layout: StateLayout, num_microbatches: Array, machine: Machine
) -> EndRates:
    dense = price.dense_params + tied
    late = _late_grads(dense, price.routed_params, layout, num_microbatches, machine)
    backward = price.backward_input_s + price.weight_s
    zero_f, zero_b = layer_sync_s(dense, price.routed_params, price.forward_s, backward, layout, machine)
    keep = 1.0 + machine.engine.fragmentation_frac
    return EndRates(
        forward_s=price.forward_s + zero_f,
        backward_s=price.backward_input_s + zero_b,
        weight_s=price.weight_s,
        zero_f=zero_f,
        zero_b=zero_b,
        state_bytes=state_bytes(dense, price.routed_params, price.frozen_params, layout, machine) - late,
        host_bytes=host_state_bytes(dense, price.routed_params, layout, machine),
        activation_bytes=np.maximum(keep * price.saved[0], late),
        work_bytes=keep * (price.loss_work_bytes + 0.5 * (price.saved[0] - price.loss_bytes)),
        dense=dense,
        routed=price.routed_params,
    )


def _fixed_bytes(
    prices: Prices, layout: StateLayout, pp: Array, vpp: Array, num_microbatches: Array, machine: Machine
) -> Array:
    """Context, ZeRO working set (two gathered layers, one layer of full gradients) and pipeline buffers.

    Where these are kept for every micro-batch, those of the first rank, which holds most activations, count: outputs of
    its later chunks' predecessors and gradients of all its chunks.
    """
    engine = machine.engine
    gathered, reduced = _zero_bytes(prices, layout, machine)
    if engine.transients_in_turn:  # of the layers in their turn; the ends belong to the root, which stays gathered
        first, last = prices.prologue.dense_params, prices.epilogue.dense_params
        root = np.where(pp > 1, np.maximum(first, last), first + last)
        gathered = np.where(layout.zero >= 3, root * engine.weight_bytes, 0.0)
        reduced = np.where(layout.zero >= 2, last * engine.grad_bytes, 0.0)
    received = (2 * vpp - 1) * num_microbatches if engine.keeps_received else 2 * vpp
    buffers = np.where(pp > 1, received * boundary_bytes(prices), 0.0)
    total: Array = engine.context_bytes + gathered + reduced + buffers
    return total


def _zero_bytes(prices: Prices, layout: StateLayout, machine: Machine) -> tuple[Array, Array]:
    """(two gathered layers of ZeRO-3, one layer of full gradients of ZeRO-2 and 3)."""
    engine = machine.engine
    largest = np.max(np.stack([p.dense_params + p.routed_params for p in prices.classes]), axis=0)
    gathered = np.where(layout.zero >= 3, 2 * largest * engine.weight_bytes, 0.0)
    return gathered, np.where(layout.zero >= 2, largest * engine.grad_bytes, 0.0)


def boundary_bytes(prices: Prices) -> Array:
    """Largest tensor set that crosses a pipeline cut, bytes of one rank and micro-batch."""
    largest: Array = np.max(np.stack([p.boundary_bytes for p in prices.classes]), axis=0)
    return largest


def p2p_s(boundary: Array, pp: Array, vpp: Array, machine: Machine) -> Array:
    """Blocking share of a transfer of `boundary` bytes between neighbouring stages, with the host's time for a pass."""
    engine = machine.engine
    hop = comm.send_recv_s(machine.cluster, machine.domains, boundary, machine.num_gpus / pp)
    hidden = np.where(vpp > 1, engine.overlap_p2p_interleaved, engine.overlap_p2p)
    total: Array = np.where(pp > 1, hop * (1.0 - hidden) + engine.host_stage_s, 0.0)
    return total


def _step_s(tied: Array, pp: Array, machine: Machine) -> Array:
    """Once per step on every rank: gradient-norm all-reduce, and the tied embedding's between both ends."""
    cluster, domains = machine.cluster, machine.domains
    one = np.ones_like(pp)
    norm = comm.all_reduce_s(cluster, domains, 4.0 * one, one, machine.num_gpus * one)
    stride = machine.num_gpus / pp
    tie = comm.all_reduce_s(cluster, domains, tied * machine.engine.reduce_bytes, stride, np.minimum(pp, 2.0))
    total: Array = norm + np.where(pp > 1, tie, 0.0)
    return total
