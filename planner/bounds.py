"""Valid lower bounds on the step time, for all cells or candidates at once.

`cell_bounds` knows no state layout and no memory limit: balanced ranks, with whole layers where the model has one
class (SYSTEMS.md 4.5, bound 0). `candidate_bounds` adds both, for a cell's own schedule or for the IDEAL one that
bounds all cells of equal key and pp at once: with theta the bottleneck, rank k can hold work worth
at most cap_k(theta) seconds, by weak LP duality over its time and memory rows (bound 1); theta is too small while
the caps sum to less than the model. Shapes: N cells, K candidates, C classes, S strategies, G groups of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.costmodel import pipeline
from planner.costmodel.graph import ModelGraph
from planner.costmodel.pipeline import ScheduleKind
from planner.costmodel.price import Array, LayerPrice, Machine
from planner.costmodel.rates import Prices, Rates, boundary_bytes, p2p_s
from planner.costmodel.state import step_sync
from planner.space import SCHEDULES, Cells, IntArray

_MIDDLE_GROUPS = 6  # ranks between the ends share a bound in so many groups
_HALVINGS = 6  # of the interval of theta; ordering only, any number is valid
_SAFE = 1 - 1e-9  # bounds give up this much to rounding
IDEAL = -1  # a schedule better than all: no bubble, the memory of 1F1B, the ends anywhere


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Seconds of one micro-batch, arrays (N,): forward, input and weight gradient of all layers; per-layer total
    of each class (C, N); the two ends.
    """

    forward_s: Array
    backward_s: Array
    weight_s: Array
    layer_s_CN: Array
    first_s: Array
    last_s: Array

    @property
    def total_s(self) -> Array:
        """Everything that one micro-batch computes."""
        return self.forward_s + self.backward_s + self.weight_s


def class_counts(graph: ModelGraph) -> Array:
    """Layers of each class, (C,)."""
    return np.bincount(graph.layer_classes, minlength=len(graph.classes)).astype(float)


def work_of_prices(graph: ModelGraph, prices: Prices) -> Work:
    """Work of the whole model per key, without ZeRO communication."""
    counts = class_counts(graph)

    def total(name: str) -> Array:
        body = sum(n * getattr(p, name) for n, p in zip(counts, prices.classes, strict=True))
        return np.asarray(body + getattr(prices.prologue, name) + getattr(prices.epilogue, name))

    def layer(price: LayerPrice) -> Array:
        return price.forward_s + price.backward_input_s + price.weight_s

    return Work(
        forward_s=total("forward_s"), backward_s=total("backward_input_s"), weight_s=total("weight_s"),
        layer_s_CN=np.stack([layer(p) for p in prices.classes]), first_s=layer(prices.prologue),
        last_s=layer(prices.epilogue),
    )  # fmt: skip


def work_of_rates(graph: ModelGraph, rates: Rates) -> Work:
    """Work of the whole model per candidate, exposed ZeRO communication included."""
    counts = class_counts(graph)
    ends = (rates.prologue, rates.epilogue)
    fwd, bwd, wgt = (
        counts @ getattr(rates, f"{name}_CK") + sum(getattr(e, name) for e in ends)
        for name in ("forward_s", "backward_s", "weight_s")
    )
    first, last = (e.forward_s + e.backward_s + e.weight_s for e in ends)
    layer = rates.forward_s_CK + rates.backward_s_CK + rates.weight_s_CK
    return Work(forward_s=fwd, backward_s=bwd, weight_s=wgt, layer_s_CN=layer, first_s=first, last_s=last)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Pipeline shape of cells or candidates, arrays (N,); `p2p_s` is one rank's blocking transfers."""

    schedule: IntArray
    pp: Array
    vpp: Array
    m: Array
    p2p_s: Array

    def take(self, index: IntArray) -> Shape:
        """The shapes at `index`."""
        return Shape(
            schedule=self.schedule[index], pp=self.pp[index], vpp=self.vpp[index], m=self.m[index],
            p2p_s=self.p2p_s[index],
        )  # fmt: skip


def shape_of(cells: Cells, at: IntArray, transfer_s: Array) -> Shape:
    """Shape of the cells `at`; `transfer_s` is the blocking time of one transfer."""
    vpp = cells.vpp[at].astype(float)
    return Shape(
        schedule=cells.schedule[at], pp=cells.pp[at].astype(float), vpp=vpp,
        m=cells.num_microbatches[at].astype(float), p2p_s=2 * transfer_s * vpp,
    )  # fmt: skip


