"""A placement made shorter by best fit at other ends of its micro-steps (groups in lockstep, SYSTEMS.md 4.4).

The relaxation says how long micro-steps would last if sequences and groups could be divided; a placement has its own
lasts. From those on, one micro-step or all end earlier, one ends earlier than another ends later, one is split or two
are joined, each time shorter in all by some part of the whole. Best fit tries every one, with the kinds that the
placement has; what it finds is the next placement to start from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import product

import numpy as np

from planner.costmodel.strategy import LayerStrategy
from planner.placing import BestFit, Placed, Way

_SHORTER = (0.02, 0.01, 0.005, 0.0025)  # of the whole
_TIMES = (2, 4, 8)  # as much the one ends earlier, where another ends later
_PARTS = (0.5, 0.7)  # of a micro-step that is split
_PATIENCE = (np.inf, 1.0)
_LONGER = (1.0, 1.15, 1.3, 1.6, 2.0, 2.5)  # than the sequence that opens a micro-step
_STARTS = 4  # of those that grew, the shortest
_IDLE_FRAC = 1e-4  # that a placement promises less for every try in vain


class Descents:
    """Descents of one batch from several placements."""

    def __init__(self, fit: BestFit) -> None:
        self._fit = fit
        self._starts: list[_Descent] = []
        self._grown: set[LayerStrategy] = set()

    def grow(self, strategies: Iterable[LayerStrategy], times: float, best: Placed) -> Placed:
        """`best`, or the shortest of micro-steps that grow as sequences need them, over the kinds of each strategy.

        Descents start from the shortest of those that are at most `times` as long as `best`; once for each strategy.
        """
        fit, found = self._fit, []
        for strategy in dict.fromkeys(s for s in strategies if s not in self._grown):
            self._grown.add(strategy)
            kinds = tuple(k for k in fit.table.usable().tolist() if fit.menu.groups[k].strategy == strategy)
            if np.isfinite(fit.table.seconds_NK[0, list(kinds)]).any():
                for longer, patience in product(_LONGER, _PATIENCE):
                    found.append(fit.grown(Way(kinds=kinds, patience=patience), longer, times * best.time_s))
        shortest = sorted((p for p in found if p is not None), key=lambda placed: placed.time_s)[:_STARTS]
        self._starts += [_Descent(fit, placed) for placed in shortest]
        return min([best, *shortest[:1]], key=lambda placed: placed.time_s)

    @property
    def ended(self) -> bool:
        """Whether nothing is left to try."""
        return all(np.isinf(descent.promise_s) for descent in self._starts)

    def more(self, best: Placed, tries: int, late: Callable[[], bool]) -> Placed:
        """The shortest placement after at most so many more tries."""
        if not any(descent.best.time_s <= best.time_s for descent in self._starts):
            self._starts.append(_Descent(self._fit, best))
        descent = min(self._starts, key=lambda descent: descent.promise_s)
        descent.more(tries, late)
        return min(best, descent.best, key=lambda placed: placed.time_s)


class _Descent:
    """From one placement on."""

    def __init__(self, fit: BestFit, start: Placed) -> None:
        self._fit, self.best = fit, start
        self._idle = 0.0
        self._changes = self._all()

    @property
    def promise_s(self) -> float:
        """By which descents are chosen: a placement that was tried at length in vain promises less; inf at the end."""
        return self.best.time_s * (1 + _IDLE_FRAC * self._idle)

    def more(self, tries: int, late: Callable[[], bool]) -> None:
        """So many tries, or until nothing is left to try."""
        for _ in range(tries):
            change = next(self._changes, None)
            if change is None:
                self._idle = np.inf
                return
            if late():
                return
            found = self._fit.place(*change, late)
            self._idle += 1
            if found is not None and found.time_s < self.best.time_s:
                self.best, self._idle = found, 0.0

    def _all(self) -> Iterator[tuple[tuple[float, ...], Way]]:
        """Ends of micro-steps and ways to meet them, until a whole round has found nothing shorter."""
        seen: Placed | None = None
        while seen is not self.best:
            seen = self.best
            for shorter in _SHORTER:
                base: Placed | None = None
                while base is not self.best:
                    base = self.best
                    yield from self._from(base, shorter)

    def _from(self, base: Placed, shorter: float) -> Iterator[tuple[tuple[float, ...], Way]]:
        """Those of one placement, until it is no longer the shortest."""
        ways = _ways(self._fit, base)
        for limits in _moved([max(group.time_s for group in step) for step in base.steps], shorter):
            for way in ways:
                yield limits, way
                if self.best is not base:
                    return


def _moved(lasts: list[float], shorter: float) -> Iterator[tuple[float, ...]]:
    """Other lasts of micro-steps, `shorter` of their sum less in all."""
    less, steps = shorter * sum(lasts), range(len(lasts))
    found = [[*lasts[:s], lasts[s] - less, *lasts[s + 1 :]] for s in steps]
    if len(lasts) > 1:
        found.append([last * (1 - shorter) for last in lasts])
    for times in _TIMES:
        for i in steps:
            for j in steps:
                if i != j:
                    changed = list(lasts)
                    changed[i] -= times * less
                    changed[j] += (times - 1) * less
                    found.append(changed)
    for s, part in product(steps, _PARTS):
        found.append([*lasts[:s], lasts[s] * part, *lasts[s + 1 :], lasts[s] * (1 - part) - less])
    for i in steps:
        for j in steps[:i]:
            joined = [*lasts[:i], *lasts[i + 1 :]]
            joined[j] += lasts[i] - less
            found.append(joined)
    return (tuple(lasts) for lasts in found if min(lasts) > 0)


def _ways(fit: BestFit, base: Placed) -> list[Way]:
    """The kinds of the placement, and all of the strategy that most of its groups have."""
    groups = fit.menu.groups
    counts = Counter(group.kind for step in base.steps for group in step)
    strategies = Counter(groups[kind].strategy for kind in counts.elements())
    most = strategies.most_common(1)[0][0]
    used = tuple(sorted(counts))
    same = tuple(k for k in fit.table.usable().tolist() if groups[k].strategy == most)
    return [Way(kinds=kinds, patience=patience) for kinds in dict.fromkeys((used, same)) for patience in _PATIENCE]
