import dataclasses

import numpy as np
import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st

from planner.costmodel import compute
from planner.costmodel.evidence import Source
from planner.costmodel.presets import list_devices, load_device

DIMS = st.integers(1, 20_000)
FITTED = [name for name in list_devices() if "bfloat16" in load_device(name).peak_flops_per_s and name != "cpu"]


def attention(device, *, kernel="flash", backward=False, causal=1.0, dtype="bfloat16", **shape):
    base = {
        "batch": 2,
        "q_heads": 4,
        "kv_heads": 4,
        "q_len": 1024,
        "kv_len": 1024,
        "head_dim_qk": 128,
        "head_dim_v": 128,
        "causal_fraction": causal,
    }
    return compute.attention_s(device, dtype, **{**base, **shape}, implementation=kernel, backward=backward)


def faster(device, *, peak=1.0, hbm=1.0):
    def scaled(rate, by):
        return dataclasses.replace(rate, value=rate.value * by)

    peaks = {dtype: scaled(rate, peak) for dtype, rate in device.peak_flops_per_s.items()}
    return dataclasses.replace(device, peak_flops_per_s=peaks, hbm_bytes_per_s=scaled(device.hbm_bytes_per_s, hbm))


def test_gemm_bound_by_math():
    # 2 * 4096^3 FLOPs at 0.8 * 1e14; 512 tiles of 128x256 on 100 SMs with a smooth last wave: no quantisation.
    time_s = compute.gemm_s(toy.DEVICE, "bfloat16", 1, 4096, 4096, 4096)
    assert time_s == pytest.approx(1e-6 + 2 * 4096**3 / 0.8e14)


def test_gemm_bound_by_memory():
    # 4096 x 4096 outer product of k = 1: 2 (4096 + 4096 + 4096^2) bytes at 1 TB/s.
    time_s = compute.gemm_s(toy.DEVICE, "bfloat16", 1, 4096, 4096, 1)
    assert time_s == pytest.approx(1e-6 + 2 * (2 * 4096 + 4096**2) / 1e12)


def test_gemm_rounds_up_to_whole_waves():
    # 129 x 129 needs 2 tiles of 128x256, or 9 of 64x64; any one wave costs as much as 100 busy SMs: the smallest
    # tile wins: 2 * 64 * 64 * k * 100 SMs / 0.8e14.
    rounds = dataclasses.replace(toy.GEMM, wave_quantum=1.0, overhead_s=0.0)
    device = dataclasses.replace(toy.DEVICE, gemm={"bfloat16": rounds})
    time_s = compute.gemm_s(device, "bfloat16", 1, 129, 129, 8192)
    assert time_s == pytest.approx(2 * 64 * 64 * 8192 * 100 / 0.8e14)


def test_gemm_splits_k_when_few_tiles_fill_few_sms():
    # 512 x 1024 x 65536: 16 tiles of 128x256, 32 of 128x128; split 4 ways 128 of them fill 100 SMs.
    tile = dataclasses.replace(toy.GEMM, tile_frac=0.5, overhead_s=0.0)  # small tiles do not pay
    device = dataclasses.replace(toy.DEVICE, gemm={"bfloat16": tile})
    time_s = compute.gemm_s(device, "bfloat16", 1, 512, 1024, 65536)
    split = 1.28 * 2 * 128 * 128 * (65536 / 4) * 100 / (0.5 * 0.8e14) + 8 * 4 * 512 * 1024 / 1e12
    whole = 2 * 128 * 256 * 65536 * 100 / 0.8e14
    assert time_s == pytest.approx(min(split, whole))
    assert split < whole


def test_gemm_slows_towards_the_power_limit():
    # A kernel alone at F = throttle_flops is half way between 0.8 and 0.6; in a training step half way from there.
    throttled = dataclasses.replace(toy.GEMM, sustained_frac=0.6, throttle_flops=2.0 * 4096**3, overhead_s=0.0)
    device = dataclasses.replace(toy.DEVICE, gemm={"bfloat16": throttled})
    times = [compute.gemm_s(device, "bfloat16", 1, 4096, 4096, 4096, heat=heat) for heat in (0.0, 0.5, 1.0)]
    assert times == pytest.approx([2 * 4096**3 / rate for rate in (0.7e14, 0.65e14, 0.6e14)])
    assert compute.gemm_s(device, "bfloat16", 1, 4096, 4096, 4096) == times[1]


def test_float8_pays_for_quantising_the_activation():
    # 2e14 peak; 5 bytes per element of A at 1 TB/s on top.
    time_s = compute.gemm_s(toy.DEVICE, "float8", 1, 4096, 4096, 4096)
    assert time_s == pytest.approx(1e-6 + 2 * 4096**3 / 1.6e14 + 5 * 4096**2 / 1e12)


def test_gemm_broadcasts_and_batches():
    one = compute.gemm_s(toy.DEVICE, "bfloat16", 1, 4096, 4096, 4096)
    many = compute.gemm_s(toy.DEVICE, "bfloat16", np.array([[1], [3]]), 4096, 4096, np.array([4096, 4096]))
    assert many.shape == (2, 2)
    assert many[1, 0] - 1e-6 == pytest.approx(3 * (one - 1e-6))


def test_gemm_refuses_a_dtype_the_device_lacks():
    with pytest.raises(ValueError, match="device 'v100-32gb' has no bfloat16 rate; it has float16, float32"):
        compute.gemm_s(load_device("v100"), "bfloat16", 1, 64, 64, 64)


def test_borrowed_dtype_weakens_the_evidence():
    assert compute.gemm_evidence(load_device("h100"), "bfloat16") is Source.INTERPOLATED
    assert compute.gemm_evidence(load_device("h100"), "float16") is Source.MODELLED


