"""Which implementation of an op of planner.kernels runs, as a plan says it, and what each of them moves. No torch.

A choice maps ops to "torch" (the pure-torch form, for a module the model's own code), "ours" (Triton), "liger" or
"fla" (the libraries of that name). tests/cpu/kernels/test_dispatch.py holds this file to what planner.kernels declares
and to the bytes that are counted of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planner.costmodel.compute import memory_bound_s
from planner.costmodel.hardware import DeviceSpec, Table
from planner.costmodel.measured import along

IMPLEMENTATIONS = ("torch", "ours", "liger", "fla")
PACKAGES = {"ours": "triton", "liger": "liger-kernel", "fla": "fla-core"}  # as pip calls what they need
WAYS = ("forward", "backward")
_TORCH_ONLY = ("merge_partials_backward",)
_OURS = (
    "add_rms_norm", "ce_combine", "ce_grad", "ce_grad_", "ce_stats", "dequantize_sum", "gla", "gla_backward", "lstm",
    "lstm_backward", "merge_partials", "moe_permute", "moe_unpermute", "moe_unpermute_backward", "pack_heads",
    "pack_sequence", "quantize_blocks", "ring_step", "ring_step_backward", "rms_norm", "rms_norm_backward", "rope",
    "slstm", "slstm_backward", "swiglu", "swiglu_backward", "unpack_heads", "unpack_sequence",
)  # fmt: skip
_LIBRARIES = {"rms_norm": ("liger",), "rms_norm_backward": ("liger",), "swiglu": ("liger",), "gla": ("fla",)}
OPS: dict[str, tuple[str, ...]] = {
    **{op: ("torch", "ours", *_LIBRARIES.get(op, ())) for op in _OURS}, **dict.fromkeys(_TORCH_ONLY, ("torch",)),
}  # fmt: skip
# Ops that go together under one name; a choice of it holds for those of them that have the implementation.
GROUPS: dict[str, tuple[str, ...]] = {
    "rms_norm": ("rms_norm", "rms_norm_backward"),
    "swiglu": ("swiglu", "swiglu_backward"),
    "cross_entropy": ("ce_stats", "ce_combine", "ce_grad", "ce_grad_"),
    "ring_step": ("ring_step", "ring_step_backward"),
    "ulysses": ("pack_heads", "pack_sequence", "unpack_heads", "unpack_sequence"),
    "moe_permute": ("moe_permute", "moe_unpermute", "moe_unpermute_backward"),
    "gla": ("gla", "gla_backward"),
    "lstm": ("lstm", "lstm_backward"),
    "slstm": ("slstm", "slstm_backward"),
    "quantize": ("quantize_blocks", "dequantize_sum"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """What a layer calls: the ops that its forward and its backward run, and what their implementations do each way.

    `moves`: (bytes over those that our kernel moves forward, kernels launched). Those of torch are counted in 16 bits;
    those of the libraries are read off liger-kernel 0.8 (its norm's backward zeroes its result first, and sums the
    weight's gradient apart) and fla-core 0.6 (its gates' sums are a tensor, and every kernel reads what it needs
    again), gated linear attention at heads of 128.
    """

    ops: tuple[str, str]
    moves: tuple[dict[str, tuple[float, int]], dict[str, tuple[float, int]]]


KERNELS: dict[str, Kernel] = {
    "rms_norm": Kernel(
        ops=("rms_norm", "rms_norm_backward"),
        moves=({"torch": (10.0, 9), "ours": (1.0, 1), "liger": (1.0, 1)},
               {"torch": (23.5, 14), "ours": (1.5, 2), "liger": (2.0, 4)}),
    ),
    "add_rms_norm": Kernel(
        ops=("add_rms_norm", "rms_norm_backward"),
        moves=({"torch": (5.75, 10), "ours": (1.0, 1)},
               {"torch": (14.0, 16), "ours": (1.0, 2), "liger": (1.75, 5)}),
    ),
    "swiglu": Kernel(
        ops=("swiglu", "swiglu_backward"),
        moves=({"torch": (19 / 3, 5), "ours": (1.0, 1), "liger": (1.0, 1)}, {"torch": (21.0, 14), "ours": (5 / 3, 1)}),
    ),
    "rope": Kernel(
        ops=("rope", "rope"), moves=({"torch": (10.9, 9), "ours": (1.0, 1)}, {"torch": (11.0, 10), "ours": (1.0, 1)})
    ),
    "cross_entropy": Kernel(
        ops=("ce_stats", "ce_grad"),
        moves=({"torch": (17.0, 29), "ours": (1.0, 2)}, {"torch": (26.0, 14), "ours": (2.0, 1)}),
    ),
    "gla": Kernel(
        ops=("gla", "gla_backward"),
        moves=({"torch": (29.7, 2733), "ours": (1.0, 3), "fla": (1.35, 5)},
               {"torch": (92.5, 7986), "ours": (2.15, 6)}),
    ),
}  # fmt: skip
# Bytes a score that torch's form of a ring step moves, (forward, backward): its scores are float32 tensors.
RING_SCORE_BYTES = (62.0, 110.0)


def kernels_on(device: str) -> dict[str, str]:
    """The choice of every op on a device of this name where nobody chose: ours, on a CPU torch's."""
    return {op: default_on(device) if "ours" in OPS[op] else "torch" for op in sorted(OPS)}


