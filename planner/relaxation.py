"""relax(...): how the sequences of a batch would share kinds of groups if they could be divided, and a bound from it.

A span is `count` micro-steps that last between `low_s` and `high_s` each. For a sequence i, a kind k (r ranks, `fixed`
seconds f, s seconds and the share v of a group's room that i takes) and a span t:

    x_ikt >= 0, sum_kt x = 1               the sequence's shares, where s + f <= high
    n_kt, w_kt >= 0                        groups, and the seconds that they last altogether
    sum_i s x + f n <= w                   time
    sum_i v x <= n                         room; groups on their own: sum_i (s + f v) x <= w, for every micro-batch
    sum_i u(v) x <= n, sum_i u(s / (high - f)) x <= n    u(z) = 1 if z > 1/2, else 0: whole sequences
    low n <= w <= high n,  sum_k r n <= N count,  sum_k r (w - low n) <= N (T_t - count low)
    least <= sum_kt n <= most              of groups with so many ranks or more, where branching says so
    minimise sum_t weight_t T_t            T_t: seconds of the span, at least count low

A dispatch whose micro-steps lie in the spans is a solution with x 0 or 1 and w = n T, so no such dispatch is shorter
than the least sum; no group holds two sequences of more than half of it, although x divides them. The program is
solved for lengths joined into classes; its prices (dual values, none below 0) are then applied to every length, which
is a bound by weak duality whatever the classes and the solver's tolerances.

Legend: D distinct lengths, C classes of them, K kinds, P pairs of a kind and a span, S spans, R families of rows.
"""

from __future__ import annotations

import ctypes
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

