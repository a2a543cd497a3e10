"""Layers of a user's model as something to run: one real layer of each class on the inputs that the model gives it.

The model is built on the meta device; only what is timed gets memory. Values are random: times do not depend on them
but for data-dependent routing. The ends are the whole model with its layers replaced by what passes the stream on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from planner.profiler.cases import EPILOGUE, PROLOGUE, Case
from planner.profiler.run import Subject
from planner.profiler.timing import Clock, Job, Work

# A model finds the caches of a CPU full of its other layers: a layer runs as so many copies, one after the other, as
# the model has layers, or as fill this much of memory.
_CACHE_BYTES = 64e6


class Bench:
    """One model at several micro-batch sizes, on one device."""

    def __init__(self, source: str, seq_len: int, device: torch.device) -> None:
        self._source, self._seq_len, self._device = source, seq_len, device
        self._subjects: dict[int, Subject] = {}

    def make(self, case: Case) -> Job:
        """The job of a layer or an end, forward or backward."""
        subject = self._subject(int(case.dims["micro_batch_size"]))
        backward = case.name.endswith("/backward")
        if case.path in (PROLOGUE, EPILOGUE):
            return _end(subject, self._layer_paths(subject), case.path, backward, self._device)
        layer = subject.model.get_submodule(case.path)
        args, kwargs = _inputs(subject, case.path, layer)
        made = [_materialised(layer, self._device)]
        real = _real(args, self._device), _real(kwargs, self._device)
        job = _layers(made, *real, backward)
        held_bytes = job.saved_bytes + sum(p.nbytes for p in layer.parameters())
        copies = min(len(self._layer_paths(subject)), math.ceil(_CACHE_BYTES / held_bytes))
        if self._device.type == "cpu" and copies > 1:
            made += [_materialised(layer, self._device) for _ in range(copies - 1)]
            job = _layers(made, *real, backward)
        return job

    def _subject(self, micro_batch_size: int) -> Subject:
        if micro_batch_size not in self._subjects:
            name, _, function = self._source.rpartition(":") if ".py:" in self._source else (self._source, "", "")
            path = Path(name).resolve()
            self._subjects[micro_batch_size] = _load(path, function, self._seq_len, micro_batch_size)
        return self._subjects[micro_batch_size]

    def _layer_paths(self, subject: Subject) -> list[str]:
        from planner.profiler.fold import find_layers

        return [path for path, _ in find_layers(subject.model)]


def _load(path: Path, function: str, seq_len: int, micro_batch_size: int) -> Subject:
    if path.suffix == ".json":
        from planner.profiler.hf import load_config

        return load_config(path, seq_len, micro_batch_size)
    from planner.profiler.load import load_python

    return load_python(path, function, seq_len, micro_batch_size)


def _inputs(subject: Subject, path: str, layer: nn.Module) -> tuple[Any, Any]:
    """What the model calls the layer with, on meta."""
    seen: list[tuple[Any, Any]] = []

    def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((args, kwargs))

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad(), torch.device("meta"):
            subject.model(*subject.args, **subject.kwargs)
    finally:
        handle.remove()
    if not seen:
        raise RuntimeError(f"the model's forward never calls {path}")
    return seen[0]


def _real(value: Any, device: torch.device) -> Any:
    """The same structure with random real tensors in place of meta ones."""

    def one(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if x.is_floating_point():
            return torch.randn(x.shape, device=device).to(x.dtype).requires_grad_(True)
        return torch.zeros(x.shape, device=device, dtype=x.dtype)

    return tree_map(one, value)


def _materialised(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a module on meta with small random parameters and buffers on `device`."""
    made = copy.deepcopy(module).to_empty(device=device)
    with torch.no_grad():
        for tensor in (*made.parameters(), *made.buffers()):
            _ = tensor.normal_(0, 0.02) if tensor.is_floating_point() else tensor.zero_()
    return made


def _floats(value: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, torch.Tensor) and x.is_floating_point()]


