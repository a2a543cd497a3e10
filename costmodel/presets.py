"""Presets and user files: `load_cluster("h100")`, `load_cluster("mine.toml")`.

A user's cluster file (TOML):

    name = "mine"
    device = "h100"                 # a preset's name or alias, or a whole [device] table (see devices/*.json)
    node_size = 8                   # GPUs per node; a job is one node's part or whole nodes
    host_memory_gib_per_gpu = 128
    backend = "nccl"                # nccl, rccl or gloo
    price_per_gpu_hour = 2.5        # optional, US dollars
    notes = "optional"
    source = "https://... 2026-11-24"   # where the figures come from

    [[tier]]                        # innermost first
    name = "nvlink"
    domain_size = 8                 # GPUs that see each other over it; 0 on the last tier: everybody
    bandwidth_gb_per_s = 450        # per GPU, one direction, decimal GB
    link = "nvlink4"                # whose measured constants to use: a name in devices/links.json

    [[tier]]
    name = "infiniband"
    domain_size = 0
    bandwidth_gb_per_s = 50
    link = "infiniband"
    latency_us = 5                  # optional: replaces the link's hop latency
    efficiency = 0.9                # optional: replaces the link's fraction of the bandwidth

Every problem in such a file is a ValueError of one line.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from planner.costmodel.evidence import Quantity, Source
from planner.costmodel.hardware import ClusterSpec, CollectiveFit, DeviceSpec, LinkTier, cluster_from_dict, from_dict
from planner.costmodel.units import GB, GIB, US

_HERE = Path(__file__).parent
DEVICES_DIR = _HERE / "devices"
CLUSTERS_DIR = _HERE / "clusters"
LINKS_FILE = DEVICES_DIR / "links.json"

_TOP_KEYS = (
    "name",
    "device",
    "node_size",
    "host_memory_gib_per_gpu",
    "backend",
    "price_per_gpu_hour",
    "notes",
    "source",
    "tier",
)
_TIER_KEYS = ("name", "domain_size", "bandwidth_gb_per_s", "link", "latency_us", "efficiency", "source")


@functools.cache
def _devices() -> dict[str, DeviceSpec]:
    specs = {}
    for path in sorted(DEVICES_DIR.glob("*.json")):
        if path != LINKS_FILE:
            data = json.loads(path.read_text())
            spec = cast(DeviceSpec, from_dict(DeviceSpec, {**data["datasheet"], **data["fitted"]}, path.name))
            specs[spec.name] = spec
    return specs


@functools.cache
def _links() -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(LINKS_FILE.read_text()))


def _unknown(what: str, name: str, known: list[str]) -> ValueError:
    close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    return ValueError(f"unknown {what} {name!r}; {'close' if close else 'known'} names: {', '.join(close or known)}")


def list_devices() -> tuple[str, ...]:
    """Names of the preset devices, sorted."""
    return tuple(sorted(_devices()))


def load_device(name: str) -> DeviceSpec:
    """The preset device with this name or alias, whatever the case; ValueError lists close names."""
    wanted = name.lower()
    for spec in _devices().values():
        if wanted == spec.name or wanted in (alias.lower() for alias in spec.aliases):
            return spec
    raise _unknown("device", name, sorted(_devices()))


def list_clusters() -> tuple[str, ...]:
    """Names of the preset clusters, sorted."""
    return tuple(sorted(path.stem for path in CLUSTERS_DIR.glob("*.toml")))


def load_cluster(name_or_path: str) -> ClusterSpec:
    """A preset by name, or a user's .toml or .json file by path; ValueError of one line on any problem."""
    if name_or_path.lower() in list_clusters():
        return _load_file(CLUSTERS_DIR / f"{name_or_path.lower()}.toml")
    path = Path(name_or_path)
    if path.suffix in (".toml", ".json"):
        return _load_file(path)
    raise _unknown("cluster", name_or_path, list(list_clusters()))


