"""One command for a machine with a GPU: `python -m planner.reports.gpu_check --out reports/measured/h200`.

Profiles kernels, copies and the layers of models; writes down the predicted step time and peak memory of single-GPU
plans (model, micro-batch, recompute, offload); then runs them through the runtime and scores the predictions. The
profile and the cases stay in the folder with their provenance. On a CPU it does the same at a small size (--tiny).
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.build import Job, build_plan
from planner.commands.profile import gpus, this_cluster
from planner.costmodel.engine import get_engine
from planner.costmodel.estimate import machine_for
from planner.costmodel.graph import ModelGraph
from planner.costmodel.hardware import ClusterSpec
from planner.costmodel.profile import Profile, encode_profile, profile_sha256
from planner.costmodel.profiled import fit_cluster
from planner.costmodel.profiled_engine import fit_engine
from planner.errors import UserError
from planner.files import write_atomic
from planner.given import Given, given_spec
from planner.plan import Plan, encode_plan
from planner.profiler.profile import Request, death, ranks_of, run_profile
from planner.profiler.trace import trace_model
from planner.provenance import tool_version

_HERE = Path(__file__).parent
MODELS = {"gpt_1b": 2048, "gpt_2b": 2048, "gpt_350m": 4096}
TINY = {"narrow": 128}
_LIMIT_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One plan of one GPU, predicted before it runs."""

    model: str
    options: str
    plan: Plan


def main(argv: Sequence[str] | None = None) -> int:
    """Profile, predict, run, score; returns 0 whatever the scores are, which the report states."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder for the profile, the cases and the report")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds of profiling")
    parser.add_argument("--cluster", default="", help="default: found out from the GPU")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="run only N cases, evenly chosen; 0 = all")
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU: tests the command itself")
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except (UserError, ValueError) as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    cluster = this_cluster("cpu-gloo" if args.tiny else args.cluster)
    platform = "cpu" if cluster.device.name == "cpu" else "cuda"
    if platform == "cpu" and not args.tiny:
        raise UserError("no GPU here: run it on one, or test the command with --tiny")
    if platform == "cuda" and not gpus():
        raise UserError(f"no GPU here, so it cannot be checked as {cluster.name}")
    args.out.mkdir(parents=True, exist_ok=True)
    file = _HERE / ("loop_model.py" if args.tiny else "gpu_models.py")
    lengths = TINY if args.tiny else MODELS
    graphs = {name: trace_model(f"{file}:{name}", seq_len=length) for name, length in lengths.items()}
    profile = _profile(args, file, graphs, cluster, platform)
    write_atomic(args.out / "profile.json", encode_profile(profile))
    cases = [case for name, graph in graphs.items() for case in cases_of(name, graph, cluster, profile)]
    if 0 < args.limit < len(cases):
        cases = [cases[i * len(cases) // args.limit] for i in range(args.limit)]
    _note(f"predicted {len(cases)} cases; running them")
    rows = [_row(case, _launch(case, file, platform)) for case in cases]
    facts = {"date": datetime.date.today().isoformat(), "device": profile.conditions[0].device,
             "software": dict(profile.conditions[0].software), "profile_sha256": profile_sha256(profile),
             "version": tool_version(), "load": os.getloadavg()[0]}  # fmt: skip
    data = json.dumps({"facts": facts, "rows": rows}, indent=1, sort_keys=True) + "\n"
    write_atomic(args.out / "cases.json", data.encode())
    write_atomic(args.out / "README.md", report(rows, facts).encode())
    _note(f"wrote {args.out}/README.md")
    return 0


def _note(text: str) -> None:
    print(f"gpu_check: {text}", file=sys.stderr)


def _profile(
    args: argparse.Namespace, file: Path, graphs: dict[str, ModelGraph], cluster: ClusterSpec, platform: str
) -> Profile:
    _note(f"profiling kernels and layers of {', '.join(graphs)}")
    request = Request(
        what="all", platform=platform, cluster=cluster, graphs={f"{file}:{name}": g for name, g in graphs.items()},
        ranks=1, threads=1, budget_s=args.budget, today=datetime.date.today().isoformat(), tool_version=tool_version(),
    )  # fmt: skip
    return run_profile(request).profile


def cases_of(name: str, graph: ModelGraph, cluster: ClusterSpec, profile: Profile) -> list[Case]:
    """Micro-batch x recompute x offload on one GPU, as far as memory allows by the model's own prediction."""
    engine = fit_engine(get_engine("planner"), profile, cluster, 1)
    machine = machine_for(graph, fit_cluster(cluster, profile, 1), engine, 1)
    job = Job(graph=graph, machine=machine, global_batch_size=8, memory_margin_frac=0.08,
              profile_sha256=profile_sha256(profile))  # fmt: skip
    found = []
    for size, recompute, activations, optimizer in itertools.product(
        (1, 2, 4, 8), ("none", "selective", "full"), (False, True), (False, True)
    ):
        if activations and (recompute == "selective" or optimizer):
            continue  # the runtime does not combine the first; the second says nothing new
        given = Given(micro_batch_size=size, recompute=recompute, offload_activations=activations,
                      offload_optimizer=optimizer)  # fmt: skip
        plan = build_plan(job, given_spec(given, graph, 1, 8), tool_version(), ())
        if plan.predicted.peak_memory_bytes <= plan.predicted.memory_limit_bytes:
            words = [f"mbs{size}", recompute, "offload activations" * activations, "offload optimizer" * optimizer]
            found.append(Case(model=name, options=" ".join(filter(None, words)), plan=plan))
    return found


