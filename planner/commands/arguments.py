"""Flags that several verbs share, and what they mean: argparse in, records of the cost model and search out."""

from __future__ import annotations

import argparse
import difflib
import itertools
import sys
from pathlib import Path

from planner.build import Job
from planner.commands import kernels
from planner.costmodel.engine import ENGINES, EngineSpec, get_engine
from planner.costmodel.estimate import machine_for
from planner.costmodel.graph import ModelGraph
from planner.costmodel.hardware import ClusterSpec
from planner.costmodel.keys import Machine
from planner.costmodel.presets import load_cluster
from planner.costmodel.strategy import RECOMPUTE_KINDS, PlanSpec
from planner.errors import UserError
from planner.files import check_writable, read_profile, write_atomic
from planner.render import FORMATS, Report, show
from planner.space import Limits

DEFAULT_CLUSTER, DEFAULT_ENGINE, DEFAULT_MARGIN_FRAC = "h100", "planner", 0.08
SANDBOX = "a model.py is executed to trace it, in a child process with your rights: this is not a sandbox"
ALIASES = {"mbs": "micro_batch_size", "zero_stage": "zero", "sequence_parallel": "sp"}
FIXABLE = (
    "tp", "sp", "vocab_parallel", "chunked_loss", "pp", "vpp", "schedule", "dp", "dp_replicate", "dp_shard", "zero",
    "cp", "ulysses", "ring", "ep", "micro_batch_size", "recompute", "offload_activations", "offload_optimizer",
)  # fmt: skip
SCHEDULES = ("1f1b", "interleaved", "zb_h1", "zb_v")
WORDS = {"schedule": SCHEDULES, "recompute": RECOMPUTE_KINDS}
FORBIDDABLE = (
    "tp", "sp", "vocab_parallel", "chunked_loss", "pp", "vpp", "dp", "dp_replicate", "zero", "zero1", "zero2", "zero3",
    "cp", "ulysses", "ring", "ep", "recompute", "selective", "full", "offload", "offload_activations",
    "offload_optimizer", *SCHEDULES,
)  # fmt: skip


def whole(text: str) -> int:
    """Flag type: a whole number of at least 1, thousands separators allowed."""
    try:
        value = int(text.replace(",", "").replace("_", ""))
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"needs a whole number of at least 1, not {text!r}")
    return value


def fraction(text: str) -> float:
    """Flag type: a number in [0, 1)."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"needs a number from 0 to below 1, not {text!r}")
    return value


def positive(text: str) -> float:
    """Flag type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"needs a number above 0, not {text!r}")
    return value


def add_job(parser: argparse.ArgumentParser) -> None:
    """What to plan for: model, GPUs, batch."""
    parser.add_argument("--gpus", type=whole, metavar="N", help="GPUs of the job")
    parser.add_argument("--cluster", default=DEFAULT_CLUSTER, metavar="NAME|FILE",
                        help="a name of `planner cluster list`, or a .toml (default: %(default)s)")  # fmt: skip
    parser.add_argument("--engine", default=DEFAULT_ENGINE, metavar="NAME",
                        help=f"what will run the plan: {', '.join(ENGINES)} (default: %(default)s)")  # fmt: skip
    parser.add_argument("--profile", type=Path, metavar="FILE",
                        help="what `planner profile` measured, instead of the cluster's preset figures")  # fmt: skip
    kernels.add_argument(parser)
    parser.add_argument("--global-batch", type=whole, metavar="N",
                        help="sequences of one optimizer step (default: the model's GLOBAL_BATCH_SIZE)")  # fmt: skip
    parser.add_argument("--seq-len", type=whole, metavar="N", help="tokens a sequence (default: the model's SEQ_LEN)")
    parser.add_argument("--memory-margin", type=fraction, default=DEFAULT_MARGIN_FRAC, metavar="FRAC",
                        help="part of the GPU's memory to leave free (default: %(default)s)")  # fmt: skip
    parser.add_argument("--trace-limit", type=positive, default=120.0, metavar="S",
                        help="seconds that tracing the model may take (default: %(default)s)")  # fmt: skip


