"""Scores as text that fits 112 columns, or as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from planner.reports import metrics
from planner.reports.predict import MEMORY_MARGIN_FRAC, Prediction

NAME_WIDTH = 44


def percent(value: float | None, signed: bool = False) -> str:
    """A fraction in per cent, or a dash."""
    return "-" if value is None else f"{100 * value:{'+' if signed else ''}.1f} %"


def ratio(value: float | None) -> str:
    """A ratio with three digits, or a dash."""
    return "-" if value is None else f"{value:.3f}"


def summary(predictions: Sequence[Prediction], score: Mapping[str, Any], elapsed_s: float, name: str) -> list[str]:
    """The figures of all rows, and what was skipped and why."""
    skipped: Mapping[str, int] = score["skipped"]
    used, left = len(predictions), sum(skipped.values())
    rate = used / max(elapsed_s, 1e-9)
    lines = [f"{name}: {used:,} rows predicted in {elapsed_s:.1f} s ({rate:,.0f} estimates/s), {left:,} skipped"]
    lines += [f"  skipped {count:>5,}  {reason}" for reason, count in skipped.items()]
    for title, key in (("step time", "time"), ("  without pathological", "time_without_pathological"),
                       ("peak memory", "memory")):  # fmt: skip
        e = score[key]
        figures = [("MAPE", e["mape"], False), ("median", e["median"], False), ("p90", e["p90"], False),
                   ("bias", e["bias"], True)]  # fmt: skip
        text = "".join(f"  {label} {percent(value, signed):>8s}" for label, value, signed in figures)
        lines.append(f"{title:24s}{e['rows']:>6,} rows{text}")
    for title, key in (("regret of first choice", "regret"), ("  without pathological", "regret_without_pathological")):
        g = score[key]
        text = "".join(f"  {figure} {ratio(g[figure])}" for figure in ("mean", "median", "worst"))
        lines.append(f"{title:24s}{g['groups']:>6,} groups{text}")
    rank, fit = score["rank"], score["feasibility"]
    lines.append(f"{'rank correlation':24s}{rank['groups']:>6,} groups  Spearman {ratio(rank['spearman_mean'])}")
    balanced, false_fits = percent(fit["balanced_accuracy"]), percent(fit["false_fit_frac"])
    lines.append(f"{'fits / does not fit':24s}{fit['rows']:>6,} rows  balanced accuracy {balanced}"
                 f"  called fitting but oom {false_fits}  margin {percent(MEMORY_MARGIN_FRAC)}")  # fmt: skip
    return lines


def per(predictions: Sequence[Prediction], key: str, *, markdown: bool = False) -> list[str]:
    """One line per source, GPU, component, engine, architecture or plan group."""
    if key == "group":
        return _table(*_groups(predictions), markdown=markdown)
    head = [key, "rows", "MAPE", "median", "p90", "bias", "memory", "regret", "rank"]
    rows = []
    for name, part in metrics.partition(predictions, key).items():
        s = metrics.score(part)
        t = s["time"]
        rows.append([name, f"{t['rows']:,}", percent(t["mape"]), percent(t["median"]), percent(t["p90"]),
                     percent(t["bias"], True), percent(s["memory"]["mape"]), ratio(s["regret"]["mean"]),
                     ratio(s["rank"]["spearman_mean"])])  # fmt: skip
    return _table(head, rows, markdown=markdown)


def _groups(predictions: Sequence[Prediction]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name, members in metrics.plan_groups(predictions).items():
        ranked = ratio(metrics.rank_of(members) if len(members) > 2 else None)
        e = metrics.errors(p.step_s / p.measured_s - 1 for p in members)
        rows.append([name, str(len(members)), ratio(metrics.regret_of(members)), ranked, percent(e["mape"]),
                     percent(e["bias"], True)])  # fmt: skip
    return ["group", "plans", "regret", "rank", "MAPE", "bias"], rows


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool) -> list[str]:
    if markdown:
        lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
        return lines + ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    cut = [[row[0] if len(row[0]) <= NAME_WIDTH else row[0][: NAME_WIDTH - 1] + "…", *row[1:]] for row in rows]
    widths = [max(len(row[i]) for row in [head, *cut]) for i in range(len(head))]
    return ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in [head, *cut]]  # fmt: skip
