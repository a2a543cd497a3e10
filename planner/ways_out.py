"""When nothing fits: the space searched again with one thing relaxed each, cheapest first. No I/O."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from planner.build import Job
from planner.costmodel.estimate import machine_for
from planner.costmodel.keys import Machine
from planner.search import SearchOptions, search
from planner.space import Limits

_TIME_LIMIT_S = 5.0  # of one relaxed search; any plan that fits answers the question
_LEAST_MARGIN_FRAC = 0.02
_MORE_GPUS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class WayOut:
    """One relaxation that makes the job fit, with the step time that it gives."""

    text: str
    step_s: float
    num_gpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Relaxed:
    text: str
    machine: Machine
    batch: int
    limits: Limits
    margin_frac: float


def ways_out(job: Job, limits: Limits, most: int = 3) -> tuple[WayOut, ...]:
    """Up to `most` relaxations that fit: those on the same GPUs first, then by step time."""
    found: list[WayOut] = []
    for relaxed in _relaxations(job, limits):
        way = _try(job, relaxed)
        if way is not None:
            found.append(way)
    if len(found) < most:
        for relaxed in _more_gpus(job, limits):
            way = _try(job, relaxed)
            if way is not None:
                found.append(way)
                break
    found.sort(key=lambda way: (way.num_gpus, way.step_s))
    return tuple(found[:most])


def _try(job: Job, relaxed: _Relaxed) -> WayOut | None:
    options = SearchOptions(gap_frac=0.05, time_limit_s=_TIME_LIMIT_S, top=1, memory_margin_frac=relaxed.margin_frac)
    result = search(job.graph, relaxed.machine, relaxed.batch, relaxed.limits, options)
    if not result.plans:
        return None
    return WayOut(text=relaxed.text, step_s=result.plans[0].step_s, num_gpus=relaxed.machine.num_gpus)


def _relaxations(job: Job, limits: Limits) -> Iterator[_Relaxed]:
    same = _Relaxed(
        text="", machine=job.machine, batch=job.global_batch_size, limits=limits, margin_frac=job.memory_margin_frac
    )
    for name in sorted(limits.forbidden):
        text = f"allow {name} (take it out of --forbid)"
        yield replace(same, text=text, limits=replace(limits, forbidden=limits.forbidden - {name}))
    for name, value in limits.fixed.items():
        rest = {key: v for key, v in limits.fixed.items() if key != name}
        yield replace(same, text=f"do not fix {name}={value}", limits=replace(limits, fixed=rest))
    if job.memory_margin_frac > _LEAST_MARGIN_FRAC:
        yield replace(same, text=f"--memory-margin {_LEAST_MARGIN_FRAC}", margin_frac=_LEAST_MARGIN_FRAC)
    if limits.zero_stages != (0, 1, 2, 3):
        text = f"an engine or --forbid that allows every ZeRO stage (now {', '.join(map(str, limits.zero_stages))})"
        yield replace(same, text=text, limits=replace(limits, zero_stages=(0, 1, 2, 3)))
    num_gpus = job.machine.num_gpus
    if job.global_batch_size % num_gpus:
        batch = (job.global_batch_size // num_gpus + 1) * num_gpus
        yield replace(same, text=f"--global-batch {batch}", batch=batch)


def _more_gpus(job: Job, limits: Limits) -> Iterator[_Relaxed]:
    cluster, machine = job.machine.cluster, job.machine
    for factor in _MORE_GPUS:
        num_gpus = machine.num_gpus * factor
        if num_gpus > cluster.node_size:
            num_gpus = -(-num_gpus // cluster.node_size) * cluster.node_size
        yield _Relaxed(
            text=f"--gpus {num_gpus}",
            machine=machine_for(job.graph, cluster, machine.engine, num_gpus),
            batch=job.global_batch_size,
            limits=limits,
            margin_frac=job.memory_margin_frac,
        )
