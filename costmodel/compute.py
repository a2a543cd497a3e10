"""Compute times on one device: GEMM, attention, memory-bound kernels, optimizer, host copies. Vectorised, seconds.

Every time falls (or stays) when a peak or the HBM rate is raised and grows (or stays) with the work: GEMM is a
minimum over tile shapes and split-k of a maximum of terms, and each term has that property.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planner.costmodel.evidence import Source
from planner.costmodel.hardware import FUSED_ATTENTION, AttentionFit, DeviceSpec, GemmFit
from planner.costmodel.measured import along, between

Array = NDArray[np.float64]

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float8": 1}
TENSOR_OVER_CUDA_CORES = 16.0  # 16-bit matrix rates: A100 312 over 19.5 TFLOP/s (NVIDIA A100 datasheet)
TRAINING_HEAT = 0.5  # assumed: 0 is 4 % too fast and 1 is 4 % too slow on a published layer (reports/calibration.md)
_QUANTISE_BYTES = 5  # per element of A: read for its scale (2), read and written (2 + 1)
_BORROW = ("bfloat16", "float16", "float32", "float8")  # whose fit a dtype without one of its own uses
# (tile_m, tile_n, halvings below 128x256, split of k with a partial output in fp32): libraries pick the best, and so
# does the minimum. Adding the other tiles and splits changed no held-out error by more than 0.3 points.
_KERNELS = ((128, 256, 0, 1), (128, 128, 1, 1), (128, 128, 1, 4), (64, 64, 3, 1))


def _f(value: ArrayLike) -> Array:
    return np.asarray(value, np.float64)


def gemm_fit(device: DeviceSpec, dtype: str) -> tuple[GemmFit, bool]:
    """The constants for `dtype` and whether they are its own; ValueError if the device cannot run the dtype."""
    if dtype not in device.peak_flops_per_s:
        raise ValueError(f"device {device.name!r} has no {dtype} rate; it has {', '.join(device.peak_flops_per_s)}")
    if dtype in device.gemm:
        return device.gemm[dtype], True
    return device.gemm[next(name for name in _BORROW if name in device.gemm)], False


def gemm_evidence(device: DeviceSpec, dtype: str) -> Source:
    """Evidence behind `gemm_s`: that of the fit, MODELLED at best when the dtype borrows another's."""
    fit, own = gemm_fit(device, dtype)
    return fit.evidence if own else max(fit.evidence, Source.MODELLED)


def gemm_s(
    device: DeviceSpec,
    dtype: str,
    batch: ArrayLike,
    m: ArrayLike,
    n: ArrayLike,
    k: ArrayLike,
    *,
    heat: float = TRAINING_HEAT,
) -> Array:
    """Seconds of C[batch, m, n] = A[batch, m, k] B[batch, k, n]; inputs broadcast.

    overhead + max(math, HBM traffic / rate); math = min over tiles and split-k of
    waves * tile_m * tile_n * 2 (k/split + ramp_k) * SMs / (peak * frac).
    waves = tiles/SMs rounded up in the proportion `wave_quantum` (wave and tile quantisation, NVIDIA Deep
    Learning Performance Guide, section 'Matrix multiplication'). float8 adds the quantisation of A from 16 bits.
    A kernel alone (`heat` 0, microbenchmarks) slows only as it grows: frac = sustained + (peak_frac - sustained) /
    (1 + F/throttle), F = 2 batch m n k. Nothing but GEMMs for long (`heat` 1) holds the chip at its power limit:
    frac = sustained. A training step lies between, by the share of its kernels that draw less.
    """
    fit, _ = gemm_fit(device, dtype)
    b_, m_, n_, k_ = np.broadcast_arrays(_f(batch), _f(m), _f(n), _f(k))
    output = b_ * m_ * n_
    cool = (1 - heat) * (fit.peak_frac - fit.sustained_frac)
    frac = fit.sustained_frac + cool / (1 + output * k_ * (2 / fit.throttle_flops))
    hbm = device.hbm_bytes_per_s.value * fit.hbm_frac
    math_s = np.full(b_.shape, np.inf)
    for tile_m, tile_n, halvings, split in _KERNELS:
        tiles = b_ * np.ceil(m_ / tile_m) * np.ceil(n_ / tile_n)
        waves = _waves(tiles * (split / device.num_sms), fit.wave_quantum)
        tile_s = 2 * tile_m * tile_n * device.num_sms / (fit.tile_frac**halvings * device.peak_flops_per_s[dtype].value)
        one_s = waves * (k_ * (tile_s / split) + tile_s * fit.ramp_k) / frac
        math_s = np.minimum(math_s, one_s if split == 1 else one_s + output * (8 * split / hbm))  # written and read
    width = DTYPE_BYTES[dtype]
    traffic_s = (b_ * (m_ + n_) * k_ * width + output * max(width, 2)) / hbm
    quantise_s = b_ * m_ * k_ * (_QUANTISE_BYTES / hbm) if dtype == "float8" else 0.0
    seconds = np.asarray(fit.overhead_s + np.maximum(math_s, traffic_s) + quantise_s, np.float64)
    return between(device.measured.get(f"gemm/{dtype}"), (b_, m_, n_, k_), seconds)


