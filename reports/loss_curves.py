"""The loss of 100 steps under five different plans and in one process: the same curve, as a plot and a table.

    python -m planner.reports.loss_curves

Every run is `python -m planner.runtime train` on gloo ranks with the same seed, data, schedule of learning rates and
clipping. Writes reports/loss_curves.json, .md and plots/loss_curves.png. Exit code 5 when a curve leaves the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from planner.build import Job, build_plan
from planner.costmodel.engine import get_engine
from planner.costmodel.estimate import machine_for
from planner.costmodel.graph import ModelGraph
from planner.costmodel.pipeline import ScheduleKind
from planner.costmodel.presets import load_cluster
from planner.costmodel.strategy import LayerStrategy, PlanSpec
from planner.errors import UserError, one_line
from planner.files import write_atomic
from planner.plan import encode_plan
from planner.profiler.trace import trace_model
from planner.provenance import tool_version
from planner.reports.curve_model import GLOBAL_BATCH_SIZE, LAYERS
from planner.runtime.support import reasons

_HERE = Path(__file__).resolve().parent
_MODEL = _HERE / "curve_model.py"
# Float32 rounds to 6e-8; sums in another order differ by some of those, and each step builds on the one before.
LIMIT = 1e-5
_TIMEOUT_S = 1800.0


def _spec(recompute: str = "none", **options: object) -> PlanSpec:
    parts = int(options.get("pp", 1)) * int(options.get("vpp", 1))  # type: ignore[call-overload]
    return PlanSpec(
        global_batch_size=GLOBAL_BATCH_SIZE, layers=(LayerStrategy(recompute=recompute),) * LAYERS,
        stage_layers=tuple((i * LAYERS // parts, (i + 1) * LAYERS // parts) for i in range(parts)),
        **options,  # type: ignore[arg-type]
    )  # fmt: skip


ALONE = "one process"
PLANS: dict[str, PlanSpec] = {
    ALONE: _spec(),
    "TP 2 + SP, PP 2 (1F1B)": _spec(tp=2, pp=2, sequence_parallel=True, vocab_parallel=True),
    "ZeRO-3 over 4, full recompute": _spec("full", dp_shard=4, zero_stage=3),
    "TP 2, PP 2 (zero-bubble V)": _spec(tp=2, pp=2, vpp=2, schedule=ScheduleKind.ZB_V),
    "TP 2, ring 2, ZeRO-1, optimizer on the host": _spec(tp=2, ring=2, zero_stage=1, offload_optimizer=True),
    "2 replicas x ZeRO-2 over 2, micro-batches of 2": _spec(
        dp_replicate=2, dp_shard=2, zero_stage=2, micro_batch_size=2
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run every plan, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("-o", "--output", type=Path, default=_HERE, metavar="FOLDER")
    args = parser.parse_args(argv)
    graph = trace_model(str(_MODEL))
    with tempfile.TemporaryDirectory(prefix="planner-curves-") as folder:
        curves = {name: _train(name, spec, graph, args.steps, Path(folder)) for name, spec in PLANS.items()}
    away = {name: _distance(curve, curves[ALONE]) for name, curve in curves.items() if name != ALONE}
    (args.output / "plots").mkdir(parents=True, exist_ok=True)
    data = {"limit": LIMIT, "largest_relative_difference": away, "loss": curves}
    write_atomic(args.output / "loss_curves.json", (json.dumps(data, indent=1) + "\n").encode())
    write_atomic(args.output / "loss_curves.md", _markdown(curves, away).encode())
    _plot(curves, args.output / "plots" / "loss_curves.png")
    print(f"wrote {args.output / 'loss_curves.md'}; largest difference {max(away.values()):.1e}, limit {LIMIT:.0e}")
    return 0 if max(away.values()) <= LIMIT else 5


def _train(name: str, spec: PlanSpec, graph: ModelGraph, steps: int, root: Path) -> list[float]:
    """Loss by step. UserError in one line when the run fails."""
    print(f"{steps} steps: {name}", file=sys.stderr)
    folder = root / str(len(list(root.iterdir())))
    folder.mkdir()
    machine = machine_for(graph, load_cluster("cpu-gloo"), get_engine("planner"), spec.num_gpus)
    job = Job(graph=graph, machine=machine, global_batch_size=GLOBAL_BATCH_SIZE, memory_margin_frac=0.0)
    (folder / "plan.json").write_bytes(encode_plan(build_plan(job, spec, tool_version(), reasons(spec))))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(spec.num_gpus), "--master-port",
        str(port), "-m", "planner.runtime", "train", str(_MODEL), "--plan", str(folder / "plan.json"), "--out",
        str(folder), "--steps", str(steps), "--lr", "2e-3", "--warmup", "10", "--print-every", str(steps),
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_TIMEOUT_S)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("planner.runtime: ")]
        raise UserError(f"{name}: the run failed: {one_line((said or [done.stderr[-400:]])[0])}")
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _distance(curve: list[float], reference: list[float]) -> float:
    """Largest relative difference of a step's loss."""
    return max(abs(a - b) / abs(b) for a, b in zip(curve, reference, strict=True))


def _markdown(curves: dict[str, list[float]], away: dict[str, float]) -> str:
    steps = len(curves[ALONE])
    shown = sorted({1, max(steps // 4, 1), max(steps // 2, 1), steps})
    head = ["plan", *(f"loss at {step}" for step in shown), "largest relative difference"]
    rows = [
        [name, *(f"{curve[step - 1]:.6f}" for step in shown), f"{away[name]:.1e}" if name in away else "-"]
        for name, curve in curves.items()
    ]
    table = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(
        [
            "# One loss curve under every plan",
            "",
            f"{steps} steps of a small Llama (reports/curve_model.py) in float32 on gloo, written by",
            f"`python -m planner.reports.loss_curves`; a difference above {LIMIT:.0e} ends it with exit code 5.",
            "The difference is to the run in one process, over all steps.",
            "",
            *table,
            "",
            "![loss by step](plots/loss_curves.png)",
            "",
        ]
    )


def _plot(curves: dict[str, list[float]], path: Path) -> None:
    figure, (above, below) = plt.subplots(2, 1, figsize=(7.5, 7), sharex=True, height_ratios=(3, 2))
    steps = range(1, len(curves[ALONE]) + 1)
    for i, (name, curve) in enumerate(curves.items()):
        above.plot(steps, curve, linewidth=5 - 0.7 * i, alpha=0.8, label=name, color=plt.get_cmap("tab10")(i))
        if name != ALONE:
            off = [max(abs(a - b) / abs(b), 1e-9) for a, b in zip(curve, curves[ALONE], strict=True)]
            below.semilogy(steps, off, linewidth=0.9, color=plt.get_cmap("tab10")(i))
    below.axhline(LIMIT, linestyle=":", color="0.4")
    above.set(ylabel="loss per token", title="each line is thinner than the one below it")
    below.set(xlabel="step", ylabel="relative difference to one process")
    above.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as problem:
        sys.exit(f"planner.reports.loss_curves: {problem}")
