"""The page of the sequence-length study: its rows, what was published for them, and the plot."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from planner.costmodel import comm
from planner.costmodel.hardware import ClusterSpec
from planner.costmodel.units import GB

# Published speed-up of FlexSP over (DeepSpeed, Megatron-LM), 64 GPUs: labels of figs/main-result in
# github:PKU-DAIR/Hetu-Galvatron@flexsp.
PUBLISHED = {
    (192, "github", "7B"): (1.45, 1.43), (192, "github", "13B"): (1.40, 1.38), (192, "github", "30B"): (1.44, 1.44),
    (192, "commoncrawl", "7B"): (1.50, 1.66), (192, "commoncrawl", "13B"): (1.35, 1.55),
    (192, "commoncrawl", "30B"): (1.54, 1.58),
    (192, "wikipedia", "7B"): (1.72, 1.98), (192, "wikipedia", "13B"): (1.59, 1.79),
    (192, "wikipedia", "30B"): (1.64, 1.95),
    (384, "github", "7B"): (1.26, 1.47), (384, "github", "13B"): (1.29, 1.63), (384, "github", "30B"): (1.22, 1.40),
    (384, "commoncrawl", "7B"): (1.42, 1.77), (384, "commoncrawl", "13B"): (1.37, 1.70),
    (384, "commoncrawl", "30B"): (1.33, 1.60),
    (384, "wikipedia", "7B"): (1.46, 1.77), (384, "wikipedia", "13B"): (1.43, 1.77),
    (384, "wikipedia", "30B"): (1.53, 1.85),
}  # fmt: skip
# The same figure's labels of FlexSP-BatchAda over DeepSpeed; none were found for 30B.
BATCH_ADAPTIVE = {
    (192, "github", "7B"): 1.07, (192, "github", "13B"): 1.08, (192, "commoncrawl", "7B"): 1.09,
    (192, "commoncrawl", "13B"): 1.07, (192, "wikipedia", "7B"): 1.34, (192, "wikipedia", "13B"): 1.31,
    (384, "github", "7B"): 1.03, (384, "github", "13B"): 1.06, (384, "commoncrawl", "7B"): 1.04,
    (384, "commoncrawl", "13B"): 1.06, (384, "wikipedia", "7B"): 1.32, (384, "wikipedia", "13B"): 1.21,
}  # fmt: skip
# All-to-all GB/s per GPU that FlexSP's solver has for its 64 GPUs, by degree (same repository, solver.py).
ALL_TO_ALL = {8: 96.5, 16: 10.33, 32: 5.94, 64: 4.87}
_BUFFER_BYTES = 64e6  # of an all-to-all, about what a micro-batch sends
# ByteScale over its static data x context parallelism (arXiv 2502.21231): of Byted's corpus the case study's 520 s
# against 157 s on 1,024 GPUs, and the most; of GitHub balanced over data ranks.
BYTESCALE = {"byted": "3.31 to 4.26", "github": "6.21 to 7.89"}
SYSTEMS = ("adaptive", "best static", "flexsp-like", "bytescale-like", "batch-adaptive", "ulysses static", "as run",
           "tp x cp static", "hybrid cp")  # fmt: skip
# (faster, slower): speed-ups that the table shows.
SPEEDUPS = (("adaptive", "best static"), ("adaptive", "hybrid cp"), ("adaptive", "as run"),
            ("flexsp-like", "ulysses"), ("flexsp-like", "tp x cp static"), ("bytescale-like", "as run"))  # fmt: skip
# What a static plan may do, from FlexSP's baseline to all of ours: system, and what the table calls it.
MEANS = (("as run", "as run"), ("ulysses static", "any degree"), ("swap static", "and swap"),
         ("ring static", "and ring"), ("best static", "and any layout"))  # fmt: skip


def name_of(longest: int, corpus: str, model: str) -> str:
    """What the table calls a workload of FlexSP's."""
    return f"GPT-{model} {longest}K {corpus}"


