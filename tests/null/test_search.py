"""The search against brute force over the whole declared space, and laws of its result.

The brute force shares the cost model with the search and nothing else: it writes down every plan (meshes, state
layouts, stage partitions, strategies of every layer), prices each with `estimate`, and keeps the best that fits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
from shapes_for_tests import with_module_head

import planner.search
from planner.costmodel.engine import get_engine
from planner.costmodel.estimate import estimate_many, machine_for, model_facts
from planner.costmodel.graph import LayerRun, ModelGraph
from planner.costmodel.hardware import ClusterSpec
from planner.costmodel.kernels import CHUNK_ROWS, chunked_head
from planner.costmodel.keys import Machine
from planner.costmodel.pipeline import ScheduleKind, schedule_problem
from planner.costmodel.presets import load_cluster
from planner.costmodel.strategy import STRATEGIES, LayerStrategy, PlanSpec
from planner.reports.shapes import Shape, build_graph
from planner.search import Progress, SearchOptions, SearchResult, search
from planner.space import Limits, strategy_uses

DENSE = Shape(
    num_layers=4, hidden=1024, ffn=4096, heads=4, kv_heads=2, head_dim=256, vocab=2048, seq_len=16_384, gated=True,
    tied=False, rotary=True,
)  # fmt: skip  (activations outweigh the states, so that recomputation has a point)
PLAIN = STRATEGIES[:3]  # without offload
EXACT = SearchOptions(gap_frac=0.0, top=1, memory_margin_frac=0.0)


@cache
def dense_graph(num_layers: int = 4) -> ModelGraph:
    return build_graph(replace(DENSE, num_layers=num_layers))


@cache
def mixed_graph() -> ModelGraph:
    """Two kinds of layers in turn: 2 dense, then 2 MoE."""
    dense = dense_graph()
    moe = build_graph(replace(DENSE, ffn=1024, num_experts=4, top_k=2))
    runs = (
        LayerRun(layer_class=0, count=2, paths=("a.0", "a.1")),
        LayerRun(layer_class=1, count=2, paths=("b.0", "b.1")),
    )
    return replace(dense, classes=(dense.classes[0], moe.classes[0]), runs=runs)


@cache
def wide_graph() -> ModelGraph:
    """A vocabulary whose logits outweigh everything, behind a head that the chunked loss can take over."""
    return with_module_head(build_graph(replace(DENSE, vocab=65_536)))


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
                chunks = chunked_head(graph.epilogue) is not None and seq * micro / cp > 2 * CHUNK_ROWS
                kinds = itertools.product(schedules(pp, graph.num_layers), (False, True) if chunks else (False,))
                for (kind, vpp), chunked in kinds:
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
                                chunked_loss=chunked, offload_optimizer=offload, stage_layers=(), layers=(),
                            )  # fmt: skip


def schedules(pp: int, layers: int) -> list[tuple[ScheduleKind, int]]:
    if pp == 1:
        return [(ScheduleKind.ONE_F_ONE_B, 1)]
    found = [(ScheduleKind.ONE_F_ONE_B, 1), (ScheduleKind.ZB_H1, 1)]
    found += [(ScheduleKind.INTERLEAVED, v) for v in range(2, layers // pp + 1) if layers % v == 0]
    return found + ([(ScheduleKind.ZB_V, 2)] if layers >= 2 * pp and layers % 2 == 0 else [])


def partitions(mesh: PlanSpec, graph: ModelGraph) -> Iterator[PlanSpec]:
    """Every stage partition of the declared space."""
    layers, pp, v = graph.num_layers, mesh.pp, mesh.vpp
    for counts in itertools.product(range(v, layers + 1, v), repeat=pp):
        if sum(counts) != layers or v > 1 and len(graph.classes) > 1 and max(counts) - min(counts) > v:
            continue
        sizes = [[n // v for n in counts] for _ in range(v)]
        flat = sizes[0] + sizes[1][::-1] if mesh.schedule is ScheduleKind.ZB_V else sum(sizes, [])
        ends = list(itertools.accumulate(flat))
        yield replace(mesh, stage_layers=tuple((e - s, e) for e, s in zip(ends, flat, strict=True)))


def plans(
    graph: ModelGraph, num_gpus: int, batch: int, limits: Limits, strategies: tuple[LayerStrategy, ...]
) -> Iterator[PlanSpec]:
    """Every plan; equal layers of a rank are interchangeable, so strategies are taken in sorted order there."""
    for mesh in meshes(graph, num_gpus, batch):
        names = {"sp": "sequence_parallel", "zero": "zero_stage"}
        if any(getattr(mesh, names.get(n, n)) != v for n, v in limits.fixed.items()):
            continue
        if "offload_optimizer" in limits.forbidden and mesh.offload_optimizer:
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
    binds: bool = False  # whether memory keeps the plan from being the one that it would be with room


NO_OPTIMIZER = ("offload_optimizer",)
CASES = [
    Case(graph="dense", gpus=4, batch=4, memory_gb=80, forbidden=NO_OPTIMIZER,
         fixed=(("pp", 2), ("micro_batch_size", 1))),
    Case(graph="dense", gpus=4, batch=8, memory_gb=1.6, forbidden=NO_OPTIMIZER, binds=True,
         fixed=(("pp", 2), ("tp", 1), ("ring", 1), ("zero_stage", 1))),
    Case(graph="dense", gpus=4, batch=8, memory_gb=1.3, forbidden=NO_OPTIMIZER, binds=True,
         fixed=(("pp", 2), ("tp", 2), ("sp", 1))),
    Case(graph="dense", gpus=4, batch=4, memory_gb=0.7, fixed=(("pp", 1), ("tp", 2)), binds=True),
    Case(graph="dense", gpus=2, batch=4, memory_gb=2.5, fixed=(("pp", 2), ("micro_batch_size", 1), ("zero_stage", 0)),
         offload=True, host_gb=0.4, binds=True),
    Case(graph="dense", gpus=8, batch=8, memory_gb=1.15, forbidden=NO_OPTIMIZER, binds=True,
         fixed=(("pp", 4), ("tp", 1), ("ulysses", 1), ("zero_stage", 1))),
    Case(graph="deep", gpus=16, batch=16, memory_gb=1.3, forbidden=NO_OPTIMIZER, binds=True,
         fixed=(("pp", 4), ("tp", 2), ("cp", 1), ("micro_batch_size", 1), ("sp", 1), ("vocab_parallel", 1),
                ("schedule", "1f1b"), ("zero_stage", 1))),
    Case(graph="wide", gpus=4, batch=4, memory_gb=6, forbidden=NO_OPTIMIZER, binds=True,
         fixed=(("pp", 2), ("micro_batch_size", 1), ("cp", 1), ("zero_stage", 1))),
    Case(graph="mixed", gpus=4, batch=4, memory_gb=80, forbidden=NO_OPTIMIZER,
         fixed=(("pp", 2), ("tp", 1), ("micro_batch_size", 1), ("ep", 2), ("ring", 1), ("zero_stage", 1))),
    Case(graph="mixed", gpus=4, batch=8, memory_gb=2.2, forbidden=NO_OPTIMIZER, binds=True,
         fixed=(("pp", 2), ("tp", 1), ("micro_batch_size", 1), ("cp", 1), ("ep", 2))),
]  # fmt: skip


def run(case: Case, options: SearchOptions = EXACT) -> tuple[ModelGraph, Machine, Limits, SearchResult]:
    graphs = {"dense": dense_graph(), "deep": dense_graph(6), "mixed": mixed_graph(), "wide": wide_graph()}
    graph = graphs[case.graph]
    machine = small_machine(graph, case.gpus, case.memory_gb * 1e9, case.host_gb * 1e9)
    forbidden = frozenset(case.forbidden) | (frozenset() if case.offload else {"offload_activations"})
    fixed = {("zero" if name == "zero_stage" else name): value for name, value in case.fixed}
    limits = Limits(fixed=fixed, forbidden=forbidden)
    return graph, machine, limits, search(graph, machine, case.batch, limits, options)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.graph}-{c.gpus}-{c.memory_gb}")
def test_search_equals_brute_force(case: Case) -> None:
    graph, machine, limits, result = run(case)
    best, count = brute_force(graph, machine, case.batch, limits, STRATEGIES if case.offload else PLAIN)
    assert count > 100
    assert result.stop_reason == "exhausted"
    assert result.plans[0].step_s == pytest.approx(best, rel=1e-9)
    assert result.plans[0].spec.chunked_loss == (case.graph == "wide")
    assert result.lower_bound_s <= best * (1 + 1e-9)
    assert result.lower_bound_s == pytest.approx(best, rel=1e-6)
    *_, roomy = run(replace(case, memory_gb=1e3, host_gb=1e6))
    assert (roomy.plans[0].step_s < best * (1 - 1e-6)) == case.binds


WIDE = Case(graph="dense", gpus=8, batch=16, memory_gb=1.2)


def best_s(machine: Machine, graph: ModelGraph | None = None, batch: int = 16, gap_frac: float = 0.0) -> float:
    options = replace(EXACT, gap_frac=gap_frac)
    return search(graph or dense_graph(), machine, batch, Limits(), options).plans[0].step_s


def test_the_gap_is_kept() -> None:
    """A search that may stop early never claims more than the exhausted one proves."""
    *_, exact = run(WIDE)
    for gap in (0.01, 0.05, 0.2):
        *_, early = run(WIDE, replace(EXACT, gap_frac=gap))
        assert early.lower_bound_s <= exact.plans[0].step_s * (1 + 1e-9)
        assert early.plans[0].step_s >= exact.plans[0].step_s * (1 - 1e-9)
        assert 1 - early.lower_bound_s / early.plans[0].step_s <= gap + 1e-9
        assert early.gap_frac == pytest.approx(1 - early.lower_bound_s / early.plans[0].step_s)


def test_every_candidate_is_accounted_for() -> None:
    *_, result = run(WIDE)
    assert result.ledger["open"] == 0
    assert sum(result.ledger.values()) == result.num_candidates
    assert min(result.ledger.values()) >= 0


def test_a_faster_machine_is_never_slower_at_the_optimum() -> None:
    graph = dense_graph()
    machine = small_machine(graph, 8, 1.2e9)
    cluster = machine.cluster
    rates = {k: replace(q, value=2 * q.value) for k, q in cluster.device.peak_flops_per_s.items()}
    faster = replace(machine, cluster=replace(cluster, device=replace(cluster.device, peak_flops_per_s=rates)))
    tiers = tuple(
        replace(t, bandwidth_bytes_per_s=replace(t.bandwidth_bytes_per_s, value=2 * t.bandwidth_bytes_per_s.value))
        for t in cluster.tiers
    )
    wider = replace(machine, cluster=replace(cluster, tiers=tiers))
    roomier = small_machine(graph, 8, 2.4e9)
    base = best_s(machine)
    assert best_s(faster) < base
    assert best_s(wider) <= base * (1 + 1e-12)
    assert best_s(roomier) <= base * (1 + 1e-12)


def test_equal_layers_in_other_runs_give_the_same_plan() -> None:
    graph = dense_graph()
    run_ = graph.runs[0]
    split = (replace(run_, count=1, paths=run_.paths[:1]), replace(run_, count=3, paths=run_.paths[1:]))
    other = replace(graph, runs=split)
    first, second = (
        search(g, small_machine(g, 8, 1.2e9), 16, Limits(), EXACT).plans[0].spec for g in (graph, other)
    )
    assert first == second


def test_doubling_gpus_never_lowers_the_proved_throughput() -> None:
    graph, gap = dense_graph(), 0.01
    times = [best_s(small_machine(graph, n, 2e9), graph, 16, gap) for n in (2, 4, 8, 16)]
    for half, whole in zip(times, times[1:], strict=False):
        assert whole <= half * (1 + gap)


def test_an_infeasible_model_says_by_how_much() -> None:
    graph = dense_graph()
    result = search(graph, small_machine(graph, 2, 0.1e9, 1e9), 4, Limits(), EXACT)
    assert result.stop_reason == "infeasible" and not result.plans
    assert result.shortfall_bytes is not None and 0 < result.shortfall_bytes < 20e9


def test_an_empty_space_is_infeasible() -> None:
    graph = dense_graph()
    result = search(graph, small_machine(graph, 8, 80e9), 7, Limits(fixed={"pp": 8}), EXACT)
    assert result.stop_reason == "infeasible" and result.num_candidates == 0


def test_a_time_limit_leaves_an_honest_gap() -> None:
    graph = dense_graph()
    ticks = iter(range(10**6))
    machine = small_machine(graph, 8, 1.2e9)
    late = search(graph, machine, 16, Limits(), replace(EXACT, time_limit_s=1.5), clock=lambda: float(next(ticks)))
    assert late.stop_reason == "time_limit"
    assert late.ledger["open"] > 0
    assert late.lower_bound_s <= best_s(machine) * (1 + 1e-9)


def test_an_interrupted_search_returns_what_it_has() -> None:
    graph = dense_graph()

    def stop(progress: Progress) -> None:
        if progress.best_s is not None:
            raise KeyboardInterrupt

    result = search(graph, small_machine(graph, 8, 1.2e9), 16, Limits(), EXACT, on_progress=stop)
    assert result.stop_reason == "interrupted"
    assert result.plans and result.lower_bound_s <= result.plans[0].step_s


def test_limits_are_kept() -> None:
    graph = dense_graph()
    machine = small_machine(graph, 8, 1.2e9)
    fixed: dict[str, int | str] = {"tp": 2, "pp": 2, "zero": 1, "schedule": "1f1b", "recompute": "full"}
    spec = search(graph, machine, 16, Limits(fixed=fixed), EXACT).plans[0].spec
    assert (spec.tp, spec.pp, spec.zero_stage, spec.schedule) == (2, 2, 1, ScheduleKind.ONE_F_ONE_B)
    assert {layer.recompute for layer in spec.layers} == {"full"}
    forbidden = frozenset({"tp", "cp", "recompute", "offload"})
    spec = search(graph, small_machine(graph, 8, 8e9), 16, Limits(forbidden=forbidden), EXACT).plans[0].spec
    assert (spec.tp, spec.cp, spec.offload_optimizer) == (1, 1, False)
    assert set(spec.layers) == {LayerStrategy(recompute="none")}


def test_combinations_are_kept_apart() -> None:
    graph = dense_graph()
    machine = small_machine(graph, 4, 1.8e9)
    fixed: dict[str, int | str] = {"pp": 2, "tp": 1, "cp": 1}
    free = search(graph, machine, 8, Limits(fixed=fixed), EXACT).plans[0]
    used = {name for layer in free.spec.layers for name in strategy_uses(layer)} | {free.spec.schedule.value}
    apart = tuple(frozenset({kind, free.spec.schedule.value}) for kind in used & {"selective", "full"})
    assert apart
    other = search(graph, machine, 8, Limits(fixed=fixed, combinations=apart), EXACT).plans[0]
    assert other.step_s >= free.step_s
    names = {name for layer in other.spec.layers for name in strategy_uses(layer)} | {other.spec.schedule.value}
    assert not any(pair <= names for pair in apart)


def test_a_heavy_head_does_not_break_the_bound() -> None:
    """The head costs several layers, so that the best bottleneck is far from an even share of the layers."""
    shape = replace(DENSE, num_layers=12, hidden=768, ffn=3072, heads=12, kv_heads=4, head_dim=64, vocab=128_256)
    graph = build_graph(replace(shape, seq_len=4096))
    machine = small_machine(graph, 4, 80e9)
    fixed: dict[str, int | str] = {"tp": 1, "cp": 1, "micro_batch_size": 1, "pp": 4, "schedule": "1f1b"}
    limits = Limits(fixed=fixed, forbidden=frozenset(NO_OPTIMIZER))
    found = search(graph, machine, 16, limits, EXACT).plans[0]
    mesh = replace(found.spec, stage_layers=(), layers=(LayerStrategy(recompute="none"),) * 12)
    every = estimate_many(graph, machine, list(partitions(mesh, graph)))
    assert found.step_s == pytest.approx(min(e.step_s for e in every), rel=1e-9)


def test_a_slow_strategy_still_fits() -> None:
    graph = dense_graph()
    fixed: dict[str, int | str] = {"recompute": "none", "offload_activations": 1, "tp": 1, "cp": 1}
    result = search(graph, small_machine(graph, 4, 80e9), 16, Limits(fixed=fixed), EXACT)
    assert result.plans and result.ledger["does_not_fit"] == 0


def test_schedules_that_exclude_options_do_not_exclude_them_for_others() -> None:
    graph = dense_graph()
    machine = small_machine(graph, 4, 1.8e9)
    fixed: dict[str, int | str] = {"pp": 2, "tp": 1, "cp": 1, "zero": 1}
    apart = tuple(frozenset({kind, s}) for kind in ("zb_h1", "zb_v") for s in ("selective", "full"))
    alone = [
        search(graph, machine, 8, Limits(fixed=fixed | {"schedule": kind}), EXACT) for kind in ("1f1b", "interleaved")
    ]
    best = min(found.step_s for result in alone for found in result.plans)
    together = search(graph, machine, 8, Limits(fixed=fixed, combinations=apart), EXACT)
    assert together.plans[0].step_s <= best * (1 + 1e-9)


def test_no_layout_at_all_is_infeasible() -> None:
    graph = dense_graph()
    result = search(graph, small_machine(graph, 1, 80e9), 8, Limits(fixed={"zero": 3}), EXACT)
    assert result.stop_reason == "infeasible"


@pytest.mark.parametrize("name", ["candidate_bounds", "solve"])
def test_an_interrupted_step_proves_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = dense_graph()
    machine = small_machine(graph, 8, 1.2e9)
    optimum = best_s(machine)
    module = planner.search.bounds if name == "candidate_bounds" else planner.search
    original = getattr(module, name)
    for last in (1, 2, 3):
        calls = itertools.count(1)

        def interrupted(*args: Any, calls: Any = calls, last: int = last) -> Any:
            if next(calls) == last:
                raise KeyboardInterrupt
            return original(*args)

        monkeypatch.setattr(module, name, lambda *args, run=interrupted, **named: run(*args, *named.values()))
        result = search(graph, machine, 16, Limits(), EXACT)
        assert result.lower_bound_s <= optimum * (1 + 1e-9)
        assert result.ledger["closed_by_bound"] + result.ledger["open"] >= 0