def ideal_shape(cells: Cells, at: IntArray) -> Shape:
    """Shape of the cells `at` under the IDEAL schedule, whatever theirs is."""
    one = np.ones(len(at))
    return Shape(
        schedule=np.full(len(at), IDEAL), pp=cells.pp[at].astype(float), vpp=one,
        m=cells.num_microbatches[at].astype(float), p2p_s=0 * one,
    )  # fmt: skip


def step_s(shape: Shape, work: Work, theta_s: Array) -> Array:
    """The pipeline's closed form with bottleneck `theta_s`, without once-per-step work.

    Recomputation counts in theta only, except that a single rank computes nothing but what is in theta.
    """
    moved = shape.pp * shape.p2p_s / 2
    alone = np.where(shape.pp == 1, np.maximum(theta_s - work.total_s, 0.0), 0.0)
    fwd, bwd = work.forward_s + moved, work.backward_s + moved
    total = np.where(shape.schedule == IDEAL, shape.m * theta_s, 0.0)
    for index, kind in enumerate(SCHEDULES):
        here = shape.schedule == index
        if not here.any():
            continue
        value = np.full(int(here.sum()), -np.inf)
        for a, c_f, c_b, c_w in pipeline.rows(kind, shape.m[here], shape.pp[here], shape.vpp[here]):
            row = a * theta_s[here] + c_f * fwd[here] + c_b * (bwd + alone)[here] + c_w * work.weight_s[here]
            value = np.maximum(value, row)
        total[here] = value
    return total


def theta_for(shape: Shape, work: Work, target_s: Array) -> Array:
    """Largest bottleneck with which the step takes no more than `target_s`; <= 0 when none does."""
    a = np.where(shape.schedule == SCHEDULES.index(ScheduleKind.ONE_F_ONE_B), shape.m - 1, shape.m)
    a = np.where(shape.schedule == SCHEDULES.index(ScheduleKind.INTERLEAVED), shape.m - 1 / shape.vpp, a)
    rest = step_s(shape, work, np.zeros_like(target_s))
    alone = (shape.pp == 1) & (target_s >= step_s(shape, work, work.total_s))
    within = np.where(target_s >= rest, target_s, 0.0)
    theta = np.where(a > 0, (target_s - rest) / np.maximum(a, 1e-12), within)
    return np.asarray(np.where(alone, target_s / shape.m, theta))


def least_theta(shape: Shape, work: Work, num_layers: int) -> Array:
    """Smallest bottleneck of any partition, memory left aside."""
    average = work.total_s / shape.pp + shape.p2p_s
    theta = np.maximum(average, np.max(work.layer_s_CN, axis=0) + shape.p2p_s)
    if len(work.layer_s_CN) == 1:
        theta = np.maximum(theta, _whole_layers(shape, work, num_layers))
    return theta


def _whole_layers(shape: Shape, work: Work, num_layers: int) -> Array:
    """Smallest theta at which whole layers fit: sum_k floor((theta - ends_k) / t) >= L, for one layer class."""
    t = np.maximum(work.layer_s_CN[0], 1e-12)
    both = (shape.schedule == SCHEDULES.index(ScheduleKind.ZB_V)) | (shape.pp == 1)
    placed = shape.schedule != IDEAL
    first = placed * (work.first_s + np.where(both, work.last_s, 0.0))
    last = np.where(both, 0.0, work.last_s) * placed
    middle = np.where(both, shape.pp - 1, shape.pp - 2)
    best = np.full_like(t, np.inf)
    base = np.ceil(num_layers / shape.pp)
    for end in (np.zeros_like(t), first, last):
        for extra in (-1, 0, 1):
            theta = np.maximum(base + extra, 1) * t + end
            room = middle * np.floor(theta / t + 1e-9) + np.floor(np.maximum(theta - first, 0) / t + 1e-9)
            room = room + np.where(both, 0.0, np.floor(np.maximum(theta - last, 0) / t + 1e-9))
            best = np.where((room >= num_layers) & (theta < best), theta, best)
    return np.asarray(np.where(np.isfinite(best), best + shape.p2p_s, 0.0))


