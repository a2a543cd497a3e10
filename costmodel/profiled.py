"""The cluster and engine as a profile found them: constants fitted to its samples, and tables of what it covers.

Constants keep the form of `hardware`'s records, so that everything that prices plans works unchanged; they are moved
from the preset's values only as far as the samples tell. Tables (costmodel.measured) then hold the exact times.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.costmodel import comm
from planner.costmodel.compute import attention_s, attention_table, gemm_fit, gemm_s, memory_bound_s
from planner.costmodel.evidence import Quantity, Source
from planner.costmodel.hardware import AttentionFit, ClusterSpec, CollectiveFit, DeviceSpec, Table
from planner.costmodel.kernel_choice import table_name
from planner.costmodel.measured import make_table
from planner.costmodel.profile import Conditions, Profile, ProfileError, Sample, profile_sha256

Array = NDArray[np.float64]
Constants = Mapping[str, Any]  # floats by name
_GOLDEN = (5**0.5 - 1) / 2
_PRIOR = 0.01  # loss of moving a constant by a factor e: only constants that the samples determine leave the preset
_MEMORY_NAMES = ("elementwise", "norm", "softmax")  # kernels that stand for memory-bound ones of any name


@dataclass(frozen=True, slots=True, kw_only=True)
class _Free:
    """One constant to fit: from `start` within [low, high], all > 0, in ratios."""

    start: float
    low: float
    high: float


def fit_constants(free: Mapping[str, _Free], loss: Callable[[Constants], float]) -> dict[str, Any]:
    """Minimise `loss` by golden-section search along one constant after the other, three rounds."""
    values = {name: min(max(one.start, one.low), one.high) for name, one in free.items()}

    def total(name: str, log_value: float) -> float:
        value = float(np.exp(log_value))
        return loss({**values, name: value}) + _PRIOR * abs(log_value - float(np.log(free[name].start)))

    for _ in range(3):
        for name, one in free.items():
            low, high = float(np.log(one.low)), float(np.log(one.high))
            for _ in range(24):
                left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
                low, high = (low, right) if total(name, left) <= total(name, right) else (left, high)
            values[name] = float(np.exp((low + high) / 2))
    return {name: float(f"{value:.4g}") for name, value in values.items()}


def _log_loss(predicted_s: Array, measured_s: Array) -> float:
    return float(np.mean(np.abs(np.log(predicted_s / measured_s))))


def describes(conditions: Conditions, cluster: ClusterSpec) -> bool:
    """Whether samples taken under `conditions` are of the cluster's device."""
    device = cluster.device
    if conditions.platform == "cpu" or device.name == "cpu":
        return conditions.platform == "cpu" and device.name == "cpu"
    words = set(re.split(r"[^a-z0-9]+", conditions.device.lower()))
    if re.split(r"[^a-z0-9]+", device.name.lower())[0] not in words:
        return False
    held = conditions.memory_bytes
    return held == 0 or 0.9 < held / device.memory_bytes.value < 1.1


def world_of(profile: Profile, cluster: ClusterSpec, num_gpus: int) -> int:
    """Ranks at once of the samples that suit a job of `num_gpus` best; ProfileError if none is of its device."""
    ranks = sorted({one.ranks for one in profile.conditions if describes(one, cluster)})
    if not ranks:
        seen = ", ".join(sorted({one.device for one in profile.conditions})) or "nothing"
        raise ProfileError(
            f"the profile is of {seen}, not of {cluster.device.name}: profile this device, or give another --cluster"
        )
    return min(ranks, key=lambda r: abs(np.log(r / num_gpus)))


def in_lockstep(profile: Profile) -> Profile:
    """What ranks find that share cores and all wait for each other: collectives, and the runtime, by the wall clock.

    Otherwise others work while one waits, and its own work counts.
    """
    found = [
        replace(s, time_s=s.wall_s) if s.wall_s and (s.kind == "runtime" or s.kind.startswith("collective")) else s
        for s in profile.samples
    ]
    return replace(profile, samples=tuple(found))


def same_kernel(kind: str, one: Conditions, other: Conditions) -> bool:
    """Whether a kernel of this kind takes one rank the same work under both: every core is busy, and no peer waits."""
    alone = kind != "runtime" and not kind.startswith("collective")
    return alone and all(at.platform == "cpu" and at.ranks * at.threads >= at.devices_per_node for at in (one, other))


