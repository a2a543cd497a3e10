"""Why a plan is what it is: where time and memory go, what binds, and what another layout would do. No I/O."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from planner.costmodel.estimate import estimate
from planner.costmodel.evidence import Quantity
from planner.costmodel.graph import ModelGraph
from planner.costmodel.hardware import ClusterSpec
from planner.costmodel.keys import Machine
from planner.costmodel.strategy import PlanSpec
from planner.plan import Part, Plan
from planner.render import Grid, percent
from planner.views import leaves

_FASTER = 1.1  # what "10 % more of it" multiplies


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """How much faster the same plan is with 10 % more of something."""

    what: str
    gain_frac: float


def sensitivities(graph: ModelGraph, machine: Machine, spec: PlanSpec) -> tuple[Sensitivity, ...]:
    """What binds: the plan priced again with 10 % more of each resource, largest gain first."""
    now_s = estimate(graph, machine, spec).step_s
    found = []
    for what, cluster in _faster(machine.cluster):
        then_s = estimate(graph, replace(machine, cluster=cluster), spec).step_s
        found.append(Sensitivity(what=what, gain_frac=1 - then_s / now_s))
    return tuple(sorted(found, key=lambda item: -item.gain_frac))


def _faster(cluster: ClusterSpec) -> Iterator[tuple[str, ClusterSpec]]:
    device = cluster.device
    peaks = {dtype: _more(rate) for dtype, rate in device.peak_flops_per_s.items()}
    yield "compute (peak FLOP/s)", replace(cluster, device=replace(device, peak_flops_per_s=peaks))
    hbm = replace(device, hbm_bytes_per_s=_more(device.hbm_bytes_per_s))
    yield "memory bandwidth", replace(cluster, device=hbm)
    host = replace(device, host_link_bytes_per_s=_more(device.host_link_bytes_per_s))
    yield "host link", replace(cluster, device=host)
    for i, tier in enumerate(cluster.tiers):
        faster = replace(tier, bandwidth_bytes_per_s=_more(tier.bandwidth_bytes_per_s))
        tiers = (*cluster.tiers[:i], faster, *cluster.tiers[i + 1 :])
        yield f"{tier.name} bandwidth", replace(cluster, tiers=tiers)


def _more(quantity: Quantity) -> Quantity:
    return replace(quantity, value=quantity.value * _FASTER)


def time_grid(part: Part) -> Grid:
    """The breakdown as a tree with shares and evidence; nothing that takes no time."""
    rows = tuple(
        ("  " * depth + node.name, f"{node.time_s:.4g}", percent(node.time_s / part.time_s), node.evidence)
        for depth, node in _walk(part, 0)
        if node.time_s > 0
    )
    return Grid(columns=("<where the time goes", "s", "%", "<evidence"), rows=rows)


def _walk(part: Part, depth: int) -> Iterator[tuple[int, Part]]:
    yield depth, part
    for child in part.children:
        yield from _walk(child, depth + 1)


def binding_lines(plan: Plan, found: tuple[Sensitivity, ...]) -> tuple[str, ...]:
    """What keeps the plan from being faster: memory, the bubble, and the resources that would help most."""
    predicted = plan.predicted
    fullest = max(predicted.memory, key=lambda rank: rank.peak_bytes)
    used = fullest.peak_bytes / predicted.memory_limit_bytes
    verb = "binds" if used > 0.95 else "does not bind"
    helps = [f"{item.what} {100 * item.gain_frac:.1f} %" for item in found if item.gain_frac >= 0.0005]
    return (
        f"memory   {verb}: rank {fullest.rank} uses {percent(used, 0)} % of what the margin leaves",
        f"binds    10 % more of each would make this plan faster by: {', '.join(helps[:5]) or 'nothing'}",
    )


def why_not(plan: Plan, number: int) -> str:
    """Why runner-up `number` (from 2) lost: where it is slower and where it gains."""
    other = plan.alternatives[number - 2]
    mine = {leaf.name: leaf.time_s for leaf in leaves(plan.predicted.breakdown)}
    return f"#{number}       {compare_leaves(mine, other.leaves_s)}"


def compare_leaves(mine: dict[str, float], other: dict[str, float]) -> str:
    """How much slower `other` is and by which leaves: `slower by 0.12 s: tp +0.15; gains bubble -0.03`."""
    change = {name: other.get(name, 0.0) - mine.get(name, 0.0) for name in {**mine, **other}}
    total, before = sum(change.values()), sum(mine.values())
    floor = max(0.0005 * before, 0.02 * abs(total))
    worse = sorted(((d, n) for n, d in change.items() if d > floor), reverse=True)
    better = sorted((d, n) for n, d in change.items() if d < -floor)
    text = f"{'slower' if total >= 0 else 'faster'} by {abs(total):.3g} s ({100 * abs(total) / before:.2f} %)"
    text += f": {', '.join(f'{n} {d:+.3g}' for d, n in worse)}" if worse else ""
    return text + (f"; gains {', '.join(f'{n} {d:+.3g}' for d, n in better)}" if better else "")
