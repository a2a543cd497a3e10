"""Recomputation of a layer: full or selective, and activations kept in host memory until backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from planner.costmodel.strategy import LayerStrategy
from planner.runtime.selective import contexts

Body = Callable[[list[Any]], Any]
watched: Callable[[torch.Tensor, bool], torch.Tensor] | None = None  # copies to (True) and from the host, if watched
_SMALL_BYTES = 1024  # below this a copy costs more than the memory is worth


def strategy_body(body: Body, strategy: LayerStrategy, once: bool) -> Body:
    """`body`, a function of a list of tensors and other values, under a layer's strategy.

    `once`: backward is one pass, not one for inputs and one for weights.
    """
    if strategy.recompute == "full":
        return partial(_full, body, strategy.offload_activations)
    if strategy.recompute == "selective":
        return partial(_selective, body, once)
    return partial(_offloaded, body) if strategy.offload_activations else body


def _selective(body: Body, once: bool, values: list[Any]) -> Any:
    return checkpoint(body, values, use_reentrant=False, context_fn=partial(contexts, once))


def _full(body: Body, offload: bool, values: list[Any]) -> Any:
    if not offload:
        return checkpoint(body, values, use_reentrant=False)
    held = _HostInput(values)
    return checkpoint(lambda: body(held.take()), use_reentrant=False)


class _HostInput:
    """A layer's inputs: themselves in forward, copies brought back from the host when recomputing."""

    def __init__(self, values: list[Any]) -> None:
        self.values: list[Any] | None = values
        self.kept = [_to_host(v) if _floating(v) else v for v in values]
        self.devices = [v.device if isinstance(v, torch.Tensor) else None for v in values]
        self.needs = [isinstance(v, torch.Tensor) and v.requires_grad for v in values]

    def take(self) -> list[Any]:
        if self.values is not None:
            values, self.values = self.values, None
            return values
        back = []
        for value, device, needs in zip(self.kept, self.devices, self.needs, strict=True):
            tensor = _from_host(value, device) if isinstance(value, torch.Tensor) else value
            back.append(tensor.detach().requires_grad_() if needs else tensor)
        return back


def _floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _to_host(x: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, pinned where there is a device. The copy runs on the current stream."""
    if x.device.type == "cpu":
        return x.detach().clone() if watched is None else watched(x.detach(), True)
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return host.copy_(x.detach(), non_blocking=True)


def _from_host(x: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    if watched is not None:
        return watched(x, False)
    return x.to(device, non_blocking=True) if device is not None else x


def _offloaded(body: Body, values: list[Any]) -> Any:
    """Run `body` with everything that autograd saves, parameters aside, moved to the host.

    What several operators save is moved once; autograd sees to it that nobody writes to it in between.
    """
    moved: dict[Any, tuple[StorageWeakRef, torch.Tensor]] = {}  # the reference keeps the address from being used again

    def pack(x: torch.Tensor) -> Any:
        base = x._base if x._base is not None else x
        small = x.numel() * x.element_size() < _SMALL_BYTES
        if isinstance(base, torch.nn.Parameter) or not x.is_floating_point() or small or x.is_meta:
            return x
        storage = x.untyped_storage()
        key = storage._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype
        if key not in moved:
            moved[key] = StorageWeakRef(storage), _to_host(x)
        return moved[key][1], x.device

    def unpack(packed: Any) -> torch.Tensor:
        return _from_host(*packed) if isinstance(packed, tuple) else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        out = body(values)
    moved.clear()
    return out
