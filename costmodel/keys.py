"""What layer prices are asked for: the machine, and the parallel layouts as arrays of equal shape (K,)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from planner.costmodel.engine import EngineSpec
from planner.costmodel.graph import TpCut
from planner.costmodel.hardware import ClusterSpec

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where and how a plan runs: the cluster, the part of its link tiers in use, the engine, the dtype."""

    cluster: ClusterSpec
    domains: tuple[int, ...]
    num_gpus: int
    engine: EngineSpec
    dtype: str
    dtype_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """The choices that a layer's own time and activations depend on, arrays of shape (K,).

    `sp`, `vocab_parallel`, `piped` (pp > 1) and `chunked_loss` are 0/1; cp = ulysses * ring.
    """

    tp: Array
    sp: Array
    ulysses: Array
    ring: Array
    ep: Array
    micro_batch_size: Array
    vocab_parallel: Array
    piped: Array = field(default_factory=lambda: np.zeros(1))
    chunked_loss: Array = field(default_factory=lambda: np.zeros(1))

    @property
    def cp(self) -> Array:
        """Context-parallel degree."""
        return self.ulysses * self.ring

    @property
    def tokens(self) -> Array:
        """Tokens per rank over the traced ones."""
        return self.micro_batch_size / self.cp

    @property
    def outer(self) -> Array:
        """Ranks that share a residual-stream tensor: tp under sequence parallelism, else 1."""
        return np.where(self.sp > 0, self.tp, 1.0)

    @property
    def vocab_tp(self) -> Array:
        """Ranks that share the vocabulary."""
        return np.where(self.vocab_parallel > 0, self.tp, 1.0)

    def cut(self, cut: TpCut) -> Array:
        """By how much tensor parallelism divides the work of an op cut this way."""
        if cut is TpCut.REPLICATED:
            return np.ones_like(self.tp)
        if cut is TpCut.OUTER:
            return self.outer
        return self.vocab_tp if cut is TpCut.VOCAB else self.tp
