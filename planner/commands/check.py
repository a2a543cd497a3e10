"""planner check: verify a plan without the search, and say what was checked."""

from __future__ import annotations

import argparse
from pathlib import Path

from planner.check import check_plan, problems
from planner.commands import arguments
from planner.errors import BUG, OK, StalePlanError, UserError
from planner.files import read_plan
from planner.plan import Plan
from planner.provenance import cost_model_sha256
from planner.render import Grid, Report

EPILOG = (
    "Exit code 0: everything holds. 2: the plan does not hold. 4: it is from another model, cluster or cost model.\n"
    "--ranks N applies the plan on N fake ranks on this CPU."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("plan", type=Path, help="plan.json")
    parser.add_argument("--model", help=f"check that the plan is of this model; {arguments.SANDBOX}")
    parser.add_argument("--cluster", metavar="NAME|FILE", help="check that the plan is for this cluster")
    parser.add_argument("--ranks", type=arguments.whole, metavar="N", help="dry-run the plan on N fake ranks")
    parser.add_argument("--trace-limit", type=arguments.positive, default=120.0, help=argparse.SUPPRESS)
    arguments.add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Check, print, and end with 0 only if everything holds."""
    plan = read_plan(args.plan)
    _refuse_stale(plan, args)
    findings = check_plan(plan)
    wrong = problems(findings)
    rows = tuple((f.name, "ok" if f.ok else "WRONG", f.detail) for f in findings)
    text = f"holds    {len(findings)} checks" if not wrong else f"WRONG    {len(wrong)} of {len(findings)} checks"
    data = {
        "schema": "planner.check/1",
        "ok": not wrong,
        "findings": [{"name": f.name, "ok": f.ok, "detail": f.detail} for f in findings],
    }
    report = Report(parts=(Grid(columns=("<check", "<", "<what was found"), rows=rows), text), data=data)
    arguments.answer(report, args)
    if wrong:
        raise UserError(f"{args.plan}: does not hold: {wrong[0].name}: {wrong[0].detail}")
    if args.ranks:
        return _dry_run(plan, args.ranks, args.model)
    return OK


def _dry_run(plan: Plan, ranks: int, model: str | None) -> int:
    try:
        from planner.runtime.dry_run import dry_run
    except ImportError as error:
        raise UserError(f"--ranks: this version has no runtime to dry-run a plan with ({error})") from None
    return OK if dry_run(plan, ranks, model) else BUG


def _refuse_stale(plan: Plan, args: argparse.Namespace) -> None:
    from planner.costmodel.hardware import cluster_sha256
    from planner.plan import graph_sha256

    inputs = plan.inputs
    if args.cluster and cluster_sha256(arguments.cluster_of(args.cluster)) != inputs.cluster_sha256:
        raise StalePlanError(
            f"{args.plan}: made for cluster {inputs.cluster.name} (sha256 {inputs.cluster_sha256[:12]}), which "
            f"{args.cluster} is not: search again"
        )
    if args.model:
        args.seq_len = inputs.seq_len if inputs.graph.unit == "tokens" else None
        now = graph_sha256(arguments.load_graph(args))
        if now != inputs.graph_sha256:
            raise StalePlanError(
                f"{args.plan}: made for a graph of sha256 {inputs.graph_sha256[:12]}, {args.model} gives {now[:12]}: "
                "search again"
            )
    if plan.certificate and plan.certificate.cost_model_sha256 != cost_model_sha256():
        raise StalePlanError(
            f"{args.plan}: priced by cost model {plan.certificate.cost_model_sha256[:12]}, this is "
            f"{cost_model_sha256()[:12]}: `planner estimate {args.plan}` prices it anew, or search again"
        )
