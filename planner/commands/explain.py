"""planner explain: where time and memory go, what binds, why not the runner-up, and --why not tp=4."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from planner.build import Job, inputs_of, options_of
from planner.check import check_model, check_structure, problems
from planner.commands import arguments
from planner.commands.sequences import sequence_parts
from planner.costmodel.estimate import Estimate, estimate
from planner.costmodel.keys import Machine
from planner.costmodel.strategy import PlanSpec
from planner.errors import UserError
from planner.explain import binding_lines, compare_leaves, sensitivities, time_grid, why_not
from planner.files import read_plan
from planner.plan import Plan
from planner.progress import ProgressLine
from planner.render import GIB, Grid, Report, gib, percent, seconds
from planner.search import SearchOptions, SearchResult, search
from planner.space import Limits
from planner.views import (
    COLUMNS,
    certificate_line,
    cluster_line,
    headline,
    interval_line,
    kernel_lines,
    leaves,
    memory_grid,
    plan_data,
    plan_row,
)

EPILOG = "--why tp=4,pp=8 searches again with these fixed and says what gets worse, or by how much nothing fits."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("plan", type=Path, help="plan.json")
    parser.add_argument("--why", default="", metavar="A=B,...", help="why not this? options as in search --fix")
    parser.add_argument("--time-limit", type=arguments.positive, default=30.0, metavar="S",
                        help="seconds for the search of --why (default: %(default)s)")  # fmt: skip
    arguments.add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Explain the plan, or answer --why."""
    plan = read_plan(args.plan)
    inputs = plan.inputs
    machine = arguments.machine_of(inputs.graph, inputs.cluster, inputs.engine, inputs.num_gpus)
    job = Job(
        graph=inputs.graph,
        machine=machine,
        global_batch_size=inputs.global_batch_size,
        memory_margin_frac=inputs.memory_margin_frac,
    )
    wrong = problems(check_structure(inputs_of(job), plan.decisions))
    if wrong:
        raise UserError(f"{args.plan}: this plan cannot run: {wrong[0].name}: {wrong[0].detail}")
    report = _why(args, plan, job) if args.why else _explain(plan, machine)
    arguments.answer(report, args)
    return 0


def _grouped(reasons: tuple[str, ...]) -> str:
    """`tp, pp: why; ring: why` from one line an option."""
    options: dict[str, list[str]] = {}
    for reason in reasons:
        name, _, why = reason.partition(": ")
        options.setdefault(why, []).append(name)
    return "; ".join(f"{', '.join(names)}: {why}" for why, names in options.items())


def _row(number: int, plan: Plan, machine: Machine) -> tuple[str, ...]:
    p = plan.predicted
    return plan_row(number, plan.decisions, p.step_s, p.mfu_frac, p.peak_memory_bytes, machine)


def _explain(plan: Plan, machine: Machine) -> Report:
    inputs, predicted = plan.inputs, plan.predicted
    found = sensitivities(inputs.graph, machine, plan.decisions)
    lost = tuple(why_not(plan, number) for number in range(2, min(len(plan.alternatives), 3) + 2))
    runs = "executes this plan" if plan.executable else f"cannot execute: {_grouped(plan.executable_reasons)}"
    parts: tuple[str | Grid, ...] = (
        headline(inputs.graph, inputs.global_batch_size),
        cluster_line(inputs.cluster, inputs.num_gpus, inputs.engine.name),
        Grid(columns=COLUMNS, rows=(_row(1, plan, machine),)),
        interval_line(plan),
        *kernel_lines(plan),
        time_grid(predicted.breakdown),
        memory_grid(plan),
        *binding_lines(plan, found),
        *(("why not the runners-up:", *lost) if lost else ()),
        *(sequence_parts(plan.sequences) if plan.sequences else (certificate_line(plan),)),
        f"runtime  {runs}",
    )
    data = {
        "schema": "planner.explain/1",
        **plan_data(plan),
        "gain_frac_per_10_percent_more": {item.what: item.gain_frac for item in found},
        "alternatives": [{**a.options, "step_s": a.step_s, "leaves_s": a.leaves_s} for a in plan.alternatives],
    }
    return Report(parts=parts, data=data)


