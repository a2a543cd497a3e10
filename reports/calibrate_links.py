"""Collective constants per link type from measured message sweeps; held-out errors by folds and by source.

A link inside one domain is fitted on its own rows. A link between domains is fitted on rows of whole nodes, with the
constants of the link inside the node fixed. All predictions go through `costmodel.comm`, the formulas that plans use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from planner.costmodel import comm
from planner.costmodel.evidence import Quantity, Source
from planner.costmodel.hardware import COLLECTIVES, ClusterSpec, CollectiveFit, DeviceSpec, LinkTier
from planner.costmodel.presets import load_cluster
from planner.costmodel.units import GB
from planner.reports.fitting import Array, Errors, Parameter, errors, fit, folds, log_loss

_TIMES = {
    "all_gather": comm.all_gather_s,
    "reduce_scatter": comm.reduce_scatter_s,
    "all_reduce": comm.all_reduce_s,
    "all_to_all": comm.all_to_all_s,
    "send_recv": lambda cluster, domains, num_bytes, stride, size: comm.send_recv_s(
        cluster, domains, num_bytes, stride
    ),
}
_ITERATIONS = 700
LARGE_BYTES = 1 << 20
NODE_SIZE = 8
_BASE = load_cluster("a100-80gb")  # everything but the tiers is irrelevant to a collective


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A link type of links.json."""

    collectives: Mapping[str, CollectiveFit]
    nvls_efficiency: float
    topology: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkReport:
    """One link and collective: errors on rows that did not make its constants, all sizes and from LARGE_BYTES up."""

    link: str
    collective: str
    sources: str
    held_out: Errors
    large: Errors
    by_source: tuple[tuple[str, Errors], ...]  # left out whole


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sweep:
    """Rows that one call predicts: same collective, rates and GPUs per node; `where` are their places."""

    collective: str
    per_node: int
    inner: str
    gb_per_s: float
    inner_gb_per_s: float
    where: NDArray[np.int64]
    num_bytes: Array
    gpus: Array


def _sweeps(rows: pd.DataFrame) -> list[_Sweep]:
    keys = rows.assign(group=np.where(rows.inner == "", 0, rows.per_node), where=np.arange(len(rows)))
    return [
        _Sweep(
            collective=str(collective),
            per_node=int(per_node),
            inner=str(inner),
            gb_per_s=float(rate),
            inner_gb_per_s=float(inner_rate),
            where=part["where"].to_numpy(),
            num_bytes=part.num_bytes.to_numpy(float),
            gpus=(part.per_node * part.nodes).to_numpy(float),
        )
        for (collective, per_node, inner, rate, inner_rate), part in keys.groupby(
            ["collective", "group", "inner", "gb_per_s", "inner_gb_per_s"]
        )
    ]


def _tier(name: str, gb_per_s: float, link: Link, domain_size: int) -> LinkTier:
    bandwidth = Quantity(value=gb_per_s * GB, source=Source.DATASHEET, note="calibration row")
    return LinkTier(
        name=name,
        domain_size=domain_size,
        bandwidth_bytes_per_s=bandwidth,
        nvls_efficiency=link.nvls_efficiency,
        topology=link.topology,
        collectives=link.collectives,
    )


def node(device: DeviceSpec, link: Link, gb_per_s: float) -> ClusterSpec:
    """A cluster of one kind of node, whose GPUs this link joins."""
    outer = dataclasses.replace(link, topology="switch")
    tiers = (_tier("node", gb_per_s, link, NODE_SIZE), _tier("none", gb_per_s, outer, 0))
    return dataclasses.replace(_BASE, device=device, tiers=tiers)


