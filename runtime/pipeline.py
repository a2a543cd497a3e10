"""A plan's pipeline on torch.distributed.pipelining: our action table on torch's schedule runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _Action, _ComputationType, _PipelineScheduleRuntime

from planner.costmodel.schedule import BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, actions, stage_of
from planner.costmodel.strategy import PlanSpec

_TYPES = {
    FORWARD: _ComputationType.FORWARD,
    BACKWARD: _ComputationType.FULL_BACKWARD,
    BACKWARD_INPUT: _ComputationType.BACKWARD_INPUT,
    BACKWARD_WEIGHT: _ComputationType.BACKWARD_WEIGHT,
}


class StageModule(nn.Module):
    """What torch's runtime sees of a stage: local activations in, local activations (or the loss) out."""

    def __init__(self, run: Callable[..., torch.Tensor], params: list[nn.Parameter]) -> None:
        super().__init__()
        self.run, self.params = run, params

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the stage."""
        return self.run(*args, **kwargs)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The stage's own parameters as they are now (FSDP swaps them)."""
        return iter(self.params() if callable(self.params) else self.params)


def stages_of(spec: PlanSpec, rank: int) -> list[int]:
    """Virtual stages of a pipeline rank, in chunk order."""
    return [stage_of(spec.schedule, spec.pp, rank, chunk) for chunk in range(spec.vpp)]


def build_schedule(
    spec: PlanSpec,
    modules: dict[int, StageModule],
    edges: list[torch.Tensor],
    device: torch.device,
    group: dist.ProcessGroup,
) -> _PipelineScheduleRuntime:
    """Torch's runtime on the plan's own table. `edges[s]`: a meta tensor like what crosses into stage s."""
    stages = []
    for index, module in modules.items():
        first, last = index == 0, index == len(edges) - 1
        stages.append(
            PipelineStage(
                module, index, len(edges), device,
                input_args=() if first else (edges[index],),
                output_args=(torch.empty((), dtype=edges[-1].dtype, device="meta", requires_grad=True),)
                if last else (edges[index + 1],),
                group=group,
            )
        )  # fmt: skip
    runtime = _PipelineScheduleRuntime(
        stages, spec.num_microbatches, loss_fn=lambda output, _target: output, scale_grads=False
    )
    table = actions(spec.schedule, spec.num_microbatches, spec.pp, spec.vpp)
    runtime._prepare_schedule_with_comms(
        {
            rank: [_Action(stage_of(spec.schedule, spec.pp, rank, a.chunk), _TYPES[a.op], a.microbatch) for a in order]
            for rank, order in enumerate(table)
        }
    )
    return runtime