def cell_bounds(graph: ModelGraph, prices: Prices, key: IntArray, cells: Cells, machine: Machine) -> Array:
    """Lower bound on the step time of every cell, (N,); `key[cell]` is its column in `prices`."""
    work = work_of_prices(graph, prices)
    boundary = boundary_bytes(prices)
    bound = np.empty(len(cells))
    for start in range(0, len(cells), 200_000):
        at = np.arange(start, min(start + 200_000, len(cells)))
        column = key[at]
        here = Work(
            forward_s=work.forward_s[column], backward_s=work.backward_s[column], weight_s=work.weight_s[column],
            layer_s_CN=work.layer_s_CN[:, column], first_s=work.first_s[column], last_s=work.last_s[column],
        )  # fmt: skip
        pp, vpp = cells.pp[at].astype(float), cells.vpp[at].astype(float)
        shape = shape_of(cells, at, p2p_s(boundary[column], pp, vpp, machine))
        bound[at] = step_s(shape, here, least_theta(shape, here, graph.num_layers)) * _SAFE
    return bound


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Ranks that share a bound, arrays (K,): how many, micro-batches in flight of the one with most room, and what
    its ends take of its time and memory.
    """

    count: Array
    flight: Array
    end_s: Array
    end_bytes: Array


def candidate_bounds(
    graph: ModelGraph, rates: Rates, shape: Shape, usable_bytes: float, machine: Machine, target_s: float,
) -> Array:  # fmt: skip
    """Lower bound on the step time of every candidate, (K,); +inf where nothing fits the memory.

    Bounds above `target_s` may be understated, never below it.
    """
    work = work_of_rates(graph, rates)
    low = least_theta(shape, work, graph.num_layers)
    target = np.full_like(low, target_s) if np.isfinite(target_s) else 4 * step_s(shape, work, low) + 4 * rates.step_s_K
    high = theta_for(shape, work, target - rates.step_s_K)
    sync = _least_sync(graph, rates, shape, high, machine)
    bound = step_s(shape, work, low) + rates.step_s_K + sync
    groups = _groups(rates, shape)
    room = [usable_bytes - rates.fixed_bytes_K - g.end_bytes for g in groups]
    open_ = (bound < target) & (np.min(np.stack([*room]), axis=0) >= 0)
    result = np.where(bound < target, np.inf, bound)
    at = np.flatnonzero(open_)
    if len(at):
        result[at] = _memory_bound(graph, rates, shape, work, groups, room, low, high, sync, at, np.isfinite(target_s))
    return result * _SAFE


def _memory_bound(
    graph: ModelGraph, rates: Rates, shape: Shape, work: Work, groups: list[_Group], room: list[Array],
    low: Array, high: Array, sync: Array, at: IntArray, finite: bool,
) -> Array:  # fmt: skip
    """Bisect theta between `low` and `high` for the candidates `at` by the summed caps of all ranks."""
    caps = _Caps(graph, rates, shape, groups, room, at)
    here = shape.take(at)
    part = Work(
        forward_s=work.forward_s[at], backward_s=work.backward_s[at], weight_s=work.weight_s[at],
        layer_s_CN=work.layer_s_CN[:, at], first_s=work.first_s[at], last_s=work.last_s[at],
    )  # fmt: skip
    lo, hi = low[at].copy(), high[at].copy()
    possible = caps.enough(hi)
    at_low = caps.enough(lo)
    for _ in range(_HALVINGS):
        middle = 0.5 * (lo + hi)
        ok = caps.enough(middle)
        hi, lo = np.where(ok, middle, hi), np.where(ok, lo, middle)
    theta = np.where(at_low, low[at], lo)
    value = step_s(here, part, theta) + rates.step_s_K[at] + sync[at]
    beyond = step_s(here, part, high[at]) + rates.step_s_K[at] + sync[at] if finite else np.full(len(at), np.inf)
    return np.where(possible, value, beyond)


class _Caps:
    """Upper bounds on the layer seconds that groups of ranks can hold under a bottleneck theta."""

    def __init__(
        self, graph: ModelGraph, rates: Rates, shape: Shape, groups: list[_Group], room: list[Array], at: IntArray
    ) -> None:
        base = (rates.forward_s_CK + rates.backward_s_CK + rates.weight_s_CK)[:, at]
        self.one_class = len(base) == 1
        self.layer_s = base[0]
        counts = class_counts(graph)
        self.needed = counts @ base if not self.one_class else np.full(len(at), counts[0])
        value = base if not self.one_class else np.ones_like(base)
        slow = base[:, None, :] + rates.extra_s_CSK[:, :, at]  # (C, S, K)
        self.p2p = shape.p2p_s[at]
        self.groups = [(g.count[at], g.end_s[at], r[at]) for g, r in zip(groups, room, strict=True)]
        self.duals: list[list[tuple[Array, Array]]] = []
        act, state = rates.activation_bytes_CSK[:, :, at], rates.state_bytes_CK[:, at]
        main = int(np.argmax(counts))
        for group in groups:
            weight = state[:, None, :] + group.flight[at] * act
            self.duals.append(_duals(value, slow, weight, main))

    def enough(self, theta: Array) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        """Whether all ranks together can hold the model when none works longer than `theta`."""
        total = np.zeros_like(theta)
        for (count, end, room), duals in zip(self.groups, self.duals, strict=True):
            time = theta - end - self.p2p
            cap = np.full_like(theta, np.inf)
            for lam, mu in duals:
                cap = np.minimum(cap, lam * np.maximum(time, 0.0) + mu * room)
            cap = np.where(time < 0, 0.0, cap)
            total = total + count * (np.floor(cap + 1e-6) if self.one_class else cap)
        return np.asarray(total >= self.needed * (1 - 1e-9))


def _duals(value: Array, slow: Array, weight: Array, main: int) -> list[tuple[Array, Array]]:
    """Dual points (lambda, mu), arrays (K,): lambda slow + mu weight >= value for every class and strategy.

    mu = 0, mu at which two strategies of class `main` tie, and lambda = 0. Any mu >= 0 gives a valid lambda.
    """
    points: list[tuple[Array, Array]] = []
    v = value[:, None, :]
    steep = np.max(v / np.maximum(weight, 1.0), axis=(0, 1))
    mus = [np.zeros_like(steep), steep]
    num = slow.shape[1]
    for s in range(num):
        for q in range(s + 1, num):
            fast, slower = 1 / slow[main, s], 1 / slow[main, q]
            bend = weight[main, s] * fast - weight[main, q] * slower
            mu = (fast - slower) * value[main] / np.where(bend == 0, np.inf, bend)
            mus.append(np.clip(mu, 0.0, steep))
    for mu in mus:
        lam = np.max((v - mu * weight) / slow, axis=(0, 1))
        points.append((np.maximum(lam, 0.0), mu))
    return points


def _groups(rates: Rates, shape: Shape) -> list[_Group]:
    """First rank, last rank, and the middle ones by their place; a group has the room of its emptiest rank."""
    first, last = rates.prologue, rates.epilogue
    first_s, last_s = (e.forward_s + e.backward_s + e.weight_s for e in (first, last))
    last_bytes = last.state_bytes + last.activation_bytes + last.work_bytes
    both = (shape.schedule == SCHEDULES.index(ScheduleKind.ZB_V)) | (shape.pp == 1)
    at_first = _flight(shape, np.zeros_like(shape.pp))
    at_last = _flight(shape, shape.pp - 1)
    placed = shape.schedule != IDEAL
    first_bytes = first.state_bytes + at_first * first.activation_bytes + np.where(both, last_bytes, 0.0)
    groups = [
        _Group(
            count=np.ones_like(shape.pp), flight=at_first, end_s=placed * (first_s + np.where(both, last_s, 0.0)),
            end_bytes=placed * first_bytes,
        ),
        _Group(
            count=np.where(shape.pp > 1, 1.0, 0.0), flight=at_last, end_s=placed * np.where(both, 0.0, last_s),
            end_bytes=placed * np.where(both, 0.0, last_bytes),
        ),
    ]  # fmt: skip
    middle = np.maximum(shape.pp - 2, 0.0)
    edges = [np.floor(middle * i / _MIDDLE_GROUPS) for i in range(_MIDDLE_GROUPS + 1)]
    zero = np.zeros_like(middle)
    for start, end in zip(edges, edges[1:], strict=False):
        groups.append(_Group(count=end - start, flight=_flight(shape, end), end_s=zero, end_bytes=zero))
    return groups


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


def _least_sync(graph: ModelGraph, rates: Rates, shape: Shape, theta_s: Array, machine: Machine) -> Array:
    """Once-per-step work of a rank that holds the average parameters, hidden behind windows no rank exceeds.

    Some rank holds at least the average of dense and some of routed parameters, and the work grows with both, so the
    larger of the two is a bound.
    """
    counts = class_counts(graph)
    window = np.maximum(theta_s, 0.0)
    zero = np.zeros_like(window)
    dense = (counts @ rates.dense_CK + rates.prologue.dense + rates.epilogue.dense) / shape.pp
    routed = (counts @ rates.routed_CK + rates.prologue.routed + rates.epilogue.routed) / shape.pp
    of_dense = step_sync(dense, zero, window, window * _backward_frac(rates), rates.layout, machine).total_s
    if not routed.any():
        return of_dense
    of_routed = step_sync(zero, routed, window, window * _backward_frac(rates), rates.layout, machine).total_s
    return np.maximum(of_dense, of_routed)


def _backward_frac(rates: Rates) -> Array:
    """Largest share of a rank's time that is backward: that of some layer, or half of a transfer's."""
    ends = (rates.prologue, rates.epilogue)
    forward = [*rates.forward_s_CK, *(e.forward_s for e in ends)]
    backward = [*(rates.backward_s_CK + rates.weight_s_CK), *(e.backward_s + e.weight_s for e in ends)]
    shares = [b / np.maximum(f + b, 1e-12) for f, b in zip(forward, backward, strict=True)]
    return np.asarray(np.max(np.stack(shares), axis=0, initial=0.5))
