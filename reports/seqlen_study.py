"""Simulator study: adaptive groups against static plans on FlexSP's 18 workloads and ByteScale-like mixes.

`python -m planner.reports.seqlen_study [flexsp|bytescale]` writes reports/seqlen_study.md and its plot. Every figure is
a prediction of our cost model; published speed-ups stand beside and tuned nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from planner.batch import IntArray, Table
from planner.bucketed import shapes_of
from planner.costmodel.engine import get_engine
from planner.costmodel.estimate import machine_for, model_facts
from planner.costmodel.presets import load_cluster
from planner.costmodel.sequences import DataShape, Menu, core, menu, without_dominated
from planner.dispatch import Dispatch, DoesNotFit, dispatch, placed_dispatch, static_dispatch
from planner.distributions import named
from planner.lengths import Lengths
from planner.reports.shapes import Shape, build_graph
from planner.space import Limits

HERE = Path(__file__).parent
K = 1024
# Published speed-up of FlexSP over (DeepSpeed, Megatron-LM), 64 GPUs: labels of figs/main-result in
# github:PKU-DAIR/Hetu-Galvatron@flexsp.
PUBLISHED = {
    (192, "github"): {"7B": (1.45, 1.43), "13B": (1.40, 1.38), "30B": (1.44, 1.44)},
    (192, "commoncrawl"): {"7B": (1.50, 1.66), "13B": (1.35, 1.55), "30B": (1.54, 1.58)},
    (192, "wikipedia"): {"7B": (1.72, 1.98), "13B": (1.59, 1.79), "30B": (1.64, 1.95)},
    (384, "github"): {"7B": (1.26, 1.47), "13B": (1.29, 1.63), "30B": (1.22, 1.40)},
    (384, "commoncrawl"): {"7B": (1.42, 1.77), "13B": (1.37, 1.70), "30B": (1.33, 1.60)},
    (384, "wikipedia"): {"7B": (1.46, 1.77), "13B": (1.43, 1.77), "30B": (1.53, 1.85)},
}
CORPORA = {"github": "github", "commoncrawl": "refinedweb", "wikipedia": "wikipedia"}
GPTS = {"7B": (32, 4096), "13B": (40, 5120), "30B": (60, 6656)}
SYSTEMS = ("adaptive", "batch-adaptive", "best static", "ulysses static", "tp x cp static", "hybrid cp")
BATCHES, SEQUENCES, USABLE_FRAC, TRIED, LIMIT_S = 3, 512, 0.92, 3, 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A model on a cluster with lengths; `batches` are the same for every system."""

    name: str
    shape: Shape
    cluster: str
    gpus: int
    lengths: Lengths
    batches: tuple[IntArray, ...]
    zero: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Mean step seconds by system (None: it does not fit), and the mean gap of the adaptive dispatches."""

    name: str
    step_s: dict[str, float | None]
    gap_frac: float
    tokens: float

    def speedup(self, system: str) -> float | None:
        """How much faster the adaptive plan is than `system`."""
        other, own = self.step_s[system], self.step_s["adaptive"]
        return None if other is None or own is None else other / own


def gpt(layers: int, hidden: int, longest: int) -> Shape:
    """FlexSP's GPTs: 64 heads, so that Ulysses reaches 64; the vocabulary padded as Megatron does."""
    return Shape(num_layers=layers, hidden=hidden, ffn=4 * hidden, heads=64, kv_heads=64, head_dim=hidden // 64,
                 vocab=51_200, seq_len=longest, gated=False, tied=False, rotary=False)  # fmt: skip


def flexsp() -> Iterator[tuple[Workload, tuple[float, float]]]:
    """The 18 workloads: 512 sequences a step on 64 A100-40GB, with the published speed-ups."""
    for (longest, corpus), published in PUBLISHED.items():
        lengths = named(CORPORA[corpus]).cut(longest * K)
        batches = tuple(lengths.sample(SEQUENCES, seed) for seed in range(BATCHES))
        for model, speedups in published.items():
            shape = gpt(*GPTS[model], longest * K)
            name = f"GPT-{model} {longest}K {corpus}"
            yield Workload(name=name, shape=shape, cluster="a100-40gb", gpus=64, lengths=lengths, batches=batches,
                           zero=3), speedups  # fmt: skip


