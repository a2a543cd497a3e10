"""Which case to measure next: the one whose prediction is least certain, by how much of a step hangs on it.

Within a kernel the logarithm of time minus a smooth trend is a Gaussian process over the logarithms of the sizes; its
standard deviation is what a measurement would settle (the criterion of uncertainty sampling; Rasmussen and Williams
2006, equation 2.26).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from planner.profiler.cases import Case

Array = NDArray[np.float64]
_OCTAVES = 2.0  # distance in size over which times stay related
_PRIOR_SD = 0.5  # of log time over the trend before anything of the kernel is measured
SETTLED_SD = 0.04  # nothing worth measuring is left
_ALWAYS = 0.02  # least share of a case: rare shapes are measured in the end too


class Chooser:
    """The cases of a run and what has been measured of them."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self._cases = list(cases)
        self._done: dict[int, float] = {}  # index of a case -> relative spread
        self._groups: dict[tuple[str, str, str, tuple[float, ...]], list[int]] = {}
        for i, case in enumerate(self._cases):
            self._groups.setdefault(_kernel(case), []).append(i)
        self._scores = np.zeros(len(self._cases))
        for group in self._groups.values():
            self._rescore(group)

    def next(self) -> int | None:
        """Index of the case to measure; None when everything is settled."""
        if not len(self._scores) or self._scores.max() <= 0:
            return None
        return int(np.argmax(self._scores))

    def measured(self, index: int, spread_frac: float) -> None:
        """Note that a case was measured, with its relative standard deviation."""
        self._done[index] = spread_frac
        self._rescore(self._groups[_kernel(self._cases[index])])

    def failed(self, index: int) -> None:
        """Leave a case out."""
        self.measured(index, 0.0)

    @property
    def left(self) -> int:
        """Cases that are not settled yet."""
        return int((self._scores > 0).sum())

    def _rescore(self, group: list[int]) -> None:
        """Score = weight * sd for what is not measured, 0 for what is settled."""
        sds = _deviations(
            [self._features(i) for i in group], [self._features(i) for i in group if i in self._done],
            [self._done[i] for i in group if i in self._done],
        )  # fmt: skip
        largest = max(self._cases[i].weight for i in group)
        for i, sd in zip(group, sds, strict=True):
            share = self._cases[i].weight + _ALWAYS * largest
            settled = i in self._done or sd < SETTLED_SD
            self._scores[i] = 0.0 if settled else share * sd

    def _features(self, index: int) -> list[float]:
        return [math.log2(size) for size in self._cases[index].key[3]]


def _kernel(case: Case) -> tuple[str, str, str, tuple[float, ...]]:
    """Cases that tell about each other: the same kernel; of collectives also the same group."""
    group = (case.dims["ranks"], case.dims["stride"]) if "ranks" in case.dims else ()
    return (case.kind, case.name, case.dtype, group)


def _deviations(points: list[list[float]], known: list[list[float]], spreads: list[float]) -> Array:
    """Posterior standard deviation of log time at `points`."""
    if not known:
        return np.full(len(points), _PRIOR_SD)
    x, y = np.array(points), np.array(known)
    noise = np.diag(np.square(spreads) + 1e-6)
    inner = np.linalg.solve(_kernel_matrix(y, y) + noise, _kernel_matrix(y, x))
    variance = _PRIOR_SD**2 - np.einsum("ij,ij->j", _kernel_matrix(y, x), inner)
    return np.asarray(np.sqrt(np.maximum(variance, 0.0)), np.float64)


def _kernel_matrix(a: Array, b: Array) -> Array:
    apart = ((a[:, None, :] - b[None, :, :]) ** 2).sum(axis=2)
    return np.asarray(_PRIOR_SD**2 * np.exp(-apart / (2 * _OCTAVES**2)), np.float64)
