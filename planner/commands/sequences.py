"""planner search --seq-dist: a plan for sequences of different lengths, one state layout and what each bucket does."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from planner.bucketed import LengthOptions, LengthResult, search_lengths
from planner.build import Job, build_plan
from planner.check import check_plan, problems
from planner.commands import arguments
from planner.costmodel.keys import Machine
from planner.costmodel.strategy import PlanSpec
from planner.errors import InfeasibleError, UserError
from planner.layouts import NothingHolds
from planner.lengths import Lengths
from planner.menus import quantiles_of
from planner.plan import Bucket, GroupKind, Plan, SequencePlan
from planner.provenance import tool_version
from planner.read_lengths import read_lengths
from planner.render import Grid, Report, percent, seconds
from planner.space import Limits
from planner.views import cluster_line, kernel_lines, plan_data

_GRAIN = 1024  # traced lengths are multiples of this, so that context-parallel degrees divide them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags for sequences of different lengths."""
    parser.add_argument("--seq-dist", metavar="FILE|NAME",
                        help="plan for these lengths: text, .npy, .csv histogram, or a published name")  # fmt: skip
    parser.add_argument("--max-seq-len", type=arguments.whole, metavar="N",
                        help="longer sequences of --seq-dist are cut to N (default: the longest)")  # fmt: skip
    parser.add_argument("--tokens-per-step", type=arguments.whole, metavar="N",
                        help="tokens of a global batch (default: --global-batch times the mean length)")  # fmt: skip


