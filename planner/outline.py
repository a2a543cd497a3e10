"""What a step takes beyond its bottleneck, vectorised: work of the whole model and shape of the pipeline.

Shapes: N cells or candidates, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.costmodel import pipeline
from planner.costmodel.graph import ModelGraph
from planner.costmodel.keys import Array
from planner.costmodel.pipeline import ScheduleKind
from planner.costmodel.price import LayerPrice
from planner.costmodel.rates import Prices, Rates
from planner.space import SCHEDULES, Cells, IntArray

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
