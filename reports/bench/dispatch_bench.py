"""How good and how fast the dispatcher is: 200 batches of heavy-tailed mixes, and batches for 12,288 ranks.

    python -m planner.reports.bench.dispatch_bench

rewrites dispatch_bench.md and dispatch_bench.json beside this file. The batches are drawn with seeds 0, 1, ... and the
menus are those of the sequence-length study, joined by the static plan's kind; limits of time are the dispatcher's own,
in a process that has dispatched one batch before. Limits and times are CPU seconds of the dispatcher's one thread,
which other work on the machine changes little; the load is written down all the same.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from planner.batch import IntArray
from planner.costmodel.presets import load_cluster
from planner.costmodel.sequences import DataShape, Menu, core, without_dominated
from planner.dispatch import dispatch, static_dispatch
from planner.distributions import named
from planner.files import write_atomic
from planner.layouts import SPARE_FRAC
from planner.pool import best_single
from planner.reports.seqlen_study import GPTS, Pricing, Workload, bytescale, gpt

HERE = Path(__file__).resolve().parent
K = 1024
CORPORA, CUTS, SEQUENCES, RANKS, BATCHES = ("wikipedia", "github", "refinedweb", "byted"), (192, 384), 512, 64, 200
PLANNED = 3  # batches that the static plan of a mix is chosen for
LIMIT_S, GAP_MEDIAN_FRAC, GAP_P95_FRAC = 0.5, 0.01, 0.04
LARGE_RANKS, LARGE_LIMIT_S, LARGE_GAP_FRAC = 12_288, 5.0, 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One batch dispatched; `static_s`: seconds of the same step under the static plan."""

    mix: str
    seed: int
    num_sequences: int
    num_steps: int
    step_s: float
    static_s: float
    gap_frac: float
    search_s: float


def menu_of(work: Workload) -> Menu:
    """The kinds that a search would hand to the dispatcher; the last is that of the static plan.

    The static plan: the kind that holds the longest sequence and does best alone on the workload's batches.
    """
    kinds = Pricing(work).menu(DataShape(zero_stage=work.zero))
    static = best_single(kinds, work.batches, work.lengths.longest_tokens)
    assert static is not None
    return static.joined(core(without_dominated(kinds, SPARE_FRAC), work.lengths.mean_tokens))[0]


def small() -> Iterator[Workload]:
    """512 sequences on 64 A100-40GB: every corpus, cut and GPT of the study, and a production mix."""
    for corpus in CORPORA:
        for cut in CUTS:
            lengths = named(corpus).cut(cut * K)
            for model, (layers, hidden) in GPTS.items():
                yield Workload(
                    name=f"{corpus} {cut}K, GPT-{model}", shape=gpt(layers, hidden, cut * K),
                    cluster=load_cluster("a100-40gb"), gpus=RANKS, lengths=lengths,
                    batches=tuple(lengths.sample(SEQUENCES, seed) for seed in range(PLANNED)), zero=3,
                )  # fmt: skip


def run(mix: str, menu: Menu, batch: IntArray, seed: int, limit_s: float) -> Run:
    """Dispatch one batch."""
    kind = len(menu.groups) - 1
    found = dispatch(menu, batch, time_limit_s=limit_s, static_kind=kind, clock=time.process_time)
    static = static_dispatch(menu, batch, kind)
    assert static is not None
    return Run(
        mix=mix, seed=seed, num_sequences=len(batch), num_steps=len(found.steps), step_s=found.step_s,
        static_s=static.step_s, gap_frac=found.gap_frac, search_s=found.search_s,
    )  # fmt: skip


def small_runs() -> list[Run]:
    """The 200 batches, one of each mix in turn."""
    works = [(work, menu_of(work)) for work in small()]
    first, kinds = works[0]
    run(first.name, kinds, first.batches[0], 0, LIMIT_S)  # loads the solver
    found = []
    for number in range(BATCHES):
        work, kinds = works[number % len(works)]
        batch = work.lengths.sample(SEQUENCES, number)
        found.append(run(work.name, kinds, batch, number, LIMIT_S))
    return found