def fit_cluster(cluster: ClusterSpec, profile: Profile, num_gpus: int) -> ClusterSpec:
    """`cluster` as `profile` found it, for a job of `num_gpus`; ProfileError if it is of another device.

    Ranks on one CPU share its cores, so only samples with the best matching number of ranks count there, and kernels
    that others measured on cores as busy.
    """
    world = world_of(profile, cluster, num_gpus)
    samples = [s for s in profile.samples if describes(profile.where(s), cluster)]
    if cluster.device.name == "cpu":
        own = [s for s in samples if profile.where(s).ranks == world]
        samples = own + _in_turns(profile, [s for s in samples if profile.where(s).ranks != world], own, world)
    note = f"profile {profile_sha256(profile)[:12]}"
    device = _device(cluster.device, samples, note)
    return _links(replace(cluster, device=device), profile, samples, note)


def _in_turns(profile: Profile, others: Iterable[Sample], own: Sequence[Sample], world: int) -> list[Sample]:
    """Kernels that `world` ranks did not measure, as long as they take with so many ranks in turns on the cores."""
    found: dict[Any, tuple[float, Sample]] = {}
    have = {s.what for s in own}
    for sample in others:
        at = profile.where(sample)
        if sample.what in have or not same_kernel(sample.kind, at, replace(at, ranks=world)):
            continue
        apart = abs(np.log(at.ranks / world))
        if apart < found.get(sample.what, (np.inf, sample))[0]:
            found[sample.what] = (apart, replace(sample, time_s=sample.time_s * world / at.ranks))
    return [sample for _, sample in found.values()]


# ---- device


def _of(samples: Iterable[Sample], kind: str, dtype: str = "") -> list[Sample]:
    return [s for s in samples if s.kind == kind and dtype in ("", s.dtype)]


def _columns(samples: Sequence[Sample]) -> list[Array]:
    return [np.array(column) for column in zip(*(s.sizes for s in samples), strict=True)]


def _times(samples: Sequence[Sample]) -> Array:
    return np.array([s.time_s for s in samples])


def _mean_by(
    samples: Iterable[Sample], size_of: Callable[[Sample], tuple[float, ...]] = lambda s: s.sizes
) -> dict[tuple[float, ...], float]:
    """Geometric mean of the times of equal size."""
    found: dict[tuple[float, ...], list[float]] = {}
    for sample in samples:
        found.setdefault(size_of(sample), []).append(sample.time_s)
    return {sizes: float(np.exp(np.mean(np.log(times)))) for sizes, times in found.items()}


def _device(device: DeviceSpec, samples: list[Sample], note: str) -> DeviceSpec:
    tables: dict[str, Table] = {}
    for dtype in sorted({s.dtype for s in _of(samples, "gemm")} & set(device.peak_flops_per_s)):
        rows = _of(samples, "gemm", dtype)
        device = _gemm(device, dtype, rows, note)
        tables[f"gemm/{dtype}"] = make_table(("batch", "m", "n", "k"), _mean_by(rows))
    device, attention = _attention(device, _of(samples, "attention"), note)
    tables |= attention
    rows = [s for s in _of(samples, "memory") if s.name in _MEMORY_NAMES]
    if rows:
        device = _memory(device, rows, note)
        tables["memory"] = make_table(("num_bytes",), _mean_by(rows))
    for dtype, name in sorted({(s.dtype, s.name) for s in _of(samples, "kernel")}):
        rows = [s for s in _of(samples, "kernel", dtype) if s.name == name]
        tables[table_name(dtype, name)] = make_table(("num_bytes",), _mean_by(rows))
    for kind, axis in (("optimizer", "num_params"), ("copy", "num_bytes")):
        if _of(samples, kind):
            tables[kind] = make_table((axis,), _mean_by(_of(samples, kind)))
    for name in sorted({s.name for s in _of(samples, "layer")}):
        rows = [s for s in _of(samples, "layer") if s.name == name]
        by_batch = _mean_by(rows, lambda s: (s.dims["micro_batch_size"],))
        tables[f"layer/{name}"] = make_table(("micro_batch_size",), by_batch)
    return replace(device, measured=tables)


def _evidence(rows: Sequence[Sample], predicted_s: Array, note: str) -> dict[str, Any]:
    error = float(np.median(np.abs(predicted_s / _times(rows) - 1)))
    return {"evidence": Source.INTERPOLATED, "note": f"{len(rows)} samples, {note}, median error {error:.1%}"}


