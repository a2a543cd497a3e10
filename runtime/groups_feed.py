"""What training needs for a plan with buckets: batches of documents, and the groups that a dispatcher forms for each.

Rank 0 runs the dispatcher, in a process of its own and some steps ahead, and tells the others; every rank reads the
documents of its own micro-batches. Whatever the dispatcher answers or fails to, the gradients are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import msgspec
import torch.distributed as dist

from planner.ahead import Ahead, heuristic
from planner.dispatch import Dispatch
from planner.menus import Dispatching, dispatching_of, drift, sequences_of
from planner.plan import Plan, SequencePlan
from planner.runtime.corpus import Corpus, DocumentBatches
from planner.runtime.errors import RuntimePlanError
from planner.runtime.groups import Document, Grouped, next_tokens
from planner.runtime.packing import IntArray
from planner.runtime.parallel import Parallel, StepResult

_DEPTH = 4  # steps that the dispatcher works ahead
_WINDOW = 4096  # documents that are compared with the plan's distribution at a time
_START_S = 30.0  # that the first step, and only it, may wait for the dispatcher's first answer


@dataclass(slots=True)
class Feed:
    """Steps of a training run; rank 0 has a dispatcher."""

    grouped: Grouped
    batches: DocumentBatches
    found: Dispatching
    planned: SequencePlan
    ahead: Ahead | None = None
    _asked: int = -1  # last step whose dispatch was asked for
    _window: int = -1  # last window that was compared

    @property
    def samples_per_step(self) -> int:
        """Documents of a global batch."""
        return self.batches.num_documents

    def __call__(self, step: int) -> Callable[[float], StepResult]:
        """The work of a step, a function of the learning rate."""
        documents = self.batches.batch(step)
        lengths = self.batches.lengths_of(documents)
        self._watch(step)
        answer = self._dispatched(step, lengths)

        def read(index: int) -> Document:
            return next_tokens(self.batches.read(int(documents[index])))

        return partial(self.grouped.step, answer.steps, lengths, read)

    def _dispatched(self, step: int, lengths: IntArray) -> Dispatch:
        """Rank 0's dispatch, on every rank. RuntimePlanError if a document fits no group."""
        answer: list[bytes | str] = [b""]
        if dist.get_rank() == 0:
            try:
                answer = [msgspec.json.encode(self._ask(step, lengths))]
            except ValueError as error:
                answer = [str(error)]
        dist.broadcast_object_list(answer)
        if isinstance(answer[0], str):
            raise RuntimePlanError(f"step {step + 1}: {answer[0]}")
        return msgspec.json.decode(answer[0], type=Dispatch)

    def _ask(self, step: int, lengths: IntArray) -> Dispatch:
        if self.ahead is None:
            return heuristic(self.found, lengths)
        first = self._asked < 0
        for later in range(max(step, self._asked + 1), step + _DEPTH):
            self.ahead.request(later, self.batches.lengths_of(self.batches.batch(later)))
            self._asked = later
        if first:
            self.ahead.wait(_START_S)
        return self.ahead.take(step, lengths)

    def _watch(self, step: int) -> None:
        """Say, once for each window of documents, when they are not of the lengths that the plan was made for."""
        window = step * self.batches.num_documents // _WINDOW
        if window == self._window or dist.get_rank():
            return
        self._window = window
        size = min(_WINDOW, len(self.batches.corpus.lengths))
        said = drift(self.planned, self.batches.lengths_of(self.batches.documents(window * _WINDOW, size)))
        if said is not None:
            warn(said)

    def close(self) -> None:
        """End the dispatcher."""
        if self.ahead is not None:
            self.ahead.close()


def warn(text: str) -> None:
    """One line for the user."""
    print(f"warning: {text}", flush=True)


def feed_of(plan: Plan, parallel: Parallel, corpus: Corpus, seed: int) -> Feed:
    """The feed of a plan with buckets. Collective. PlanFileError or RuntimePlanError if the plan cannot be followed."""
    planned, found = sequences_of(plan), dispatching_of(plan)
    grouped = Grouped(parallel, found.menu.groups)
    vocab = plan.inputs.graph.vocab_size
    batches = DocumentBatches(corpus, planned.longest_tokens, planned.tokens_per_step, seed, vocab)
    ahead = Ahead(found, warn) if dist.get_rank() == 0 else None
    return Feed(grouped, batches, found, planned, ahead)