def _layers(layers: list[nn.Module], args: Any, kwargs: Any, backward: bool) -> Job:
    """All layers forward, each on the stream that the one before hands on, or all backward; one of them is wanted."""
    leaves, form = tree_flatten((args, kwargs))

    def one(layer: nn.Module, inputs: list[Any]) -> list[torch.Tensor]:
        args, kwargs = tree_unflatten(inputs, form)
        return [x for x in _floats(layer(*args, **kwargs)) if x.requires_grad]

    def forward() -> list[torch.Tensor]:
        """What nothing took: the stream behind the last layer, and all else that layers put out."""
        inputs, ends = leaves, []
        for layer in layers:
            stream, *rest = one(layer, inputs)
            at = next((i for i, x in enumerate(leaves) if _floats(x) and x.shape == stream.shape), None)
            inputs = leaves if at is None else [*leaves[:at], stream, *leaves[at + 1 :]]
            ends += rest if at is not None and layer is not layers[-1] else [stream, *rest]
        return ends

    saved = _saved_bytes(layers[0], lambda: one(layers[0], leaves), _floats((args, kwargs)))
    if not backward:
        return Job(work=forward, parts=len(layers), saved_bytes=saved)
    up = [torch.ones_like(x) for x in forward()]

    def prepare() -> Work:
        outs = forward()
        return lambda: torch.autograd.backward(outs, up)

    return Job(prepare=prepare, parts=len(layers), saved_bytes=saved)


def _saved_bytes(layer: nn.Module, forward: Callable[[], object], inputs: list[torch.Tensor]) -> float:
    """Bytes that autograd keeps of one forward, its input included, parameters not."""
    held = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    sizes: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in held:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = forward()
    del kept, inputs
    return float(sum(sizes.values()))


# ---- ends


class _Pass(nn.Module):
    """Stands in for a layer: hands the stream on and tells when it came by, forward and backward."""

    def __init__(self, template: Any, mark: Callable[[str], None]) -> None:
        super().__init__()
        self._template, self._mark = template, mark

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stream = _floats((args, kwargs))[0]
        self._mark("forward")
        stream = stream.view_as(stream)
        if stream.requires_grad:
            stream.register_hook(lambda _: self._mark("backward"))
        leaves, form = tree_flatten(self._template)
        out = [
            (stream if x.shape == stream.shape else torch.zeros(x.shape, dtype=x.dtype, device=stream.device))
            if isinstance(x, torch.Tensor)
            else x
            for x in leaves
        ]
        return tree_unflatten(out, form)


def _end(subject: Subject, paths: list[str], which: str, backward: bool, device: torch.device) -> Job:
    """Prologue (before the first layer) or epilogue (after the last, with the loss) of the model.

    One run is cut in two where the stream passes the layers; backward meets the epilogue first.
    """
    cut: list[Callable[[], None]] = [lambda: None]
    outputs = _layer_outputs(subject, paths)
    model = copy.deepcopy(subject.model)
    for path in paths:
        ways = [way for way, at in (("forward", paths[0]), ("backward", paths[-1])) if path == at]
        model.set_submodule(path, _Pass(outputs[path], lambda way, ways=ways: cut[0]() if way in ways else None))
    model = _materialised(model, device)
    args, kwargs = _real(subject.args, device), _real(subject.kwargs, device)

    def loss() -> torch.Tensor:
        output = model(*args, **kwargs)
        return subject.loss(output) if subject.loss else _loss(output, subject.vocab_size)

    def timed(clock: Clock) -> float:
        marks: list[Any] = []
        cut[0] = lambda: None
        work = loss().backward if backward else loss
        cut[0] = lambda: marks.append(clock.mark())
        marks.append(clock.mark())
        work()
        marks.append(clock.mark())
        before = (which == PROLOGUE) != backward
        return clock.between_s(*(marks[:2] if before else marks[-2:]))

    return Job(timed=timed)


def _layer_outputs(subject: Subject, paths: list[str]) -> dict[str, Any]:
    """What every layer puts out, on meta."""
    found: dict[str, Any] = {}
    handles = [
        subject.model.get_submodule(path).register_forward_hook(
            lambda _m, _i, out, path=path: found.setdefault(path, out)
        )
        for path in paths
    ]
    try:
        with torch.no_grad(), torch.device("meta"):
            subject.model(*subject.args, **subject.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _loss(output: Any, vocab_size: int) -> torch.Tensor:
    """Cross-entropy on logits over the vocabulary, else a sum."""
    logits = getattr(output, "logits", None)
    found = logits if isinstance(logits, torch.Tensor) else _floats(output)[0]
    if found.dim() == 0:
        return found
    if not vocab_size or found.shape[-1] != vocab_size:
        return found.sum()
    labels = torch.zeros(found.shape[:-1].numel(), dtype=torch.int64, device=found.device)
    return F.cross_entropy(found.reshape(-1, vocab_size).float(), labels)