def _launch(case: Case, file: Path, platform: str) -> dict[str, Any]:
    """Run one case in a process of its own: step times, peak bytes, or why not."""
    with tempfile.TemporaryDirectory(prefix="planner-gpu-check-") as name:
        folder = Path(name)
        path, out = folder / "plan.json", folder / "out.jsonl"
        path.write_bytes(encode_plan(case.plan))
        found: dict[str, Any] = {}
        passes = (False, True) if platform == "cpu" else (False,)  # on a GPU the allocator counts beside the clock
        for memory in passes:
            sub = Path(tempfile.mkdtemp(dir=folder))
            spec = {"plans": [str(path)], "folder": str(sub), "model": f"{file}:{case.model}", "memory": memory,
                    "steps": 5}  # fmt: skip
            (sub / "spec.json").write_text(json.dumps(spec))
            out.unlink(missing_ok=True)
            command = ["planner.reports.loop_rank", str(sub / "spec.json"), str(out)]
            limit_s = time.monotonic() + _LIMIT_S
            with ranks_of(command, 1, 1, platform, sub) as (child,):
                while child.poll() is None and time.monotonic() < limit_s:
                    time.sleep(0.1)
                if child.poll() != 0:
                    return {"failed": death([child.poll() or 1], sub, "")}
            found |= json.loads(out.read_text())
        return found


def _row(case: Case, found: dict[str, Any]) -> dict[str, Any]:
    times = sorted(found.get("step_s", []))
    return {
        "model": case.model, "options": case.options, "predicted_s": case.plan.predicted.step_s,
        "predicted_bytes": case.plan.predicted.peak_memory_bytes, "step_s": times[len(times) // 2] if times else None,
        "peak_bytes": max(found["peak_bytes"]) if found.get("peak_bytes") else None,
        "failed": found.get("failed", ""),
    }  # fmt: skip


def report(rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The scores, and every case with both errors."""
    ran = [row for row in rows if row["step_s"]]
    times = sorted(abs(row["predicted_s"] / row["step_s"] - 1) for row in ran)
    peaks = sorted(abs(row["predicted_bytes"] / row["peak_bytes"] - 1) for row in ran if row["peak_bytes"])
    middle = [f"{v[len(v) // 2]:.1%}" if v else "none" for v in (times, peaks)]
    software = ", ".join(f"{name} {version}" for name, version in sorted(facts["software"].items()))
    lines = [
        f"# Single-device plans on {facts['device']}",
        "",
        f"Written by `python -m planner.reports.gpu_check` on {facts['date']}: {software}; load average "
        f"{facts['load']:.1f}; profile {facts['profile_sha256'][:12]} (profile.json). Predictions were made before the "
        "runs; no constant was fitted to them.",
        "",
        f"Median error of step time {middle[0]} (wanted 5 %), of peak memory {middle[1]} (wanted 3 %), {len(ran)} of "
        f"{len(rows)} cases ran.",
        "",
        "| model | plan | predicted s | measured s | error | predicted GB | measured GB | error |",
        "|:--|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if row["failed"] or not row["step_s"]:
            lines.append(f"| {row['model']} | {row['options']} | {row['predicted_s']:.4g} | {row['failed']} | | | | |")
            continue
        peak = row["peak_bytes"]
        memory = f"{peak / 1e9:.3f} | {row['predicted_bytes'] / peak - 1:+.1%}" if peak else " | "
        lines.append(
            f"| {row['model']} | {row['options']} | {row['predicted_s']:.4g} | {row['step_s']:.4g} | "
            f"{row['predicted_s'] / row['step_s'] - 1:+.1%} | {row['predicted_bytes'] / 1e9:.3f} | {memory} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
