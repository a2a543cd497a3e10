"""A profiling run: lists the cases, starts the ranks (or is one of torchrun's), collects what they measure.

No torch in this process unless torchrun started it. Whatever ends the run (budget, Ctrl-C, a dead rank), what was
measured by then is in the profile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from planner.costmodel.compute import attention_s, gemm_s
from planner.costmodel.evidence import Source
from planner.costmodel.graph import ModelGraph
from planner.costmodel.hardware import ClusterSpec
from planner.costmodel.profile import Conditions, Profile, Sample, make_profile, merge
from planner.costmodel.profiled import same_kernel
from planner.kernels import dispatch
from planner.profiler.awake import cores_awake
from planner.profiler.cases import Case, comm_cases, kernel_cases, layer_cases, op_cases, runtime_cases, weighted
from planner.profiler.errors import TraceError
from planner.profiler.graph_io import encode_graph
from planner.profiler.trace import child_environment, trace_model

WHAT = ("ops", "comm", "model", "all")
_LONGEST_FRAC = 0.01  # of the budget: a kernel expected to run longer for one call is left out
INTERRUPTED = "interrupted"  # what `died` says after Ctrl-C
_REFERENCE = Path(__file__).parent / "reference" / "model.py"
_GRACE_S = 20.0  # beyond the budget: the last measurement, and the end of the ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to profile: `what` of WHAT, with `ranks` processes of `threads` threads each, for `budget_s` seconds.

    `graphs`: by their source (file, file:function) the models whose shapes and layers are measured, of one dtype.
    """

    what: str
    platform: str
    cluster: ClusterSpec
    graphs: Mapping[str, ModelGraph]
    ranks: int
    threads: int
    budget_s: float
    today: str
    tool_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run is: what is measured now, how much is done, still uncertain, and seconds left."""

    case: Case
    done: int
    left: int
    left_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The profile, new samples, whether nothing uncertain was left, what could not be measured, and what died."""

    profile: Profile
    measured: int
    settled: bool
    failed: tuple[tuple[Case, str], ...]
    died: str


class ProfileRunError(TraceError):
    """Nothing could be measured: one line that says why."""


def list_cases(request: Request) -> list[Case]:
    """The cases of a request, those left out whose one call would take a large part of the budget."""
    graphs = request.graphs.values()
    dtype = next((graph.dtype for graph in graphs), next(iter(request.cluster.device.peak_flops_per_s)))
    memory_bytes = request.cluster.device.memory_bytes.value
    found: list[Case] = []
    if request.what in ("ops", "all"):
        for graph in graphs or (None,):
            found += op_cases(graph, dtype, request.ranks, memory_bytes)
        if request.platform == "cuda":  # a CPU has torch's forms alone, and its layers are measured
            found += kernel_cases(dtype, memory_bytes, [b for b in dispatch.BACKENDS if dispatch.installed(b)])
    if request.what in ("comm", "all"):
        found += comm_cases(request.cluster, request.ranks, memory_bytes)
        found += runtime_cases(request.ranks, request.platform)
    if request.what in ("model", "all"):
        found += [case for source, graph in request.graphs.items() for case in layer_cases(graph, source)]
    limit_s = max(_LONGEST_FRAC * request.budget_s, 0.05)
    return weighted(case for case in found if _expected_s(case, request.cluster) <= limit_s)


def _expected_s(case: Case, cluster: ClusterSpec) -> float:
    device, d = cluster.device, case.dims
    if case.kind == "gemm" and case.dtype in device.peak_flops_per_s:
        return float(gemm_s(device, case.dtype, *(d[name] for name in ("batch", "m", "n", "k"))))
    if case.kind == "attention" and case.dtype in device.peak_flops_per_s:
        causal, _, way = case.name.partition("/")
        share, backward = 0.5 if causal == "causal" else 1.0, way == "backward"
        return float(
            attention_s(device, case.dtype, **d, causal_fraction=share, implementation="flash", backward=backward)
        )
    return 0.0


def run_profile(
    request: Request, known: Profile | None = None, on_progress: Callable[[Progress], None] | None = None
) -> Outcome:
    """Measure; samples of `known` that were taken under the same conditions are not taken again.

    ProfileRunError if not one case could be measured.
    """
    cases = list_cases(request)
    if not cases:
        raise ProfileRunError(f"nothing to measure for {request.what}: comm needs --ranks 2 or more, model a model.py")
    return measure_cases(request, cases, known, on_progress)


