"""From layers per pipeline rank to virtual stages: how chunks are sized and which rank holds which stage."""

from __future__ import annotations

from collections.abc import Iterator

from planner.costmodel.pipeline import ScheduleKind


def even_counts(layers: int, pp: int, vpp: int) -> Iterator[tuple[int, ...]]:
    """Layers per rank of the even partitions: every rank layers // pp, those left over to the ranks of one run.

    The run of longer ranks starts at any rank (one partition when nothing is left over).
    """
    base, left = divmod(layers, pp)
    if base < vpp:
        return
    for start in range(pp - left + 1 if left else 1):
        yield tuple(base + (start <= k < start + left) for k in range(pp))


def stage_sizes(num_layers: tuple[int, ...], vpp: int, schedule: ScheduleKind) -> tuple[int, ...]:
    """Layers of every virtual stage, in pipeline order, from the layers of each rank.

    A rank's chunks differ by at most one layer. The longer ones come first except for chunk 0, which is the last
    to grow (it holds the most micro-batches in flight), alike on all ranks: sum_c max_k size = max_k num_layers.
    """
    pp = len(num_layers)
    order = {c: n for n, c in enumerate([*range(1, vpp), 0])}
    sizes = [[n // vpp + (order[c] < n % vpp) for n in num_layers] for c in range(vpp)]
    if schedule is ScheduleKind.ZB_V:
        return tuple(sizes[0] + sizes[1][::-1])
    return tuple(size for chunk in sizes for size in chunk[:pp])


def stage_ranks(pp: int, vpp: int, schedule: ScheduleKind) -> tuple[int, ...]:
    """Pipeline rank of every virtual stage."""
    if schedule is ScheduleKind.ZB_V:
        return (*range(pp), *reversed(range(pp)))
    return tuple(s % pp for s in range(pp * vpp))
