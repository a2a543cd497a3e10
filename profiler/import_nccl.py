"""nccl-tests (and rccl-tests) output as samples: the JSON of `-J FILE`, and the table that every version prints.

Times are in microseconds there and sizes in bytes of the larger buffer, as costmodel.comm counts them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from planner.costmodel.evidence import Source
from planner.costmodel.profile import Conditions, Profile, Sample, make_profile
from planner.costmodel.units import US
from planner.profiler.errors import TraceError

MAX_BYTES = 256 * 2**20
PROGRAMS = {
    "all_reduce_perf": "all_reduce", "all_gather_perf": "all_gather", "reduce_scatter_perf": "reduce_scatter",
    "alltoall_perf": "all_to_all", "sendrecv_perf": "send_recv",
}  # fmt: skip
_DTYPES = {"float": "float32", "half": "float16", "bfloat16": "bfloat16", "fp8_e4m3": "float8", "double": "float32"}
_RANK = re.compile(r"#\s+Rank\s+(\d+).*?\bon\s+(\S+)\s+device\s+\d+\s+\[[^\]]*\]\s+(.*\S)")
_ROW = re.compile(r"\s*(\d+)\s+\d+\s+(\w+)\s+\S+(?:\s+-?\d+)?\s+(\S+)\s+\S+\s+\S+\s+\S+(?:\s+(\S+)\s+\S+\s+\S+\s+\S+)?")


class ImportFileError(TraceError):
    """A foreign measurement file that cannot be used."""


def import_nccl_tests(path: Path, measured_on: str, tool_version: str, collective: str = "") -> Profile:
    """The samples of one file. `collective` where the file does not say which program it is of.

    ImportFileError of one line: unreadable, cut off, NaN times, an unknown program, no rows.
    """
    text = _read(path)
    if text.lstrip().startswith("{"):
        return _from_json(path, text, measured_on, tool_version, collective)
    return _from_text(path, text, measured_on, tool_version, collective)


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ImportFileError(f"{path}: more than {MAX_BYTES // 2**20} MiB: not the output of one run")
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ImportFileError(f"{path}: cannot read: {error.strerror}") from None


def _program(path: Path, texts: Iterable[str], collective: str) -> str:
    if collective:
        return collective
    for text in (*texts, path.name):
        for program, name in PROGRAMS.items():
            if program in text or text == program:
                return name
        other = re.search(r"\b(\w+_perf)\b", text)
        if other:
            known = ", ".join(PROGRAMS)
            raise ImportFileError(f"{path}: {other[1]} is of no collective that plans use; usable: {known}")
    raise ImportFileError(f"{path}: does not say which program it is of: give --collective NAME")


def _from_text(path: Path, text: str, measured_on: str, version: str, collective: str) -> Profile:
    name = _program(path, re.findall(r"\b\w+_perf\b", text)[:1], collective)
    ranks = [match.groups() for match in _RANK.finditer(text)]
    nccl = re.search(r"nccl-library=(\d+)", text)
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        match = None if line.lstrip().startswith("#") else _ROW.fullmatch(line.rstrip())
        if match:
            where = f"{path}:{number}"
            rows.append((where, int(match[1]), match[2], [_number(where, t) for t in match.groups()[2:] if t]))
    devices = [(host, device) for _, host, device in ranks]
    return _profile(path, name, devices, nccl[1] if nccl else "", rows, measured_on, version)


def _from_json(path: Path, text: str, measured_on: str, version: str, collective: str) -> Profile:
    try:
        body = json.loads(text)
        name = _program(path, map(str, body.get("args", ())), collective)
        devices = [(d["hostname"], d["device_info"]) for d in body["config"]["devices"]]
        rows = []
        for index, result in enumerate(body["results"]):
            where = f"{path}: results[{index}]"
            sides = [result.get(side) for side in ("out_of_place", "in_place")]
            times = [_number(where, side["time" if "time" in side else "cpu_time"]) for side in sides if side]
            rows.append((where, int(result["size"]), str(result["type"]), times))
    except ImportFileError:
        raise
    except ValueError as error:
        raise ImportFileError(f"{path}: cut off or not JSON: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ImportFileError(f"{path}: not the JSON of nccl-tests: {type(error).__name__} {error}") from None
    return _profile(path, name, devices, str(body.get("nccl_version", "")), rows, measured_on, version)


def _number(where: str, text: Any) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ImportFileError(f"{where}: time is {text!r}, not a number: that run failed, leave the file out")
    return value


def _profile(
    path: Path, name: str, devices: list[tuple[str, str]], nccl: str,
    rows: list[tuple[str, int, str, list[float]]], measured_on: str, version: str,
) -> Profile:  # fmt: skip
    if not devices:
        raise ImportFileError(f"{path}: names no ranks: its header is cut off")
    if len({device for _, device in devices}) > 1:
        raise ImportFileError(f"{path}: ranks on different devices ({', '.join(sorted({d for _, d in devices}))})")
    hosts = len({host for host, _ in devices})
    conditions = Conditions(
        platform="cuda", device=devices[0][1], devices_per_node=max(len(devices) // hosts, 1), memory_bytes=0,
        backend="nccl", ranks=len(devices), threads=1, software={"nccl": _version(nccl)} if nccl else {},
    )  # fmt: skip
    samples = [
        _sample(name, size, dtype, times, len(devices), measured_on, path.name)
        for _, size, dtype, times in rows
        if size > 0 and times and min(times) > 0
    ]
    if not samples:
        raise ImportFileError(f"{path}: no rows of measurements: cut off, or not the output of nccl-tests")
    return make_profile(version, (conditions,), samples)


def _sample(name: str, size: int, dtype: str, times: list[float], ranks: int, measured_on: str, file: str) -> Sample:
    """Mean of out-of-place and in-place; half of their difference is the spread."""
    middle = sum(times) / len(times)
    return Sample(
        kind="collective", name=name, dtype=_DTYPES.get(dtype, "float32"),
        dims={"num_bytes": float(size), "ranks": 2.0 if name == "send_recv" else float(ranks), "stride": 1.0},
        time_s=middle * US, spread_frac=(max(times) - min(times)) / 2 / middle, repeats=len(times), condition=0,
        source=Source.MEASURED, measured_on=measured_on, note=f"nccl-tests, {file}",
    )  # fmt: skip


def _version(code: str) -> str:
    """22703 -> 2.27.3, as NCCL_VERSION_CODE is made."""
    if not code.isdecimal():
        return code
    number = int(code)
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
