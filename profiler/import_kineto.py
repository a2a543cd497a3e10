"""Traces of torch.profiler (Kineto's Chrome JSON, also gzipped) as samples: GEMMs, fused attention, NCCL collectives.

Needs `record_shapes=True`. On a GPU an operator's time is that of the kernels that it launched; on the CPU its own.
A collective's kernel also waits for its peers, so the fastest of equal calls counts.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any

from planner.costmodel.evidence import Source
from planner.costmodel.profile import Conditions, Profile, Sample, make_profile
from planner.costmodel.units import US
from planner.profiler.import_nccl import ImportFileError

MAX_BYTES = 1 << 30
_DTYPES = {"float": "float32", "c10::BFloat16": "bfloat16", "c10::Half": "float16", "BFloat16": "bfloat16",
           "Half": "float16", "Float": "float32"}  # fmt: skip
_WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
_MATMULS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1}  # index of the left operand
_COLLECTIVES = {
    "allreduce": "all_reduce", "_allgather_base": "all_gather", "allgather": "all_gather",
    "_reduce_scatter_base": "reduce_scatter", "reduce_scatter": "reduce_scatter", "all_to_all": "all_to_all",
    "all_to_allv": "all_to_all", "send": "send_recv", "recv": "send_recv",
}  # fmt: skip
Key = tuple[str, str, str, tuple[tuple[str, float], ...]]


def import_trace(path: Path, measured_on: str, tool_version: str) -> Profile:
    """The samples of one trace; ImportFileError of one line when it is too large, cut off or without shapes."""
    body = _load(path)
    events = [e for e in body["traceEvents"] if isinstance(e, dict) and e.get("ph") == "X"]
    kernels = _kernel_times(events)
    times: dict[Key, list[float]] = defaultdict(list)
    for event in events:
        key = _operator(event) or _collective(event)
        if key is None:
            continue
        args = event.get("args", {})
        device_us = kernels.get(args.get("External id")) if kernels and key[0] != "collective" else event.get("dur")
        if device_us:
            times[key].append(float(device_us))
    if not times:
        raise ImportFileError(
            f"{path}: no GEMM, attention or collective with its shapes in it: record with record_shapes=True"
        )
    samples = [_sample(key, found, measured_on, path.name) for key, found in times.items()]
    return make_profile(tool_version, (_conditions(body, bool(kernels)),), samples)


def _load(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ImportFileError(
                f"{path}: {size / 2**30:.1f} GiB of trace, more than {MAX_BYTES / 2**30:g}: record fewer steps "
                "(torch.profiler.schedule(active=1))"
            )
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ImportFileError(f"{path}: more than {MAX_BYTES / 2**30:g} GiB of trace: record fewer steps")
        body = json.loads(data)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise ImportFileError(f"{path}: cut off or not gzip: export the trace again") from None
    except OSError as error:
        raise ImportFileError(f"{path}: cannot read: {error.strerror}") from None
    except ImportFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise ImportFileError(f"{path}: cut off or not JSON: {error}") from None
    if not isinstance(body, dict) or not isinstance(body.get("traceEvents"), list):
        raise ImportFileError(f"{path}: not a trace of torch.profiler: no traceEvents in it")
    return body


def _kernel_times(events: list[dict[str, Any]]) -> dict[Any, float]:
    """Microseconds on the GPU by the operator that launched it; empty for a CPU trace."""
    found: dict[Any, float] = defaultdict(float)
    for event in events:
        if event.get("cat") == "kernel":
            found[event.get("args", {}).get("External id")] += float(event.get("dur", 0.0))
    return dict(found)


def _operator(event: dict[str, Any]) -> Key | None:
    name, args = str(event.get("name", "")), event.get("args", {})
    dims, types = args.get("Input Dims"), args.get("Input type")
    if event.get("cat") != "cpu_op" or not dims or not types:
        return None
    if name in _MATMULS:
        left = _MATMULS[name]
        return _matmul(dims[left], dims[left + 1], _DTYPES.get(types[left], ""))
    if name.startswith("aten::_scaled_dot_product_") and not name.endswith("_backward"):
        return _attention(dims, _DTYPES.get(types[0], ""), args.get("Concrete Inputs", []))
    return None


def _matmul(a: list[int], b: list[int], dtype: str) -> Key | None:
    if not dtype or len(a) != len(b) or len(a) not in (2, 3):
        return None
    sizes = (
        ("batch", float(a[0] if len(a) == 3 else 1)),
        ("m", float(a[-2])),
        ("n", float(b[-1])),
        ("k", float(a[-1])),
    )
    return ("gemm", "", dtype, sizes) if all(size > 0 for _, size in sizes) else None


def _attention(dims: list[list[int]], dtype: str, concrete: list[str]) -> Key | None:
    if not dtype or len(dims) < 3 or any(len(d) != 4 for d in dims[:3]):
        return None
    q, k, v = dims[:3]
    causal = "causal" if "True" in concrete else "full"
    sizes = {"batch": q[0], "q_heads": q[1], "kv_heads": k[1], "q_len": q[2], "kv_len": k[2],
             "head_dim_qk": q[3], "head_dim_v": v[3]}  # fmt: skip
    return ("attention", f"{causal}/forward", dtype, tuple((name, float(size)) for name, size in sizes.items()))


def _collective(event: dict[str, Any]) -> Key | None:
    """An NCCL kernel with what it did; bytes as costmodel.comm counts them: of the larger buffer."""
    args = event.get("args", {})
    name = _COLLECTIVES.get(str(args.get("Collective name", "")))
    if name is None or event.get("cat") != "kernel":
        return None
    dtype = _DTYPES.get(str(args.get("dtype", "")), "")
    count = max(float(args.get("In msg nelems", 0)), float(args.get("Out msg nelems", 0)))
    ranks = 2.0 if name == "send_recv" else float(args.get("Group size", 0))
    if not dtype or count <= 0 or ranks < 2:
        return None
    sizes = (("num_bytes", count * _WIDTHS[dtype]), ("ranks", ranks), ("stride", _stride(args)))
    return ("collective", name, dtype, sizes)


def _stride(args: dict[str, Any]) -> float:
    """Distance of the group's ranks, 1 if the trace does not say."""
    try:
        ranks = json.loads(str(args.get("Process Group Ranks", "[]")))
        return float(max(ranks[1] - ranks[0], 1))
    except (ValueError, IndexError, TypeError):
        return 1.0


