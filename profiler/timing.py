"""Timing one function on one or more ranks: warm-up, medians, spread, and doubts about them.

All ranks of a job time the same function at the same time, as training does; a repeat counts as long as on the slowest
rank, for which the others wait. Of ranks that share a core it is the mean: nobody waits while another works.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

Work = Callable[[], object]
Mark = tuple[float, float] | torch.cuda.Event  # of a Clock: (its time, wall clock) on a CPU
WINDOW_S, MAX_CALLS = 0.02, 2000
REPEATS, _LEAST = 7, 3
_MORE_WINDOWS, _KNOWN_FRAC = 30, 0.03  # so much longer where the median is not known as well
NOISY_FRAC, THROTTLED_FRAC = 0.15, 0.10
_MAD_TO_SIGMA = 1.4826  # of a normal distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Median seconds of one call, robust standard deviation over it, repeats, and doubts in words.

    `wall_s`: the median by the wall clock, if ranks share a core (Clock); else 0.
    """

    time_s: float
    spread_frac: float
    repeats: int
    note: str
    wall_s: float = 0.0


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
    is its own CPU time, all threads, times `turns`. `wall_s`: what all that was timed took by the wall clock,
    which counts where all ranks wait for each other.
    """

    def __init__(self, device: torch.device, turns: float = 1.0) -> None:
        self._cuda, self.turns, self.wall_s = device.type == "cuda", turns, 0.0

    def mark(self) -> Mark:
        """Now, in the order of the device's work."""
        if not self._cuda:
            wall_s = time.perf_counter()
            return (self.turns * time.process_time() if self.turns > 1 else wall_s), wall_s
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between_s(self, start: Mark, end: Mark) -> float:
        """Seconds from one mark to another; waits for the device."""
        if isinstance(start, tuple) and isinstance(end, tuple):
            self.wall_s += end[1] - start[1]
            return end[0] - start[0]
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
    job: Job, clock: Clock, ranks: Ranks, *, window_s: float = WINDOW_S, repeats: int = REPEATS
) -> Timing:
    """Time a job in windows of at least `window_s`, all ranks at once, more of them where they scatter."""
    shared = clock.turns > 1

    def window(calls: int) -> tuple[float, float]:
        ranks.barrier()
        clock.wall_s = 0.0
        time_s = job.seconds(clock, calls) / calls
        wall_s = clock.wall_s / (job.parts * calls)
        return (ranks.mean(time_s), ranks.mean(wall_s)) if shared else (ranks.largest(time_s), 0.0)

    window(1)  # first touch, lazy initialisation
    start_s = time.perf_counter()
    window(2)
    once_s = ranks.largest((time.perf_counter() - start_s) / 2)  # what a call costs, timed part or not
    calls = min(max(1, math.ceil(window_s / once_s)), MAX_CALLS)
    # A call longer than many windows is told apart from noise by fewer repeats.
    count = max(_LEAST, min(repeats, math.ceil(20 * window_s / (once_s * calls))))
    found = [window(calls) for _ in range(count)]
    most = count + math.ceil(_MORE_WINDOWS * window_s / (once_s * calls))
    while len(found) < most and _uncertain(summary([time_s for time_s, _ in found])):
        found.append(window(calls))
    return replace(summary([time_s for time_s, _ in found]), wall_s=_median([wall_s for _, wall_s in found]))


def _uncertain(timing: Timing) -> bool:
    """Whether the median is known to less than _KNOWN_FRAC: its standard error is that of the mean within 1.25."""
    return timing.spread_frac / math.sqrt(timing.repeats) > _KNOWN_FRAC


def summary(times_s: list[float]) -> Timing:
    """Median and spread of repeats; 'noisy' beyond 15 % of spread, 'throttled' if the end is 10 % slower."""
    median_s = _median(times_s)
    spread_frac = _MAD_TO_SIGMA * _median([abs(t - median_s) for t in times_s]) / median_s
    third = max(len(times_s) // 3, 1)
    first, last = times_s[:third], times_s[-third:]
    growth = _median(last) / _median(first) - 1
    notes = ["noisy"] if spread_frac > NOISY_FRAC else []
    if growth > THROTTLED_FRAC and min(last) > max(first):
        notes.append("throttled")
    return Timing(time_s=median_s, spread_frac=spread_frac, repeats=len(times_s), note=", ".join(notes))


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
