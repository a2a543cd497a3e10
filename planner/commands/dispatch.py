"""planner dispatch: the groups that a plan with buckets forms for one batch of lengths, with a proved bound."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from planner.batch import IntArray
from planner.commands import arguments
from planner.dispatch import Dispatch, DoesNotFit, Group, dispatch, static_dispatch
from planner.errors import OK, InfeasibleError, UserError
from planner.files import read_plan
from planner.menus import Dispatching, dispatching_of, drift, sequences_of
from planner.read_lengths import read_batch
from planner.render import Grid, Report, seconds

_SMALL = 64  # rows of groups that are printed one by one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("plan", type=Path, help="plan.json of `planner search --seq-dist`")
    parser.add_argument("lengths", type=Path, help="lengths of one global batch: text, a number a line, or .npy")
    parser.add_argument("--ranks", type=arguments.whole, metavar="N", help="GPUs (default: the plan's)")
    parser.add_argument("--time-limit", type=arguments.positive, default=5.0, metavar="S", help="seconds (default: 5)")
    parser.add_argument("--gap", type=arguments.positive, default=0.01, help="stop at this gap (default: 0.01)")
    arguments.add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Dispatch the batch and print it. InfeasibleError says the longest sequence that fits."""
    plan = read_plan(args.plan)
    planned = sequences_of(plan)
    found = dispatching_of(plan, args.ranks)
    lengths = read_batch(args.lengths)
    try:
        answer = dispatch(
            found.menu, lengths, gap_frac=args.gap, time_limit_s=args.time_limit, static_kind=found.static_kind
        )
    except DoesNotFit as error:
        raise InfeasibleError(f"{args.lengths}: {error}") from None
    except ValueError as error:
        raise UserError(f"{args.lengths}: {error}") from None
    arguments.answer(_report(found, lengths, answer, drift(planned, lengths)), args)
    return OK


def _report(found: Dispatching, lengths: IntArray, answer: Dispatch, drifted: str | None) -> Report:
    rows = _rows(found, lengths, answer)
    static = None if found.static_kind is None else static_dispatch(found.menu, lengths, found.static_kind)
    against = f"; the static plan takes {seconds(static.step_s)}" if static is not None else ""
    columns = ("step", "ranks", "ulysses", "ring", "<recompute", "micro-batches", "seqs", "tokens", "longest", "s")
    num_steps = len(answer.steps)
    many = f"groups   {len(rows):,}: --format json lists them"
    shown = Grid(columns=columns, rows=rows) if len(rows) <= _SMALL else many
    parts = (
        f"batch    {len(lengths):,} sequences, {int(lengths.sum()):,} tokens, longest {int(lengths.max()):,}",
        shown,
        f"step     {seconds(answer.step_s)} in {num_steps} micro-step{'s' if num_steps > 1 else ''}{against}",
        f"status   {answer.method}; lower bound {seconds(answer.lower_bound_s)}: at most {100 * answer.gap_frac:.2g} % "
        f"faster exists (proved); {answer.search_s:.2f} s search",
        *((f"drift    {drifted}",) if drifted else ()),
    )
    data = {
        "schema": "planner.dispatch/1", "step_s": answer.step_s, "lower_bound_s": answer.lower_bound_s,
        "gap_frac": answer.gap_frac, "method": answer.method, "search_s": answer.search_s, "drift": drifted,
        "static_step_s": None if static is None else static.step_s,
        "steps": [[_group(found, group) for group in step.groups] for step in answer.steps],
    }  # fmt: skip
    return Report(parts=parts, data=data)


def _group(found: Dispatching, group: Group) -> dict[str, object]:
    kind = found.menu.groups[group.kind]
    return {
        "first_rank": group.first_rank, "ranks": kind.ranks, "ulysses": kind.ulysses, "ring": kind.ring,
        "recompute": kind.strategy.recompute, "offload_activations": kind.strategy.offload_activations,
        "micro_batches": [list(part) for part in group.micro_batches], "time_s": group.time_s,
    }  # fmt: skip


def _rows(found: Dispatching, lengths: IntArray, answer: Dispatch) -> tuple[tuple[str, ...], ...]:
    rows = []
    for number, step in enumerate(answer.steps):
        for group in step.groups:
            kind, held = found.menu.groups[group.kind], np.concatenate([lengths[list(p)] for p in group.micro_batches])
            rows.append(
                (
                    str(number), f"{group.first_rank}-{group.first_rank + kind.ranks - 1}", str(kind.ulysses),
                    str(kind.ring), kind.strategy.recompute + (" + swap" if kind.strategy.offload_activations else ""),
                    str(len(group.micro_batches)), f"{len(held):,}", f"{int(held.sum()):,}", f"{int(held.max()):,}",
                    f"{group.time_s:.4g}",
                )
            )  # fmt: skip
    return tuple(rows)
