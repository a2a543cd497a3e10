"""Does a profile still describe this machine? A few of its samples are measured again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from planner.costmodel.graph import ModelGraph
from planner.costmodel.profile import Profile, Sample
from planner.costmodel.profile_diff import Change, compare
from planner.profiler.cases import Case, layer_cases
from planner.profiler.profile import Outcome, Progress, Request, measure_cases


def check_cases(profile: Profile, ranks: int, threads: int, graphs: Mapping[str, ModelGraph]) -> list[Case]:
    """The largest and a middling sample of every kernel, and of every layer of `graphs`, which are by source."""
    layers = {c.name: c for source, graph in graphs.items() for c in layer_cases(graph, source)}
    kernels: dict[tuple[object, ...], list[Sample]] = {}
    for sample in profile.samples:
        place = profile.where(sample)
        if (place.ranks, place.threads) == (ranks, threads) and (sample.kind != "layer" or sample.name in layers):
            group = (sample.dims.get("ranks"), sample.dims.get("stride"))
            kernels.setdefault((sample.kind, sample.name, sample.dtype, group), []).append(sample)
    chosen: list[Sample] = []
    for samples in kernels.values():
        samples.sort(key=lambda s: s.time_s)
        chosen += {id(s): s for s in (samples[-1], samples[len(samples) // 2])}.values()
    found = []
    for s in sorted(chosen, key=lambda s: s.time_s):
        case = Case(kind=s.kind, name=s.name, dtype=s.dtype, dims=dict(s.dims), weight=1.0)
        layer = layers.get(s.name) if s.kind == "layer" else None
        found.append(replace(case, source=layer.source, path=layer.path) if layer else case)
    return found


def check(
    profile: Profile, request: Request, on_progress: Callable[[Progress], None] | None = None
) -> tuple[tuple[Change, ...], Outcome]:
    """(what changed, the run that found it)."""
    cases = check_cases(profile, request.ranks, request.threads, request.graphs)
    outcome = measure_cases(request, cases, on_progress=on_progress)
    return compare(profile, outcome.profile), outcome
