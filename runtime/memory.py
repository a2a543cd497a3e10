"""Bytes of tensors on this rank: what it holds between steps, and what a step holds at most.

Never the size of the process, which has the interpreter and libraries in it. On a GPU torch's allocator knows; on
a CPU every operation of the step is watched, and what lives is counted by weak references, because the threads of
collectives free tensors too. There device and host memory are one: what the plan moves to the host (optimizer
states, activations) counts as host bytes. Memory inside of one operation is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from planner.runtime import recompute
from planner.runtime.parallel import Parallel
from planner.runtime.zero import local

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorBytes:
    """Bytes of tensors in the device's memory and in the host's; on a GPU the host's are those between steps."""

    device_bytes: int
    host_bytes: int


def _held(p: Parallel) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Parameters, buffers and optimizer states of this rank: (on the device, on the host)."""
    assert p.optimizer is not None
    states = [x for s in p.optimizer.inner.state.values() for x in s.values() if isinstance(x, torch.Tensor)]
    states += p.optimizer.masters.values()
    on_device = [*p.model.parameters(), *p.model.buffers()]
    return (on_device, states) if p.optimizer.offload else ([*on_device, *states], [])


def held(p: Parallel) -> TensorBytes:
    """Parameters, buffers and optimizer states of this rank, each storage once."""
    device, host = ({s._cdata: s.nbytes() for s in (local(x).untyped_storage() for x in xs)} for xs in _held(p))
    return TensorBytes(device_bytes=sum(device.values()), host_bytes=sum(host.values()))


def peak_of(p: Parallel, step: Callable[[], T]) -> tuple[T, TensorBytes]:
    """Run `step`, a whole optimizer step of `p` that is not its first; its result and the most bytes it held."""
    if p.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(p.device)
        result = step()
        peak = torch.cuda.max_memory_allocated(p.device)
        return result, TensorBytes(device_bytes=peak, host_bytes=held(p).host_bytes)
    on_device, on_host = _held(p)
    watch = _Watch()
    watch.host.see(on_host)
    watch.device.see(on_device)
    recompute.watched = watch.copy
    try:
        with watch:
            result = step()
    finally:
        recompute.watched = None
    return result, TensorBytes(device_bytes=watch.device.most_bytes, host_bytes=watch.host.most_bytes)


def most_bytes(device: torch.device, run: Callable[[], object], held: Iterable[torch.Tensor]) -> int:
    """Most bytes of tensors that `run` has on the device beside `held`, which it may read."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    watch = _Watch()
    watch.device.see(held)
    before = watch.device.num_bytes
    with watch:
        run()
    return watch.device.most_bytes - before


@dataclass(slots=True)
class _Side:
    """Storages in one memory, by address; weak references keep an address from being used again."""

    live: dict[int, tuple[StorageWeakRef, int]] = field(default_factory=dict)
    num_bytes: int = 0  # of `live`, with some that may have gone
    most_bytes: int = 0

    def see(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count what is new or has grown; only a new maximum is worth looking for what has gone."""
        for x in tensors:
            storage = local(x).untyped_storage()
            known = self.live.get(storage._cdata)
            size = storage.nbytes()
            if known is None or known[1] != size:
                self.live[storage._cdata] = (known[0] if known else StorageWeakRef(storage), size)
                self.num_bytes += size - (known[1] if known else 0)
        if self.num_bytes > self.most_bytes:
            self._sweep()
            self.most_bytes = max(self.most_bytes, self.num_bytes)

    def holds(self, x: torch.Tensor) -> bool:
        """Whether the storage of `x` is counted here."""
        return local(x).untyped_storage()._cdata in self.live

    def _sweep(self) -> None:
        found = {}
        for address, (reference, _) in self.live.items():
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)  # type: ignore[attr-defined]
            if storage is not None:
                found[address] = (reference, storage.nbytes())  # FSDP shrinks storages to nothing
        self.live, self.num_bytes = found, sum(size for _, size in found.values())


class _Watch(TorchDispatchMode):
    """Sees the tensors of every operation after it."""

    def __init__(self) -> None:
        super().__init__()
        self.device, self.host = _Side(), _Side()
        self.side = self.device

    def copy(self, x: torch.Tensor, to_host: bool) -> torch.Tensor:
        """A copy on the host, or back on the device."""
        self.side = self.host if to_host else self.device
        try:
            return x.clone()
        finally:
            self.side = self.device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        other = self.host if self.side is self.device else self.device
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor) and not x.is_meta]
        self.side.see(x for x in tensors if not other.holds(x))
        return out
