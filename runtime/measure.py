"""What a run writes down: metrics of every step as JSON lines, and one measured-step record at its end.

The record (`run.json`, schema planner.run/1) holds the plan that ran, so that `planner accuracy --runs run.json`
predicts it again with the plan's own model, cluster and engine and reads it like a published run.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from planner.files import write_atomic
from planner.kernels import dispatch
from planner.plan import Plan, plan_body
from planner.runtime.memory import TensorBytes, peak_of
from planner.runtime.parallel import Parallel, StepResult

T = TypeVar("T")
SCHEMA = "planner.run/1"
_WARM_UP = 2  # steps that are not steady yet; tensors are counted in the last of them


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory of this rank so far: torch's allocator on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(slots=True)
class Metrics:
    """Rank 0 writes `metrics.jsonl` and prints a line now and then; `finish` gathers peaks and writes `run.json`."""

    folder: Path
    plan: Plan
    device: torch.device
    every: int = 1
    options: dict[str, Any] = field(default_factory=dict)  # of the run, that the plan does not have
    step_s: list[float] = field(default_factory=list)
    data_s: list[float] = field(default_factory=list)
    peak: TensorBytes | None = None
    _last: float = field(default_factory=time.perf_counter)

    def data(self, get: Callable[[], T]) -> T:
        """Get the data of a step, on the clock."""
        begin = time.perf_counter()
        data = get()
        self.data_s.append(time.perf_counter() - begin)
        return data

    def run(self, p: Parallel, step: Callable[[], StepResult]) -> StepResult:
        """Take a step; in the last step of the warm-up, count the tensors of this rank."""
        if len(self.step_s) != _WARM_UP - 1:
            return step()
        result, self.peak = peak_of(p, step)
        return result

    def step(self, step: int, loss: float, grad_norm: float, lr: float, tokens: int) -> None:
        """Note one step that ended now."""
        now = time.perf_counter()
        took, self._last = now - self._last, now
        self.step_s.append(took)
        if dist.get_rank():
            return
        d = self.plan.inputs.cluster.device
        rate = d.peak_flops_per_s.get(self.plan.inputs.graph.dtype)
        peak = rate.value * self.plan.decisions.num_gpus if rate else 0.0
        mfu = self.plan.predicted.model_flops / took / peak if peak else None
        memory_bytes = peak_memory_bytes(self.device)
        row = {
            "step": step, "loss": loss, "grad_norm": grad_norm, "lr": lr, "tokens": tokens, "step_s": took,
            "tokens_per_s": tokens / took, "mfu_frac": mfu, "memory_bytes": memory_bytes,
        }  # fmt: skip
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if step % self.every == 0:
            shown = f"  MFU {mfu:.1%}" if mfu is not None and self.device.type == "cuda" else ""
            print(
                f"step {step}  loss {loss:.4f}  |g| {grad_norm:.3f}  lr {lr:.2e}  {tokens / took:,.0f} tokens/s"
                f"{shown}  {memory_bytes / 2**30:.2f} GiB",
                flush=True,
            )

    def finish(self) -> None:
        """Write the measured-step record: configuration, times, memory of every rank, software and hardware."""
        mine = (peak_memory_bytes(self.device), self.peak.device_bytes if self.peak else None,
                self.peak.host_bytes if self.peak else None)  # fmt: skip
        peaks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(peaks, mine)
        if dist.get_rank() or not self.step_s:
            return
        process, tensors, host = zip(*peaks, strict=True)
        steady = self.step_s[_WARM_UP:]
        cuda = self.device.type == "cuda"
        record = {
            "schema": SCHEMA, "plan": plan_body(self.plan), "options": self.options,
            "step_time_s": statistics.median(steady) if steady else None, "all_step_s": self.step_s,
            "all_data_s": self.data_s, "warm_up_steps": _WARM_UP,
            "peak_tensor_bytes": None if None in tensors else tensors,
            "peak_host_tensor_bytes": None if None in host else host,
            "peak_process_bytes": None if cuda else process,
            "torch": torch.__version__, "python": platform.python_version(), "num_cpus": os.cpu_count(),
            "kernels": dispatch.table(self.device.type), "device_type": self.device.type,
            "device": torch.cuda.get_device_name(self.device) if cuda else platform.processor(),
        }  # fmt: skip
        write_atomic(self.folder / "run.json", (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
