"""The closed loop's plot: predicted against measured step times, and what a smaller profile costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from planner.reports.loop_text import Row


def write_plot(rows: Sequence[Row], curve: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel of plans, one of budgets if there are several."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width = 2 if len(curve) > 1 else 1
    figure, panels = plt.subplots(1, width, figsize=(5.5 * width, 5), squeeze=False)
    axes = panels[0][0]
    for model, mark in zip(dict.fromkeys(row.model for row in rows), "o^svD", strict=False):
        mine = [row for row in rows if row.model == model]
        axes.scatter([r.measured_s for r in mine], [r.shared_s for r in mine], s=16, marker=mark, label=model)
    every = [s for r in rows for s in (r.measured_s, r.shared_s)]
    low, high = min(every) * 0.8, max(every) * 1.25
    for factor, style in ((1.0, "-"), (1.12, ":"), (1 / 1.12, ":")):
        axes.plot([low, high], [low * factor, high * factor], style, color="0.4", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="measured step, s", ylabel="predicted step, s",
             title="dotted: 12 % off")  # fmt: skip
    axes.legend(fontsize=8)
    if width > 1:
        for model in curve[0]["error"]:
            points = sorted((c["budget_s"], 100 * c["error"][model]) for c in curve)
            panels[0][1].plot(*zip(*points, strict=True), marker="o", label=model)
        panels[0][1].set(xscale="log", xlabel="profile budget, s", ylabel="median error of step, %", ylim=(0, None))
        panels[0][1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)
