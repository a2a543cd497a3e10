"""How much of the model groups of ranks can hold under a bottleneck theta: LP duality over time and memory.

Shapes: K candidates, C classes, S strategies.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.costmodel import pipeline
from planner.costmodel.graph import ModelGraph
from planner.costmodel.keys import Array
from planner.costmodel.pipeline import ScheduleKind
from planner.costmodel.rates import Rates
from planner.outline import IDEAL, Shape, class_counts
from planner.space import SCHEDULES, IntArray

_MIDDLE_GROUPS = 6  # ranks between the ends share a bound in so many groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Ranks that share a bound, arrays (K,): how many, micro-batches in flight of the one with most room, and what
    its ends take of its time and memory.
    """

    count: Array
    flight: Array
    end_s: Array
    end_bytes: Array


class Caps:
    """Upper bounds on what groups of ranks can hold under a bottleneck theta, in two currencies.

    Seconds of any layers, and whole layers of the most frequent class. For the latter a rank also keeps free the
    transient bytes of the worst strategy it uses: the best over every limit on them.
    """

    def __init__(
        self, graph: ModelGraph, rates: Rates, shape: Shape, groups: list[Group], room: list[Array], at: IntArray
    ) -> None:
        counts = class_counts(graph)
        main = int(np.argmax(counts))
        base = (rates.forward_s_CK + rates.backward_s_CK + rates.weight_s_CK)[:, at]
        slow = base[:, None, :] + rates.extra_s_CSK[:, :, at]  # (C, S, K)
        act, state = rates.activation_bytes_CSK[:, :, at], rates.state_bytes_CK[:, at]
        self.p2p = shape.p2p_s[at]
        self.ranks = [(g.count[at], g.end_s[at]) for g in groups]
        room = [r[at] for r in room]
        weights = [state[:, None, :] + group.flight[at] * act for group in groups]
        self.layers_needed = counts[main]
        self.unit = shape.vpp[at] if len(counts) == 1 else np.ones(len(at))  # layers come vpp at a time (stages.py)
        one = np.ones_like(base[:1])
        self.layers: list[list[_Plane]] = [[] for _ in groups]
        work = rates.work_bytes_CSK[main][:, at]
        limits = work if (shape.schedule != IDEAL).all() else np.zeros_like(work[:1])
        for limit in limits:
            allowed = np.where(work <= limit, slow[main], np.inf) if len(limits) > 1 else slow[main]
            for planes, weight, free in zip(self.layers, weights, room, strict=True):
                planes.append(_Plane(room=free - limit, points=_duals(one, allowed[None], weight[main][None], 0)))
        self.seconds_needed = counts @ base
        self.seconds = [
            [_Plane(room=free, points=_duals(base, slow, weight, main))]
            for weight, free in zip(weights, room, strict=True)
            if len(counts) > 1
        ]

    def enough(self, theta: Array) -> NDArray[np.bool_]:
        """Whether all ranks together can hold the model when none works longer than `theta`."""
        ok = self._total(theta, self.layers, True) >= self.layers_needed
        if self.seconds:
            ok &= self._total(theta, self.seconds, False) >= self.seconds_needed * (1 - 1e-9)
        return np.asarray(ok)

    def _total(self, theta: Array, planes: list[list[_Plane]], whole: bool) -> Array:
        total = np.zeros_like(theta)
        for (count, end), options in zip(self.ranks, planes, strict=True):
            time = theta - end - self.p2p
            most = np.zeros_like(theta)
            for plane in options:
                cap = np.full_like(theta, np.inf)
                for lam, mu in plane.points:
                    cap = np.minimum(cap, lam * np.maximum(time, 0.0) + mu * plane.room)
                most = np.maximum(most, cap)
            most = np.where(time < 0, 0.0, most)
            total = total + count * (np.floor(most / self.unit + 1e-6) * self.unit if whole else most)
        return total


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plane:
    """Dual points of a rank with `room` bytes: it holds at most min over them of lambda time + mu room."""

    room: Array
    points: list[tuple[Array, Array]]


