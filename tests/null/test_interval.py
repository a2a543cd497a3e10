"""Intervals: quantiles by hand, coverage of what is left out, and the search by their upper end."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import planner.robust
from planner.costmodel.estimate import machine_for
from planner.costmodel.interval import PLACEMENTS, Interval, interval_of, placement_of
from planner.costmodel.presets import load_cluster
from planner.reports.accuracy import SHARED_RUNS, evaluate
from planner.reports.intervals import Run, ends, fit, fit_all, left_out_coverage
from planner.robust import ratios, robust_search
from planner.search import SearchOptions, SearchResult, search
from planner.space import Limits
from tests.null import plans


def test_ends_by_hand() -> None:
    # 99 equal weights: tails of (1 - 0.8 * 100 / 99) / 2 = 9.6 %, so the 10th from either side
    folds = {str(i): [float(i)] for i in range(1, 100)}
    assert ends(folds, equal=False) == (10.0, 90.0)
    # four sources of one weight: no tail is left, however many runs one of them has
    assert ends({"a": [1.0] * 50, "b": [2.0], "c": [3.0], "d": [4.0]}, equal=True) == (1.0, 4.0)


def test_left_out_coverage_of_exchangeable_runs_is_the_stated_one() -> None:
    ratios_N = np.exp(0.2 * np.random.default_rng(7).standard_normal(4000))
    runs = [Run(ratio=float(r), source=str(i % 100), workload=str(i % 200)) for i, r in enumerate(ratios_N)]
    for engine in ("own", ""):
        found = fit(engine, "nodes", runs)
        assert found is not None and found.left_out_frac == pytest.approx(0.8, abs=0.03)
    assert fit("own", "nodes", runs[:19]) is None


def test_a_source_unlike_the_others_is_not_covered_when_left_out() -> None:
    runs = [Run(ratio=1 + 0.001 * i + 5 * (s == 0), source=str(s), workload="w") for s in range(10) for i in range(10)]
    found = fit("", "nodes", runs)
    assert found is not None and found.left_out_frac <= 0.9


def test_placement() -> None:
    cluster = load_cluster("h100")
    at = [(8, 8, 1), (16, 8, 1), (16, 1, 2), (16, 2, 2), (16, 16, 1)]
    names = [placement_of(cluster, gpus, tp, pp, False) for gpus, tp, pp in at]
    assert names == ["one_domain", "nodes", "nodes", "tp_across_nodes", "tp_across_nodes"]
    assert placement_of(cluster, 16, 2, 2, True) == "moe"
    for name in PLACEMENTS:
        found = interval_of("no such engine", name)
        assert found.engine == "" and 0 < found.low_ratio < found.high_ratio


@pytest.mark.skipif(not SHARED_RUNS.is_file(), reason="the full set of runs is not checked out beside the project")
def test_committed_intervals_are_what_the_runs_give_and_cover_75_to_85_per_cent_left_out() -> None:
    found = fit_all(evaluate(SHARED_RUNS).predictions)
    assert {(i.engine, i.placement) for i in found} >= {("", name) for name in PLACEMENTS}
    for interval in found:
        committed = interval_of(interval.engine, interval.placement)
        assert committed.low_ratio == pytest.approx(interval.low_ratio, rel=0.05)
        assert committed.high_ratio == pytest.approx(interval.high_ratio, rel=0.05)
    coverage = left_out_coverage(found)
    assert 0.75 <= coverage.own_runs <= 0.85
    assert 0.75 <= coverage.sources <= 0.85


def with_ratios(monkeypatch: pytest.MonkeyPatch, **high: float) -> None:
    """Intervals with these upper ends by placement."""

    def at(engine: str, placement: str) -> Interval:
        return replace(interval_of(engine, placement), low_ratio=0.9, high_ratio=high[placement])

    monkeypatch.setattr(planner.robust, "interval_of", at)


@pytest.mark.parametrize(("across", "inside"), [(1.0, 1.0), (3.0, 1.0), (1.0, 3.0), (1.1, 1.0)])
def test_robust_search_finds_the_least_upper_end(monkeypatch: pytest.MonkeyPatch, across: float, inside: float) -> None:
    with_ratios(monkeypatch, tp_across_nodes=across, nodes=inside)
    graph = plans.graph()
    cluster = replace(load_cluster("h100"), node_size=4)
    cluster = replace(cluster, tiers=(replace(cluster.tiers[0], domain_size=4), *cluster.tiers[1:]))
    machine = machine_for(graph, cluster, plans.job().machine.engine, 16)
    options = SearchOptions(gap_frac=0.0, top=3)

    def run(limits: Limits, share: float = 1.0) -> SearchResult:
        return search(graph, machine, plans.BATCH, limits, options)

    found, bound_s = robust_search(graph, machine, Limits(), run)
    ends_s = [plan.step_s * ratios(graph, machine, plan.spec)[1] for plan in found.plans]
    assert ends_s == sorted(ends_s)
    assert bound_s == pytest.approx(ends_s[0])
    # every mesh on its own, by its own upper end
    meshes = [(tp, pp) for tp in (1, 2, 4, 8, 16) for pp in (1, 2, 4, 8, 16)]
    each = [run(Limits(fixed={"tp": tp, "pp": pp})).plans[:1] for tp, pp in meshes]
    best_s = min(plan.step_s * ratios(graph, machine, plan.spec)[1] for plans_ in each for plan in plans_)
    assert ends_s[0] == pytest.approx(best_s)
    plain = run(Limits())
    assert found.lower_bound_s == pytest.approx(plain.lower_bound_s)
    assert found.num_candidates == plain.num_candidates
