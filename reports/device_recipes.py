"""Constants of devices without measurements of their own: from whom they are borrowed, with which changes and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from planner.costmodel.evidence import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Borrow:
    """Constants of `device` taken from another device, with changes."""

    from_device: str
    evidence: Source
    why: str
    changes: Mapping[str, float] = field(default_factory=dict)
    kernels: tuple[str, ...] = ()  # attention only: which of the lender's kernels; empty: all


_SAME_CHIP = "same chip, only memory or links differ"

GEMM = {
    "a100-40gb": Borrow(from_device="a100-80gb", evidence=Source.MODELLED, why=_SAME_CHIP),
    "a800-80gb": Borrow(from_device="a100-80gb", evidence=Source.MODELLED, why=_SAME_CHIP),
    "gb300-279gb": Borrow(from_device="b300-270gb", evidence=Source.MODELLED, why="same chip, higher clocks"),
    "h800-80gb": Borrow(from_device="h100-80gb", evidence=Source.MODELLED, why=_SAME_CHIP),
    "h20-96gb": Borrow(
        from_device="h100-80gb",
        evidence=Source.MODELLED,
        changes={"peak_frac": 0.96, "sustained_frac": 0.93},
        why="78 of the same SMs, far from the power limit; best rate 142 of 148 TFLOP/s, "
        "https://github.com/zzc0721/torch-performance-test-data/issues/77 read 2026-11-24",
    ),
    "mi300x-192gb": Borrow(
        from_device="h100-80gb",
        evidence=Source.MODELLED,
        changes={"peak_frac": 0.514, "sustained_frac": 0.47},
        why="best shape 668 of 1300 TFLOP/s, https://github.com/stas00/ml-engineering read 2026-11-24; long "
        "kernels 0.9 of that assumed",
    ),
    "mi250x-gcd": Borrow(
        from_device="a100-80gb",
        evidence=Source.ASSUMED,
        changes={"peak_frac": 0.7, "sustained_frac": 0.62},
        why="no measurement found",
    ),
    "v100-32gb": Borrow(
        from_device="a100-80gb",
        evidence=Source.ASSUMED,
        changes={"peak_frac": 0.8, "sustained_frac": 0.72},
        why="no measurement found",
    ),
    "t4-16gb": Borrow(
        from_device="a100-80gb",
        evidence=Source.ASSUMED,
        changes={"peak_frac": 0.45, "sustained_frac": 0.35, "throttle_flops": 5e10},
        why="no measurement found; a 70 W card whose clock falls far below boost under load",
    ),
}

_NO_FLASH = {"forward_frac": 0.35, "backward_frac": 0.28}
# FlashAttention-2 does not use the new tensor-core instructions: on Blackwell its rate per SM stays Hopper's.
_FLASH2_ON_BLACKWELL = {"forward_frac": 0.175, "backward_frac": 0.154}

ATTENTION = {
    "a100-40gb": (Borrow(from_device="a100-80gb", evidence=Source.MODELLED, why=_SAME_CHIP),),
    "a800-80gb": (Borrow(from_device="a100-80gb", evidence=Source.MODELLED, why=_SAME_CHIP),),
    "h200-141gb": (Borrow(from_device="h100-80gb", evidence=Source.MODELLED, why=_SAME_CHIP),),
    "h800-80gb": (Borrow(from_device="h100-80gb", evidence=Source.MODELLED, why=_SAME_CHIP),),
    "h20-96gb": (
        Borrow(
            from_device="a100-80gb",
            evidence=Source.MODELLED,
            why="bound by its small peak rate like A100, not by the softmax units like H100",
        ),
    ),
    "l40s-48gb": (Borrow(from_device="a100-80gb", evidence=Source.MODELLED, why="same kernels as A100"),),
    **{
        name: (
            Borrow(
                from_device="h100-80gb",
                evidence=Source.MODELLED,
                kernels=("flash",),
                changes=_FLASH2_ON_BLACKWELL,
                why="H100's rate per SM: no new tensor-core instructions",
            ),
            Borrow(
                from_device="h100-80gb",
                evidence=Source.MODELLED,
                kernels=("cudnn", "flash3"),
                why="H100's fraction of the peak",
            ),
        )
        for name in ("b200-180gb", "gb200-186gb", "b300-270gb", "gb300-279gb")
    },
    **{
        name: (Borrow(from_device="a100-80gb", evidence=Source.ASSUMED, changes=_NO_FLASH, why="no measurement found"),)
        for name in ("v100-32gb", "t4-16gb", "mi250x-gcd", "mi300x-192gb")
    },
}

# Whose share of the HBM rate a streaming kernel reaches; the others have a figure of their own in devices.csv.
STREAM = {
    **dict.fromkeys(
        ("a100-40gb", "a800-80gb", "l40s-48gb"),
        Borrow(from_device="a100-80gb", evidence=Source.MODELLED, why="same share of the HBM rate as A100"),
    ),
    **dict.fromkeys(
        ("h100-80gb", "h800-80gb", "h20-96gb", "b200-180gb", "gb200-186gb", "b300-270gb",
         "gb300-279gb"),
        Borrow(from_device="h200-141gb", evidence=Source.MODELLED, why="same share of the HBM rate as H200"),
    ),
    **dict.fromkeys(
        ("v100-32gb", "t4-16gb", "mi250x-gcd", "mi300x-192gb"),
        Borrow(from_device="a100-80gb", evidence=Source.ASSUMED, why="no measurement found"),
    ),
}
