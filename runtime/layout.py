"""Where this rank's part of a parameter lies in the unsplit model: the map that checkpoints and checks share."""

from __future__ import annotations

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
    shape = list(param.shape)  # of the TP-local tensor
    if dim:  # stacked experts, which TP leaves whole
        offsets, sizes = [0] * len(shape), list(shape)
        offsets[0], offsets[dim], sizes[dim] = p.expert_offset(item), first, count
        return [Box(tuple(offsets), (0,) * len(shape), tuple(sizes))]
    pieces = [(0, shape[cut.dim], 0)]  # (local start, length, whole start) along the cut dim
    if cut.kind:
        size, step = shape[cut.dim] // cut.outer, whole[cut.dim] // cut.outer
        (unit,) = p.ctx.held("tp", cut.units)
        pieces = [(o * size, size, o * step + unit * size) for o in range(cut.outer)]
    found = []
    for start, length, at in pieces:
        lo, hi = (max(start, first), min(start + length, first + count)) if cut.dim == 0 else (start, start + length)
        rows = count if cut.dim else hi - lo
        if hi <= lo or rows <= 0:
            continue
        offsets, local, sizes = [0] * len(shape), [0] * len(shape), list(shape)
        offsets[0], sizes[0] = first + p.expert_offset(item), count
        offsets[cut.dim], local[cut.dim], sizes[cut.dim] = at + lo - start, lo, hi - lo
        if cut.dim == 0:
            local[0] = lo - first
            offsets[0] += p.expert_offset(item)
        found.append(Box(tuple(offsets), tuple(local), tuple(sizes)))
    return found
