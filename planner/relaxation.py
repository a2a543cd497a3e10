"""relax(...): how the sequences of a batch would share kinds of groups if they could be divided, and a bound from it.

A span is `count` micro-steps that last between `low_s` and `high_s` each. For a sequence i, a kind k (r ranks, `fixed`
seconds f, s seconds and the share v of a group's room that i takes) and a span t:

    x_ikt >= 0, sum_kt x = 1               the sequence's shares, where s + f <= high
    n_kt, w_kt >= 0                        groups, and the seconds that they last altogether
    rows of time, of room and of whole sequences (program.py)
    low n <= w <= high n,  sum_k r n <= N count,  sum_k r (w - low n) <= N (T_t - count low)
    least <= sum_kt n <= most              of groups with so many ranks or more, where branching says so
    minimise sum_t weight_t T_t            T_t: seconds of the span, at least count low

A dispatch whose micro-steps lie in the spans is a solution with x 0 or 1 and w = n T, so no such dispatch is shorter
than the least sum. The program is solved for lengths joined into classes and for a few kinds; its prices (dual values,
none below 0) are then applied to every length and every kind, which is a bound by weak duality whatever the classes,
the kinds and the solver's tolerances. Kinds by whose groups the prices could be beaten join the program.

Legend: D distinct lengths, C classes of them, K kinds, P pairs of a kind and a span, S spans, R families of rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.batch import IntArray, Points, Table
from planner.costmodel.keys import Array
from planner.costmodel.sequences import Menu
from planner.patterns import long_patterns, prices, wide
from planner.program import Family, Matrix, families, fitting, solved

_NONE = 1e-6  # groups, ranks
# Primal simplex without presolve: on these programs twice as fast as the defaults.
_SIMPLEX = {"presolve": "off", "simplex_strategy": 4}
_ROUNDS, _JOIN = 3, 8  # programs of more and more kinds, and how many kinds join at most
_NEAR = 0.99  # of the shortest dispatch, from where on there are none
_KEPT = 12  # kinds for the next program
_LOSS = 5e-4  # of the bound, by which kinds that are not in the program may lower it
_PARTS = (0.0, 0.4, 0.7, 0.9, 1.0)  # of the most that a second may cost, tried for kinds that are not in the program


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """`count` micro-steps of at least `low_s` and at most `high_s` seconds, of which each counts `weight` times.

    `more`: as many more there may be.
    """

    low_s: float
    high_s: float
    count: int
    weight: int = 1
    more: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """At least `least` and at most `most` groups of `ranks` ranks or more, in all micro-steps together."""

    ranks: int
    least: int
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxed:
    """`bound_s`: no dispatch in these spans is shorter. `last_s`: seconds of a micro-step of each span.

    `kinds`: those that the solution uses, then the others by how much dearer their ranks are at best. `groups`: of
    each kind that it uses. `solved`: kinds of the program, to start the next one with.
    """

    bound_s: float
    last_s: tuple[float, ...]
    kinds: tuple[int, ...]
    groups: dict[int, float]
    solved: tuple[int, ...]


def relax(
    menu: Menu, table: Table, points: Points, spans: tuple[Span, ...], upper_s: float, counts: tuple[Count, ...] = (),
    start: tuple[int, ...] = (), most_cuts: int = 4,
) -> Relaxed | None:  # fmt: skip
    """The bound of dispatches in `spans`, inf if there are none; None if the solver fails.

    `upper_s`: what a dispatch takes that is known; `start`: kinds that the first program has; `most_cuts`: how often a
    solution of a single span is cut where it divides what groups only hold whole.
    """
    every = _program(menu, table, points, spans, upper_s, counts)
    if every is None:
        return Relaxed(bound_s=np.inf, last_s=(), kinds=(), groups={}, solved=start)
    kinds, best, cuts, rounds = set(start), -np.inf, 0, 0
    kinds |= _wanted(every, np.isin(every.kind_P, list(kinds)))
    while True:
        inside = np.isin(every.kind_P, list(kinds))
        program = every.of(inside)
        solver: Any = _run(program)
        if solver is None:
            return None
        dual = _prices(program, solver)
        price_DP = np.asarray(sum(y * f.of_DP for y, f in zip(dual.rows_RP, program.families, strict=True)))
        price_D = np.where(program.fits_DP, price_DP, np.inf).min(axis=1)
        opening_P = _opening(every, dual, price_D)
        lost_P = np.where(inside, 0.0, np.minimum(opening_P, 0.0) * every.most_P)
        bound = _bound(program, dual, price_D) + float(lost_P.sum())
        best = max(best, bound)
        rounds += 1
        if -lost_P.sum() > _LOSS * abs(bound) and rounds < _ROUNDS + cuts:
            kinds |= set(every.kind_P[np.argsort(lost_P)[:_JOIN]][np.sort(lost_P)[:_JOIN] < 0].tolist())
            kinds |= _wanted(every, np.isin(every.kind_P, list(kinds)))
            continue
        if cuts == most_cuts or len(spans) > 1 or best >= _NEAR * upper_s:
            break
        cut = _cut(menu, table, every, inside, np.array(solver.getSolution().col_value))
        if cut is None:
            break
        cuts += 1
        every = replace(every, families=[*every.families, cut])
    values = np.array(solver.getSolution().col_value)
    used = np.bincount(
        program.kind_P, weights=values[program.groups_at :][: len(program.kind_P)], minlength=len(table.ranks_K)
    )
    dearer = np.full(len(table.ranks_K), np.inf)
    np.minimum.at(dearer, every.kind_P, opening_P / every.ranks_P)
    dearer[used > _NONE] = -np.inf
    lasts = values[program.last_at : program.last_at + len(spans)] / program.count_S
    order = tuple(int(k) for k in np.argsort(dearer, kind="stable") if dearer[k] < np.inf)
    return Relaxed(
        bound_s=best, last_s=tuple(np.clip(lasts, program.low_S, program.high_S).tolist()),
        kinds=order, groups={int(k): float(used[k]) for k in np.flatnonzero(used > _NONE)}, solved=order[:_KEPT],
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Program:
    """The program; columns are x (where `fits_CP`), n and w of each pair, T and spare ranks of each span, groups
    beyond the most of each count, and each span's micro-steps beyond its count.
    """

    families: list[Family]
    points: Points
    fits_DP: NDArray[np.bool_]
    kind_P: IntArray
    ranks_P: Array
    span_P: IntArray
    low_S: Array
    high_S: Array
    count_S: Array
    more_S: Array
    weight_S: Array
    num_ranks: float
    upper_s: float
    counts: tuple[Count, ...]

    @property
    def fits_CP(self) -> NDArray[np.bool_]:
        """Whether the longest of a class fits."""
        return np.asarray(self.fits_DP[self.points.first_C])

    @property
    def most_P(self) -> Array:
        """Groups of a pair that there can be."""
        return np.asarray(self.num_ranks * (self.count_S + self.more_S)[self.span_P] / self.ranks_P)

    @property
    def groups_at(self) -> int:
        """Column of the first n."""
        return int(self.fits_CP.sum())

    @property
    def last_at(self) -> int:
        """Column of the first T."""
        return self.groups_at + 2 * len(self.ranks_P)

    def of(self, inside_P: NDArray[np.bool_]) -> _Program:
        """The program of some pairs."""
        held = [
            Family(of_DP=f.of_DP[:, inside_P], groups_P=f.groups_P[inside_P], lasting_P=f.lasting_P[inside_P])
            for f in self.families
        ]
        return replace(
            self, families=held, fits_DP=self.fits_DP[:, inside_P], kind_P=self.kind_P[inside_P],
            ranks_P=self.ranks_P[inside_P], span_P=self.span_P[inside_P],
        )  # fmt: skip


def _program(
    menu: Menu, table: Table, points: Points, spans: tuple[Span, ...], upper_s: float, counts: tuple[Count, ...]
) -> _Program | None:
    """The program over all kinds; None if some sequence has no pair."""
    low, high, count, more = (
        np.array([getattr(s, name) for s in spans], float) for name in ("low_s", "high_s", "count", "more")
    )  # fmt: skip
    usable = table.usable()
    kinds, span = np.repeat(usable, len(spans)), np.tile(np.arange(len(spans)), len(usable))
    fits = fitting(menu, points, table, kinds, high[span])
    some = fits.any(axis=0)
    kinds, span, fits = kinds[some], span[some], fits[:, some]
    if not fits.any(axis=1).all():
        return None
    return _Program(
        families=list(families(menu, points, table, kinds, high[span], fits)), points=points, fits_DP=fits,
        kind_P=kinds, ranks_P=table.ranks_K[kinds], span_P=span, low_S=low, high_S=high, count_S=count,
        more_S=more, weight_S=np.array([s.weight for s in spans], float), num_ranks=float(menu.num_ranks),
        upper_s=upper_s, counts=counts,
    )  # fmt: skip


def _cut(menu: Menu, table: Table, every: _Program, inside_P: NDArray[np.bool_], values: Array) -> Family | None:
    """Rows that whole sequences keep and the solution of the pairs `inside_P` breaks; None if it breaks none."""
    fits_CP = every.fits_CP[:, inside_P]
    shares_CP = np.zeros(fits_CP.shape)
    shares_CP[fits_CP] = values[: fits_CP.sum()]
    groups_P = values[fits_CP.sum() :][: fits_CP.shape[1]]
    of_DP, price_P = np.zeros(every.fits_DP.shape), np.zeros(len(every.kind_P))
    inside = np.flatnonzero(inside_P)
    for at in wide(every.ranks_P[inside], every.num_ranks):
        p, last_s = inside[at], float(every.high_S[every.span_P[inside[at]]])
        if groups_P[at] < _NONE:
            continue
        found = long_patterns(every.points, table, int(every.kind_P[p]), every.fits_DP[:, p], last_s, menu.lockstep)
        if found is None:
            continue
        long_L, patterns = found
        shares = shares_CP[np.searchsorted(every.points.first_C, long_L), at]
        row = prices(patterns, shares, float(groups_P[at]))
        if row is not None:
            of_DP[long_L, p], price_P[p] = row, -1.0
    return Family(of_DP=of_DP, groups_P=price_P, lasting_P=np.zeros(len(price_P))) if price_P.any() else None


def _wanted(every: _Program, inside_P: NDArray[np.bool_]) -> set[int]:
    """Kinds for classes without a pair that is `inside_P`, of least device time and of least time; and for counts."""
    bare = every.points.first_C[~every.fits_CP[:, inside_P].any(axis=1)]
    seconds = np.where(every.fits_DP, every.families[0].of_DP, np.inf)[bare]
    found: set[int] = set()
    if len(bare):
        best = np.append((seconds * every.ranks_P).argmin(axis=1), seconds.argmin(axis=1))
        found |= set(every.kind_P[best].tolist())
    for count in every.counts:
        counted = every.ranks_P >= count.ranks
        if count.least and not (counted & inside_P).any():
            found |= set(every.kind_P[counted].tolist())
    return found


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

    def group_P(self, p: _Program) -> Array:
        """What a group of each pair costs by its ranks and its count, less what its shortest time is given back."""
        cost = (self.ranks_S - self.lasting_S * p.low_S)[p.span_P] * p.ranks_P
        for price, count in zip(self.counts, p.counts, strict=True):
            cost = cost + price * (p.ranks_P >= count.ranks)
        return np.asarray(cost)


def _bound(p: _Program, prices: _Prices, price_D: Array) -> float:
    """The Lagrangian's least value: every length takes its cheapest pair; n, w and T the better end of their range."""
    span, low, high, most = p.span_P, p.low_S[p.span_P], p.high_S[p.span_P], p.most_P
    groups = sum(y * f.groups_P for y, f in zip(prices.rows_RP, p.families, strict=True))
    groups = groups + prices.low_P * low - prices.high_P * high + prices.group_P(p)
    lasts = sum(y * f.lasting_P for y, f in zip(prices.rows_RP, p.families, strict=True))
    lasts = lasts - prices.low_P + prices.high_P + prices.lasting_S[span] * p.ranks_P
    step = p.num_ranks * (prices.lasting_S * p.low_S - prices.ranks_S)
    fixed = float(step @ p.count_S + np.minimum(step, 0.0) @ p.more_S)
    for price, count in zip(prices.counts, p.counts, strict=True):
        fixed -= price * (count.most if price > 0 else count.least)
    each = p.weight_S - p.num_ranks * prices.lasting_S
    ends = np.minimum(each * p.count_S * p.low_S, each * (p.count_S + p.more_S) * p.high_S)
    return float(
        p.points.count_D @ price_D + np.minimum(groups, 0.0) @ most + np.minimum(lasts, 0.0) @ (most * high)
        + ends.sum() + fixed
    )  # fmt: skip