def measure_cases(
    request: Request,
    cases: list[Case],
    known: Profile | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Outcome:
    """Measure these cases, as `run_profile`."""
    start_s = time.monotonic()
    collector = _Collector(request, cases, known, on_progress, start_s)
    done = _known(request, cases, known)
    needed = any(case.kind == "runtime" and str(i) not in done for i, case in enumerate(cases))
    spec = {
        "cases": [dataclasses.asdict(case) for case in cases],
        "known": done,
        "deadline_s": start_s + request.budget_s,
        "platform": request.platform,
        "threads": request.threads,
        "rendezvous": "env://",
        "reference": traced_reference() if needed else "",
    }
    with tempfile.TemporaryDirectory(prefix="planner-profile-") as folder:
        out = Path(folder) / "out.jsonl"
        out.touch()
        if under_torchrun():
            died = _as_a_rank(spec, out, collector)
        else:
            spec["rendezvous"] = f"file://{folder}/rendezvous"
            died = _start_ranks(request, spec, Path(folder), out, collector)
    if os.environ.get("RANK", "0") != "0":
        nothing = Profile(tool_version=request.tool_version, conditions=(), samples=())
        return Outcome(profile=nothing, measured=0, settled=True, failed=(), died="")
    return collector.outcome(died)


def traced_reference() -> str:
    """The graph of the small model that tells what the runtime costs the host, as JSON."""
    return encode_graph(trace_model(f"{_REFERENCE}:Reference")).decode()


def under_torchrun() -> bool:
    """Whether this process is already one rank of a job."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _known(request: Request, cases: list[Case], known: Profile | None) -> dict[str, float]:
    if known is None:
        return {}
    torch_version = metadata.version("torch").partition("+")[0]

    def holds(sample: Sample) -> bool:
        at = known.where(sample)
        here = (request.platform, request.threads) == (at.platform, at.threads)
        if not here or at.software.get("torch", "").partition("+")[0] != torch_version:
            return False
        return at.ranks == request.ranks or same_kernel(sample.kind, at, dataclasses.replace(at, ranks=request.ranks))

    spreads = {s.what: s.spread_frac for s in known.samples if holds(s)}
    return {str(i): spreads[case.key] for i, case in enumerate(cases) if case.key in spreads}


class _Collector:
    """Reads the lines that rank 0 writes."""

    def __init__(
        self, request: Request, cases: list[Case], known: Profile | None,
        on_progress: Callable[[Progress], None] | None, start_s: float,
    ) -> None:  # fmt: skip
        self._request, self._cases, self._known = request, cases, known
        self._on_progress, self._start_s = on_progress, start_s
        self._conditions: Conditions | None = None
        self._samples: list[Sample] = []
        self._failed: list[tuple[Case, str]] = []
        self._settled = False
        self._rest = ""
        self.current: Case | None = None

    def take(self, text: str) -> None:
        """More of the file; a line may come in parts."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line(json.loads(line))

    def _line(self, data: dict[str, Any]) -> None:
        if "conditions" in data:
            self._conditions = Conditions(**data["conditions"])
            if self._known is not None:
                _refuse_other_device(self._known, self._conditions)
        elif "settled" in data:
            self._settled = data["settled"]
        elif "starting" in data:
            self.current = self._cases[data["starting"]]
            self._report(data["left"])
        elif "failed" in data:
            self._failed.append((self._cases[data["index"]], data["failed"]))
        else:
            self._samples.append(self._sample(**data))

    def _sample(self, index: int, **values: Any) -> Sample:
        case = self._cases[index]
        return Sample(
            kind=case.kind, name=case.name, dtype=case.dtype, dims=case.dims, condition=0, source=Source.MEASURED,
            measured_on=self._request.today, **values,
        )  # fmt: skip

    def _report(self, left: int) -> None:
        if self._on_progress and self.current:
            left_s = self._request.budget_s - (time.monotonic() - self._start_s)
            done = len(self._samples)
            self._on_progress(Progress(case=self.current, done=done, left=left, left_s=max(left_s, 0.0)))

    def outcome(self, died: str) -> Outcome:
        """What there is now; ProfileRunError if there is nothing."""
        known = self._known
        if not self._samples and not (known and known.samples):
            why = died or (f"{self._failed[0][1]}" if self._failed else "the budget ended before the first measurement")
            raise ProfileRunError(f"nothing was measured: {why}")
        version = self._request.tool_version
        found = make_profile(version, (self._conditions,) if self._conditions else (), self._samples)
        if known is not None:
            found = merge(known, found, tool_version=version)
        return Outcome(
            profile=found, measured=len(self._samples), settled=self._settled, failed=tuple(self._failed), died=died
        )


def _refuse_other_device(known: Profile, now: Conditions) -> None:
    devices = {one.device for one in known.conditions}
    if devices and now.device not in devices:
        raise ProfileRunError(
            f"the profile to go on with is of {', '.join(sorted(devices))}, this is {now.device}: give another -o"
        )


def _as_a_rank(spec: dict[str, Any], out: Path, collector: _Collector) -> str:
    """Be one rank of torchrun's; only rank 0 has anything to tell afterwards.

    Every such rank has a session of its own, where none can keep the others' cores awake (profiler.awake).
    """
    from planner.profiler import worker

    if os.environ["RANK"] == "0":
        with out.open("a", encoding="utf-8") as file:
            worker.run(worker.read_spec(json.dumps(spec)), file)
        collector.take(out.read_text())
    else:
        worker.run(worker.read_spec(json.dumps(spec)), None)
    return ""


def _start_ranks(request: Request, spec: dict[str, Any], folder: Path, out: Path, collector: _Collector) -> str:
    """Start the ranks and follow them; what died, in words, or ''."""
    file = folder / "spec.json"
    file.write_text(json.dumps(spec))
    limit_s = time.monotonic() + request.budget_s + _GRACE_S
    command = ["planner.profiler.worker", str(file), str(out)]
    with (
        ranks_of(command, request.ranks, request.threads, request.platform, folder) as children,
        out.open(encoding="utf-8") as lines,
    ):
        try:
            return _follow(children, lines, folder, limit_s, collector)
        except KeyboardInterrupt:
            collector.take(lines.read())
            return INTERRUPTED


def _follow(
    children: list[subprocess.Popen[bytes]], lines: IO[str], folder: Path, limit_s: float, collector: _Collector
) -> str:
    """Read what rank 0 writes until the ranks end; what died, in words, or ''."""
    while True:
        codes = [child.poll() for child in children]
        collector.take(lines.read())
        if any(codes):
            return death(codes, folder, describe(collector.current) if collector.current else "")
        if all(code == 0 for code in codes):
            return ""
        if time.monotonic() > limit_s:
            doing = f" in {describe(collector.current)}" if collector.current else ""
            return f"the ranks did not end {_GRACE_S:g} s after the budget and were stopped{doing}"
        time.sleep(0.05)


@contextlib.contextmanager
def ranks_of(
    command: list[str], ranks: int, threads: int, platform: str, folder: Path
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """One process a rank of `python -m command`, stderr in `folder`; all are gone at the end, whatever happened.

    SIGTERM to this process counts as Ctrl-C meanwhile. On a CPU the cores are kept awake, and every rank has its own,
    or its turn on one: ranks that wait for each other are slower where they wander.
    """
    base = child_environment()
    if platform == "cuda":
        for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
            base.pop(name)
            base.update({name: os.environ[name]} if name in os.environ else {})
    base["OMP_NUM_THREADS"] = str(threads)
    started: list[subprocess.Popen[bytes]] = []
    awake = cores_awake(ranks * threads) if platform == "cpu" else contextlib.nullcontext()
    cores = sorted(os.sched_getaffinity(0)) if platform == "cpu" and hasattr(os, "sched_setaffinity") else []
    here = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if here else None
    try:
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            with (folder / f"stderr-{rank}").open("wb") as errors:
                started.append(
                    subprocess.Popen(
                        [sys.executable, "-P", "-m", *command], env={**base, **place}, stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL, stderr=errors,
                        process_group=0,  # not a session of its own: profiler.awake
                    )
                )  # fmt: skip
            if cores:
                mine = {cores[(rank * threads + i) % len(cores)] for i in range(threads)}
                with contextlib.suppress(ProcessLookupError):  # it died at once, which is found later
                    os.sched_setaffinity(started[-1].pid, mine)
        with awake:
            yield started
    finally:
        for child in started:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        if here:
            signal.signal(signal.SIGTERM, before)


def death(codes: list[int | None], folder: Path, doing: str) -> str:
    """Which rank died first as far as one can see, how, and in what."""
    killed = [rank for rank, code in enumerate(codes) if code is not None and code < 0]
    rank = killed[0] if killed else next(rank for rank, code in enumerate(codes) if code)
    code = codes[rank] or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
    last = _last_line(folder / f"stderr-{rank}")
    return f"rank {rank} {how}{f' in {doing}' if doing else ''}{f': {last}' if last else ''}"


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines() if path.is_file() else []
    return lines[-1][:200] if lines else ""


def describe(case: Case) -> str:
    """A case in a few words."""
    sizes = " ".join(f"{name}={size:g}" for name, size in case.dims.items())
    return " ".join(filter(None, (case.kind, case.name, case.dtype, sizes)))
