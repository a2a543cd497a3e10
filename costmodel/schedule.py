"""Pipeline schedules as tables: the order in which every rank runs its forwards and backwards.

A table is a pure function of (kind, p ranks, v chunks per rank, m micro-batches); when an action starts is
for costmodel/simulate.py to say. The orders equal those of torch.distributed.pipelining, which
tests/cpu/test_schedule_torch.py checks action by action.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from planner.costmodel.pipeline import ScheduleKind, schedule_problem

FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, BACKWARD = "F", "B", "W", "BW"


class Action(NamedTuple):
    """One action of a rank: op is F, B (input gradient), W (weight gradient) or BW (the whole backward)."""

    op: str
    chunk: int
    microbatch: int


Table = tuple[tuple[Action, ...], ...]


def stage_of(kind: ScheduleKind, p: int, rank: int, chunk: int) -> int:
    """Virtual stage of a rank's chunk: chunk p + rank, or in the V of zb_v stages k and 2p-1-k."""
    if kind is ScheduleKind.ZB_V and chunk == 1:
        return 2 * p - 1 - rank
    return chunk * p + rank


@lru_cache(maxsize=8)
def actions(kind: ScheduleKind, m: int, p: int, v: int) -> Table:
    """Every rank's actions in order, (p,). ValueError if the schedule does not exist for these sizes."""
    problem = schedule_problem(kind, p, v, m)
    if problem is not None:
        raise ValueError(problem)
    rank_order = {
        ScheduleKind.GPIPE: _gpipe,
        ScheduleKind.ONE_F_ONE_B: _one_f_one_b,
        ScheduleKind.INTERLEAVED: _interleaved,
        ScheduleKind.ZB_H1: _zb_h1,
        ScheduleKind.ZB_V: _zb_v,
    }[kind]
    return tuple(tuple(rank_order(m, p, v, k)) for k in range(p))


def _gpipe(m: int, p: int, v: int, k: int) -> Iterator[Action]:
    """All forwards, then all backwards, oldest first (Huang et al. 2019, arXiv 1811.06965)."""
    for op in (FORWARD, BACKWARD):
        for i in range(m):
            yield Action(op, 0, i)


def _one_f_one_b(m: int, p: int, v: int, k: int) -> Iterator[Action]:
    """p-k-1 forwards, then forward and backward in turn (Narayanan et al. 2021, arXiv 2104.04473, 2.2)."""
    return _alternate(m, 1, p, k, min(m, p - k - 1))


def _interleaved(m: int, p: int, v: int, k: int) -> Iterator[Action]:
    """1F1B over v chunks in rounds of p micro-batches (Narayanan et al. 2021, arXiv 2104.04473, 2.2)."""
    return _alternate(m, v, p, k, min(m * v, (v - 1) * p + 2 * (p - k - 1)))


def _alternate(m: int, v: int, p: int, k: int, warmup: int) -> Iterator[Action]:
    """`warmup` forwards, then forward and backward in turn, then the backwards that are left.

    The n-th forward of a rank is chunk (n // p) % v, micro-batch (n // (p v)) p + n % p; backwards take the
    chunks from the last. With v = 1 both are the n-th micro-batch.
    """
    total = m * v
    for n in range(total + warmup):
        if n < total:
            yield Action(FORWARD, *_nth(n, p, v))
        if n >= warmup:
            chunk, microbatch = _nth(n - warmup, p, v)
            yield Action(BACKWARD, v - 1 - chunk, microbatch)


def _nth(n: int, p: int, v: int) -> tuple[int, int]:
    return (n // p) % v, (n // (p * v)) * p + n % p


def _zb_h1(m: int, p: int, v: int, k: int) -> Iterator[Action]:
    """1F1B with the weight gradients k micro-batches behind: H1 (Qi et al. 2023, arXiv 2401.10241, 2.1).

    Rank k starts W at its (k+1)-th B, so that all ranks hold the same p micro-batches; the k left over fill
    the end of the cool-down.
    """
    pending = 0
    for action in _one_f_one_b(m, p, v, k):
        if action.op == FORWARD:
            yield action
            continue
        yield Action(BACKWARD_INPUT, 0, action.microbatch)
        if action.microbatch >= k:
            yield Action(BACKWARD_WEIGHT, 0, pending)
            pending += 1
    for i in range(pending, m):
        yield Action(BACKWARD_WEIGHT, 0, i)


def _zb_v(m: int, p: int, v: int, k: int) -> Iterator[Action]:
    """The handcrafted ZB-V (Qi et al. 2023, arXiv 2401.10241, section 6), for m >= 2p-1.

    A phase repeats a run of (op, chunk); each of the six has its own micro-batch counter.
    """
    f0, b0, w0 = ((op, 0) for op in (FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT))
    f1, b1, w1 = ((op, 1) for op in (FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT))
    phases = (
        ((f0,), 2 * (p - k) - 1),  # warm-up
        ((f1, f0), k),
        ((f1, b1, w1), p - k),
        ((f0, b0, w0, f1, b1, w1), m - 2 * p + k + 1),  # steady
        ((b0, w0, f1, b1, w1), p - k - 1),
        ((b0, b1), k),  # cool-down: the k weight gradients of each chunk that are left fill its end
        ((b0, w0), p - k),
        ((w1,), k),
        ((w0,), k),
    )
    done = dict.fromkeys((f0, b0, w0, f1, b1, w1), 0)
    for steps, repeats in phases:
        for _ in range(repeats):
            for step in steps:
                yield Action(*step, done[step])
                done[step] += 1