_KEYS = {name_of(*key): key for key in PUBLISHED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A workload: seconds of every batch by system (None: it does not fit), and gaps of the adaptive dispatches.

    `static_gap_frac`: by how much, at most, groups of one kind could beat the best of them.
    """

    name: str
    step_s: dict[str, tuple[float, ...] | None]
    gap_frac: tuple[float, ...]
    static_gap_frac: float
    tokens: float

    @classmethod
    def of(cls, name: str, data: dict[str, Any]) -> Row:
        """From `data`."""
        return cls(name=name, **data)

    def data(self) -> dict[str, Any]:
        """All but the name."""
        return {key: value for key, value in asdict(self).items() if key != "name"}

    def mean_s(self, system: str) -> float | None:
        """Mean step. "ulysses": the static plan that was run, where that is known, else the best."""
        if system == "ulysses":
            system = "ulysses static" if self.step_s["as run"] is None else "as run"
        found = self.step_s[system]
        return None if found is None else float(np.mean(found))

    def speedup(self, faster: str, slower: str) -> float | None:
        """How much faster `faster` is."""
        own, other = self.mean_s(faster), self.mean_s(slower)
        return None if other is None or own is None else other / own

    def published(self, faster: str, slower: str) -> str:
        """What was published for `speedup`, "" for nothing."""
        key = _KEYS.get(self.name.split(",")[0])
        at = {"ulysses": 0, "tp x cp static": 1}.get(slower)
        if faster == "flexsp-like" and key is not None and at is not None:
            return f"{PUBLISHED[key][at]:.2f}"
        corpus = next((corpus for corpus in BYTESCALE if key is None and corpus in self.name), None)
        return BYTESCALE[corpus] if corpus is not None and faster == "bytescale-like" else ""

    def order(self) -> str:
        """Whether the four published systems come in the published order; "" where there are not four."""
        key = _KEYS.get(self.name.split(",")[0])
        if key not in BATCH_ADAPTIVE:
            return ""
        deepspeed, megatron = PUBLISHED[key]
        published = {"F": 1.0, "B": deepspeed / BATCH_ADAPTIVE[key], "D": deepspeed, "M": megatron}
        systems = {"F": "flexsp-like", "B": "batch-adaptive", "D": "ulysses", "M": "tp x cp static"}
        ours = {letter: mean for letter, system in systems.items() if (mean := self.mean_s(system)) is not None}
        said, found = ("".join(sorted(of, key=of.__getitem__)) for of in (published, ours))
        return "as published" if said == found else f"{found}, published {said}"


def text(head: list[str], families: dict[str, list[Row]], cluster: ClusterSpec) -> str:
    """The page: what the head says, a table a family, and the prices of the all-to-all."""
    lines = list(head)
    for family, rows in families.items():
        lines += ["", f"## {family}", "", *_table(rows)]
    lines += ["", "## What each means is worth to a static plan", "", *_means(families.get("flexsp", []))]
    return "\n".join([*lines, "", "## The all-to-all on FlexSP's cluster", "", *_all_to_all(cluster)]) + "\n"


def _table(rows: list[Row]) -> list[str]:
    """Markdown lines: seconds of every system, speed-ups, published speed-ups, order, gaps."""
    head = ["workload", "tokens a step", *(f"{s} s" for s in SYSTEMS), *(f"{f} over {s}" for f, s in SPEEDUPS), "order",
            "gap %", "static gap %"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        seconds = ["-" if (s := row.mean_s(system)) is None else f"{s:.2f}" for system in SYSTEMS]
        speedups = [_beside(row.speedup(*pair), row.published(*pair)) for pair in SPEEDUPS]
        cells = [row.name, f"{row.tokens / 1e3:,.0f}K", *seconds, *speedups, row.order() or "-",
                 f"{100 * np.mean(row.gap_frac):.1f}", f"{100 * row.static_gap_frac:.1f}"]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _means(rows: list[Row]) -> list[str]:
    """Markdown lines: seconds of static plans by what they may do, and in brackets the adaptive speed-up over each."""
    head = ["workload", *(f"{name} s" for _, name in MEANS), "flexsp-like over any degree"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [_over(row.mean_s(system), row.speedup("adaptive", system)) for system, _ in MEANS]
        like = _beside(row.speedup("flexsp-like", "ulysses static"), row.published("flexsp-like", "ulysses"))
        lines.append("| " + " | ".join([row.name, *cells, like]) + " |")
    return lines


def _over(mean_s: float | None, speedup: float | None) -> str:
    return "-" if mean_s is None or speedup is None else f"{mean_s:.2f} ({speedup:.2f})"


def _beside(ours: float | None, said: str) -> str:
    if ours is None:
        return "-"
    return f"{ours:.2f} ({said})" if said else f"{ours:.2f}"


def all_to_all_rate(cluster: ClusterSpec, degree: int) -> float:
    """Bytes per second and GPU of an all-to-all over `degree` neighbours of 64, as the cost model has it."""
    seconds = comm.all_to_all_s(cluster, cluster.domain_sizes(64), _BUFFER_BYTES, 1, degree)
    return float(_BUFFER_BYTES / seconds)


def _all_to_all(cluster: ClusterSpec) -> list[str]:
    """Markdown lines: our price of an all-to-all beside the rate that FlexSP's solver has."""
    lines = ["| degree | FlexSP's solver GB/s | ours GB/s | ours over theirs |", "|---|---|---|---|"]
    for degree, said in ALL_TO_ALL.items():
        own = all_to_all_rate(cluster, degree) / GB
        lines.append(f"| {degree} | {said:.2f} | {own:.2f} | {own / said:.2f} |")
    return lines


def plot(rows: list[Row], path: Path) -> None:
    """FlexSP's speed-up over each baseline, predicted as bars and published as marks, and ours over the best static."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pairs = (SPEEDUPS[3], SPEEDUPS[4], SPEEDUPS[0])
    figure, axes = plt.subplots(len(pairs), 1, figsize=(12, 10), sharex=True, layout="constrained")
    at = np.arange(len(rows))
    for axis, pair in zip(axes, pairs, strict=True):
        axis.bar(at, [row.speedup(*pair) or 0.0 for row in rows], color="#4878a8", label="predicted")
        marked = [(x, float(said)) for x, row in enumerate(rows) if (said := row.published(*pair))]
        if marked:
            axis.plot(*zip(*marked, strict=True), "D", color="#d1605e", label="published (FlexSP)")
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_ylabel(f"{pair[0]} over\n{pair[1]}")
        axis.margins(y=0.3)
        axis.legend(loc="upper left", ncols=2, frameon=False)
    axes[-1].set_xticks(at, [row.name for row in rows], rotation=60, ha="right", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