@given(m=DIMS, n=DIMS, k=DIMS, more=st.sampled_from("mnk"), by=st.floats(1, 8), name=st.sampled_from(FITTED))
def test_more_gemm_work_is_never_faster(m, n, k, more, by, name):
    dims = {"m": m, "n": n, "k": k}
    device = load_device(name)
    before = compute.gemm_s(device, "bfloat16", 1, *dims.values())
    after = compute.gemm_s(device, "bfloat16", 1, *(dims | {more: dims[more] * by}).values())
    assert after >= before * (1 - 1e-12)


@given(m=DIMS, n=DIMS, k=DIMS, peak=st.floats(1, 10), hbm=st.floats(1, 10), name=st.sampled_from(FITTED))
def test_faster_device_is_never_slower(m, n, k, peak, hbm, name):
    device = load_device(name)
    better = faster(device, peak=peak, hbm=hbm)
    assert compute.gemm_s(better, "bfloat16", 1, m, n, k) <= compute.gemm_s(device, "bfloat16", 1, m, n, k)
    for kernel in ("flash", "cudnn", "unfused"):
        for backward in (False, True):
            times = [attention(d, kernel=kernel, backward=backward, q_len=m, kv_len=n) for d in (better, device)]
            assert times[0] <= times[1]


@given(m=DIMS, n=DIMS, k=DIMS, name=st.sampled_from(FITTED))
def test_gemm_never_beats_the_peak(m, n, k, name):
    device = load_device(name)
    time_s = compute.gemm_s(device, "bfloat16", 1, m, n, k)
    assert time_s >= 2.0 * m * n * k / device.peak_flops_per_s["bfloat16"].value


def test_flash_attention_counts():
    # 4 * 2 * 4 * 1024^2 * 128 FLOPs at half of 1e14; backward 2.5 times the work at half of the rate.
    flops = 4 * 2 * 4 * 1024**2 * 128
    assert attention(toy.DEVICE) == pytest.approx(flops / 0.5e14)
    assert attention(toy.DEVICE, causal=0.5) == pytest.approx(flops / 2 / 0.5e14)
    assert attention(toy.DEVICE, backward=True) == pytest.approx(2.5 * flops / 0.25e14)


def test_flash_attention_ramps():
    # ramp 1024 halves the rate at 1024 keys; head_dim_half 128 gives 64 wide heads (1/3) / (1/2) of it.
    ramp = dataclasses.replace(toy.ATTENTION, ramp_len=1024.0)
    wide = dataclasses.replace(toy.ATTENTION, head_dim_half=128.0)
    flops = 4 * 2 * 4 * 1024**2 * 128
    assert attention(dataclasses.replace(toy.DEVICE, attention={"flash": ramp})) == pytest.approx(2 * flops / 0.5e14)
    narrow = attention(dataclasses.replace(toy.DEVICE, attention={"flash": wide}), head_dim_qk=64, head_dim_v=64)
    assert narrow == pytest.approx(flops / 2 / 0.5e14 * 1.5)


def test_a_kernel_that_the_device_lacks_runs_flash():
    assert attention(toy.DEVICE, kernel="flash3") == attention(toy.DEVICE)
    assert attention(load_device("h100"), kernel="flash3") < attention(load_device("h100"))


def test_unfused_attention_moves_the_scores():
    # Two batched GEMMs and 9 bytes per score at 0.5 TB/s in two kernels; backward four GEMMs and 11 bytes.
    scores = 8 * 1024**2
    forward = 2 * compute.gemm_s(toy.DEVICE, "bfloat16", 8, 1024, 1024, 128)
    forward_scores = 4e-6 + 9 * scores / 0.5e12
    av = compute.gemm_s(toy.DEVICE, "bfloat16", 8, 1024, 128, 1024)
    qk = forward / 2
    assert attention(toy.DEVICE, kernel="unfused") == pytest.approx(float(qk + av) + forward_scores)
    backward = attention(toy.DEVICE, kernel="unfused", backward=True)
    assert backward == pytest.approx(float(qk + 3 * av) + 4e-6 + 11 * scores / 0.5e12)


def test_unknown_attention_is_named():
    with pytest.raises(ValueError, match="implementation 'magic'; known: flash, cudnn, flash3, unfused"):
        attention(toy.DEVICE, kernel="magic")


@given(
    length=st.integers(16, 100_000),
    by=st.floats(1, 4),
    causal=st.sampled_from([0.5, 1.0]),
    backward=st.booleans(),
    kernel=st.sampled_from(["flash", "cudnn", "flash3", "unfused"]),
)
def test_longer_attention_is_never_faster(length, by, causal, backward, kernel):
    device = load_device("h100")
    shape = {"kernel": kernel, "causal": causal, "backward": backward}
    short = attention(device, q_len=length, kv_len=length, **shape)
    assert attention(device, q_len=length, kv_len=length * by, **shape) >= short * (1 - 1e-12)
    assert attention(device, q_len=length * by, kv_len=length, **shape) >= short * (1 - 1e-12)


def test_memory_bound_optimizer_and_host_copy():
    assert compute.memory_bound_s(toy.DEVICE, 1e9, 3) == pytest.approx(6e-6 + 1e9 / 0.5e12)
    assert compute.optimizer_s(toy.DEVICE, 1e9, 30.0) == pytest.approx(2e-6 + 30e9 / 0.5e12)
    assert compute.host_copy_s(toy.DEVICE, 1e9) == pytest.approx(5e-6 + 0.1)
    assert compute.host_copy_s(toy.DEVICE, 0.0) == 0.0
