"""Bytes of tensors on this rank: what it holds between steps, and what a step holds at most.

Counted by torch's own allocator, never by the size of the process, which has the interpreter and libraries in
it. On a CPU, where device and host memory are one, tensors that the plan moves to the host (optimizer states,
activations in `to_host`) count as host bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from planner.runtime.parallel import Parallel
from planner.runtime.recompute import TO_HOST
from planner.runtime.zero import local

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorBytes:
    """Bytes of tensors in the device's memory and in the host's; on a GPU the host's are those between steps."""

    device_bytes: int
    host_bytes: int


def held(p: Parallel) -> TensorBytes:
    """Parameters, buffers and optimizer states of this rank, each storage once."""
    assert p.optimizer is not None
    states = [x for s in p.optimizer.inner.state.values() for x in s.values() if isinstance(x, torch.Tensor)]
    states += p.optimizer.masters.values()
    on_device = [*(local(x) for x in p.model.parameters()), *p.model.buffers()]
    if not p.optimizer.offload:
        on_device, states = [*on_device, *states], []
    return TensorBytes(device_bytes=_storages(on_device), host_bytes=_storages(states))


def _storages(tensors: Iterable[torch.Tensor]) -> int:
    found = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(found.values())


def peak_of(p: Parallel, step: Callable[[], T]) -> tuple[T, TensorBytes]:
    """Run `step`, a whole optimizer step of `p` that is not its first; its result and the most bytes it held."""
    before = held(p)
    if p.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(p.device)
        result = step()
        peak = torch.cuda.max_memory_allocated(p.device)
        return result, TensorBytes(device_bytes=peak, host_bytes=before.host_bytes)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints start and stop otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = step()
    device, host = _peaks(recorded)
    return result, TensorBytes(device_bytes=before.device_bytes + device, host_bytes=before.host_bytes + host)


def _peaks(recorded: profile) -> tuple[int, int]:
    """Largest sums of what was allocated and not yet freed, outside and inside of `to_host`."""
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    changes = sorted(_allocations(recorded.profiler.kineto_results.experimental_event_tree(), False))
    on_host: set[int] = set()
    live, most = [0, 0], [0, 0]
    for _, pointer, num_bytes, inside in changes:
        if num_bytes > 0 and inside:
            on_host.add(pointer)
        side = int(pointer in on_host)
        if num_bytes < 0:
            on_host.discard(pointer)
        live[side] += num_bytes
        most[side] = max(most[side], live[side])
    return most[0], most[1]


def _allocations(events: Iterable[object], inside: bool) -> Iterator[tuple[int, int, int, bool]]:
    """(time, pointer, bytes: negative when freed, inside of `to_host`) of every change of memory."""
    stack = [(event, inside) for event in events]
    while stack:
        event, within = stack.pop()
        if event.typed[0] == _EventType.Allocation:  # type: ignore[attr-defined]
            fields = event.extra_fields  # type: ignore[attr-defined]
            yield event.start_time_ns, fields.ptr, fields.alloc_size, within  # type: ignore[attr-defined]
        within = within or event.name == TO_HOST  # type: ignore[attr-defined]
        stack += [(child, within) for child in event.children]  # type: ignore[attr-defined]
