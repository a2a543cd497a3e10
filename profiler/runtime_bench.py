"""What the runtime costs the host beside a model's own kernels: a small model under one plan option at a time.

"plain" is the model alone, on the kernels that the runtime uses here; "shard" has its layers under FSDP2, as data
parallelism has them, and "sync" has them gathered and reduced as well; "tp", "sp" (tp with sequence parallelism) and
"cp" (Ulysses) run it on halves of tensors on every two ranks, which are replicas of the others, by the runtime's rules
and with real collectives of next to no bytes. All of one micro-batch, which reduces no gradients but in "sync". "pp" is
a pipeline over all ranks, 1F1B with two micro-batches for every stage.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

from planner.costmodel.profile import PER_STAGE
from planner.costmodel.strategy import LayerStrategy, PlanSpec
from planner.profiler.cases import Case
from planner.profiler.graph_io import decode_graph
from planner.profiler.reference import model as reference
from planner.profiler.timing import Job, Work


def plan_spec(variant: str, world: int) -> PlanSpec:
    """The plan of a variant on `world` ranks."""
    half = world // 2
    degrees: dict[str, Any] = {
        "shard": {"dp_shard": world},
        "sync": {"dp_shard": world},
        "tp": {"tp": 2, "dp_shard": half},
        "sp": {"tp": 2, "dp_shard": half, "sequence_parallel": True},
        "cp": {"ulysses": 2, "dp_shard": half},
        "pp": {"pp": world},
    }
    batch = {"shard": world, "sync": world, "pp": PER_STAGE * world}.get(variant, half)
    ends = np.linspace(0, reference.LAYERS, degrees[variant].get("pp", 1) + 1).astype(int).tolist()
    return PlanSpec(
        global_batch_size=batch, stage_layers=tuple(itertools.pairwise(ends)),
        layers=(LayerStrategy(recompute="none"),) * reference.LAYERS, **degrees[variant],
    )  # fmt: skip


@cache
def _forward(variant: str, device: torch.device, world: int, graph: str) -> Callable[[], torch.Tensor]:
    """The loss of one micro-batch of the model under a variant."""
    from planner.runtime.apply import parallelize, use_kernels
    from planner.runtime.parallel import next_token_loss
    from planner.runtime.zero import before_backward

    torch.manual_seed(0)
    model = reference.Reference()
    tokens = torch.zeros((1, reference.SEQ_LEN), dtype=torch.int64, device=device)
    if variant == "plain":
        use_kernels(model.to(device), device)
        return lambda: next_token_loss(model(tokens), tokens)
    parallel = parallelize(model, plan_spec(variant, world), decode_graph(graph.encode()), device=device)

    def forward() -> torch.Tensor:
        before_backward(model, parallel.spec, last=variant == "sync")
        return parallel.run(0, None, tokens, tokens)

    return forward


def _step(device: torch.device, world: int, graph: str) -> Work:
    """All micro-batches of a pipeline, forward and backward."""
    from planner.runtime.apply import parallelize

    spec = plan_spec("pp", world)
    parallel = parallelize(reference.Reference(), spec, decode_graph(graph.encode()), device=device)
    tokens = torch.zeros((spec.global_batch_size, reference.SEQ_LEN), dtype=torch.int64, device=device)
    return lambda: parallel.backward(tokens, tokens)


def make_runtime(case: Case, device: torch.device, world: int, graph: str) -> Job:
    """The job of a variant, forward or backward, with the reference model's graph as JSON."""
    variant, _, way = case.name.partition("/")
    if way == "step":
        return Job(work=_step(device, world, graph))
    forward = _forward(variant, device, world, graph)

    def backward() -> Work:
        return forward().backward

    def gathering() -> Work:
        backward()()  # frees gathered parameters
        return forward

    if way == "backward":
        return Job(prepare=backward)
    return Job(prepare=gathering) if variant == "sync" else Job(work=forward)
