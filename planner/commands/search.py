"""planner search: the fastest plan of the declared space, with its certificate, written to a plan file."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from planner.build import Job, build_plan
from planner.check import Finding, check_plan, problems
from planner.commands import arguments, kernels, sequences
from planner.errors import InfeasibleError, UserError
from planner.files import write_atomic
from planner.objective import OBJECTIVES, Outcome, choose, gpu_counts
from planner.plan import Certificate, Plan, Space, encode_plan
from planner.progress import ProgressLine
from planner.provenance import cost_model_sha256, space_sha256, tool_version
from planner.render import GIB, Grid, Report, seconds
from planner.robust import robust_search
from planner.search import SearchOptions, SearchResult, search
from planner.space import Limits
from planner.views import (
    COLUMNS,
    certificate_line,
    cluster_line,
    headline,
    interval_line,
    kernel_lines,
    plan_data,
    plan_row,
    step_line,
)
from planner.ways_out import ways_out

SCHEMA = "planner.search/1"
EPILOG = (
    f"MODEL: model.py, model.py:function, a Hugging Face config.json or a saved graph. NOTE: {arguments.SANDBOX}.\n"
    "A config.json or a saved graph executes nothing of yours.\n\n"
    f"options of --fix: {', '.join(arguments.FIXABLE)}\noptions of --forbid: {', '.join(arguments.FORBIDDABLE)}\n"
    f"{kernels.EPILOG}\n\n"
    "Ctrl-C returns the best plan so far with its gap (exit code 0), or exit code 130 if there is none.\n"
    "Nothing fits: exit code 3, with what would make it fit."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("model", help="model.py[:function], config.json or a saved graph")
    arguments.add_job(parser)
    parser.add_argument("--gap", type=arguments.fraction, default=0.01, metavar="FRAC",
                        help="stop when nothing can be more than this part faster (default: %(default)s)")  # fmt: skip
    parser.add_argument("--time-limit", type=arguments.positive, default=60.0, metavar="S",
                        help="seconds of search (default: %(default)s)")  # fmt: skip
    parser.add_argument("--top", type=arguments.whole, default=5, metavar="N",
                        help="plans to show (default: %(default)s)")  # fmt: skip
    parser.add_argument("--fix", default="", metavar="A=B,...", help="fix options, e.g. tp=8,pp=4")
    parser.add_argument("--forbid", default="", metavar="X,...", help="leave options out, e.g. cp,offload_optimizer")
    parser.add_argument("--objective", choices=OBJECTIVES, default="step_s",
                        help="step_s: the fastest step on --gpus; gpus: the fewest GPUs that fit and meet "
                        "--max-step-s; cost: the fewest GPU-seconds a step. The last two try the divisors of --gpus "
                        "that are whole nodes or parts of one (default: %(default)s)")  # fmt: skip
    parser.add_argument("--max-step-s", type=arguments.positive, default=float("inf"), metavar="S",
                        help="slowest step that is acceptable, for --objective gpus and cost")  # fmt: skip
    parser.add_argument("--robust", action="store_true",
                        help="the plan whose 80 %% interval ends soonest instead of the fastest predicted")  # fmt: skip
    parser.add_argument("--executable-only", action="store_true", help="only what planner.runtime executes today")
    parser.add_argument("--save-graph", type=Path, metavar="FILE", help="also write the traced graph (FILE.graph.json)")
    sequences.add_arguments(parser)
    arguments.add_output(parser, "the plan (default: plan.json)")


def run(args: argparse.Namespace) -> int:
    """Trace, search, check, write, show."""
    if args.gpus is None:
        raise UserError("give --gpus N: how many GPUs the job has")
    if args.robust and args.objective != "step_s":
        raise UserError(f"--robust goes with --objective step_s, not {args.objective}: leave one of them out")
    path = arguments.output_path(args, "plan.json")
    cluster, engine = arguments.cluster_of(args.cluster), arguments.engine_of(args.engine)
    cluster, engine, profile_sha256 = arguments.profiled(args, cluster, engine, args.gpus)
    engine = kernels.chosen(args.kernels, engine, cluster)
    limits = arguments.limits_of(engine, args.fix, args.forbid, args.executable_only)
    lengths = sequences.lengths_of(args)
    graph = arguments.load_graph(args)
    if args.save_graph:
        from planner.profiler.graph_io import encode_graph

        write_atomic(args.save_graph, encode_graph(graph))
    job = Job(
        graph=graph,
        machine=arguments.machine_of(graph, cluster, engine, args.gpus),
        global_batch_size=arguments.batch_of(args, graph) if lengths is None else args.gpus,
        memory_margin_frac=args.memory_margin,
        profile_sha256=profile_sha256,
    )
    if lengths is not None:
        plan = sequences.plan_lengths(args, job, lengths, limits)
        write_atomic(path, encode_plan(plan))
        arguments.answer(sequences.report(plan, job.machine, path), args, to_file=False)
        return 0
    job, result, extra = _search(args, job, limits)
    if not result.plans:
        if result.stop_reason == "interrupted":
            raise KeyboardInterrupt
        raise InfeasibleError(_infeasible(job, limits, result))
    plan, result = _sound(args, job, result, limits)
    write_atomic(path, encode_plan(plan))
    arguments.answer(_report(job, plan, result, path, extra), args, to_file=False)
    return 0


def _search(args: argparse.Namespace, job: Job, limits: Limits) -> tuple[Job, SearchResult, tuple[str, ...]]:
    """(job at the chosen GPU count, its result, lines about the objective)."""

    def at(num_gpus: int) -> Job:
        machine = job.machine
        return replace(job, machine=arguments.machine_of(job.graph, machine.cluster, machine.engine, num_gpus))

    def one(num_gpus: int) -> SearchResult:
        return _search_once(args, at(num_gpus), limits)

    if args.robust:
        result, high_s = robust_search(job.graph, job.machine, limits, lambda only, share: _run(args, job, only, share))
        line = f"robust   by the interval's upper end; nothing can have one below {seconds(high_s)} (proved)"
        return job, result, (line,)
    if args.objective == "step_s":
        return job, one(args.gpus), ()
    counts = gpu_counts(job.machine.cluster, args.gpus)
    outcome = choose(args.objective, counts, args.max_step_s, one)
    if outcome.best is None:
        raise InfeasibleError(_no_count(args, outcome))
    return at(outcome.best.num_gpus), outcome.best.result, (_objective_line(args, job, outcome),)


def _search_once(args: argparse.Namespace, job: Job, limits: Limits) -> SearchResult:
    if args.robust:
        return robust_search(job.graph, job.machine, limits, lambda only, share: _run(args, job, only, share))[0]
    return _run(args, job, limits)


def _run(args: argparse.Namespace, job: Job, limits: Limits, share: float = 1.0) -> SearchResult:
    options = SearchOptions(
        gap_frac=args.gap, time_limit_s=share * args.time_limit, top=args.top, memory_margin_frac=args.memory_margin
    )
    line = ProgressLine(not args.quiet)
    try:
        return search(job.graph, job.machine, job.global_batch_size, limits, options, line)
    finally:
        line.clear()


def _no_count(args: argparse.Namespace, outcome: Outcome) -> str:
    tried = ", ".join(str(t.num_gpus) for t in outcome.trials)
    fastest = min((t.result.plans[0].step_s for t in outcome.trials if t.result.plans), default=None)
    if fastest is None:
        return f"nothing fits on any of {tried} GPUs: --objective step_s at {args.gpus} GPUs names the ways out"
    return f"no count of {tried} GPUs meets --max-step-s {args.max_step_s:g}: the fastest step is {seconds(fastest)}"


def _objective_line(args: argparse.Namespace, job: Job, outcome: Outcome) -> str:
    best = outcome.best
    assert best is not None
    tried = ", ".join(f"{t.num_gpus}" for t in outcome.trials)
    if args.objective == "gpus":
        return f"fewest   {best.num_gpus} GPUs of {tried} tried; fewer than {outcome.lower_bound:g} are refuted"
    price = job.machine.cluster.price_per_gpu_hour
    dollars = f" = ${best.gpu_seconds / 3600 * price.value:.4g}" if price else ""
    return (
        f"cheapest {best.gpu_seconds:,.4g} GPU-seconds{dollars} a step on {best.num_gpus} GPUs of {tried} tried; "
        f"lower bound {outcome.lower_bound:,.4g}"
    )


def _infeasible(job: Job, limits: Limits, result: SearchResult) -> str:
    """By how much nothing fits, and the cheapest ways out."""
    gpus = f"{job.machine.num_gpus:,} x {job.machine.cluster.device.name}"
    if result.stop_reason == "time_limit":
        return f"no plan found on {gpus} within the time limit, and none refuted: give a longer --time-limit"
    if result.num_candidates == 0:
        text = f"no mesh of {gpus} suits this model, global batch {job.global_batch_size} and restrictions"
    else:
        text = f"nothing fits: all {result.num_candidates:,} candidates on {gpus} need more memory"
        if result.shortfall_bytes is not None:
            text += f"; the nearest misses by {result.shortfall_bytes / GIB:.1f} GiB per GPU"
    ways = ways_out(job, limits)
    if not ways:
        return f"{text}; no single relaxation helps, not even 64 times the GPUs"
    return f"{text}; ways out: {'; '.join(f'{way.text} ({seconds(way.step_s)} a step)' for way in ways)}"


def _sound(args: argparse.Namespace, job: Job, result: SearchResult, limits: Limits) -> tuple[Plan, SearchResult]:
    """The best plan that the independent checker accepts, and the result that it is of.

    Interleaved chunks of uneven length take longer than the closed form says (costmodel/pipeline.py). When the
    simulator refuses the time of every plan found, the search runs again without interleaving; the bound of the first
    search, over the whole space, stays.
    """
    plan, wrong = _first_sound(args, job, result, limits)
    if plan is None and wrong and wrong.name == "step time" and "interleaved" not in limits.forbidden:
        arguments.note(args, f"searching again without interleaved chunks, which the simulator refuses: {wrong.detail}")
        again = _search_once(args, job, replace(limits, forbidden=limits.forbidden | {"interleaved"}))
        refused = {**again.refused, "interleaved: simulated step time": len(result.plans)}
        bound_s = min(result.lower_bound_s, again.lower_bound_s)
        kept = replace(again, lower_bound_s=bound_s, num_candidates=result.num_candidates, ledger=result.ledger)
        result = replace(kept, refused=refused, search_s=result.search_s + again.search_s)
        plan, wrong = _first_sound(args, job, result, limits)
    if plan is not None:
        return plan, result
    if wrong is None:
        raise InfeasibleError(
            f"the runtime executes none of the {len(result.plans)} best plans, though every option of theirs: "
            "forbid one of the options that do not go together, or give a larger --top"
        )
    raise AssertionError(f"the checker refuses every plan found ({wrong.name}: {wrong.detail}); nothing is written")


def _first_sound(
    args: argparse.Namespace, job: Job, result: SearchResult, limits: Limits
) -> tuple[Plan | None, Finding | None]:
    """(the first plan without a problem, the first problem of the first plan that has one)."""
    first: Finding | None = None
    for index, found in enumerate(result.plans):
        reasons = arguments.executable_reasons(found.spec, job)
        if args.executable_only and reasons:
            continue
        others = tuple(other.spec for other in result.plans[index + 1 :])
        proof = _certificate(result, found.step_s, limits, args.executable_only)
        plan = build_plan(job, found.spec, tool_version(), reasons, proof, others)
        wrong = problems(check_plan(plan))
        if not wrong:
            return plan, first
        first = first or wrong[0]
    return None, first


def _certificate(result: SearchResult, step_s: float, limits: Limits, executable_only: bool) -> Certificate:
    return Certificate(
        lower_bound_s=result.lower_bound_s,
        gap_frac=max(0.0, 1 - result.lower_bound_s / step_s),
        num_candidates=result.num_candidates,
        stop_reason=result.stop_reason,
        ledger=result.ledger,
        refused=result.refused,
        space=Space(
            fixed=limits.fixed,
            forbidden=tuple(sorted(limits.forbidden)),
            zero_stages=limits.zero_stages,
            executable_only=executable_only,
        ),
        space_sha256=space_sha256(),
        cost_model_sha256=cost_model_sha256(),
    )


def _report(job: Job, plan: Plan, result: SearchResult, path: Path, extra: tuple[str, ...]) -> Report:
    spec, predicted, machine = plan.decisions, plan.predicted, job.machine
    first = plan_row(1, spec, predicted.step_s, predicted.mfu_frac, predicted.peak_memory_bytes, machine)
    rows = [first]
    specs = [found.spec for found in result.plans]
    others = zip(specs[specs.index(spec) + 1 :], plan.alternatives, strict=True)
    for number, (other, about) in enumerate(others, start=2):
        mfu = predicted.mfu_frac * predicted.step_s / about.step_s
        rows.append(plan_row(number, other, about.step_s, mfu, about.peak_memory_bytes, machine))
    runs = "" if plan.executable else f"  (runtime lacks {len(plan.executable_reasons)} of its options)"
    parts: tuple[str | Grid, ...] = (
        headline(job.graph, job.global_batch_size),
        cluster_line(machine.cluster, machine.num_gpus, machine.engine.name),
        *(f"note     {text}" for text in job.graph.notes),
        Grid(columns=COLUMNS, rows=tuple(rows)),
        step_line(predicted.breakdown),
        interval_line(plan),
        *kernel_lines(plan),
        *extra,
        f"{certificate_line(plan)}; {result.search_s:.2f} s search",
        f"wrote    {path}{runs}  next: planner explain {path}",
    )
    data = {
        "schema": SCHEMA,
        **plan_data(plan),
        "search_s": result.search_s,
        "plan_path": str(path),
        "alternatives": [
            {**other.options, "step_s": other.step_s, "peak_memory_bytes": other.peak_memory_bytes}
            for other in plan.alternatives
        ],
        "graph_sha256": plan.inputs.graph_sha256,
        "cluster_sha256": plan.inputs.cluster_sha256,
    }
    return Report(parts=parts, data=data)