def add_output(parser: argparse.ArgumentParser, what: str = "the answer") -> None:
    """How to answer."""
    parser.add_argument("--format", choices=FORMATS, default="table", help="default: %(default)s")
    parser.add_argument("--quiet", action="store_true", help="no progress and no notes on stderr")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=f"write {what} to FILE")


def answer(report: Report, args: argparse.Namespace, to_file: bool = True) -> None:
    """Print the report, or write it to -o."""
    if to_file and args.output:
        write_atomic(args.output, show(report, args.format, color=False).encode())
    else:
        sys.stdout.write(show(report, args.format))


def note(args: argparse.Namespace, text: str) -> None:
    """A remark on stderr."""
    if not args.quiet:
        print(f"planner: {text}", file=sys.stderr)


def load_graph(args: argparse.Namespace) -> ModelGraph:
    """Trace or read the model of `args`. TraceError or UserError of one line."""
    from planner.profiler.trace import trace_model

    file = Path(args.model.rpartition(":")[0] if ".py:" in args.model else args.model)
    if file.suffix == ".py" and file.is_file():
        note(args, f"tracing {args.model}; {SANDBOX}")
    graph: ModelGraph = trace_model(args.model, seq_len=args.seq_len, time_limit_s=args.trace_limit)
    if args.seq_len and graph.unit == "tokens" and graph.traced_seq_len != args.seq_len:
        raise UserError(
            f"{args.model}: traced at {graph.traced_seq_len} tokens, not --seq-len {args.seq_len}: "
            "trace the model again at that length"
        )
    return graph


def batch_of(args: argparse.Namespace, graph: ModelGraph) -> int:
    """The global batch size: the flag, else what the model says."""
    batch: int = args.global_batch or graph.default_global_batch_size
    if not batch:
        raise UserError("no global batch size: give --global-batch N, or GLOBAL_BATCH_SIZE = N in the model's file")
    return batch


def cluster_of(name: str) -> ClusterSpec:
    """The cluster called `name`."""
    try:
        return load_cluster(name)
    except ValueError as error:
        raise UserError(f"{error}; see `planner cluster list`") from None


def profiled(
    args: argparse.Namespace, cluster: ClusterSpec, engine: EngineSpec, num_gpus: int
) -> tuple[ClusterSpec, EngineSpec, str | None]:
    """(cluster, engine, hash of the profile) as --profile found them; UserError if it is of another device."""
    if args.profile is None:
        return cluster, engine, None
    from planner.costmodel.profile import ProfileError, profile_sha256
    from planner.costmodel.profiled import fit_cluster
    from planner.costmodel.profiled_engine import fit_engine

    profile = read_profile(args.profile)
    try:
        fitted = fit_cluster(cluster, profile, num_gpus)
        return fitted, fit_engine(engine, profile, cluster, num_gpus), profile_sha256(profile)
    except ProfileError as error:
        raise UserError(f"{args.profile}: {error}") from None


def engine_of(name: str) -> EngineSpec:
    """The engine called `name`."""
    try:
        return get_engine(name)
    except ValueError as error:
        raise UserError(str(error)) from None


def executable_reasons(spec: PlanSpec, job: Job) -> tuple[str, ...]:
    """Why the runtime cannot execute `spec` of the job; empty if it can."""
    from planner.runtime.support import COMPILED_EXPERTS, reasons

    compiled = job.machine.engine.compiles
    found: tuple[str, ...] = reasons(spec, compiled)
    if compiled and any(layer.num_experts > 1 for layer in job.graph.classes):
        found = (*found, COMPILED_EXPERTS)
    return found


def machine_of(graph: ModelGraph, cluster: ClusterSpec, engine: EngineSpec, num_gpus: int) -> Machine:
    """`num_gpus` GPUs of `cluster`; UserError with the nearest whole nodes if they fill none."""
    try:
        return machine_for(graph, cluster, engine, num_gpus)
    except ValueError as error:
        below = num_gpus // cluster.node_size * cluster.node_size
        raise UserError(f"{error}: use {below} or {below + cluster.node_size}") from None


