"""From layers per pipeline rank to virtual stages: how chunks are sized and which rank holds which stage."""

from __future__ import annotations

from collections.abc import Iterator

from planner.costmodel.pipeline import ScheduleKind


def even_counts(layers: int, pp: int, vpp: int) -> Iterator[tuple[int, ...]]:
    """Layers per rank of the even partitions: chunks of a rank are equal, chunks of two ranks differ by at most one.

    Longer chunks go to ranks next to each other; their run starts at any rank (one partition when none is longer).
    """
    if layers % vpp or layers // vpp < pp:
        return
    base, left = divmod(layers // vpp, pp)
    for start in range(pp - left + 1 if left else 1):
        yield tuple(vpp * (base + (start <= k < start + left)) for k in range(pp))


def stage_sizes(num_layers: tuple[int, ...], vpp: int, schedule: ScheduleKind) -> tuple[int, ...]:
    """Layers of every virtual stage, in pipeline order, from the layers of each rank (multiples of vpp).

    Chunks of a rank are equal: with unequal ones the ranks, which are in different chunks at a time, wait for each
    other, up to 19 % of a step that the closed form does not see.
    """
    sizes = tuple(n // vpp for n in num_layers)
    return sizes + sizes[::-1] if schedule is ScheduleKind.ZB_V else sizes * vpp


def stage_ranks(pp: int, vpp: int, schedule: ScheduleKind) -> tuple[int, ...]:
    """Pipeline rank of every virtual stage."""
    if schedule is ScheduleKind.ZB_V:
        return (*range(pp), *reversed(range(pp)))
    return tuple(s % pp for s in range(pp * vpp))