def _waves(rounds: Array, quantum: float) -> Array:
    """Rounds of one tile per SM, at least one; the last costs between its share and a whole round."""
    return np.asarray((1 - quantum) * np.maximum(rounds, 1.0) + quantum * np.ceil(rounds), np.float64)


def attention_s(
    device: DeviceSpec,
    dtype: str,
    *,
    batch: ArrayLike,
    q_heads: ArrayLike,
    kv_heads: ArrayLike,
    q_len: ArrayLike,
    kv_len: ArrayLike,
    head_dim_qk: ArrayLike,
    head_dim_v: ArrayLike,
    causal_fraction: ArrayLike,
    implementation: str,
    backward: bool,
) -> Array:
    """Seconds of scaled dot-product attention, forward or backward alone; inputs broadcast.

    `causal_fraction` is the share of the score matrix that is needed: 1 full, 1/2 causal. The fused kernels
    ("flash": FlashAttention-2, "cudnn", "flash3") skip the rest; a device without constants for the last two runs
    "flash". "unfused" (two batched GEMMs and a score matrix in memory) computes it all. ValueError on another name.
    """
    arrays = np.broadcast_arrays(
        *map(_f, (batch, q_heads, kv_heads, q_len, kv_len, head_dim_qk, head_dim_v, causal_fraction))
    )
    if implementation in FUSED_ATTENTION:
        fit = device.attention.get(implementation, device.attention["flash"])
        seconds = _flash_s(device, dtype, fit, arrays, backward)
        return _attention_between(device, dtype, arrays, backward, seconds)
    if implementation == "unfused":
        return _unfused_s(device, dtype, arrays, backward)
    raise ValueError(
        f"unknown attention implementation {implementation!r}; known: {', '.join(FUSED_ATTENTION)}, unfused"
    )


def _flash_s(device: DeviceSpec, dtype: str, fit: AttentionFit, arrays: tuple[Array, ...], backward: bool) -> Array:
    """FlashAttention-2/3 (Dao 2023; Shah et al. 2024): 2 (dqk + dv) q kv FLOPs per head, times 2.5 backward.

    Rate = peak * frac * kv/(kv + ramp) * d/(d + d_half), normalised at d = 128; a causal kernel has a longer ramp.
    Backward recomputes the scores: five GEMMs where forward has two. HBM floor: q, k, v, o once forward, and
    q, k, v, o, do, dq, dk, dv backward.
    """
    batch, heads, kv_heads, q_len, kv_len, d_qk, d_v, causal = arrays
    use = dtype if dtype in device.peak_flops_per_s and dtype != "float8" else next(iter(device.peak_flops_per_s))
    flops = 2 * batch * heads * q_len * kv_len * causal * (d_qk + d_v) * (2.5 if backward else 1.0)
    frac = fit.backward_frac if backward else fit.forward_frac
    width = (d_qk + d_v) / 2
    dim_gain = (width / (width + fit.head_dim_half)) * ((128 + fit.head_dim_half) / 128)
    ramp = fit.ramp_len + fit.causal_len * np.where(causal < 1, 1.0, 0.0)
    rate = device.peak_flops_per_s[use].value * frac * np.minimum(dim_gain, 1.0) * kv_len / (kv_len + ramp)
    passes = 2 if backward else 1
    elements = batch * (heads * q_len * (d_qk + d_v) * passes + kv_heads * kv_len * (d_qk + d_v) * passes)
    floor = DTYPE_BYTES[use] * elements / (device.hbm_bytes_per_s.value * device.memory.hbm_frac)
    return fit.overhead_s + np.maximum(flops / rate, floor)


