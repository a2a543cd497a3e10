"""planner calibrate-loop: profile this machine, plan with it, run the plans, compare. The loop that keeps us honest.

Nothing is fitted to the runs: predictions are written down before the first of them. Runs are repeated in rounds, every
plan once a round, so that a slow minute hits all plans; the scatter between rounds is the noise floor.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from planner.build import Job
from planner.commands import arguments
from planner.commands.profile import duration
from planner.costmodel.graph import ModelGraph
from planner.costmodel.presets import load_cluster
from planner.costmodel.profile import Profile, encode_profile
from planner.costmodel.strategy import PlanSpec
from planner.errors import UserError
from planner.files import check_writable, read_profile, write_atomic
from planner.plan import encode_plan
from planner.profiler.profile import INTERRUPTED, Request, death, ranks_of, run_profile
from planner.profiler.trace import trace_model
from planner.provenance import tool_version
from planner.reports import loop_model
from planner.reports.loop_plans import Predicted, candidates, choose, job_of, price, shared_of, written
from planner.reports.loop_plot import write_plot
from planner.reports.loop_state import Progress, run_key
from planner.reports.loop_text import Row, markdown, median_error, options

_HERE = Path(__file__).parent
_MODEL = _HERE / "loop_model.py"
_RUN_LIMIT_S = 1800.0
_WHOLE = {"ranks": "2,4,8", "models": "narrow,wide,long", "plans": 5, "rounds": 3, "budget": 180.0, "parts": "0.5,0.25",
          "output": _HERE / "closed_loop.md", "record": _HERE / "measured"}  # fmt: skip
_QUICK = {"ranks": "2", "models": "narrow", "plans": 3, "rounds": 2, "budget": 30.0, "parts": "",
          "output": Path("closed_loop.md"), "record": Path("closed_loop")}  # fmt: skip
EPILOG = (
    "Takes about half an hour on two quiet cores. --quick proves in a few minutes that the loop closes. What was done\n"
    "before an interruption is kept in FOLDER/progress of --record: the same command with --resume goes on with it."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("--ranks", metavar="N,...", help="default: 2,4,8")
    parser.add_argument("--models", metavar="NAME,...", help="default: narrow,wide,long")
    parser.add_argument("--plans", type=arguments.whole, help="of a model on some ranks, at least 3 (default: 5)")
    parser.add_argument("--rounds", type=arguments.whole, help="runs of every plan (default: 3)")
    parser.add_argument("--steps", type=arguments.whole, default=3, help="timed steps a run (default: %(default)s)")
    parser.add_argument("--budget", type=duration, metavar="S", help="for all profiles together (default: 180)")
    parser.add_argument("--parts", metavar="F,...", help="profiles of these shares of the budget too, to see what it "
                        "buys; '' = none (default: 0.5,0.25)")  # fmt: skip
    parser.add_argument("--profile", type=Path, metavar="FILE", help="use this profile instead of measuring any")
    parser.add_argument("--resume", action="store_true", help="go on with what an interrupted loop left")
    parser.add_argument("--quick", action="store_true", help="the defaults are 2 ranks, one model, 3 plans, 2 rounds, "
                        "30 s of profiling, and the report and the record in this folder")  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: the report in this package")
    parser.add_argument("--record", type=Path, metavar="FOLDER", help="profile and runs (default: FILE without its "
                        "suffix, measured/ of the package if there is no -o)")  # fmt: skip
    parser.add_argument("--quiet", action="store_true")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """One model on one number of ranks with its plans."""

    model: str
    ranks: int
    graph: ModelGraph
    chosen: tuple[Predicted, ...]
    texts: tuple[bytes, ...]


def main(args: argparse.Namespace) -> int:
    """Profile, plan, run, write the report."""
    if args.output is not None and args.record is None:
        args.record = args.output.with_suffix("")
    for name, value in (_QUICK if args.quick else _WHOLE).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    ranks, models, parts = _numbers(args.ranks), _names(args.models), _parts(args.parts)
    check_writable(args.output)
    load_before = os.getloadavg()[0]
    graphs = {m: trace_model(f"{_MODEL}:{m}", seq_len=loop_model.SEQ_LENS[m]) for m in models}
    chosen = {name: str(getattr(args, name)) for name in ("ranks", "models", "plans", "rounds", "steps", "budget")}
    progress = Progress.open(args.record / "progress", {**chosen, "profile": str(args.profile)}, args.resume)
    given = read_profile(args.profile) if args.profile else None
    profile = given or _profile(args, ranks, graphs, progress, 1.0)
    write_atomic(args.record / "closed_loop_profile.json", encode_profile(profile))
    smaller = {} if given else {part: _profile(args, ranks, graphs, progress, part) for part in parts}
    cases = [_case(args, model, graphs[model], profile, n) for model in models for n in ranks]
    rows = _rows(cases, _run_all(args, cases, progress))
    if not any(row.rounds_s for row in rows):
        raise UserError(f"no plan ran to its end; the first: {rows[0].failed or 'not started'}")
    curve = [_point(args, 1.0, profile, rows)]
    curve += [_point(args, part, one, _predicted_again(cases, rows, one)) for part, one in smaller.items()]
    facts = {
        "date": datetime.date.today().isoformat(), "load_before": load_before, "load_after": os.getloadavg()[0],
        "cores": os.cpu_count(), "profile_s": args.budget, "samples": len(profile.samples), "rounds": args.rounds,
        "steps": args.steps, "device": profile.conditions[0].device, "version": tool_version(), "curve": curve,
    }  # fmt: skip
    data = {"facts": facts, "rows": [row.data for row in rows]}
    write_atomic(args.record / "closed_loop.json", (json.dumps(data, indent=1, sort_keys=True) + "\n").encode())
    write_atomic(args.output, markdown(rows, facts).encode())
    write_plot([row for row in rows if row.rounds_s], curve, args.output.parent / "plots" / f"{args.output.stem}.png")
    progress.clear()
    arguments.note(args, f"wrote {args.output}")
    return 0


def _numbers(text: str) -> list[int]:
    if not all(part.isdecimal() and int(part) > 1 for part in text.split(",")):
        raise UserError(f"--ranks {text}: give numbers of at least 2, e.g. 2,4,8")
    return [int(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    unknown = sorted(set(text.split(",")) - set(loop_model.SEQ_LENS))
    if unknown:
        raise UserError(f"--models: unknown {', '.join(unknown)}; known: {', '.join(loop_model.SEQ_LENS)}")
    return text.split(",")


def _parts(text: str) -> list[float]:
    try:
        found = [float(part) for part in filter(None, text.split(","))]
    except ValueError:
        found = [0.0]
    if not all(0 < part < 1 for part in found):
        raise UserError(f"--parts {text}: give shares between 0 and 1, e.g. 0.5,0.25")
    return found


def _profile(
    args: argparse.Namespace, ranks: list[int], graphs: dict[str, ModelGraph], progress: Progress, part: float
) -> Profile:
    """Kernels and layers of all models, and collectives, on every number of ranks in `part` of the budget.

    Each has an equal share of what those before it left, the first a double one: it measures the kernels for all.
    """
    profile: Profile | None = None
    left_s = part * args.budget
    for i, n in enumerate(ranks):
        share_s = left_s / (len(ranks) - i) if i else 2 * left_s / (len(ranks) + 1)
        done = progress.profile(f"{part:g}-{n}")
        if done is not None:
            profile = done
            left_s -= share_s
            continue
        start_s = time.monotonic()
        arguments.note(args, f"profiling on {n} ranks, {part:g} of the budget")
        request = Request(
            what="all", platform="cpu", cluster=load_cluster("cpu-gloo"),
            graphs={f"{_MODEL}:{model}": graph for model, graph in graphs.items()}, ranks=n, threads=1,
            budget_s=share_s, today=datetime.date.today().isoformat(), tool_version=tool_version(),
        )  # fmt: skip
        outcome = run_profile(request, profile)
        if outcome.died == INTERRUPTED:
            raise KeyboardInterrupt
        if outcome.died:
            arguments.note(args, outcome.died)
        profile = outcome.profile
        left_s -= time.monotonic() - start_s
        progress.keep_profile(f"{part:g}-{n}", profile)
    assert profile is not None
    return profile


def _case(args: argparse.Namespace, model: str, graph: ModelGraph, profile: Profile, ranks: int) -> _Case:
    job = job_of(graph, load_cluster("cpu-gloo"), profile, ranks)
    chosen = choose(_priced(job, profile, candidates(job)), args.plans)
    texts = tuple(encode_plan(written(job, one.spec)) for one in chosen)
    return _Case(model=model, ranks=ranks, graph=graph, chosen=tuple(chosen), texts=texts)


def _priced(job: Job, profile: Profile, specs: list[PlanSpec]) -> list[Predicted]:
    shared = shared_of(job.graph, load_cluster("cpu-gloo"), profile, job.machine.num_gpus, os.cpu_count() or 1)
    return price(job, shared, specs)


def _predicted_again(cases: list[_Case], rows: list[Row], profile: Profile) -> list[Row]:
    """The rows with step times predicted from another profile."""
    found: list[Row] = []
    for case in cases:
        job = job_of(case.graph, load_cluster("cpu-gloo"), profile, case.ranks)
        again = _priced(job, profile, [one.spec for one in case.chosen])
        mine = rows[len(found) : len(found) + len(again)]
        found += [replace(row, predicted_s=p.step_s, shared_s=p.shared_s) for row, p in zip(mine, again, strict=True)]
    return found


def _point(args: argparse.Namespace, part: float, profile: Profile, rows: list[Row]) -> dict[str, Any]:
    """One point of the curve of budgets: median error of every model."""
    ran = [row for row in rows if row.rounds_s]
    errors = {m: median_error([r for r in ran if r.model == m]) for m in dict.fromkeys(row.model for row in ran)}
    return {"budget_s": part * args.budget, "samples": len(profile.samples), "error": errors}


def _run_all(
    args: argparse.Namespace, cases: list[_Case], progress: Progress
) -> dict[tuple[int, int], dict[str, Any]]:
    """(case, plan) -> {"step_s": medians by round, "peak_bytes": [...]} or {"failed": why}."""
    found: dict[tuple[int, int], dict[str, Any]] = {
        (c, i): {"step_s": []} for c, case in enumerate(cases) for i in range(len(case.chosen))
    }
    with tempfile.TemporaryDirectory(prefix="planner-loop-") as folder:
        for number in range(args.rounds + 1):
            memory = number == args.rounds
            for c, case in enumerate(cases):
                keys = [run_key(text, number) for text in case.texts]
                what = "memory" if memory else f"round {number + 1} of {args.rounds}"
                left = [i for i, key in enumerate(keys) if key not in progress.runs]
                if left:
                    arguments.note(args, f"running {len(left)} plans of {case.model} on {case.ranks} ranks, {what}")
                    for i, line in _launch(args, case, left, Path(folder), memory):
                        progress.keep(keys[i], line)
                for i, key in enumerate(keys):
                    one, line = found[c, i], progress.runs.get(key, {})
                    if "step_s" in line:
                        one["step_s"].append(sorted(line["step_s"])[len(line["step_s"]) // 2])
                    else:
                        one.update(line)
    return found


def _launch(
    args: argparse.Namespace, case: _Case, plans: list[int], root: Path, memory: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Run these plans of a case once in one job; what a dead job had not done is missing."""
    folder = Path(tempfile.mkdtemp(dir=root))
    paths = [folder / f"plan-{i}.json" for i in plans]
    for path, i in zip(paths, plans, strict=True):
        path.write_bytes(case.texts[i])
    spec = {
        "plans": [str(path) for path in paths], "folder": str(folder), "model": f"{_MODEL}:{case.model}",
        "memory": memory, "steps": args.steps,
    }  # fmt: skip
    (folder / "spec.json").write_text(json.dumps(spec))
    out = folder / "out.jsonl"
    out.touch()
    command = ["planner.reports.loop_rank", str(folder / "spec.json"), str(out)]
    limit_s = time.monotonic() + _RUN_LIMIT_S
    with ranks_of(command, case.ranks, 1, "cpu", folder) as children:
        while True:
            codes = [child.poll() for child in children]
            if all(code == 0 for code in codes):
                break
            if any(codes) or time.monotonic() > limit_s:
                why = death(codes, folder, "") if any(codes) else "took too long"
                arguments.note(args, f"{case.model} on {case.ranks} ranks: {why}")
                break
            time.sleep(0.1)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    for line in lines:
        yield plans[paths.index(Path(line.pop("plan")))], line
    if len(lines) < len(paths):
        yield plans[len(lines)], {"failed": "the job ended in this plan"}


def _rows(cases: list[_Case], found: dict[tuple[int, int], dict[str, Any]]) -> list[Row]:
    return [
        Row(
            model=case.model, ranks=case.ranks, options=options(one.spec), predicted_s=one.step_s,
            shared_s=one.shared_s, predicted_bytes=one.peak_bytes, rounds_s=tuple(found[c, i]["step_s"]),
            peak_bytes=float(max(found[c, i].get("peak_bytes", [0.0]))), failed=found[c, i].get("failed", ""),
        )
        for c, case in enumerate(cases)
        for i, one in enumerate(case.chosen)
    ]  # fmt: skip
