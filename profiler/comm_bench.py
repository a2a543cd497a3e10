"""Collectives as something to run, on all groups of a mesh axis at once: what one rank of each does counts."""

from __future__ import annotations

import torch
import torch.distributed as dist

from planner.profiler.cases import Case
from planner.profiler.timing import Job, Work

Group = dist.ProcessGroup


class Groups:
    """Process groups by (size, stride), made once and in the same order on every rank."""

    def __init__(self, rank: int, world: int) -> None:
        self._rank, self._world = rank, world
        self._made: dict[tuple[int, int, int], Group] = {}

    def get(self, size: int, stride: int, copy: int = 0) -> Group:
        """The group of this rank: ranks r0 + i stride; `copy` tells communicators over the same ranks apart."""
        if (size, stride, copy) not in self._made:
            for first in range(self._world):
                if first % (size * stride) >= stride:
                    continue
                ranks = [first + i * stride for i in range(size)]
                group = dist.new_group(ranks)
                if self._rank in ranks:
                    self._made[size, stride, copy] = group
        return self._made[size, stride, copy]


def make_comm(case: Case, device: torch.device, groups: Groups) -> Job:
    """The job of a collective, of two at once, or of one beside a GEMM."""
    size, stride = int(case.dims["ranks"]), int(case.dims["stride"])
    first = _collective(case, device, groups.get(size, stride))
    if case.kind == "collective":
        return Job(work=lambda: _wait(first()))
    if case.kind == "collective_pair":
        second = _collective(case, device, groups.get(size, stride, 1))
        return Job(work=lambda: _wait(first(), second()))
    m, n, k = (int(case.dims[name]) for name in "mnk")
    a, b, out = (torch.randn(shape, device=device) for shape in ((m, k), (k, n), (m, n)))

    def beside() -> None:
        started = first()
        torch.mm(a, b, out=out)
        _wait(started)

    return Job(work=beside)


def _wait(*started: object) -> None:
    for work in started:
        if isinstance(work, dist.Work):
            work.wait()


def _collective(case: Case, device: torch.device, group: Group) -> Work:
    """Starts the collective and returns what to wait for; sizes as in costmodel.comm."""
    size = group.size()
    elements = max(int(case.dims["num_bytes"]) // 4 // size, 1)
    part, whole = torch.ones(elements, device=device), torch.ones(elements * size, device=device)
    if case.name == "all_reduce":
        return lambda: dist.all_reduce(whole, group=group, async_op=True)
    if case.name == "all_gather":
        return lambda: dist.all_gather_into_tensor(whole, part, group=group, async_op=True)
    if case.name == "reduce_scatter":
        return lambda: dist.reduce_scatter_tensor(part, whole, group=group, async_op=True)
    if case.name == "all_to_all":
        other = torch.empty_like(whole)
        return lambda: dist.all_to_all_single(other, whole, group=group, async_op=True)
    return _one_way(case, device, group)


def _one_way(case: Case, device: torch.device, group: Group) -> Work:
    """Lower rank to upper rank of each pair, turned round at every call so that none runs ahead."""
    box = torch.ones(max(int(case.dims["num_bytes"]) // 4, 1), device=device)
    mine, other = group.rank(), dist.get_global_rank(group, 1 - group.rank())
    turn = 0

    def send() -> object:
        nonlocal turn
        turn = 1 - turn
        call = dist.isend if mine == turn else dist.irecv
        return call(box, other, group=group)

    return send