def bytescale() -> Iterator[Workload]:
    """A Llama-7B-like model on H800, 2M context, about 8K tokens a GPU and step."""
    shape = Shape(num_layers=32, hidden=4096, ffn=11_008, heads=32, kv_heads=32, head_dim=128, vocab=32_000,
                  seq_len=2048 * K, gated=True, tied=False, rotary=True)  # fmt: skip
    for corpus in ("byted", "github"):
        for gpus in (1024, 4096, 12_288):
            lengths = named(corpus).cut(2048 * K)
            batches = lengths.batches(2, gpus * 8 * K, 0)
            yield Workload(name=f"7B 2M {corpus}, {gpus:,} GPUs", shape=shape, cluster="h800", gpus=gpus,
                           lengths=lengths, batches=batches, zero=1)  # fmt: skip


# ---- systems


def menus(work: Workload, shape: DataShape, keep: Callable[[int, int], bool] = lambda u, r: True) -> Menu:
    """Kinds of groups of one state layout whose (ulysses, ring) `keep` accepts."""
    graph = build_graph(work.shape)
    machine = machine_for(graph, load_cluster(work.cluster), get_engine("planner"), work.gpus)
    limits = Limits(fixed={"tp": shape.tp, "pp": shape.pp})
    found = dict((s.tp, degrees) for s, degrees in shapes_of(graph, work.gpus, limits))
    degrees = tuple(d for d in found[shape.tp] if keep(*d))
    tokens = float(np.mean([b.sum() for b in work.batches]))
    usable = machine.cluster.device.memory_bytes.value * USABLE_FRAC
    facts = model_facts(graph, machine.engine)
    return menu(graph, facts, machine, shape, degrees, work.lengths.longest_tokens, tokens, usable)


def without_swap(found: Menu) -> Menu:
    """Only kinds that keep activations on the GPU: what the baselines' published runs did."""
    return replace(found, groups=tuple(group for group in found.groups if not group.strategy.offload_activations))


def mean_s(found: list[Dispatch | None]) -> float | None:
    """Mean step, None if a batch does not fit."""
    steps = [d.step_s for d in found if d is not None]
    return float(np.mean(steps)) if len(steps) == len(found) else None


def least_s(kinds: Menu, k: int, batches: tuple[IntArray, ...]) -> float:
    """What groups of kind `k` alone cannot beat on average, and come close to."""
    group = kinds.groups[k]

    def one(batch: IntArray) -> float:
        steps = max(1.0, np.ceil(float(batch.sum()) * group.ranks / (group.capacity_tokens * kinds.num_ranks)))
        return float(group.sequence_s(batch).sum()) * group.ranks / kinds.num_ranks + steps * group.fixed_s

    return float(np.mean([one(batch) for batch in batches]))


def statics(work: Workload, kinds: Menu, longest: int) -> list[list[Dispatch | None]]:
    """Dispatches of the most promising kinds that hold `longest`, one list a kind."""
    holds = [k for k, group in enumerate(kinds.groups) if group.capacity_tokens >= longest]
    holds.sort(key=lambda k: least_s(kinds, k, work.batches))
    return [[static_dispatch(kinds, batch, k) for batch in work.batches] for k in holds[:TRIED]]


def best_static(work: Workload, kinds: Menu, longest: int) -> float | None:
    """Mean step of the best kind that holds `longest`."""
    means = [mean for found in statics(work, kinds, longest) if (mean := mean_s(found)) is not None]
    return min(means, default=None)


def hybrid(kinds: Menu, batch: IntArray) -> Dispatch:
    """Megatron-Core's hybrid CP over tp 8: every sequence on the fewest ranks that hold it; packed by our best fit."""

    def least(table: Table) -> Table:
        ranks = np.where(np.isfinite(table.seconds_NK), table.ranks_K, np.inf)
        own = ranks == ranks.min(axis=1, keepdims=True)
        return replace(table, seconds_NK=np.where(own, table.seconds_NK, np.inf))

    return placed_dispatch(kinds, batch, least)


