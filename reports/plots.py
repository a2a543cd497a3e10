"""Parity and residual plots of the accuracy report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from planner.costmodel.units import GIB
from planner.reports import metrics
from planner.reports.predict import Prediction

_MARKS = "o^svDP*X<>phd"


def write_plots(predictions: Sequence[Prediction], folder: Path) -> list[str]:
    """Write the plots; returns their file names."""
    folder.mkdir(exist_ok=True)
    timed = [p for p in predictions if p.measured_s]
    sized = [p for p in predictions if p.measured_bytes]
    _parity(timed, [p.measured_s for p in timed], [p.step_s for p in timed], "step time, s", folder / "time.png")
    _parity(sized, [p.measured_bytes / GIB for p in sized], [p.memory_bytes / GIB for p in sized],
            "peak memory, GiB", folder / "memory.png")  # fmt: skip
    _residuals(timed, folder / "residuals.png")
    return ["time.png", "memory.png", "residuals.png"]


def _parity(
    rows: Sequence[Prediction], measured: Sequence[float], predicted: Sequence[float], what: str, path: Path
) -> None:
    figure, axes = plt.subplots(figsize=(7.5, 6))
    sources = sorted({p.row.source for p in rows})
    for i, source in enumerate(sources):
        at = [k for k, p in enumerate(rows) if p.row.source == source]
        axes.scatter([measured[k] for k in at], [predicted[k] for k in at], s=9, alpha=0.6, linewidths=0,
                     marker=_MARKS[i % len(_MARKS)], color=plt.get_cmap("tab20")(i % 20),
                     label=source[:34])  # fmt: skip
    low, high = min(*measured, *predicted) * 0.8, max(*measured, *predicted) * 1.25
    for factor, style in ((1.0, "-"), (1.25, ":"), (0.8, ":")):
        axes.plot([low, high], [low * factor, high * factor], style, color="0.4", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), xlabel=f"measured {what}",
             ylabel=f"predicted {what}", title="dotted: a quarter off")  # fmt: skip
    axes.legend(fontsize=6.5, markerscale=2, loc="upper left")
    _save(figure, path)


def _residuals(rows: Sequence[Prediction], path: Path) -> None:
    """log2 of predicted over measured against what it might depend on."""
    figure, grid = plt.subplots(2, 2, figsize=(10, 7.5), sharey=True)
    off = np.log2([p.step_s / p.measured_s for p in rows])
    panels = (
        ("GPUs", [p.case.spec.num_gpus for p in rows], "log"),
        ("tp", [p.case.spec.tp for p in rows], "log"),
        ("share of exposed communication", [p.parts_s["exposed_comm"] / p.step_s for p in rows], "linear"),
        ("share of waiting for the host", [p.parts_s["launch"] / p.step_s for p in rows], "linear"),
    )
    noted = np.array([metrics.PATHOLOGICAL in p.row.text("notes") for p in rows])
    for axes, (name, values, scale) in zip(grid.flat, panels, strict=True):
        jitter = np.random.default_rng(0).uniform(0.93, 1.07, len(rows)) if scale == "log" else 1.0
        x = np.array(values, float) * jitter
        for mask, color, label in ((~noted, "tab:blue", "rows"), (noted, "tab:red", "noted as pathological")):
            axes.scatter(x[mask], off[mask], s=6, alpha=0.4, linewidths=0, color=color, label=label)
        axes.axhline(0, color="0.4", linewidth=0.8)
        axes.set(xlabel=name, xscale=scale, ylim=(-4, 2))
    for axes in grid[:, 0]:
        axes.set_ylabel("log2(predicted / measured)")
    grid[0, 0].legend(fontsize=7)
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)
