"""What a run writes down: metrics of every step as JSON lines, and one measured-step record at its end."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from planner.plan import Plan

SCHEMA = "planner.run/1"
_WARM_UP = 2  # steps that are not steady yet


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
    step_s: list[float] = field(default_factory=list)
    _last: float = field(default_factory=time.perf_counter)

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
        row = {
            "step": step, "loss": loss, "grad_norm": grad_norm, "lr": lr, "tokens": tokens, "step_s": took,
            "tokens_per_s": tokens / took, "mfu_frac": mfu, "memory_bytes": peak_memory_bytes(self.device),
        }  # fmt: skip
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if step % self.every == 0:
            shown = f"  MFU {mfu:.1%}" if mfu is not None and self.device.type == "cuda" else ""
            print(
                f"step {step}  loss {loss:.4f}  |g| {grad_norm:.3f}  lr {lr:.2e}  {tokens / took:,.0f} tokens/s"
                f"{shown}  {row['memory_bytes'] / 2**30:.2f} GiB",
                flush=True,
            )

    def finish(self) -> None:
        """Write the measured-step record: configuration, times, memory of every rank, software and hardware."""
        peaks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(peaks, peak_memory_bytes(self.device))
        steady = self.step_s[_WARM_UP:] or self.step_s
        if dist.get_rank() or not steady:
            return
        inputs = self.plan.inputs
        record = {
            "schema": SCHEMA,
            "decisions": msgspec.to_builtins(self.plan.decisions),
            "model": inputs.graph.name, "graph_sha256": inputs.graph_sha256, "cluster": inputs.cluster.name,
            "seq_len": inputs.seq_len, "step_time_s": statistics.median(steady), "all_step_s": self.step_s,
            "warm_up_steps": _WARM_UP, "peak_memory_bytes": peaks,
            "memory_kind": "allocated" if self.device.type == "cuda" else "process",
            "predicted_step_s": self.plan.predicted.step_s,
            "predicted_peak_memory_bytes": self.plan.predicted.peak_memory_bytes,
            "torch": torch.__version__, "python": platform.python_version(), "num_cpus": os.cpu_count(),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.processor(),
        }  # fmt: skip
        temporary = self.folder / "run.json.tmp"
        temporary.write_text(json.dumps(record, indent=1, sort_keys=True))
        os.replace(temporary, self.folder / "run.json")
