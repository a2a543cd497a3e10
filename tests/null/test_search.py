"""The search against brute force over the whole declared space, and laws of its result.

The brute force shares the cost model with the search and nothing else: it writes down every plan (meshes, state
layouts, stage partitions, strategies of every layer), prices each with `estimate`, and keeps the best that fits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import pytest

from planner.costmodel.engine import get_engine
from planner.costmodel.estimate import estimate_many, machine_for, model_facts
from planner.costmodel.graph import LayerRun, ModelGraph
from planner.costmodel.hardware import ClusterSpec
from planner.costmodel.pipeline import ScheduleKind, schedule_problem
from planner.costmodel.presets import load_cluster
from planner.costmodel.price import Machine
from planner.costmodel.strategy import STRATEGIES, LayerStrategy, PlanSpec
from planner.reports.shapes import Shape, build_graph
from planner.search import SearchOptions, SearchResult, search
from planner.space import Limits

DENSE = Shape(
    num_layers=4, hidden=2048, ffn=8192, heads=4, kv_heads=2, head_dim=512, vocab=32_000, seq_len=2048, gated=True,
    tied=False, rotary=True,
)  # fmt: skip
PLAIN = STRATEGIES[:3]  # without offload
EXACT = SearchOptions(gap_frac=0.0, top=1, memory_margin_frac=0.0)


@cache
def dense_graph(num_layers: int = 4) -> ModelGraph:
    return build_graph(replace(DENSE, num_layers=num_layers))


@cache
def mixed_graph() -> ModelGraph:
    """Two kinds of layers in turn: 2 dense, then 2 MoE."""
    dense = dense_graph()
    moe = build_graph(replace(DENSE, ffn=2048, num_experts=4, top_k=2))
    runs = (
        LayerRun(layer_class=0, count=2, paths=("a.0", "a.1")),
        LayerRun(layer_class=1, count=2, paths=("b.0", "b.1")),
    )
    return replace(dense, classes=(dense.classes[0], moe.classes[0]), runs=runs)


def small_machine(graph: ModelGraph, num_gpus: int, memory_bytes: float, host_bytes: float = 1e15) -> Machine:
    cluster = load_cluster("h100")
    memory = replace(cluster.device.memory_bytes, value=memory_bytes)
    host = replace(cluster.host_memory_bytes_per_gpu, value=host_bytes)
    small: ClusterSpec = replace(
        cluster, device=replace(cluster.device, memory_bytes=memory), host_memory_bytes_per_gpu=host
    )
    return machine_for(graph, small, replace(get_engine("planner"), context_bytes=0.0), num_gpus)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def meshes(graph: ModelGraph, num_gpus: int, batch: int) -> Iterator[PlanSpec]:
    """Every mesh, schedule and state layout, with stages and strategies left empty."""
    attentions = [op.attention for c in graph.classes for op in c.ops if op.attention]
    heads, kv, seq = attentions[0].q_heads, attentions[0].kv_heads, attentions[0].q_len
    experts = max(c.num_experts for c in graph.classes)
    widths = [d for c in graph.classes for d in c.tp_divides]
    sizes = itertools.product(divisors(num_gpus), repeat=5)
    for tp, ulysses, ring, pp, dp in sizes:
        cp = ulysses * ring
        if tp * cp * pp * dp != num_gpus or pp > graph.num_layers or batch % dp:
            continue
        inner = tp * ulysses
        if any(w % tp for w in widths) or (kv % tp and tp % kv) or heads % inner:
            continue
        if cp > 1 and (seq % (2 * cp) or (ulysses > 1 and kv % inner and inner % kv)):
            continue
        eps = [e for e in divisors(dp * cp) if experts and experts % e == 0] or [1]
        for sp, vocab_parallel in itertools.product((False, True), repeat=2):
            if tp == 1 and (sp or vocab_parallel) or sp and seq % (tp * cp) or vocab_parallel and graph.vocab_size % tp:
                continue
            for ep, micro in itertools.product(eps, divisors(batch // dp)):
                for kind, vpp in schedules(pp, graph.num_layers):
                    if pp > 1 and schedule_problem(kind, pp, vpp, batch // dp // micro):
                        continue
                    for shard in divisors(dp):
                        width = shard * cp
                        if width % ep and ep % width:
                            continue
                        zeros = ([0] if shard == 1 else []) + ([1, 2, 3] if width > 1 else [])
                        for zero, offload in itertools.product(zeros, (False, True)):
                            yield PlanSpec(
                                tp=tp, sequence_parallel=sp, pp=pp, vpp=vpp, schedule=kind, dp_replicate=dp // shard,
                                dp_shard=shard, zero_stage=zero, ulysses=ulysses, ring=ring, ep=ep,
                                micro_batch_size=micro, global_batch_size=batch, vocab_parallel=vocab_parallel,
                                offload_optimizer=offload, stage_layers=(), layers=(),
                            )  # fmt: skip


def schedules(pp: int, layers: int) -> list[tuple[ScheduleKind, int]]:
    if pp == 1:
        return [(ScheduleKind.ONE_F_ONE_B, 1)]
    found = [(ScheduleKind.ONE_F_ONE_B, 1), (ScheduleKind.ZB_H1, 1)]
    found += [(ScheduleKind.INTERLEAVED, v) for v in range(2, layers // pp + 1)]
    return found + ([(ScheduleKind.ZB_V, 2)] if layers >= 2 * pp else [])


def partitions(mesh: PlanSpec, graph: ModelGraph) -> Iterator[PlanSpec]:
    """Every stage partition of the declared space."""
    layers, pp, v = graph.num_layers, mesh.pp, mesh.vpp
    for counts in itertools.product(range(v, layers + 1), repeat=pp):
        if sum(counts) != layers or v > 1 and len(graph.classes) > 1 and max(counts) - min(counts) > 1:
            continue
        # Chunks of a rank differ by at most one; chunk 0 is the last to grow.
        grown = [*range(1, v), 0]
        sizes = [[n // v + (grown.index(c) < n % v) for n in counts] for c in range(v)]
        flat = sizes[0] + sizes[1][::-1] if mesh.schedule is ScheduleKind.ZB_V else sum(sizes, [])
        ends = list(itertools.accumulate(flat))
        yield replace(mesh, stage_layers=tuple((e - s, e) for e, s in zip(ends, flat, strict=True)))


def plans(
    graph: ModelGraph, num_gpus: int, batch: int, limits: Limits, strategies: tuple[LayerStrategy, ...]
) -> Iterator[PlanSpec]:
    """Every plan; equal layers of a rank are interchangeable, so strategies are taken in sorted order there."""
    for mesh in meshes(graph, num_gpus, batch):
        if not all(str(getattr(mesh, n, None)) == str(v) for n, v in limits.fixed.items() if hasattr(mesh, n)):
            continue
        if mesh.zero_stage not in limits.zero_stages or "offload_optimizer" in limits.forbidden and mesh.offload_optimizer:
            continue
        for spec in partitions(mesh, graph):
            groups: dict[tuple[int, int], list[int]] = {}
            for rank in range(spec.pp):
                for layer in spec.rank_layers(rank):
                    groups.setdefault((rank, graph.layer_classes[layer]), []).append(layer)
            choices = [
                list(itertools.combinations_with_replacement(strategies, len(members))) for members in groups.values()
            ]
            for combination in itertools.product(*choices):
                chosen = {
                    layer: strategy
                    for members, dealt in zip(groups.values(), combination, strict=True)
                    for layer, strategy in zip(members, dealt, strict=True)
                }
                yield replace(spec, layers=tuple(chosen[i] for i in range(graph.num_layers)))


def brute_force(
    graph: ModelGraph, machine: Machine, batch: int, limits: Limits, strategies: tuple[LayerStrategy, ...]
) -> tuple[float, int]:
    """(least step time of a plan that fits, number of plans)."""
    memory = machine.cluster.device.memory_bytes.value
    host = machine.cluster.host_memory_bytes_per_gpu.value
    facts = model_facts(graph, machine.engine)
    best, count = float("inf"), 0
    every = plans(graph, machine.num_gpus, batch, limits, strategies)
    while block := list(itertools.islice(every, 2000)):
        count += len(block)
        for found in estimate_many(graph, machine, block, facts):
            if found.step_s < best and all(
                r.memory.peak_bytes <= memory and r.memory.host_bytes <= host for r in found.ranks
            ):
                best = found.step_s
    return best, count


@dataclass(frozen=True, kw_only=True)
class Case:
    graph: str
    gpus: int
    batch: int
    memory_gb: float
    fixed: tuple[tuple[str, int | str], ...] = ()
    forbidden: tuple[str, ...] = ()
    offload: bool = False
    host_gb: float = 1e6


NO_OPTIMIZER = ("offload_optimizer",)
CASES = [
    Case(graph="dense", gpus=4, batch=4, memory_gb=80, forbidden=NO_OPTIMIZER, fixed=(("pp", 2), ("micro_batch_size", 1))),
    Case(graph="dense", gpus=4, batch=8, memory_gb=7.0, forbidden=NO_OPTIMIZER, fixed=(("pp", 2), ("tp", 1), ("ring", 1))),
    Case(graph="dense", gpus=4, batch=8, memory_gb=4.5, forbidden=NO_OPTIMIZER, fixed=(("pp", 2), ("tp", 2))),
    Case(graph="dense", gpus=4, batch=4, memory_gb=5.0, fixed=(("pp", 1), ("tp", 2))),
    Case(graph="dense", gpus=2, batch=4, memory_gb=8.0, fixed=(("pp", 2), ("micro_batch_size", 1)), offload=True,
         host_gb=12.0),
    Case(graph="dense", gpus=8, batch=8, memory_gb=6.0, forbidden=NO_OPTIMIZER, fixed=(("pp", 4), ("tp", 1), ("ulysses", 1))),
    Case(graph="mixed", gpus=4, batch=4, memory_gb=80, forbidden=NO_OPTIMIZER,
         fixed=(("pp", 2), ("tp", 1), ("micro_batch_size", 1), ("ep", 2))),
    Case(graph="mixed", gpus=4, batch=8, memory_gb=9.0, forbidden=NO_OPTIMIZER,
         fixed=(("pp", 2), ("tp", 1), ("micro_batch_size", 1), ("ulysses", 1), ("ep", 2))),
]  # fmt: skip


def run(case: Case, options: SearchOptions = EXACT) -> tuple[ModelGraph, Machine, Limits, SearchResult]:
    graph = dense_graph() if case.graph == "dense" else mixed_graph()
    machine = small_machine(graph, case.gpus, case.memory_gb * 1e9, case.host_gb * 1e9)
    forbidden = frozenset(case.forbidden) | (frozenset() if case.offload else {"offload_activations"})
    limits = Limits(fixed=dict(case.fixed), forbidden=forbidden)
    return graph, machine, limits, search(graph, machine, case.batch, limits, options)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.graph}-{c.gpus}-{c.memory_gb}")
def test_search_equals_brute_force(case: Case) -> None:
    graph, machine, limits, result = run(case)
    best, count = brute_force(graph, machine, case.batch, limits, STRATEGIES if case.offload else PLAIN)
    assert count > 100
    assert result.stop_reason == "exhausted"
    assert result.plans[0].step_s == pytest.approx(best, rel=1e-9)
    assert result.lower_bound_s <= best * (1 + 1e-9)
    assert result.lower_bound_s == pytest.approx(best, rel=1e-6)
