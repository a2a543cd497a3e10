"""All sampled batches at once: a first bound on their dispatches, and the kind of group that does best alone.

Legend: B batches, D distinct lengths of all of them, K kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from planner.batch import IntArray, table_of
from planner.batch_bounds import pipeline_s
from planner.costmodel.keys import Array
from planner.costmodel.sequences import GroupCost, Menu
from planner.packing import packed, single_bounds_s
from planner.placing import Placed


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The sequences of all batches by their length."""

    tokens_D: IntArray
    count_BD: Array

    @classmethod
    def of(cls, batches: tuple[IntArray, ...]) -> Pool:
        """The pool of `batches`."""
        tokens = np.unique(np.concatenate(batches))
        counts = [np.bincount(np.searchsorted(tokens, batch), minlength=len(tokens)) for batch in batches]
        return cls(tokens_D=tokens, count_BD=np.array(counts, float))

    def seconds_DK(self, kinds: Menu) -> Array:
        """Seconds of a sequence of each length in each kind; inf where it has no room."""
        rows = [np.where(self.tokens_D <= g.capacity_tokens, g.sequence_s(self.tokens_D), np.inf) for g in kinds.groups]
        return np.stack(rows, axis=1)

    def steps_B(self, kinds: Menu, per_rank_tokens: float) -> Array:
        """Micro-steps that each batch needs when a rank holds so many tokens in one."""
        return np.maximum(1.0, np.ceil(self.count_BD @ self.tokens_D / (per_rank_tokens * kinds.num_ranks) - 1e-9))


def first_bound_s(kinds: Menu, pool: Pool) -> float:
    """No dispatches of the batches over `kinds` have a shorter mean (batch_bounds.steps_bound_s without its limit)."""
    seconds = pool.seconds_DK(kinds)
    ranks, fixed, room = (
        np.array([getattr(g, name) for g in kinds.groups], float) for name in ("ranks", "fixed_s", "capacity_tokens")
    )  # fmt: skip
    least = float(fixed.min())
    alone_B = np.where(pool.count_BD > 0, (seconds + fixed).min(axis=1), 0.0).max(axis=1)
    work_B = pool.count_BD @ (seconds * ranks).min(axis=1) / kinds.num_ranks
    if kinds.lockstep:
        steps_B = pool.steps_B(kinds, float((room / ranks).max()))
        tail_B = (kinds.longest_counts - 1) * alone_B
        alone_B, spread_B = alone_B + (steps_B - 1) * least + tail_B, work_B + steps_B * least + tail_B
    else:
        full = (seconds + fixed * (pool.tokens_D[:, None] / room)) * ranks
        piped_B = np.array([pipeline_s(float(work), least, kinds.pp) for work in work_B])
        alone_B, spread_B = alone_B * kinds.pp, np.maximum(pool.count_BD @ full.min(axis=1) / kinds.num_ranks, piped_B)
    return float(np.maximum(alone_B, spread_B).mean())


def static_bounds_s(kinds: Menu, batches: tuple[IntArray, ...]) -> Array:
    """(K,): mean over the batches of what groups of one kind alone cannot beat (packing.single_bounds_s)."""
    bounds = [single_bounds_s(kinds, table_of(kinds, batch)) for batch in batches]
    return np.asarray(np.mean(bounds, axis=0) + kinds.step_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Single:
    """A kind of group that alone takes every batch, how, and the seconds of each."""

    group: GroupCost
    placed: tuple[Placed, ...]
    step_s: tuple[float, ...]

    @property
    def mean_s(self) -> float:
        """Mean over the batches."""
        return float(np.mean(self.step_s))

    def joined(self, menu: Menu) -> tuple[Menu, tuple[Placed, ...]]:
        """The menu with the kind as its last, and the placements under it."""
        groups = (*(group for group in menu.groups if group is not self.group), self.group)
        kind = len(groups) - 1
        steps = (
            tuple(tuple(replace(group, kind=kind) for group in step) for step in placed.steps) for placed in self.placed
        )
        placed = tuple(replace(old, steps=new) for old, new in zip(self.placed, steps, strict=True))
        return replace(menu, groups=groups), placed


def best_single(
    kinds: Menu, batches: tuple[IntArray, ...], longest: int, late: Callable[[], bool] = lambda: False
) -> Single | None:
    """The kind that does best alone of those that hold `longest` tokens; None if none does.

    Kinds are packed in the order of a bound that they come close to, until it is above the best; once there is one,
    until it is late.
    """
    if not kinds.groups:
        return None
    bounds, best = static_bounds_s(kinds, batches), None
    for k in np.argsort(bounds, kind="stable"):
        group = kinds.groups[k]
        if not np.isfinite(bounds[k]) or (best is not None and (bounds[k] >= best.mean_s or late())):
            break
        if group.capacity_tokens < longest:
            continue
        own = replace(kinds, groups=(group,))
        placed = tuple(p for batch in batches if (p := packed(own, table_of(own, batch), 0)) is not None)
        found = Single(group=group, placed=placed, step_s=tuple(p.time_s + kinds.step_s for p in placed))
        best = found if best is None or found.mean_s < best.mean_s else best
    return best
