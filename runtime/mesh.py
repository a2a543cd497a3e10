"""Where this rank stands in a plan's mesh, and the process groups of its axes.

Axes, outermost first: pp, dp_replicate, dp_shard, ring, ulysses, tp. `data` runs over dp_replicate, dp_shard,
ring and ulysses: the ranks that hold the same parameters before ZeRO. Experts nest in it: rank d of data holds
expert shard d % ep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh

from planner.costmodel.strategy import PlanSpec
from planner.runtime.errors import RuntimePlanError

AXES = ("pp", "dp_replicate", "dp_shard", "ring", "ulysses", "tp")
_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}


def _find_group(table: NDArray[np.int64]) -> dist.ProcessGroup | None:
    """One group per row of `table`; the one of this rank, None if it is in no row. Collective over all ranks.

    Groups are kept for the life of the process group: equal rows of two plans share one.
    """
    mine = None
    for row in table.tolist():
        ranks = tuple(row)
        if ranks not in _groups and (dist.get_rank() in ranks or dist.get_backend() != "fake"):
            _groups[ranks] = dist.new_group(list(ranks))
        mine = _groups[ranks] if dist.get_rank() in ranks else mine
    return mine


def _make_groups(table: NDArray[np.int64]) -> dist.ProcessGroup:
    group = _find_group(table)
    assert group is not None, "every rank is in one row"
    return group


def forget_groups() -> None:
    """Drop the cache; call after destroy_process_group."""
    _groups.clear()


@dataclass(frozen=True)
class Mesh:
    """The mesh of one plan seen from one rank. Making it is collective: every rank must, in the same order."""

    spec: PlanSpec
    device_type: str

    def __post_init__(self) -> None:
        world, need = dist.get_world_size(), self.spec.num_gpus
        if world != need:
            axes = " x ".join(f"{name} {size}" for name, size in zip(AXES, self._sizes, strict=True) if size > 1)
            raise RuntimePlanError(
                f"the plan is for {need} ranks ({axes or 'one rank'}), torchrun started {world}: "
                f"start {need} or search again with --gpus {world}"
            )

    @property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self.spec, axis) for axis in AXES)

    @cached_property
    def ranks(self) -> NDArray[np.int64]:
        """Global ranks, one dim per axis."""
        return np.arange(self.spec.num_gpus).reshape(self._sizes)

    @cached_property
    def position(self) -> dict[str, int]:
        """Index of this rank on every axis, and on `data`."""
        found = [int(i) for i in np.argwhere(self.ranks == dist.get_rank())[0]]
        at = dict(zip(AXES, found, strict=True))
        s = self.spec
        at["data"] = ((at["dp_replicate"] * s.dp_shard + at["dp_shard"]) * s.ring + at["ring"]) * s.ulysses
        at["data"] += at["ulysses"]
        at["dp"] = at["dp_replicate"] * s.dp_shard + at["dp_shard"]
        return at

    def _rows(self, axes: Sequence[str]) -> NDArray[np.int64]:
        """All groups that run over `axes` (in mesh order), one a row."""
        inside = [i for i, name in enumerate(AXES) if name in axes]
        outside = [i for i in range(len(AXES)) if i not in inside]
        size = 1
        for i in inside:
            size *= self._sizes[i]
        return self.ranks.transpose(*outside, *inside).reshape(-1, size)

    def group(self, *axes: str) -> dist.ProcessGroup:
        """The process group of this rank that runs over `axes`."""
        return _make_groups(self._rows(axes))

    @cached_property
    def tp(self) -> dist.ProcessGroup:
        """Tensor-parallel ranks."""
        return self.group("tp")

    @cached_property
    def pp(self) -> dist.ProcessGroup:
        """Pipeline ranks."""
        return self.group("pp")

    @cached_property
    def ulysses(self) -> dist.ProcessGroup:
        """Ranks that exchange heads for sequence."""
        return self.group("ulysses")

    @cached_property
    def ring(self) -> dist.ProcessGroup:
        """Ranks that pass keys and values around."""
        return self.group("ring")

    @cached_property
    def data(self) -> dist.ProcessGroup:
        """Ranks with the same parameters: replicas, shards, context."""
        return self.group("dp_replicate", "dp_shard", "ring", "ulysses")

    @cached_property
    def ends(self) -> dist.ProcessGroup | None:
        """The two ends of the pipeline in this rank's column, which hold tied parameters; None between."""
        last = self.spec.rank_of(len(self.spec.stage_layers) - 1)
        return _find_group(self.ranks[[0, last]].reshape(2, -1).T) if last else None

    def tp_sharing(self, units: int) -> dist.ProcessGroup:
        """Ranks of the TP group that hold the same unit when `units` < tp of them exist (KV heads)."""
        return _make_groups(self._rows(("tp",)).reshape(-1, self.spec.tp // units))

    @cached_property
    def experts(self) -> dist.ProcessGroup:
        """Ranks that together hold every expert once."""
        rows = self._rows(("dp_replicate", "dp_shard", "ring", "ulysses"))
        return _make_groups(rows.reshape(-1, self.spec.ep))

    def data_groups(self, ulysses: int, ring: int) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
        """(Ulysses, ring) group of this rank when aligned blocks of `ulysses` x `ring` data ranks work together.

        None for a group of one rank, and where the blocks leave the last ranks over.
        """
        rows = self._rows(("dp_replicate", "dp_shard", "ring", "ulysses"))
        block = ulysses * ring
        table = rows[:, : rows.shape[1] // block * block].reshape(-1, ring, ulysses)
        inner = _find_group(table.reshape(-1, ulysses)) if ulysses > 1 else None
        outer = _find_group(table.transpose(0, 2, 1).reshape(-1, ring)) if ring > 1 else None
        return inner, outer

    def dense_mesh(self) -> DeviceMesh:
        """(replicate, shard) mesh of dense parameters; everything replicates under ZeRO 0."""
        rows = self._rows(("dp_replicate", "dp_shard", "ring", "ulysses"))
        shard = self.spec.dp_shard * self.spec.cp if self.spec.zero_stage else 1
        return self._data_mesh(rows, shard)

    def expert_mesh(self) -> DeviceMesh:
        """(replicate, shard) mesh of expert parameters, over the ranks that hold the same experts."""
        rows = self._rows(("dp_replicate", "dp_shard", "ring", "ulysses"))
        rows = rows.reshape(len(rows), -1, self.spec.ep).transpose(0, 2, 1).reshape(-1, rows.shape[1] // self.spec.ep)
        shard = max(self.spec.dp_shard * self.spec.cp // self.spec.ep, 1) if self.spec.zero_stage else 1
        return self._data_mesh(rows, shard)

    def _data_mesh(self, rows: NDArray[np.int64], shard: int) -> DeviceMesh:
        table = rows.reshape(len(rows), -1, shard)
        mine = table[(table == dist.get_rank()).any(axis=(1, 2))][0]
        replicate = _make_groups(table.transpose(0, 2, 1).reshape(-1, table.shape[1]))
        group = _make_groups(table.reshape(-1, shard))
        with unset_fake_temporarily():  # a dry run's fake tensors have no values
            return DeviceMesh.from_group(
                [replicate, group], self.device_type, mesh=torch.from_numpy(mine.copy()),
                mesh_dim_names=("replicate", "shard"),
            )  # fmt: skip
