"""Mixed precision: bfloat16 forward and backward over float32 masters, alone and in a pipeline."""

from __future__ import annotations

import msgspec
import parity_rank
import torch

from planner.costmodel.strategy import PlanSpec
from planner.profiler.graph_io import decode_graph
from planner.runtime.apply import parallelize
from planner.runtime.zero import local


def run(cases):
    """Losses of three steps and the dtype of the masters, for each case."""
    found = []
    for case in cases:
        plan = msgspec.convert(case["spec"], PlanSpec)
        with open(case["graph"], "rb") as file:
            graph = decode_graph(file.read())
        model = parity_rank.build(case).to(torch.float32)
        p = parallelize(model, plan, graph, seq_len=case["seq_len"], precision=torch.bfloat16)
        at, size = p.mesh.position["dp"], plan.global_batch_size // plan.dp
        losses = []
        for tokens, labels in parity_rank.batches(case, case["vocab"]):
            losses.append(p.step(tokens[at * size : (at + 1) * size], labels[at * size : (at + 1) * size]).loss)
        found.append((losses, sorted({str(local(item.param).dtype) for item in p.owned})))
    return found
