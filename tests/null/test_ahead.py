"""The dispatcher's own process: it answers ahead, and steps go on without it when it is late or killed."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest

from planner.ahead import Ahead, heuristic
from planner.costmodel.sequences import GroupCost, Menu
from planner.costmodel.strategy import LayerStrategy
from planner.dispatch import DoesNotFit
from planner.menus import Dispatching

GRID = np.array([16.0, 1024.0])
GROUPS = tuple(
    GroupCost(ulysses=d, ring=1, strategy=LayerStrategy(recompute="none"), fixed_s=1.0, grid_G=GRID,
              per_token_s_G=GRID / d + 0.1 * (d > 1), capacity_tokens=300.0 * d)
    for d in (1, 2, 4)
)  # fmt: skip
FOUND = Dispatching(menu=Menu(groups=GROUPS, num_ranks=4, lockstep=True, pp=1, step_s=0.0), static_kind=2)


def batch(step: int) -> np.ndarray:
    return np.random.default_rng(step).integers(1, 300, size=24)


def wait_for(ahead: Ahead, step: int) -> None:
    """Until the answer for `step` is in the pipe or read."""
    deadline = time.monotonic() + 60
    while step not in ahead._ready and time.monotonic() < deadline:
        ahead._receive(0)
        time.sleep(0.01)


def test_answers_ahead_then_goes_on_when_killed() -> None:
    said: list[str] = []
    ahead = Ahead(FOUND, said.append)
    try:
        for step in range(3):
            ahead.request(step, batch(step))
        wait_for(ahead, 2)
        for step in range(3):
            found = ahead.take(step, batch(step))
            assert found.step_s <= heuristic(FOUND, batch(step)).step_s * (1 + 1e-9)
        assert not said and not ahead.num_fallbacks
        os.kill(ahead.process.pid, signal.SIGKILL)
        ahead.process.wait()
        for step in range(3, 8):
            ahead.request(step, batch(step))
            start_s = time.monotonic()
            found = ahead.take(step, batch(step))
            assert time.monotonic() - start_s < 1.0
            held = sorted(i for s in found.steps for g in s.groups for part in g.micro_batches for i in part)
            assert held == list(range(24))
        assert len(said) == 1 and "exit code -9" in said[0] and ahead.num_fallbacks == 5
    finally:
        ahead.close()


def test_a_late_answer_is_not_waited_for() -> None:
    said: list[str] = []
    ahead = Ahead(FOUND, said.append)
    try:
        os.kill(ahead.process.pid, signal.SIGSTOP)
        for step in range(3):
            ahead.request(step, batch(step))
            assert ahead.take(step, batch(step)).steps
        assert len(said) == 1 and "late" in said[0] and ahead.num_fallbacks == 3
        os.kill(ahead.process.pid, signal.SIGCONT)
        ahead.request(3, batch(3))
        wait_for(ahead, 3)
        assert ahead.take(3, batch(3)).steps and ahead.num_fallbacks == 3 and len(said) == 1
    finally:
        ahead.close()


def test_the_heuristic_refuses_what_fits_nowhere() -> None:
    with pytest.raises(DoesNotFit, match="longest that fits any group is 1,200"):
        heuristic(FOUND, np.array([5, 1201]))
