"""Where this rank's part of a parameter lies in the unsplit model: the map that checkpoints and checks share."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from planner.runtime.optimizer import Owned
from planner.runtime.parallel import Parallel


@dataclass(frozen=True, slots=True)
class Box:
    """`sizes` elements at `offsets` of the whole parameter are those at `local` of this rank's tensor."""

    offsets: tuple[int, ...]
    local: tuple[int, ...]
    sizes: tuple[int, ...]

    def of_whole(self) -> tuple[slice, ...]:
        """Index into the whole parameter."""
        return tuple(slice(o, o + n) for o, n in zip(self.offsets, self.sizes, strict=True))

    def of_local(self) -> tuple[slice, ...]:
        """Index into this rank's tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.local, self.sizes, strict=True))


def _rows(param: torch.Tensor) -> tuple[int, int, int]:
    """Dim along which ZeRO shards the TP-local tensor; the first row of it on this rank, and how many."""
    if isinstance(param, DTensor):
        shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
        dim = next((s.dim for s in param.placements if isinstance(s, Shard)), 0)
        return dim, int(offset[dim]), int(shape[dim])
    return 0, 0, param.shape[0]


def boxes(p: Parallel, item: Owned) -> list[Box]:
    """Boxes of a parameter on this rank; empty where ZeRO left no row."""
    param, cut = item.param, item.cut
    whole = p.full_shapes[item.name]
    if not whole:
        return [Box((), (), ())]
    dim, first, count = _rows(param)
    shape = param.shape  # of the TP-local tensor
    runs = [[(0, size, 0)] for size in shape]  # of each dim: (local start, length, whole start)
    runs[0] = [(0, shape[0], p.expert_offset(item))]
    if cut.kind:
        size, step = shape[cut.dim] // cut.outer, whole[cut.dim] // cut.outer
        (unit,) = p.ctx.held("tp", cut.units)
        runs[cut.dim] = [(o * size, size, o * step + unit * size) for o in range(cut.outer)]
    held = [(max(start, first), min(start + length, first + count), at - start) for start, length, at in runs[dim]]
    runs[dim] = [(lo - first, hi - lo, lo + shift) for lo, hi, shift in held if hi > lo]
    return [
        Box(tuple(at for _, _, at in run), tuple(start for start, _, _ in run), tuple(length for _, length, _ in run))
        for run in itertools.product(*runs)
    ]
