"""Bucket edges: the program against brute force, and its error against arithmetic."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from planner.buckets import best_edges, bucket_of
from planner.distributions import named
from planner.lengths import from_samples


def cost(tokens: np.ndarray) -> np.ndarray:
    return tokens + tokens.astype(float) ** 2 / 50


def error(lengths, edges: tuple[int, ...]) -> float:  # type: ignore[no-untyped-def]
    up = np.array(edges)[np.searchsorted(edges, lengths.tokens_N)]
    return float(lengths.share_N @ cost(up) / (lengths.share_N @ cost(lengths.tokens_N)) - 1)


@pytest.mark.parametrize("seed", range(10))
def test_edges_against_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = from_samples(rng.integers(1, 100, 10), "x", "y")
    tokens = lengths.tokens_N.tolist()
    for count in range(1, min(5, len(tokens)) + 1):
        found = best_edges(lengths, cost(lengths.tokens_N), 0.0, count)
        best = min(error(lengths, (*some, tokens[-1])) for some in itertools.combinations(tokens[:-1], count - 1))
        assert found.error_frac == pytest.approx(best, abs=1e-12)
        assert error(lengths, found.tokens) == pytest.approx(found.error_frac, abs=1e-12)


def test_the_fewest_edges_within_the_error() -> None:
    lengths = named("wikipedia").cut(196_608)
    seconds = cost(lengths.tokens_N)
    found = best_edges(lengths, seconds, 0.10, 64)
    assert found.error_frac <= 0.10
    assert best_edges(lengths, seconds, 0.0, len(found.tokens) - 1).error_frac > 0.10
    assert found.tokens[-1] == 196_608


def test_joining_many_lengths_keeps_the_error_honest() -> None:
    lengths = named("github").cut(196_608)
    assert len(lengths.tokens_N) > 768
    found = best_edges(lengths, cost(lengths.tokens_N), 0.0, 16)
    assert error(lengths, found.tokens) <= found.error_frac + 1e-9


def test_buckets_hold_their_upper_edge() -> None:
    found = best_edges(from_samples(np.array([1, 2, 50, 100]), "x", "y"), cost(np.array([1, 2, 50, 100])), 0.0, 2)
    assert bucket_of(found, np.array([1, found.tokens[0], found.tokens[0] + 1, 100])).tolist() == [0, 0, 1, 1]
