"""Fewest GPUs, or the cheapest step: the search run over the GPU counts that may be used, bounds carried along."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from planner.costmodel.hardware import ClusterSpec
from planner.search import SearchResult
from planner.space import divisors

OBJECTIVES = ("step_s", "gpus", "cost")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The search at one GPU count."""

    num_gpus: int
    result: SearchResult

    @property
    def gpu_seconds(self) -> float:
        """GPU-seconds of a step of the best plan, infinite if nothing fits."""
        return self.num_gpus * self.result.plans[0].step_s if self.result.plans else float("inf")

    def meets(self, max_step_s: float) -> bool:
        """Whether the best plan is fast enough."""
        return bool(self.result.plans) and self.result.plans[0].step_s <= max_step_s

    def may_meet(self, max_step_s: float) -> bool:
        """Whether the bound leaves room for a plan that is fast enough."""
        return self.result.stop_reason != "infeasible" and self.result.lower_bound_s <= max_step_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The chosen trial (None: no count works), all trials, and what is proved about the objective.

    `lower_bound`: no count that was tried can give fewer GPUs or GPU-seconds than this.
    """

    best: Trial | None
    trials: tuple[Trial, ...]
    lower_bound: float


def gpu_counts(cluster: ClusterSpec, limit: int) -> list[int]:
    """Counts to try, ascending: the divisors of `limit` that are a part of one node or whole nodes."""
    node = cluster.node_size
    return [n for n in divisors(limit) if (n <= node and node % n == 0) or n % node == 0]


def choose(objective: str, counts: list[int], max_step_s: float, run: Callable[[int], SearchResult]) -> Outcome:
    """Search the counts for `objective` ("gpus" or "cost"); `run` searches one count.

    A count whose lower bound exceeds `max_step_s` is refuted; one without a plan fast enough but with a bound below
    stays open and lowers `lower_bound`. "gpus" ascends and stops at the first count that works.
    """
    trials: list[Trial] = []
    for trial in _run(counts, run):
        trials.append(trial)
        stop = trial.result.stop_reason == "interrupted"
        if stop or (objective == "gpus" and trial.meets(max_step_s)):
            break
    working = [trial for trial in trials if trial.meets(max_step_s)]
    if objective == "gpus":
        possible = [t.num_gpus for t in trials if t.may_meet(max_step_s)]
        best = min(working, key=lambda t: t.num_gpus, default=None)
        return Outcome(best=best, trials=tuple(trials), lower_bound=float(min(possible, default=float("inf"))))
    bounds = [t.num_gpus * t.result.lower_bound_s for t in trials if t.may_meet(max_step_s)]
    best = min(working, key=lambda t: t.gpu_seconds, default=None)
    return Outcome(best=best, trials=tuple(trials), lower_bound=min(bounds, default=float("inf")))


def _run(counts: list[int], run: Callable[[int], SearchResult]) -> Iterator[Trial]:
    for num_gpus in counts:
        yield Trial(num_gpus=num_gpus, result=run(num_gpus))
