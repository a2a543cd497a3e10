"""Menus of the dispatcher's tests: with FlexSP's published constants, and small ones whose answers are known."""

from __future__ import annotations

import math

import numpy as np

from planner.costmodel.sequence_attention import length_grid
from planner.costmodel.sequences import GroupCost, Menu
from planner.costmodel.strategy import LayerStrategy

# Published constants of FlexSP's solver for GPT-7B (SYSTEMS.md 3.11): ms, MB a token, GB/s of an all-to-all.
A1_MS, A2_MS, BETA_MS, ACT_MB, LAYERS, HIDDEN, PARAMS, GPU_GB = 5.128e-6, 0.18396, 629.0, 4.48, 32, 4096, 6.7e9, 30
ALL_TO_ALL = {2: 119.5, 4: 104.1, 8: 96.5, 16: 10.3, 32: 5.9}
NONE = LayerStrategy(recompute="none")


def flexsp_menu(num_ranks: int) -> Menu:
    """FlexSP's cost model with degree 1 allowed."""
    room = int((GPU_GB * 1024 - 16 * PARAMS / num_ranks / 2**20) / ACT_MB)
    grid, groups, degree = length_grid(2**20), [], 1
    while degree <= num_ranks:
        comm = 16 * LAYERS * HIDDEN / (2**20 * degree * ALL_TO_ALL.get(degree, 4.9)) if degree > 1 else 0.0
        per_token = ((A1_MS * grid + A2_MS) / degree + comm) / 1000
        groups.append(
            GroupCost(ulysses=degree, ring=1, strategy=NONE, fixed_s=BETA_MS / 1000, grid_G=grid,
                      per_token_s_G=per_token, capacity_tokens=float(room * degree))
        )  # fmt: skip
        degree *= 2
    return Menu(groups=tuple(groups), num_ranks=num_ranks, lockstep=True, pp=1, step_s=0.05)


def toy_menu(num_ranks: int, *, room: float = 100.0, fixed: float = 1.0, lockstep: bool = True, pp: int = 1) -> Menu:
    """Degree d: (s^2/20 + s)/d seconds plus a tenth of s per doubling, `room` tokens a rank."""
    grid = np.arange(16.0, 1025.0)
    groups = tuple(
        GroupCost(ulysses=d, ring=1, strategy=NONE, fixed_s=fixed, grid_G=grid,
                  per_token_s_G=(grid / 20 + 1) / d + 0.1 * math.log2(d) / d, capacity_tokens=room * d)
        for d in (1, 2, 4, 8) if d <= num_ranks
    )  # fmt: skip
    return Menu(groups=groups, num_ranks=num_ranks, lockstep=lockstep, pp=pp, step_s=0.0)
