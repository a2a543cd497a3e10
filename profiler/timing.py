"""Timing one function on one or more ranks: warm-up, medians, spread, and doubts about them.

All ranks of a job time the same function at the same time, as training does; a repeat counts as the mean over ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from planner.profiler.pace import Pace

Work = Callable[[], object]
WINDOW_S, MAX_CALLS = 0.02, 2000
REPEATS, _LEAST = 7, 3
NOISY_FRAC, THROTTLED_FRAC = 0.15, 0.10
_MAD_TO_SIGMA = 1.4826  # of a normal distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Median seconds of one call, robust standard deviation over it, repeats, and doubts in words."""

    time_s: float
    spread_frac: float
    repeats: int
    note: str


class Ranks:
    """The ranks that measure together; one process alone needs no process group."""

    def __init__(self, group: dist.ProcessGroup | None, size: int) -> None:
        self._group, self.size = group, size

    def barrier(self) -> None:
        """Start together."""
        if self._group is not None:
            dist.barrier(self._group)

    def mean(self, value: float) -> float:
        """Mean over the ranks."""
        return self._reduced(value, dist.ReduceOp.SUM) / self.size if self._group is not None else value

    def largest(self, value: float) -> float:
        """Largest over the ranks: every rank gets the same answer."""
        return self._reduced(value, dist.ReduceOp.MAX) if self._group is not None else value

    def _reduced(self, value: float, op: dist.ReduceOp.RedOpType) -> float:
        box = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(box, op, self._group)
        return float(box[0])


class Clock:
    """Marks in time on a device: CUDA events on the current stream, a monotonic clock elsewhere.

    `turns`: ranks for every core. Where they are more than one, a rank that waits lets another work, so that its time
    is its own CPU time, all threads, times `turns`.
    """

    def __init__(self, device: torch.device, turns: float = 1.0) -> None:
        self._cuda, self.turns = device.type == "cuda", turns

    def mark(self) -> float | torch.cuda.Event:
        """Now, in the order of the device's work."""
        if not self._cuda:
            return self.turns * time.process_time() if self.turns > 1 else time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between_s(self, start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
        """Seconds from one mark to another; waits for the device."""
        if isinstance(start, float) or isinstance(end, float):
            return float(end) - float(start)  # type: ignore[arg-type]
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    def timed_s(self, work: Work) -> float:
        """Seconds of one call."""
        if self._cuda:
            torch.cuda.synchronize()
        start = self.mark()
        work()
        return self.between_s(start, self.mark())


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to time: `work` in a loop, or what `prepare` returns each time, or seconds that `timed` tells by itself.

    One call is `parts` of what is wanted. `saved_bytes`: what autograd keeps of it.
    """

    work: Work | None = None
    prepare: Callable[[], Work] | None = None
    timed: Callable[[Clock], float] | None = None
    parts: int = 1
    saved_bytes: float = 0.0

    def seconds(self, clock: Clock, calls: int) -> float:
        """Seconds of `calls` times what is wanted."""
        return self._seconds(clock, calls) / self.parts

    def _seconds(self, clock: Clock, calls: int) -> float:
        if self.timed is not None:
            return sum(self.timed(clock) for _ in range(calls))
        if self.prepare is not None:
            return sum(clock.timed_s(self.prepare()) for _ in range(calls))
        work = self.work
        assert work is not None
        return clock.timed_s(lambda: [work() for _ in range(calls)])


def measure(
    job: Job, clock: Clock, ranks: Ranks, *, window_s: float = WINDOW_S, repeats: int = REPEATS,
    pace: Pace | None = None,
) -> Timing:
    """Time a job in windows of at least `window_s`, all ranks at once.

    With `pace`, windows after which a rank's core is disturbed are left out and repeated, as far as twice as many do.
    """

    def window(calls: int) -> float:
        ranks.barrier()
        return ranks.mean(job.seconds(clock, calls) / calls)

    window(1)  # first touch, lazy initialisation
    start_s = time.perf_counter()
    window(2)
    once_s = ranks.largest((time.perf_counter() - start_s) / 2)  # what a call costs, timed part or not
    calls = min(max(1, math.ceil(window_s / once_s)), MAX_CALLS)
    # A call longer than many windows is told apart from noise by fewer repeats.
    count = max(_LEAST, min(repeats, math.ceil(20 * window_s / (once_s * calls))))
    times_s: list[float] = []
    disturbed_s: list[float] = []
    while len(times_s) < count and len(disturbed_s) < 2 * count:
        time_s = window(calls)
        disturbed = pace is not None and ranks.largest(float(pace.disturbed())) > 0
        (disturbed_s if disturbed else times_s).append(time_s)
    return summary(times_s) if len(times_s) >= _LEAST else summary(times_s + disturbed_s, disturbed=True)


def summary(times_s: list[float], disturbed: bool = False) -> Timing:
    """Median and spread of repeats; 'noisy' beyond 15 % of spread, 'throttled' if the end is 10 % slower."""
    median_s = _median(times_s)
    spread_frac = _MAD_TO_SIGMA * _median([abs(t - median_s) for t in times_s]) / median_s
    third = max(len(times_s) // 3, 1)
    first, last = times_s[:third], times_s[-third:]
    growth = _median(last) / _median(first) - 1
    notes = ["disturbed"] if disturbed else []
    notes += ["noisy"] if spread_frac > NOISY_FRAC else []
    if growth > THROTTLED_FRAC and min(last) > max(first):
        notes.append("throttled")
    return Timing(time_s=median_s, spread_frac=spread_frac, repeats=len(times_s), note=", ".join(notes))


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
