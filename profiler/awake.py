"""Cores kept awake while something is timed.

A host that shares its hardware packs virtual cores that idle, if only for milliseconds, onto one physical core: work on
them is then slower by up to two, and neither load average nor stolen time shows it.

What keeps a core awake must give way to what is timed, at once. Linux weighs sessions against each other before the
processes in them (man 7 sched, "The autogroup feature"): SCHED_IDLE gives way only within its own session, and has half
of the core against any other.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

_SPIN = "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\nwhile os.getppid() == {parent}: pass"


@contextlib.contextmanager
def cores_awake(count: int) -> Iterator[None]:
    """Keep `count` cores, or all if there are fewer, busy meanwhile with processes that give way to this session's.

    SCHED_IDLE, which only Linux has. More cores than the timed work uses would lower clocks and eat the share of a
    container.
    """
    if not hasattr(os, "SCHED_IDLE"):
        yield
        return
    command = [sys.executable, "-I", "-S", "-c", _SPIN.format(parent=os.getpid())]
    spinning = [
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(min(count, len(os.sched_getaffinity(0))))
    ]
    try:
        yield
    finally:
        for one in spinning:
            one.kill()
            one.wait()
