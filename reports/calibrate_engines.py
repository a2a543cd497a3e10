"""Fit the engine traits and in-step constants that no document states, one at a time, and write reports/engines.md.

    python -m planner.reports.calibrate_engines

A fit tries a few values of one constant, all others at their committed value, on stated rows that fall into folds
(sources, models or shapes). The best value has the least mean over folds of the folds' MAPE. The left-out error of a
fold is its MAPE at the value that is best on the other folds. The committed constants are in costmodel/engine.py and
costmodel/price.py; this report shows whether they are still the best.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from planner.costmodel import engine as engines
from planner.costmodel import price
from planner.reports.accuracy import HERE, SHARED_RUNS
from planner.reports.predict import predict
from planner.reports.rows import Row, Skip, read_rows

REPORT = HERE / "engines.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """One constant: where it is (an engine's trait, or a constant of price.py where `engine` is empty)."""

    engine: str
    trait: str
    values: tuple[float, ...]
    rows: str  # in words
    selects: Callable[[Row], bool]
    fold: Callable[[Row], str]

    @property
    def committed(self) -> float:
        """The value in use."""
        owner = engines.ENGINES[self.engine] if self.engine else price
        return float(getattr(owner, self.trait))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a fit found; errors are means over folds of the folds' MAPE."""

    fit: Fit
    num_rows: int
    best: float
    best_error: float
    committed_error: float
    left_out_error: float
    fold_best: dict[str, float]  # by fold: the best value on the others


def _is(source: str) -> Callable[[Row], bool]:
    return lambda row: row.source.startswith(source)


def _single_node_vtrain(row: Row) -> bool:
    return row.source == "vTrain" and row.whole("n_gpus") <= 8 and row.text("n_layers") in ("12", "24")


def _regular_nanotron(row: Row) -> bool:
    """Runs whose time the data set does not call pathological and where tp and pp do not meet across nodes."""
    small = row.whole("n_gpus") <= 64 and row.text("quality") == "A"
    return row.source.startswith("Ultra-Scale") and small and (row.whole("pp") == 1 or row.whole("n_gpus") == 8)


def _without_pipeline_nanotron(row: Row) -> bool:
    plain = row.source.startswith("Ultra-Scale") and row.whole("pp") == 1 and row.whole("tp") <= 8
    return plain and row.text("quality") == "A" and 16 <= row.whole("n_gpus") <= 256


def _crossing_nanotron(row: Row) -> bool:
    """Runs of pipelines over several nodes with tensor parallelism inside them, none called pathological."""
    piped = row.source.startswith("Ultra-Scale") and row.whole("pp") > 1 and 8 < row.whole("n_gpus") <= 128
    return piped and row.text("quality") == "A" and 2 <= row.whole("tp") <= 8


def _in_step(row: Row) -> bool:
    """Megatron's own generations, configurations fully known, 16-bit: GEMMs are most of their step."""
    nemo = row.source.startswith("NVIDIA dgxc") and row.text("dtype") == "bf16" and row.text("gpu").startswith("H100")
    dense = row.text("arch") == "dense" and "JAX" not in row.text("notes")
    return dense and (nemo or row.source.startswith("Megatron SC21"))


def _tensor_parallel_core(row: Row) -> bool:
    named = row.source.startswith(("NVIDIA dgxc", "NeMo docs", "Megatron-Bridge"))
    return named and row.text("arch") == "dense" and row.whole("tp", 1) > 1 and row.text("gpu").startswith("H100")


def _model(row: Row) -> str:
    return row.text("model_name").split(" (")[0]


def _vtrain_shape(row: Row) -> str:
    return f"L{row.text('n_layers')} h{row.text('hidden')}"


def _source(row: Row) -> str:
    return row.source


FITS = (
    Fit(engine="", trait="IN_STEP_GEMM", values=(1.06, 1.08, 1.1, 1.12, 1.14, 1.16, 1.18),
        rows="Megatron SC21 (A100), NVIDIA dgxc bf16 with Megatron (H100); every other source is left out",
        selects=_in_step, fold=_source),
    Fit(engine="", trait="HOST_NORM", values=(1.5, 2.0, 2.5, 3.0, 4.0, 6.0),
        rows="vTrain single-node, 12 and 24 layers", selects=_single_node_vtrain, fold=_vtrain_shape),
    Fit(engine="megatron-deepspeed", trait="host_launch_s", values=(60e-6, 70e-6, 75e-6, 80e-6, 85e-6, 90e-6),
        rows="vTrain single-node, 12 and 24 layers", selects=_single_node_vtrain, fold=_vtrain_shape),
    Fit(engine="megatron-deepspeed", trait="host_collective_s", values=(0.0, 10e-6, 20e-6, 30e-6, 40e-6),
        rows="vTrain single-node, 12 and 24 layers", selects=_single_node_vtrain, fold=_vtrain_shape),
    Fit(engine="nanotron", trait="host_launch_s", values=(5e-6, 10e-6, 15e-6, 20e-6, 25e-6, 30e-6),
        rows="Ultra-Scale, up to 64 GPUs, pp = 1 or one node", selects=_regular_nanotron, fold=_model),
    Fit(engine="nanotron", trait="host_collective_s", values=(140e-6, 180e-6, 220e-6, 260e-6, 300e-6),
        rows="Ultra-Scale, up to 64 GPUs, pp = 1 or one node", selects=_regular_nanotron, fold=_model),
    Fit(engine="nanotron", trait="host_collective_crossing_s", values=(150e-6, 170e-6, 190e-6, 210e-6, 230e-6),
        rows="Ultra-Scale, 16 to 128 GPUs, pp > 1, tp 2 to 8", selects=_crossing_nanotron, fold=_model),
    Fit(engine="nanotron", trait="overlap_grad_reduce", values=(0.0, 0.2, 0.5, 0.8),
        rows="Ultra-Scale, 16 to 256 GPUs, pp = 1, tp <= 8", selects=_without_pipeline_nanotron, fold=_model),
    Fit(engine="nemo", trait="overlap_tp", values=(0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        rows="NVIDIA, NeMo, Megatron-Bridge, dense, tp > 1, H100", selects=_tensor_parallel_core, fold=_source),
    Fit(engine="megatron-2022", trait="overlap_tp_column", values=(0.0, 0.4, 0.6, 0.8, 0.9, 1.0),
        rows="Korthikanti table 5", selects=_is("Korthikanti"), fold=_model),
)  # fmt: skip


@contextmanager
def committed_to(fit: Fit, value: float) -> Iterator[None]:
    """The constant of `fit` at `value` for a while."""
    if not fit.engine:
        old = getattr(price, fit.trait)
        setattr(price, fit.trait, value)
        try:
            yield
        finally:
            setattr(price, fit.trait, old)
        return
    before = engines.ENGINES[fit.engine]
    engines.ENGINES[fit.engine] = dataclasses.replace(before, **{fit.trait: value})
    try:
        yield
    finally:
        engines.ENGINES[fit.engine] = before


def run(fit: Fit, rows: Sequence[Row]) -> Outcome:
    """Try the values of `fit` on the rows it selects."""
    chosen = [row for row in rows if not row.failed and row.text("quality") in ("A", "B") and _selected(fit, row)]
    values = tuple(sorted({*fit.values, fit.committed}))
    errors = []  # by value: MAPE by fold
    for value in values:
        with committed_to(fit, value):
            predictions, _ = predict(chosen)
        folds: dict[str, list[float]] = defaultdict(list)
        for p in predictions:
            folds[fit.fold(p.row)].append(abs(p.time_error))
        errors.append({name: float(np.mean(sizes)) for name, sizes in folds.items()})
    names = sorted(errors[0])
    table = np.array([[by_fold[name] for name in names] for by_fold in errors])
    others = {name: int(np.argmin(np.delete(table, i, axis=1).mean(axis=1))) for i, name in enumerate(names)}
    best = int(np.argmin(table.mean(axis=1)))
    return Outcome(
        fit=fit, num_rows=len(predictions), best=values[best], best_error=float(table[best].mean()),
        committed_error=float(table[values.index(fit.committed)].mean()),
        left_out_error=float(np.mean([table[others[name], i] for i, name in enumerate(names)])),
        fold_best={name: values[k] for name, k in others.items()},
    )  # fmt: skip


def _selected(fit: Fit, row: Row) -> bool:
    try:
        return fit.selects(row)
    except Skip:
        return False


def report(outcomes: Sequence[Outcome]) -> list[str]:
    """The Markdown report."""
    lines = [
        "# Engine traits", "",
        "Regenerated by `python -m planner.reports.calibrate_engines`. Traits that are not here are read from the "
        "engines' documentation and source, or assumed; their notes are in `costmodel/engine.py`.", "",
        "Error: mean over folds of the folds' MAPE. Left out: each fold at the value that is best on the others; the "
        "last column lists those values.", "",
        "| constant | fitted on | rows | committed | best | error, committed | error, best | left out | by fold |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]  # fmt: skip
    for o in outcomes:
        folds = ", ".join(f"{name[:18]} {value:g}" for name, value in o.fold_best.items())
        name = f"{o.fit.engine or 'every engine'}: {o.fit.trait}"
        figures = (f"{100 * e:.1f} %" for e in (o.committed_error, o.best_error, o.left_out_error))
        lines.append(f"| {name} | {o.fit.rows} | {o.num_rows:,} | {o.fit.committed:g} | {o.best:g} | "
                     f"{' | '.join(figures)} | {folds} |")  # fmt: skip
    return lines


def main() -> int:
    """Run all fits and write the report; 2 where the full set of runs is not there."""
    if not SHARED_RUNS.is_file():
        print(f"calibrate_engines: needs the full set of runs at {SHARED_RUNS}", file=sys.stderr)
        return 2
    rows = read_rows(SHARED_RUNS)
    outcomes = [run(fit, rows) for fit in FITS]
    REPORT.write_text("\n".join(report(outcomes)) + "\n", encoding="utf-8")
    print("\n".join(report(outcomes)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
