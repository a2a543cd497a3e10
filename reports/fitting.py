"""Small fitting tools for `calibrate`: Nelder-Mead on bounded parameters, relative errors, folds. numpy only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
SEED = 20261124


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One constant to fit inside [low, high], from `start`; `log` steps in ratios instead of differences."""

    name: str
    start: float
    low: float
    high: float
    log: bool = False


def _to_free(parameters: Sequence[Parameter], values: Array) -> Array:
    """Bounded values to the real line: logit of the place between the bounds."""
    free = []
    for item, value in zip(parameters, values, strict=True):
        low, high, x = np.log((item.low, item.high, value)) if item.log else (item.low, item.high, value)
        place = np.clip((x - low) / (high - low), 1e-4, 1 - 1e-4)
        free.append(np.log(place / (1 - place)))
    return np.array(free)


def _from_free(parameters: Sequence[Parameter], free: Array) -> Array:
    values = []
    for item, x in zip(parameters, free, strict=True):
        place = 1 / (1 + np.exp(-np.clip(x, -30, 30)))
        low, high = np.log((item.low, item.high)) if item.log else (item.low, item.high)
        value = low + place * (high - low)
        values.append(float(np.exp(value)) if item.log else float(value))
    return np.array(values)


def fit(
    parameters: Sequence[Parameter], loss: Callable[[dict[str, float]], float], iterations: int
) -> dict[str, float]:
    """Minimise `loss` over the bounded parameters by Nelder-Mead (1965), restarted once from its own answer."""
    names = [item.name for item in parameters]

    def at(free: Array) -> float:
        return loss(dict(zip(names, _from_free(parameters, free), strict=True)))

    best = _to_free(parameters, np.array([item.start for item in parameters]))
    for step in (1.0, 0.5):
        best = _nelder_mead(at, best, step, iterations // 2)
    return {name: float(f"{value:.4g}") for name, value in zip(names, _from_free(parameters, best), strict=True)}


def _nelder_mead(at: Callable[[Array], float], start: Array, step: float, iterations: int) -> Array:
    size = len(start)
    simplex = np.vstack([start, start + step * np.eye(size)])
    values = np.array([at(point) for point in simplex])
    for _ in range(iterations):
        order = np.argsort(values, kind="stable")
        simplex, values = simplex[order], values[order]
        if values[-1] - values[0] < 1e-7:
            break
        centre = simplex[:-1].mean(axis=0)
        point = 2 * centre - simplex[-1]
        value = at(point)
        if value < values[0]:
            farther = 3 * centre - 2 * simplex[-1]
            value_farther = at(farther)
            if value_farther < value:
                point, value = farther, value_farther
        elif value >= values[-2]:
            towards = point if value < values[-1] else simplex[-1]
            point = 0.5 * (centre + towards)
            value = at(point)
            if value >= min(values[-1], at(towards)):
                simplex[1:] = simplex[0] + 0.5 * (simplex[1:] - simplex[0])
                values[1:] = [at(item) for item in simplex[1:]]
                continue
        simplex[-1], values[-1] = point, value
    return np.asarray(simplex[int(np.argmin(values))])


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """Relative errors of predictions: predicted/measured - 1, in fractions."""

    rows: int
    median_abs: float
    p90_abs: float
    bias: float  # median of the signed error

    def cells(self) -> str:
        """The four figures as Markdown cells."""
        return f"{self.rows} | {self.median_abs:.1%} | {self.p90_abs:.1%} | {self.bias:+.1%}"


def errors(predicted: Array, measured: Array) -> Errors:
    """Median and 90th percentile of |p/m - 1| and the median of p/m - 1."""
    relative = predicted / measured - 1
    return Errors(
        rows=len(relative),
        median_abs=float(np.median(np.abs(relative))),
        p90_abs=float(np.quantile(np.abs(relative), 0.9)),
        bias=float(np.median(relative)),
    )


def log_loss(predicted: Array, measured: Array) -> float:
    """Mean |ln(p/m)|: robust, and equal for too slow and too fast."""
    return float(np.mean(np.abs(np.log(predicted / measured))))


def folds(rows: int, count: int) -> list[NDArray[np.int64]]:
    """`count` random parts of range(rows), the same at every run."""
    return [np.sort(part) for part in np.array_split(np.random.default_rng(SEED).permutation(rows), count)]
