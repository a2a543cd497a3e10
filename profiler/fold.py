"""Which modules are the layers of a model, and running each kind of layer only once.

Two calls of a layer are equal when the modules have the same classes, parameter shapes and settings, their
inputs look the same, and what ran between the previous layer and this one was the same. Settings whose name
says that they number the layer (layer_idx, block_id, ...) do not count; a layer that computes something else
for another number without having another setting would be taken for equal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from planner.profiler.record import Recorder, Segment

_NUMBERING = re.compile(r"(^|_)(idx|index|id|number|no|num|i)$")
_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_MOST = 0.5  # block lists must hold at least this share of the parameters outside embeddings
_ALL = 0.8  # a child with this share of the parameters is the model proper; its parent is a wrapper
_MINOR = 0.05  # a list of plain leaf modules with less than this is not a list of blocks


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def find_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of the layers, in definition order; empty when the whole model is one layer."""
    lists = _block_lists(model, "")
    embeddings = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    inside = sum(_numel(module) for _, module in lists)
    if lists and inside >= _MOST * max(_numel(model) - embeddings, 1):
        blocks = [(path, m) for path, m in lists if _is_block_list(m, inside)]
        return [
            (f"{path}.{name}".lstrip("."), child) for path, m in blocks for name, child in m.named_children()
        ]
    return _children_as_layers(model, "")


def _is_block_list(module: nn.Module, total: int) -> bool:
    structured = any(next(child.children(), None) is not None for child in module.children())
    return structured or _numel(module) >= _MINOR * total


