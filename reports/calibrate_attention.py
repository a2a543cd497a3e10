"""Attention curves: the published H100 sweep of three kernels, and single-GPU figures of FlashAttention-2 on A100.

Sweep: measurements/attention_h100.csv (Shah et al. 2024, arXiv 2407.08608, figures 5 and 6). A100: the rate at 64k
tokens from attention_microbench.csv; how the rate grows with length and head size is FlashAttention-2's on H100.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from planner.costmodel.compute import attention_s
from planner.costmodel.evidence import Source
from planner.costmodel.hardware import FUSED_ATTENTION, AttentionFit, DeviceSpec
from planner.reports.fitting import Array, Errors, Parameter, errors, fit, folds, log_loss

_SWEEP = Path(__file__).parent / "measurements" / "attention_h100.csv"
_CURVE = (
    Parameter(name="forward_frac", start=0.5, low=0.05, high=1.0),
    Parameter(name="backward_frac", start=0.4, low=0.05, high=1.0),
    Parameter(name="ramp_len", start=100, low=1, high=3000, log=True),
    Parameter(name="head_dim_half", start=40, low=1, high=500, log=True),
    Parameter(name="causal_len", start=300, low=1, high=3000, log=True),
)
_OVERHEAD_S = 5e-6  # one launch; the sweep's shortest kernel is 30 times longer and cannot tell
_ITERATIONS = 800
_BATCHED = "single-GPU flash-attn / 8 (ideal)"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionReport:
    """One device and kernel; `other_sources` did not make the constants."""

    device: str
    kernel: str
    sources: str
    held_out: Errors
    other_sources: tuple[tuple[str, Errors], ...]


def _time_s(device: DeviceSpec, rows: pd.DataFrame, kernel: str) -> Array:
    seconds = np.zeros(len(rows))
    for backward in (False, True):
        here = (rows["pass"] == "backward").to_numpy() == backward
        part = rows[here]
        seconds[here] = attention_s(
            device,
            "bfloat16",
            batch=part.batch,
            q_heads=part.q_heads,
            kv_heads=part.kv_heads,
            q_len=part.seq_len,
            kv_len=part.seq_len,
            head_dim_qk=part.head_dim,
            head_dim_v=part.head_dim,
            causal_fraction=np.where(part.causal == 1, 0.5, 1.0),
            implementation=kernel,
            backward=backward,
        )
    return seconds


def _sweep() -> pd.DataFrame:
    """The H100 sweep with seconds: FLOPs as its authors count them, 4 s^2 d heads, half causal, 2.5 times backward."""
    table = pd.read_csv(_SWEEP)
    flops = 4.0 * table.batch * table.seq_len**2 * table.q_heads * table.head_dim * np.where(table.causal == 1, 0.5, 1)
    flops = flops * np.where(table["pass"] == "backward", 2.5, 1.0)
    return table.assign(kv_heads=table.q_heads, time_s=flops / (table.tflops * 1e12))


def _single(path: Path, hardware: str) -> pd.DataFrame:
    """ring-flash-attention's single-GPU rows of `hardware`: forward and, by difference, backward of 1/8 of the work."""
    table = pd.read_csv(path)
    table = table[(table.hardware == hardware) & (table.impl == _BATCHED) & (table.api == "batch")]
    seconds = dict(zip(table.pass_, 1 / table.iters_per_s, strict=True))
    first = table.iloc[0]
    shape = {
        "batch": first.batch,
        "q_heads": first.q_heads / 8,
        "kv_heads": first.kv_heads / 8,
        "seq_len": first.global_seq,
        "head_dim": first.head_dim,
        "causal": 1,
    }
    return pd.DataFrame(
        [
            {**shape, "pass": "forward", "time_s": seconds["fwd"]},
            {**shape, "pass": "backward", "time_s": seconds["fwd+bwd"] - seconds["fwd"]},
        ]
    ).astype({"batch": float})


def _with(device: DeviceSpec, kernel: str, constants: AttentionFit) -> DeviceSpec:
    return dataclasses.replace(device, attention={"flash": constants, kernel: constants})