def _opening(p: _Program, prices: _Prices, price_D: Array) -> Array:
    """What opening a group of each pair costs beyond what `price_D` pays for its room and time at most; (P,).

    Below 0 groups of the pair beat the prices. The pair's own prices, a second's and its room's, are chosen so that no
    length is cheaper in it than `price_D`: of some prices of a second the one that leaves the most. With these prices
    its w is free: low n <= w <= high n take up the difference.
    """
    time, room, whole_DP = p.families[0], p.families[1], p.families[3].of_DP > 0
    low, high, fixed = p.low_S[p.span_P], p.high_S[p.span_P], time.groups_P
    lasting, group = prices.lasting_S[p.span_P] * p.ranks_P, prices.group_P(p)
    paid_DP = np.where(p.fits_DP, price_D[:, None], 0.0)
    room_DP = np.where(p.fits_DP, room.of_DP, 1.0)
    over = lasting * fixed + group  # left at a second's price `lasting`, where w takes up nothing
    tiny = 1e-12
    most = np.where(
        over >= 0, lasting + over / np.maximum(high - fixed, tiny),
        np.clip((lasting * low + group) / np.maximum(low - fixed, tiny), 0.0, lasting),
    )  # fmt: skip
    best = np.full(len(fixed), -np.inf)
    for part in _PARTS:
        second = part * np.maximum(most, 0.0)
        rest_DP = paid_DP - second * time.of_DP
        held = np.maximum(np.where(whole_DP, 0.0, rest_DP / room_DP).max(axis=0), 0.0)
        alone = np.maximum(np.where(whole_DP, rest_DP - held * room_DP, 0.0).max(axis=0), 0.0)
        free = second * time.lasting_P + held * room.lasting_P + lasting
        left = second * fixed + held * room.groups_P - alone + group
        best = np.maximum(best, left + np.maximum(free, 0.0) * low - np.maximum(-free, 0.0) * high)
    return best


