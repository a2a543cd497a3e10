"""One forward pass and loss of a model on meta tensors, recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from planner.profiler.fold import Folder, LayerCall, find_layers
from planner.profiler.intercept import Intercept
from planner.profiler.moe import ExpertStubs
from planner.profiler.record import Recorder


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What to trace: a model on the meta device, how to call it, and what the user said about it."""

    model: nn.Module
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss: Callable[[Any], Any] | None  # output -> scalar; None: cross-entropy if the model has a vocabulary
    micro_batch_size: int
    seq_len: int
    unit: str
    vocab_size: int
    dtype: torch.dtype
    global_batch_size: int
    source: str
    source_sha256: str
    tp_plan: dict[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A recorded forward pass: the calls of the layers and the recorder with all segments."""

    recorder: Recorder
    calls: list[LayerCall]


def run_forward(subject: Subject) -> Trace:
    """Run the model once under the recorder, equal layers once, and its loss."""
    layers = find_layers(subject.model)
    trace = _run(subject, layers) if layers else None
    if trace is None or not trace.calls:
        # What looked like layers is not called as a module: the whole model is one layer.
        trace = _run(subject, [("", subject.model)])
    return trace


def _run(subject: Subject, layers: list[tuple[str, nn.Module]]) -> Trace:
    model = subject.model
    recorder = Recorder(model)
    recorder.add_inputs((subject.args, subject.kwargs))
    folder = Folder(recorder)
    stubs = ExpertStubs(recorder)
    stubs.attach(layers)
    hooks = _track_modules(model, recorder, stubs.skipped)
    folder.attach(layers)
    saving = torch.autograd.graph.saved_tensors_hooks(recorder.pack, lambda tensor: tensor)
    try:
        with torch.device("meta"), saving, Intercept(recorder), recorder:
            output = model(*subject.args, **subject.kwargs)
            recorder.module_stack.append(("loss", nn.Module()))
            (subject.loss or _default_loss(subject.vocab_size, recorder))(output)
    finally:
        folder.detach()
        stubs.detach()
        for hook in hooks:
            hook.remove()
    return Trace(recorder=recorder, calls=folder.calls)


def _default_loss(vocab_size: int, recorder: Recorder) -> Callable[[Any], Any]:
    """Cross-entropy in float32 on logits over the vocabulary, else a sum that costs next to nothing."""

    def loss(output: Any) -> Any:
        found = _first_float(output)
        if found is None or found.dim() == 0:
            return output
        if not vocab_size or found.shape[-1] != vocab_size:
            return found.sum()
        with recorder.quiet():
            labels = torch.empty(found.shape[:-1], dtype=torch.int64).flatten()
        recorder.add_inputs(labels)
        return F.cross_entropy(found.reshape(-1, vocab_size).float(), labels)

    return loss


def _first_float(output: Any) -> torch.Tensor | None:
    logits = getattr(output, "logits", None)
    leaves = [logits] if isinstance(logits, torch.Tensor) else tree_leaves(output)
    return next((t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()), None)


def _track_modules(model: nn.Module, recorder: Recorder, skipped: set[int]) -> list[Any]:
    hooks: list[Any] = []

    def enter(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, *_: Any) -> None:
            recorder.module_stack.append((path, module))

        return hook

    def leave(*_: Any) -> None:
        recorder.module_stack.pop()

    for path, module in model.named_modules():
        if path and id(module) not in skipped:
            hooks.append(module.register_forward_pre_hook(enter(path)))
            hooks.append(module.register_forward_hook(leave, always_call=True))
    return hooks
