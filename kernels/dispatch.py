"""Which implementation runs: an explicit choice per op, as data that a plan or a step record can carry.

Backends: "torch" the pure-torch reference (any device), "ours" the Triton kernel, "liger" and "fla" the libraries of
that name. Without a choice a CUDA tensor takes "ours" where the op has one and Triton is installed, else "torch".
Every backend of an op has one contract, so forward and backward may be chosen apart.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

_NEEDS = {"torch": "torch", "ours": "triton", "liger": "liger_kernel", "fla": "fla"}
BACKENDS = tuple(_NEEDS)
_DECLARED: dict[str, tuple[str, ...]] = {}
_CHOSEN: dict[str, str] = {}  # global, not a context variable: autograd runs backward in its own threads


class DispatchError(ValueError):
    """A choice that cannot be honoured: unknown op, or a backend it lacks or that is not installed."""


def declare(op: str, implementations: Mapping[str, Callable[..., Any]]) -> None:
    """Record the backends that `op` has."""
    _DECLARED[op] = tuple(b for b in BACKENDS if b in implementations)


@cache
def installed(backend: str) -> bool:
    """Whether the package that `backend` needs can be imported."""
    return importlib.util.find_spec(_NEEDS[backend]) is not None


def available(op: str) -> tuple[str, ...]:
    """Backends of `op` that are installed here."""
    if op not in _DECLARED:
        raise DispatchError(f"no kernel op {op!r}; there are: {', '.join(sorted(_DECLARED))}")
    return tuple(b for b in _DECLARED[op] if installed(b))


def choice(op: str, device: str) -> str:
    """The backend that runs `op` on tensors of `device` ("cpu", "cuda")."""
    if op in _CHOSEN:
        return _CHOSEN[op]
    return "ours" if device == "cuda" and "ours" in available(op) else "torch"


def table(device: str) -> dict[str, str]:
    """The choice of every op, for a plan or a step record."""
    return {op: choice(op, device) for op in sorted(_DECLARED)}


def choose(chosen: Mapping[str, str]) -> None:
    """Fix the backend of some ops until the next call; raises DispatchError before anything changes."""
    for op, backend in chosen.items():
        if backend not in available(op):
            raise DispatchError(f"op {op!r} cannot run on {backend!r}; here it has: {', '.join(available(op))}")
    _CHOSEN.clear()
    _CHOSEN.update(chosen)


@contextmanager
def pretending(chosen: Mapping[str, str]) -> Iterator[None]:
    """The choices of another machine for a block, installed here or not: fake tensors run no implementation."""
    before = dict(_CHOSEN)
    _CHOSEN.update(chosen)
    try:
        yield
    finally:
        _CHOSEN.clear()
        _CHOSEN.update(before)


@contextmanager
def using(chosen: Mapping[str, str]) -> Iterator[None]:
    """`choose` for a block, on top of what is chosen."""
    before = dict(_CHOSEN)
    choose({**before, **chosen})
    try:
        yield
    finally:
        choose(before)
