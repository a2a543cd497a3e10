"""Predictions for many rows at once: rows of one model on one machine share their layer prices."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from planner.costmodel.cost import MemoryBreakdown
from planner.costmodel.engine import EngineSpec
from planner.costmodel.estimate import Estimate, estimate_many, machine_for
from planner.reports.cases import Case, build_case
from planner.reports.rows import Row, Skip

# Of the device's memory, what a plan must leave free to be called fitting. Runs that allocate more of it are 3 to 10
# times slower than others of their group (Ultra-Scale Playbook): the caching allocator frees and allocates again.
MEMORY_MARGIN_FRAC = 0.08


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A row with what the cost model says of it; measured values are 0 where the row does not state them."""

    case: Case
    step_s: float
    memory_bytes: float  # counted as the row counts it
    fits: bool
    parts_s: dict[str, float]  # leaves of the breakdown and the nodes under its root
    measured_s: float
    measured_bytes: float

    @property
    def row(self) -> Row:
        """The row predicted."""
        return self.case.row

    @property
    def time_error(self) -> float:
        """Predicted over measured step time, minus one."""
        return self.step_s / self.measured_s - 1

    @property
    def memory_error(self) -> float:
        """Predicted over measured peak memory, minus one."""
        return self.memory_bytes / self.measured_bytes - 1


def predict(rows: Iterable[Row]) -> tuple[list[Prediction], Counter[str]]:
    """(predictions in the order of `rows`, skipped rows by reason)."""
    skipped: Counter[str] = Counter()
    cases: list[Case] = []
    for row in rows:
        try:
            if row.text("quality") == "C":
                raise Skip("quality C: digitised, partial or inconsistent")
            if not row.failed:
                _ = row.step_s
            cases.append(build_case(row))
        except Skip as reason:
            skipped[str(reason)] += 1
    predictions, unpriced = predict_cases(cases)
    return predictions, skipped + unpriced


def predict_cases(cases: list[Case]) -> tuple[list[Prediction], Counter[str]]:
    """(predictions in the order of `cases`, those that cannot be priced by reason)."""
    skipped: Counter[str] = Counter()
    predictions: dict[str, Prediction] = {}
    for group in _groups(cases).values():
        try:
            predictions.update({p.row.id: p for p in _predict(group)})
        except ValueError as reason:
            skipped[str(reason).split(":")[-1].strip()] += len(group)
    return [predictions[c.row.id] for c in cases if c.row.id in predictions], skipped


def _groups(cases: list[Case]) -> dict[tuple[object, ...], list[Case]]:
    groups: dict[tuple[object, ...], list[Case]] = defaultdict(list)
    for case in cases:
        key = (id(case.graph), id(case.cluster), case.engine.name, case.spec.num_gpus)
        groups[key].append(case)
    return groups


def _predict(group: list[Case]) -> list[Prediction]:
    first = group[0]
    machine = machine_for(first.graph, first.cluster, first.engine, first.spec.num_gpus)
    estimates = estimate_many(first.graph, machine, [case.spec for case in group])
    return [_prediction(case, estimate) for case, estimate in zip(group, estimates, strict=True)]


def _prediction(case: Case, estimate: Estimate) -> Prediction:
    row, software = case.row, case.software
    counted = max(_counted_bytes(r.memory, case.engine, software.memory) for r in estimate.ranks)
    capacity = case.cluster.device.memory_bytes.value * (1 - MEMORY_MARGIN_FRAC)
    return Prediction(
        case=case,
        step_s=estimate.step_s,
        memory_bytes=counted,
        fits=case.runs and estimate.peak_memory_bytes <= capacity,
        parts_s={part.name: part.time_s for part in (*estimate.breakdown.children, *estimate.breakdown.leaves())},
        measured_s=0.0 if row.failed else row.step_s,
        measured_bytes=row.number("peak_memory_gb", 0.0) * software.memory_unit_bytes,
    )


def _counted_bytes(memory: MemoryBreakdown, engine: EngineSpec, kind: str) -> float:
    """The part of the peak that torch's allocator ("allocated", "reserved") or nvidia-smi ("process") shows."""
    if kind == "process":
        return memory.peak_bytes
    reserved = memory.peak_bytes - engine.context_bytes
    if kind == "reserved":
        return reserved
    loose = memory.activations_bytes + memory.work_bytes
    return reserved - loose * engine.fragmentation_frac / (1 + engine.fragmentation_frac)