def _predict(sweeps: Sequence[_Sweep], link: Link, links: Mapping[str, Link], backend: str) -> Array:
    """Seconds of the rows behind `sweeps`; a link inside one node gets an outer tier that no group reaches."""
    seconds = np.zeros(sum(len(sweep.where) for sweep in sweeps))
    for sweep in sweeps:
        node = sweep.per_node or NODE_SIZE
        if sweep.inner:
            tiers = (
                _tier("node", sweep.inner_gb_per_s, links[sweep.inner], node),
                _tier("link", sweep.gb_per_s, dataclasses.replace(link, topology="switch"), 0),
            )
        else:
            outer = dataclasses.replace(link, topology="switch")
            tiers = (_tier("link", sweep.gb_per_s, link, node), _tier("none", sweep.gb_per_s, outer, 0))
        cluster = dataclasses.replace(_BASE, tiers=tiers, node_size=1, backend=backend)
        domains = (node if sweep.inner else max(node, int(sweep.gpus.max())), int(sweep.gpus.max()))
        seconds[sweep.where] = _TIMES[sweep.collective](cluster, domains, sweep.num_bytes, 1, sweep.gpus)
    return seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one collective of one link is fitted: free constants, the others by value, and traits of the link."""

    link: str
    collective: str
    parameters: tuple[Parameter, ...]
    fixed: Mapping[str, float]
    topology: str = "switch"
    backend: str = "nccl"


def _link(recipe: Recipe, values: Mapping[str, float]) -> Link:
    values = {**recipe.fixed, **values}
    nvls = values.pop("nvls_efficiency", 0.0)
    constants = CollectiveFit(**values, evidence=Source.INTERPOLATED, note="")
    return Link(collectives=dict.fromkeys(COLLECTIVES, constants), nvls_efficiency=nvls, topology=recipe.topology)


def _fit(rows: pd.DataFrame, recipe: Recipe, links: Mapping[str, Link]) -> Link:
    measured, sweeps = rows.time_s.to_numpy(float), _sweeps(rows)

    def loss(values: dict[str, float]) -> float:
        return log_loss(_predict(sweeps, _link(recipe, values), links, recipe.backend), measured)

    return _link(recipe, fit(recipe.parameters, loss, _ITERATIONS))


def _left_out(rows: pd.DataFrame, recipe: Recipe, links: Mapping[str, Link], part: NDArray[np.int64]) -> Array:
    """Predictions for `part` by constants that the other rows made."""
    link = _fit(rows.drop(rows.index[part]), recipe, links)
    return _predict(_sweeps(rows.iloc[part]), link, links, recipe.backend)


def _judge(rows: pd.DataFrame, recipe: Recipe, links: Mapping[str, Link]) -> LinkReport:
    measured, predicted = rows.time_s.to_numpy(float), rows.time_s.to_numpy(float).copy()
    for part in folds(len(rows), min(5, len(rows))):
        predicted[part] = _left_out(rows, recipe, links, part)
    large = rows.num_bytes.to_numpy(float) >= LARGE_BYTES
    by_source = []
    for source in rows.source.unique() if rows.source.nunique() > 1 else ():
        part = np.flatnonzero(rows.source == source)
        by_source.append((str(source), errors(_left_out(rows, recipe, links, part), measured[part])))
    return LinkReport(
        link=recipe.link,
        collective=recipe.collective,
        sources=", ".join(rows.source.unique()),
        held_out=errors(predicted, measured),
        large=errors(predicted[large], measured[large]),
        by_source=tuple(by_source),
    )


def calibrate(
    table: pd.DataFrame, recipe: Recipe, links: Mapping[str, Link]
) -> tuple[CollectiveFit, float, LinkReport]:
    """Constants of one collective of one link, its NVLS efficiency, and the errors on rows left out.

    `links` are the finished links inside the node. Folds are random rows, five or as many as there are rows.
    """
    rows = table[(table.link == recipe.link) & (table.collective == recipe.collective)].reset_index(drop=True)
    report = _judge(rows, recipe, links)
    link = _fit(rows, recipe, links)
    note = (
        f"{len(rows)} rows, {report.sources}, {', '.join(sorted(set(rows.address)))} read 2026-11-24; held-out "
        f"error {report.held_out.median_abs:.1%} median, {report.held_out.p90_abs:.1%} p90"
    )
    return dataclasses.replace(link.collectives[recipe.collective], note=note), link.nvls_efficiency, report


def judge_borrowed(table: pd.DataFrame, fitted: Sequence[LinkReport], links: Mapping[str, Link]) -> list[LinkReport]:
    """Errors on rows whose constants were borrowed: none of them made anything."""
    done = {(report.link, report.collective) for report in fitted}
    reports = []
    for (link, collective), part in table.groupby(["link", "collective"]):
        if (link, collective) not in done:
            rows = part.reset_index(drop=True)
            found = errors(_predict(_sweeps(rows), links[str(link)], links, "nccl"), rows.time_s.to_numpy(float))
            reports.append(
                LinkReport(
                    link=str(link),
                    collective=str(collective),
                    sources=", ".join(rows.source.unique()),
                    held_out=found,
                    large=found,
                    by_source=(),
                )
            )
    return reports
