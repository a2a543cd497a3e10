"""The innermost problem: which strategy for each layer of one rank, so that it fits and costs least.

A rank holds u[c] layers of class c. Equal layers are interchangeable, so the choice is how many of them take
each strategy (counts, not positions). Small cases are enumerated; large ones are relaxed to an LP whose
solution by greedy steps along each class's (bytes, seconds) hull gives a lower bound, and whose rounding up by
at most one layer gives a feasible choice (multiple-choice knapsack, Sinha and Zoltners 1979).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import comb, prod

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
IntArray = NDArray[np.int64]
MAX_ROWS = 12_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Strategies of every class: arrays (C, S) of extra seconds, activation, host and transient bytes."""

    extra_s: Array
    activation_bytes: Array
    host_bytes: Array
    work_bytes: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Best strategies of one count vector for P ranks: `extra_s` is +inf where nothing fits.

    `lower_s` <= the optimum <= `extra_s`, equal where `exact`. `counts` has shape (P, C, S).
    """

    extra_s: Array
    lower_s: Array
    counts: IntArray


@lru_cache(maxsize=4096)
def compositions(n: int, parts: int) -> IntArray:
    """All ways to write n as an ordered sum of `parts` non-negative integers, shape (R, parts)."""
    if parts == 1:
        return np.array([[n]], dtype=np.int64)
    blocks = []
    for first in range(n + 1):
        rest = compositions(n - first, parts - 1)
        blocks.append(np.column_stack([np.full(len(rest), first), rest]))
    return np.concatenate(blocks)


def undominated(options: Options, c: int) -> list[int]:
    """Allowed strategies of class c that no other matches or beats in time, GPU, host and transient bytes."""
    table = np.stack(
        [options.extra_s[c], options.activation_bytes[c], options.host_bytes[c], options.work_bytes[c]]
    )
    keep: list[int] = []
    order = sorted(np.flatnonzero(np.isfinite(table[0])).tolist(), key=lambda s: tuple(table[:, s]))
    for s in order:
        if not any(bool(np.all(table[:, q] <= table[:, s])) for q in keep):
            keep.append(s)
    return keep


def solve(u: IntArray, options: Options, flight: Array, budget: Array, host_budget: Array) -> Choice:
    """Choose strategies for u[c] layers of each class on P ranks.

    `flight` (P,): micro-batches in flight; `budget`, `host_budget` (P,): bytes left for activations and
    transients on the GPU, and for offloaded activations on the host.
    """
    kept = [undominated(options, c) if u[c] else [0] for c in range(len(u))]
    if not all(kept):
        nothing = np.full(len(flight), np.inf)
        return Choice(
            extra_s=nothing, lower_s=nothing, counts=np.zeros((len(flight), *options.extra_s.shape), np.int64)
        )
    # Strategies that are not allowed get no layers; infinite seconds times none would be no number.
    options = replace(options, extra_s=np.where(np.isfinite(options.extra_s), options.extra_s, 0.0))
    # Everything fits with the fastest choice of each class: the common case, answered at once.
    fastest = _fastest(u, options, kept, flight, budget, host_budget)
    if fastest is not None:
        return fastest
    rows = prod(comb(int(n) + len(k) - 1, len(k) - 1) for n, k in zip(u, kept, strict=True))
    if rows * len(flight) <= 64 * MAX_ROWS and rows <= MAX_ROWS:
        return _enumerate(u, options, kept, flight, budget, host_budget)
    return _greedy(u, options, kept, flight, budget, host_budget)


def _fastest(
    u: IntArray, options: Options, kept: list[list[int]], flight: Array, budget: Array, host_budget: Array
) -> Choice | None:
    best = [min(k, key=lambda s, c=c: float(options.extra_s[c, s])) for c, k in enumerate(kept)]  # type: ignore[misc]
    index = (np.arange(len(u)), np.array(best))
    used = u > 0
    act, host = u @ options.activation_bytes[index], u @ options.host_bytes[index]
    work = float(np.max(options.work_bytes[index], where=used, initial=0.0))
    if not np.all((flight * act + work <= budget) & (flight * host <= host_budget)):
        return None
    extra = np.full(len(flight), float(u @ options.extra_s[index]))
    counts = np.zeros((len(flight), *options.extra_s.shape), dtype=np.int64)
    counts[:, index[0], index[1]] = u
    return Choice(extra_s=extra, lower_s=extra, counts=counts)


def _enumerate(
    u: IntArray, options: Options, kept: list[list[int]], flight: Array, budget: Array, host_budget: Array
) -> Choice:
    num_classes, num_strategies = options.extra_s.shape
    parts = [compositions(int(n), len(k)) for n, k in zip(u, kept, strict=True)]
    picks = np.array(list(product(*(range(len(p)) for p in parts)))) if len(parts) > 1 else None
    size = len(parts[0]) if picks is None else len(picks)
    counts = np.zeros((size, num_classes, num_strategies), dtype=np.int64)
    for c, (part, k) in enumerate(zip(parts, kept, strict=True)):
        counts[:, c, k] = part if picks is None else part[picks[:, c]]
    flat = counts.reshape(size, -1)
    extra = flat @ options.extra_s.ravel()
    order = np.argsort(extra, kind="stable")
    flat, counts, extra = flat[order], counts[order], extra[order]
    act, host = flat @ options.activation_bytes.ravel(), flat @ options.host_bytes.ravel()
    work = np.max(np.where(flat > 0, options.work_bytes.ravel(), 0.0), axis=1)
    fits = (flight[:, None] * act + work <= budget[:, None]) & (flight[:, None] * host <= host_budget[:, None])
    first = np.argmax(fits, axis=1)
    best = np.where(fits.any(axis=1), extra[first], np.inf)
    return Choice(extra_s=best, lower_s=best, counts=counts[first])


def _greedy(
    u: IntArray, options: Options, kept: list[list[int]], flight: Array, budget: Array, host_budget: Array
) -> Choice:
    """LP bound and rounded solution, the best over every limit on the transient bytes that may be used."""
    shape = (len(flight), *options.extra_s.shape)
    best, lower = np.full(len(flight), np.inf), np.full(len(flight), np.inf)
    counts = np.zeros(shape, dtype=np.int64)
    works = sorted({float(options.work_bytes[c, s]) for c, k in enumerate(kept) if u[c] for s in k})
    for offload in (True, False):
        for work in works:
            allowed = [
                [s for s in k if options.work_bytes[c, s] <= work and (offload or options.host_bytes[c, s] == 0)]
                for c, k in enumerate(kept)
            ]
            if any(u[c] and not a for c, a in enumerate(allowed)):
                continue
            hi, lo, picked = _greedy_once(u, options, allowed, (budget - work) / flight)
            if offload:
                lower = np.minimum(lower, lo)
            host = np.tensordot(picked, options.host_bytes, axes=2)
            hi = np.where(flight * host <= host_budget, hi, np.inf)
            better = hi < best
            best = np.where(better, hi, best)
            counts[better] = picked[better]
    return Choice(extra_s=best, lower_s=lower, counts=counts)


def _hull(options: Options, c: int, allowed: list[int]) -> list[int]:
    """Strategies of class c on the lower-left convex hull of (activation bytes, extra seconds), fastest first."""
    points = sorted(allowed, key=lambda s: (options.extra_s[c, s], options.activation_bytes[c, s]))
    hull: list[int] = []
    for s in points:
        if hull and options.activation_bytes[c, s] >= options.activation_bytes[c, hull[-1]]:
            continue
        while len(hull) >= 2 and _slope(options, c, hull[-2], s) <= _slope(options, c, hull[-2], hull[-1]):
            hull.pop()
        hull.append(s)
    return hull


def _slope(options: Options, c: int, a: int, b: int) -> float:
    """Extra seconds per byte saved, going from strategy a to b."""
    saved = options.activation_bytes[c, a] - options.activation_bytes[c, b]
    return float((options.extra_s[c, b] - options.extra_s[c, a]) / saved)


def _greedy_once(
    u: IntArray, options: Options, allowed: list[list[int]], budget: Array
) -> tuple[Array, Array, IntArray]:
    """(rounded seconds, LP seconds, counts) for activation budgets (P,) per micro-batch in flight."""
    counts = np.zeros(options.extra_s.shape, dtype=np.int64)
    steps: list[tuple[float, int, int, int]] = []
    for c, n in enumerate(u):
        if not n:
            continue
        hull = _hull(options, c, allowed[c])
        counts[c, hull[0]] = n
        steps += [(_slope(options, c, a, b), c, a, b) for a, b in zip(hull, hull[1:], strict=False)]
    steps.sort()
    act0, extra0 = float((counts * options.activation_bytes).sum()), float((counts * options.extra_s).sum())
    saves = np.array([options.activation_bytes[c, a] - options.activation_bytes[c, b] for _, c, a, b in steps])
    costs = np.array([options.extra_s[c, b] - options.extra_s[c, a] for _, c, a, b in steps])
    hi, lo = np.full(len(budget), np.inf), np.full(len(budget), np.inf)
    picked = np.repeat(counts[None], len(budget), axis=0)
    for p, limit in enumerate(budget):
        deficit, extra, lp = act0 - float(limit), extra0, extra0
        for (_, c, a, b), save, cost in zip(steps, saves, costs, strict=True):
            if deficit <= 0:
                break
            moved = min(deficit / save, float(u[c]))
            whole = int(min(np.ceil(deficit / save - 1e-12), u[c]))
            lp += moved * cost
            extra += whole * cost
            picked[p, c, a] -= whole
            picked[p, c, b] += whole
            deficit -= whole * save
        if deficit <= 0:
            hi[p], lo[p] = extra, lp
    return hi, lo, picked
