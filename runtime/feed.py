"""What a training loop runs at a step when every sequence is as long as the plan's: this rank's slice of the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from planner.runtime.data import Batches
from planner.runtime.parallel import Parallel, StepResult


@dataclass(frozen=True, slots=True)
class PlainFeed:
    """Steps of a training run. `groups_feed.Feed` is its counterpart for plans with buckets."""

    parallel: Parallel
    batches: Batches

    @property
    def samples_per_step(self) -> int:
        """Sequences of a global batch."""
        return self.batches.global_batch_size

    def __call__(self, step: int) -> Callable[[float], StepResult]:
        """The work of a step, a function of the learning rate."""
        part, parts = self.parallel.mesh.position["dp"], self.parallel.spec.dp
        batch = self.batches.rank_slice(step * self.samples_per_step, part, parts)
        return partial(self.parallel.step, *(x.to(self.parallel.device) for x in batch))

    def close(self) -> None:
        """Nothing is held."""
