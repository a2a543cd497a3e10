"""Which dims TP cuts of the parameters in a MoE block, found by trying: the parts' results must sum to the whole.

The dry pass (cuts.py) does not look into a block, whose routing needs values. Here the block's own code runs on a few
random tokens with random weights of the real shapes, all experts alike so that they take the room of one: once whole,
then in tp parts for each way to cut, until the parts sum to the whole. What must not be there then does not pass:
biases or residuals that each part would add again, dropout, products that mix what was cut.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_map_only

from planner.kernels import dispatch
from planner.runtime.errors import RuntimePlanError
from planner.runtime.experts import Moe, spread
from planner.runtime.sharded import Cut, _along

_TOKENS = 4
_DRAWN = 65_537  # random numbers of a parameter before they repeat: a prime, so that no two rows are alike
# Number formats to try, some kernels know only the second, and the rounding to allow for, relative to the largest
# result. A wrong cut is off by its whole size.
_FORMATS = ((torch.float32, 1e-3), (torch.bfloat16, 0.05))


@dataclass(frozen=True, slots=True)
class _Way:
    """Dims, from the end, of a column- and of a row-parallel weight, and equal pieces of the former (gate and up)."""

    column: int
    row: int
    outer: int

    def of(self, cut: Cut, num_dims: int) -> tuple[int, int]:
        """(dim, pieces) of a parameter of a single expert with `num_dims` dims."""
        if num_dims == 1:  # a bias
            return -1, self.outer if cut.kind == "column" else 1
        return (self.column, self.outer) if cut.kind == "column" else (self.row, 1)


_WAYS = tuple(_Way(*way) for way in itertools.product((-2, -1), (-1, -2), (1, 2)))


def settle(blocks: list[Moe], cuts: dict[str, Cut], twins: dict[str, list[Cut]], tp: int) -> None:
    """Set dims and pieces of the cuts inside `blocks`, once for all `twins` (cuts.alike); note which are partial.

    RuntimePlanError in one line when a block cannot be cut.
    """
    settled: set[str] = set()
    for moe in blocks:
        if f"{moe.path}.{next(moe.block.named_parameters())[0]}" in settled:
            continue
        trial = _Trial(moe, cuts, tp)
        routed, shared = trial.find()
        for name in trial.params:
            dim, outer = (routed if cuts[name].routed else shared).of(cuts[name], trial.num_dims(name))
            for cut in twins.get(name, [cuts[name]]):
                settled.add(cut.name)
                if cut.kind:
                    cut.dim, cut.outer = trial.params[name].dim() + dim, outer
                else:
                    cut.partial = True  # used on whole tokens, for a part of the result


class _Trial:
    """One block on random numbers."""

    def __init__(self, moe: Moe, cuts: dict[str, Cut], tp: int) -> None:
        self.moe, self.cuts, self.tp = moe, cuts, tp
        self.params = {f"{moe.path}.{name}": param for name, param in moe.block.named_parameters()}
        names = {id(param): name for name, param in self.params.items()}
        first = {name: name for name in self.params}
        listed = list(moe.experts.children()) if moe.experts is not None else []
        for expert in listed[1:]:
            for own, twin in zip(expert.parameters(), listed[0].parameters(), strict=True):
                first[names[id(own)]] = names[id(twin)]
        self.slots = [
            (owner, attribute, first[names[id(param)]])
            for owner in moe.block.modules()
            for attribute, param in owner._parameters.items()
            if param is not None
        ]

    def num_dims(self, name: str) -> int:
        """Dims of a parameter, of one expert if it stacks them."""
        return self.params[name].dim() - self._stacks(name)

    def _stacks(self, name: str) -> bool:
        return self.cuts[name].routed and self.moe.experts is None

    def find(self) -> tuple[_Way, _Way]:
        """How to cut the routed experts and what else is cut in the block."""
        if not any(cut.kind for cut in (self.cuts[name] for name in self.params) if cut.routed):
            raise self._refusal("the plan leaves them whole")
        others = any(self.cuts[name].kind and not self.cuts[name].routed for name in self.params)
        on_cpu = dispatch.pretending(dict.fromkeys(dispatch.table("cpu"), "torch"))  # whatever the plan's device takes
        with unset_fake_temporarily(), torch.no_grad(), torch.random.fork_rng(devices=[]), on_cpu:
            torch.manual_seed(0)
            drawn = {name: self._value(name) for name in dict.fromkeys(name for _, _, name in self.slots)}
            tokens = tree_map_only(torch.Tensor, self._input, self.moe.call)
            failure = ""
            for dtype, limit in _FORMATS:
                values, call = tree_map_only(torch.Tensor, lambda t, d=dtype: _to(t, d), (drawn, tokens))
                try:
                    whole = self._run(values, call)
                except Exception as error:
                    failure = failure or f"their code does not run on random numbers: {error}"
                    continue
                for ways in itertools.product(_WAYS, _WAYS if others else _WAYS[:1]):
                    if self._error(whole, values, call, ways) <= limit:
                        return ways
                failure = "no parts of them sum to the whole (a bias or residual that each part would add, dropout)"
                break
        raise self._refusal(failure)

    def _refusal(self, why: str) -> RuntimePlanError:
        where = f"experts of {self.moe.path} are not cut over tp = {self.tp}"
        return RuntimePlanError(f"{where}: {' '.join(why.split())[:200]}: plan with --forbid tp")

    def _value(self, name: str) -> torch.Tensor:
        shape = self.params[name].shape[self._stacks(name) :]
        drawn = torch.randn(_DRAWN) / math.sqrt(shape[-1] if len(shape) > 1 else 1)
        return drawn.repeat(-(-shape.numel() // _DRAWN))[: shape.numel()].view(shape)

    def _input(self, like: torch.Tensor) -> torch.Tensor:
        """Few tokens in the place of many: the last dim stays."""
        shape = (*(1,) * (like.dim() - 2), *(_TOKENS,) * (like.dim() > 1), *like.shape[-1:])
        return torch.randn(shape) if like.is_floating_point() else torch.randint(self.moe.num_here, shape)

    def _error(self, whole: Any, values: dict[str, torch.Tensor], call: Any, ways: tuple[_Way, _Way]) -> float:
        """How far the sum of the parts is from the whole, relative to its largest element."""
        total = torch.zeros(())
        for rank in range(self.tp):
            parts = {name: self._part(name, value, rank, ways) for name, value in values.items()}
            if any(part is None for part in parts.values()):
                return math.inf
            try:
                total = total + self._run(parts, call).float()
            except (RuntimeError, ValueError, IndexError):  # shapes that do not fit each other
                return math.inf
        return float((total - whole.float()).abs().max() / whole.float().abs().max())

    def _part(self, name: str, value: torch.Tensor, rank: int, ways: tuple[_Way, _Way]) -> torch.Tensor | None:
        """A rank's part of a value; None when it does not divide."""
        cut = self.cuts[name]
        if not cut.kind:
            return value
        dim, outer = ways[not cut.routed].of(cut, value.dim())
        if value.shape[dim] % (outer * self.tp):
            return None
        part = _along(value, value.dim() + dim, outer, lambda t, d: t.chunk(self.tp, d)[rank])
        return spread(part, rank, self.tp) if name.rpartition(".")[2] in self.moe.spread else part

    def _run(self, values: dict[str, Any], call: Any) -> torch.Tensor:
        with self._swapped(values):
            out = self.moe.original(*call[0], **call[1])
        if not isinstance(out, torch.Tensor):
            raise ValueError(f"the block returns a {type(out).__name__}, not a tensor")
        return out

    @contextmanager
    def _swapped(self, values: dict[str, torch.Tensor]) -> Iterator[None]:
        """The block with `values` for parameters, the same for each expert, and ones for buffers."""
        kept: list[tuple[dict[str, Any], str, Any]] = []
        for owner, attribute, name in self.slots:
            kept.append((owner._parameters, attribute, owner._parameters[attribute]))
            value = values[name]
            stacked = self._stacks(name)
            owner._parameters[attribute] = value.expand(self.moe.num_here, *value.shape) if stacked else value
        for owner in self.moe.block.modules():
            for attribute, buffer in owner._buffers.items():
                if buffer is not None:
                    kept.append((owner._buffers, attribute, buffer))
                    owner._buffers[attribute] = torch.ones(buffer.shape, dtype=buffer.dtype)
        try:
            yield
        finally:
            for slots, attribute, before in kept:
                slots[attribute] = before


def _to(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype) if x.is_floating_point() else x
