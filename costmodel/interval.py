"""How far a measured step may lie from its prediction: an interval that held 80 % of published runs left out of it.

The constants in intervals.json are quantiles of measured over predicted step time, written with their provenance by
`python -m planner.reports.intervals`. Strata are what makes steps differ from predictions beyond size: the engine,
and where the model's own communication runs.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from planner.costmodel.graph import ModelGraph
from planner.costmodel.hardware import ClusterSpec

INTERVALS_FILE = Path(__file__).parent / "intervals.json"
COVERAGE_FRAC = 0.8
PLACEMENTS = {
    "one_domain": "on one NVLink domain",
    "nodes": "over several nodes, tensor parallelism inside them and not beside pipeline stages",
    "tp_across_nodes": "over several nodes, tensor parallelism across them or beside pipeline stages",
    "moe": "of a model with experts",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Measured over predicted step time at both ends, and the runs it rests on.

    `engine` is empty where too few runs of the plan's engine are known: then it is an interval over sources, each of
    which weighs the same. `left_out_frac`: share of runs in the interval when their workload (their source where
    `engine` is empty) was left out of the fit, every fold weighing as in the fit; `left_out_run_frac` counts every run
    once.
    """

    engine: str
    placement: str
    low_ratio: float
    high_ratio: float
    num_runs: int
    num_folds: int  # workloads, or sources where `engine` is empty
    left_out_frac: float
    left_out_run_frac: float


def placement_of(cluster: ClusterSpec, num_gpus: int, tp: int, pp: int, moe: bool) -> str:
    """The key in PLACEMENTS of a plan."""
    domain = cluster.tiers[0].domain_size or num_gpus
    if moe:
        return "moe"
    if num_gpus <= domain:
        return "one_domain"
    return "tp_across_nodes" if tp > domain or (tp > 1 and pp > 1) else "nodes"


def has_experts(graph: ModelGraph) -> bool:
    """Whether tokens are routed in some layer."""
    return any(layer.num_experts > 1 for layer in graph.classes)


@functools.cache
def _intervals() -> dict[tuple[str, str], Interval]:
    found = [Interval(**entry) for entry in json.loads(INTERVALS_FILE.read_text())["intervals"]]
    return {(interval.engine, interval.placement): interval for interval in found}


def interval_of(engine: str, placement: str) -> Interval:
    """The interval of an engine, or of any engine where its own runs are too few."""
    return _intervals().get((engine, placement)) or _intervals()["", placement]
