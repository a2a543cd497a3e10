"""Profile: what was measured on one or more machines, as a versioned JSON file, and what it says in short.

A sample is one median time with its spread and the conditions that it was taken under. Curves t = latency + work / rate
sum up the samples of a kernel; `costmodel.profiled` makes the cost model use them. No I/O, no clock.
"""

from __future__ import annotations

import hashlib
import json
import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np

from planner.costmodel.evidence import Source
from planner.costmodel.hardware import COLLECTIVES, from_dict, to_dict
from planner.costmodel.kernel_choice import sample_names
from planner.costmodel.strict import canonical_json

SCHEMA = "planner.profile/1"
MAX_BYTES = 64 * 2**20
PLATFORMS = ("cpu", "cuda")
RUNTIME = ("plain", "shard", "sync", "tp", "sp", "cp")
PER_STAGE = 2  # micro-batches for every stage of "pp/step"
_GROUP = ("num_bytes", "ranks", "stride")
# Every kind of sample with the sizes that it has; `name` says which collective, op or layer.
DIMS: dict[str, tuple[str, ...]] = {
    "gemm": ("batch", "m", "n", "k"),
    "attention": ("batch", "q_heads", "kv_heads", "q_len", "kv_len", "head_dim_qk", "head_dim_v"),
    "memory": ("num_bytes",),
    "kernel": ("num_bytes",),  # of planner.kernels; bytes that ours moves forward, whatever is measured
    "optimizer": ("num_params",),
    "copy": ("num_bytes",),
    "launch": (),
    "runtime": ("layers", "ops"),  # a micro-batch of a small model under one option of a plan (profiler/runtime_bench)
    "layer": ("micro_batch_size", "seq_len"),
    "collective": _GROUP,
    "collective_pair": _GROUP,  # two of them at once; the time is that of both
    "collective_gemm": (*_GROUP, "m", "n", "k"),  # beside a GEMM; the time is that of both
}
NAMES: dict[str, tuple[str, ...]] = {
    "attention": ("causal/forward", "causal/backward", "full/forward", "full/backward"),
    "memory": ("elementwise", "norm", "softmax", "embedding", "loss"),
    "kernel": sample_names(),
    "copy": ("h2d", "d2h"),
    "runtime": (*(f"{option}/{way}" for option in RUNTIME for way in ("forward", "backward")), "pp/step"),
    **dict.fromkeys(("collective", "collective_pair", "collective_gemm"), COLLECTIVES),
}


