"""`python -m planner.reports.calibrate [DATA]`: every fitted constant of devices/*.json and links.json, from data.

DATA is the folder of published measurements (default ../shared/data beside the project). Rewrites the "fitted" part
of each device, links.json and reports/calibration.md. No row of runs.csv is read: those judge what is made here.
Exit codes: 0 written, 2 no such folder or table.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from planner.costmodel.evidence import Source
from planner.costmodel.hardware import COLLECTIVES, DTYPES, AttentionFit, CollectiveFit, DeviceSpec, MemoryFit, to_dict
from planner.costmodel.presets import DEVICES_DIR, LINKS_FILE, list_devices, load_device
from planner.reports import (
    calibrate_attention,
    calibrate_cpu,
    calibrate_gemm,
    calibrate_links,
    calibration_text,
    device_recipes,
    layer_check,
    link_recipes,
    link_rows,
)

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_DATA = ROOT.parent / "shared" / "data"
REPORT = ROOT / "reports" / "calibration.md"
TABLES = (
    "gemm.csv",
    "comm.csv",
    "attention_microbench.csv",
    "calibration_points.csv",
    "layer_times.csv",
    "devices.csv",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Everything that was made: constants to write and the errors to report."""

    devices: Mapping[str, DeviceSpec]
    links: Mapping[str, calibrate_links.Link]
    gemm: tuple[calibrate_gemm.GemmReport, ...]
    attention: tuple[calibrate_attention.AttentionReport, ...]
    link_errors: tuple[calibrate_links.LinkReport, ...]
    judged_only: tuple[calibrate_links.LinkReport, ...]
    layers: tuple[layer_check.LayerCheck, ...]


def _borrowed(constants: Any, borrow: device_recipes.Borrow) -> Any:
    note = f"as {borrow.from_device}: {borrow.why}"
    return dataclasses.replace(constants, **borrow.changes, evidence=borrow.evidence, note=note)


def calibrate_gemms(devices: dict[str, DeviceSpec], data: Path) -> tuple[calibrate_gemm.GemmReport, ...]:
    """Fit where there are rows, then lend; `devices` is updated in place."""
    table = calibrate_gemm.read(data / "gemm.csv")
    reports = []
    for name in sorted(set(table.device)):
        fits = {}
        for dtype in DTYPES:
            report = calibrate_gemm.calibrate(table, devices[name], dtype)
            if report and report.constants:
                fits[dtype] = report.constants
                devices[name] = dataclasses.replace(devices[name], gemm=fits)
            reports += [report] if report else []
    for name, borrow in device_recipes.GEMM.items():
        lender = devices[borrow.from_device].gemm
        own = devices[name].peak_flops_per_s
        fits = {dtype: _borrowed(fit, borrow) for dtype, fit in lender.items() if dtype in own}
        if not fits:  # no bfloat16: the first dtype that it has
            fits = {next(iter(own)): _borrowed(next(iter(lender.values())), borrow)}
        devices[name] = dataclasses.replace(devices[name], gemm=fits)
    return tuple(reports)


def calibrate_attentions(devices: dict[str, DeviceSpec], data: Path) -> tuple[calibrate_attention.AttentionReport, ...]:
    """H100 and A100 from measurements, the others borrow; `devices` is updated in place."""
    path = data / "attention_microbench.csv"
    curves, reports = calibrate_attention.calibrate_h100(devices["h100-80gb"], path)
    a100, report = calibrate_attention.calibrate_a100(devices["a100-80gb"], path, curves["flash"])
    made: dict[str, Mapping[str, AttentionFit]] = {"h100-80gb": curves, "a100-80gb": {"flash": a100}}
    for name, borrows in device_recipes.ATTENTION.items():
        made[name] = {
            kernel: _borrowed(curve, borrow)
            for borrow in borrows
            for kernel, curve in made[borrow.from_device].items()
            if not borrow.kernels or kernel in borrow.kernels
        }
    for name, fits in made.items():
        devices[name] = dataclasses.replace(devices[name], attention=fits)
    return (*reports, report)


def calibrate_memory(devices: dict[str, DeviceSpec], data: Path) -> None:
    """STREAM triad over the datasheet rate; a kernel's own latency is the fixed time of a small GEMM."""
    table = pd.read_csv(data / "devices.csv").set_index("gpu")
    fits: dict[str, MemoryFit] = {}
    for gpu, name in calibrate_gemm.GPUS.items():
        found = re.search(r"STREAM triad ([\d.]+) TB/s", str(table.notes.get(gpu, "")))
        if found:
            rate = float(found.group(1)) * 1e12
            fits[name] = MemoryFit(
                hbm_frac=float(f"{rate / devices[name].hbm_bytes_per_s.value:.4g}"),
                latency_s=_latency_s(devices[name]),
                evidence=Source.MEASURED,
                note=f"STREAM triad {found.group(1)} TB/s, "
                "https://github.com/Azure/AI-benchmarking-guide read 2026-11-24; latency as a small GEMM's",
            )
    for name, borrow in device_recipes.STREAM.items():
        lent = _borrowed(fits[borrow.from_device], borrow)
        fits[name] = dataclasses.replace(lent, latency_s=_latency_s(devices[name]))
    for name, fit in fits.items():
        devices[name] = dataclasses.replace(devices[name], memory=fit)


