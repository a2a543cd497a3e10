"""Bucket edges by dynamic programming: the classes of lengths that a plan lists, and what rounding to them would cost.

The dispatcher works on raw lengths; buckets are for planning, so their error is a figure to print, not one to pay.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.lengths import Lengths

Array = NDArray[np.float64]
IntArray = NDArray[np.int64]
_MOST_POINTS = 768  # distinct lengths that the program looks at; more are joined to their neighbours above


@dataclass(frozen=True, slots=True, kw_only=True)
class Edges:
    """Upper edges, ascending, the last being the longest length; `error_frac`: work added by rounding up to them."""

    tokens: tuple[int, ...]
    error_frac: float


def best_edges(lengths: Lengths, cost_N: Array, error_frac: float, most: int) -> Edges:
    """The fewest edges whose rounding error is at most `error_frac`, or `most` of them with the least error.

    `cost_N`: seconds of a sequence of each length; error = sum share (cost(edge) - cost(s)) / sum share cost(s)
    (SYSTEMS.md 4.4: cost instead of FlexSP's token rounding). The program is exact on the joined lengths.
    """
    at = _joined(lengths)
    share = np.add.reduceat(lengths.share_N, np.concatenate([[0], at[:-1] + 1]))
    cost, exact = cost_N[at], float(lengths.share_N @ cost_N)
    sums = np.concatenate([[0.0], np.cumsum(share)])
    size = len(at)
    # total[i] = least rounded cost of the first i lengths with b edges; an edge at j rounds i..j up to cost[j].
    total = np.concatenate([[0.0], np.full(size, np.inf)])
    chosen: list[IntArray] = []
    for _ in range(min(most, size)):
        added = cost[None, :] * (sums[None, 1:] - sums[:-1, None])  # (first, last)
        options = np.where(np.tri(size, k=-1, dtype=bool), np.inf, total[:-1, None] + added)
        first = options.argmin(axis=0)
        total = np.concatenate([[np.inf], options[first, np.arange(size)]])
        chosen.append(first)
        if total[-1] / exact - 1 <= error_frac:
            break
    edges, end = [], size - 1
    for first in reversed(chosen):
        edges.append(int(lengths.tokens_N[at[end]]))
        end = int(first[end]) - 1
    return Edges(tokens=tuple(reversed(edges)), error_frac=max(0.0, float(total[-1]) / exact - 1))


def _joined(lengths: Lengths) -> IntArray:
    """Places of the lengths that edges may have: all, or the last of each of `_MOST_POINTS` log-spaced classes."""
    size = len(lengths.tokens_N)
    if size <= _MOST_POINTS:
        return np.arange(size)
    log = np.log(lengths.tokens_N)
    cell = np.minimum(((log - log[0]) / (log[-1] - log[0]) * _MOST_POINTS).astype(np.int64), _MOST_POINTS - 1)
    return np.append(np.flatnonzero(np.diff(cell)), size - 1)


def bucket_of(edges: Edges, tokens: IntArray) -> IntArray:
    """Bucket of each length."""
    return np.asarray(np.searchsorted(np.array(edges.tokens), tokens))
