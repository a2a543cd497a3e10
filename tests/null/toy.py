"""A device and a cluster with round numbers, so that tests can do the arithmetic by hand."""

from __future__ import annotations

import dataclasses

from planner.costmodel.evidence import Quantity, Source
from planner.costmodel.hardware import (
    COLLECTIVES,
    AttentionFit,
    ClusterSpec,
    CollectiveFit,
    DeviceSpec,
    GemmFit,
    LinkTier,
    MemoryFit,
)

_HERE = {"evidence": Source.ASSUMED, "note": "round numbers"}


def quantity(value: float) -> Quantity:
    return Quantity(value=value, source=Source.ASSUMED, note="round numbers")


GEMM = GemmFit(
    peak_frac=0.8,
    sustained_frac=0.8,
    throttle_flops=1e12,
    ramp_k=0.0,
    tile_frac=1.0,
    wave_quantum=0.0,
    hbm_frac=1.0,
    overhead_s=1e-6,
    **_HERE,
)
ATTENTION = AttentionFit(
    forward_frac=0.5, backward_frac=0.25, ramp_len=0.0, head_dim_half=0.0, causal_len=0.0, overhead_s=0.0, **_HERE
)
# 100 TFLOP/s in 16 bits, 1 TB/s of HBM, 10 GB/s to the host, 100 SMs.
DEVICE = DeviceSpec(
    name="toy",
    aliases=(),
    peak_flops_per_s={"bfloat16": quantity(1e14), "float8": quantity(2e14), "float32": quantity(5e13)},
    memory_bytes=quantity(80e9),
    hbm_bytes_per_s=quantity(1e12),
    host_link_bytes_per_s=quantity(1e10),
    num_sms=100,
    kernel_launch_s=5e-6,
    gemm={"bfloat16": GEMM},
    attention={"flash": ATTENTION},
    memory=MemoryFit(hbm_frac=0.5, latency_s=2e-6, **_HERE),
)
COLLECTIVE = CollectiveFit(
    base_s=0.0, step_s=0.0, efficiency=1.0, fill_steps=0.0, ramp_step_s=0.0, ramp_bytes=1e6, **_HERE
)


def tier(
    name: str, domain_size: int, bytes_per_s: float, *, nvls: float = 0.0, topology: str = "switch", **constants: float
) -> LinkTier:
    """A tier whose collectives all have the same constants: ideal but for those given."""
    fit = dataclasses.replace(COLLECTIVE, **constants)
    return LinkTier(
        name=name,
        domain_size=domain_size,
        bandwidth_bytes_per_s=quantity(bytes_per_s),
        nvls_efficiency=nvls,
        topology=topology,
        collectives=dict.fromkeys(COLLECTIVES, fit),
    )


def cluster(*tiers: LinkTier, node_size: int = 8, backend: str = "nccl") -> ClusterSpec:
    return ClusterSpec(
        name="toy",
        device=DEVICE,
        tiers=tiers,
        node_size=node_size,
        host_memory_bytes_per_gpu=quantity(64e9),
        backend=backend,
        price_per_gpu_hour=None,
        notes="",
    )


# 8 GPUs on 100 GB/s each; nodes joined by 10 GB/s per GPU.
TWO_TIERS = cluster(tier("nvlink", 8, 100e9), tier("net", 0, 10e9))
