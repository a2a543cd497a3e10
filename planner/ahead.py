"""Ahead: the dispatcher in a process of its own, some batches before the step that needs them.

A step never waits for it: when an answer is late or the process is dead, the caller's own heuristic answers (the best
that it finds in a twentieth of a second), and `say` is told so once. The process is `python -m planner.ahead FD`: it
imports no torch, forks nothing of the caller's, and ends when the caller does. Messages are JSON: first the menu, then
(step, lengths), answered by (step, dispatch).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import numpy as np

from planner.batch import IntArray
from planner.dispatch import Dispatch, dispatch
from planner.menus import Dispatching

_FALLBACK_S = 0.05


def heuristic(found: Dispatching, lengths: IntArray) -> Dispatch:
    """A dispatch cut short, no slower than the static plan's. ValueError, DoesNotFit: see dispatch.checked."""
    return dispatch(found.menu, lengths, time_limit_s=_FALLBACK_S, static_kind=found.static_kind)


def _plain(array: Any) -> Any:
    return array.tolist()


def _array(_type: Any, values: Any) -> Any:
    return np.array(values, np.float64)


def _work(pipe: Connection) -> None:
    """Answer requests until the other end is closed."""
    try:
        first = pipe.recv_bytes()
        found, limit_s = msgspec.json.decode(first, type=tuple[Dispatching, float], dec_hook=_array)
        while True:
            step, lengths = msgspec.json.decode(pipe.recv_bytes(), type=tuple[int, list[int]])
            answer = dispatch(
                found.menu, np.array(lengths, np.int64), time_limit_s=limit_s, static_kind=found.static_kind
            )
            pipe.send_bytes(msgspec.json.encode((step, answer)))
    except (EOFError, OSError, KeyboardInterrupt):
        return


@dataclass(slots=True)
class Ahead:
    """Dispatches of coming batches. `request` them in the order of their steps, `take` each at its step."""

    found: Dispatching
    say: Callable[[str], None]
    time_limit_s: float = 5.0
    num_fallbacks: int = 0
    process: subprocess.Popen[bytes] = field(init=False)
    _pipe: Connection | None = None
    _ready: dict[int, Dispatch] = field(default_factory=dict)
    _said: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._pipe, theirs = Pipe()
        command = [sys.executable, "-P", "-m", "planner.ahead", str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        self._pipe.send_bytes(msgspec.json.encode((self.found, self.time_limit_s), enc_hook=_plain))

    def request(self, step: int, lengths: IntArray) -> None:
        """Ask for the dispatch of a coming step."""
        if self._pipe is None:
            return
        try:
            self._pipe.send_bytes(msgspec.json.encode((step, lengths.tolist())))
        except OSError:
            self._lost(step)

    def take(self, step: int, lengths: IntArray) -> Dispatch:
        """The dispatch of this step: the process's if it is there, else the heuristic's. Older ones are forgotten."""
        self._receive(step)
        for old in [s for s in self._ready if s < step]:
            del self._ready[old]
        if step in self._ready:
            return self._ready.pop(step)
        self.num_fallbacks += 1
        if self._pipe is not None:
            self._once("late", f"the dispatcher is late for step {step}: such steps take the heuristic's groups")
        return heuristic(self.found, lengths)

    def wait(self, limit_s: float) -> None:
        """Until an answer is there, at most `limit_s` seconds: for the start of a run, never for a step."""
        if self._pipe is not None and not self._ready:
            self._pipe.poll(limit_s)

    def _receive(self, step: int) -> None:
        try:
            while self._pipe is not None and self._pipe.poll():
                at, answer = msgspec.json.decode(self._pipe.recv_bytes(), type=tuple[int, Dispatch])
                self._ready[at] = answer
        except (EOFError, OSError):
            self._lost(step)

    def _lost(self, step: int) -> None:
        self._pipe = None
        try:
            code = self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            code = None
        self._once("dead", f"the dispatcher ended (exit code {code}) at step {step}: the heuristic forms groups now")

    def _once(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self.say(text)

    def close(self) -> None:
        """End the process."""
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        self.process.kill()
        self.process.wait()


if __name__ == "__main__":
    _work(Connection(int(sys.argv[1])))
