"""planner profile: measure this machine, look at what was measured, compare, check, merge and import."""

from __future__ import annotations

import argparse
import datetime
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.commands import arguments
from planner.costmodel.hardware import ClusterSpec
from planner.costmodel.profile import (
    SCHEMA,
    Conditions,
    Curve,
    Profile,
    encode_profile,
    merge,
    profile_sha256,
)
from planner.costmodel.profile_diff import Change, compare, differences, doubts
from planner.costmodel.profiled import describes
from planner.costmodel.profiled_engine import hidden_frac, pair_frac
from planner.errors import OK, STALE, USAGE, UserError
from planner.files import check_writable, read_profile, write_atomic
from planner.provenance import tool_version
from planner.render import Grid, Report, percent, seconds

if TYPE_CHECKING:
    from planner.profiler.profile import Outcome, Progress, Request

MEASURES = {
    "ops": "kernels: GEMM, attention, memory-bound ones, optimizer, copies; on GPUs every installed form of norms, "
    "SwiGLU, RoPE, loss and linear attention",
    "comm": "collectives over the groups of a mesh, two at once, and beside a GEMM",
    "model": "layers of a model.py, forward and backward",
    "all": "all of these",
}
IMPORTS = ("nccl-tests", "torch-trace")
EPILOG = (
    "planner profile all model.py --ranks 2 --budget 120s -o profile.json    measure, then\n"
    "planner search model.py --gpus 2 --cluster cpu-gloo --profile profile.json\n"
    "torchrun --no-python ... planner profile comm -o profile.json           one rank a process, across nodes\n\n"
    "An existing -o of this machine is gone on with: what it holds is not measured again. Ctrl-C, the end of the\n"
    "budget and a rank that dies keep what was measured. `check` ends with exit code 4 if the machine has changed.\n"
    f"NOTE: {arguments.SANDBOX}; the profiler runs the layers of the model too."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=type(parser))
    for name, what in MEASURES.items():
        one = actions.add_parser(name, help=what, allow_abbrev=False)
        _add_model(one)
        _add_run(one, 120.0)
        arguments.add_output(one, "the profile (default: profile.json)")
    check = actions.add_parser("check", help="measure a few samples again: does it still hold?", allow_abbrev=False)
    check.add_argument("profile", type=Path)
    _add_model(check)
    _add_run(check, 30.0)
    arguments.add_output(check)
    show = actions.add_parser("show", help="what a profile holds", allow_abbrev=False)
    show.add_argument("profile", type=Path)
    arguments.add_output(show)
    diff = actions.add_parser("diff", help="two profiles: has the machine changed?", allow_abbrev=False)
    diff.add_argument("old", type=Path)
    diff.add_argument("new", type=Path)
    arguments.add_output(diff)
    join = actions.add_parser("merge", help="several profiles as one; of equal samples the last", allow_abbrev=False)
    join.add_argument("profiles", type=Path, nargs="+")
    arguments.add_output(join, "the profile (default: profile.json)")
    foreign = actions.add_parser("import", help="measurements of other tools as a profile", allow_abbrev=False)
    foreign.add_argument("kind", choices=IMPORTS)
    foreign.add_argument("files", type=Path, nargs="+")
    foreign.add_argument(
        "--collective", default="", metavar="NAME", help="what nccl-tests output is of, if it says not"
    )
    arguments.add_output(foreign, "the profile (default: profile.json)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="", help="model.py[:function] or config.json: its shapes, layers")
    parser.add_argument("--seq-len", type=arguments.whole, metavar="N", help="tokens a sequence")
    parser.add_argument("--trace-limit", type=arguments.positive, default=120.0, help=argparse.SUPPRESS)


def _add_run(parser: argparse.ArgumentParser, budget_s: float) -> None:
    parser.add_argument("--cluster", default="", metavar="NAME|FILE", help="what this machine is (default: found out)")
    parser.add_argument("--ranks", type=arguments.whole, metavar="N", help="processes at once (default: 1; comm, all: "
                        "the GPUs or cores)")  # fmt: skip
    parser.add_argument("--threads", type=arguments.whole, default=1, metavar="N", help="CPU threads a process")
    parser.add_argument("--budget", type=duration, default=budget_s, metavar="S",
                        help="seconds it may take, 120s or 2m (default: %(default)g)")  # fmt: skip


def duration(text: str) -> float:
    """Flag type: seconds, with an optional unit s or m."""
    scale = {"s": 1.0, "m": 60.0}.get(text[-1:], 0.0)
    return arguments.positive(text[:-1]) * scale if scale else arguments.positive(text)


def run(args: argparse.Namespace) -> int:
    """Do what `args.action` says."""
    if args.action in MEASURES:
        return _measure(args)
    return {"check": _check, "show": _show, "diff": _diff, "merge": _merge, "import": _import}[args.action](args)


# ---- measuring


def _measure(args: argparse.Namespace) -> int:
    from planner.profiler.profile import INTERRUPTED, run_profile

    path = args.output or Path("profile.json")
    check_writable(path)
    if args.action == "model" and not args.model:
        raise UserError("profile model needs a model.py or config.json")
    request = _request(args, args.action)
    known = read_profile(path) if path.exists() else None
    line = _Line(not args.quiet)
    try:
        outcome = run_profile(request, known, line)
    finally:
        line.clear()
    if os.environ.get("RANK", "0") != "0":
        return OK
    write_atomic(path, encode_profile(outcome.profile))
    arguments.answer(_measured(outcome, path, request), args, to_file=False)
    if outcome.died and outcome.died != INTERRUPTED:
        print(f"planner: {outcome.died}; what was measured before is in {path}", file=sys.stderr)
        return USAGE
    return OK


def _request(args: argparse.Namespace, what: str) -> Request:
    from planner.profiler.profile import Request

    cluster = this_cluster(args.cluster)
    platform = "cpu" if cluster.device.name == "cpu" else "cuda"
    devices = (os.cpu_count() or 1) if platform == "cpu" else len(gpus())
    if platform == "cuda" and not devices:
        raise UserError(f"no GPU here, so it cannot be profiled as {cluster.name}: use --cluster cpu-gloo")
    ranks = int(os.environ.get("WORLD_SIZE", 0)) or args.ranks or (devices if what in ("comm", "all") else 1)
    if platform == "cuda" and "RANK" not in os.environ and ranks > devices:
        raise UserError(
            f"--ranks {ranks} needs as many GPUs; this machine has {devices}; use torchrun for several nodes"
        )
    try:
        cluster.domain_sizes(ranks)
    except ValueError as error:
        raise UserError(f"--ranks {ranks}: {error}") from None
    model = getattr(args, "model", "")
    return Request(
        what=what, platform=platform, cluster=cluster, graphs={model: arguments.load_graph(args)} if model else {},
        ranks=ranks, threads=args.threads, budget_s=args.budget,
        today=datetime.date.today().isoformat(), tool_version=tool_version(),
    )  # fmt: skip


def this_cluster(name: str) -> ClusterSpec:
    """The cluster of that name, or the preset of what is in this machine."""
    if name:
        return arguments.cluster_of(name)
    here = gpus()
    if not here:
        return arguments.cluster_of("cpu-gloo")
    from planner.costmodel.presets import list_clusters

    label, memory_bytes = here[0]
    conditions = Conditions(
        platform="cuda", device=label, devices_per_node=len(here), memory_bytes=memory_bytes, backend="nccl",
        ranks=1, threads=1, software={},
    )  # fmt: skip
    found = [known for known in list_clusters() if describes(conditions, arguments.cluster_of(known))]
    if not found:
        raise UserError(f"{label} is no preset: give --cluster FILE.toml (the README shows one)")
    return arguments.cluster_of(found[0])


def gpus() -> list[tuple[str, int]]:
    """(name, bytes) of every GPU, as the driver's own tool says."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    rows = [line.rpartition(",") for line in done.stdout.splitlines() if "," in line] if done.returncode == 0 else []
    return [(name.strip(), int(float(mib)) * 2**20) for name, _, mib in rows]


class _Line:
    """One progress line on stderr, rewritten in place."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled and sys.stderr.isatty()

    def __call__(self, progress: Progress) -> None:
        """Show where the run is."""
        if self._enabled:
            from planner.profiler.profile import describe

            left = f"{math.ceil(progress.left_s)} s left, {progress.left} uncertain"
            sys.stderr.write(f"\r\x1b[K{progress.done} measured, {left}: {describe(progress.case)}"[:150])
            sys.stderr.flush()

    def clear(self) -> None:
        """Take the line away."""
        if self._enabled:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def _measured(outcome: Outcome, path: Path, request: Request) -> Report:
    early = outcome.died or f"stopped at the budget of {request.budget_s:g} s"
    ends = "nothing uncertain is left" if outcome.settled else early
    lines = [f"measured {outcome.measured} samples on {request.ranks} ranks; {ends}"]
    lines += [f"left out {case.kind} {case.name}: {why}" for case, why in outcome.failed[:3]]
    lines += [f"note     {text}" for text in doubts(outcome.profile, request.today)]
    lines.append(f"wrote    {path}  next: planner search ... --cluster {request.cluster.name} --profile {path}")
    return Report(parts=(_curve_grid(outcome.profile.curves), *lines), data=_data(outcome.profile))


# ---- looking


def _data(profile: Profile) -> dict[str, Any]:
    from planner.costmodel.hardware import to_dict

    return {"schema": SCHEMA, "sha256": profile_sha256(profile), **to_dict(profile)}


def _curve_grid(curves: tuple[Curve, ...]) -> Grid:
    rows = [
        (
            f"{c.kind} {c.name}".strip(), c.dtype, str(c.ranks), str(c.samples), seconds(c.latency_s),
            f"{c.rate_per_s:.3g} {c.unit}/s", percent(c.median_error_frac),
        )
        for c in curves
    ]  # fmt: skip
    return Grid(
        columns=("<kernel", "<dtype", "ranks", "samples", "latency", "rate", "error %"), rows=tuple(rows)
    )  # fmt: skip


def _show(args: argparse.Namespace) -> int:
    profile = read_profile(args.profile)
    lines = [
        f"profile  {args.profile}  {len(profile.samples)} samples  sha256 {profile_sha256(profile)[:12]}",
        *(
            f"on       {c.device}  {c.ranks} ranks x {c.threads} threads  {c.backend}  "
            + ", ".join(f"{name} {version}" for name, version in sorted(c.software.items()))
            for c in profile.conditions
        ),
    ]
    notes = [f"note     {text}" for text in doubts(profile, datetime.date.today().isoformat())]
    parts = (*lines, _curve_grid(profile.curves), *_overlaps(profile), *notes)
    arguments.answer(Report(parts=parts, data=_data(profile)), args)
    return OK


def _overlaps(profile: Profile) -> list[str | Grid]:
    """What runs at once hide, for every number of ranks, and what of it predictions use."""
    said: list[str | Grid] = []
    for ranks in sorted({c.ranks for c in profile.conditions}):
        samples = [s for s in profile.samples if profile.where(s).ranks == ranks]
        hidden, pair = hidden_frac(samples), pair_frac(samples)
        if hidden is not None:
            said.append(f"overlap  {ranks} ranks: {hidden:.0%} of the shorter of a GEMM and a collective is hidden by "
                        "the longer; caps every overlap of a prediction")  # fmt: skip
        if pair is not None:
            said.append(f"pairs    {ranks} ranks: two collectives at once take {pair:.2f} of one after the other; "
                        "evidence only: predictions run collectives one after the other")  # fmt: skip
    return said


def _diff(args: argparse.Namespace) -> int:
    old, new = read_profile(args.old), read_profile(args.new)
    changes = compare(old, new)
    said = [f"differs  {text}" for text in differences(old, new)]
    if not changes:
        raise UserError("no sample of one was taken under the conditions of the other: nothing to compare")
    arguments.answer(_changes(changes, tuple(said)), args)
    return OK


def _changes(changes: tuple[Change, ...], lines: tuple[str, ...]) -> Report:
    rows = tuple(
        (
            f"{c.kind} {c.name}".strip(), c.dtype, str(c.ranks), str(c.samples), f"{100 * (c.ratio - 1):+.1f}",
            f"{100 * c.uncertainty_frac:.1f}", "CHANGED" if c.changed else "as before",
        )
        for c in changes
    )  # fmt: skip
    count = sum(c.changed for c in changes)
    verdict = f"verdict  {count} of {len(changes)} kernels changed beyond what the measurements scatter"
    columns = ("<kernel", "<dtype", "ranks", "samples", "time %", "+- %", "<verdict")
    data = {
        "schema": "planner.profile_diff/1",
        "changed": count,
        "kernels": [
            {"kind": c.kind, "name": c.name, "dtype": c.dtype, "ranks": c.ranks, "samples": c.samples,
             "ratio": c.ratio, "uncertainty_frac": c.uncertainty_frac, "changed": c.changed}
            for c in changes
        ],
    }  # fmt: skip
    return Report(parts=(*lines, Grid(columns=columns, rows=rows), verdict), data=data)


def _check(args: argparse.Namespace) -> int:
    from planner.profiler.drift import check

    profile = read_profile(args.profile)
    args.ranks = args.ranks or max(c.ranks for c in profile.conditions)
    args.threads = max(c.threads for c in profile.conditions)
    request = _request(args, "check")
    if not any(describes(c, request.cluster) for c in profile.conditions):
        devices = ", ".join(sorted({c.device for c in profile.conditions}))
        raise UserError(f"{args.profile}: is of {devices}, this machine is {request.cluster.device.name}")
    line = _Line(not args.quiet)
    try:
        changes, outcome = check(profile, request, line)
    finally:
        line.clear()
    if not changes:
        raise UserError(f"{args.profile}: nothing of it could be measured again here: {outcome.died or 'other device'}")
    notes = [*differences(profile, outcome.profile), *doubts(outcome.profile, request.today)]
    layers = {s.name for s in profile.samples if s.kind == "layer"} - {s.name for s in outcome.profile.samples}
    if layers:
        notes.append(f"{len(layers)} layers were not measured again: give their model.py, or a larger --budget")
    arguments.answer(_changes(changes, tuple(f"note     {text}" for text in notes)), args)
    if any(c.changed for c in changes):
        print(f"planner: {args.profile} no longer describes this machine: profile again", file=sys.stderr)
        return STALE
    return OK


# ---- making one out of others


def _merge(args: argparse.Namespace) -> int:
    profiles = [read_profile(path) for path in args.profiles]
    return _written(args, merge(*profiles, tool_version=tool_version()))


def _import(args: argparse.Namespace) -> int:
    from planner.profiler.import_kineto import import_trace
    from planner.profiler.import_nccl import import_nccl_tests

    made = []
    for path in args.files:
        measured_on = datetime.date.fromtimestamp(path.stat().st_mtime).isoformat() if path.is_file() else ""
        if args.kind == "torch-trace":
            made.append(import_trace(path, measured_on, tool_version()))
        else:
            made.append(import_nccl_tests(path, measured_on, tool_version(), args.collective))
    return _written(args, merge(*made, tool_version=tool_version()))


def _written(args: argparse.Namespace, profile: Profile) -> int:
    path = args.output or Path("profile.json")
    write_atomic(path, encode_profile(profile))
    lines = (_curve_grid(profile.curves), f"wrote    {path}  {len(profile.samples)} samples")
    arguments.answer(Report(parts=lines, data=_data(profile)), args, to_file=False)
    return OK