def _sample(key: Key, times_us: list[float], measured_on: str, file: str) -> Sample:
    kind, name, dtype, sizes = key
    ordered = sorted(times_us)
    middle = ordered[0] if kind == "collective" else ordered[len(ordered) // 2]
    spread = math.sqrt(sum((t - middle) ** 2 for t in ordered) / len(ordered)) / middle
    return Sample(
        kind=kind, name=name, dtype=dtype, dims=dict(sizes), time_s=middle * US, spread_frac=spread,
        repeats=len(ordered), condition=0, source=Source.MEASURED, measured_on=measured_on,
        note=f"torch.profiler, {file}",
    )  # fmt: skip


def _conditions(body: dict[str, Any], on_gpu: bool) -> Conditions:
    devices = body.get("deviceProperties") or []
    distributed = body.get("distributedInfo") or {}
    first = devices[0] if on_gpu and devices else {}
    return Conditions(
        platform="cuda" if on_gpu else "cpu", device=str(first.get("name", "a GPU" if on_gpu else "a CPU")),
        devices_per_node=max(len(devices), 1), memory_bytes=int(first.get("totalGlobalMem", 0)),
        backend=str(distributed.get("backend", "nccl" if on_gpu else "gloo")),
        ranks=int(distributed.get("world_size", 1)), threads=1, software={},
    )  # fmt: skip
