"""One rank of a profiling run: works through cases until nothing is uncertain or the time is up.

Usage: python -m planner.profiler.worker SPEC OUT, with torchrun's environment variables. Rank 0 chooses the next
case and appends a line of JSON per measurement to OUT at once, so that nothing is lost if a rank dies.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist

from planner.profiler.cases import Case
from planner.profiler.choose import Chooser
from planner.profiler.comm_bench import Groups, make_comm
from planner.profiler.model_bench import Bench
from planner.profiler.ops import make_op
from planner.profiler.runtime_bench import make_runtime
from planner.profiler.timing import WINDOW_S, Clock, Job, Ranks, Timing, measure

_STOP = -1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What the ranks are told: cases, which of them are known already (index -> spread), and until when.

    `deadline_s`: on rank 0's monotonic clock. `rendezvous`: a file's URL, or env:// under torchrun.
    `reference`: the small model's graph as JSON, "" if no case needs it.
    """

    cases: tuple[Case, ...]
    known: dict[str, float]
    deadline_s: float
    platform: str
    threads: int
    rendezvous: str
    reference: str


def read_spec(text: str) -> Spec:
    """The inverse of json.dumps(dataclasses.asdict(spec))."""
    data = json.loads(text)
    return Spec(**{**data, "cases": tuple(Case(**case) for case in data["cases"])})


def run(spec: Spec, out: IO[str] | None) -> None:
    """Measure on this rank; rank 0 writes to `out`."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(spec.threads)
    device = torch.device("cpu")
    if spec.platform == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    control = _join(spec, device, rank, world)
    if out:
        _write(out, {"conditions": conditions(spec, device, world)})
    chooser = Chooser(spec.cases)
    for index, spread_frac in spec.known.items():
        chooser.measured(int(index), spread_frac)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    turns = max(here / (os.cpu_count() or 1), 1.0) if device.type == "cpu" else 1.0
    _work(spec, chooser, _maker(spec, device, rank, world), Clock(device, turns), Ranks(control, world), out)
    if dist.is_initialized():
        dist.barrier(control)
        dist.destroy_process_group()


def _work(
    spec: Spec, chooser: Chooser, make: Callable[[Case], Job], clock: Clock, ranks: Ranks, out: IO[str] | None
) -> None:
    """Case after case, chosen by rank 0 (which has `out`) and followed by all."""
    window_s = clock.turns * WINDOW_S  # long against a turn on a shared core
    while True:
        late = time.monotonic() >= spec.deadline_s
        chosen = None if late or out is None else chooser.next()
        index = int(ranks.largest(_STOP if chosen is None else float(chosen)))
        if index < 0:
            break
        if out:
            _write(out, {"starting": index, "left": chooser.left})
        timing, job, why = _measure(spec.cases[index], make, clock, ranks, window_s)
        if timing is None or job is None:
            chooser.failed(index)
            found: dict[str, Any] = {"failed": why}
        else:
            chooser.measured(index, timing.spread_frac)
            found = {"saved_bytes": job.saved_bytes, **dataclasses.asdict(timing)}
        if out:
            _write(out, {"index": index, **found})
    if out:
        _write(out, {"settled": not late})


def _join(spec: Spec, device: torch.device, rank: int, world: int) -> dist.ProcessGroup | None:
    """The control group, on gloo whatever the device; the default group carries what is measured."""
    if world == 1:
        return None
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=spec.rendezvous, rank=rank, world_size=world)
    return dist.new_group(backend="gloo")


def _maker(spec: Spec, device: torch.device, rank: int, world: int) -> Callable[[Case], Job]:
    groups = Groups(rank, world)

    @cache
    def bench(source: str, seq_len: float) -> Bench:
        return Bench(source, int(seq_len), device)

    def make(case: Case) -> Job:
        if case.kind.startswith("collective"):
            return make_comm(case, device, groups)
        if case.kind == "runtime":
            return make_runtime(case, device, world, spec.reference)
        if case.kind == "layer":
            return bench(case.source, case.dims["seq_len"]).make(case)
        return make_op(case, device)

    return make


def _measure(
    case: Case, make: Callable[[Case], Job], clock: Clock, ranks: Ranks, window_s: float
) -> tuple[Timing | None, Job | None, str]:
    """(timing, job, "") or (None, None, why): ranks agree on whether the case can be made before they time it."""
    job, why = None, ""
    try:
        job = make(case)
        if not case.kind.startswith("collective"):
            job.seconds(clock, 1)
    except Exception as error:  # a user's layer raises what it likes
        job, why = None, f"{type(error).__name__}: {error}"
    if ranks.largest(0.0 if job else 1.0) > 0:
        return None, None, why or "another rank cannot"
    assert job is not None
    return measure(job, clock, ranks, window_s=window_s), job, ""


def conditions(spec: Spec, device: torch.device, world: int) -> dict[str, Any]:
    """The conditions of this run, as costmodel.profile.Conditions."""
    software = {"python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory, local = properties.name, properties.total_memory, torch.cuda.device_count()
        software |= {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
        backend = "nccl"
    else:
        name, memory, local = cpu_name(), _host_memory_bytes(), os.cpu_count() or 1
        backend = "gloo"
    return {
        "platform": device.type, "device": name, "devices_per_node": local, "memory_bytes": memory,
        "backend": backend, "ranks": world, "threads": spec.threads, "software": software,
    }  # fmt: skip


def cpu_name() -> str:
    """The processor as the system names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def _host_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _write(out: IO[str], line: dict[str, Any]) -> None:
    out.write(json.dumps(line) + "\n")
    out.flush()


def main(argv: list[str]) -> int:
    """Entry point of a rank that the command started."""
    spec = read_spec(Path(argv[0]).read_text())
    first = os.environ.get("RANK", "0") == "0"
    with open(argv[1] if first else os.devnull, "a", encoding="utf-8") as out:
        run(spec, out if first else None)
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # threads of the user's module do not hold us up
