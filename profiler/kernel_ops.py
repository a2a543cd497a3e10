"""Kernels of planner.kernels as something to time, each by one implementation: samples of kind "kernel"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from planner.costmodel.kernel_choice import KERNELS, WAYS
from planner.kernels import dispatch, gla, loss, norm, pointwise
from planner.profiler.cases import Case
from planner.profiler.timing import Clock, Job

_WIDTH, _HEAD, _VOCAB, _TIME = 4096, 128, 32_768, 256
_CALLS = 10
_ASLEEP_CYCLES = 10_000_000  # some milliseconds, in which the host gets ahead: a call costs it more than the device
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Subject:
    """`inputs(rows)` in the first of which a row has `width` elements; our kernel moves `passes` over it forward; the
    first `leaves` inputs take gradients.
    """

    call: Callable[..., torch.Tensor | Tensors]
    inputs: Callable[[Callable[..., torch.Tensor], int], Tensors]
    width: int
    passes: float
    leaves: int


def _angles(made: Callable[..., torch.Tensor], rows: int) -> Tensors:
    turn = made(rows, _HEAD // 2).float()
    return turn.cos(), turn.sin()


_SUBJECTS = {
    "rms_norm": _Subject(
        call=norm.rms_norm, inputs=lambda made, rows: (made(rows, _WIDTH), made(_WIDTH)), width=_WIDTH, passes=2,
        leaves=2,
    ),
    "add_rms_norm": _Subject(
        call=norm.add_rms_norm, inputs=lambda made, rows: (made(rows, _WIDTH), made(rows, _WIDTH), made(_WIDTH)),
        width=_WIDTH, passes=4, leaves=3,
    ),
    "swiglu": _Subject(
        call=pointwise.swiglu, inputs=lambda made, rows: (made(rows, _WIDTH), made(rows, _WIDTH)), width=_WIDTH,
        passes=3, leaves=2,
    ),
    "rope": _Subject(
        call=pointwise.rope, inputs=lambda made, rows: (made(1, rows, _WIDTH // _HEAD, _HEAD), *_angles(made, rows)),
        width=_WIDTH, passes=2, leaves=1,
    ),
    "cross_entropy": _Subject(
        call=loss.cross_entropy, width=_VOCAB, passes=1, leaves=1,
        inputs=lambda made, rows: (made(rows, _VOCAB), torch.arange(rows, device=made(1).device) % _VOCAB),
    ),
    "gla": _Subject(  # states and scores between its kernels in bytes over those of q
        call=lambda q, k, v, g: gla.gated_linear_attention(q, k, v, g)[0], width=_TIME * _HEAD, passes=19.25, leaves=4,
        inputs=lambda made, heads: (*(made(1, _TIME, heads, _HEAD) for _ in range(3)),
                                    -made(1, _TIME, heads, _HEAD).abs()),
    ),
}  # fmt: skip


def make_kernel(case: Case, device: torch.device) -> Job:
    """The job of one implementation of a kernel, one way; DispatchError where it is not installed."""
    kernel, way, how = case.name.split("/")
    dtype, subject = getattr(torch, case.dtype), _SUBJECTS[kernel]
    chosen = {KERNELS[kernel].ops[WAYS.index(way)]: how}

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    row_bytes = subject.width * subject.passes * made(1).element_size()
    leaves = subject.inputs(made, max(round(case.dims["num_bytes"] / row_bytes), 1))
    backward = way == "backward"
    leaves = tuple(x.requires_grad_(backward and i < subject.leaves) for i, x in enumerate(leaves))

    def timed(clock: Clock) -> float:
        with dispatch.using(chosen), torch.set_grad_enabled(backward):
            work = _backward(subject, leaves) if backward else lambda: subject.call(*leaves)
            if device.type == "cuda":
                torch.cuda._sleep(_ASLEEP_CYCLES)
            start = clock.mark()
            for _ in range(_CALLS):
                work()
            return clock.between_s(start, clock.mark())

    return Job(timed=timed, parts=_CALLS)


def _backward(subject: _Subject, leaves: Tensors) -> Callable[[], object]:
    outs = subject.call(*leaves)
    outs = (outs,) if isinstance(outs, torch.Tensor) else outs
    grads = [torch.ones_like(out) for out in outs]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return lambda: torch.autograd.grad(outs, wanted, grads, retain_graph=True)
