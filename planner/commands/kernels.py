"""--kernels: which implementation of every op of planner.kernels runs, as the user, the profile or nobody chose."""

from __future__ import annotations

import argparse
import difflib
from dataclasses import replace

from planner.costmodel import kernel_choice
from planner.costmodel.engine import EngineSpec
from planner.costmodel.hardware import ClusterSpec
from planner.costmodel.kernel_choice import GROUPS, IMPLEMENTATIONS, OPS, kernels_on
from planner.errors import UserError

EPILOG = (
    "--kernels: auto, torch or ours for all, then OP=IMPL for some: --kernels ours,rms_norm=liger,swiglu=torch\n"
    f"  groups of ops: {', '.join(GROUPS)}\n"
    f"  others: {', '.join(op for op in OPS if not any(op in ops for ops in GROUPS.values()))}\n"
    "  auto: what --profile measured as fastest, else ours; on a CPU torch. A profile measures what is installed"
)
_FOR_ALL = ("auto", "torch", "ours")


def add_argument(parser: argparse.ArgumentParser) -> None:
    """The flag."""
    what = "which implementation of its kernels the runtime uses (default: auto; see below)"
    parser.add_argument("--kernels", metavar="auto|torch|ours|OP=IMPL,...", help=what)


def chosen(text: str | None, engine: EngineSpec, cluster: ClusterSpec) -> EngineSpec:
    """`engine` with the choice that --kernels makes on this cluster; UserError on one that there is not."""
    device = cluster.device
    if not engine.kernels:
        if text is not None:
            raise UserError(f"--kernels: not with --engine {engine.name}, whose kernels are its own")
        return engine
    base, pairs = _parsed("auto" if text is None else text)
    kernels = kernels_on("cpu" if base == "torch" else "gpu" if base == "ours" else device.name)
    if base == "auto":
        kernels |= kernel_choice.fastest(device.measured)
    for name, how in pairs.items():
        kernels |= {op: how for op in kernel_choice.members(name) if how in OPS[op]}
    elsewhere = sorted(op for op, how in kernels.items() if how != "torch")
    if device.name == "cpu" and elsewhere:
        named = next((f"{name}={how}" for name, how in pairs.items() if how != "torch"), base)
        raise UserError(f"--kernels {named}: cluster {cluster.name} has CPUs, which run torch's forms only")
    return replace(engine, kernels=kernels)


def _parsed(text: str) -> tuple[str, dict[str, str]]:
    """(auto, torch or ours, {op or group: implementation})."""
    base, pairs = "auto", {}
    for index, item in enumerate(part.strip() for part in text.split(",")):
        if index == 0 and item in _FOR_ALL:
            base = item
            continue
        name, equals, how = (part.strip() for part in item.partition("="))
        if not equals:
            raise UserError(f"--kernels: {item!r} is neither OP=IMPL nor, in front, one of {', '.join(_FOR_ALL)}")
        if name in pairs:
            raise UserError(f"--kernels: {name} is given twice")
        pairs[name] = _implementation(name, how)
    return base, pairs


def _implementation(name: str, how: str) -> str:
    known = [*GROUPS, *OPS]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        raise UserError(f"--kernels: unknown op {name!r}; {'close' if close else 'known'}: {', '.join(close or known)}")
    has = [i for i in IMPLEMENTATIONS if any(i in OPS[op] for op in kernel_choice.members(name))]
    if how not in has:
        raise UserError(f"--kernels: {name} has no implementation {how!r}; it has {', '.join(has)}")
    return how