def _load_file(path: Path) -> ClusterSpec:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read cluster file {path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        if path.suffix == ".json":
            return cluster_from_dict(json.loads(text))
        return cluster_from_table(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not valid {path.suffix[1:].upper()}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def cluster_from_table(table: Mapping[str, Any]) -> ClusterSpec:
    """A cluster from the TOML layout in the module's docstring; ValueError on unknown, missing or wrong keys."""
    _check_keys(table, _TOP_KEYS, ("name", "device", "node_size", "host_memory_gib_per_gpu", "tier"), "cluster file")
    source = table.get("source", "")
    note = _text(source, "source") or "given by the user"
    evidence = Source.DATASHEET if source else Source.ASSUMED
    device = table["device"]
    spec = load_device(device) if isinstance(device, str) else cast(DeviceSpec, from_dict(DeviceSpec, device, "device"))
    tiers = table["tier"]
    if not isinstance(tiers, list) or not all(isinstance(tier, dict) for tier in tiers):
        raise ValueError("cluster file: tier must be written as [[tier]] tables")
    price = table.get("price_per_gpu_hour")
    return ClusterSpec(
        name=_text(table["name"], "name"),
        device=spec,
        tiers=tuple(_tier(tier, index, evidence, note) for index, tier in enumerate(tiers)),
        node_size=_whole(table["node_size"], "node_size"),
        host_memory_bytes_per_gpu=Quantity(
            value=_number(table["host_memory_gib_per_gpu"], "host_memory_gib_per_gpu") * GIB,
            source=Source.ASSUMED,
            note="depends on the server; set host_memory_gib_per_gpu",
        ),
        backend=_text(table.get("backend", "nccl"), "backend"),
        price_per_gpu_hour=None
        if price is None
        else Quantity(
            value=_number(price, "price_per_gpu_hour"), source=Source.ASSUMED, note="varies by provider and term"
        ),
        notes=_text(table.get("notes", ""), "notes"),
    )


def _tier(table: Mapping[str, Any], index: int, evidence: Source, note: str) -> LinkTier:
    where = f"tier {index + 1}"
    _check_keys(table, _TIER_KEYS, ("name", "domain_size", "bandwidth_gb_per_s", "link"), where)
    link = _text(table["link"], f"{where}: link")
    if link not in _links():
        raise _unknown("link", link, sorted(_links()))
    fitted = _links()[link]
    collectives = cast(
        dict[str, CollectiveFit], from_dict(Mapping[str, CollectiveFit], fitted["collectives"], f"link {link}")
    )
    changes: dict[str, Any] = {}
    if "latency_us" in table:
        changes["step_s"] = _number(table["latency_us"], f"{where}: latency_us") * US
    if "efficiency" in table:
        changes["efficiency"] = _number(table["efficiency"], f"{where}: efficiency")
    if changes:
        changes |= {"evidence": Source.ASSUMED, "note": f"{note}; {', '.join(sorted(changes))} set in the cluster file"}
        collectives = {name: dataclasses.replace(fit, **changes) for name, fit in collectives.items()}
    bandwidth = _number(table["bandwidth_gb_per_s"], f"{where}: bandwidth_gb_per_s") * GB
    return LinkTier(
        name=_text(table["name"], f"{where}: name"),
        domain_size=_whole(table["domain_size"], f"{where}: domain_size"),
        bandwidth_bytes_per_s=Quantity(
            value=bandwidth, source=evidence, note=_text(table.get("source", note), f"{where}: source")
        ),
        nvls_efficiency=float(fitted["nvls_efficiency"]),
        topology=str(fitted["topology"]),
        collectives=collectives,
    )


def _check_keys(table: Mapping[str, Any], known: tuple[str, ...], needed: tuple[str, ...], where: str) -> None:
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise ValueError(f"{where}: unknown key {', '.join(unknown)}; known: {', '.join(known)}")
    missing = [key for key in needed if key not in table]
    if missing:
        raise ValueError(f"{where}: missing key {', '.join(missing)}")


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where} must be a number, not {value!r}")
    return float(value)


def _whole(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{where} must be a whole number, not {value!r}")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} must be text, not {value!r}")
    return value


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a cluster's description; `value` is ready for the screen, in `unit`."""

    label: str
    value: str
    unit: str
    evidence: str
    note: str


def cluster_table() -> tuple[dict[str, str], ...]:
    """The preset clusters, one row each: name, device, memory, rate, tiers."""
    rows = []
    for name in list_clusters():
        cluster = load_cluster(name)
        device = cluster.device
        dtype, rate = _main_rate(device)
        rows.append(
            {
                "name": name,
                "device": device.name,
                "memory": f"{device.memory_bytes.value / GIB:.1f} GiB",
                "peak": f"{rate.value / 1e12:,.0f} TFLOP/s {dtype}"
                if rate.value >= 1e12
                else f"{rate.value / 1e9:,.0f} GFLOP/s {dtype}",
                "tiers": ", ".join(
                    f"{tier.name} {tier.domain_size or 'all'} x {tier.bandwidth_bytes_per_s.value / GB:g} GB/s"
                    for tier in cluster.tiers
                ),
                "node": str(cluster.node_size),
            }
        )
    return tuple(rows)


def _main_rate(device: DeviceSpec) -> tuple[str, Quantity]:
    dtype = "bfloat16" if "bfloat16" in device.peak_flops_per_s else next(iter(device.peak_flops_per_s))
    return dtype, device.peak_flops_per_s[dtype]


def cluster_details(cluster: ClusterSpec) -> tuple[Row, ...]:
    """Everything `planner cluster show` prints: each figure with its unit, evidence and source."""
    device = cluster.device
    rows = [_row(f"peak {dtype}", rate, 1e12, "TFLOP/s") for dtype, rate in device.peak_flops_per_s.items()]
    rows += [
        _row("memory", device.memory_bytes, GIB, "GiB"),
        _row("HBM bandwidth", device.hbm_bytes_per_s, GB, "GB/s"),
        _row("host link", device.host_link_bytes_per_s, GB, "GB/s"),
        _row("host memory per GPU", cluster.host_memory_bytes_per_gpu, GIB, "GiB"),
    ]
    if cluster.price_per_gpu_hour is not None:
        rows.append(_row("price", cluster.price_per_gpu_hour, 1.0, "$/GPU/h"))
    for dtype, fit in device.gemm.items():
        rows.append(
            Row(
                label=f"GEMM {dtype}, large",
                value=f"{100 * fit.sustained_frac:.1f}",
                unit="% of peak",
                evidence=fit.evidence.name,
                note=fit.note,
            )
        )
    for kernel, curve in device.attention.items():
        rows.append(
            Row(
                label=f"attention forward, {kernel}",
                value=f"{100 * curve.forward_frac:.1f}",
                unit="% of peak",
                evidence=curve.evidence.name,
                note=curve.note,
            )
        )
    for tier in cluster.tiers:
        span = f"{tier.domain_size} GPUs" if tier.domain_size else "all GPUs"
        rows.append(_row(f"{tier.name} ({span})", tier.bandwidth_bytes_per_s, GB, "GB/s"))
        fit_ar = tier.collectives["all_reduce"]
        rows.append(
            Row(
                label=f"{tier.name} all-reduce, large",
                value=f"{100 * fit_ar.efficiency:.1f}",
                unit="% of link",
                evidence=fit_ar.evidence.name,
                note=fit_ar.note,
            )
        )
    return tuple(rows)


def _row(label: str, quantity: Quantity, scale: float, unit: str) -> Row:
    return Row(
        label=label,
        value=f"{quantity.value / scale:,.4g}" if quantity.value / scale < 1000 else f"{quantity.value / scale:,.0f}",
        unit=unit,
        evidence=quantity.source.name,
        note=quantity.note,
    )
