"""Scores of predictions: errors of time and memory, regret and rank per plan group, feasibility; plain data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.reports.predict import Prediction

Score = dict[str, Any]
BOUND_FRAC = 0.15  # share of the predicted step from which a row counts as bound by that component
COMPONENTS = ("launch", "exposed_comm", "bubble")
PATHOLOGICAL = "pathological"  # what the data set's note says of runs that are slower than their hardware explains


def errors(values: Iterable[float]) -> Score:
    """rows, mape, median, p90 (of absolute errors) and bias (mean of signed ones); None without rows."""
    signed = np.array(list(values))
    if not signed.size:
        return {"rows": 0, "mape": None, "median": None, "p90": None, "bias": None}
    size = np.abs(signed)
    return {
        "rows": int(signed.size), "mape": float(size.mean()), "median": float(np.median(size)),
        "p90": float(np.quantile(size, 0.9)), "bias": float(signed.mean()),
    }  # fmt: skip


def time_errors(predictions: Iterable[Prediction]) -> Score:
    """Errors of the step time of runs that ended well."""
    return errors(p.time_error for p in predictions if p.measured_s)


def memory_errors(predictions: Iterable[Prediction]) -> Score:
    """Errors of the peak memory of rows that state it."""
    return errors(p.memory_error for p in predictions if p.measured_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """One plan of a plan group under one engine: rows that repeat it are one alternative, their median measured."""

    step_s: float
    measured_s: float
    fits: bool


def plan_groups(predictions: Iterable[Prediction]) -> dict[str, list[Alternative]]:
    """Runs that ended well by plan group, groups of two alternatives or more."""
    rows: dict[str, dict[object, list[Prediction]]] = defaultdict(lambda: defaultdict(list))
    for p in predictions:
        if p.measured_s and p.row.text("plan_group"):
            key = (p.case.spec, p.case.engine.name, p.case.graph.dtype)
            rows[p.row.text("plan_group")][key].append(p)
    groups = {name: [_alternative(same) for same in plans.values()] for name, plans in rows.items()}
    return {name: members for name, members in groups.items() if len(members) > 1}


def _alternative(same: Sequence[Prediction]) -> Alternative:
    measured = float(np.median([p.measured_s for p in same]))
    return Alternative(step_s=same[0].step_s, measured_s=measured, fits=same[0].fits)


def regret_of(members: Sequence[Alternative]) -> float:
    """Measured time of the plan we would choose over that of the fastest.

    We choose the fastest in prediction among those that we call fitting, or among all if none is.
    """
    chosen = min(members, key=lambda p: (not p.fits, p.step_s))
    return chosen.measured_s / min(p.measured_s for p in members)


def rank_of(members: Sequence[Alternative]) -> float:
    """Spearman correlation of predicted and measured times."""
    return spearman([p.step_s for p in members], [p.measured_s for p in members])


def regret(groups: Mapping[str, Sequence[Alternative]]) -> Score:
    """groups, mean, median, worst of the regret of the first choice; None without groups."""
    values = np.array([regret_of(members) for members in groups.values()])
    if not values.size:
        return {"groups": 0, "mean": None, "median": None, "worst": None}
    return {"groups": int(values.size), "mean": float(values.mean()), "median": float(np.median(values)),
            "worst": float(values.max())}  # fmt: skip


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation, ties sharing their mean rank; 0 where one side is constant."""
    x, y = _ranks(np.array(a)), _ranks(np.array(b))
    if x.std() == 0 or y.std() == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def rank(groups: Mapping[str, Sequence[Alternative]]) -> Score:
    """Mean Spearman correlation of predicted and measured times over groups of three or more."""
    values = [rank_of(members) for members in groups.values() if len(members) > 2]
    return {"groups": len(values), "spearman_mean": float(np.mean(values)) if values else None}


def feasibility(predictions: Iterable[Prediction]) -> Score:
    """Fits or not against how the runs ended; balanced accuracy is None unless both ends occur."""
    fit_ok = fit_oom = tight_ok = tight_oom = 0
    for p in predictions:
        fit_ok += p.fits and not p.row.failed
        fit_oom += p.fits and p.row.failed
        tight_ok += not p.fits and not p.row.failed
        tight_oom += not p.fits and p.row.failed
    ok, oom, fits = fit_ok + tight_ok, fit_oom + tight_oom, fit_ok + fit_oom
    return {
        "rows": ok + oom, "ok_rows": ok, "oom_rows": oom,
        "balanced_accuracy": (fit_ok / ok + tight_oom / oom) / 2 if ok and oom else None,
        "ok_called_fitting_frac": fit_ok / ok if ok else None,
        "oom_called_not_fitting_frac": tight_oom / oom if oom else None,
        "false_fit_frac": fit_oom / fits if fits else None,
    }  # fmt: skip


def component_of(p: Prediction) -> str:
    """The component that bounds a row beside compute: the largest with BOUND_FRAC of the step, else compute."""
    share, name = max((p.parts_s[name] / p.step_s, name) for name in COMPONENTS)
    return name if share >= BOUND_FRAC else "compute"


KEYS: dict[str, Callable[[Prediction], str]] = {
    "source": lambda p: p.row.source,
    "gpu": lambda p: p.row.text("gpu"),
    "arch": lambda p: p.row.text("arch"),
    "component": component_of,
    "engine": lambda p: p.case.engine.name,
}


def partition(predictions: Iterable[Prediction], key: str) -> dict[str, list[Prediction]]:
    """`predictions` by one of KEYS, names sorted."""
    parts: dict[str, list[Prediction]] = defaultdict(list)
    for p in predictions:
        parts[KEYS[key](p)].append(p)
    return dict(sorted(parts.items()))


def score(predictions: Sequence[Prediction]) -> Score:
    """Every measure of one set of predictions."""
    groups = plan_groups(predictions)
    return {
        "time": time_errors(predictions), "memory": memory_errors(predictions), "regret": regret(groups),
        "rank": rank(groups), "feasibility": feasibility(predictions),
    }  # fmt: skip


def full_score(predictions: Sequence[Prediction], skipped: Mapping[str, int]) -> Score:
    """`score` of all rows and of every partition, with the rows skipped by reason."""
    regular = [p for p in predictions if PATHOLOGICAL not in p.row.text("notes")]
    return {
        **score(predictions),
        "time_without_pathological": time_errors(regular),
        "regret_without_pathological": regret(plan_groups(regular)),
        "skipped": dict(sorted(skipped.items(), key=lambda item: (-item[1], item[0]))),
        **{f"by_{key}": {name: score(part) for name, part in partition(predictions, key).items()} for key in KEYS},
    }