def _fit(
    device: DeviceSpec, rows: pd.DataFrame, kernel: str, parameters: tuple[Parameter, ...], fixed: Mapping[str, float]
) -> AttentionFit:
    measured = rows.time_s.to_numpy(float)

    def constants(values: Mapping[str, float]) -> AttentionFit:
        return AttentionFit(**{**fixed, **values}, overhead_s=_OVERHEAD_S, evidence=Source.INTERPOLATED, note="")

    def loss(values: dict[str, float]) -> float:
        return log_loss(_time_s(_with(device, kernel, constants(values)), rows, kernel), measured)

    return constants(fit(parameters, loss, _ITERATIONS))


def calibrate_h100(device: DeviceSpec, path: Path) -> tuple[dict[str, AttentionFit], list[AttentionReport]]:
    """The three kernels on H100 from the sweep; FlashAttention-2 is judged by ring-flash-attention's H800 rows too."""
    table, curves, reports = _sweep(), {}, []
    for kernel in FUSED_ATTENTION:
        rows = table[table.kernel == kernel].reset_index(drop=True)
        measured, predicted = rows.time_s.to_numpy(float), rows.time_s.to_numpy(float).copy()
        for part in folds(len(rows), 5):
            left = _fit(device, rows.drop(rows.index[part]), kernel, _CURVE, {})
            predicted[part] = _time_s(_with(device, kernel, left), rows.iloc[part], kernel)
        held_out = errors(predicted, measured)
        note = (
            f"{len(rows)} rows, Shah et al. 2024 figures 5 and 6, https://arxiv.org/abs/2407.08608 read 2026-11-24; "
            f"held-out error {held_out.median_abs:.1%} median, {held_out.p90_abs:.1%} p90; causal backward not measured"
        )
        curves[kernel] = dataclasses.replace(_fit(device, rows, kernel, _CURVE, {}), note=note)
        others = []
        if kernel == "flash":
            single = _single(path, "8xH800")
            time_s = _time_s(_with(device, kernel, curves[kernel]), single, kernel)
            others.append(("ring-flash-attention (H800)", errors(time_s, single.time_s.to_numpy(float))))
        reports.append(
            AttentionReport(
                device=device.name,
                kernel=kernel,
                sources="Shah et al. 2024",
                held_out=held_out,
                other_sources=tuple(others),
            )
        )
    return curves, reports


def calibrate_a100(device: DeviceSpec, path: Path, h100: AttentionFit) -> tuple[AttentionFit, AttentionReport]:
    """FlashAttention-2 on A100: its two rates from one length, the rest from H100; judged by USP's Ulysses rows."""
    rows = _single(path, "8xA100")
    fixed = {name: getattr(h100, name) for name in ("ramp_len", "head_dim_half", "causal_len")}
    note = (
        f"{len(rows)} rows at 64k tokens, ring-flash-attention, https://github.com/zhuzilin/ring-flash-attention "
        "read 2026-11-24; growth with length and head size as on H100 (arXiv 2407.08608)"
    )
    constants = dataclasses.replace(_fit(device, rows, "flash", _CURVE[:2], fixed), note=note)
    judged, measured = _ulysses(_with(device, "flash", constants), path)
    report = AttentionReport(
        device=device.name,
        kernel="flash",
        sources="USP, Ulysses on 8 GPUs, 32k tokens or more",
        held_out=errors(judged, measured),
        other_sources=(),
    )
    return constants, report


def _ulysses(device: DeviceSpec, path: Path) -> tuple[Array, Array]:
    """Attention alone against USP's measured Ulysses forward on 8 NVLinked A100, its all-to-alls included."""
    table = pd.read_csv(path)
    table = table[
        table.source.str.startswith("USP")
        & (table.hardware == "8xA100-SXM4-80GB")
        & (table.ring_degree == 1)
        & (table.global_seq >= 32768)
    ]
    rows = pd.DataFrame(
        {
            "batch": table.batch.astype(float),
            "q_heads": table.q_heads / 8,
            "kv_heads": table.kv_heads / 8,
            "seq_len": table.global_seq,
            "head_dim": table.head_dim,
            "causal": 1,
            "pass": "forward",
        }
    )
    return _time_s(device, rows, "flash"), (1 / table.iters_per_s).to_numpy(float)
