"""What the runtime costs the host beside a model's own kernels: a small model under one plan option at a time.

"plain" is the model alone; "shard" has its layers under FSDP2, as data parallelism has them; "tp", "sp" (tp with
sequence parallelism) and "cp" (Ulysses) run it on parts of tensors over all ranks, by the runtime's rules and with real
collectives of next to no bytes. All of one micro-batch that reduces no gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from planner.costmodel.graph import ModelGraph
from planner.costmodel.strategy import LayerStrategy, PlanSpec
from planner.profiler.cases import Case
from planner.profiler.reference import model as reference
from planner.profiler.timing import Job, Work


@cache
def reference_graph() -> ModelGraph:
    """The traced reference model."""
    from planner.profiler.child import trace
    from planner.profiler.graph_io import decode_graph

    path = Path(reference.__file__)
    return decode_graph(trace(path, "Reference", reference.SEQ_LEN, 1))


def plan_spec(variant: str, world: int) -> PlanSpec:
    """The plan of a variant on `world` ranks."""
    degrees: dict[str, Any] = {
        "shard": {"dp_shard": world},
        "tp": {"tp": world},
        "sp": {"tp": world, "sequence_parallel": True},
        "cp": {"ulysses": world},
    }
    return PlanSpec(
        global_batch_size=world if variant == "shard" else 1, stage_layers=((0, reference.LAYERS),),
        layers=(LayerStrategy(recompute="none"),) * reference.LAYERS, **degrees[variant],
    )  # fmt: skip


@cache
def _forward(variant: str, device: torch.device, world: int) -> Callable[[], torch.Tensor]:
    """The loss of one micro-batch of the model under a variant."""
    from planner.runtime.apply import parallelize
    from planner.runtime.parallel import next_token_loss
    from planner.runtime.zero import before_backward

    torch.manual_seed(0)
    model = reference.Reference()
    tokens = torch.zeros((1, reference.SEQ_LEN), dtype=torch.int64, device=device)
    if variant == "plain":
        model.to(device)
        return lambda: next_token_loss(model(tokens), tokens)
    parallel = parallelize(model, plan_spec(variant, world), reference_graph(), device=device)

    def forward() -> torch.Tensor:
        before_backward(model, parallel.spec, last=False)
        return parallel.run(0, None, tokens, tokens)

    return forward


def make_runtime(case: Case, device: torch.device, world: int) -> Job:
    """The job of a variant, forward or backward."""
    variant, _, way = case.name.partition("/")
    forward = _forward(variant, device, world)

    def prepare() -> Work:
        return forward().backward

    return Job(work=forward) if way == "forward" else Job(prepare=prepare)
