"""A plan run through the event simulator: every chunk with its own times and bytes, nothing in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.costmodel.estimate import model_facts, price_model, spec_keys, spec_layout
from planner.costmodel.graph import ModelGraph
from planner.costmodel.keys import Machine
from planner.costmodel.rates import EndRates, Rates, build_rates
from planner.costmodel.simulate import Simulation, simulate
from planner.costmodel.state import step_sync
from planner.costmodel.strategy import STRATEGIES, PlanSpec

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedPlan:
    """Step time and per-rank peaks of a plan; `host_bytes` is the peak in host memory of one GPU's share."""

    simulation: Simulation
    step_s: float
    peak_bytes: Array  # (P,)
    host_bytes: Array  # (P,)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    """One virtual stage: seconds and bytes of one micro-batch, and what it always holds."""

    rank: int
    chunk: int
    forward_s: float
    backward_s: float
    weight_s: float
    plain_backward_s: float  # without recomputation and offload: what gradient reduction may hide behind
    activation_bytes: float
    host_activation_bytes: float
    state_bytes: float
    host_state_bytes: float
    work_bytes: float
    loss_bytes: float
    dense: Array
    routed: Array


def simulate_plan(graph: ModelGraph, machine: Machine, spec: PlanSpec) -> SimulatedPlan:
    """Simulate one step of `spec`: the pipeline by events, then the slowest rank's once-per-step work."""
    one = np.array([1.0])
    prices = price_model(model_facts(graph, machine.engine), spec_keys(spec), machine)
    pipeline = (spec.pp * one, spec.vpp * one, spec.num_microbatches * one)
    rates = build_rates(graph, prices, spec_layout(spec), *pipeline, machine)
    chunks = [_chunk(graph, spec, stage, rates) for stage in range(len(spec.stage_layers))]
    shape = (spec.pp, spec.vpp)
    static, host_static = np.full(spec.pp, float(rates.fixed_bytes_K[0])), np.zeros(spec.pp)
    work = np.zeros(spec.pp)
    for c in chunks:
        static[c.rank] += c.state_bytes + c.loss_bytes
        host_static[c.rank] += c.host_state_bytes
        work[c.rank] = max(work[c.rank], c.work_bytes)

    def run(activations: str, held: Array) -> Simulation:
        return simulate(
            spec.schedule,
            _grid(chunks, "forward_s", shape),
            _grid(chunks, "backward_s", shape),
            _grid(chunks, "weight_s", shape),
            spec.num_microbatches,
            activation_bytes=_grid(chunks, activations, shape),
            static_bytes=held,
        )

    simulation = run("activation_bytes", static + work)
    uses_host = any(c.host_activation_bytes for c in chunks)
    host = run("host_activation_bytes", host_static).peak_bytes if uses_host else host_static
    once_s = max(_once_s(rank, chunks, rates, machine) for rank in range(spec.pp))
    step_s = simulation.step_s + once_s + float(rates.step_s_K[0])
    return SimulatedPlan(simulation=simulation, step_s=step_s, peak_bytes=simulation.peak_bytes, host_bytes=host)


def _chunk(graph: ModelGraph, spec: PlanSpec, stage: int, rates: Rates) -> _Chunk:
    first, last = spec.stage_layers[stage]
    classes = graph.layer_classes
    pairs = [(classes[i], STRATEGIES.index(spec.layers[i])) for i in range(first, last)]
    c = [pair[0] for pair in pairs]
    s = [pair[1] for pair in pairs]
    ends: list[EndRates] = [rates.prologue] if stage == 0 else []
    loss = stage == len(spec.stage_layers) - 1
    ends += [rates.epilogue] if loss else []
    hop = float(rates.p2p_s_K[0])

    def layers(table: Array) -> float:
        return float(table[c, 0].sum())

    def chosen(table: Array) -> float:
        return float(table[c, s, 0].sum())

    def of_ends(name: str) -> float:
        return sum(float(getattr(end, name)[0]) for end in ends)

    plain_s = layers(rates.backward_s_CK) + of_ends("backward_s") + hop
    work = float(np.max(rates.work_bytes_CSK[c, s, 0], initial=0.0))
    return _Chunk(
        rank=spec.rank_of(stage),
        chunk=stage // spec.pp,
        forward_s=layers(rates.forward_s_CK) + of_ends("forward_s") + hop,
        backward_s=plain_s + chosen(rates.extra_s_CSK),
        weight_s=layers(rates.weight_s_CK) + of_ends("weight_s"),
        plain_backward_s=plain_s + layers(rates.weight_s_CK) + of_ends("weight_s"),
        activation_bytes=chosen(rates.activation_bytes_CSK)
        + (float(rates.prologue.activation_bytes[0]) if stage == 0 else 0.0),
        host_activation_bytes=chosen(rates.host_bytes_CSK),
        state_bytes=layers(rates.state_bytes_CK) + of_ends("state_bytes"),
        host_state_bytes=layers(rates.host_state_bytes_CK) + of_ends("host_bytes"),
        work_bytes=work + (float(rates.epilogue.work_bytes[0]) if loss else 0.0),
        # The loss runs its backward at once, so its activations are there once and not per micro-batch in flight.
        loss_bytes=float(rates.epilogue.activation_bytes[0]) if loss else 0.0,
        dense=rates.dense_CK[c].sum(axis=0) + sum((end.dense for end in ends), np.zeros(1)),
        routed=rates.routed_CK[c].sum(axis=0) + sum((end.routed for end in ends), np.zeros(1)),
    )


def _grid(chunks: list[_Chunk], field: str, shape: tuple[int, int]) -> Array:
    grid = np.zeros(shape)
    for c in chunks:
        grid[c.rank, c.chunk] = getattr(c, field)
    return grid


def _once_s(rank: int, chunks: list[_Chunk], rates: Rates, machine: Machine) -> float:
    """Gradient reduction, optimizer and parameter gather of one rank, exposed."""
    mine = [c for c in chunks if c.rank == rank]
    dense = sum((c.dense for c in mine), np.zeros(1))
    routed = sum((c.routed for c in mine), np.zeros(1))
    forward = np.array([sum(c.forward_s for c in mine)])
    backward = np.array([sum(c.plain_backward_s for c in mine)])
    return float(step_sync(dense, routed, forward, backward, rates.layout, machine).total_s[0])
