"""`python -m planner.reports.kernel_bench`: every kernel on this GPU against float64, its peers and its roofline.

One run gives correctness on the device, the time of ours, torch eager, torch.compile and installed peers, the percent
of the copy bandwidth or cuBLAS rate measured in the same run, what a ring step adds to attention, the memory of the
chunked loss, and the targets, met or missed. Writes kernel_bench.json and kernel_bench.md into `--out`, with
provenance, after every kernel: a run that is cut short leaves what it has. After `--peers-until` seconds (meant for a
run of at most ten minutes) only ours is measured. kernels.py counts bytes and kernels without a GPU.
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
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from planner.kernels import dispatch
from planner.kernels.counters import WorkCounter
from planner.kernels.op import Work
from planner.reports import kernel_targets
from planner.reports.kernel_cases import CASES, Case
from planner.reports.kernel_extras import LINEAR_SIZES, memory_row, one_rank, ring_row

_REPEATS = 20
_ASLEEP_CYCLES = 10_000_000  # some milliseconds, in which the host gets ahead: a call may cost it more than the device
Inputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Where kernels are measured; `small`: tiny shapes, few repeats and no torch.compile, for a test on a CPU."""

    device: str
    small: bool
    flush: torch.Tensor  # as large as caches
    peers_until_s: float  # on time.monotonic's clock

    def seconds(self, call: Callable[[], object]) -> float:
        """Median device time of `call` over repeats, with the caches flushed before each."""
        for _ in range(1 if self.small else 3):
            call()
        return statistics.median(self._once(call) for _ in range(3 if self.small else _REPEATS))

    def _once(self, call: Callable[[], object]) -> float:
        self.flush.zero_()
        if self.device != "cuda":
            begin_s = time.perf_counter()
            call()
            return time.perf_counter() - begin_s
        torch.cuda._sleep(_ASLEEP_CYCLES)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3


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


def roofs(bench: Bench) -> dict[str, float]:
    """Rates of this run: "copy" bytes/s of a 1 GiB copy, read plus written; "gemm" FLOP/s of a bf16 8192^3 product."""
    elements, side = (2**16, 64) if bench.small else (2**29, 8192)
    source = torch.randn(elements, device=bench.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    a, b = torch.randn(2, side, side, device=bench.device, dtype=torch.bfloat16).unbind(0)
    copy_s = bench.seconds(lambda: target.copy_(source))
    return {"copy": 2 * source.nbytes / copy_s, "gemm": 2 * side**3 / bench.seconds(lambda: a @ b)}


def passes(case: Case) -> list[str]:
    """What is timed of a case."""
    if case.whole:
        return ["forward+backward"]
    return ["forward", "backward"] if case.backward else ["forward"]


def time_pass(bench: Bench, case: Case, call: Callable[..., Any], inputs: Inputs, part: str) -> float:
    """Median seconds of one pass of `call`."""
    leaves = _leaves(case, inputs, part != "forward")
    wanting = _wanting(leaves)
    if part == "forward":
        with torch.no_grad():
            return bench.seconds(lambda: call(*leaves))
    if part == "forward+backward":
        return bench.seconds(lambda: torch.autograd.grad(call(*leaves), wanting))
    outs = _as_tuple(call(*leaves))
    grads = [torch.randn_like(o) for o in outs]
    return bench.seconds(lambda: torch.autograd.grad(outs, wanting, grads, retain_graph=True))


def contenders(case: Case, small: bool) -> dict[str, Callable[..., Any]]:
    """Ours first, then eager torch, compiled torch for each shape by itself, and the installed libraries."""
    found = {"ours": case.ours}
    if case.plain_is_peer:
        found |= {"eager": case.plain}
        found |= {} if small else {"compile": torch.compile(case.plain, dynamic=False)}
    return found | {n: c for n, (pkg, c) in case.peers.items() if importlib.util.find_spec(pkg) is not None}


def bound_s(case: Case, inputs: Inputs, part: str, rates: dict[str, float]) -> float:
    """Least time of our own counted work at the measured rates."""
    work = counted(case, case.ours, inputs, part != "forward")
    flops, moved = work.flops, work.moved_bytes
    if part == "backward":
        forward = counted(case, case.ours, inputs, False)
        flops, moved = flops - forward.flops, moved - forward.moved_bytes
    return flops / rates["gemm"] if case.roof == "gemm" else moved / rates["copy"]


def measure(bench: Bench, case: Case, rates: dict[str, float]) -> dict[str, Any]:
    """Errors and times of one case; a peer that fails is recorded with its error, ours may not fail."""
    row: dict[str, Any] = {"name": case.name, "roof": case.roof, "tolerance": case.tolerance}
    row |= {"passes": {}, "errors": {}}
    inputs = case.inputs(bench.device, bench.small)
    for label, call in contenders(case, bench.small).items():
        if label != "ours" and time.monotonic() > bench.peers_until_s:
            row["errors"][label] = "left out: the time for peers was over"
            continue
        try:
            row["errors"][label] = worst_error(case, call, bench.device)
            for part in passes(case):
                row["passes"].setdefault(part, {})[label] = time_pass(bench, case, call, inputs, part)
        except Exception as error:
            if label == "ours":
                raise
            row["errors"][label] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    for part, times in row["passes"].items():
        row["passes"][part] = {"seconds": times, "roof_frac": bound_s(case, inputs, part, rates) / times["ours"]}
    if bench.device == "cuda":
        torch.cuda.empty_cache()
    return row


def provenance(bench: Bench, rates: dict[str, float]) -> dict[str, Any]:
    """Where and when the numbers are from."""
    packages = {p: importlib.util.find_spec(p) is not None for p in ("triton", "liger_kernel", "fla", "flashrnn")}
    cuda = bench.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else "CPU", "torch": torch.__version__,
        "cuda": torch.version.cuda, "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "packages": packages,
        "dispatch": dispatch.table(bench.device), "copy_bytes_per_s": rates["copy"],
        "gemm_flops_per_s": rates["gemm"], "repeats": _REPEATS,
    }  # fmt: skip