def large_runs() -> list[Run]:
    """Two batches of each ByteScale-like mix."""
    works = [work for work in bytescale() if work.gpus == LARGE_RANKS]
    return [
        run(work.name, menu, batch, seed, LARGE_LIMIT_S)
        for work in works
        for menu in (menu_of(work),)
        for seed, batch in enumerate(work.batches)
    ]


def _row(name: str, runs: list[Run]) -> str:
    gaps, times = (np.array([getattr(r, field) for r in runs]) for field in ("gap_frac", "search_s"))
    sizes, steps = {r.num_sequences for r in runs}, sorted({r.num_steps for r in runs})
    cells = [name, str(len(runs)), " to ".join(f"{s:,}" for s in sorted(sizes)[:: max(1, len(sizes) - 1)]),
             " to ".join(map(str, steps[:: max(1, len(steps) - 1)]))]  # fmt: skip
    cells += [f"{100 * value:.2f} %" for value in (np.median(gaps), np.quantile(gaps, 0.95), gaps.max())]
    cells += [f"{value:.2f}" for value in (np.median(times), times.max())]
    over = [r.static_s / r.step_s for r in runs]
    cells += [f"{value:.3f}" for value in (np.median(over), min(over))]
    return "| " + " | ".join(cells) + " |"


def text(small_: list[Run], large: list[Run], load: tuple[float, float]) -> str:
    """The page."""
    head = ["batches", "number", "sequences", "micro-steps", "median gap", "p95 gap", "largest gap", "median s",
            "largest s", "median over static", "least over static"]  # fmt: skip
    gaps = np.array([r.gap_frac for r in small_])
    in_time = max(r.search_s for r in small_) <= LIMIT_S
    met = np.median(gaps) <= GAP_MEDIAN_FRAC and np.quantile(gaps, 0.95) <= GAP_P95_FRAC and in_time
    never = min(r.static_s / r.step_s for r in (*small_, *large)) >= 1
    met_large = max(r.gap_frac for r in large) <= LARGE_GAP_FRAC and max(r.search_s for r in large) <= LARGE_LIMIT_S
    by_mix = {mix: [r for r in small_ if r.mix == mix] for mix in dict.fromkeys(r.mix for r in small_)}
    lines = [
        "# The dispatcher, timed", "",
        "`python -m planner.reports.bench.dispatch_bench` regenerates this page. Gap: how much of the step could at",
        "most be saved, as proved by the answer's own lower bound. Seconds: CPU time of the dispatcher, which has one",
        f"thread, per batch; its limit is {LIMIT_S:g} s for 64 ranks and {LARGE_LIMIT_S:g} s for 12,288, and it stops",
        "at a gap of 1 %. Over static: the step under the static plan, one kind of group for all batches, divided by",
        "the dispatch's.", "",
        f"Machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}; load average "
        f"{load[0]:.1f} before and", f"{load[1]:.1f} after.", "",
        f"Targets: 64 ranks in {LIMIT_S:g} s, median gap at most {100 * GAP_MEDIAN_FRAC:g} %, 95th percentile at most",
        f"{100 * GAP_P95_FRAC:g} %: {'met' if met else 'missed'}. 12,288 ranks in {LARGE_LIMIT_S:g} s, at most "
        f"{100 * LARGE_GAP_FRAC:g} %: {'met' if met_large else 'missed'}. Never slower than the static",
        f"plan: {'met' if never else 'missed'}.", "",
        "| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1), _row("all, 64 ranks", small_),
        *(_row(mix, runs) for mix, runs in by_mix.items()),
        *(_row(mix, [r for r in large if r.mix == mix]) for mix in dict.fromkeys(r.mix for r in large)),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run everything and write both files."""
    before = os.getloadavg()[0]
    small_, large = small_runs(), large_runs()
    load = (before, os.getloadavg()[0])
    data = {"load_average": load, "runs": [asdict(r) for r in (*small_, *large)]}
    write_atomic(HERE / "dispatch_bench.json", (json.dumps(data, indent=1) + "\n").encode())
    write_atomic(HERE / "dispatch_bench.md", text(small_, large, load).encode())
    print(text(small_, large, load))


if __name__ == "__main__":
    main()