def _why(args: argparse.Namespace, plan: Plan, job: Job) -> Report:
    limits = _limits(args, plan, job)
    options = SearchOptions(time_limit_s=args.time_limit, top=1, memory_margin_frac=job.memory_margin_frac)
    line = ProgressLine(not args.quiet)
    try:
        result = search(job.graph, job.machine, job.global_batch_size, limits, options, line)
    finally:
        line.clear()
    if not result.plans:
        return _cannot(args.why, plan, job, result)
    return _compared(args.why, plan, job, result)


def _limits(args: argparse.Namespace, plan: Plan, job: Job) -> Limits:
    """The plan's own restrictions with those of --why instead where they meet."""
    engine, proof = job.machine.engine, plan.certificate
    if proof is None:
        return arguments.limits_of(engine, args.why, "")
    space = proof.space
    fixed = arguments.limits_of(engine, args.why, "").fixed
    forbidden = [name for name in space.forbidden if name not in fixed]
    declared = arguments.limits_of(engine, args.why, ",".join(forbidden), space.executable_only)
    return replace(declared, fixed={**space.fixed, **fixed}, zero_stages=space.zero_stages)


def _cannot(asked: str, plan: Plan, job: Job, result: SearchResult) -> Report:
    if result.stop_reason == "interrupted":
        raise KeyboardInterrupt
    if result.stop_reason == "time_limit":
        text = "no plan was found within the time limit, and none refuted: give a longer --time-limit"
    elif result.num_candidates == 0:
        text = "no mesh has it: " + _reasons(job, plan.decisions, asked)
    else:
        missing = result.shortfall_bytes
        text = f"none of {result.num_candidates:,} candidates fits the memory"
        text += "" if missing is None else f"; the nearest misses by {missing / GIB:.1f} GiB per GPU"
    data = {
        "schema": "planner.why/1",
        "asked": asked,
        "possible": False,
        "reason": text,
        "num_candidates": result.num_candidates,
        "shortfall_bytes": result.shortfall_bytes,
    }
    return Report(parts=(f"why not  {asked}: {text}",), data=data)


def _reasons(job: Job, spec: PlanSpec, asked: str) -> str:
    """What the structure checks say about the plan with only the asked degrees changed."""
    fixed = arguments.limits_of(job.machine.engine, asked, "").fixed
    degrees = {name: value for name, value in fixed.items() if name in ("tp", "pp", "ulysses", "ring", "ep")}
    findings = tuple(check_model(inputs_of(job), replace(spec, **degrees)))  # type: ignore[arg-type]
    said = [finding.detail for finding in problems(findings)]
    others = 1
    for value in (int(v) for name, v in fixed.items() if name in ("tp", "pp", "dp", "cp")):
        others *= value
    if job.machine.num_gpus % others:
        said.append(f"{job.machine.num_gpus} GPUs are not a multiple of {others}")
    return "; ".join(said) or "it does not divide the GPUs, the model or the global batch"


def _compared(asked: str, plan: Plan, job: Job, result: SearchResult) -> Report:
    spec = result.plans[0].spec
    priced: Estimate = estimate(job.graph, job.machine, spec)
    mine = {leaf.name: leaf.time_s for leaf in leaves(plan.predicted.breakdown)}
    other = {leaf.name: leaf.leaf_s for leaf in priced.breakdown.leaves()}
    mfu = plan.predicted.mfu_frac * plan.predicted.step_s / priced.step_s
    rows = (
        _row(1, plan, job.machine),
        plan_row(2, spec, priced.step_s, mfu, priced.peak_memory_bytes, job.machine),
    )
    peaks = f"{gib(plan.predicted.peak_memory_bytes)} -> {gib(priced.peak_memory_bytes)} GiB"
    parts: tuple[str | Grid, ...] = (
        Grid(columns=COLUMNS, rows=rows),
        f"why not  {asked}: {compare_leaves(mine, other)}; peak memory {peaks}",
        f"proved   nothing with {asked} takes less than {seconds(result.lower_bound_s)}, "
        f"{percent(result.lower_bound_s / plan.predicted.step_s - 1)} % against the plan "
        f"({result.num_candidates:,} candidates)",
    )
    data = {
        "schema": "planner.why/1",
        "asked": asked,
        "possible": True,
        "step_s": priced.step_s,
        "lower_bound_s": result.lower_bound_s,
        "plan_step_s": plan.predicted.step_s,
        "change_s": {name: other.get(name, 0.0) - mine.get(name, 0.0) for name in sorted({**mine, **other})},
        "num_candidates": result.num_candidates,
        **options_of(spec),
    }
    return Report(parts=parts, data=data)
