"""The model as a chain of layers: one pipeline stage runs the model's own forward with the other layers skipped.

Layers before the stage hand on what the stage received, the prologue runs on weights that take no memory, and
the last layer's output leaves the forward at once. So any model whose layers form a chain can be cut, whatever
its forward looks like in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from planner.runtime.errors import RuntimePlanError


class StageDone(BaseException):
    """Carries the output of a stage's last layer out of the model's forward."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@dataclass(slots=True)
class Shape:
    """What one layer hands on: the structure of its output, and the position, shape and dtype of its tensor."""

    spec: TreeSpec
    leaves: list[Any]
    at: int
    size: tuple[int, ...]
    dtype: torch.dtype

    def fill(self, hidden: torch.Tensor) -> Any:
        """The layer's output with `hidden` in it."""
        return tree_unflatten([hidden if i == self.at else leaf for i, leaf in enumerate(self.leaves)], self.spec)


def shape_of(path: str, out: Any) -> Shape:
    """The Shape of a layer's output. RuntimePlanError when it is not one tensor that needs gradients."""
    leaves, spec = tree_flatten(out)
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    if len(tensors) != 1:
        raise RuntimePlanError(f"layer {path} puts out {len(tensors)} tensors; the runtime runs layers with one")
    hidden = leaves[tensors[0]]
    kept = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return Shape(spec, kept, tensors[0], tuple(hidden.shape), hidden.dtype)


def hidden_of(out: Any) -> torch.Tensor:
    """The tensor in a layer's output."""
    leaves, _ = tree_flatten(out)
    found: torch.Tensor = next(x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point())
    return found


class _Skip(nn.Module):
    """Stands in for a layer of another stage; attributes are the layer's own."""

    def __init__(self, layer: nn.Module, answer: Callable[[], Any]) -> None:
        super().__init__()
        self.__dict__["_layer"], self.__dict__["_answer"] = layer, answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_answer"]()


class _Last(nn.Module):
    """Runs a stage's last layer and leaves the model with its output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise StageDone(hidden_of(self.__dict__["_layer"](*args, **kwargs)))


@dataclass(slots=True)
class Chain:
    """Layers of a model by path, and the Shape of each one's output (filled by the dry pass)."""

    model: nn.Module
    paths: tuple[str, ...]
    shapes: list[Shape] = field(default_factory=list)
    _received: torch.Tensor | None = None

    def layer(self, index: int) -> nn.Module:
        """The layer itself, also while it is swapped out."""
        found = self.model.get_submodule(self.paths[index])
        return found.__dict__.get("_layer", found)

    def _slot(self, index: int) -> tuple[nn.Module, str]:
        parent, _, name = self.paths[index].rpartition(".")
        return self.model.get_submodule(parent) if parent else self.model, name

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Write down what every layer puts out."""
        found: dict[int, Shape] = {}
        hooks = []
        for i, path in enumerate(self.paths):

            def hook(_m: nn.Module, _a: Any, out: Any, i: int = i, path: str = path) -> None:
                found[i] = shape_of(path, out)

            hooks.append(self.layer(i).register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()
        self.shapes = [found[i] for i in sorted(found)]

    @contextmanager
    def only(self, first: int, last: int, received: torch.Tensor | None) -> Iterator[None]:
        """Inside, the model runs layers [first, last); `received` is the output of layer first-1."""
        swapped: list[tuple[nn.Module, str, nn.Module]] = []

        def swap(index: int, stand_in: nn.Module) -> None:
            parent, name = self._slot(index)
            swapped.append((parent, name, parent._modules[name]))  # type: ignore[arg-type]
            parent._modules[name] = stand_in

        for i in range(first):
            swap(i, _Skip(self.layer(i), lambda i=i: self.shapes[i].fill(received)))  # type: ignore[misc]
        if last < len(self.paths):
            swap(last - 1, _Last(self.layer(last - 1)))
        try:
            yield
        finally:
            for parent, name, module in swapped:
                parent._modules[name] = module
