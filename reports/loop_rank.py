"""One rank of the closed loop: runs plans one after the other and tells their step times and tensor memory.

Usage: python -m planner.reports.loop_rank SPEC OUT, with RANK and WORLD_SIZE in the environment.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from planner.files import read_plan
from planner.plan import Plan
from planner.profiler.timing import Ranks
from planner.runtime.apply import parallelize_plan
from planner.runtime.data import Batches
from planner.runtime.errors import RuntimePlanError
from planner.runtime.memory import peak_of
from planner.runtime.model_source import load_source
from planner.runtime.parallel import Parallel

WARM_UP = 2
_STEPS_S, _MOST_STEPS = 2.0, 10  # short steps are repeated more often
_TIMEOUT_S = 120.0


def run(spec: dict[str, Any], out: Path) -> None:
    """Every plan of the spec in one job (torch caches meshes, so that a second job is not possible); a line each."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{spec['folder']}/rendezvous", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=_TIMEOUT_S),
    )  # fmt: skip
    for path in spec["plans"]:
        plan = read_plan(Path(path))
        try:
            found: dict[str, Any] = _memory(plan, spec["model"]) if spec["memory"] else _times(plan, spec, device)
        except RuntimePlanError as error:  # every rank sees it
            found = {"failed": str(error)}
        if rank == 0:
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"plan": path, **found}) + "\n")
        gc.collect()
        dist.barrier()


def _apply(plan: Plan, model: str, device: torch.device) -> tuple[Parallel, Batches]:
    source = load_source(model, 0)
    assert source.dataset is not None
    inputs = plan.inputs
    rows = [row[: inputs.seq_len + 1] for row in source.dataset()]
    batches = Batches(rows, inputs.seq_len, inputs.global_batch_size, 0, inputs.graph.vocab_size)
    return parallelize_plan(source.model, plan, device=device, precision=source.precision), batches


def _step(parallel: Parallel, batches: Batches, number: int) -> None:
    size = batches.global_batch_size
    part = parallel.mesh.position["dp"]
    tokens, labels = batches.rank_slice(number * size, part, parallel.spec.dp)
    parallel.step(tokens.to(parallel.device), labels.to(parallel.device), lr=1e-4)


def _times(plan: Plan, spec: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Seconds of steps after warm-up, all ranks at a barrier before each; the slowest rank counts.

    At least `steps` of them and as many as fit into _STEPS_S. On a GPU also the peak bytes of its allocator.
    """
    parallel, batches = _apply(plan, spec["model"], device)
    ranks = Ranks(dist.group.WORLD, dist.get_world_size())
    for number in range(WARM_UP):
        _step(parallel, batches, number)
    times: list[float] = []
    while len(times) < spec["steps"] or (sum(times) < _STEPS_S and len(times) < _MOST_STEPS):
        ranks.barrier()
        start_s = time.perf_counter()
        _step(parallel, batches, WARM_UP + len(times))
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(ranks.largest(time.perf_counter() - start_s))
    found: dict[str, Any] = {"step_s": times}
    if device.type == "cuda":
        peaks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(peaks, torch.cuda.max_memory_allocated(device))
        found["peak_bytes"] = peaks
    return found


def _memory(plan: Plan, model: str) -> dict[str, Any]:
    """Peak bytes of tensors on every rank in a steady step, as torch's CPU allocator counts them."""
    parallel, batches = _apply(plan, model, torch.device("cpu"))
    _step(parallel, batches, 0)
    gc.collect()
    _, peak = peak_of(parallel, lambda: _step(parallel, batches, 1))
    peaks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(peaks, peak.device_bytes)
    return {"peak_bytes": peaks}


if __name__ == "__main__":
    run(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
    os._exit(0)
