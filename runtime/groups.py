"""Groups: a step over packed documents, for which the data ranks form groups of unequal size in every micro-step.

A dispatch (planner.dispatch) says which ranks form a group, of which kind, and which documents are in each of its
micro-batches. Parameters, ZeRO and TP are those of the plan's state layout; only the context-parallel groups change.
Gradients are those of the sum of token losses over the tokens of the whole batch, however documents were dealt
(ByteScale, arXiv 2502.21231, section 3.2), since every micro-batch's sum is divided by the same number.

ZeRO-2/3 communicate over all data ranks in every micro-batch, so ranks with fewer of them add empty ones. ZeRO-0/1
gather with the first forward and reduce with the last backward of a rank: with one micro-step all ranks of a group
are there together, however many micro-batches other groups have. With more, where a rank of a group may be done and
another not, parameters are gathered before the first and gradients reduced after the last (a rank that reduces a layer
would wait for one that waits for it in the next layer's attention).
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
        for ulysses, ring in sorted({(kind.ulysses, kind.ring) for kind in self.kinds}):
            self.groups[ulysses, ring] = self.parallel.mesh.data_groups(ulysses, ring)

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
        tasks = self.tasks(steps, lengths)
        packs = [self._pack(task, lengths) for task in tasks]
        batches = [_gathered(packed, task, read, p.device) for packed, task in zip(packs, tasks, strict=True)]
        counted = torch.stack([(labels != IGNORE_INDEX).sum() for _, labels in batches]).sum().double()
        dist.all_reduce(counted, group=p.mesh.data)
        if not counted:
            raise RuntimePlanError("no token of this batch has a label: nothing to learn from")
        total = torch.zeros((), dtype=torch.float64, device=p.device)
        apart = len(steps) > 1 and p.spec.zero_stage < 2
        if apart:
            zero.gather_now(p.model)
        try:
            for i, (task, packed, batch) in enumerate(zip(tasks, packs, batches, strict=True)):
                zero.before_backward(p.model, p.spec, last=i == len(tasks) - 1 and not apart)
                p.ctx.packed = packed
                p.ctx.strategy = None if task.kind is None else self.kinds[task.kind].strategy
                loss = p.run(0, None, *batch) / counted
                total += loss.detach()
                loss.backward()
        finally:
            p.ctx.packed = p.ctx.strategy = None
        if apart:
            zero.reduce_now(p.model)
        dist.all_reduce(total, group=p.mesh.data)
        return float(total), int(counted)

    def tasks(self, steps: Sequence[MicroStep], lengths: IntArray) -> list[_Task]:
        """Micro-batches of this rank in order. RuntimePlanError if `steps` is no dispatch of the batch."""
        self._check(steps, lengths)
        mine = self.parallel.mesh.position["data"]
        lockstep = self.parallel.spec.zero_stage >= 2
        tasks: list[_Task] = []
        for step in steps:
            most = max(len(group.micro_batches) for group in step.groups)
            group = next((g for g in step.groups if 0 <= mine - g.first_rank < self.kinds[g.kind].ranks), None)
            parts: Sequence[Any] = () if group is None else group.micro_batches
            for part, _ in zip_longest(parts, range(most if lockstep else len(parts))):
                empty = part is None or group is None
                tasks.append(_EMPTY if empty else _Task(group.kind, mine - group.first_rank, tuple(part)))
        return tasks or [_EMPTY]

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