def _gemm(device: DeviceSpec, dtype: str, rows: list[Sample], note: str) -> DeviceSpec:
    """Scale, ramp and overhead from the samples; tile, wave and throttle behaviour stay the preset's."""
    base, _ = gemm_fit(device, dtype)
    batch, m, n, k = _columns(rows)
    measured = _times(rows)
    fastest = float(np.max(2 * batch * m * n * k / measured)) / 0.99
    if fastest > device.peak_flops_per_s[dtype].value:
        peak = Quantity(value=fastest, source=Source.MEASURED, note=f"fastest GEMM, {note}")
        device = replace(device, peak_flops_per_s={**device.peak_flops_per_s, dtype: peak})

    def made(values: Constants) -> DeviceSpec:
        sustained = values["peak_frac"] * min(base.sustained_frac / base.peak_frac, 1.0)
        fit = replace(base, **values, sustained_frac=sustained, evidence=Source.INTERPOLATED)
        return replace(device, gemm={**device.gemm, dtype: fit})

    def predicted(values: Constants) -> Array:
        return gemm_s(made(values), dtype, batch, m, n, k, heat=0.0)

    free = {
        "peak_frac": _Free(start=base.peak_frac, low=0.01, high=1.0),
        "ramp_k": _Free(start=max(base.ramp_k, 0.1), low=0.1, high=2000.0),
        "overhead_s": _Free(start=max(base.overhead_s, 1e-7), low=1e-7, high=1e-3),
    }
    values = fit_constants(free, lambda v: _log_loss(predicted(v), measured))
    final = made(values)
    fit = replace(final.gemm[dtype], **_evidence(rows, predicted(values), note))
    return replace(final, gemm={**final.gemm, dtype: fit})


def _attention(device: DeviceSpec, rows: list[Sample], note: str) -> tuple[DeviceSpec, dict[str, Table]]:
    axes = ("batch", "q_heads", "kv_heads", "q_len", "kv_len", "head_dim_qk", "head_dim_v")
    tables = {}
    for dtype in sorted({s.dtype for s in rows}):
        for name in sorted({s.name for s in rows}):
            here = [s for s in _of(rows, "attention", dtype) if s.name == name]
            if here:
                key = attention_table(dtype, name.startswith("causal"), name.endswith("backward"))
                tables[key] = make_table(axes, _mean_by(here))
    rows = [s for s in rows if s.dtype in device.peak_flops_per_s]
    return (_attention_fit(device, rows, note) if rows else device), tables


def _attention_fit(device: DeviceSpec, rows: list[Sample], note: str) -> DeviceSpec:
    base, measured = device.attention["flash"], _times(rows)
    columns = dict(zip(("batch", "q_heads", "kv_heads", "q_len", "kv_len", "head_dim_qk", "head_dim_v"),
                       _columns(rows), strict=True))  # fmt: skip
    causal = np.where([s.name.startswith("causal") for s in rows], 0.5, 1.0)
    backward = np.array([s.name.endswith("backward") for s in rows])
    dtypes = np.array([s.dtype for s in rows])

    def made(values: Constants) -> AttentionFit:
        return replace(base, **values)

    def predicted(values: Constants) -> Array:
        tried = replace(device, attention=dict.fromkeys(device.attention, made(values)))
        seconds = np.zeros(len(rows))
        for dtype in sorted(set(dtypes)):
            for way in (False, True):
                each = attention_s(tried, str(dtype), **columns, causal_fraction=causal, implementation="flash",
                                   backward=way)  # fmt: skip
                seconds = np.where((backward == way) & (dtypes == dtype), each, seconds)
        return seconds

    free = {
        "forward_frac": _Free(start=base.forward_frac, low=0.002, high=1.0),
        "backward_frac": _Free(start=base.backward_frac, low=0.002, high=1.0),
        "causal_len": _Free(start=max(base.causal_len, 1.0), low=1.0, high=2000.0),
        "overhead_s": _Free(start=max(base.overhead_s, 1e-7), low=1e-7, high=1e-3),
    }
    values = fit_constants(free, lambda v: _log_loss(predicted(v), measured))
    fit = replace(made(values), **_evidence(rows, predicted(values), note))
    return replace(device, attention=dict.fromkeys(device.attention, fit))


