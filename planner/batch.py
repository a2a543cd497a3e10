"""A global batch under a menu: what every sequence would cost in every kind of group.

Legend: N sequences, D distinct lengths, C classes of them, K kinds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from planner.costmodel.keys import Array
from planner.costmodel.sequences import Menu

IntArray = NDArray[np.int64]
_MOST_LENGTHS = 2048  # distinct ones kept apart; more are joined to the cheapest of their neighbours
_OWN_CLASS, _CLASSES = 12, 12  # of the longest lengths one each, and of all others together


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A batch, longest first. `seconds_NK`: inf where a kind has no room. `order[i]`: place of i in the batch."""

    order: IntArray
    tokens_N: IntArray
    seconds_NK: Array
    ranks_K: Array
    fixed_K: Array
    room_K: Array

    def restricted(self, kinds: tuple[int, ...]) -> Table:
        """Only `kinds` may be used; their numbers stay."""
        keep = np.zeros(len(self.ranks_K), bool)
        keep[list(kinds)] = True
        return replace(self, seconds_NK=np.where(keep, self.seconds_NK, np.inf))

    def usable(self) -> IntArray:
        """Kinds that hold some sequence."""
        return np.flatnonzero(np.isfinite(self.seconds_NK).any(axis=0))


def table_of(menu: Menu, lengths: IntArray) -> Table:
    """The batch under the menu."""
    order = np.argsort(-lengths, kind="stable")
    tokens = lengths[order]
    distinct, where = np.unique(tokens, return_inverse=True)
    seconds = np.stack([group.sequence_s(distinct)[where] for group in menu.groups], axis=1)
    room = np.array([group.capacity_tokens for group in menu.groups])
    return Table(
        order=order, tokens_N=tokens, seconds_NK=np.where(tokens[:, None] <= room, seconds, np.inf),
        ranks_K=np.array([float(group.ranks) for group in menu.groups]),
        fixed_K=np.array([group.fixed_s for group in menu.groups]), room_K=room,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """Distinct lengths, longest first, with how many sequences have each; `first_C`: where each class begins."""

    tokens_D: Array
    count_D: Array
    seconds_DK: Array
    first_C: IntArray

    def mean(self, of_DP: Array) -> Array:
        """Means over the sequences of each class, (C, P)."""
        weight = np.add.reduceat(self.count_D, self.first_C)
        return np.asarray(np.add.reduceat(of_DP * self.count_D[:, None], self.first_C, axis=0) / weight[:, None])


def points_of(table: Table) -> Points:
    """The distinct lengths of a batch, in classes that no kind's room divides."""
    tokens = table.tokens_N
    first = np.flatnonzero(np.diff(tokens, prepend=tokens[0] + 1))
    if len(first) > _MOST_LENGTHS:
        cell = np.floor(np.log(tokens[first]) * (_MOST_LENGTHS / np.log(tokens[0] / tokens[-1])))
        first = first[np.diff(cell, prepend=cell[0] + 1) != 0]
    last = np.append(first[1:], len(tokens)) - 1
    held = tokens[last].astype(float)
    log = np.log(held)
    part = np.floor((log[0] - log) * (_CLASSES / max(log[0] - log[-1], 1e-9)))
    part += _CLASSES * np.searchsorted(np.sort(table.room_K), held)
    part[:_OWN_CLASS] = -1 - np.arange(min(_OWN_CLASS, len(part)))
    return Points(
        tokens_D=held, count_D=(last - first + 1).astype(float),
        seconds_DK=np.minimum.reduceat(table.seconds_NK, first, axis=0),
        first_C=np.flatnonzero(np.diff(part, prepend=np.inf)),
    )  # fmt: skip


def fewest_steps(menu: Menu, table: Table) -> int:
    """Micro-steps that the batch needs if every rank holds as much as any kind allows."""
    usable = table.usable()
    per_rank = float((table.room_K[usable] / table.ranks_K[usable]).max())
    return max(1, math.ceil(float(table.tokens_N.sum()) / (per_rank * menu.num_ranks) - 1e-9))
