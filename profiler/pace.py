"""Whether this core runs undisturbed.

On a shared host the same work is slower by up to two, in bursts of seconds that neither load average nor stolen time
shows (another tenant of the physical core, as it seems). A short loop of the interpreter shows them: between bursts it
takes equal times to a few per cent.
"""

from __future__ import annotations

import time

_LOOPS = 10_000  # under a millisecond
_TRIES = 3  # a probe is the fastest of these: an interrupt is no burst
_SLOWER = 1.3  # clocks that rise and fall are no tenant


class Pace:
    """Knows the fastest probe so far, in seconds of this process' own CPU time. `floor_s`: one known from before."""

    def __init__(self, floor_s: float = float("inf")) -> None:
        self.floor_s = floor_s

    def disturbed(self) -> bool:
        """Probe now: whether the core is more than 30 % slower than at its fastest."""
        found_s = min(_probe_s() for _ in range(_TRIES))
        self.floor_s = min(self.floor_s, found_s)
        return found_s > _SLOWER * self.floor_s


def _probe_s() -> float:
    start_s = time.process_time()
    total = 0
    for i in range(_LOOPS):
        total += i
    return time.process_time() - start_s