_SLACK = 1 + 1e-9
_NONE = 1e-6  # groups, ranks
# Primal simplex without presolve: on these programs twice as fast as the defaults.
_SIMPLEX = {"presolve": "off", "simplex_strategy": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """`count` micro-steps of at least `low_s` and at most `high_s` seconds, of which each counts `weight` times."""

    low_s: float
    high_s: float
    count: int
    weight: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """At least `least` and at most `most` groups of `ranks` ranks or more, in all micro-steps together."""

    ranks: int
    least: int
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxed:
    """`bound_s`: no dispatch in these spans is shorter. `last_s`: seconds of a micro-step of each span.

    `kinds`: those that the solution uses, then the others by how much dearer they are at best. `groups`: of each kind
    that it uses.
    """

    bound_s: float
    last_s: tuple[float, ...]
    kinds: tuple[int, ...]
    groups: dict[int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """Rows sum of_DP x + groups_P n + lasting_P w <= 0, one a pair."""

    of_DP: Array
    groups_P: Array
    lasting_P: Array


def families(
    menu: Menu, points: Points, table: Table, kinds: IntArray, high_P: Array, fits_DP: NDArray[np.bool_]
) -> Iterator[_Family]:
    """Rows of time, of room, and of whole sequences."""
    fixed = table.fixed_K[kinds]
    one, zero = np.ones_like(fixed), np.zeros_like(fixed)
    seconds = np.where(fits_DP, points.seconds_DK[:, kinds], 0.0)
    share = np.where(fits_DP, points.tokens_D[:, None] / table.room_K[kinds], 0.0)
    yield _Family(of_DP=seconds, groups_P=fixed, lasting_P=-one)
    for room in (share, _whole(share)):
        if menu.lockstep:
            yield _Family(of_DP=room, groups_P=-one, lasting_P=zero)
        else:
            yield _Family(of_DP=seconds + fixed * room, groups_P=zero, lasting_P=-one)
    busy = seconds / np.maximum(high_P - fixed, 1e-12)
    yield _Family(of_DP=_whole(busy), groups_P=-one, lasting_P=zero)


def _whole(share: Array) -> Array:
    return np.asarray(share > 0.5 * _SLACK, np.float64)


def relax(
    menu: Menu, table: Table, points: Points, spans: tuple[Span, ...], upper_s: float, counts: tuple[Count, ...] = ()
) -> Relaxed | None:
    """The bound of dispatches in `spans`, inf if there are none; None if the solver fails.

    `upper_s`: what a dispatch takes that is known.
    """
    program = _program(menu, table, points, spans, upper_s, table.usable(), counts)
    if program is None:
        return Relaxed(bound_s=np.inf, last_s=(), kinds=(), groups={})
    solver = _run(program)
    if solver is None:
        return None
    values, prices = np.array(solver.getSolution().col_value), _prices(program, solver)
    families, kinds = program.families, program.kind_P
    price_DP = np.asarray(sum(y * f.of_DP for y, f in zip(prices.rows_RP, families, strict=True)))
    price_DP[~program.fits_DP] = np.inf
    dearer = np.full(len(table.ranks_K), np.inf)
    np.minimum.at(dearer, kinds, (price_DP - price_DP.min(axis=1, keepdims=True)).min(axis=0))
    used = np.bincount(kinds, weights=values[program.groups_at :][: len(kinds)], minlength=len(dearer))
    dearer[used > _NONE] = -1.0
    lasts = values[program.last_at : program.last_at + len(spans)] / program.count_S
    return Relaxed(
        bound_s=_bound(program, prices, price_DP),
        last_s=tuple(np.clip(lasts, program.low_S, program.high_S).tolist()),
        kinds=tuple(int(k) for k in np.argsort(dearer, kind="stable") if np.isfinite(dearer[k])),
        groups={int(k): float(used[k]) for k in np.flatnonzero(used > _NONE)},
    )  # fmt: skip


def _program(
    menu: Menu, table: Table, points: Points, spans: tuple[Span, ...], upper_s: float, usable: IntArray,
    counts: tuple[Count, ...],
) -> _Program | None:
    """The program over the `usable` kinds; None if some sequence has no pair."""
    low, high, count = (np.array([getattr(s, name) for s in spans], float) for name in ("low_s", "high_s", "count"))
    kinds, span = np.repeat(usable, len(spans)), np.tile(np.arange(len(spans)), len(usable))
    alone = points.seconds_DK[:, kinds] + table.fixed_K[kinds]
    fits = (alone if menu.lockstep else alone * menu.pp) <= high[span] * _SLACK
    some = fits.any(axis=0)
    kinds, span, fits = kinds[some], span[some], fits[:, some]
    if not fits.any(axis=1).all():
        return None
    return _Program(
        families=list(families(menu, points, table, kinds, high[span], fits)), points=points, fits_DP=fits,
        fits_CP=fits[points.first_C], kind_P=kinds, ranks_P=table.ranks_K[kinds], span_P=span, low_S=low, high_S=high,
        count_S=count, weight_S=np.array([s.weight for s in spans], float), num_ranks=float(menu.num_ranks),
        upper_s=upper_s, counts=counts,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Program:
    """The program; columns are x (where `fits_CP`), n and w of each pair, T and spare ranks of each span, and groups
    beyond the most of each count.
    """

    families: list[_Family]
    points: Points
    fits_DP: NDArray[np.bool_]
    fits_CP: NDArray[np.bool_]
    kind_P: IntArray
    ranks_P: Array
    span_P: IntArray
    low_S: Array
    high_S: Array
    count_S: Array
    weight_S: Array
    num_ranks: float
    upper_s: float
    counts: tuple[Count, ...]

    @property
    def groups_at(self) -> int:
        """Column of the first n."""
        return int(self.fits_CP.sum())

    @property
    def last_at(self) -> int:
        """Column of the first T."""
        return self.groups_at + 2 * len(self.ranks_P)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prices:
    """Dual values: of the families, of low n <= w and w <= high n, of the ranks and the lasting of spans, of counts.

    A count's is below 0 where its least holds groups up.
    """

    rows_RP: Array
    low_P: Array
    high_P: Array
    ranks_S: Array
    lasting_S: Array
    counts: tuple[float, ...]


def _bound(p: _Program, prices: _Prices, price_DP: Array) -> float:
    """The Lagrangian's least value: every length takes its cheapest pair; n, w and T the better end of their range."""
    span, low, high = p.span_P, p.low_S[p.span_P], p.high_S[p.span_P]
    most = p.num_ranks * p.count_S[span] / p.ranks_P  # groups
    lasting = prices.lasting_S[span] * p.ranks_P
    groups = sum(y * f.groups_P for y, f in zip(prices.rows_RP, p.families, strict=True))
    groups = groups + prices.low_P * low - prices.high_P * high - lasting * low + prices.ranks_S[span] * p.ranks_P
    given = p.num_ranks * p.count_S * (prices.lasting_S * p.low_S - prices.ranks_S)
    fixed = float(given.sum())
    for price, count in zip(prices.counts, p.counts, strict=True):
        groups = groups + price * (p.ranks_P >= count.ranks)
        fixed -= price * (count.most if price > 0 else count.least)
    lasts = sum(y * f.lasting_P for y, f in zip(prices.rows_RP, p.families, strict=True))
    lasts = lasts - prices.low_P + prices.high_P + lasting
    each = p.weight_S - p.num_ranks * prices.lasting_S
    ends = np.minimum(each * p.count_S * p.low_S, each * p.count_S * p.high_S)
    return float(
        p.points.count_D @ price_DP.min(axis=1) + np.minimum(groups, 0.0) @ most
        + np.minimum(lasts, 0.0) @ (most * high) + ends.sum() + fixed
    )  # fmt: skip


def _matrix(p: _Program) -> tuple[Array, Array, Array, int]:
    """(rows, columns, values) of the non-zeros and the number of rows: classes, families, low, high, ranks, T,
    counts.
    """
    c, pair = np.nonzero(p.fits_CP)
    size, own = len(p.ranks_P), np.arange(len(p.ranks_P))
    n, w = p.groups_at + own, p.groups_at + size + own
    spans, at = np.arange(len(p.low_S)), p.last_at + np.arange(len(p.low_S))
    row = len(p.points.first_C)
    parts = [(c, np.arange(len(c)), np.ones(len(c)))]
    for family in p.families:
        mean = p.points.mean(family.of_DP)[c, pair]
        parts += [(row + pair, np.arange(len(c)), mean), (row + own, n, family.groups_P)]
        parts.append((row + own, w, family.lasting_P))
        row += size
    low, high = p.low_S[p.span_P], p.high_S[p.span_P]
    parts += [(row + own, n, low), (row + own, w, -np.ones(size))]
    parts += [(row + size + own, n, -high), (row + size + own, w, np.ones(size))]
    row += 2 * size
    parts += [(row + p.span_P, n, p.ranks_P), (row + spans, at + len(spans), np.full(len(spans), -p.num_ranks))]
    row += len(spans)
    parts += [(row + p.span_P, n, -p.ranks_P * low), (row + p.span_P, w, p.ranks_P)]
    parts.append((row + spans, at, np.full(len(spans), -p.num_ranks)))
    row += len(spans)
    for i, count in enumerate(p.counts):
        wide = np.flatnonzero(p.ranks_P >= count.ranks)
        parts.append((np.full(len(wide), row + i), n[wide], np.ones(len(wide))))
        parts.append((np.array([row + i]), np.array([p.last_at + 2 * len(spans) + i]), np.array([-1.0])))
    rows, columns, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    kept = values != 0
    return rows[kept], columns[kept], values[kept], row + len(p.counts)


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


def _run(p: _Program) -> Any | None:
    """The solver with the solution, or None if it does not say that it has one."""
    import highspy

    rows, columns, values, num_rows = _matrix(p)
    order = np.lexsort((rows, columns))
    classes, spans = len(p.points.first_C), len(p.low_S)
    num_columns, ranks_at = p.last_at + 2 * spans + len(p.counts), num_rows - 2 * spans - len(p.counts)
    untyped: Any = highspy
    lp = untyped.HighsLp()
    lp.num_col_, lp.num_row_ = num_columns, num_rows
    cost, least = np.zeros(num_columns), np.zeros(num_columns)
    cost[p.last_at : p.last_at + spans], cost[p.last_at + spans :] = p.weight_S, p.upper_s
    least[p.last_at : p.last_at + spans] = p.count_S * p.low_S
    below, above = np.full(num_rows, -np.inf), np.zeros(num_rows)
    below[:classes] = above[:classes] = np.add.reduceat(p.points.count_D, p.points.first_C)
    above[ranks_at : ranks_at + spans] = p.num_ranks * p.count_S
    above[ranks_at + spans : ranks_at + 2 * spans] = -p.num_ranks * p.count_S * p.low_S
    for row, count in enumerate(p.counts, ranks_at + 2 * spans):
        below[row], above[row] = count.least, count.most
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = cost, least, np.full(num_columns, np.inf)
    lp.row_lower_, lp.row_upper_ = below, above
    return solved(lp, (rows[order], columns[order], values[order]), _SIMPLEX)


def solved(lp: Any, entries: tuple[NDArray[Any], ...], options: dict[str, Any]) -> Any | None:
    """The solver with a solution of `lp`, or None if it does not say that it has one.

    `entries`: (rows, columns, values) of the non-zeros, by column.
    """
    import highspy

    untyped: Any = highspy
    rows, columns, values = entries
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = np.concatenate([[0], np.cumsum(np.bincount(columns, minlength=lp.num_col_))])
    lp.a_matrix_.index_, lp.a_matrix_.value_ = rows, values
    with _mute():  # silent() leaves a greeting
        solver = untyped.Highs()
        solver.silent()
        for option, value in {"threads": 1, **options}.items():
            solver.setOptionValue(option, value)
        solver.passModel(lp)
        solver.run()
    feasible = solver.getInfo().primal_solution_status == 2
    stopped = lp.integrality_ and feasible  # whole numbers are good whether or not they are proved to be the best
    return solver if solver.getModelStatus() == highspy.HighsModelStatus.kOptimal or stopped else None


def _prices(p: _Program, solver: Any) -> _Prices:
    classes, size, spans = len(p.points.first_C), len(p.ranks_P), len(p.low_S)
    signed = -np.array(solver.getSolution().row_dual)[classes:]
    dual = np.maximum(signed, 0.0)
    end = len(p.families) * size
    ranks = end + 2 * size
    return _Prices(
        rows_RP=dual[:end].reshape(-1, size), low_P=dual[end : end + size], high_P=dual[end + size : end + 2 * size],
        ranks_S=dual[ranks : ranks + spans], lasting_S=dual[ranks + spans : ranks + 2 * spans],
        counts=tuple(signed[ranks + 2 * spans :].tolist()),
    )  # fmt: skip