def _latency_s(device: DeviceSpec) -> float:
    return next(iter(device.gemm.values())).overhead_s


def calibrate_collectives(
    data: Path,
) -> tuple[dict[str, calibrate_links.Link], list[calibrate_links.LinkReport], list[calibrate_links.LinkReport]]:
    """Links inside a node, then between nodes, then what is borrowed; rows of borrowed constants only judge."""
    table = pd.concat([link_rows.read(data), calibrate_cpu.link_rows()], ignore_index=True)
    links: dict[str, calibrate_links.Link] = {}
    reports = []

    def add(recipe: calibrate_links.Recipe) -> None:
        constants, nvls, report = calibrate_links.calibrate(table, recipe, links)
        _set(links, recipe.link, recipe.collective, constants, nvls, recipe.topology)
        reports.append(report)

    for recipe in link_recipes.recipes():
        add(recipe)
    add(link_recipes.nvl72_recipe(links["nvlink5"]))
    for borrow in link_recipes.BORROWED:
        lender = links[borrow.from_link].collectives[borrow.from_collective]
        note = f"as {borrow.from_collective} of {borrow.from_link}: {borrow.why}"
        constants = dataclasses.replace(lender, **borrow.changes, evidence=borrow.evidence, note=note)
        topology = link_recipes.TOPOLOGIES.get(borrow.link, "switch")
        _set(links, borrow.link, borrow.collective, constants, 0.0, topology)
    return links, reports, calibrate_links.judge_borrowed(table, reports, links)


def _set(
    links: dict[str, calibrate_links.Link],
    link: str,
    collective: str,
    constants: CollectiveFit,
    nvls: float,
    topology: str,
) -> None:
    known = links.get(link)
    start = known.collectives if known else dict.fromkeys(COLLECTIVES, constants)  # until fitted or borrowed
    collectives = {**start, collective: constants}
    nvls = max(nvls, known.nvls_efficiency if known else 0.0)
    links[link] = calibrate_links.Link(collectives=collectives, nvls_efficiency=nvls, topology=topology)


def calibrate(data: Path) -> Calibration:
    """All constants from the tables in `data`; reads the presets' datasheet part, writes nothing."""
    devices = {name: load_device(name) for name in list_devices()}
    gemm = calibrate_gemms(devices, data)
    attention = calibrate_attentions(devices, data)
    calibrate_memory(devices, data)
    devices["cpu"] = calibrate_cpu.calibrate(devices["cpu"])
    links, link_errors, judged = calibrate_collectives(data)
    node = calibrate_links.node(devices["a100-80gb"], links["nvlink3"], 300.0)
    return Calibration(
        devices=devices,
        links=links,
        gemm=gemm,
        attention=attention,
        link_errors=tuple(link_errors),
        judged_only=tuple(judged),
        layers=tuple(layer_check.check(data / "layer_times.csv", node)),
    )


def write(made: Calibration) -> None:
    """Rewrite the fitted parts and the report."""
    for path in DEVICES_DIR.glob("*.json"):
        if path != LINKS_FILE:
            text = json.loads(path.read_text())
            record = to_dict(made.devices[text["datasheet"]["name"]])
            text["fitted"] = {key: record[key] for key in ("gemm", "attention", "memory")}
            path.write_text(json.dumps(text, indent=1) + "\n")
    links = json.loads(LINKS_FILE.read_text())
    for name, link in made.links.items():
        constants = {key: to_dict(link.collectives[key]) for key in COLLECTIVES}
        links[name] = {"nvls_efficiency": link.nvls_efficiency, "topology": link.topology, "collectives": constants}
    LINKS_FILE.write_text(json.dumps(links, indent=1) + "\n")
    text = calibration_text.render(
        made.gemm, made.attention, made.link_errors, made.judged_only, made.layers, made.devices, made.links
    )
    REPORT.write_text(text)


def main(arguments: list[str]) -> int:
    """Command line; see the module's docstring."""
    data = Path(arguments[0]) if arguments else DEFAULT_DATA
    missing = [name for name in TABLES if not (data / name).is_file()]
    if missing or len(arguments) > 1:
        print(
            f"error: {data} has no {', '.join(missing)}; usage: python -m planner.reports.calibrate [DATA]"
            if missing
            else "error: usage: python -m planner.reports.calibrate [DATA]",
            file=sys.stderr,
        )
        return 2
    write(calibrate(data))
    print(f"wrote the fitted part of {DEVICES_DIR}/*.json, {LINKS_FILE.name} and {REPORT.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
