"""Measured collectives as one table: comm.csv, calibration_points.csv and our own CPU rows, in SI units.

Columns: source, address, link (between nodes if `nodes` > 1), collective, num_bytes, per_node, nodes, gb_per_s (per GPU
and direction of `link`), inner (link inside the node, empty for one domain), inner_gb_per_s, time_s.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd

from planner.costmodel.units import GB, US

_NVLINK = {
    "A100": ("nvlink3", 300.0),
    "H100": ("nvlink4", 450.0),
    "H200": ("nvlink4", 450.0),
    "B200": ("nvlink5", 900.0),
    "GB200": ("nvlink5", 900.0),
    "B300": ("nvlink5", 900.0),
    "GB300": ("nvlink5", 900.0),
    "V100": ("nvlink2", 150.0),
    "L40S": ("pcie", 32.0),
    "MI300X": ("xgmi", 448.0),
    "H800": ("nvlink4", 200.0),
}
_NETWORKS = (("EFAv4", "efa4"), ("EFA", "efa"), ("RoCE", "roce"), ("", "infiniband"))
_COLLECTIVES = {
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "all_reduce": "all_reduce",
    "alltoall": "all_to_all",
}
# busbw * time / bytes of nccl-tests (its doc/PERFORMANCE.md) for k GPUs
_BUS_FACTOR = {
    "all_gather": lambda k: (k - 1) / k,
    "reduce_scatter": lambda k: (k - 1) / k,
    "all_to_all": lambda k: (k - 1) / k,
    "all_reduce": lambda k: 2 * (k - 1) / k,
}
_MIN_BYTES = 1024


def _inside(gpu: str) -> tuple[str, float]:
    name = re.match(r"[A-Z0-9]+", gpu)
    return _NVLINK.get(name.group() if name else "", ("nvlink3", 300.0))


def network(text: str, per_node: float) -> tuple[str, float]:
    """'8x400Gb/s IB per node' as (link, GB/s per GPU); one GPU and NIC per node without a count."""
    found = re.search(r"(?:(\d+)x)?(\d+)Gb/s", text)
    if not found:
        raise ValueError(f"no NIC rate in {text!r}")
    nics = float(found.group(1) or 1)
    return next(link for word, link in _NETWORKS if word in text), nics * float(found.group(2)) / 8 / per_node


def _comm_row(row: Any) -> dict[str, Any] | None:
    """One row of comm.csv; None for what the model does not predict: other operations, no size, forced algorithms."""
    collective = _COLLECTIVES.get(str(row.collective))
    if collective is None or not row.message_bytes >= _MIN_BYTES or pd.isna(row.n_gpus):
        return None
    if "NVLS off" in str(row.algo) or (
        row.n_nodes > 1 and str(row.algo) == "ring" and "NVL72" not in str(row.intra_node)
    ):
        return None  # the model takes the fastest algorithm, as the library does when left alone
    gpus, nodes = float(row.n_gpus), float(row.n_nodes)
    time_s = row.time_us * US
    if pd.isna(time_s):
        time_s = _BUS_FACTOR[collective](gpus) * row.message_bytes / (row.busbw_GBps * GB)
    inner, inner_rate = _inside(str(row.gpu))
    place = {"link": inner, "gb_per_s": inner_rate, "inner": "", "inner_gb_per_s": 0.0, "per_node": gpus, "nodes": 1.0}
    if "NVL72" in str(row.intra_node):
        place["link"] = "nvlink5-nvl72"
    elif nodes > 1:
        link, rate = network(str(row.inter_node), gpus / nodes)
        place |= {
            "link": link,
            "gb_per_s": rate,
            "inner": inner,
            "inner_gb_per_s": inner_rate,
            "per_node": gpus / nodes,
            "nodes": nodes,
        }
    return {
        "source": str(row.source),
        "address": str(row.url_or_path).split(" ")[0],
        "collective": collective,
        "num_bytes": float(row.message_bytes),
        "time_s": time_s,
        **place,
    }


def _read_comm(path: Path) -> list[dict[str, Any]]:
    rows = [_comm_row(row) for row in pd.read_csv(path).itertuples(index=False)]
    return [row for row in rows if row is not None]


def _read_points(path: Path) -> list[dict[str, Any]]:
    """Collective bandwidths that calibration_points.csv holds: Ultra-Scale Playbook (EFA), BigScience (Omni-Path)."""
    rows: list[dict[str, Any]] = []
    for point in pd.read_csv(path).itertuples(index=False):
        item, value = str(point.item), str(point.value)
        source = {"source": str(point.source), "address": str(point.source_ref)}
        if nodes := re.match(r"collective bandwidth, (\d+) node", item):
            for name, bus in re.findall(r"(all-reduce|all-gather|reduce-scatter) ([\d.]+)", value):
                shape = (8.0, float(nodes.group(1)), ("efa", 50.0), ("nvlink4", 450.0))
                rows.append(source | _point(name.replace("-", "_"), float(bus), 2.0**28, *shape))
        shape_found, bus_found = (
            re.match(r"all-reduce (\d+) nodes? x (\d) (A100|V100)", item),
            re.search(r"bus ([\d.]+) G", value),
        )
        if shape_found and bus_found and shape_found.group(1) != "1":
            per_node = float(shape_found.group(2))
            shape = (per_node, float(shape_found.group(1)), ("omnipath", 50 / per_node), _inside(shape_found.group(3)))
            rows.append(source | _point("all_reduce", float(bus_found.group(1)) / 8, 4e9, *shape))
    return rows


def _point(
    collective: str,
    bus: float,
    num_bytes: float,
    per_node: float,
    nodes: float,
    outer: tuple[str, float],
    inner: tuple[str, float],
) -> dict[str, Any]:
    place: dict[str, Any] = {"link": outer[0], "gb_per_s": outer[1], "inner": inner[0], "inner_gb_per_s": inner[1]}
    if nodes == 1:
        place = {"link": inner[0], "gb_per_s": inner[1], "inner": "", "inner_gb_per_s": 0.0}
    time_s = _BUS_FACTOR[collective](per_node * nodes) * num_bytes / (bus * GB)
    return {
        "collective": collective,
        "num_bytes": num_bytes,
        "time_s": time_s,
        "per_node": per_node,
        "nodes": nodes,
    } | place


def read(data: Path) -> pd.DataFrame:
    """Every usable collective of the published tables under `data`.

    An all-to-all of two GPUs is a send and a receive of half the buffer at once, as in a pipeline's steady state.
    """
    table = pd.DataFrame(_read_comm(data / "comm.csv") + _read_points(data / "calibration_points.csv"))
    pairs = table[(table.collective == "all_to_all") & (table.per_node * table.nodes == 2)]
    pairs = pairs.assign(collective="send_recv", num_bytes=pairs.num_bytes / 2)
    return pd.concat([table, pairs], ignore_index=True)
