"""How long the main job takes: `planner search` as a user runs it, start-up and tracing included.

    python -m planner.reports.bench.search_bench [--repeats 3]

runs every case that many times, one after the other, and rewrites search_bench.md and search_bench.json beside
this file: median wall and CPU seconds of the whole command, seconds of the search alone, peak memory of the largest
process, and the proved gap.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from planner.costmodel.units import GIB
from planner.files import write_atomic

HERE = Path(__file__).resolve().parent
EXAMPLES = Path("examples")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One search: what is planned, and how long the whole command and the search may take."""

    name: str
    model: str
    arguments: tuple[str, ...]
    target_s: float | None
    target_search_s: float | None = 2.0


CASES = (
    Case(name="GPT-3 175B on 1,024 A100-80GB", model="gpt3_175b.py", target_s=10,
         arguments=("--gpus", "1024", "--cluster", "a100-80gb")),
    Case(name="GPT 1T on 3,072 A100-80GB", model="gpt_1t.py", target_s=15,
         arguments=("--gpus", "3072", "--cluster", "a100-80gb")),
    Case(name="Llama-3 405B on 16,384 H100", model="llama3.py:build_405b", target_s=15,
         arguments=("--gpus", "16384", "--cluster", "h100", "--global-batch", "2048")),
    Case(name="GPT 1T on 100,000 A100-80GB", model="gpt_1t.py", target_s=60, target_search_s=None,
         arguments=("--gpus", "100000", "--cluster", "a100-80gb", "--global-batch", "100000")),
    Case(name="DeepSeek-V3 shape on 2,048 H100", model="deepseek_v3.py", target_s=None, target_search_s=None,
         arguments=("--gpus", "2048", "--cluster", "h100", "--global-batch", "4096")),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One execution of a case."""

    wall_s: float
    cpu_s: float
    search_s: float
    peak_rss_bytes: int
    gap_frac: float
    step_s: float
    num_candidates: int
    stop_reason: str


def run_case(case: Case) -> Run:
    """Run one case in a process of its own; RuntimeError with its output if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        planner = Path(sys.executable).with_name("planner")  # the console script of this environment
        command = [str(planner), "search", str(EXAMPLES / case.model), *case.arguments]
        command += ["--format", "json", "--quiet", "-o", str(Path(folder) / "plan.json")]
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert child.stdout is not None and child.stderr is not None
        answer, errors = child.stdout.read(), child.stderr.read()
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
    if status:
        raise RuntimeError(f"{case.name}: exit status {os.waitstatus_to_exitcode(status)}: {errors.decode()}")
    found = json.loads(answer)
    return Run(
        wall_s=wall, cpu_s=usage.ru_utime + usage.ru_stime, search_s=found["search_s"],
        peak_rss_bytes=usage.ru_maxrss * 1024, gap_frac=found["gap_frac"], step_s=found["step_s"],
        num_candidates=found["num_candidates"], stop_reason=found["stop_reason"],
    )  # fmt: skip


def markdown(results: dict[str, list[Run]], machine: str) -> str:
    """The table of all cases."""
    repeats = len(results[CASES[0].name])
    lines = [
        "# The main job, timed",
        "",
        "`python -m planner.reports.bench.search_bench` regenerates this page. Whole command: start of Python, tracing",
        "the model in a child process, search, independent check, writing the plan. Medians; CPU counts the command",
        "and its children. Targets: those of the project for 2 cores.",
        "",
        f"Machine: {machine}; {repeats} runs a case.",
        "",
        "| case | wall s | target s | CPU s | search s | target s | peak GiB | candidates | gap | step s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for case in CASES:
        runs = results[case.name]
        wall, cpu, search = (statistics.median(getattr(r, n) for r in runs) for n in ("wall_s", "cpu_s", "search_s"))
        peak = max(r.peak_rss_bytes for r in runs) / GIB
        first = runs[0]
        targets = [f"{t:g}" if t else "–" for t in (case.target_s, case.target_search_s)]
        lines.append(
            f"| {case.name} | {wall:.1f} | {targets[0]} | {cpu:.1f} | {search:.2f} | {targets[1]} | {peak:.2f} | "
            f"{first.num_candidates:,} | {first.gap_frac:.2%} | {first.step_s:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run all cases and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    results: dict[str, list[Run]] = {case.name: [] for case in CASES}
    for _ in range(args.repeats):
        for case in CASES:
            results[case.name].append(run_case(case))
            print(f"{case.name}: {results[case.name][-1]}", flush=True)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    data = {"machine": machine, "cases": {name: [asdict(r) for r in runs] for name, runs in results.items()}}
    write_atomic(HERE / "search_bench.json", json.dumps(data, indent=1, sort_keys=True).encode() + b"\n")
    write_atomic(HERE / "search_bench.md", markdown(results, machine).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
