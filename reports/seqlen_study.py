"""Simulator study: adaptive groups against static plans on FlexSP's 18 workloads and ByteScale-like mixes.

`python -m planner.reports.seqlen_study [FAMILY ...]` simulates every row (of bytescale, flexsp, longer), a process a
core, and writes reports/seqlen_study.md, its JSON and its plot. Every figure is a prediction of our cost model;
published speed-ups stand beside and tuned nothing. Limits of time are CPU seconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from planner.batch import IntArray, Table
from planner.costmodel.engine import get_engine
from planner.costmodel.estimate import machine_for, model_facts
from planner.costmodel.hardware import ClusterSpec
from planner.costmodel.presets import load_cluster
from planner.costmodel.sequence_attention import AttentionPrices
from planner.costmodel.sequences import DataShape, GroupCost, Menu, core, menu, without_dominated
from planner.costmodel.units import GB
from planner.dispatch import DoesNotFit, dispatch, placed_dispatch
from planner.distributions import named
from planner.layouts import SPARE_FRAC, shapes_of
from planner.lengths import Lengths
from planner.pool import Pool, best_single, first_bound_s, static_bounds_s
from planner.reports.rows import Row as Cells
from planner.reports.seqlen_text import ALL_TO_ALL, PUBLISHED, Row, all_to_all_rate, name_of, plot, text
from planner.reports.shapes import Shape, build_graph
from planner.reports.systems import cluster_of
from planner.space import Limits

HERE = Path(__file__).parent
K = 1024
CORPORA = {"github": "github", "commoncrawl": "refinedweb", "wikipedia": "wikipedia"}
GPTS = {"7B": (32, 4096), "13B": (40, 5120), "30B": (60, 6656)}
BATCHES, SEQUENCES, USABLE_FRAC = 20, 512, 0.92
LARGE_BATCHES = 3  # of ByteScale's
LAYOUTS, LAYOUT_BATCHES = 4, 3  # tried for adaptive groups, those with the least bounds, and on how many batches
PARTS = (1.0, 0.5, 0.25, 0.125)  # of a rank's room, for what hybrid CP lets a sequence take of it
TENSOR_DEGREES = (8, 16)  # of the Megatron-like baseline: what FlexSP ran, and what keeps tp in a node
# What FlexSP's rows say of their cluster: a node's eight GPUs share 400 Gb/s (two InfiniBand ports), a quarter of what
# a DGX A100 has.
FLEXSP_CELLS = {"gpu": "A100-40GB-SXM", "gpus_per_node": "8", "inter_node": "400 Gbps IB"}


Dispatched = tuple[tuple[float, ...], tuple[float, ...]]  # seconds and gap of each batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A model on a cluster with lengths; `batches` are the same for every system.

    `limit_s`: of the dispatcher, a batch. `as_run`: (ulysses, ring) of the publication's static plan, where it says.
    """

    name: str
    shape: Shape
    cluster: ClusterSpec
    gpus: int
    lengths: Lengths
    batches: tuple[IntArray, ...]
    zero: int
    limit_s: float = 2.0
    as_run: tuple[int, int] | None = None


def gpt(layers: int, hidden: int, longest: int) -> Shape:
    """FlexSP's GPTs: 64 heads, so that Ulysses reaches 64; the vocabulary padded as Megatron does."""
    return Shape(num_layers=layers, hidden=hidden, ffn=4 * hidden, heads=64, kv_heads=64, head_dim=hidden // 64,
                 vocab=51_200, seq_len=longest, gated=False, tied=False, rotary=False)  # fmt: skip


def flexsp(times: int = 1, suffix: str = "") -> Iterator[Workload]:
    """The 18 workloads: 512 sequences a step on 64 A100-40GB, each `times` as long as its corpus says."""
    cluster = cluster_of(Cells(FLEXSP_CELLS))
    for longest, corpus in dict.fromkeys((longest, corpus) for longest, corpus, _ in PUBLISHED):
        whole = named(CORPORA[corpus])
        lengths = replace(whole, tokens_N=times * whole.tokens_N).cut(longest * K)
        batches = tuple(lengths.sample(SEQUENCES, seed) for seed in range(BATCHES))
        for model, sizes in GPTS.items():
            yield Workload(
                name=name_of(longest, corpus, model) + suffix, shape=gpt(*sizes, longest * K), cluster=cluster, gpus=64,
                lengths=lengths, batches=batches, zero=3, as_run=(64, 1) if longest == 384 else None,
            )  # fmt: skip