class ProfileError(ValueError):
    """A profile file that cannot be used; `stale` when it is of another version."""

    def __init__(self, message: str, stale: bool = False) -> None:
        super().__init__(message)
        self.stale = stale


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What samples were taken under: `ranks` processes of a job ran at once, `threads` each.

    `device`: as it names itself. `software`: version by name (python, torch, cuda, nccl, driver).
    """

    platform: str
    device: str
    devices_per_node: int
    memory_bytes: int
    backend: str
    ranks: int
    threads: int
    software: Mapping[str, str]

    def __post_init__(self) -> None:
        if self.platform not in PLATFORMS:
            raise ValueError(f"platform {self.platform!r} is none of {', '.join(PLATFORMS)}")
        for name in ("devices_per_node", "ranks", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def place(self) -> tuple[str, str, int, int]:
        """What must be equal for two samples to be comparable."""
        return (self.platform, self.device, self.ranks, self.threads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measurement: median seconds of `repeats` runs, `spread_frac` their robust standard deviation over the median.

    `condition` is an index into `Profile.conditions`. `saved_bytes`: what autograd keeps (layers, forward).
    `measured_on`: ISO date. `note`: doubts ("throttled", "noisy") or where an imported sample comes from. `wall_s`: by
    the wall clock, where `time_s` is the work of a rank that shares its core with others (profiler.timing.Clock); or 0.
    """

    kind: str
    name: str
    dtype: str
    dims: Mapping[str, float]
    time_s: float
    spread_frac: float
    repeats: int
    condition: int
    source: Source
    measured_on: str
    saved_bytes: float = 0.0
    note: str = ""
    wall_s: float = 0.0

    def __post_init__(self) -> None:
        where = f"{self.kind} sample"
        if self.kind not in DIMS:
            raise ValueError(f"unknown kind of sample {self.kind!r}; known: {', '.join(DIMS)}")
        if self.name not in NAMES.get(self.kind, (self.name,)):
            raise ValueError(f"{where}: unknown name {self.name!r}; known: {', '.join(NAMES[self.kind])}")
        if tuple(self.dims) != DIMS[self.kind] and set(self.dims) != set(DIMS[self.kind]):
            raise ValueError(f"{where}: has sizes {', '.join(self.dims)}, needs {', '.join(DIMS[self.kind])}")
        for name, value in (*self.dims.items(), ("time_s", self.time_s)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{where}: {name} must be > 0, not {value!r}")
        others = {"spread_frac": self.spread_frac, "saved_bytes": self.saved_bytes, "wall_s": self.wall_s}
        for name, value in others.items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{where}: {name} must be >= 0, not {value!r}")
        if self.repeats < 1 or self.condition < 0:
            raise ValueError(f"{where}: repeats must be at least 1 and condition an index")

    @property
    def sizes(self) -> tuple[float, ...]:
        """The sizes in the order of DIMS."""
        return tuple(float(self.dims[name]) for name in DIMS[self.kind])

    @property
    def what(self) -> tuple[str, str, str, tuple[float, ...]]:
        """What was measured, whatever the conditions."""
        return (self.kind, self.name, self.dtype, self.sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """seconds = latency_s + work / rate_per_s over the samples of one kernel; work in FLOPs or bytes by `unit`."""

    kind: str
    name: str
    dtype: str
    ranks: int
    unit: str
    latency_s: float
    rate_per_s: float
    smallest: float
    largest: float
    samples: int
    median_error_frac: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Samples with their conditions, and the curves that sum them up."""

    tool_version: str
    conditions: tuple[Conditions, ...]
    samples: tuple[Sample, ...]
    curves: tuple[Curve, ...] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        for index, sample in enumerate(self.samples):
            if sample.condition >= len(self.conditions):
                raise ValueError(f"samples[{index}]: condition {sample.condition} is not there")

    def where(self, sample: Sample) -> Conditions:
        """The conditions of one of its samples."""
        return self.conditions[sample.condition]


def work_of(sample: Sample) -> tuple[float, str] | None:
    """(FLOPs or bytes, unit) of a sample that a curve can describe; None for the others."""
    d = sample.dims
    if sample.kind == "gemm":
        return 2 * math.prod(sample.sizes), "flops"
    if sample.kind == "attention":
        flops = 2 * d["batch"] * d["q_heads"] * d["q_len"] * d["kv_len"] * (d["head_dim_qk"] + d["head_dim_v"])
        causal, _, way = sample.name.partition("/")
        return flops * (0.5 if causal == "causal" else 1.0) * (2.5 if way == "backward" else 1.0), "flops"
    if sample.kind in ("memory", "kernel", "copy", "collective"):
        return d["num_bytes"], "bytes"
    return (d["num_params"], "parameters") if sample.kind == "optimizer" else None


def fit_curves(conditions: tuple[Conditions, ...], samples: tuple[Sample, ...]) -> tuple[Curve, ...]:
    """One curve per kernel, dtype and number of ranks with at least two sizes: least squares of relative errors."""
    groups: dict[tuple[str, str, str, int], list[tuple[float, float, str]]] = {}
    for sample in samples:
        work = work_of(sample)
        if work is not None:
            ranks = int(sample.dims.get("ranks", conditions[sample.condition].ranks))
            key = (sample.kind, sample.name, sample.dtype, ranks)
            groups.setdefault(key, []).append((work[0], sample.time_s, work[1]))
    found = []
    for (kind, name, dtype, ranks), rows in sorted(groups.items()):
        work_, time_ = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
        if len(np.unique(work_)) < 2:
            continue
        latency_s, per_unit_s = line(work_, time_)
        errors = np.abs((latency_s + work_ * per_unit_s) / time_ - 1)
        found.append(
            Curve(
                kind=kind, name=name, dtype=dtype, ranks=ranks, unit=rows[0][2], latency_s=latency_s,
                rate_per_s=1 / per_unit_s, smallest=float(work_.min()), largest=float(work_.max()),
                samples=len(rows), median_error_frac=float(np.median(errors)),
            )
        )  # fmt: skip
    return tuple(found)


def line(work: Any, time_s: Any) -> tuple[float, float]:
    """(a, b), a >= 0 and b > 0, of time = a + b work with the least sum of squared relative errors."""
    ones, slopes = 1 / time_s, work / time_s
    solved = np.linalg.lstsq(np.stack([ones, slopes], axis=1), np.ones(len(time_s)), rcond=None)[0]
    if solved[0] >= 0 and solved[1] > 0:
        return float(solved[0]), float(solved[1])
    if solved[1] <= 0:  # no growth seen: all latency, and as much work as the fastest sample allows
        return float(1 / np.mean(ones)), float(np.min(time_s / work) * 1e-6)
    return 0.0, float(slopes.sum() / (slopes**2).sum())


def make_profile(tool_version: str, conditions: Iterable[Conditions], samples: Iterable[Sample]) -> Profile:
    """A profile in canonical order, unused conditions dropped, the last of equal samples kept, curves fitted."""
    known = tuple(conditions)
    latest = {(sample.what, _text(known[sample.condition])): sample for sample in samples}
    used = sorted({_text(known[s.condition]) for s in latest.values()})
    by_text = {_text(one): one for one in known}
    kept = [
        replace(sample, condition=used.index(text), dims={name: float(size) for name, size in sample.dims.items()})
        for (_, text), sample in latest.items()
    ]
    ordered = tuple(sorted(kept, key=lambda s: (s.what, s.condition)))
    places = tuple(by_text[text] for text in used)
    return Profile(tool_version=tool_version, conditions=places, samples=ordered, curves=fit_curves(places, ordered))


def _text(one: Conditions) -> str:
    return canonical_json(to_dict(one)).decode()


def merge(first: Profile, *others: Profile, tool_version: str) -> Profile:
    """All samples of all; of equal ones (same thing, same conditions) that of the last profile."""
    conditions: list[Conditions] = []
    samples: list[Sample] = []
    for profile in (first, *others):
        samples += [replace(s, condition=s.condition + len(conditions)) for s in profile.samples]
        conditions += profile.conditions
    return make_profile(tool_version, conditions, samples)


def encode_profile(profile: Profile) -> bytes:
    """Canonical JSON."""
    return canonical_json({"schema": SCHEMA, **to_dict(profile)})


def profile_sha256(profile: Profile) -> str:
    """Hash of the canonical JSON."""
    return hashlib.sha256(encode_profile(profile)).hexdigest()


def decode_profile(data: bytes, name: str) -> Profile:
    """The profile in `data`; ProfileError of one line that names the file and the place."""
    if len(data) > MAX_BYTES:
        raise ProfileError(f"{name}: more than a profile can be ({MAX_BYTES:,} bytes)")
    try:
        body = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{name}: not a profile: {error or 'nested too deeply'}") from None
    schema = body.pop("schema", None) if isinstance(body, dict) else None
    if not isinstance(schema, str) or not schema.startswith("planner.profile/"):
        raise ProfileError(f"{name}: not a profile: no schema {SCHEMA!r} in it; make one with `planner profile`")
    if schema != SCHEMA:
        raise ProfileError(f"{name}: written as {schema[:40]!r}, this version reads {SCHEMA!r}: profile again", True)
    try:
        return typing.cast(Profile, from_dict(Profile, body, "$"))
    except (ValueError, RecursionError, OverflowError) as error:
        raise ProfileError(f"{name}: damaged or not a {SCHEMA}: {error}") from None


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")
