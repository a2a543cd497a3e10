"""The op layer: what makes a kernel visible to a planner.

`define` turns a pure-torch reference into a torch custom op with a fake, autograd, a formula of its work, a DTensor
sharding rule and a choice of implementations (dispatch.py). FakeTensor, make_fx, torch.compile, DTensor and FLOP
counters then see one op. `counters.py` adds formulas for ops of torch's own and counts the work of any code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import Placement, Replicate
from torch.distributed.tensor.experimental import register_sharding
from torch.utils.flop_counter import register_flop_formula

from planner.kernels import dispatch

NAMESPACE = "planner_kernels"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a call costs: FLOPs (1 FMA = 2), bytes its kernels read and write in device memory, kernels launched."""

    flops: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    kernels: int = 0

    @property
    def moved_bytes(self) -> int:
        """Bytes read plus bytes written."""
        return self.read_bytes + self.written_bytes

    def __add__(self, other: Work) -> Work:
        return Work(
            flops=self.flops + other.flops,
            read_bytes=self.read_bytes + other.read_bytes,
            written_bytes=self.written_bytes + other.written_bytes,
            kernels=self.kernels + other.kernels,
        )


Formula = Callable[..., Work]
Sharding = tuple[list[Placement | None], list[Placement | None]]
FORMULAS: dict[Any, Formula] = {}
OPS: dict[str, Any] = {}


def nbytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of all elements of the tensors; None counts nothing."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def streamed(
    args: Sequence[Any], outs: torch.Tensor | Sequence[torch.Tensor], flops: int = 0, kernels: int = 1
) -> Work:
    """Work of a call that reads every tensor among `args` once and writes every output once."""
    outs = [outs] if isinstance(outs, torch.Tensor) else outs
    read = nbytes(*(a for a in args if isinstance(a, torch.Tensor)))
    return Work(flops=flops, read_bytes=read, written_bytes=nbytes(*outs), kernels=kernels)


def precise(x: torch.Tensor) -> torch.Tensor:
    """`x` in the type its arithmetic is done in: float64 stays, everything else is float32."""
    return x if x.dtype == torch.float64 else x.float()


def like(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialised contiguous tensor of the shape of `x`: what every op returns, whatever its inputs' strides."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def lazily(module: str, name: str) -> Callable[..., Any]:
    """The function `name` of planner.kernels.`module`, imported at its first call (Triton is optional)."""

    def call(*args: Any) -> Any:
        import importlib

        return getattr(importlib.import_module(f"planner.kernels.{module}"), name)(*args)

    return call


def define(
    name: str, reference: Callable[..., Any], *, fake: Callable[..., Any], work: Formula,
    sharding: Callable[..., list[Sharding]] | None = None, kernels: Mapping[str, Callable[..., Any]] | None = None,
    mutates: tuple[str, ...] = (),
) -> Any:  # fmt: skip
    """The custom op planner_kernels::`name`; its schema is read off the annotations of `reference`.

    `fake(*args)` makes outputs of the right shape; `work(*args, out)` prices one call; `sharding(*args)` lists
    acceptable (output, input) placements beside all-replicated; `kernels` maps a backend of dispatch.py to an
    implementation with the same arguments; `mutates` names the arguments written in place.
    """
    implementations = {"torch": reference, **(kernels or {})}
    dispatch.declare(name, implementations)

    def run(*args: Any) -> Any:
        device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        out = implementations[dispatch.choice(name, device)](*args)
        return tuple(map(_contiguous, out)) if isinstance(out, tuple) else _contiguous(out)

    schema = torch.library.infer_schema(reference, mutates_args=mutates)
    op = torch.library.custom_op(f"{NAMESPACE}::{name}", run, mutates_args=mutates, schema=schema)
    op.register_fake(fake)
    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    OPS[name], FORMULAS[packet] = op, work

    @register_flop_formula(packet, get_raw=True)
    def _flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return work(*args, **kwargs, out=out_val).flops

    register_sharding(packet.default)(_placements(packet.default._schema, sharding))
    return op


def _placements(schema: Any, sharding: Callable[..., list[Sharding]] | None) -> Callable[..., list[Sharding]]:
    def rule(*args: Any) -> list[Sharding]:
        tensors = [hasattr(a, "placements") for a in args]
        replicated: Sharding = ([Replicate()] * len(schema.returns), [Replicate() if t else None for t in tensors])
        found = [replicated]
        for outs, ins in sharding(*args) if sharding else []:
            found.append((outs, [i if t else None for i, t in zip(ins, tensors, strict=False)]))
        return found

    return rule