def output_path(args: argparse.Namespace, default: str) -> Path:
    """Where a plan goes, known to be writable before any work is done."""
    path: Path = args.output or Path(default)
    check_writable(path)
    return path


def _known(kind: str, name: str, known: tuple[str, ...]) -> str:
    name = ALIASES.get(name, name)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        names = ", ".join(close or known)
        raise UserError(f"{kind}: unknown option {name!r}; {'close' if close else 'known'}: {names}")
    return name


def _pairs(kind: str, text: str) -> dict[str, int | str]:
    """`tp=8,schedule=zb_v` as a dict; UserError on anything else."""
    found: dict[str, int | str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not value:
            raise UserError(f"{kind}: {item!r} is not option=value")
        name = _known(kind, name, FIXABLE)
        if name in found:
            raise UserError(f"{kind}: {name} is given twice")
        found[name] = _value(kind, name, value)
    return found


def _value(kind: str, name: str, value: str) -> int | str:
    if name in WORDS:
        if value not in WORDS[name]:
            raise UserError(f"{kind}: {name} {value!r} is none of {', '.join(WORDS[name])}")
        return value
    words = {"true": "1", "on": "1", "yes": "1", "false": "0", "off": "0", "no": "0"}
    number = words.get(value.lower(), value)
    off = ("zero", "sp", "vocab_parallel", "chunked_loss", "offload_activations", "offload_optimizer")
    least = 0 if name in off else 1
    if not number.isdecimal() or int(number) < least:
        raise UserError(f"{kind}: {name}={value} needs a whole number of at least {least}")
    return int(number)


def limits_of(engine: EngineSpec, fix: str, forbid: str, executable_only: bool = False) -> Limits:
    """The restrictions that flags and engine put on the plan space."""
    fixed = _pairs("--fix", fix)
    names = {_known("--forbid", name.strip(), FORBIDDABLE) for name in forbid.split(",") if name.strip()}
    for name, value in fixed.items():
        if name in names and value not in (0, 1, "none"):
            raise UserError(f"--fix {name}={value} and --forbid {name} exclude each other")
    for name, why in _engine_lacks(engine).items():
        unused = 0 if name == "offload_activations" else 1
        for option, value in fixed.items():
            if value == name or option == name and value != unused:
                raise UserError(f"--fix {option}={value}: not with --engine {engine.name}: {why}")
        names.add(name)
    missing, together = _runtime_lacks() if executable_only else (frozenset(), ())
    # In the runtime's table "dp" is plain data parallelism, in --forbid every kind of it.
    names |= missing & set(FORBIDDABLE) - {"dp"}
    stages = {f"zero{stage}": stage for stage in engine.zero_stages}
    single = tuple(frozenset({name}) for name in sorted(missing | names & {"dp_replicate"}))
    return Limits(
        fixed=fixed,
        forbidden=frozenset(names - {"zero1", "zero2", "zero3"}),
        zero_stages=tuple(stage for name, stage in stages.items() if name not in names),
        combinations=(*single, *together),
    )


def _engine_lacks(engine: EngineSpec) -> dict[str, str]:
    """Options that an engine cannot run, and why."""
    from planner.runtime.support import COMPILED_LACKS

    return dict(COMPILED_LACKS) if engine.compiles else {}


def _runtime_lacks() -> tuple[frozenset[str], tuple[frozenset[str], ...]]:
    """Options that the runtime does not execute, and sets of options that it does not execute together."""
    from planner.runtime.support import COMBINATIONS, OPTIONS

    either = {"zero-bubble": ("zb_h1", "zb_v")}
    together = tuple(
        frozenset(chosen)
        for combination in COMBINATIONS
        for chosen in itertools.product(*(either.get(name, name.split(" or ")) for name in combination.names))
    )
    return frozenset(option.name for option in OPTIONS if option.reason), together
