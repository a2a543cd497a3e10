"""One rank of the memory runs: a step under each plan, its bytes of tensors at the peak and between steps."""

from __future__ import annotations

import memory_model
import msgspec
import torch

from planner.costmodel.strategy import PlanSpec
from planner.profiler.graph_io import decode_graph
from planner.runtime import head
from planner.runtime.apply import parallelize
from planner.runtime.checkpoint import moments_of
from planner.runtime.memory import held, peak_of


def run(case):
    """For each plan: bytes (on the device, on the host) at the peak of a step, and between steps."""
    graphs = {}
    for builder, path in case["graphs"].items():
        with open(path, "rb") as file:
            graphs[builder] = decode_graph(file.read())
    head.CHUNK_ROWS = memory_model.CHUNK_ROWS
    found = []
    for builder, decisions in case["specs"]:
        plan, graph = msgspec.convert(decisions, PlanSpec), graphs[builder]
        model = getattr(memory_model, builder)().to(torch.float32)
        p = parallelize(model, plan, graph, precision=torch.bfloat16)
        size = plan.global_batch_size // plan.dp
        tokens = torch.randint(graph.vocab_size, (size, graph.traced_seq_len + 1))
        batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        for item in p.owned:
            moments_of(p, item)  # as after a first step
        _, peak = peak_of(p, lambda p=p, batch=batch: p.step(*batch))
        between = held(p)
        found.append([peak.device_bytes, peak.host_bytes, between.device_bytes, between.host_bytes])
    return found
