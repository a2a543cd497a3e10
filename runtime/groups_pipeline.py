"""1F1B over micro-batches of packed documents, each of a shape of its own.

torch's PipelineStage fixes one shape for all micro-batches. Here every stage of a column has the same micro-batches,
so both ends of a transfer know its shape; the order is that of our action table, with torch's sends and receives put
between so that no two ranks wait for each other (_add_send_recv, as its own runtime has them).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining.schedules import _Action, _add_send_recv, _ComputationType

from planner.costmodel.schedule import FORWARD, actions
from planner.costmodel.strategy import LayerStrategy, PlanSpec
from planner.runtime.packing import Packed
from planner.runtime.parallel import Parallel

_Op = _ComputationType


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Packed documents of this rank's column of the pipeline, and the strategy of every layer for them."""

    packed: Packed
    strategy: LayerStrategy
    tokens: torch.Tensor
    labels: torch.Tensor

    def enter(self, p: Parallel) -> None:
        """Let the rules and layers work on this micro-batch, in forward and where backward computes again."""
        p.ctx.packed, p.ctx.strategy = self.packed, self.strategy


@functools.lru_cache(maxsize=64)
def _order(spec: PlanSpec, num_microbatches: int, rank: int) -> list[Any]:
    """Computation and transfers of a rank; stage and rank are the same number under 1F1B."""
    table = {
        stage: [_Action(stage, _Op.FORWARD if a.op == FORWARD else _Op.FULL_BACKWARD, a.microbatch) for a in order]
        for stage, order in enumerate(actions(spec.schedule, num_microbatches, spec.pp, 1))
    }
    return _add_send_recv(table, stage_to_rank=lambda stage: stage, num_stages=spec.pp)[rank]


@dataclass(slots=True)
class _Column:
    """What one rank holds of the micro-batches in flight, by their number."""

    p: Parallel
    batches: Sequence[MicroBatch]
    counted: torch.Tensor
    total: torch.Tensor
    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    grads: dict[int, torch.Tensor] = field(default_factory=dict)
    arriving: dict[int, list[dist.Work]] = field(default_factory=dict)  # forward: i, backward: -1 - i
    leaving: list[tuple[list[dist.Work], torch.Tensor]] = field(default_factory=list)

    def run(self) -> None:
        spec, stage = self.p.spec, self.p.mesh.position["pp"]
        does = {
            _Op.RECV_F: self.receive_input, _Op.FORWARD: self.forward,
            _Op.SEND_F: lambda i: self.send(self.outputs[i].detach(), stage + 1),
            _Op.RECV_B: self.receive_grad, _Op.FULL_BACKWARD: self.backward,
            _Op.SEND_B: lambda i: self.send(self.grads.pop(i), stage - 1),
        }  # fmt: skip
        for action in _order(spec, len(self.batches), stage):
            does[action.computation_type](action.microbatch_index)
        for works, _ in self.leaving:
            _wait(works)

    def receive_input(self, i: int) -> None:
        p, stage = self.p, self.p.mesh.position["pp"]
        self.batches[i].enter(p)
        last = p.spec.stage_layers[stage][0] - 1  # layer of the stage before
        shape, dtype = p.residual_shape(p.handed_on(last)), p.dtype or p.chain.shapes[last].dtype
        self.inputs[i] = torch.empty(shape, dtype=dtype, device=p.device)
        self.arriving[i] = self.transfer(dist.irecv, self.inputs[i], stage - 1)

    def forward(self, i: int) -> None:
        p, batch, stage = self.p, self.batches[i], self.p.mesh.position["pp"]
        if i in self.arriving:
            _wait(self.arriving.pop(i))
            self.inputs[i].requires_grad_()
        batch.enter(p)
        out = p.run(stage, self.inputs.get(i), batch.tokens, batch.labels)
        if stage == p.spec.pp - 1:
            out = out / self.counted
            self.total += out.detach()
        self.outputs[i] = out

    def receive_grad(self, i: int) -> None:
        self.grads[i] = torch.empty_like(self.outputs[i])
        self.arriving[-1 - i] = self.transfer(dist.irecv, self.grads[i], self.p.mesh.position["pp"] + 1)

    def backward(self, i: int) -> None:
        if -1 - i in self.arriving:
            _wait(self.arriving.pop(-1 - i))
        self.batches[i].enter(self.p)
        torch.autograd.backward(self.outputs.pop(i), self.grads.pop(i, None))
        received = self.inputs.pop(i, None)
        if received is not None:
            assert received.grad is not None
            self.grads[i] = received.grad

    def send(self, x: torch.Tensor, stage: int) -> None:
        """Keep what is sent until it has left."""
        self.leaving = [(works, held) for works, held in self.leaving if not all(w.is_completed() for w in works)]
        x = x.contiguous()
        self.leaving.append((self.transfer(dist.isend, x, stage), x))

    def transfer(self, op: Any, x: torch.Tensor, stage: int) -> list[dist.Work]:
        group = self.p.mesh.pp
        return dist.batch_isend_irecv([dist.P2POp(op, x, group=group, group_peer=stage)])


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


def run_pipeline(p: Parallel, batches: Sequence[MicroBatch], counted: torch.Tensor) -> torch.Tensor:
    """Forward and backward of all; the sum of their losses over `counted` tokens on the last stage, 0 on others."""
    column = _Column(p, batches, counted, torch.zeros((), dtype=torch.float64, device=p.device))
    column.run()
    return column.total
