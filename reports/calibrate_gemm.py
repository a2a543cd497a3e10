"""GEMM constants per device and dtype from measured (m, n, k, time) tables; held-out errors by folds of shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from planner.costmodel.compute import gemm_s
from planner.costmodel.evidence import Source
from planner.costmodel.hardware import DeviceSpec, GemmFit
from planner.costmodel.units import US
from planner.reports.fitting import Array, Errors, Parameter, errors, fit, folds, log_loss

GPUS = {
    "A100-80GB-SXM": "a100-80gb",
    "H100-80GB-SXM": "h100-80gb",
    "H200-141GB-SXM": "h200-141gb",
    "B200-180GB": "b200-180gb",
    "GB200-186GB": "gb200-186gb",
    "B300-288GB": "b300-270gb",
    "L40S": "l40s-48gb",
}
DTYPES = {"bfloat16": "bfloat16", "fp16": "float16", "fp8": "float8"}
WARM = "10k warm-up iterations"  # long enough for the chip to reach its power limit, as in training
MIN_ROWS = 100  # a dtype with fewer rows borrows and only judges
BEST_SHAPE = "stas00 MAMF"  # the fastest shape of a search: no sample of shapes, so it neither fits nor judges

_PARAMETERS = (
    Parameter(name="peak_frac", start=0.9, low=0.4, high=1.0),
    Parameter(name="sustained_ratio", start=0.85, low=0.5, high=1.0),
    Parameter(name="throttle_flops", start=5e11, low=1e9, high=1e14, log=True),
    Parameter(name="ramp_k", start=150, low=1, high=1500),
    Parameter(name="tile_frac", start=0.93, low=0.7, high=1.0),
    Parameter(name="wave_quantum", start=0.8, low=0.0, high=1.0),
    Parameter(name="hbm_frac", start=0.85, low=0.2, high=1.0),
    Parameter(name="overhead_s", start=3e-6, low=1e-7, high=3e-5, log=True),
)
_ITERATIONS = 900


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmReport:
    """One device and dtype: the constants and their errors on rows that did not make them."""

    device: str
    dtype: str
    sources: str
    constants: GemmFit | None  # None: the dtype borrows, the errors are those of what it borrows
    held_out: Errors
    other_sources: tuple[tuple[str, Errors], ...]


def read(path: Path) -> pd.DataFrame:
    """gemm.csv in SI units under the names of presets and dtypes; rows of other devices and dtypes are dropped."""
    table = pd.read_csv(path)
    table = table[table.gpu.isin(GPUS) & table.dtype.isin(DTYPES)]
    hot = table.notes.str.contains(WARM)
    return table.assign(device=table.gpu.map(GPUS), dtype=table.dtype.map(DTYPES), time_s=table.time_us * US, hot=hot)


def _time_s(device: DeviceSpec, dtype: str, rows: pd.DataFrame) -> Array:
    m, n, k = (rows[name].to_numpy(float) for name in "mnk")
    cold, hot = (gemm_s(device, dtype, 1.0, m, n, k, heat=heat) for heat in (0.0, 1.0))
    return np.where(rows.hot, hot, cold)


def _with(device: DeviceSpec, dtype: str, constants: GemmFit) -> DeviceSpec:
    return dataclasses.replace(device, gemm={dtype: constants})


def _constants(values: Mapping[str, float], note: str) -> GemmFit:
    rest = {name: value for name, value in values.items() if name != "sustained_ratio"}
    sustained = float(f"{values['peak_frac'] * values['sustained_ratio']:.4g}")
    return GemmFit(**rest, sustained_frac=sustained, evidence=Source.INTERPOLATED, note=note)


def _fit(device: DeviceSpec, dtype: str, rows: pd.DataFrame, note: str) -> GemmFit:
    measured = rows.time_s.to_numpy(float)

    def loss(values: dict[str, float]) -> float:
        return log_loss(_time_s(_with(device, dtype, _constants(values, note)), dtype, rows), measured)

    return _constants(fit(_PARAMETERS, loss, _ITERATIONS), note)


def _held_out(device: DeviceSpec, dtype: str, rows: pd.DataFrame) -> Errors:
    """Five folds of shapes: each predicted by constants that the other four made."""
    predicted = rows.time_s.to_numpy(float).copy()
    for part in folds(len(rows), 5):
        rest = rows.drop(rows.index[part])
        device_fold = _with(device, dtype, _fit(device, dtype, rest, ""))
        predicted[part] = _time_s(device_fold, dtype, rows.iloc[part])
    return errors(predicted, rows.time_s.to_numpy(float))


def calibrate(table: pd.DataFrame, device: DeviceSpec, dtype: str) -> GemmReport | None:
    """Fit one device and dtype and judge the fit; None without rows. The largest source fits, the others judge."""
    rows = table[(table.device == device.name) & (table.dtype == dtype) & (table.source != BEST_SHAPE)]
    if rows.empty:
        return None
    main = rows.source.value_counts().index[0]
    own = rows[rows.source == main]
    others = [(name, part) for name, part in rows.groupby("source") if name != main]
    if len(own) < MIN_ROWS:
        judged = errors(_time_s(device, dtype, own), own.time_s.to_numpy(float))
        return GemmReport(
            device=device.name, dtype=dtype, sources=main, constants=None, held_out=judged, other_sources=()
        )
    held_out = _held_out(device, dtype, own)
    note = (
        f"{len(own)} rows, {main}, {own.url_or_path.iloc[0].split(' ')[0]} read 2026-11-24; held-out error "
        f"{held_out.median_abs:.1%} median, {held_out.p90_abs:.1%} p90"
    )
    constants = _fit(device, dtype, own, note)
    fitted = _with(device, dtype, constants)
    judged_others = tuple(
        (str(name), errors(_time_s(fitted, dtype, part), part.time_s.to_numpy(float))) for name, part in others
    )
    return GemmReport(
        device=device.name,
        dtype=dtype,
        sources=str(main),
        constants=constants,
        held_out=held_out,
        other_sources=judged_others,
    )