def _duals(value: Array, slow: Array, weight: Array, main: int) -> list[tuple[Array, Array]]:
    """Dual points (lambda, mu), arrays (K,): lambda slow + mu weight >= value for every class and strategy.

    mu = 0, mu at which two strategies of class `main` tie, and lambda = 0. Any mu >= 0 gives a valid lambda.
    """
    fast = 1 / slow  # 0 for a strategy that is not allowed
    worth, load = value[:, None, :] * fast, weight * fast
    steep = np.max(value[:, None, :] / np.maximum(weight, 1.0), axis=(0, 1))
    mus = [np.zeros_like(steep), steep]
    for s, q in itertools.combinations(range(slow.shape[1]), 2):
        bend = load[main, s] - load[main, q]
        mu = (worth[main, s] - worth[main, q]) / np.where(bend == 0, np.inf, bend)
        mus.append(np.clip(mu, 0.0, steep))
    points: list[tuple[Array, Array]] = []
    for mu in mus:
        lam = np.zeros_like(mu)
        for c, s in itertools.product(*map(range, slow.shape[:2])):
            np.maximum(lam, worth[c, s] - mu * load[c, s], out=lam)
        points.append((lam, mu))
    return points


def rank_groups(rates: Rates, shape: Shape) -> list[Group]:
    """First rank, last rank, and the middle ones by their place; a group has the room of its emptiest rank."""
    first, last = rates.prologue, rates.epilogue
    first_s, last_s = (e.forward_s + e.backward_s + e.weight_s for e in (first, last))
    last_bytes = last.state_bytes + last.activation_bytes + last.work_bytes
    both = (shape.schedule == SCHEDULES.index(ScheduleKind.ZB_V)) | (shape.pp == 1)
    at_first = _flight(shape, np.zeros_like(shape.pp))
    at_last = _flight(shape, shape.pp - 1)
    if (shape.schedule == IDEAL).all():
        return _spread(shape, np.zeros_like(shape.pp), shape.pp)
    placed = shape.schedule != IDEAL
    first_bytes = first.state_bytes + at_first * first.activation_bytes + np.where(both, last_bytes, 0.0)
    groups = [
        Group(
            count=np.ones_like(shape.pp), flight=at_first, end_s=placed * (first_s + np.where(both, last_s, 0.0)),
            end_bytes=placed * first_bytes,
        ),
        Group(
            count=np.where(shape.pp > 1, 1.0, 0.0), flight=at_last, end_s=placed * np.where(both, 0.0, last_s),
            end_bytes=placed * np.where(both, 0.0, last_bytes),
        ),
    ]  # fmt: skip
    return groups + _spread(shape, np.ones_like(shape.pp), np.maximum(shape.pp - 1, 1.0))


def _spread(shape: Shape, first: Array, end: Array) -> list[Group]:
    """Ranks first ... end - 1, without ends, in groups; flight falls with the rank (pipeline.in_flight_array)."""
    edges = [first + np.floor((end - first) * i / _MIDDLE_GROUPS) for i in range(_MIDDLE_GROUPS + 1)]
    zero = np.zeros_like(first)
    return [
        Group(count=stop - start, flight=_flight(shape, stop - 1), end_s=zero, end_bytes=zero)
        for start, stop in itertools.pairwise(edges)
    ]


def _flight(shape: Shape, rank: Array) -> Array:
    """Micro-batches in flight on `rank` (K,)."""
    flight = np.minimum(shape.m, shape.pp - np.clip(rank, 0, shape.pp - 1))
    for index, kind in enumerate(SCHEDULES):
        here = shape.schedule == index
        if here.any():
            flight[here] = pipeline.in_flight_array(
                kind, shape.m[here], shape.pp[here], shape.vpp[here], np.clip(rank[here], 0, shape.pp[here] - 1)
            )
    return flight
