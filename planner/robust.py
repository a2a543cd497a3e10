"""The plan whose interval ends soonest: the search run once per placement, within which the interval's ratio is one.

The upper end of a plan is its step time x the ratio of its placement (costmodel/interval.py), so the best upper end is
the least over placements of ratio x fastest step, and the least over placements of ratio x lower bound is a lower
bound on the upper end of every plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from planner.costmodel.graph import ModelGraph
from planner.costmodel.hardware import ClusterSpec
from planner.costmodel.interval import PLACEMENTS, has_experts, interval_of, placement_of
from planner.costmodel.keys import Machine
from planner.costmodel.strategy import PlanSpec
from planner.search import SearchResult
from planner.space import BoolArray, Cells, Limits

_STOPS = ("interrupted", "time_limit", "exhausted", "gap", "infeasible")  # the first that any search gave is given


def ratios(graph: ModelGraph, machine: Machine, spec: PlanSpec) -> tuple[float, float]:
    """(low, high) end of the plan's interval over its predicted step time."""
    placement = placement_of(machine.cluster, spec.num_gpus, spec.tp, spec.pp, has_experts(graph))
    interval = interval_of(machine.engine.name, placement)
    return interval.low_ratio, interval.high_ratio


def robust_search(
    graph: ModelGraph, machine: Machine, limits: Limits, search_in: Callable[[Limits, float], SearchResult]
) -> tuple[SearchResult, float]:
    """(plans by upper end, lower bound on the upper end of every plan).

    `search_in(limits, share)` searches with a share of the time limit. The result's `lower_bound_s` is on step times.
    """
    places = _placements(graph, machine)
    results: dict[str, SearchResult] = {}
    for place in places:
        only = replace(limits, only=_cells_at(machine.cluster, machine.num_gpus, place, has_experts(graph)))
        stopped = any(result.stop_reason == "interrupted" for result in results.values())
        results[place] = search_in(only, 0.0 if stopped else 1 / len(places))
    high = {place: interval_of(machine.engine.name, place).high_ratio for place in places}
    bound_s = min(high[place] * result.lower_bound_s for place, result in results.items())
    return _merged(list(results.values()), lambda spec: ratios(graph, machine, spec)[1]), bound_s


def _placements(graph: ModelGraph, machine: Machine) -> list[str]:
    """The placements that plans on this machine can have."""
    moe, cluster, gpus = has_experts(graph), machine.cluster, machine.num_gpus
    here = {placement_of(cluster, gpus, tp, pp, moe) for tp, pp in ((1, 1), (2, 2))}
    return [place for place in PLACEMENTS if place in here]


def _cells_at(cluster: ClusterSpec, num_gpus: int, place: str, moe: bool) -> Callable[[Cells], BoolArray]:
    def at(cells: Cells) -> BoolArray:
        degrees, index = np.unique(np.stack([cells.tp, cells.pp]), axis=1, return_inverse=True)
        fits = [placement_of(cluster, num_gpus, int(tp), int(pp), moe) == place for tp, pp in degrees.T]
        return np.array(fits, bool)[index.reshape(-1)]

    return at


def _merged(results: list[SearchResult], high_ratio: Callable[[PlanSpec], float]) -> SearchResult:
    plans = [plan for result in results for plan in result.plans]
    ledger: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for result in results:
        ledger.update(result.ledger)
        refused.update(result.refused)
    lower_s = min(result.lower_bound_s for result in results)
    plans.sort(key=lambda plan: plan.step_s * high_ratio(plan.spec))
    missing = [result.shortfall_bytes for result in results if result.shortfall_bytes is not None]
    return SearchResult(
        plans=tuple(plans[: max(len(result.plans) for result in results)]),
        lower_bound_s=lower_s,
        gap_frac=max(0.0, 1 - lower_s / plans[0].step_s) if plans else float("nan"),
        num_candidates=sum(result.num_candidates for result in results),
        ledger=dict(ledger),
        stop_reason=next(stop for stop in _STOPS if any(result.stop_reason == stop for result in results)),
        search_s=sum(result.search_s for result in results),
        shortfall_bytes=min(missing, default=None),
        refused=dict(refused),
    )