def simulate(work: Workload) -> Row:
    """Every system on every batch."""
    base = DataShape(zero_stage=work.zero)
    typical, longest = work.lengths.mean_tokens, work.lengths.longest_tokens
    everything = without_dominated(menus(work, base), 0.01)
    kinds = core(everything, typical)
    adaptive = [dispatch(kinds, b, gap_frac=0.005, time_limit_s=LIMIT_S) for b in work.batches]
    any_kind = [found for found in (statics(replace(work, batches=(b,)), kinds, int(b.max())) for b in work.batches)]
    fastest = [min(d[0].step_s for d in found if d[0] is not None) for found in any_kind]
    ulysses = core(without_swap(menus(work, base, lambda u, r: r == 1)), typical)
    tensor = DataShape(tp=8, sequence_parallel=True, vocab_parallel=True, zero_stage=1)
    megatron = core(without_swap(menus(work, tensor, lambda u, r: u == 1)), typical)
    own, theirs = (best_static(work, found, longest) for found in (kinds, ulysses))
    step_s: dict[str, float | None] = {
        "adaptive": mean_s([*adaptive]),
        "batch-adaptive": float(np.mean(fastest)),
        "best static": min((s for s in (own, theirs) if s is not None), default=None),
        "ulysses static": theirs,
        "tp x cp static": best_static(work, megatron, longest),
        "hybrid cp": _fits(lambda: mean_s([hybrid(megatron, b) for b in work.batches])),
    }
    gap = float(np.mean([d.gap_frac for d in adaptive]))
    return Row(name=work.name, step_s=step_s, gap_frac=gap, tokens=float(np.mean([b.sum() for b in work.batches])))


def _fits(run: Callable[[], float | None]) -> float | None:
    try:
        return run()
    except (DoesNotFit, ValueError):
        return None


# ---- report


def table(rows: list[Row], published: dict[str, tuple[float, float]]) -> list[str]:
    """Markdown lines: seconds of every system, speed-ups, published speed-ups, gap."""
    head = ["workload", "tokens a step", *(f"{s} s" for s in SYSTEMS), "over ulysses (published)",
            "over tp x cp (published)", "over best static", "gap %"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        seconds = ["-" if (s := row.step_s[system]) is None else f"{s:.2f}" for system in SYSTEMS]
        said = published.get(row.name)
        over = [_beside(row.speedup(s), said and said[i]) for i, s in enumerate(("ulysses static", "tp x cp static"))]
        cells = [row.name, f"{row.tokens / 1e3:,.0f}K", *seconds, *over, _beside(row.speedup("best static"), None),
                 f"{100 * row.gap_frac:.1f}"]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _beside(ours: float | None, said: float | None) -> str:
    text = "-" if ours is None else f"{ours:.2f}"
    return text if said is None else f"{text} ({said:.2f})"


def plot(rows: list[Row], published: dict[str, tuple[float, float]], path: Path) -> None:
    """Speed-up over each baseline, predicted as bars and published as marks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(12, 7), sharex=True, layout="constrained")
    at = np.arange(len(rows))
    for i, (axis, system) in enumerate(zip(axes, ("ulysses static", "tp x cp static"), strict=True)):
        axis.bar(at, [row.speedup(system) or 0.0 for row in rows], color="#4878a8", label="predicted")
        marked = [(x, published[row.name][i]) for x, row in enumerate(rows) if row.name in published]
        if marked:
            axis.plot(*zip(*marked, strict=True), "D", color="#d1605e", label="published (FlexSP)")
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_ylabel(f"speed-up over {system}")
        axis.margins(y=0.3)
        axis.legend(loc="upper left", ncols=2, frameon=False)
    axes[-1].set_xticks(at, [row.name for row in rows], rotation=60, ha="right", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Simulate what reports/seqlen_study.json does not hold yet, keep every row there, and write the report."""
    which = sys.argv[1:] or ["flexsp", "bytescale"]
    kept = HERE / "seqlen_study.json"
    data = json.loads(kept.read_text()) if kept.exists() else {}
    for family in which:
        rows = data.setdefault(family, {})
        for work in [w for w, _ in flexsp()] if family == "flexsp" else list(bytescale()):
            if work.name in rows:
                continue
            row = simulate(work)
            rows[work.name] = {"step_s": row.step_s, "gap_frac": row.gap_frac, "tokens": row.tokens}
            print(row.name, rows[work.name], flush=True)
            kept.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
            write(data)


def write(data: dict[str, dict[str, dict[str, Any]]]) -> None:
    """The report and its plot, rows in the order of the workloads."""
    published = {work.name: said for work, said in flexsp()}
    families = {
        family: [Row(name=name, **rows[name]) for name in sorted(rows, key=[*published, *rows].index)]
        for family, rows in data.items()
    }
    lines = (HERE / "seqlen_study_head.txt").read_text().splitlines()
    for family, rows in families.items():
        lines += ["", f"## {family}", "", *table(rows, published)]
    (HERE / "seqlen_study.md").write_text("\n".join(lines) + "\n")
    everything = [row for rows in families.values() for row in rows]
    plot(everything, published, HERE / "plots" / "seqlen_study.png")


if __name__ == "__main__":
    main()
