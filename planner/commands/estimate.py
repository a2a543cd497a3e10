"""planner estimate: what a plan takes in time and memory; the plan from a file, or a layout given by flags."""

from __future__ import annotations

import argparse
from pathlib import Path

from planner.build import Job, build_plan, inputs_of
from planner.check import check_plan, check_structure, problems
from planner.commands import arguments, kernels
from planner.costmodel.strategy import PlanSpec
from planner.errors import UserError
from planner.files import read_plan, write_atomic
from planner.given import RECOMPUTES, Given, given_spec
from planner.plan import Plan, encode_plan
from planner.provenance import tool_version
from planner.render import Grid, Report, gib, percent, seconds
from planner.views import (
    COLUMNS,
    certificate_line,
    cluster_line,
    headline,
    interval_line,
    kernel_lines,
    memory_grid,
    plan_data,
    plan_row,
    step_line,
)

EPILOG = (
    "planner estimate plan.json                                   prices a written plan with today's cost model\n"
    "planner estimate model.py --gpus 64 --tp 8 --pp 4 --mbs 1    prices your own layout; dp fills the rest\n"
    "planner estimate plan.json --kernels torch                   the same plan with other kernels\n"
    f"{kernels.EPILOG}\n"
    f"NOTE: {arguments.SANDBOX}."
)
_DEGREES = ("tp", "pp", "vpp", "ulysses", "ring", "ep")
_OTHERS = ("sp", "vocab_parallel", "chunked_loss", "recompute", "dp_replicate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("model", metavar="plan|model", help="plan.json, or model.py[:function], config.json, graph")
    arguments.add_job(parser)
    layout = parser.add_argument_group("layout (with a model)")
    for name in _DEGREES:
        layout.add_argument(f"--{name}", type=arguments.whole, default=1, metavar="N")
    layout.add_argument("--dp-replicate", type=arguments.whole, default=1, metavar="N", help="copies of a shard group")
    layout.add_argument("--zero", type=int, choices=(0, 1, 2, 3), default=1, help="ZeRO stage (default: %(default)s)")
    layout.add_argument("--mbs", type=arguments.whole, default=1, metavar="N", help="micro-batch size")
    layout.add_argument("--schedule", choices=arguments.SCHEDULES, help="default: 1f1b, interleaved with --vpp")
    layout.add_argument("--sp", action="store_true", help="sequence parallelism beside TP")
    layout.add_argument("--vocab-parallel", action="store_true", help="split embedding, head and loss over tp")
    layout.add_argument("--chunked-loss", action="store_true", help="head and loss in chunks of rows, no logits kept")
    layout.add_argument("--recompute", choices=RECOMPUTES, default="none", help="of every layer (default: %(default)s)")
    layout.add_argument("--offload-activations", action="store_true")
    layout.add_argument("--offload-optimizer", action="store_true")
    arguments.add_output(parser, "the priced plan")


def run(args: argparse.Namespace) -> int:
    """Price and show; a plan that cannot work is refused with the check that fails."""
    path = Path(args.model)
    if path.suffix == ".json" and not path.exists():
        raise UserError(f"{path}: no such file; give a plan.json, a config.json, a saved graph or a model.py")
    plan = _repriced(path, args.kernels) if path.suffix == ".json" and _is_plan(path) else _given(args)
    if args.output:
        write_atomic(args.output, encode_plan(plan))
    arguments.answer(_report(plan), args, to_file=False)
    return 0


def _is_plan(path: Path) -> bool:
    """Whether the file says that it is a plan; every other file goes to the tracer."""
    try:
        with path.open("rb") as file:
            data = file.read(64 * 2**20)
    except OSError:
        return False
    return b'"planner.plan/' in data


def _repriced(path: Path, choice: str | None) -> Plan:
    """The plan of a file under today's cost model; its certificate holds only under the one that proved it."""
    old = read_plan(path)
    inputs = old.inputs
    engine = inputs.engine if choice is None else kernels.chosen(choice, inputs.engine, inputs.cluster)
    job = Job(
        graph=inputs.graph,
        machine=arguments.machine_of(inputs.graph, inputs.cluster, engine, inputs.num_gpus),
        global_batch_size=inputs.global_batch_size,
        memory_margin_frac=inputs.memory_margin_frac,
        profile_sha256=inputs.profile_sha256,
    )
    plan = _priced(job, old.decisions)
    return old if (plan.predicted, plan.inputs) == (old.predicted, old.inputs) else plan


def _priced(job: Job, spec: PlanSpec) -> Plan:
    """The plan of `spec`, once its structure holds."""
    wrong = problems(check_structure(inputs_of(job), spec))
    if wrong:
        raise UserError(f"this plan cannot run: {wrong[0].name}: {wrong[0].detail}")
    return build_plan(job, spec, tool_version(), arguments.executable_reasons(spec, job))


def _given(args: argparse.Namespace) -> Plan:
    if args.gpus is None:
        raise UserError("give --gpus N: how many GPUs the plan runs on")
    cluster, engine = arguments.cluster_of(args.cluster), arguments.engine_of(args.engine)
    cluster, engine, profile_sha256 = arguments.profiled(args, cluster, engine, args.gpus)
    engine = kernels.chosen(args.kernels, engine, cluster)
    graph = arguments.load_graph(args)
    job = Job(
        graph=graph,
        machine=arguments.machine_of(graph, cluster, engine, args.gpus),
        global_batch_size=arguments.batch_of(args, graph),
        memory_margin_frac=args.memory_margin,
        profile_sha256=profile_sha256,
    )
    given = Given(
        **{name: getattr(args, name) for name in (*_DEGREES, *_OTHERS)},
        zero_stage=args.zero,
        micro_batch_size=args.mbs,
        schedule=args.schedule,
        offload_activations=args.offload_activations,
        offload_optimizer=args.offload_optimizer,
    )
    return _priced(job, given_spec(given, graph, args.gpus, job.global_batch_size))


def _report(plan: Plan) -> Report:
    inputs, predicted = plan.inputs, plan.predicted
    machine = arguments.machine_of(inputs.graph, inputs.cluster, inputs.engine, inputs.num_gpus)
    wrong = problems(check_plan(plan))
    row = plan_row(1, plan.decisions, predicted.step_s, predicted.mfu_frac, predicted.peak_memory_bytes, machine)
    fits = predicted.peak_memory_bytes <= predicted.memory_limit_bytes
    verdict = (
        f"memory   peak {gib(predicted.peak_memory_bytes)} GiB, limit {gib(predicted.memory_limit_bytes)} GiB: "
        + ("fits" if fits else "DOES NOT FIT")
        + "".join(f"; {finding.name}: {finding.detail}" for finding in wrong if finding.name == "host memory")
    )
    parts: tuple[str | Grid, ...] = (
        headline(inputs.graph, inputs.global_batch_size),
        cluster_line(inputs.cluster, inputs.num_gpus, inputs.engine.name),
        Grid(columns=COLUMNS, rows=(row,)),
        step_line(predicted.breakdown),
        interval_line(plan),
        *kernel_lines(plan),
        f"rate     {predicted.tokens_per_s:,.4g} tokens/s, MFU {percent(predicted.mfu_frac)} %; simulated step "
        f"{seconds(predicted.simulated_step_s)}",
        verdict,
        memory_grid(plan),
        certificate_line(plan),
    )
    data = {"schema": "planner.estimate/1", "fits": fits and not wrong, **plan_data(plan)}
    return Report(parts=parts, data=data)
