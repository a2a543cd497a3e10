"""Cores kept awake while something is timed.

A host that shares its hardware packs virtual cores that idle, if only for milliseconds, onto one physical core: work on
them is then slower by up to two, and neither load average nor stolen time shows it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

_SPIN = "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\nwhile os.getppid() == {parent}: pass"


@contextlib.contextmanager
def cores_awake() -> Iterator[None]:
    """Keep every core busy meanwhile with a process that gives way to anything else (SCHED_IDLE, Linux only)."""
    if not hasattr(os, "SCHED_IDLE"):
        yield
        return
    command = [sys.executable, "-I", "-S", "-c", _SPIN.format(parent=os.getpid())]
    spinning = [
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(os.cpu_count() or 1)
    ]
    try:
        yield
    finally:
        for one in spinning:
            one.kill()
            one.wait()