def lengths_of(args: argparse.Namespace) -> Lengths | None:
    """The lengths that --seq-dist names, cut; sets --seq-len to what the model must be traced at."""
    if args.seq_dist is None:
        if args.max_seq_len or args.tokens_per_step:
            raise UserError("--max-seq-len and --tokens-per-step go with --seq-dist")
        return None
    if args.objective != "step_s":
        raise UserError("--seq-dist does not go with --objective: it minimises the expected step")
    if args.seq_len:
        raise UserError("--seq-dist takes --max-seq-len instead of --seq-len")
    lengths: Lengths = read_lengths(args.seq_dist)
    lengths = lengths.cut(args.max_seq_len) if args.max_seq_len else lengths
    args.seq_len = -(-lengths.longest_tokens // _GRAIN) * _GRAIN
    return lengths


def tokens_of(args: argparse.Namespace, lengths: Lengths) -> int:
    """Tokens of a global batch."""
    if args.tokens_per_step:
        return int(args.tokens_per_step)
    if args.global_batch:
        return round(int(args.global_batch) * lengths.mean_tokens)
    raise UserError("--seq-dist needs --tokens-per-step N (or --global-batch, in sequences)")


def plan_lengths(args: argparse.Namespace, job: Job, lengths: Lengths, limits: Limits) -> Plan:
    """Search, and the result as a plan that the checker accepts. InfeasibleError says the longest that fits."""
    tokens = tokens_of(args, lengths)
    options = LengthOptions(
        gap_frac=args.gap, time_limit_s=args.time_limit, memory_margin_frac=job.memory_margin_frac
    )
    try:
        result = search_lengths(job.graph, job.machine, lengths, tokens, limits, options)
    except NothingHolds as error:
        fits = f"the longest that does is {error.longest_tokens:,}: --max-seq-len {error.longest_tokens}"
        fits = fits if error.longest_tokens else "not even the model states fit"
        raise InfeasibleError(
            f"no layout on {job.machine.num_gpus} GPUs holds a sequence of {lengths.longest_tokens:,} tokens; {fits}, "
            "or more GPUs"
        ) from None
    except ValueError as error:
        raise UserError(f"--seq-dist: {error}") from None
    record = _record(result, lengths, tokens)
    for spec in _static_specs(job, result, tokens):
        reasons = (*groups_reasons(spec, job), *arguments.executable_reasons(spec, job))
        plan = build_plan(replace(job, global_batch_size=spec.global_batch_size), spec, tool_version(), reasons)
        if not problems(check_plan(plan)):
            return replace(plan, sequences=record)
    raise InfeasibleError(
        f"no static plan of the chosen layout holds full sequences of {job.graph.traced_seq_len:,} tokens by "
        "simulation: give a smaller --max-seq-len or a larger --memory-margin"
    )


def groups_reasons(spec: PlanSpec, job: Job) -> tuple[str, ...]:
    """Why the runtime cannot run groups under the state layout of `spec`; empty if it can."""
    from planner.runtime.support import groups_unsupported

    reason = groups_unsupported(spec, job.machine.engine.compiles)
    return (reason,) if reason else ()


def _static_specs(job: Job, result: LengthResult, tokens: int) -> list[PlanSpec]:
    """Plans of the layout in which every micro-batch is one full-length sequence, fastest kind first."""
    shape, menu, longest = result.layout.shape, result.layout.menu, job.graph.traced_seq_len
    holds = [group for group in menu.groups if group.capacity_tokens >= longest]
    holds.sort(key=lambda group: group.ranks * float(group.sequence_s(np.array([longest]))[0]))
    size = job.graph.num_layers // shape.pp
    specs = []
    for group in holds:
        dp = menu.num_ranks // group.ranks
        sharded = shape.zero_stage > 0
        specs.append(
            PlanSpec(
                tp=shape.tp, sequence_parallel=shape.sequence_parallel, pp=shape.pp, ep=shape.ep,
                zero_stage=shape.zero_stage,
                dp_replicate=1 if sharded else dp, dp_shard=dp if sharded else 1, ulysses=group.ulysses,
                ring=group.ring, vocab_parallel=shape.vocab_parallel, offload_optimizer=shape.offload_optimizer,
                global_batch_size=dp * max(1, shape.pp, round(tokens / (longest * dp))),
                stage_layers=tuple((i * size, (i + 1) * size) for i in range(shape.pp)),
                layers=(group.strategy,) * job.graph.num_layers,
            )
        )  # fmt: skip
    return specs


def _record(result: LengthResult, lengths: Lengths, tokens: int) -> SequencePlan:
    steps = [d.step_s for d in result.dispatches]
    return SequencePlan(
        distribution=lengths.name, source=lengths.source, tokens_per_step=tokens,
        longest_tokens=lengths.longest_tokens, cut_frac=lengths.cut_frac, num_batches=len(steps),
        step_s=result.step_s, step_p10_s=float(np.quantile(steps, 0.1)), step_p90_s=float(np.quantile(steps, 0.9)),
        lower_bound_s=result.lower_bound_s, gap_frac=result.gap_frac,
        static_step_s=result.static.mean_step_s if result.static else None,
        bucket_error_frac=result.edges.error_frac, num_layouts=result.num_layouts, stop_reason=result.stop_reason,
        buckets=tuple(
            Bucket(
                low=b.low, high=b.high, share_of_sequences=b.share_of_sequences, share_of_tokens=b.share_of_tokens,
                ulysses=b.group.ulysses, ring=b.group.ring, recompute=b.group.strategy.recompute,
                offload_activations=b.group.strategy.offload_activations, share_of_group=b.share_of_group,
                pack_tokens=b.pack_tokens, sequences_per_pack=b.sequences_per_pack,
            )
            for b in result.buckets
        ),
        kinds=tuple(
            GroupKind(
                ulysses=g.ulysses, ring=g.ring, recompute=g.strategy.recompute,
                offload_activations=g.strategy.offload_activations, capacity_tokens=g.capacity_tokens,
            )
            for g in result.layout.menu.groups
        ),
        quantiles=quantiles_of(lengths),
    )  # fmt: skip


# ---- views


def sequence_parts(found: SequencePlan) -> tuple[str | Grid, ...]:
    """What a reader sees of it: expectation, proof, static plan, and a row per bucket."""
    static = "no group of one kind holds the longest sequence"
    if found.static_step_s is not None:
        static = f"best static plan {seconds(found.static_step_s)}: {found.static_step_s / found.step_s:.2f}x as long"
    rows = tuple(
        (
            f"{b.low:,}-{b.high:,}", percent(b.share_of_sequences), percent(b.share_of_tokens), str(b.ulysses),
            str(b.ring), b.recompute + (" + swap" if b.offload_activations else ""), percent(b.share_of_group, 0),
            f"{b.pack_tokens:,.0f}", f"{b.sequences_per_pack:.1f}",
        )
        for b in found.buckets
    )  # fmt: skip
    columns = ("<tokens", "seqs %", "tokens %", "ulysses", "ring", "<recompute", "so %", "pack/rank", "seqs/pack")
    return (
        f"lengths  {found.distribution}: {found.source}; up to {found.longest_tokens:,} tokens "
        f"({percent(found.cut_frac, 3)} % cut), {found.tokens_per_step:,} a step",
        Grid(columns=columns, rows=rows),
        f"expected {seconds(found.step_s)} a step ({seconds(found.step_p10_s)} to {seconds(found.step_p90_s)} in 10 to "
        f"90 % of {found.num_batches} batches); {static}",
        f"status   lower bound {seconds(found.lower_bound_s)} over {found.num_layouts} state layouts: at most "
        f"{100 * found.gap_frac:.2g} % faster exists on these batches (proved); stopped by {found.stop_reason}",
        f"buckets  rounding lengths up to {len(found.buckets)} edges would cost {percent(found.bucket_error_frac)} %: "
        "the dispatcher takes raw lengths instead",
    )


def layout_line(plan: Plan) -> str:
    """The state layout in one line."""
    s = plan.decisions
    ranks = s.dp * s.cp
    ep = f", ep {s.ep}" if s.ep > 1 else ""
    return f"layout   tp {s.tp}, pp {s.pp}{ep}, ZeRO-{s.zero_stage} over {ranks} data ranks" + (
        ", sequence parallel" if s.sequence_parallel else ""
    )


def report(plan: Plan, machine: Machine, path: Path) -> Report:
    """What `planner search --seq-dist` answers."""
    assert plan.sequences is not None
    parts = (
        f"model    {plan.inputs.graph.name}: {plan.inputs.graph.num_params / 1e9:.2f}B parameters",
        cluster_line(machine.cluster, machine.num_gpus, machine.engine.name),
        layout_line(plan),
        *kernel_lines(plan),
        *sequence_parts(plan.sequences),
        f"runtime  {'; '.join(plan.executable_reasons) or 'runs it: python -m planner.runtime train'}",
        f"wrote    {path}  next: planner explain {path}",
    )
    return Report(parts=parts, data={"schema": "planner.search/1", **plan_data(plan), "plan_path": str(path)})