def _block_lists(module: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """Outermost lists with parameters; a Sequential of different things that holds lists is opened."""
    if isinstance(module, _LISTS) and _numel(module):
        inner = [
            found
            for name, child in module.named_children()
            for found in _block_lists(child, _join(path, name))
        ]
        kinds = [type(child) for child in module.children()]
        mixed = isinstance(module, nn.Sequential) and len(set(kinds)) == len(kinds)
        if mixed and sum(_numel(m) for _, m in inner) >= _MOST * _numel(module):
            return inner
        return [(path, module)]
    return [
        found for name, child in module.named_children() for found in _block_lists(child, _join(path, name))
    ]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _children_as_layers(model: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """Top-level children with parameters, for models without block lists.

    Where some are more than torch's own leaf modules, those are the layers, and bare linears, norms and
    embeddings go along with what they stand beside.
    """
    children = [(_join(path, name), m) for name, m in model.named_children() if _numel(m)]
    for child_path, child in children:
        if _numel(child) >= _ALL * max(_numel(model), 1) and next(child.children(), None) is not None:
            return _children_as_layers(child, child_path) or [(child_path, child)]
    blocks = [(p, m) for p, m in children if not _is_plain(m)]
    words = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    return blocks or [(p, m) for p, m in children if not _is_end(m, words)]


def _is_plain(module: nn.Module) -> bool:
    """One of torch's own leaf modules, other than a recurrent one."""
    leaf = next(module.children(), None) is None and not isinstance(module, nn.RNNBase)
    return leaf and type(module).__module__.startswith("torch.nn.")


def _is_end(module: nn.Module, words: set[int]) -> bool:
    """Embedding or output head, which belong to the prologue and epilogue."""
    head = isinstance(module, nn.Linear) and module.out_features in words
    return head or isinstance(module, nn.Embedding)


# ---- equality


def _setting(value: object) -> Hashable | None:
    if value is None or isinstance(value, bool | int | str | torch.dtype):
        return (type(value).__name__, value)
    if isinstance(value, float):
        return ("float", value != 0.0)  # rates and epsilons change no cost, but zero turns dropout off
    if isinstance(value, tuple | list) and all(isinstance(v, bool | int | str) for v in value):
        return tuple(value)
    return (
        getattr(value, "__qualname__", None) if callable(value) and not isinstance(value, nn.Module) else None
    )


def signature(module: nn.Module) -> Hashable:
    """What makes two layers equal before they are called."""
    parts: list[Hashable] = []
    for path, sub in module.named_modules():
        settings = tuple(
            (name, _setting(value))
            for name, value in sorted(sub.__dict__.items())
            if not name.startswith("_") and name != "forward" and not _NUMBERING.search(name)
        )
        tensors = tuple(
            (name, tuple(p.shape), p.dtype, p.requires_grad)
            for name, p in (*sub.named_parameters(recurse=False), *sub.named_buffers(recurse=False))
        )
        parts.append((path, type(sub).__module__, type(sub).__qualname__, settings, tensors))
    return tuple(parts)


def _gap_signature(segment: Segment) -> Hashable:
    return tuple((op.name, tuple(shape for _, shape in op.views), op.out_shape) for op in segment.ops)


# ---- running


@dataclass(slots=True)
class LayerCall:
    """One call of a layer; `traced` is the call whose segment describes it (itself when it was run)."""

    path: str
    module: nn.Module
    reads: tuple[int, ...]  # storages of its arguments
    writes: tuple[int, ...]  # storages of its results
    gap_index: int
    gap: Segment | None
    segment: Segment | None
    traced: int


@dataclass(slots=True)
class _Template:
    call: int
    spec: Any
    leaves: list[Any]  # ("input", leaf number) | ("fresh", tensor) | ("value", object)


@dataclass(slots=True)
class Folder:
    """Hooks the layers of a model: runs the first of each kind, answers for the others."""

    recorder: Recorder
    calls: list[LayerCall] = field(default_factory=list)
    _templates: dict[Hashable, _Template] = field(default_factory=dict)
    _inside: bool = False
    _originals: list[tuple[nn.Module, Any]] = field(default_factory=list)

    def detach(self) -> None:
        """Give the layers their own `forward` back."""
        for module, forward in self._originals:
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.forward = forward
        self._originals.clear()

    def attach(self, layers: list[tuple[str, nn.Module]]) -> None:
        """Replace `forward` of every layer by one that records or answers."""
        signatures: dict[int, Hashable] = {}
        for path, module in layers:
            if id(module) not in signatures:
                signatures[id(module)] = signature(module)
                self._originals.append((module, module.__dict__.get("forward")))
                module.forward = self._wrap(path, module, signatures[id(module)], module.forward)

    def _wrap(
        self, path: str, module: nn.Module, own: Hashable, forward: Callable[..., Any]
    ) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return forward(*args, **kwargs)
            leaves, spec = tree_flatten((args, kwargs))
            gap = self.recorder.segment
            first = not self.calls
            key = (own, str(spec), self._leaf_key(leaves), () if first else _gap_signature(gap))
            template = self._templates.get(key)
            if template is not None:
                return self._answer(path, module, template, leaves, gap)
            return self._run(path, module, key, leaves, gap, lambda: forward(*args, **kwargs))

        return call

    def _leaf_key(self, leaves: list[Any]) -> Hashable:
        seen: dict[int, int] = {}
        parts: list[Hashable] = []
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor):
                parts.append(_setting(leaf) or type(leaf).__qualname__)
                continue
            index = self.recorder.find(leaf)
            storage = self.recorder.storages[index]
            saved = storage.saved_in is not None and storage.learned
            shape = (tuple(leaf.shape), leaf.dtype, leaf.requires_grad)
            parts.append((*shape, storage.learned, saved, seen.setdefault(index, len(seen))))
        return tuple(parts)

    def _run(
        self, path: str, module: nn.Module, key: Hashable, leaves: list[Any], gap: Segment,
        forward: Callable[[], Any],
    ) -> Any:  # fmt: skip
        recorder = self.recorder
        segment = recorder.open_segment(path)
        self._inside = True
        try:
            out = forward()
        finally:
            self._inside = False
        out_leaves, spec = tree_flatten(out)
        tensors = [(i, leaf) for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        sources = {recorder.find(leaf): i for i, leaf in tensors}
        template = _Template(len(self.calls), spec, [])
        for leaf in out_leaves:
            if not isinstance(leaf, torch.Tensor):
                template.leaves.append(("value", leaf))
            elif recorder.find(leaf) in sources:
                template.leaves.append(("input", sources[recorder.find(leaf)]))
            else:
                template.leaves.append(
                    ("fresh", (leaf, recorder.storages[recorder.find(leaf)].saved_in is not None))
                )
        self._templates[key] = template
        call = LayerCall(path, module, (), (), gap.index, gap if self.calls else None, segment, template.call)
        self._note_call(call, leaves, out_leaves)
        recorder.open_segment("")
        return out

    def _answer(
        self, path: str, module: nn.Module, template: _Template, leaves: list[Any], gap: Segment
    ) -> Any:
        recorder = self.recorder
        gap.ops.clear()
        gap.saved.clear()
        out_leaves: list[Any] = []
        for how, value in template.leaves:
            if how == "fresh":
                out_leaves.append(self._fresh(*value))
            else:
                out_leaves.append(leaves[value] if how == "input" else value)
        call = LayerCall(path, module, (), (), gap.index, None, None, template.call)
        self._note_call(call, leaves, out_leaves)
        recorder.open_segment("")
        return tree_unflatten(out_leaves, template.spec)

    def _fresh(self, like: torch.Tensor, saved: bool) -> torch.Tensor:
        recorder = self.recorder
        with recorder.quiet():
            tensor = torch.empty_like(like).detach().requires_grad_(like.requires_grad)
        old = recorder.storages[recorder.find(like)]
        new = recorder.storages[recorder.find(tensor)]
        new.scales, new.learned, new.causal = old.scales, old.learned, old.causal
        new.saved_in = recorder.segment.index if saved else None
        new.produced = (recorder.segment.index, -1)
        return tensor

    def _note_call(self, call: LayerCall, leaves: list[Any], out_leaves: list[Any]) -> None:
        call.reads, call.writes = (
            tuple(dict.fromkeys(self.recorder.find(t) for t in tree if isinstance(t, torch.Tensor)))
            for tree in (leaves, out_leaves)
        )
        self.calls.append(call)