def run(bench: Bench, cases: Sequence[Case], save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The whole report, handed to `save` whenever there is more of it."""
    rates = roofs(bench)
    report: dict[str, Any] = {"provenance": provenance(bench, rates), "kernels": [], "ring": [], "memory": None}
    with one_rank():
        for case in cases:
            report["kernels"].append(measure(bench, case, rates))
            save(report)
    if any(case.name == "ring_step" for case in cases):
        heads, dim, factor = (2, 16, 64) if bench.small else (32, 128, 1)
        for length in (8192, 2048):
            row = ring_row(bench.device, length // factor, heads, dim, bench.seconds)
            report["ring"].append({**row, "length": length})
    if any(case.name == "linear_cross_entropy" for case in cases):
        report["memory"] = memory_row(bench.device, *((64, 32, 1000, 16) if bench.small else LINEAR_SIZES))
    save(report)
    return report


def table(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    p = report["provenance"]
    lines = [
        f"Kernels on {p['device']}, torch {p['torch']}, {p['date']}: copy {p['copy_bytes_per_s'] / 1e12:.2f} TB/s,"
        f" GEMM {p['gemm_flops_per_s'] / 1e12:.0f} TFLOP/s in the same run.", "",
        "| kernel | pass | us | of roof | peers, us | error (allowed) |", "|---" * 6 + "|",
    ]  # fmt: skip
    for row in report["kernels"]:
        for part, found in row["passes"].items():
            times = dict(found["seconds"])
            ours = times.pop("ours")
            peers = ", ".join(f"{n} {t * 1e6:.0f}" for n, t in times.items())
            lines.append(
                f"| {row['name']} | {part} | {ours * 1e6:.0f} | {found['roof_frac']:.0%} | {peers} |"
                f" {row['errors']['ours']:.1e} ({row['tolerance']:.0e}) |"
            )
    for row in report["kernels"]:
        failed = [f"{label} {error}" for label, error in row["errors"].items() if isinstance(error, str)]
        lines += [f"\n{row['name']}, not measured: {'; '.join(failed)}"] if failed else []
    lines += ["", *_extras(report), "", kernel_targets.table(report)]
    return "\n".join(lines)


def _extras(report: dict[str, Any]) -> list[str]:
    """Lines about a ring step and about the chunked loss's memory."""
    lines = []
    for r in report["ring"]:
        us = {name: f"{r[name] * 1e6:.0f}" for name in ("step_s", "bare_s", "merge_s", "torch_merge_s")}
        lines.append(
            f"- ring step of {r['length']} over {r['length']} keys: {us['step_s']} us, torch's attention alone "
            f"{us['bare_s']} us ({r['overhead_frac']:+.0%}); a merge {us['merge_s']} us, "
            f"torch's {us['torch_merge_s']} us"
        )
    if (m := report["memory"]) is not None:
        lines.append(
            f"- linear_cross_entropy holds {m['extra_bytes'] / 2**20:.0f} MiB beside inputs and gradients, "
            f"{m['extra_chunks']:.1f} chunks of logits; the float32 sum of the weight's gradient is "
            f"{m['weight_sum_chunks']:.1f} of them"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="kernel_bench", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of kernel_bench.json and kernel_bench.md")
    parser.add_argument("--only", action="append", choices=[c.name for c in CASES], help="measure this kernel")
    parser.add_argument("--peers-until", type=float, default=420.0, metavar="S",
                        help="after so many seconds only ours is measured (default: %(default)s)")  # fmt: skip
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
    until_s = time.monotonic() + options.peers_until
    bench = Bench(device="cuda", small=False, flush=flush, peers_until_s=until_s)

    def save(report: dict[str, Any]) -> None:
        whole = {**report, "targets": kernel_targets.judged(report)}
        (options.out / "kernel_bench.json").write_text(json.dumps(whole, indent=1) + "\n")
        (options.out / "kernel_bench.md").write_text(table(report))

    report = run(bench, [case for case in CASES if options.only is None or case.name in options.only], save)
    print(table(report), end="")
    wrong = [row["name"] for row in report["kernels"] if not row["errors"]["ours"] <= row["tolerance"]]
    if wrong:
        print(f"kernel_bench: wrong on this device: {', '.join(wrong)}", file=sys.stderr)
    return 5 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