def default_on(device: str) -> str:
    """What runs on a device of this name where nobody chose."""
    return "torch" if device == "cpu" else "ours"


def members(name: str) -> tuple[str, ...]:
    """The ops that a group's or an op's name stands for; KeyError if it is neither."""
    return GROUPS[name] if name not in OPS or name in GROUPS else (name,)


def problems(kernels: Mapping[str, str]) -> list[str]:
    """What is wrong with a choice: ops that do not exist, implementations that they do not have."""
    found = [f"kernels has no op {op!r}" for op in sorted(kernels) if op not in OPS]
    wrong = ((op, how) for op, how in sorted(kernels.items()) if op in OPS and how not in OPS[op])
    return found + [f"kernel op {op!r} has no implementation {how!r}: {', '.join(OPS[op])}" for op, how in wrong]


def choices_of(kernels: Mapping[str, str], name: str) -> tuple[str, str]:
    """Implementations of a kernel's forward and backward under a choice; "" where it says nothing."""
    forward, backward = KERNELS[name].ops
    return kernels.get(forward, ""), kernels.get(backward, "")


# ---- time


def sample_names() -> tuple[str, ...]:
    """What can be measured: kernel/way/implementation."""
    found = ((name, way, how) for name, k in KERNELS.items() for way, moves in zip(WAYS, k.moves, strict=True)
             for how in moves)  # fmt: skip
    return tuple("/".join(each) for each in found)


def table_name(dtype: str, sample: str) -> str:
    """Name of the table of measured times of what samples call `sample`."""
    return f"kernel/{dtype}/{sample}"


def kernel_s(
    device: DeviceSpec, dtype: str, kernel: str, choices: tuple[str, str], num_bytes: ArrayLike, num_calls: int,
    backward: bool,
) -> NDArray[np.float64]:  # fmt: skip
    """Seconds of `num_calls` calls of a kernel for which ours moves `num_bytes` forward, one way.

    Measured where a profile has this implementation, else what it moves and launches at the device's rates.
    """
    chosen = choices[backward] or default_on(device.name)
    each = np.asarray(num_bytes, np.float64) / max(num_calls, 1)
    table = device.measured.get(table_name(dtype, f"{kernel}/{WAYS[backward]}/{chosen}"))
    if table is not None:
        return np.asarray(num_calls * along(table, each), np.float64)
    passes, launches = KERNELS[kernel].moves[backward][chosen]
    return memory_bound_s(device, passes * num_calls * each, launches * num_calls)


def is_measured(measured: Mapping[str, Table], dtype: str, op: str, implementation: str) -> bool:
    """Whether times of an op by an implementation are measured."""
    return any(
        table_name(dtype, f"{name}/{way}/{implementation}") in measured
        for name, kernel in KERNELS.items() for way, its_op in zip(WAYS, kernel.ops, strict=True) if its_op == op
    )  # fmt: skip


def fastest(measured: Mapping[str, Table]) -> dict[str, str]:
    """Of the kernels that a profile has times of, the fastest: by their mean ratio at the sizes that all of them have.

    Torch's forms do not take part: instead of them a module would run its own code.
    """
    found: dict[str, str] = {}
    for name, kernel in KERNELS.items():
        for way, op, moves in zip(WAYS, kernel.ops, kernel.moves, strict=True):
            times = {how: _times(measured, name, way, how) for how in moves if how != "torch"}
            times = {how: by_size for how, by_size in times.items() if by_size}
            common = sorted(set.intersection(*map(set, times.values()))) if times else []
            if common and op not in found:
                found[op] = min(times, key=lambda how: float(np.mean(np.log([times[how][size] for size in common]))))
    return found


def _times(measured: Mapping[str, Table], kernel: str, way: str, implementation: str) -> dict[tuple[str, float], float]:
    """Measured seconds by (dtype, bytes)."""
    found = {}
    for name, table in measured.items():
        kind, _, rest = name.partition("/")
        dtype, _, what = rest.partition("/")
        if kind == "kernel" and what == f"{kernel}/{way}/{implementation}":
            found.update({(dtype, row[0]): time_s for row, time_s in zip(table.dims, table.time_s, strict=True)})
    return found
