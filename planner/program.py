"""Kinds of groups and sequences' shares of them as a sparse program: rows that relaxation.py and rounding.py share.

For pairs p of a kind and a span, with n_p groups that last w_p seconds altogether and shares x of classes of lengths:

    sum_i s x + f n <= w                   time
    sum_i v x <= n                         room; groups on their own: sum_i (s + f v) x <= w, for every micro-batch
    sum_i u(v) x <= n, sum_i u(s / (high - f)) x <= n    u(z) = 1 if z > 1/2, else 0: whole sequences

No group holds two sequences of more than half of it, although x divides them.

Legend: D distinct lengths, C classes of them, P pairs of a kind and a span.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.batch import IntArray, Points, Table
from planner.costmodel.keys import Array
from planner.costmodel.sequences import Menu

SLACK = 1 + 1e-9
Entries = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]  # rows, columns, values


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Rows sum of_DP x + groups_P n + lasting_P w <= 0, one a pair."""

    of_DP: Array
    groups_P: Array
    lasting_P: Array


def fitting(menu: Menu, points: Points, table: Table, kinds: IntArray, high_P: Array) -> NDArray[np.bool_]:
    """Whether a length alone takes no more than `high_P` seconds, (D, P)."""
    alone = points.seconds_DK[:, kinds] + table.fixed_K[kinds]
    return np.asarray((alone if menu.lockstep else alone * menu.pp) <= high_P * SLACK)


def families(
    menu: Menu, points: Points, table: Table, kinds: IntArray, high_P: Array, fits_DP: NDArray[np.bool_]
) -> Iterator[Family]:
    """Rows of time, of room, and of whole sequences."""
    fixed = table.fixed_K[kinds]
    one, zero = np.ones_like(fixed), np.zeros_like(fixed)
    seconds = np.where(fits_DP, points.seconds_DK[:, kinds], 0.0)
    share = np.where(fits_DP, points.tokens_D[:, None] / table.room_K[kinds], 0.0)
    yield Family(of_DP=seconds, groups_P=fixed, lasting_P=-one)
    for room in (share, _whole(share)):
        if menu.lockstep:
            yield Family(of_DP=room, groups_P=-one, lasting_P=zero)
        else:
            yield Family(of_DP=seconds + fixed * room, groups_P=zero, lasting_P=-one)
    busy = seconds / np.maximum(high_P - fixed, 1e-12)
    yield Family(of_DP=_whole(busy), groups_P=-one, lasting_P=zero)


def _whole(share: Array) -> Array:
    return np.asarray(share > 0.5 * SLACK, np.float64)


class Matrix:
    """Non-zeros, a block of rows after the other."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._parts: list[Entries] = []

    def add(self, num_rows: int, *blocks: Entries) -> None:
        """`num_rows` more, whose entries count rows from the first of them."""
        self._parts += [(self.num_rows + rows, columns, values) for rows, columns, values in blocks]
        self.num_rows += num_rows

    def add_shares(
        self, points: Points, held: list[Family], fits_CP: NDArray[np.bool_], last_P: Array | None = None
    ) -> None:
        """Rows of the classes and of every family, over columns x (where `fits_CP`), n, and w unless `last_P` is given.

        `last_P`: seconds of a group of each pair, so that w = last n.
        """
        c, pair = np.nonzero(fits_CP)
        size, x = fits_CP.shape[1], np.arange(len(c))
        own = np.arange(size)
        n = len(c) + own
        self.add(len(fits_CP), (c, x, np.ones(len(c))))
        for family in held:
            shares = (pair, x, points.mean(family.of_DP)[c, pair])
            if last_P is None:
                self.add(size, shares, (own, n, family.groups_P), (own, n + size, family.lasting_P))
            else:
                self.add(size, shares, (own, n, family.groups_P + last_P * family.lasting_P))

    def by_column(self) -> Entries:
        """(rows, columns, values), by column."""
        rows, columns, values = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        order = np.lexsort((rows, columns))
        order = order[values[order] != 0]
        return rows[order], columns[order], values[order]


@contextmanager
def _mute() -> Iterator[None]:
    """Nothing to standard output, by whatever language: an answer in JSON may be all that is wanted there."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what C has printed may still be in its buffer
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def solved(lp: Any, matrix: Matrix, options: dict[str, Any], looks: int | None = None) -> Any | None:
    """The solver with a solution of `lp` with `matrix`, or None if it does not say that it has one.

    `looks`: how often a search for whole numbers asks whether it may go on, before it may not; a measure of its work
    that does not depend on a clock.
    """
    import highspy

    untyped: Any = highspy
    rows, columns, values = matrix.by_column()
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = np.concatenate([[0], np.cumsum(np.bincount(columns, minlength=lp.num_col_))])
    lp.a_matrix_.index_, lp.a_matrix_.value_ = rows, values
    with _mute():  # silent() leaves a greeting
        solver = untyped.Highs()
        solver.silent()
        for option, value in {"threads": 1, **options}.items():
            solver.setOptionValue(option, value)
        solver.passModel(lp)
        if looks is not None:
            asked = itertools.count(1)

            def may_go_on(_kind: Any, _message: str, _out: Any, answer: Any, _user: Any) -> None:
                if next(asked) > looks:
                    answer.user_interrupt = True

            solver.setCallback(may_go_on, None)
            solver.startCallback(untyped.cb.HighsCallbackType.kCallbackMipInterrupt)
        solver.run()
    feasible = solver.getInfo().primal_solution_status == 2
    stopped = lp.integrality_ and feasible  # whole numbers are good whether or not they are proved to be the best
    return solver if solver.getModelStatus() == highspy.HighsModelStatus.kOptimal or stopped else None
