"""Simulator study: adaptive groups against static plans on FlexSP's 18 workloads and ByteScale-like mixes.

`python -m planner.reports.seqlen_study [flexsp|bytescale]` writes reports/seqlen_study.md and its plot. Every figure is
a prediction of our cost model; published speed-ups stand beside and tuned nothing. Limits of time are CPU seconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from planner.batch import IntArray, Table
from planner.costmodel.engine import get_engine
from planner.costmodel.estimate import machine_for, model_facts
from planner.costmodel.hardware import ClusterSpec
from planner.costmodel.presets import load_cluster
from planner.costmodel.sequences import DataShape, GroupCost, Menu, core, menu, without_dominated
from planner.dispatch import DoesNotFit, dispatch, placed_dispatch
from planner.distributions import named
from planner.layouts import SPARE_FRAC, shapes_of
from planner.lengths import Lengths
from planner.pool import best_single, static_bounds_s
from planner.reports.rows import Row as Cells
from planner.reports.seqlen_text import PUBLISHED, Row, name_of, plot, text
from planner.reports.shapes import Shape, build_graph
from planner.reports.systems import cluster_of
from planner.space import Limits

HERE = Path(__file__).parent
K = 1024
CORPORA = {"github": "github", "commoncrawl": "refinedweb", "wikipedia": "wikipedia"}
GPTS = {"7B": (32, 4096), "13B": (40, 5120), "30B": (60, 6656)}
BATCHES, SEQUENCES, USABLE_FRAC = 3, 512, 0.92
PARTS = (1.0, 0.5, 0.25, 0.125)  # of a rank's room, for what hybrid CP lets a sequence take of it
TENSOR_DEGREES = (8, 16)  # of the Megatron-like baseline: what FlexSP ran, and what keeps tp in a node
# What FlexSP's rows say of their cluster: a node's eight GPUs share 400 Gb/s (two InfiniBand ports), a quarter of what
# a DGX A100 has.
FLEXSP_CELLS = {"gpu": "A100-40GB-SXM", "gpus_per_node": "8", "inter_node": "400 Gbps IB"}


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


def flexsp() -> Iterator[Workload]:
    """The 18 workloads: 512 sequences a step on 64 A100-40GB."""
    cluster = cluster_of(Cells(FLEXSP_CELLS))
    for longest, corpus in dict.fromkeys((longest, corpus) for longest, corpus, _ in PUBLISHED):
        lengths = named(CORPORA[corpus]).cut(longest * K)
        batches = tuple(lengths.sample(SEQUENCES, seed) for seed in range(BATCHES))
        for model, sizes in GPTS.items():
            yield Workload(
                name=name_of(longest, corpus, model), shape=gpt(*sizes, longest * K), cluster=cluster, gpus=64,
                lengths=lengths, batches=batches, zero=3, as_run=(64, 1) if longest == 384 else None,
            )  # fmt: skip


def bytescale() -> Iterator[Workload]:
    """A Llama-7B-like model on H800, 2M context: 32M tokens a step on 1,024 GPUs as published, elsewhere 8K a GPU."""
    shape = Shape(num_layers=32, hidden=4096, ffn=11_008, heads=32, kv_heads=32, head_dim=128, vocab=32_000,
                  seq_len=2048 * K, gated=True, tied=False, rotary=True)  # fmt: skip
    for corpus in ("byted", "github"):
        for gpus in (1024, 4096, 12_288):
            lengths, tokens = named(corpus).cut(2048 * K), 32_000_000 if gpus == 1024 else gpus * 8 * K
            yield Workload(
                name=f"7B 2M {corpus}, {gpus:,} GPUs", shape=shape, cluster=load_cluster("h800"), gpus=gpus,
                lengths=lengths, batches=lengths.batches(BATCHES, tokens, 0), zero=1, limit_s=10.0, as_run=(1, 256),
            )  # fmt: skip


# ---- systems


def menus(work: Workload, shape: DataShape, keep: Callable[[int, int], bool] = lambda u, r: True) -> Menu:
    """Kinds of groups of one state layout whose (ulysses, ring) `keep` accepts."""
    graph = build_graph(work.shape)
    machine = machine_for(graph, work.cluster, get_engine("planner"), work.gpus)
    limits = Limits(fixed={"tp": shape.tp, "pp": shape.pp})
    found = dict((s.tp, degrees) for s, degrees in shapes_of(graph, work.gpus, limits))
    degrees = tuple(d for d in found[shape.tp] if keep(*d))
    tokens = float(np.mean([b.sum() for b in work.batches]))
    usable = machine.cluster.device.memory_bytes.value * USABLE_FRAC
    facts = model_facts(graph, machine.engine)
    return menu(graph, facts, machine, shape, degrees, work.lengths.longest_tokens, tokens, usable)


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


def dispatched_s(work: Workload, kinds: Menu, limit_s: float) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
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
    everything = menus(work, DataShape(zero_stage=work.zero))
    ulysses = only(everything, lambda g: g.ring == 1 and in_memory(g))
    tensor = [
        DataShape(tp=tp, sequence_parallel=True, vocab_parallel=True, zero_stage=1) for tp in TENSOR_DEGREES
    ]  # fmt: skip
    megatron = [only(menus(work, shape, lambda u, r: u == 1), in_memory) for shape in tensor]
    adaptive = dispatched_s(work, everything, work.limit_s)
    assert adaptive is not None
    alike = by_recomputation(ulysses) if work.zero == 3 else []  # FlexSP's layout
    flexsp_like = [found[0] for kinds in alike if (found := dispatched_s(work, kinds, work.limit_s / 2))]
    own, tensors = static_s(work, everything), least_s(*(static_s(work, found) for found in megatron))
    as_run = only(everything, lambda g: (g.ulysses, g.ring) == work.as_run and in_memory(g))
    holding = only(everything, lambda g: g.capacity_tokens >= work.lengths.longest_tokens)
    least = 0.0 if own is None else float(static_bounds_s(holding, work.batches).min())
    return Row(
        name=work.name,
        step_s={
            "adaptive": adaptive[0], "best static": least_s(own, tensors), "flexsp-like": least_s(*flexsp_like),
            "batch-adaptive": least_s(*(batch_adaptive_s(work, kinds) for kinds in alike)),
            "ulysses static": static_s(work, ulysses), "as run": static_s(work, as_run),
            "tp x cp static": tensors, "hybrid cp": hybrid_s(work, megatron[0]),
        },
        gap_frac=adaptive[1], static_gap_frac=0.0 if own is None else max(0.0, 1 - least / float(np.mean(own))),
        tokens=float(np.mean([b.sum() for b in work.batches])),
    )  # fmt: skip


# ---- report


def main() -> None:
    """Simulate what reports/seqlen_study.json does not hold yet, keep every row there, and write the report."""
    which = sys.argv[1:] or ["flexsp", "bytescale"]
    kept = HERE / "seqlen_study.json"
    data: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    for family in which:
        rows = data.setdefault(family, {})
        for work in list(flexsp() if family == "flexsp" else bytescale()):
            if work.name in rows:
                continue
            start_s = time.process_time()
            row = simulate(work)
            rows[work.name] = row.data()
            print(f"{row.name}: {time.process_time() - start_s:.1f} CPU s", row.data(), flush=True)
            kept.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
            write(data)


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
