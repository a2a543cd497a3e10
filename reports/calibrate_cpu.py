"""The CPU preset and gloo, from measurements/cpu_gloo.csv: one core of a plain 2-core x86 machine, torch 2.13.

Few rows and few free constants; what a core has no counterpart for (tiles, waves, throttling) is switched off.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from planner.costmodel.compute import attention_s, gemm_s, memory_bound_s
from planner.costmodel.evidence import Source
from planner.costmodel.hardware import AttentionFit, DeviceSpec, GemmFit, MemoryFit
from planner.reports.fitting import Parameter, fit, log_loss

_TABLE = Path(__file__).parent / "measurements" / "cpu_gloo.csv"
NOTE = "one core, torch 2.13, reports/measurements/cpu_gloo.csv 2026-11-24"
_PLAIN = {"throttle_flops": 1e15, "tile_frac": 1.0, "wave_quantum": 0.0, "hbm_frac": 1.0}
_ITERATIONS = 400


def rows() -> pd.DataFrame:
    """The measurements, in SI units."""
    return pd.read_csv(_TABLE)


def link_rows() -> pd.DataFrame:
    """Collectives of two ranks as `link_rows.read` gives them, on the loopback tier of 10 GB/s.

    The rows of four ranks stay out: on two cores they measure the scheduler, which no plan prices.
    """
    table = rows()
    table = table[(table.what == "collective") & (table.ranks == 2)]
    place = {"link": "gloo", "gb_per_s": 10.0, "inner": "", "inner_gb_per_s": 0.0, "nodes": 1.0}
    return pd.DataFrame(
        {
            "source": "our measurement",
            "address": "reports/measurements/cpu_gloo.csv",
            "collective": table.collective,
            "num_bytes": table.num_bytes.astype(float),
            "per_node": table.ranks.astype(float),
            "time_s": table.time_s,
            **place,
        }
    )


def _gemm(device: DeviceSpec, table: pd.DataFrame) -> GemmFit:
    part = table[table.what == "gemm"]
    measured = part.time_s.to_numpy(float)

    def constants(values: Mapping[str, float]) -> GemmFit:
        return GemmFit(
            **values,
            **_PLAIN,
            sustained_frac=values["peak_frac"],
            evidence=Source.INTERPOLATED,
            note=f"7 shapes, {NOTE}",
        )

    def loss(values: dict[str, float]) -> float:
        made = dataclasses.replace(device, gemm={"float32": constants(values)})
        return log_loss(gemm_s(made, "float32", 1.0, part.m, part.n, part.k), measured)

    parameters = (
        Parameter(name="peak_frac", start=0.9, low=0.3, high=1.0),
        Parameter(name="ramp_k", start=10, low=0.1, high=500, log=True),
        Parameter(name="overhead_s", start=5e-6, low=1e-7, high=1e-4, log=True),
    )
    return constants(fit(parameters, loss, _ITERATIONS))


def _memory(device: DeviceSpec, table: pd.DataFrame) -> MemoryFit:
    part = table[(table.what == "add") & ((table.num_bytes > 1e7) | (table.num_bytes < 1e5))]  # DRAM, and a launch
    measured = part.time_s.to_numpy(float)

    def constants(values: Mapping[str, float]) -> MemoryFit:
        return MemoryFit(**values, evidence=Source.INTERPOLATED, note=f"DRAM-sized and tiny additions, {NOTE}")

    def loss(values: dict[str, float]) -> float:
        made = dataclasses.replace(device, memory=constants(values))
        return log_loss(memory_bound_s(made, part.num_bytes, 1), measured)

    parameters = (
        Parameter(name="hbm_frac", start=0.9, low=0.2, high=1.0),
        Parameter(name="latency_s", start=3e-6, low=1e-7, high=1e-4, log=True),
    )
    return constants(fit(parameters, loss, _ITERATIONS))


def _attention(device: DeviceSpec, table: pd.DataFrame) -> AttentionFit:
    part = table[table.what.str.startswith("attention")]
    backward = (part.what == "attention backward").to_numpy()
    measured = part.time_s.to_numpy(float)

    def constants(values: Mapping[str, float]) -> AttentionFit:
        still = {"head_dim_half": 0.0, "ramp_len": 0.0, "overhead_s": 2e-5}
        return AttentionFit(**values, **still, evidence=Source.INTERPOLATED, note=f"256 and 1024 tokens, {NOTE}")

    def loss(values: dict[str, float]) -> float:
        made = dataclasses.replace(device, attention={"flash": constants(values)})
        shape = {"batch": 1, "q_heads": 8, "kv_heads": 8, "q_len": part.m, "kv_len": part.m}
        shape |= {"head_dim_qk": 64, "head_dim_v": 64, "causal_fraction": 0.5, "implementation": "flash"}
        both = [attention_s(made, "float32", **shape, backward=way) for way in (False, True)]
        return log_loss(np.where(backward, both[1], both[0]), measured)

    parameters = (
        Parameter(name="forward_frac", start=0.5, low=0.05, high=1.0),
        Parameter(name="backward_frac", start=0.4, low=0.05, high=1.0),
        Parameter(name="causal_len", start=100, low=1, high=1000, log=True),
    )
    return constants(fit(parameters, loss, _ITERATIONS))


def calibrate(device: DeviceSpec) -> DeviceSpec:
    """The CPU preset with its fitted part from our rows."""
    table = rows()
    device = dataclasses.replace(device, gemm={"float32": _gemm(device, table)}, memory=_memory(device, table))
    return dataclasses.replace(device, attention={"flash": _attention(device, table)})
