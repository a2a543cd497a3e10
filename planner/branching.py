"""Branch and bound over how many micro-steps a dispatch has and how long the longest of them lasts.

A node is a number of micro-steps and an interval for the longest; relaxation.relax gives its bound, and how the
sequences would share the kinds, which best fit follows (SYSTEMS.md 4.4). An interval that is still below the incumbent
is cut where the relaxed longest micro-step ends. Groups on their own have a single node. Any moment gives a valid
bound: the least of all nodes.
"""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass, field, replace

from planner.batch import Table, fewest_steps, points_of
from planner.batch_bounds import steps_bound_s
from planner.costmodel.sequences import Menu
from planner.program import SLACK
from planner.relaxation import Count, Relaxed, Span, relax

_NARROW = 0.01  # of the incumbent: intervals below it are not cut
_NARROW_ONE = 0.003  # the same of a single micro-step
_ROOTS = 3  # numbers of micro-steps that are all looked at before any is cut
_MOST_COUNTED = 16  # groups side by side that are so wide that their number is branched on
_WHOLE, _MANY = 0.02, 1 << 20
_ALIKE = 0.004  # of their time, by which guides are told apart
_SMALL, _FEW_RELAXED, _FEW_CUTS, _CUTS = 1024, 8, 1, 4  # of a small batch the first relaxations are cut less
_BETTER = 0.993  # an incumbent that much shorter makes it worth relaxing again what is not cut


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class _Node:
    """`at_least`: this many micro-steps or more; `tight`: whether they were relaxed together."""

    bound_s: float
    number: int
    steps: int
    low_s: float
    high_s: float
    at_least: bool = False
    tight: bool = False
    counts: tuple[Count, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guide:
    """A relaxed dispatch of `steps` micro-steps: seconds of each, the longest first, and which kinds it uses.

    `counts`: how often the longest counts.
    """

    lasts_s: tuple[float, ...]
    counts: int
    relaxed: Relaxed

    @property
    def time_s(self) -> float:
        """Seconds of all micro-steps."""
        return sum(self.lasts_s) + (self.counts - 1) * max(self.lasts_s)

    @property
    def alike(self) -> tuple[int, ...]:
        """The same for guides whose micro-steps last about as long."""
        return tuple(round(last / (_ALIKE * self.time_s)) for last in self.lasts_s) + (
            round(math.log(self.time_s) / _ALIKE),
        )


class Tree:
    """The open nodes; `expand` one at a time."""

    def __init__(self, menu: Menu, table: Table) -> None:
        self.menu, self.table, self.points = menu, table, points_of(table)
        self.fixed_s = float(table.fixed_K[table.usable()].min()) if len(table.usable()) else 0.0
        self.number = itertools.count()
        self.kinds: tuple[int, ...] = ()  # of the last relaxation's program
        self._open: list[_Node] = []
        self._relaxed_so_far = 0
        self._closed: dict[_Node, float] = {}  # not to be cut, and the incumbent that they were relaxed under
        fewest = fewest_steps(menu, table) if len(table.usable()) else 1
        self.first_steps = fewest + _ROOTS
        if menu.lockstep:
            bound = steps_bound_s(menu, table, self.points, fewest, at_least=True)
            self._push(bound, fewest, 0.0, math.inf, at_least=True)
        else:
            self._push(steps_bound_s(menu, table, self.points, 1), 1, 0.0, math.inf)

    def _push(
        self, bound_s: float, steps: int, low_s: float, high_s: float, *, at_least: bool = False,
        counts: tuple[Count, ...] = (),
    ) -> None:  # fmt: skip
        node = _Node(
            bound_s=bound_s, number=next(self.number), steps=steps, low_s=low_s, high_s=high_s, at_least=at_least,
            counts=counts,
        )  # fmt: skip
        heapq.heappush(self._open, node)

    @property
    def bound_s(self) -> float:
        """No dispatch is shorter; inf if none is possible."""
        return min([node.bound_s for node in (*self._open[:1], *self._closed)], default=math.inf)

    def expand(self, upper_s: float) -> Guide | None:
        """Relax the node with the least bound and cut it; None if no node can raise the bound any more.

        `upper_s`: the shortest dispatch that is known.
        """
        for node in [n for n, seen_s in self._closed.items() if upper_s < _BETTER * seen_s]:
            del self._closed[node]
            heapq.heappush(self._open, node)
        while self._open and self._open[0].bound_s < upper_s:
            node = self._next(upper_s)
            if node.at_least:
                self._count(node, upper_s)
                continue
            guide = self._relaxed(node, upper_s)
            if guide is not None:
                return guide
        return None

    def roots(self, upper_s: float) -> list[_Node]:
        """The fewest numbers of micro-steps that were not relaxed yet."""
        return [n for n in self._open if n.high_s == math.inf and n.bound_s < upper_s and n.steps < self.first_steps]

    def _next(self, upper_s: float) -> _Node:
        """The fewest numbers of micro-steps first, once each, then the node with the least bound."""
        roots = self.roots(upper_s)
        if not roots:
            return heapq.heappop(self._open)
        node = min(roots, key=lambda node: (node.steps, node.at_least))
        self._open.remove(node)
        heapq.heapify(self._open)
        return node

    def _count(self, node: _Node, upper_s: float) -> None:
        """Split "so many micro-steps or more" into so many, and more; relax it first where that may close it."""
        if node.steps >= self.first_steps and not node.tight:
            spans = self._spans(node, upper_s)
            if not spans:
                return
            relaxed = relax(self.menu, self.table, self.points, spans, upper_s, (), self.kinds)
            bound = node.bound_s if relaxed is None else max(node.bound_s, relaxed.bound_s)
            heapq.heappush(self._open, replace(node, bound_s=bound, tight=True))
            return
        self._push(node.bound_s, node.steps, 0.0, math.inf)
        if node.steps < len(self.table.tokens_N):
            more = steps_bound_s(self.menu, self.table, self.points, node.steps + 1, at_least=True)
            self._push(max(node.bound_s, more), node.steps + 1, 0.0, math.inf, at_least=True)

    def _spans(self, node: _Node, upper_s: float) -> tuple[Span, ...]:
        """The longest micro-step and the others, if they last shorter than `upper_s`; () if they cannot."""
        others, counts = node.steps - 1, self.menu.longest_counts
        low = node.low_s if node.at_least else max(node.low_s, node.bound_s / (others + counts))
        high = min(node.high_s, (upper_s - others * self.fixed_s) / counts)
        if high < low:
            return ()
        longest = Span(low_s=low, high_s=high, count=1, weight=counts)
        if not others:
            return (longest,)
        rest = min(high, upper_s - counts * low - (others - 1) * self.fixed_s)
        if node.at_least:
            more = math.ceil(upper_s / self.fixed_s) if self.fixed_s > 0 else _MANY
            return longest, Span(low_s=min(self.fixed_s, rest), high_s=rest, count=others, more=more)
        least = node.bound_s - counts * high if others == 1 else 0.0
        return longest, Span(low_s=min(max(self.fixed_s, least), rest), high_s=rest, count=others)

    def _relaxed(self, node: _Node, upper_s: float) -> Guide | None:
        """Relax; the node's parts are open or closed again. None if it has no dispatch shorter than `upper_s`."""
        others, counts, spans = node.steps - 1, self.menu.longest_counts, self._spans(node, upper_s)
        if not spans:
            return None
        low, high = spans[0].low_s, spans[0].high_s
        few = self._relaxed_so_far < _FEW_RELAXED and len(self.table.tokens_N) <= _SMALL
        self._relaxed_so_far += 1
        cuts = _FEW_CUTS if few else _CUTS
        relaxed = relax(self.menu, self.table, self.points, spans, upper_s, node.counts, self.kinds, cuts)
        if relaxed is None:
            self._closed[node] = upper_s
        if relaxed is None or relaxed.bound_s == math.inf:
            return None
        self.kinds = relaxed.solved
        bound = max(node.bound_s, relaxed.bound_s)
        if bound > sum(span.weight * span.count * span.high_s for span in spans) * SLACK:
            return None
        first = relaxed.last_s[0]
        cut = min(max(first, low + 0.2 * (high - low)), high - 0.2 * (high - low))
        if high - low > (_NARROW if others else _NARROW_ONE) * upper_s and bound < upper_s:
            self._push(bound, node.steps, low, cut, counts=node.counts)
            self._push(bound, node.steps, cut, high, counts=node.counts)
        elif bound >= upper_s or not self._counted(replace(node, bound_s=bound, low_s=low, high_s=high), relaxed):
            self._closed[replace(node, bound_s=bound, low_s=low, high_s=high)] = upper_s
        if not others:
            first = max(first, min(bound / counts, high))
        return Guide(lasts_s=(first, *(relaxed.last_s[1:] * others)), counts=counts, relaxed=relaxed)

    def _counted(self, node: _Node, relaxed: Relaxed) -> bool:
        """Branch on how many groups are so wide or wider, for the widest where that is no whole number."""
        ranks = {k: self.menu.groups[k].ranks for k in relaxed.groups}
        for wide in sorted(set(ranks.values()), reverse=True):
            if wide * _MOST_COUNTED < self.menu.num_ranks:
                return False
            count = sum(n for k, n in relaxed.groups.items() if ranks[k] >= wide)
            if abs(count - round(count)) < _WHOLE:
                continue
            old = next((c for c in node.counts if c.ranks == wide), Count(ranks=wide, least=0, most=_MANY))
            others = tuple(c for c in node.counts if c.ranks != wide)
            for new in (replace(old, most=math.floor(count)), replace(old, least=math.ceil(count))):
                self._push(node.bound_s, node.steps, node.low_s, node.high_s, counts=(*others, new))
            return True
        return False


def tight_bound_s(menu: Menu, table: Table, upper_s: float, num_programs: int) -> float:
    """The bound after at most `num_programs` relaxations; `upper_s` if nothing shorter exists."""
    tree = Tree(menu, table)
    for _ in range(num_programs):
        if tree.expand(upper_s) is None:
            break
    return min(tree.bound_s, upper_s)
