"""`python -m planner.reports.kernel_bench`: every kernel on this GPU against float64, its peers and its roofline.

One run gives correctness on the device, the time of ours, torch eager, torch.compile and installed peers, and the
percent of the copy bandwidth or cuBLAS rate measured in the same run. Writes kernel_bench.json and kernel_bench.md
into `--out`, with provenance. kernels.py counts bytes and kernels without a GPU.
Exit codes: 0 measured and correct, 2 usage or no GPU, 5 a kernel is wrong on the device.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from planner.kernels import dispatch
from planner.kernels.counters import WorkCounter
from planner.kernels.op import Work
from planner.reports.kernel_cases import CASES, Case

_REPEATS = 20
Inputs = tuple[torch.Tensor, ...]


def _as_tuple(out: Any) -> tuple[torch.Tensor, ...]:
    return (out,) if isinstance(out, torch.Tensor) else tuple(out)


def _leaves(case: Case, inputs: Inputs, backward: bool) -> list[torch.Tensor]:
    """The inputs as new leaves; the first `case.differentiable` take gradients."""
    count = len(inputs) if case.differentiable is None else case.differentiable
    return [x.detach().requires_grad_(backward and i < count) for i, x in enumerate(inputs)]


def _wanting(leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x for x in leaves if x.requires_grad]


def run_once(case: Case, call: Callable[..., Any], inputs: Inputs, backward: bool) -> list[torch.Tensor]:
    """Outputs, and with `backward` the gradients for output gradients of one pattern."""
    leaves = _leaves(case, inputs, backward)
    outs = _as_tuple(call(*leaves))
    if not backward:
        return [o.detach() for o in outs]
    grads = [torch.linspace(0.5, 1.5, o.numel(), device=o.device).view(o.shape).to(o.dtype) for o in outs]
    return [*(o.detach() for o in outs), *torch.autograd.grad(outs, _wanting(leaves), grads)]


def worst_error(case: Case, call: Callable[..., Any], device: str) -> float:
    """Largest error of outputs and gradients at the small shape, relative to the largest value in float64."""
    torch.manual_seed(0)
    inputs = case.inputs(device, True)
    found = run_once(case, call, inputs, case.backward)
    wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    exact = run_once(case, case.plain, wide, case.backward)
    pairs = zip(found, exact, strict=True)
    errors = [((f.double() - e).abs().max() / e.abs().max().clamp_min(1e-30)).item() for f, e in pairs]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def counted(case: Case, call: Callable[..., Any], inputs: Inputs, backward: bool) -> Work:
    """Work that `call` dispatches on these inputs."""
    leaves = _leaves(case, inputs, backward)
    with torch.set_grad_enabled(backward):
        with WorkCounter() as forward:
            outs = _as_tuple(call(*leaves))
        grads = [torch.ones_like(o) for o in outs]
        with WorkCounter() as back:
            if backward:
                torch.autograd.grad(outs, _wanting(leaves), grads)
    return forward.total + back.total


def median_s(call: Callable[[], object], flush: torch.Tensor) -> float:
    """Median device time of `call` over repeats, with the L2 cache flushed before each."""
    for _ in range(3):
        call()
    times = []
    for _ in range(_REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def roofs(flush: torch.Tensor) -> dict[str, float]:
    """Rates of this run: "copy" bytes/s of a 1 GiB copy, read plus written; "gemm" FLOP/s of a bf16 8192^3 product."""
    source = torch.randn(2**29, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16).unbind(0)
    copy_s = median_s(lambda: target.copy_(source), flush)
    return {"copy": 2 * source.nbytes / copy_s, "gemm": 2 * 8192**3 / median_s(lambda: a @ b, flush)}


def passes(case: Case) -> list[str]:
    """What is timed of a case."""
    if case.whole:
        return ["forward+backward"]
    return ["forward", "backward"] if case.backward else ["forward"]


def time_pass(case: Case, call: Callable[..., Any], inputs: Inputs, part: str, flush: torch.Tensor) -> float:
    """Median seconds of one pass of `call`."""
    leaves = _leaves(case, inputs, part != "forward")
    wanting = _wanting(leaves)
    if part == "forward":
        with torch.no_grad():
            return median_s(lambda: call(*leaves), flush)
    if part == "forward+backward":
        return median_s(lambda: torch.autograd.grad(call(*leaves), wanting), flush)
    outs = _as_tuple(call(*leaves))
    grads = [torch.randn_like(o) for o in outs]
    return median_s(lambda: torch.autograd.grad(outs, wanting, grads, retain_graph=True), flush)


def contenders(case: Case) -> dict[str, Callable[..., Any]]:
    """Ours first, then eager torch, compiled torch and the installed libraries."""
    found = {"ours": case.ours}
    if case.plain_is_peer:
        found |= {"eager": case.plain, "compile": torch.compile(case.plain)}
    return found | {n: c for n, (pkg, c) in case.peers.items() if importlib.util.find_spec(pkg) is not None}


def bound_s(case: Case, inputs: Inputs, part: str, rates: dict[str, float]) -> float:
    """Least time of our own counted work at the measured rates."""
    work = counted(case, case.ours, inputs, part != "forward")
    if part == "backward":
        forward = counted(case, case.ours, inputs, False)
        flops, moved = work.flops - forward.flops, work.moved_bytes - forward.moved_bytes
    else:
        flops, moved = work.flops, work.moved_bytes
    return flops / rates["gemm"] if case.roof == "gemm" else moved / rates["copy"]


def measure(case: Case, rates: dict[str, float], flush: torch.Tensor) -> dict[str, Any]:
    """Errors and times of one case; a peer that fails is recorded with its error, ours may not fail."""
    row: dict[str, Any] = {"name": case.name, "roof": case.roof, "tolerance": case.tolerance}
    row |= {"passes": {}, "errors": {}}
    inputs = case.inputs("cuda", False)
    for label, call in contenders(case).items():
        try:
            row["errors"][label] = worst_error(case, call, "cuda")
            for part in passes(case):
                row["passes"].setdefault(part, {})[label] = time_pass(case, call, inputs, part, flush)
        except Exception as error:
            if label == "ours":
                raise
            row["errors"][label] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    for part, times in row["passes"].items():
        goal = case.backward_goal_frac if part == "backward" else case.goal_frac
        frac = bound_s(case, inputs, part, rates) / times["ours"]
        row["passes"][part] = {"seconds": times, "roof_frac": frac, "goal_frac": goal}
    torch.cuda.empty_cache()
    return row


def provenance(rates: dict[str, float]) -> dict[str, Any]:
    """Where and when the numbers are from."""
    packages = {p: importlib.util.find_spec(p) is not None for p in ("triton", "liger_kernel", "fla", "flashrnn")}
    return {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "python": platform.python_version(), "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "packages": packages, "dispatch": dispatch.table("cuda"), "copy_bytes_per_s": rates["copy"],
        "gemm_flops_per_s": rates["gemm"], "repeats": _REPEATS,
    }  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    p = report["provenance"]
    lines = [
        f"Kernels on {p['device']}, torch {p['torch']}, {p['date']}: copy {p['copy_bytes_per_s'] / 1e12:.2f} TB/s,"
        f" GEMM {p['gemm_flops_per_s'] / 1e12:.0f} TFLOP/s in the same run.", "",
        "| kernel | pass | us | of roof | goal | met | peers, us | error (allowed) |", "|---" * 8 + "|",
    ]  # fmt: skip
    for row in report["kernels"]:
        for part, found in row["passes"].items():
            times = dict(found["seconds"])
            ours = times.pop("ours")
            peers = ", ".join(f"{n} {t * 1e6:.0f}" for n, t in times.items())
            goal = found["goal_frac"]
            met = "-" if goal is None else "yes" if found["roof_frac"] >= goal else "no"
            asked = "-" if goal is None else f"{goal:.0%}"
            lines.append(
                f"| {row['name']} | {part} | {ours * 1e6:.0f} | {found['roof_frac']:.0%} | {asked} |"
                f" {met} | {peers} | {row['errors']['ours']:.1e} ({row['tolerance']:.0e}) |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="kernel_bench", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of kernel_bench.json and kernel_bench.md")
    parser.add_argument("--only", action="append", choices=[c.name for c in CASES], help="measure this kernel")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        other = "count with `python -m planner.reports.kernels`"
        print(f"kernel_bench: no CUDA device here; run it on a GPU, or {other}", file=sys.stderr)
        return 2
    if not options.out.is_dir():
        print(f"kernel_bench: --out {options.out} is not a folder", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    flush = torch.empty(2**28, device="cuda", dtype=torch.int8)
    rates = roofs(flush)
    rows = [measure(case, rates, flush) for case in CASES if options.only is None or case.name in options.only]
    report = {"provenance": provenance(rates), "kernels": rows}
    (options.out / "kernel_bench.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "kernel_bench.md").write_text(table(report))
    print(table(report), end="")
    wrong = [row["name"] for row in rows if not row["errors"]["ours"] <= row["tolerance"]]
    if wrong:
        print(f"kernel_bench: wrong on this device: {', '.join(wrong)}", file=sys.stderr)
    return 5 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