def attention_table(dtype: str, causal: bool, backward: bool) -> str:
    """Name of the measured table of fused attention."""
    return f"attention/{dtype}/{'causal' if causal else 'full'}/{'backward' if backward else 'forward'}"


def _attention_between(
    device: DeviceSpec, dtype: str, arrays: tuple[Array, ...], backward: bool, formula_s: Array
) -> Array:
    causal = arrays[-1] < 1
    for masked in (True, False):
        table = device.measured.get(attention_table(dtype, masked, backward))
        formula_s = np.where(causal == masked, between(table, arrays[:-1], formula_s), formula_s)
    return formula_s


def _unfused_s(device: DeviceSpec, dtype: str, arrays: tuple[Array, ...], backward: bool) -> Array:
    """Scores in memory: QK^T, fused scale-mask-softmax, dropout, AV (Korthikanti et al. 2022, section 4.1).

    Forward: 2 GEMMs; score bytes: softmax read+write, dropout read+write+1-byte mask = 9 per score at 2 bytes.
    Backward: 4 GEMMs; dropout (2+1+2) and softmax (two reads, one write) = 11 per score.
    """
    batch, heads, _, q_len, kv_len, d_qk, d_v, _ = arrays
    bh = batch * heads
    width = DTYPE_BYTES[dtype]
    scores = bh * q_len * kv_len
    # Rows of q, k, v that are no multiple of 16 bytes keep the batched GEMMs off the tensor cores.
    aligned = (d_qk * width % 16 == 0) & (d_v * width % 16 == 0)
    slower = np.where(aligned, 1.0, TENSOR_OVER_CUDA_CORES)
    if not backward:
        gemms = gemm_s(device, dtype, bh, q_len, kv_len, d_qk) + gemm_s(device, dtype, bh, q_len, d_v, kv_len)
        return np.asarray(slower * gemms + memory_bound_s(device, scores * (4 * width + 1), 2), np.float64)
    gemms = (
        gemm_s(device, dtype, bh, q_len, kv_len, d_v)
        + gemm_s(device, dtype, bh, kv_len, d_v, q_len)
        + gemm_s(device, dtype, bh, q_len, d_qk, kv_len)
        + gemm_s(device, dtype, bh, kv_len, d_qk, q_len)
    )
    return np.asarray(slower * gemms + memory_bound_s(device, scores * (5 * width + 1), 2), np.float64)


def memory_bound_s(device: DeviceSpec, num_bytes: ArrayLike, num_kernels: ArrayLike) -> Array:
    """Seconds of `num_kernels` kernels that read and write `num_bytes` in all: kernels * latency + bytes / rate.

    Device time only; what an eager loop adds when the host is slower is `kernel_launch_s` per kernel, which the
    caller compares with this. Where a kernel's size was measured, its time stands for both terms.
    """
    rate = device.hbm_bytes_per_s.value * device.memory.hbm_frac
    seconds = np.asarray(_f(num_kernels) * device.memory.latency_s + _f(num_bytes) / rate, np.float64)
    table = device.measured.get("memory")
    if table is None:
        return seconds
    each = _f(num_bytes) / np.maximum(_f(num_kernels), 1)
    return np.where(_f(num_kernels) > 0, _f(num_kernels) * along(table, each), seconds)


def optimizer_s(device: DeviceSpec, num_params: ArrayLike, bytes_per_param: ArrayLike) -> Array:
    """Seconds of a fused optimizer step over `num_params`; Adam in mixed precision moves 28-32 bytes each.

    fp32 master, two moments read and written (24), gradient read (2-4), low-precision weight written (2). A measured
    step includes the norm of its gradients.
    """
    table = device.measured.get("optimizer")
    if table is not None:
        return np.where(_f(num_params) > 0, along(table, num_params), 0.0)
    return memory_bound_s(device, _f(num_params) * _f(bytes_per_param), 1)


def host_copy_s(device: DeviceSpec, num_bytes: ArrayLike) -> Array:
    """Seconds to copy between device and pinned host memory, one direction: launch + bytes / link rate."""
    started = device.kernel_launch_s * (_f(num_bytes) > 0)
    seconds = np.asarray(started + _f(num_bytes) / device.host_link_bytes_per_s.value, np.float64)
    table = device.measured.get("copy")
    return seconds if table is None else np.where(_f(num_bytes) > 0, along(table, num_bytes), 0.0)