def longer() -> Iterator[Workload]:
    """GitHub at 192K with about as many tokens as FlexSP's step times imply, and then with their all-to-all too."""
    for work in flexsp(4, ", four times as long"):
        if work.name.split(",")[0] in ("GPT-7B 192K github", "GPT-13B 192K github"):
            yield work
            yield replace(work, name=work.name + ", their all-to-all", cluster=_their_all_to_all(work.cluster))


def _their_all_to_all(cluster: ClusterSpec) -> ClusterSpec:
    """The cluster with an all-to-all between nodes as slow as FlexSP's solver has it over all 64 GPUs."""
    outer = cluster.tiers[-1]
    fit = outer.collectives["all_to_all"]
    slower = replace(fit, efficiency=fit.efficiency * ALL_TO_ALL[64] * GB / all_to_all_rate(cluster, 64))
    return replace(
        cluster, tiers=(*cluster.tiers[:-1], replace(outer, collectives={**outer.collectives, "all_to_all": slower}))
    )


def bytescale() -> Iterator[Workload]:
    """A LLaMA-7B with grouped queries on H800, 2M context: 32M tokens a step on 1,024 GPUs as published, elsewhere 8K a
    GPU.
    """
    shape = Shape(num_layers=32, hidden=4096, ffn=11_008, heads=32, kv_heads=8, head_dim=128, vocab=32_000,
                  seq_len=2048 * K, gated=True, tied=False, rotary=True)  # fmt: skip
    for corpus in ("byted", "github"):
        for gpus in (1024, 4096, 12_288):
            lengths, tokens = named(corpus).cut(2048 * K), 32_000_000 if gpus == 1024 else gpus * 8 * K
            batches = lengths.batches(LARGE_BATCHES, tokens, 0)
            yield Workload(
                name=f"7B 2M {corpus}, {gpus:,} GPUs", shape=shape, cluster=load_cluster("h800"), gpus=gpus,
                lengths=lengths, batches=batches, zero=1, limit_s=10.0, as_run=(1, 256),
            )  # fmt: skip


# ---- systems


class Pricing:
    """Menus of a workload's state layouts; attention is priced once for all of them."""

    def __init__(self, work: Workload) -> None:
        self.work, self.graph = work, build_graph(work.shape)
        self.machine = machine_for(self.graph, work.cluster, get_engine("planner"), work.gpus)
        self.facts = model_facts(self.graph, self.machine.engine)
        self.tokens = float(np.mean([b.sum() for b in work.batches]))
        self.prices = AttentionPrices(self.facts, self.machine, work.lengths.longest_tokens)
        self.shapes = shapes_of(self.graph, work.gpus, Limits())

    def menu(self, shape: DataShape, degrees: tuple[tuple[int, int], ...] | None = None) -> Menu:
        """Kinds of groups of a layout; `degrees`: (ulysses, ring) that there may be, without it all."""
        if degrees is None:
            degrees = next(found for s, found in self.shapes if (s.tp, s.pp) == (shape.tp, shape.pp))
        usable = self.machine.cluster.device.memory_bytes.value * USABLE_FRAC
        longest = self.work.lengths.longest_tokens
        return menu(
            self.graph, self.facts, self.machine, shape, degrees, longest, self.tokens, usable, self.prices
        )  # fmt: skip

    def holding(self) -> list[tuple[DataShape, Menu]]:
        """Layouts that hold the longest sequence."""
        longest, found = self.work.lengths.longest_tokens, []
        for shape, degrees in self.shapes:
            kinds = self.menu(shape, degrees)
            if any(group.capacity_tokens >= longest for group in kinds.groups):
                found.append((shape, kinds))
        return found

    def static(self, layouts: list[tuple[DataShape, Menu]]) -> tuple[DataShape, tuple[float, ...], float]:
        """(layout, seconds of each batch, bound on the mean) of the best static plan of all layouts."""
        batches, longest = self.work.batches, self.work.lengths.longest_tokens
        held = [(shape, only(kinds, lambda g: g.capacity_tokens >= longest)) for shape, kinds in layouts]
        bounds = [float(static_bounds_s(kinds, batches).min()) for _, kinds in held]
        best: tuple[DataShape, tuple[float, ...]] | None = None
        for at in np.argsort(bounds, kind="stable"):
            shape, kinds = held[at]
            if best is not None and bounds[at] >= np.mean(best[1]):
                break
            found = best_single(kinds, batches, longest)
            if found is not None and (best is None or found.mean_s < np.mean(best[1])):
                best = shape, found.step_s
        assert best is not None
        return *best, min(bounds)

    def adaptive(self, layouts: list[tuple[DataShape, Menu]], static: DataShape) -> Dispatched:
        """The dispatches of the layout that does best on a few batches, of those with the least bounds and `static`."""
        work = replace(self.work, batches=self.work.batches[:LAYOUT_BATCHES])
        pool = Pool.of(work.batches)
        bounds = [first_bound_s(kinds, pool) + kinds.step_s for _, kinds in layouts]
        few = [layouts[at] for at in np.argsort(bounds, kind="stable")[:LAYOUTS]]
        tried = dict([*few, *((shape, kinds) for shape, kinds in layouts if shape == static)])
        found = {shape: dispatched_s(work, kinds, work.limit_s) for shape, kinds in tried.items()}
        best = min((shape for shape in tried if found[shape]), key=lambda shape: sum(found[shape][0]))
        whole = dispatched_s(self.work, tried[best], work.limit_s)
        assert whole is not None
        return whole


