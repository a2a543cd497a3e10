"""Hardware records: one accelerator, one link tier, one cluster; JSON in and out, unknown keys refused.

All rates are per GPU, one direction, dense. Tiers run innermost first (NVLink or xGMI domain, then NIC, then an
optional spine). A job of n GPUs may use only part of a domain (`ClusterSpec.domain_sizes`). The datasheet part and
the fitted part of a device are apart, so that `planner.reports.calibrate` can rewrite the second alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any

from planner.costmodel.evidence import Quantity, Source

DTYPES = ("bfloat16", "float16", "float32", "float8")
BACKENDS = ("nccl", "rccl", "gloo")
FUSED_ATTENTION = ("flash", "cudnn", "flash3")  # kernels that keep the scores on chip; "flash" is FlashAttention-2
TOPOLOGIES = ("switch", "mesh", "bus")  # all of it; a wire per pair: (c-1)/(d-1); one wire for all: 1/(c-1)
COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send_recv")


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _require_fraction(record: str, **values: float) -> None:
    for name, value in values.items():
        _require(0 < value <= 1, f"{record}: {name} must be in (0, 1], not {value!r}")


def _require_not_negative(record: str, **values: float) -> None:
    for name, value in values.items():
        _require(math.isfinite(value) and value >= 0, f"{record}: {name} must be >= 0, not {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmFit:
    """Constants of `compute.gemm_s` for one device and dtype; see that function for the formula."""

    peak_frac: float  # fraction of the peak rate that a full wave of large tiles reaches, cold
    sustained_frac: float  # the same once a kernel is long enough to be limited by power
    throttle_flops: float  # work at which the rate is half way between the two
    ramp_k: float  # prologue and epilogue of a tile, in elements of k
    tile_frac: float  # efficiency lost per halving of the tile below 128x256 (1 = none)
    wave_quantum: float  # 0: tiles fill the last wave smoothly, 1: the last wave costs as much as a full one
    hbm_frac: float  # fraction of the HBM rate reached by the operands' traffic
    overhead_s: float  # fixed time of one call
    evidence: Source
    note: str

    def __post_init__(self) -> None:
        _require_fraction(
            "gemm fit",
            peak_frac=self.peak_frac,
            sustained_frac=self.sustained_frac,
            tile_frac=self.tile_frac,
            hbm_frac=self.hbm_frac,
        )
        _require(self.sustained_frac <= self.peak_frac, "gemm fit: sustained_frac must be <= peak_frac")
        _require(0 <= self.wave_quantum <= 1, "gemm fit: wave_quantum must be in [0, 1]")
        _require(self.throttle_flops > 0, "gemm fit: throttle_flops must be > 0")
        _require_not_negative("gemm fit", ramp_k=self.ramp_k, overhead_s=self.overhead_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionFit:
    """Constants of one fused kernel in `compute.attention_s`: fractions of the 16-bit peak at head_dim 128."""

    forward_frac: float
    backward_frac: float
    ramp_len: float  # key length at which half of the asymptotic rate is reached
    head_dim_half: float  # head dim at which the rate is half of that of an infinite one
    causal_len: float  # extra ramp of causal kernels (masked tiles and imbalance), in keys
    overhead_s: float
    evidence: Source
    note: str

    def __post_init__(self) -> None:
        _require_fraction("attention fit", forward_frac=self.forward_frac, backward_frac=self.backward_frac)
        _require_not_negative(
            "attention fit",
            ramp_len=self.ramp_len,
            head_dim_half=self.head_dim_half,
            causal_len=self.causal_len,
            overhead_s=self.overhead_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFit:
    """Constants of memory-bound kernels: time = kernels * latency_s + bytes / (HBM rate * hbm_frac)."""

    hbm_frac: float
    latency_s: float  # ramp up and down of one kernel on the device, launch gap not included
    evidence: Source
    note: str

    def __post_init__(self) -> None:
        _require_fraction("memory fit", hbm_frac=self.hbm_frac)
        _require_not_negative("memory fit", latency_s=self.latency_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Measured seconds at sizes `dims`, a row each, ascending; larger in every axis is never faster."""

    axes: tuple[str, ...]
    dims: tuple[tuple[float, ...], ...]
    time_s: tuple[float, ...]

    def __post_init__(self) -> None:
        _require(len(self.dims) == len(self.time_s) > 0, "measured table: needs one time a row, and a row")
        _require(all(len(row) == len(self.axes) for row in self.dims), "measured table: a row needs one size an axis")
        for row, time_s in zip(self.dims, self.time_s, strict=True):
            ok = all(math.isfinite(size) and size > 0 for size in (*row, time_s))
            _require(ok, f"measured table: sizes and times must be > 0, not {row!r}, {time_s!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """One accelerator. `memory_bytes` is what the driver lets one process address, not the marketing size."""

    name: str
    aliases: tuple[str, ...]
    peak_flops_per_s: Mapping[str, Quantity]  # by dtype of DTYPES; float32 is the TF32 tensor-core rate
    memory_bytes: Quantity
    hbm_bytes_per_s: Quantity
    host_link_bytes_per_s: Quantity  # achievable, one direction
    num_sms: int
    kernel_launch_s: float  # host time between two kernels of an eager stream
    gemm: Mapping[str, GemmFit]  # by dtype; a missing dtype borrows bfloat16, float16 or the first
    attention: Mapping[str, AttentionFit]  # by kernel of FUSED_ATTENTION; "flash" is always there
    memory: MemoryFit
    measured: Mapping[str, Table] = field(default_factory=dict)  # by kernel, see costmodel.measured; from a profile

    def __post_init__(self) -> None:
        label = f"device {self.name!r}"
        _require(bool(self.name), "device: name must not be empty")
        for table, what in ((self.peak_flops_per_s, "peak_flops_per_s"), (self.gemm, "gemm")):
            _require(len(table) > 0, f"{label}: {what} must name at least one dtype")
            for dtype in table:
                _require(dtype in DTYPES, f"{label}: unknown dtype {dtype!r} in {what}; known: {', '.join(DTYPES)}")
        _require("flash" in self.attention, f"{label}: attention must name at least 'flash'")
        for kernel in self.attention:
            _require(
                kernel in FUSED_ATTENTION,
                f"{label}: unknown attention kernel {kernel!r}; known: {', '.join(FUSED_ATTENTION)}",
            )
        rates = [*self.peak_flops_per_s.values(), self.memory_bytes, self.hbm_bytes_per_s, self.host_link_bytes_per_s]
        for rate in rates:
            _require(
                math.isfinite(rate.value) and rate.value > 0,
                f"{label}: rates and sizes must be > 0, not {rate.value!r}",
            )
        _require(self.num_sms > 0, f"{label}: num_sms must be > 0")
        _require_not_negative(label, kernel_launch_s=self.kernel_launch_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveFit:
    """Constants of one collective on one tier; `comm` holds the formulas."""

    base_s: float  # start of the collective, whatever the group
    step_s: float  # one hop at small messages
    efficiency: float  # fraction of the tier's bandwidth reached by a large group at large messages
    fill_steps: float  # extra steps that fill and drain the ring, in chunks
    ramp_step_s: float  # extra time of a hop once messages are large (low-latency -> bulk protocol)
    ramp_bytes: float  # bytes per hop at which 63 % of it is paid
    evidence: Source
    note: str

    def __post_init__(self) -> None:
        _require_fraction("collective fit", efficiency=self.efficiency)
        _require_not_negative(
            "collective fit",
            base_s=self.base_s,
            step_s=self.step_s,
            fill_steps=self.fill_steps,
            ramp_step_s=self.ramp_step_s,
        )
        _require(self.ramp_bytes > 0, "collective fit: ramp_bytes must be > 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTier:
    """One level of the network. `domain_size` GPUs see each other over it; 0 = every GPU of the job."""

    name: str
    domain_size: int
    bandwidth_bytes_per_s: Quantity  # datasheet, per GPU (a NIC shared by two GPUs counts half)
    nvls_efficiency: float  # in-switch all-reduce: fraction of the bandwidth it reaches; 0 = the tier has none
    topology: str  # one of TOPOLOGIES: how much of the bandwidth c members of a domain of d GPUs reach
    collectives: Mapping[str, CollectiveFit]

    def __post_init__(self) -> None:
        label = f"tier {self.name!r}"
        _require(self.domain_size >= 0, f"{label}: domain_size must be >= 0 (0 = unbounded)")
        _require(self.bandwidth_bytes_per_s.value > 0, f"{label}: bandwidth_bytes_per_s must be > 0")
        _require(0 <= self.nvls_efficiency <= 1, f"{label}: nvls_efficiency must be in [0, 1]")
        _require(
            self.topology in TOPOLOGIES, f"{label}: unknown topology {self.topology!r}; known: {', '.join(TOPOLOGIES)}"
        )
        _require(self.topology != "mesh" or self.domain_size > 1, f"{label}: a mesh needs a domain_size of at least 2")
        missing = [name for name in COLLECTIVES if name not in self.collectives]
        _require(not missing, f"{label}: no constants for {', '.join(missing)}")
        extra = [name for name in self.collectives if name not in COLLECTIVES]
        _require(not extra, f"{label}: unknown collective {', '.join(extra)}; known: {', '.join(COLLECTIVES)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """Equal devices joined by tiers, innermost first; `node_size` GPUs are rented or scheduled together."""

    name: str
    device: DeviceSpec
    tiers: tuple[LinkTier, ...]
    node_size: int  # granularity of a job: 8 for a DGX node, 4 for an NVL72 tray
    host_memory_bytes_per_gpu: Quantity
    backend: str
    price_per_gpu_hour: Quantity | None  # US dollars
    notes: str
    measured: Mapping[str, Table] = field(default_factory=dict)  # by collective and group; from a profile

    def __post_init__(self) -> None:
        label = f"cluster {self.name!r}"
        _require(len(self.tiers) > 0, f"{label}: at least one [[tier]] is needed")
        _require(self.node_size >= 1, f"{label}: node_size must be >= 1")
        _require(self.backend in BACKENDS, f"{label}: unknown backend {self.backend!r}; known: {', '.join(BACKENDS)}")
        _require(self.host_memory_bytes_per_gpu.value > 0, f"{label}: host_memory_bytes_per_gpu must be > 0")
        if self.price_per_gpu_hour is not None:
            _require(self.price_per_gpu_hour.value >= 0, f"{label}: price_per_gpu_hour must be >= 0")
        sizes = [tier.domain_size for tier in self.tiers]
        _require(sizes[-1] == 0, f"{label}: the last tier must have domain_size = 0 (unbounded)")
        bounded = [self.node_size, *sizes[:-1]]
        for inner, outer in zip(bounded, bounded[1:], strict=False):
            _require(
                outer > 0 and outer % inner == 0,
                f"{label}: domain_size {outer} must be a multiple of the level inside it ({inner})",
            )
        _require(len({tier.name for tier in self.tiers}) == len(self.tiers), f"{label}: tier names must differ")

    def domain_sizes(self, num_gpus: int) -> tuple[int, ...]:
        """GPUs of a job of `num_gpus` inside one domain of each tier, innermost first; the last is `num_gpus`.

        A level holds the largest divisor of the level outside it that fits its domain and is a multiple of the
        node: 1,024 GPUs on NVL72 (trays of 4) use 64 of each 72. Raises ValueError when the nodes cannot be whole.
        """
        _require(num_gpus >= 1, f"num_gpus must be >= 1, not {num_gpus}")
        if num_gpus > self.node_size and num_gpus % self.node_size:
            raise ValueError(f"cluster {self.name!r}: {num_gpus} GPUs is not a multiple of the node's {self.node_size}")
        quantum = self.node_size if num_gpus > self.node_size else 1
        sizes: list[int] = []
        outer = num_gpus
        for tier in reversed(self.tiers):
            outer = outer if tier.domain_size == 0 else _largest_part(outer, tier.domain_size, quantum)
            sizes.append(outer)
        return tuple(reversed(sizes))


def _largest_part(total: int, limit: int, quantum: int) -> int:
    """Largest divisor of `total` that is <= limit and a multiple of `quantum` (which divides `total`)."""
    units = total // quantum
    return quantum * next(size for size in range(min(units, limit // quantum), 0, -1) if units % size == 0)


def to_dict(value: Any) -> Any:
    """A record as JSON data; evidence is written by name, a collection that is empty by default is left out."""
    if isinstance(value, Source):
        return value.name
    if is_dataclass(value):
        present = [f for f in fields(value) if not _optional(f) or getattr(value, f.name)]
        return {f.name: to_dict(getattr(value, f.name)) for f in present}
    if isinstance(value, Mapping):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [to_dict(item) for item in value]
    return value


def _optional(one: Field[Any]) -> bool:
    return one.default_factory is not MISSING


def from_dict(kind: Any, data: Any, where: str) -> Any:
    """JSON data as a record of type `kind`; ValueError names the place of a missing, unknown or mistyped key."""
    origin = typing.get_origin(kind)
    if origin is types.UnionType:
        return None if data is None else from_dict(typing.get_args(kind)[0], data, where)
    if origin is tuple:
        _require(isinstance(data, list), f"{where}: expected a list")
        return tuple(from_dict(typing.get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is Mapping:
        _require(isinstance(data, Mapping), f"{where}: expected a table")
        return {key: from_dict(typing.get_args(kind)[1], item, f"{where}.{key}") for key, item in data.items()}
    if kind is Source:
        _require(
            data in Source.__members__, f"{where}: unknown evidence {data!r}; known: {', '.join(Source.__members__)}"
        )
        return Source[data]
    if is_dataclass(kind):
        return _record_from_dict(kind, data, where)
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    _require(isinstance(data, kind) and not isinstance(data, bool), f"{where}: expected {kind.__name__}, not {data!r}")
    return data


def _record_from_dict(kind: Any, data: Any, where: str) -> Any:
    _require(isinstance(data, Mapping), f"{where}: expected a table")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(data) - set(hints))
    _require(not unknown, f"{where}: unknown key {', '.join(unknown)}; known: {', '.join(hints)}")
    missing = [f.name for f in fields(kind) if f.name not in data and not _optional(f)]
    _require(not missing, f"{where}: missing key {', '.join(missing)}")
    return kind(**{name: from_dict(hints[name], item, f"{where}.{name}") for name, item in data.items()})


def cluster_to_dict(cluster: ClusterSpec) -> dict[str, Any]:
    """The whole cluster, devices and fitted constants included, as JSON data."""
    return typing.cast(dict[str, Any], to_dict(cluster))


def cluster_from_dict(data: Mapping[str, Any]) -> ClusterSpec:
    """The exact inverse of `cluster_to_dict`; ValueError on unknown or missing keys."""
    return typing.cast(ClusterSpec, from_dict(ClusterSpec, data, "cluster"))


def cluster_sha256(cluster: ClusterSpec) -> str:
    """Hash of the canonical JSON of the cluster: equal clusters, equal hash, whatever file they came from."""
    text = json.dumps(cluster_to_dict(cluster), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
