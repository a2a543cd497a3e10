"""CostBreakdown: a tree of seconds whose leaves sum to its root exactly; every leaf knows its evidence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from planner.costmodel.evidence import Source, weakest


@dataclass(frozen=True, slots=True, kw_only=True)
class CostBreakdown:
    """A named part of the step. A node's time is the exact sum (math.fsum) of the leaves below it."""

    name: str
    leaf_s: float = 0.0
    source: Source
    children: tuple[CostBreakdown, ...] = ()

    def leaves(self) -> Iterator[CostBreakdown]:
        """The leaves below this node, in order."""
        if not self.children:
            yield self
        for child in self.children:
            yield from child.leaves()

    @property
    def time_s(self) -> float:
        """Seconds of this node."""
        return math.fsum(leaf.leaf_s for leaf in self.leaves())


def leaf(name: str, time_s: float, source: Source) -> CostBreakdown:
    """A leaf of the tree."""
    return CostBreakdown(name=name, leaf_s=float(time_s), source=source)


def node(name: str, *children: CostBreakdown) -> CostBreakdown:
    """An inner node; its evidence is the weakest among children that cost anything."""
    sources = [child.source for child in children if child.time_s != 0.0]
    return CostBreakdown(name=name, source=weakest(sources) if sources else Source.MEASURED, children=children)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBreakdown:
    """Predicted peak bytes of one pipeline rank and what makes it."""

    states_bytes: float
    activations_bytes: float
    work_bytes: float
    fixed_bytes: float
    host_bytes: float
    in_flight: float

    @property
    def peak_bytes(self) -> float:
        """Sum of what lives on the GPU at the peak."""
        return self.states_bytes + self.activations_bytes + self.work_bytes + self.fixed_bytes
