"""Does a profile still describe this machine? A few of its samples are measured again."""

from __future__ import annotations

from collections.abc import Callable

from planner.costmodel.graph import ModelGraph
from planner.costmodel.profile import Profile, Sample
from planner.costmodel.profile_diff import Change, compare
from planner.profiler.cases import Case, layer_cases
from planner.profiler.profile import Outcome, Progress, Request, measure_cases


def check_cases(profile: Profile, ranks: int, threads: int, graph: ModelGraph | None) -> list[Case]:
    """The largest and a middling sample of every kernel, and of every layer that is in `graph`."""
    paths = {case.name: case.path for case in layer_cases(graph)} if graph else {}
    kernels: dict[tuple[object, ...], list[Sample]] = {}
    for sample in profile.samples:
        place = profile.where(sample)
        if (place.ranks, place.threads) == (ranks, threads) and (sample.kind != "layer" or sample.name in paths):
            group = (sample.dims.get("ranks"), sample.dims.get("stride"))
            kernels.setdefault((sample.kind, sample.name, sample.dtype, group), []).append(sample)
    chosen: list[Sample] = []
    for samples in kernels.values():
        samples.sort(key=lambda s: s.time_s)
        chosen += {id(s): s for s in (samples[-1], samples[len(samples) // 2])}.values()
    return [
        Case(kind=s.kind, name=s.name, dtype=s.dtype, dims=dict(s.dims), weight=1.0, path=paths.get(s.name, ""))
        for s in sorted(chosen, key=lambda s: s.time_s)
    ]


def check(
    profile: Profile, request: Request, on_progress: Callable[[Progress], None] | None = None
) -> tuple[tuple[Change, ...], Outcome]:
    """(what changed, the run that found it)."""
    cases = check_cases(profile, request.ranks, request.threads, request.graph)
    outcome = measure_cases(request, cases, on_progress=on_progress)
    return compare(profile, outcome.profile), outcome