def _memory(device: DeviceSpec, rows: list[Sample], note: str) -> DeviceSpec:
    (num_bytes,), measured = _columns(rows), _times(rows)

    def predicted(values: Constants) -> Array:
        return memory_bound_s(replace(device, memory=replace(device.memory, **values)), num_bytes, 1)

    free = {
        "hbm_frac": _Free(start=device.memory.hbm_frac, low=0.01, high=1.0),
        "latency_s": _Free(start=max(device.memory.latency_s, 1e-7), low=1e-7, high=1e-3),
    }
    values = fit_constants(free, lambda v: _log_loss(predicted(v), measured))
    fit = replace(device.memory, **{**values, **_evidence(rows, predicted(values), note)})
    return replace(device, memory=fit)


# ---- links


_TIMES: dict[str, Callable[..., Array]] = {
    "all_gather": comm.all_gather_s,
    "reduce_scatter": comm.reduce_scatter_s,
    "all_reduce": comm.all_reduce_s,
    "all_to_all": comm.all_to_all_s,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Placed:
    """A collective's sample and where its group lies: members per tier, and the outermost tier it crosses."""

    sample: Sample
    domains: tuple[int, ...]
    members: tuple[float, ...]
    tier: int


def _links(cluster: ClusterSpec, profile: Profile, samples: list[Sample], note: str) -> ClusterSpec:
    placed = [p for s in _of(samples, "collective") if (p := _place(cluster, s, profile.where(s).ranks)) is not None]
    for tier in range(len(cluster.tiers)):
        for name in sorted({p.sample.name for p in placed if p.tier == tier}):
            rows = [p for p in placed if p.tier == tier and p.sample.name == name]
            fit = _collective(cluster, tier, name, rows, note)
            spec = cluster.tiers[tier]
            spec = replace(spec, collectives={**spec.collectives, name: fit})
            cluster = replace(cluster, tiers=(*cluster.tiers[:tier], spec, *cluster.tiers[tier + 1 :]))
    tables: dict[str, list[Sample]] = {}
    for p in placed:
        name = p.sample.name
        where = cluster.tiers[p.tier].name if name == "send_recv" else None
        key = f"{name}/{where}" if where else comm.group_table(name, p.members)
        tables.setdefault(key, []).append(p.sample)
    made = {
        key: make_table(("num_bytes",), _mean_by(rows, lambda s: (s.dims["num_bytes"],)))
        for key, rows in sorted(tables.items())
    }
    return replace(cluster, measured=made)


def _place(cluster: ClusterSpec, sample: Sample, world: int) -> _Placed | None:
    """Where the group of a sample lies; None if a job of that many ranks does not exist on this cluster."""
    try:
        domains = cluster.domain_sizes(world)
    except ValueError:
        return None
    ranks, stride = int(sample.dims["ranks"]), int(sample.dims["stride"])
    if sample.name == "send_recv":
        tier = next((i for i, size in enumerate(domains) if stride < size), len(domains) - 1)
        return _Placed(sample=sample, domains=domains, members=(2.0,) * len(domains), tier=tier)
    members = comm.group_place(domains, stride, ranks)
    tier = next(i for i, count in enumerate(members) if count == ranks)
    return _Placed(sample=sample, domains=domains, members=members, tier=tier)


def _collective(cluster: ClusterSpec, tier: int, name: str, rows: list[_Placed], note: str) -> CollectiveFit:
    """Hop time and efficiency of one collective on one tier; the tiers inside keep what they have."""
    spec = cluster.tiers[tier]
    base, samples = spec.collectives[name], [p.sample for p in rows]
    measured = _times(samples)
    free = {
        "step_s": _Free(start=max(base.step_s, 1e-7), low=1e-7, high=0.1),
        "efficiency": _Free(start=base.efficiency, low=1e-4, high=1.0),
    }

    def predicted(values: Constants) -> Array:
        fit = replace(base, base_s=0.0, **values)
        tried = replace(spec, collectives={**spec.collectives, name: fit})
        there = replace(cluster, tiers=(*cluster.tiers[:tier], tried, *cluster.tiers[tier + 1 :]))
        return np.array([_predict(there, p) for p in rows])

    values = fit_constants(free, lambda v: _log_loss(predicted(v), measured))
    return replace(base, base_s=0.0, **{**values, **_evidence(samples, predicted(values), note)})


def _predict(cluster: ClusterSpec, placed: _Placed) -> float:
    d = placed.sample.dims
    if placed.sample.name == "send_recv":
        return float(comm.send_recv_s(cluster, placed.domains, d["num_bytes"], d["stride"]))
    return float(_TIMES[placed.sample.name](cluster, placed.domains, d["num_bytes"], d["stride"], d["ranks"]))
