"""planner cluster: the known clusters, and one of them with the evidence and source of every figure."""

from __future__ import annotations

import argparse

from planner.commands import arguments
from planner.costmodel.hardware import cluster_sha256, cluster_to_dict
from planner.costmodel.presets import cluster_details, cluster_table
from planner.errors import UserError
from planner.render import Grid, Report

EPILOG = "A cluster of your own is a TOML file; the README shows one."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("action", choices=("list", "show"), help="list all, or show one")
    parser.add_argument("name", nargs="?", help="a name of the list, or a .toml (for show)")
    arguments.add_output(parser)


def run(args: argparse.Namespace) -> int:
    """List or show."""
    if args.action == "list" and args.name:
        raise UserError(f"list takes no name: planner cluster show {args.name}")
    if args.action == "show" and not args.name:
        raise UserError("show needs a name: see planner cluster list")
    arguments.answer(_list() if args.action == "list" else _show(args.name), args)
    return 0


def _list() -> Report:
    rows = cluster_table()
    columns = ("name", "device", "memory", "peak", "tiers", "node")
    grid = Grid(
        columns=tuple(f"<{name}" for name in columns), rows=tuple(tuple(row[c] for c in columns) for row in rows)
    )
    default = f"default  {arguments.DEFAULT_CLUSTER}; rates are per GPU and direction, dense, from data sheets"
    return Report(parts=(grid, default), data={"schema": "planner.clusters/1", "clusters": list(rows)})


def _show(name: str) -> Report:
    cluster = arguments.cluster_of(name)
    rows = tuple((r.label, r.value, r.unit, r.evidence.lower(), r.note) for r in cluster_details(cluster))
    head = f"cluster  {cluster.name}  {cluster.device.name}  {cluster.node_size} GPUs a node  {cluster.notes}"
    grid = Grid(columns=("<what", "value", "<unit", "<evidence", "<source"), rows=rows)
    sha = cluster_sha256(cluster)
    data = {"schema": "planner.cluster/1", "sha256": sha, "cluster": cluster_to_dict(cluster)}
    return Report(parts=(head, grid, f"sha256   {sha}"), data=data)