def only(found: Menu, keep: Callable[[GroupCost], bool]) -> Menu:
    """The kinds that `keep` accepts."""
    return replace(found, groups=tuple(group for group in found.groups if keep(group)))


def in_memory(group: GroupCost) -> bool:
    """Whether activations stay on the GPU, as in the baselines' published runs."""
    return not group.strategy.offload_activations


def static_s(work: Workload, kinds: Menu) -> tuple[float, ...] | None:
    """Seconds of each batch under the best single kind that holds the longest sequence; None if none does."""
    found = best_single(kinds, work.batches, work.lengths.longest_tokens)
    return None if found is None else found.step_s


def least_s(*found: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """The one with the least mean."""
    return min((steps for steps in found if steps is not None), key=sum, default=None)


def hybrid_s(work: Workload, kinds: Menu) -> tuple[float, ...] | None:
    """Megatron-Core's hybrid CP: every sequence on the fewest ranks that hold it at so many tokens each.

    The best of several numbers of tokens, and of groups that keep their ranks all step and groups that are formed
    anew for every micro-step; packed by our best fit.
    """
    return least_s(
        *(_fewest_ranks_s(work, replace(kinds, lockstep=regroup), part) for regroup in (False, True) for part in PARTS)
    )


def _fewest_ranks_s(work: Workload, kinds: Menu, part: float) -> tuple[float, ...] | None:
    """Seconds of each batch where a rank takes `part` of the tokens that it has room for, if so many ranks exist."""

    def fewest(table: Table) -> Table:
        holds = np.isfinite(table.seconds_NK)
        easily = holds & (table.tokens_N[:, None] <= part * table.room_K)
        least = np.where(easily, table.ranks_K, np.inf).min(axis=1)
        ranks = np.minimum(least, np.where(holds, table.ranks_K, 0.0).max(axis=1))
        kept = np.where(np.isfinite(least)[:, None], easily, holds) & (table.ranks_K == ranks[:, None])
        return replace(table, seconds_NK=np.where(kept, table.seconds_NK, np.inf))

    def one(batch: IntArray) -> float:
        limit_s = work.limit_s / len(PARTS)
        return placed_dispatch(kinds, batch, fewest, time_limit_s=limit_s, clock=time.process_time).step_s

    try:
        return tuple(one(batch) for batch in work.batches)
    except (DoesNotFit, ValueError):
        return None


def by_recomputation(kinds: Menu) -> list[Menu]:
    """The kinds of each strategy alone: what a system may use that recomputes alike in all groups."""
    strategies = dict.fromkeys(group.strategy for group in kinds.groups)
    return [only(kinds, lambda group: group.strategy == strategy) for strategy in strategies]  # noqa: B023


def batch_adaptive_s(work: Workload, kinds: Menu) -> tuple[float, ...] | None:
    """Seconds of each batch under the kind that does best for it; None if one fits none."""
    each = [best_single(kinds, (batch,), int(batch.max())) for batch in work.batches]
    return None if None in each else tuple(found.step_s[0] for found in each if found is not None)


def dispatched_s(work: Workload, kinds: Menu, limit_s: float) -> Dispatched | None:
    """(seconds, gap) of each batch over a small menu that the best single kind has joined; None if one does not fit."""
    single = best_single(kinds, work.batches, int(max(batch.max() for batch in work.batches)))
    if single is None:
        return None
    small, starts = single.joined(core(without_dominated(kinds, SPARE_FRAC), work.lengths.mean_tokens))
    answers = [
        dispatch(small, batch, gap_frac=0.005, time_limit_s=limit_s, start=start, clock=time.process_time)
        for batch, start in zip(work.batches, starts, strict=True)
    ]
    return tuple(d.step_s for d in answers), tuple(d.gap_frac for d in answers)


def simulate(work: Workload) -> Row:
    """Every system on every batch."""
    pricing, own = Pricing(work), DataShape(zero_stage=work.zero)
    everything = pricing.menu(own)
    layouts = pricing.holding()
    layout, static, least_static_s = pricing.static(layouts)
    adaptive_s, gaps = pricing.adaptive(layouts, layout)
    ulysses = only(everything, lambda g: g.ring == 1 and in_memory(g))
    alike = by_recomputation(ulysses) if work.zero == 3 else []  # FlexSP's layout
    flexsp_like = [found[0] for kinds in alike if (found := dispatched_s(work, kinds, work.limit_s / 2))]
    rings = only(everything, lambda g: g.ulysses == 1) if work.zero == 1 else replace(everything, groups=())
    bytescale_like = dispatched_s(work, rings, work.limit_s)
    tensor = [
        DataShape(tp=tp, sequence_parallel=True, vocab_parallel=True, zero_stage=1) for tp in TENSOR_DEGREES
    ]  # fmt: skip
    megatron = [only(pricing.menu(shape), lambda g: g.ulysses == 1 and in_memory(g)) for shape in tensor]
    as_run = only(everything, lambda g: (g.ulysses, g.ring) == work.as_run and in_memory(g))
    return Row(
        name=work.name,
        step_s={
            "adaptive": adaptive_s, "best static": static, "flexsp-like": least_s(*flexsp_like),
            "bytescale-like": None if bytescale_like is None else bytescale_like[0],
            "batch-adaptive": least_s(*(batch_adaptive_s(work, kinds) for kinds in alike)),
            "ulysses static": static_s(work, ulysses), "as run": static_s(work, as_run),
            "swap static": static_s(work, only(everything, lambda g: g.ring == 1)),
            "ring static": static_s(work, everything),
            "tp x cp static": least_s(*(static_s(work, kinds) for kinds in megatron)),
            "hybrid cp": hybrid_s(work, megatron[0]),
        },
        gap_frac=gaps, static_gap_frac=max(0.0, 1 - least_static_s / float(np.mean(static))), tokens=pricing.tokens,
    )  # fmt: skip


# ---- report


FAMILIES: dict[str, Callable[[], Iterator[Workload]]] = {"bytescale": bytescale, "flexsp": flexsp, "longer": longer}


def main() -> None:
    """Simulate the rows, keep those of other families from reports/seqlen_study.json, and write the report."""
    which = sys.argv[1:] or list(FAMILIES)
    kept = HERE / "seqlen_study.json"
    data: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    data.update((family, {}) for family in which)
    cases = [(family, at) for family in which for at, _ in enumerate(FAMILIES[family]())]
    with ProcessPoolExecutor() as pool:
        running = {pool.submit(simulated, *case): case for case in cases}
        for done in as_completed(running):
            row, cpu_s = done.result()
            data[running[done][0]][row.name] = row.data()
            print(f"{row.name}: {cpu_s:.0f} CPU s", row.data(), flush=True)
    kept.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
    write(data)


def simulated(family: str, at: int) -> tuple[Row, float]:
    """(the row of a family's workload, CPU seconds that it took)."""
    start_s = time.process_time()
    row = simulate(list(FAMILIES[family]())[at])
    return row, time.process_time() - start_s


def write(data: dict[str, dict[str, Any]]) -> None:
    """The report and its plot, rows in the order of the workloads."""
    order = [work.name for work in flexsp()]
    families = {
        family: [Row.of(name, rows[name]) for name in sorted(rows, key=[*order, *rows].index)]
        for family, rows in data.items()
    }
    head = (HERE / "seqlen_study_head.txt").read_text().splitlines()
    (HERE / "seqlen_study.md").write_text(text(head, families, cluster_of(Cells(FLEXSP_CELLS))))
    plot([row for rows in families.values() for row in rows], HERE / "plots" / "seqlen_study.png")


if __name__ == "__main__":
    main()