def _run(p: _Program) -> Any | None:
    """The solver with the solution, or None if it does not say that it has one."""
    import highspy

    matrix, spans = Matrix(), np.arange(len(p.low_S))
    own, low, high = np.arange(len(p.ranks_P)), p.low_S[p.span_P], p.high_S[p.span_P]
    n, w, last = p.groups_at + own, p.groups_at + len(own) + own, p.last_at + spans
    spare, one = last + len(spans), np.ones(len(own))
    matrix.add_shares(p.points, p.families, p.fits_CP)
    matrix.add(len(own), (own, n, low), (own, w, -one))
    matrix.add(len(own), (own, n, -high), (own, w, one))
    ranks_at, whole, more = matrix.num_rows, np.full(len(spans), -p.num_ranks), spare + len(spans) + len(p.counts)
    matrix.add(len(spans), (p.span_P, n, p.ranks_P), (spans, spare, whole), (spans, more, whole))
    matrix.add(
        len(spans), (p.span_P, n, -p.ranks_P * low), (p.span_P, w, p.ranks_P), (spans, last, whole),
        (spans, more, -whole * p.low_S),
    )  # fmt: skip
    for i, count in enumerate(p.counts):
        counted = np.flatnonzero(p.ranks_P >= count.ranks)
        beyond = np.array([p.last_at + 2 * len(spans) + i])
        matrix.add(1, (0 * counted, n[counted], np.ones(len(counted))), (0 * beyond, beyond, -np.ones(1)))
    untyped: Any = highspy
    lp = untyped.HighsLp()
    lp.num_col_, lp.num_row_ = p.last_at + 3 * len(spans) + len(p.counts), matrix.num_rows
    cost, least = np.zeros(lp.num_col_), np.zeros(lp.num_col_)
    cost[p.last_at :] = p.upper_s
    cost[last], least[last], cost[more] = p.weight_S, p.count_S * p.low_S, 0.0
    most = np.full(lp.num_col_, np.inf)
    most[more] = p.more_S
    below, above = np.full(matrix.num_rows, -np.inf), np.zeros(matrix.num_rows)
    classes = len(p.points.first_C)
    below[:classes] = above[:classes] = np.add.reduceat(p.points.count_D, p.points.first_C)
    above[ranks_at + spans] = p.num_ranks * p.count_S
    above[ranks_at + len(spans) + spans] = -p.num_ranks * p.count_S * p.low_S
    for row, count in enumerate(p.counts, ranks_at + 2 * len(spans)):
        below[row], above[row] = count.least, count.most
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = cost, least, most
    lp.row_lower_, lp.row_upper_ = below, above
    return solved(lp, matrix, _SIMPLEX)


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
