"""Selective recomputation: what forward keeps of a layer, and how backward takes it up again.

Torch's own (create_selective_checkpoint_contexts) keeps all results of an op or none, and wants every op of forward
in the same order again, which FSDP's do not keep to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from planner.runtime import collectives
from planner.runtime.errors import RuntimePlanError

_KEPT = (
    "ring_attention",
    "mm",
    "grouped_mm",
    "addmm",
    "bmm",
    "baddbmm",
    "matmul",
    "linear",
    "convolution",
    "scaled_dot_product",
    "einsum",
)
_SUMS = ("_c10d_functional::reduce_scatter", "_c10d_functional::all_reduce")
_SENT = (*_SUMS, "_c10d_functional::all_to_all")


def _is_kept(func: Any) -> bool:
    """Products, attention, sums and exchanges over ranks; norms, elementwise ops and gathers are redone.

    (engine.selective_recompute, engine.selective_gathers_again.)
    """
    name: str = func.name()
    base = name.rpartition("::")[2].lstrip("_")
    return name.startswith(_SENT) or any(base.startswith(k) for k in _KEPT)


@dataclass(frozen=True, slots=True)
class _Shape:
    """A tensor without its values."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    options: dict[str, Any]

    @classmethod
    def of(cls, x: torch.Tensor) -> _Shape:
        """That of `x`."""
        return cls(tuple(x.shape), x.stride(), {"dtype": x.dtype, "device": x.device})

    def empty(self) -> torch.Tensor:
        """A tensor of this shape, whatever is in it."""
        return torch.empty_strided(self.size, self.stride, **self.options)


@dataclass(slots=True)
class Result:
    """What one kept op put out: `out` and its tensors' versions, shapes alone if `partial`, None: run it again."""

    func: Any
    out: Any
    versions: list[int]
    partial: bool


def _versions(tree: Any) -> list[int]:
    return [x._version for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


_keeping: list[Keep] = []  # of the layers that run now, the innermost last


def forget_product() -> None:
    """Say of the last product that backward needs its shape alone: what comes of it is sent and kept as received."""
    if _keeping and _keeping[-1].kept:
        last = _keeping[-1].kept[-1]
        if not last.func.name().startswith(_SENT) and not last.partial:
            last.out, last.partial = tree_map_only(torch.Tensor, _Shape.of, last.out), True


class Keep(TorchDispatchMode):
    """Forward: write the results of kept ops down, in order.

    Not those that backward has no use for: products whose parts are summed over ranks at once, of which a shape is
    enough, and the last sum (of a product with it), in front of which recomputation stops.
    """

    def __init__(self, kept: list[Result]) -> None:
        super().__init__()
        self.kept = kept

    def __enter__(self) -> Any:
        _keeping.append(self)
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if _is_kept(func):
            partial = collectives.makes_parts()
            alias = tree_map_only(torch.Tensor, _Shape.of if partial else torch.Tensor.detach, out)
            self.kept.append(Result(func, alias, _versions(out), partial))
        return out

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _keeping.pop()
        if self.kept and self.kept[-1].func.name().startswith(_SUMS):
            self.kept[-1].out = None
            if len(self.kept) > 1 and self.kept[-2].partial:
                self.kept[-2].out = None


class Replay(TorchDispatchMode):
    """Recomputation: hand the results out again; an op without one runs.

    `once`: backward is one pass, after which a result is not needed again.
    """

    def __init__(self, kept: list[Result], once: bool) -> None:
        super().__init__()
        self.kept, self.once, self.at = kept, once, 0

    def __enter__(self) -> Any:
        self.at = 0
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_kept(func):
            return func(*args, **(kwargs or {}))
        result = self.kept[self.at]
        assert result.func is func, f"recomputation ran {func} where forward ran {result.func}"
        self.at += 1
        out = result.out
        if self.once:
            result.out = None
        if out is not None and result.partial:
            return tree_map_only(_Shape, _Shape.empty, out)
        if out is None:
            return func(*args, **(kwargs or {}))
        if _versions(out) != result.versions:
            raise RuntimePlanError(f"{func} is kept by selective recomputation and written to after: plan without it")
        return out if self.once else tree_map_only(torch.Tensor, torch.Tensor.detach, out)  # each pass has its graph


def contexts(once: bool) -> tuple[Keep, Replay]:
    """Of one call of a layer: for forward, and for recomputation in backward, in a single pass if `once`."""
    kept: list[Result] = []
    return Keep(kept), Replay(kept, once)
