"""Groups: a step over packed documents, for which the data ranks form groups of unequal size in every micro-step.

A dispatch (planner.dispatch) says which ranks form a group, of which kind, and which documents are in each of its
micro-batches. Parameters, ZeRO and TP are those of the plan's state layout; only the context-parallel groups change.
Gradients are those of the sum of token losses over the tokens of the whole batch, however documents were dealt
(ByteScale, arXiv 2502.21231, section 3.2), since every micro-batch's sum is divided by the same number.

ZeRO-2/3 communicate over all data ranks in every micro-batch, and experts over those of their group, so ranks with
fewer of them add empty ones: groups are in lockstep. Ranks that exchange rows of experts must also do so equally often,
so that with ep either every kind of group runs forward again in backward or none does. Otherwise ZeRO-0/1
gather with the first forward and reduce with the last backward of a rank: with one micro-step all ranks of a group
are there together, however many micro-batches other groups have. With more, where a rank of a group may be done and
another not, parameters are gathered before the first and gradients reduced after the last (a rank that reduces a layer
would wait for one that waits for it in the next layer's attention).

With pp every stage has the micro-batches of its data rank, and a data rank's stages are a pipeline
(groups_pipeline.py): of all of the step in lockstep, else of one micro-step after the other, since two ranks that work
together in one and with others in the next could wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from planner.costmodel.sequences import GroupCost
from planner.dispatch import Group, MicroStep
from planner.runtime import zero
from planner.runtime.errors import RuntimePlanError
from planner.runtime.groups_pipeline import MicroBatch, run_pipeline
from planner.runtime.packing import Groups, IntArray, Packed, pack
from planner.runtime.parallel import IGNORE_INDEX, Parallel, StepResult
from planner.runtime.support import groups_unsupported

Document = tuple[IntArray, IntArray]  # tokens and their labels, equally many; IGNORE_INDEX where nothing is to learn
Read = Callable[[int], Document]  # a document of the batch by its number


def next_tokens(tokens: IntArray) -> Document:
    """A document with the next token as label; the last token has none."""
    return tokens, np.append(tokens[1:], IGNORE_INDEX)


@dataclass(frozen=True, slots=True)
class _Task:
    """One micro-batch of this rank: its kind (None: empty, padding alone), place in the group, and documents."""

    kind: int | None
    at: int
    documents: tuple[int, ...]


_EMPTY = _Task(None, 0, ())


@dataclass(slots=True)
class Grouped:
    """A model under a state layout, made with `packs`, and the kinds of groups that dispatches name by number.

    Making it is collective: it creates every communicator that a kind can need. With degrees that are powers of two
    on aligned ranks these are at most log2(ranks) Ulysses groups and log2(ranks)^2 ring groups a rank.
    """

    parallel: Parallel
    kinds: Sequence[GroupCost]
    groups: dict[tuple[int, int], Groups] = field(default_factory=dict)

    def __post_init__(self) -> None:
        reason = groups_unsupported(self.parallel.spec)
        if reason is not None:
            raise RuntimePlanError(f"this plan's groups are not executable: {reason}")
        if not self.parallel.packs:
            raise RuntimePlanError("the model was not parallelized for packed documents: parallelize(..., packs=True)")
        again = {kind.strategy.recompute == "full" for kind in self.kinds}
        if self.parallel.spec.ep > 1 and len(again) > 1:
            raise RuntimePlanError(
                "groups with ep: full recomputation exchanges experts' rows again, which every kind of group or none "
                "has to do: search again"
            )
        for ulysses, ring in sorted({(kind.ulysses, kind.ring) for kind in self.kinds}):
            self.groups[ulysses, ring] = self.parallel.mesh.data_groups(ulysses, ring)

    @property
    def lockstep(self) -> bool:
        """Whether every rank has as many micro-batches."""
        return self.parallel.spec.zero_stage >= 2 or self.parallel.spec.ep > 1

    def step(
        self, steps: Sequence[MicroStep], lengths: IntArray, read: Read, lr: float | None = None
    ) -> StepResult:
        """One optimizer step on the documents of a batch, dealt by `steps`."""
        assert self.parallel.optimizer is not None
        total, count = self.backward(steps, lengths, read)
        self.parallel.optimizer.sync()
        return StepResult(total, self.parallel.optimizer.step(lr), count)

    def backward(self, steps: Sequence[MicroStep], lengths: IntArray, read: Read) -> tuple[float, int]:
        """Gradients of the mean loss over all labelled tokens of the batch; (that loss, number of tokens)."""
        p = self.parallel
        runs = [[self._micro_batch(task, lengths, read) for task in run] for run in self.runs(steps, lengths)]
        counted = torch.stack([(batch.labels != IGNORE_INDEX).sum() for run in runs for batch in run]).sum().double()
        dist.all_reduce(counted, group=p.mesh.data)
        if not counted:
            raise RuntimePlanError("no token of this batch has a label: nothing to learn from")
        apart = len(steps) > 1 and not self.lockstep
        if apart:
            zero.gather_now(p.model)
        try:
            if p.spec.pp > 1:
                zero.before_backward(p.model, p.spec, last=False)
                total = torch.stack([run_pipeline(p, run, counted) for run in runs]).sum()
                dist.all_reduce(total, group=p.mesh.pp)
            else:
                total = self._one_by_one([batch for run in runs for batch in run], counted, apart)
        finally:
            p.ctx.packed = p.ctx.strategy = None
        if apart or p.spec.pp > 1:
            zero.reduce_now(p.model)
        dist.all_reduce(total, group=p.mesh.data)
        return float(total), int(counted)

    def _one_by_one(self, batches: Sequence[MicroBatch], counted: torch.Tensor, apart: bool) -> torch.Tensor:
        """Forward and backward of each; the sum of losses."""
        p = self.parallel
        total = torch.zeros((), dtype=torch.float64, device=p.device)
        for i, batch in enumerate(batches):
            zero.before_backward(p.model, p.spec, last=i == len(batches) - 1 and not apart)
            batch.enter(p)
            loss = p.run(0, None, batch.tokens, batch.labels) / counted
            total += loss.detach()
            loss.backward()
        return total

    def runs(self, steps: Sequence[MicroStep], lengths: IntArray) -> list[list[_Task]]:
        """Micro-batches of this rank in order, by pipeline; RuntimePlanError if `steps` is no dispatch of the batch.

        Without pp it does not matter where one run ends. No run is empty, and there is one at least.
        """
        self._check(steps, lengths)
        mine = self.parallel.mesh.position["data"]
        runs: list[list[_Task]] = []
        for step in steps:
            tasks: list[_Task] = []
            most = max(len(group.micro_batches) for group in step.groups)
            group = next((g for g in step.groups if 0 <= mine - g.first_rank < self.kinds[g.kind].ranks), None)
            parts: Sequence[Any] = () if group is None else group.micro_batches
            for part, _ in zip_longest(parts, range(most if self.lockstep else len(parts))):
                empty = part is None or group is None
                tasks.append(_EMPTY if empty else _Task(group.kind, mine - group.first_rank, tuple(part)))
            runs.append(tasks)
        if self.lockstep:
            runs = [[task for run in runs for task in run]]
        return [run for run in runs if run] or [[_EMPTY]]

    def _check(self, steps: Sequence[MicroStep], lengths: IntArray) -> None:
        ranks = self.parallel.spec.dp * self.parallel.spec.cp
        for step in steps:
            taken: list[int] = []
            for group in step.groups:
                size = self.kinds[group.kind].ranks
                if group.first_rank % size:
                    raise RuntimePlanError(f"a group of {size} ranks begins at rank {group.first_rank}: not aligned")
                taken += range(group.first_rank, group.first_rank + size)
            if len(set(taken)) != len(taken) or max(taken, default=ranks) >= ranks:
                raise RuntimePlanError(f"groups overlap, or need more than the {ranks} data ranks, or there is none")
        dealt = sorted(i for g in _groups(steps) for part in g.micro_batches for i in part)
        if dealt != list(range(len(lengths))):
            raise RuntimePlanError(f"the dispatch does not hold each of the batch's {len(lengths)} documents once")

    def _micro_batch(self, task: _Task, lengths: IntArray, read: Read) -> MicroBatch:
        packed = self._pack(task, lengths)
        strategy = self.kinds[task.kind or 0].strategy
        return MicroBatch(packed, strategy, *_gathered(packed, task, read, self.parallel.device))

    def _pack(self, task: _Task, lengths: IntArray) -> Packed:
        p = self.parallel
        degrees = (1, 1) if task.kind is None else (self.kinds[task.kind].ulysses, self.kinds[task.kind].ring)
        groups = (None, None) if task.kind is None else self.groups[degrees]
        tp = p.spec.tp if p.spec.sequence_parallel else 1
        return pack([int(lengths[i]) for i in task.documents], degrees, task.at, groups, tp, p.device)


def _groups(steps: Sequence[MicroStep]) -> list[Group]:
    return [group for step in steps for group in step.groups]


def _gathered(packed: Packed, task: _Task, read: Read, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, labels) of this rank, (1, n) each; only documents of which it has a part are read."""
    positions = packed.held.cpu().numpy()
    tokens = np.zeros(len(positions), np.int64)
    labels = np.full(len(positions), IGNORE_INDEX)
    for local in np.unique(packed.document[packed.document >= 0]):
        here = packed.document == local
        of_document, of_labels = read(task.documents[local])
        tokens[here], labels[here] = of_document[positions[here]], of_labels[positions[here]]
    return torch.from_numpy(tokens)[None].to(device), torch.from_numpy(labels)[None].to(device)
