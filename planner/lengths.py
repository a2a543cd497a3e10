"""Sequence lengths as a weighted set: what a corpus looks like to the planner, and how batches are drawn from it.

Pure; readers of files are in read_lengths.py, published distributions in distributions.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
IntArray = NDArray[np.int64]
_POINTS = 96  # lengths that stand for one segment of a histogram
_TILTS = (-30.0, 30.0)  # exponents of the power law inside a segment
_KS_999 = 1.95  # Kolmogorov's quantile: a sample of n exceeds 1.95 / sqrt(n) once in a thousand


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Distinct lengths in tokens, ascending, each with its share of the sequences (`share_N` sums to 1).

    `cut_frac`: share of the sequences that were cut to the longest length.
    """

    name: str
    source: str
    tokens_N: IntArray
    share_N: Array
    cut_frac: float = 0.0

    @property
    def mean_tokens(self) -> float:
        """Tokens of a sequence on average."""
        return float(self.tokens_N @ self.share_N)

    @property
    def longest_tokens(self) -> int:
        """The longest sequence."""
        return int(self.tokens_N[-1])

    def cut(self, max_tokens: int) -> Lengths:
        """Sequences beyond `max_tokens` cut to it."""
        over = self.tokens_N > max_tokens
        if not over.any():
            return self
        tail = float(self.share_N[over].sum())
        inside = self.tokens_N < max_tokens
        at = float(self.share_N[self.tokens_N == max_tokens].sum()) + tail
        return replace(
            self,
            tokens_N=np.append(self.tokens_N[inside], max_tokens),
            share_N=np.append(self.share_N[inside], at),
            cut_frac=tail,
        )

    def sample(self, count: int, seed: int) -> IntArray:
        """`count` lengths drawn independently; the same seed gives the same lengths."""
        at = np.random.default_rng(seed).random(count)
        return self.tokens_N[np.minimum(np.searchsorted(np.cumsum(self.share_N), at), len(self.tokens_N) - 1)]

    def batches(self, count: int, tokens: int, seed: int) -> tuple[IntArray, ...]:
        """`count` global batches of `tokens` on average: equal numbers of sequences drawn from the distribution."""
        size = max(1, round(tokens / self.mean_tokens))
        return tuple(self.sample(size, seed + i) for i in range(count))


def from_samples(lengths: IntArray, name: str, source: str) -> Lengths:
    """Observed lengths, one per sequence. ValueError: none, or one below 1 token."""
    if not len(lengths):
        raise ValueError("no lengths")
    if int(lengths.min()) < 1:
        first = int(np.flatnonzero(lengths < 1)[0])
        raise ValueError(f"sequence {first} has {int(lengths[first])} tokens; every sequence needs at least 1")
    tokens, counts = np.unique(lengths, return_counts=True)
    return Lengths(name=name, source=source, tokens_N=tokens.astype(np.int64), share_N=counts / counts.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Lengths in (low, high]: their share of the sequences, and their mean length where it is known."""

    low: int
    high: int
    share: float
    mean_tokens: float | None = None


def from_segments(segments: tuple[Segment, ...], name: str, source: str) -> Lengths:
    """A histogram: inside a segment lengths follow the power law with its mean (log-uniform if that is unknown).

    ValueError: nothing in it, a segment that is empty, or a mean outside its segment.
    """
    used = [s for s in segments if s.share > 0]
    if not used:
        raise ValueError("no sequences in it")
    tokens, shares = zip(*(_spread(s) for s in used), strict=True)
    all_tokens, all_shares = np.concatenate(tokens), np.concatenate(shares)
    distinct, where = np.unique(all_tokens, return_inverse=True)
    share = np.bincount(where, weights=all_shares)
    return Lengths(name=name, source=source, tokens_N=distinct, share_N=share / share.sum())


def _spread(segment: Segment) -> tuple[IntArray, Array]:
    low, high = segment.low + 1, segment.high
    if not 1 <= low <= high:
        raise ValueError(f"segment ({segment.low}, {segment.high}] holds no length of at least 1 token")
    points = np.unique(np.rint(np.geomspace(low, high, _POINTS)).astype(np.int64))
    if segment.mean_tokens is None:
        return points, np.full(len(points), segment.share / len(points))
    if not low <= segment.mean_tokens <= high:
        raise ValueError(f"segment ({segment.low}, {segment.high}] cannot have a mean of {segment.mean_tokens:g}")
    below, above = _TILTS
    for _ in range(60):
        tilt = (below + above) / 2
        weight = _power(points, tilt)
        below, above = (tilt, above) if points @ weight < segment.mean_tokens else (below, tilt)
    return points, segment.share * _power(points, (below + above) / 2)


def _power(points: IntArray, tilt: float) -> Array:
    log = tilt * np.log(points / points[-1])
    weight = np.exp(log - log.max())
    return np.asarray(weight / weight.sum())


def from_lognormal(median: float, sigma: float, name: str, source: str, count: int = 4096) -> Lengths:
    """A log-normal by `count` equally likely lengths, the upper ones refined so that the tail is there."""
    normal = NormalDist()
    body = (np.arange(count) + 0.5) / count
    edges = np.concatenate([[0.0], 1 - np.geomspace(1.0, 1e-8, count)[1:]])
    middle = np.concatenate([body[body < 0.5], ((edges[1:] + edges[:-1]) / 2)[edges[:-1] >= 0.5]])
    bounds = np.concatenate([[0.0], (middle[1:] + middle[:-1]) / 2, [1.0]])
    tokens = [max(1, round(median * float(np.exp(sigma * normal.inv_cdf(float(p)))))) for p in middle]
    distinct, where = np.unique(np.array(tokens), return_inverse=True)
    share = np.asarray(np.bincount(where, weights=np.diff(bounds)), np.float64)
    return Lengths(name=name, source=source, tokens_N=distinct.astype(np.int64), share_N=share)


def drift(expected: Lengths, lengths: IntArray) -> str | None:
    """One line if `lengths` cannot be a sample of `expected` (Kolmogorov-Smirnov, 1 in 1000 false alarms)."""
    if not len(lengths):
        return None
    grid = np.union1d(expected.tokens_N, lengths)
    has = np.searchsorted(np.sort(lengths), grid, side="right") / len(lengths)
    cumulative = np.concatenate([[0.0], np.cumsum(expected.share_N)])
    should = cumulative[np.searchsorted(expected.tokens_N, grid, side="right")]
    distance = float(np.abs(has - should).max())
    limit = _KS_999 / len(lengths) ** 0.5
    if distance <= limit:
        return None
    at = int(grid[np.abs(has - should).argmax()])
    return (
        f"lengths drift from {expected.name}: {100 * has[np.abs(has - should).argmax()]:.1f} % of "
        f"{len(lengths):,} sequences have at most {at:,} tokens, planned for "
        f"{100 * should[np.abs(has - should).argmax()]:.1f} %; search again with the lengths of today"
    )
