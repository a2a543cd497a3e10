"""Measured times in place of formulas: exact where a shape was measured, between its neighbours elsewhere.

All functions are vectorised and monotone in every size if the formula is, because a table is made monotone first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planner.costmodel.evidence import Source
from planner.costmodel.hardware import Table

Array = NDArray[np.float64]
SAME_FRAC = 1e-6  # sizes this close are the same size


def make_table(axes: tuple[str, ...], times_s: Mapping[tuple[float, ...], float]) -> Table:
    """A monotone table from measured seconds by sizes.

    Of two sizes, one at least as large in every axis, noise can make the larger one faster. Then both hulls, the
    least monotone function above and the greatest below the measurements, are averaged geometrically.
    """
    dims = sorted(times_s)
    x, t = np.array(dims, np.float64), np.array([times_s[row] for row in dims])
    below = (x[:, None, :] <= x[None, :, :]).all(axis=2)  # [i, j]: row i is no larger than row j
    upper = np.where(below, t[:, None], -np.inf).max(axis=0)
    lower = np.where(below, t[None, :], np.inf).min(axis=1)
    settled = np.sqrt(upper * lower)
    return Table(axes=axes, dims=tuple(tuple(map(float, row)) for row in dims), time_s=tuple(map(float, settled)))


def between(table: Table | None, sizes: Sequence[ArrayLike], formula_s: Array) -> Array:
    """`formula_s` kept between the measured times of smaller and of larger shapes; at a measured one, its time.

    max(L, min(formula, U)) with L the largest time of a row that is no larger in any axis, U the smallest time of one
    that is no smaller: monotone as a composition of monotone functions.
    """
    if table is None:
        return formula_s
    x, inverse = _distinct(sizes, formula_s.shape)
    low: Array = np.zeros(len(x))
    high: Array = np.full(len(x), np.inf)
    for row, time_s in zip(np.array(table.dims), table.time_s, strict=True):
        low = np.where((row <= x * (1 + SAME_FRAC)).all(axis=1), np.maximum(low, time_s), low)
        high = np.where((row >= x * (1 - SAME_FRAC)).all(axis=1), np.minimum(high, time_s), high)
    low, high = low[inverse].reshape(formula_s.shape), high[inverse].reshape(formula_s.shape)
    return np.asarray(np.maximum(low, np.minimum(formula_s, high)), np.float64)


def _distinct(sizes: Sequence[ArrayLike], shape: tuple[int, ...]) -> tuple[Array, NDArray[np.int64]]:
    """(distinct rows of sizes, which of them each point is): a search prices the same shape many times."""
    points = np.stack([np.broadcast_to(np.asarray(s, np.float64), shape).ravel() for s in sizes], axis=1)
    code = points @ np.sqrt(np.arange(2.0, 2.0 + points.shape[1]))  # almost surely different for different rows
    _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
    if (points[first][inverse] == points).all():
        return points[first], inverse
    return points, np.arange(len(points))


def along(table: Table, size: ArrayLike) -> Array:
    """Seconds at `size` of a table with one axis: straight lines between measured sizes (latency + size / rate).

    Below the smallest, its time (latency); above the largest, its rate.
    """
    x, t = np.array(table.dims)[:, 0], np.array(table.time_s)
    wanted = np.asarray(size, np.float64)
    inside = np.interp(wanted, x, t)
    return np.asarray(np.where(wanted > x[-1], t[-1] * wanted / x[-1], inside), np.float64)


def covered(table: Table | None, sizes: Sequence[float]) -> Source:
    """Evidence that a table gives for one shape: measured, interpolated (bounded on both sides), or modelled."""
    if table is None:
        return Source.MODELLED
    rows, x = np.array(table.dims), np.asarray(sizes, np.float64)
    if (np.abs(rows - x) <= SAME_FRAC * x).all(axis=1).any():
        return Source.MEASURED
    smaller, larger = (rows <= x).all(axis=1).any(), (rows >= x).all(axis=1).any()
    return Source.INTERPOLATED if smaller and larger else Source.MODELLED
