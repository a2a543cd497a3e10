"""Layers whose own time was measured: prices scaled to it, and the evidence behind every component of a plan.

A profile measures a layer whole, on one rank. What the sum of its kernels misses (clocks under load, cold caches, the
kernels that no table has) is the ratio of both; it is taken over to the layer's shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

import numpy as np

from planner.costmodel import compute
from planner.costmodel.evidence import Source, weakest
from planner.costmodel.facts import LayerFacts
from planner.costmodel.graph import LayerClass
from planner.costmodel.hardware import Table
from planner.costmodel.kernel_choice import WAYS
from planner.costmodel.keys import Array, Keys, Machine
from planner.costmodel.measured import covered
from planner.costmodel.price import LayerPrice, price_layer, rank_gemm


@lru_cache(maxsize=256)
def layer_name(layer: LayerClass) -> str:
    """What samples call a layer: a hash of everything in it but its own name; the traced lengths are part of it."""
    return hashlib.sha256(repr(replace(layer, name="")).encode()).hexdigest()[:16]


def _tables(layer: LayerClass, machine: Machine) -> tuple[Table | None, Table | None]:
    measured = machine.cluster.device.measured
    if not any(name.startswith("layer/") for name in measured):
        return None, None
    forward, backward = (measured.get(f"layer/{layer_name(layer)}/{way}") for way in WAYS)
    return forward, backward


def alone(micro_batch_size: Array) -> Keys:
    """Keys of a whole layer on one rank."""
    one, zero = np.ones_like(micro_batch_size), np.zeros_like(micro_batch_size)
    return Keys(
        tp=one, sp=zero, ulysses=one, ring=one, ep=one, micro_batch_size=micro_batch_size, vocab_parallel=zero
    )  # fmt: skip


def scaled_to_measured(facts: LayerFacts, keys: Keys, machine: Machine) -> LayerPrice:
    """`price_layer`, its compute scaled so that the whole layer on one rank takes what a profile measured."""
    price, facts = price_layer(facts, keys, machine), facts.traced or facts
    forward, backward = _tables(facts.layer, machine)
    if forward is not None:
        ratio = _ratio(facts, forward, machine, keys, backward=False)
        price = replace(
            price, gemm_f=price.gemm_f * ratio, attention_f=price.attention_f * ratio, memory_f=price.memory_f * ratio,
            launch_f=price.launch_f * ratio,
            redo=(price.redo[0], price.redo[1] * ratio, price.redo[2] * ratio),
        )  # fmt: skip
    if backward is not None:
        ratio = _ratio(facts, backward, machine, keys, backward=True)
        price = replace(
            price, gemm_b=price.gemm_b * ratio, gemm_w=price.gemm_w * ratio, attention_b=price.attention_b * ratio,
            memory_b=price.memory_b * ratio, launch_b=price.launch_b * ratio,
            accumulate_w=price.accumulate_w * ratio,
        )  # fmt: skip
    return price


def _ratio(facts: LayerFacts, table: Table, machine: Machine, keys: Keys, backward: bool) -> Array:
    """Measured over priced time of the whole layer, between measured micro-batch sizes straight in log space."""
    sizes = np.array([row[0] for row in table.dims])
    price = price_layer(facts, alone(sizes), machine)
    priced_s = price.backward_input_s + price.weight_s if backward else price.forward_s
    ratio = np.array(table.time_s) / np.maximum(priced_s, 1e-12)
    return np.asarray(np.exp(np.interp(np.log(keys.tokens), np.log(sizes), np.log(ratio))), np.float64)


# ---- evidence


def component_evidence(layers: Iterable[LayerFacts], keys: Keys, machine: Machine) -> dict[str, Source]:
    """Evidence by component of one plan (`keys` of shape (1,)): the weakest of what it is made of."""
    layers = tuple(layers)
    device = machine.cluster.device
    whole = [_layer_evidence(facts, keys, machine) for facts in layers]
    found = {
        "gemm": _weakest(
            source if source is not None else _gemm_evidence(facts, keys, machine)
            for facts, source in zip(layers, whole, strict=True)
        ),
        "attention": _weakest(
            source if source is not None else _attention_evidence(machine)
            for facts, source in zip(layers, whole, strict=True)
            if facts.attentions
        ),
        "memory_bound": _weakest(
            source if source is not None else _curve(device.measured.get("memory")) for source in whole
        ),
        "launch": _weakest(source if source is not None else Source.MODELLED for source in whole),
        "optimizer": _curve(device.measured.get("optimizer")),
        "link": _link_evidence(machine),
    }
    return {**found, "recompute": weakest((found["gemm"], found["attention"], found["memory_bound"]))}


def _weakest(sources: Iterable[Source]) -> Source:
    """As `weakest`, MEASURED for a component that no layer has: it takes no time."""
    return max(sources, default=Source.MEASURED)


def _curve(table: Table | None) -> Source:
    return Source.MODELLED if table is None else Source.INTERPOLATED


def _layer_evidence(facts: LayerFacts, keys: Keys, machine: Machine) -> Source | None:
    """MEASURED for a whole layer at a measured micro-batch size; INTERPOLATED for others, shards, and layers in which
    kernels stand in for what was measured; None if not measured.
    """
    tables = _tables((facts.traced or facts).layer, machine)
    if tables[0] is None or tables[1] is None:
        return None
    shards = keys.tp * keys.cp * keys.ep
    if float(shards[0]) > 1 or facts.traced is not None:
        return Source.INTERPOLATED
    return weakest(min(covered(table, (float(keys.tokens[0]),)), Source.INTERPOLATED) for table in tables)


def _gemm_evidence(facts: LayerFacts, keys: Keys, machine: Machine) -> Source:
    device, dtype = machine.cluster.device, machine.dtype
    fitted = compute.gemm_evidence(device, dtype)
    table = device.measured.get(f"gemm/{dtype}")
    if table is None:
        return fitted
    found = []
    for op in facts.matmuls:
        batch, m, n, k = (float(size[0]) for size in rank_gemm(op, keys))
        found.append(min(fitted, covered(table, (batch, m, n, k))))
    return _weakest(found)


def _attention_evidence(machine: Machine) -> Source:
    measured = any(name.startswith(f"attention/{machine.dtype}/") for name in machine.cluster.device.measured)
    return Source.INTERPOLATED if measured else Source.MODELLED


def _link_evidence(machine: Machine) -> Source:
    """Of the constants of the tiers that a job of this size crosses."""
    last = next(i for i, size in enumerate(machine.domains) if size >= machine.num_gpus)
    used = machine.cluster.tiers[: last + 1]
    return weakest(fit.evidence for tier in used for fit in tier.collectives.values())
