"""The inner problem as a MILP, written from the rates alone, solved by HiGHS and by CBC: both agree with the DP."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pulp
import pytest

from planner.candidate import Candidates, candidate_rates
from planner.costmodel.engine import get_engine
from planner.costmodel.estimate import machine_for, model_facts, price_model
from planner.costmodel.keys import Keys
from planner.costmodel.pipeline import in_flight
from planner.costmodel.presets import load_cluster
from planner.costmodel.state import step_sync
from planner.partition import Inner, solve
from planner.reports.shapes import Shape, build_graph
from planner.space import SCHEDULES, Limits, enumerate_cells

# PuLP 3 announces how PuLP 4 will name things.
pytestmark = pytest.mark.filterwarnings("ignore:.*PuLP 4.0.*:DeprecationWarning")
SHAPE = Shape(
    num_layers=10, hidden=4096, ffn=16_384, heads=32, kv_heads=8, head_dim=128, vocab=128_000, seq_len=4096, gated=True,
    tied=False, rotary=True,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    pp: int
    schedule: str
    usable_gb: float
    host_gb: float


CASES = [
    Case(pp=2, schedule="1f1b", usable_gb=80, host_gb=1000),
    Case(pp=2, schedule="1f1b", usable_gb=20, host_gb=1000),
    Case(pp=4, schedule="1f1b", usable_gb=12, host_gb=1000),
    Case(pp=4, schedule="1f1b", usable_gb=14, host_gb=0.001),
    Case(pp=4, schedule="zb_h1", usable_gb=12, host_gb=1000),
]


def inner_of(case: Case) -> Inner:
    graph = build_graph(SHAPE)
    cluster = load_cluster("h100")
    machine = machine_for(graph, cluster, replace(get_engine("planner"), context_bytes=0.0), 8)
    fixed: dict[str, int | str] = {"pp": case.pp, "schedule": case.schedule, "tp": 2, "sp": 1, "cp": 1}
    fixed |= {"vocab_parallel": 1}
    cells = enumerate_cells(graph, 8, 16, Limits(fixed=fixed | {"micro_batch_size": 1}))
    names = ("tp", "sp", "ulysses", "ring", "ep", "micro_batch_size", "vocab_parallel")
    keys = Keys(**{name: getattr(cells, name)[:1].astype(float) for name in names})
    dp = int(cells.dp[0])
    candidate = Candidates(cell=np.array([0]), layout=np.array([[dp, 1, 0, 0]]))
    rates = candidate_rates(
        graph, price_model(model_facts(graph, machine.engine), keys, machine), np.zeros(len(cells), np.int64), cells,
        candidate, machine, Limits(),
    )  # fmt: skip
    return Inner(
        layer_classes=graph.layer_classes, rates=rates, machine=machine,
        schedule=SCHEDULES[int(cells.schedule[0])], num_microbatches=int(cells.num_microbatches[0]), pp=case.pp, vpp=1,
        usable_bytes=case.usable_gb * 1e9, host_bytes=case.host_gb * 1e9,
    )  # fmt: skip


def milp(inner: Inner) -> pulp.LpProblem:
    """One-hot numbers of layers per rank, integer strategy counts, big-M transients; seconds in ms, bytes in GB."""
    r, p, layers = inner.rates, inner.pp, len(inner.layer_classes)
    strategies = range(r.extra_s_CSK.shape[1])
    sizes = range(1, layers - p + 2)
    flight = in_flight(inner.schedule, inner.num_microbatches, p, 1)
    problem = pulp.LpProblem("inner", pulp.LpMinimize)
    theta, delta, fill = (pulp.LpVariable(n, lowBound=0) for n in ("theta", "delta", "fill"))
    y = {(k, n): pulp.LpVariable(f"y_{k}_{n}", cat="Binary") for k in range(p) for n in sizes}
    x = {(k, s): pulp.LpVariable(f"x_{k}_{s}", 0, layers, "Integer") for k in range(p) for s in strategies}
    z = {(k, s): pulp.LpVariable(f"z_{k}_{s}", cat="Binary") for k in range(p) for s in strategies}
    a = inner.num_microbatches - (inner.schedule.value == "1f1b")
    problem += a * theta + fill + delta
    problem += pulp.lpSum(n * y[k, n] for k in range(p) for n in sizes) == layers
    extra = {s: 1e3 * float(r.extra_s_CSK[0, s, 0]) for s in strategies}
    for k in range(p):
        ends = [r.prologue] * (k == 0) + [r.epilogue] * (k == p - 1)
        held = pulp.lpSum(n * y[k, n] for n in sizes)
        problem += pulp.lpSum(y[k, n] for n in sizes) == 1
        problem += pulp.lpSum(x[k, s] for s in strategies) == held
        spent = pulp.lpSum(extra[s] * x[k, s] for s in strategies)
        problem += theta >= pulp.lpSum(1e3 * sum(rank_s(inner, ends, n)) * y[k, n] for n in sizes) + spent
        problem += delta >= pulp.lpSum(1e3 * sync_s(inner, ends, n) * y[k, n] for n in sizes)
        fixed = float(r.fixed_bytes_K[0]) + sum(float(e.state_bytes[0]) for e in ends)
        fixed += flight[0] * float(r.prologue.activation_bytes[0]) * (k == 0)
        if k == p - 1:
            fixed += float(r.epilogue.activation_bytes[0]) + float(r.epilogue.work_bytes[0])
        kept = pulp.lpSum(flight[k] * float(r.activation_bytes_CSK[0, s, 0]) / 1e9 * x[k, s] for s in strategies)
        free = (inner.usable_bytes - fixed) / 1e9 - float(r.state_bytes_CK[0, 0]) / 1e9 * held
        for s in strategies:
            problem += x[k, s] <= layers * z[k, s]
            problem += kept + float(r.work_bytes_CSK[0, s, 0]) / 1e9 * z[k, s] <= free
        moved = pulp.lpSum(flight[k] * float(r.host_bytes_CSK[0, s, 0]) / 1e9 * x[k, s] for s in strategies)
        problem += moved <= inner.host_bytes / 1e9
    for constant, share in fills(inner):
        spent = pulp.lpSum(extra[s] * x[k, s] for k in range(p) for s in strategies)
        problem += fill >= 1e3 * constant + share * spent
    return problem


def rank_s(inner: Inner, ends: list[Any], n: int) -> tuple[float, float, float]:
    """(forward, input gradient, weight gradient) of a rank with n layers and `ends`."""
    r = inner.rates
    p2p = float(r.p2p_s_K[0])
    fwd = n * float(r.forward_s_CK[0, 0]) + sum(float(e.forward_s[0]) for e in ends) + p2p
    bwd = n * float(r.backward_s_CK[0, 0]) + sum(float(e.backward_s[0]) for e in ends) + p2p
    return fwd, bwd, n * float(r.weight_s_CK[0, 0]) + sum(float(e.weight_s[0]) for e in ends)


def sync_s(inner: Inner, ends: list[Any], n: int) -> float:
    fwd, bwd, wgt = (np.array([t]) for t in rank_s(inner, ends, n))
    dense = n * inner.rates.dense_CK[0] + sum(e.dense for e in ends)
    routed = n * inner.rates.routed_CK[0] + sum(e.routed for e in ends)
    return float(step_sync(dense, routed, fwd, bwd + wgt, inner.rates.layout, inner.machine).total_s[0])


def fills(inner: Inner) -> list[tuple[float, float]]:
    """(seconds beyond a theta, weight of recomputation) by the schedules' papers: Alpa eq. 2; Qi et al. table 2."""
    p, m = inner.pp, inner.num_microbatches
    totals = np.zeros(3)
    for k in range(p):
        ends = [inner.rates.prologue] * (k == 0) + [inner.rates.epilogue] * (k == p - 1)
        totals += rank_s(inner, ends, 0)
    r = inner.rates
    totals += len(inner.layer_classes) * np.array([r.forward_s_CK[0, 0], r.backward_s_CK[0, 0], r.weight_s_CK[0, 0]])
    f, b, w = totals
    if inner.schedule.value == "1f1b":
        return [(f + b + w, 1.0)]
    q = (p - 1) / p
    assert m >= p
    return [(q * (f + b - w), q), (q * f, 0.0), (q * b, q)]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.schedule}-{c.pp}-{c.usable_gb}-{c.host_gb}")
def test_two_milp_solvers_agree_with_the_dp(case: Case) -> None:
    inner = inner_of(case)
    solved = solve(inner, np.inf)
    found = solved.partition
    assert found is not None and solved.lower_s == np.inf
    for solver in solvers():
        problem = milp(inner)
        problem.solve(solver)
        assert problem.sol_status == pulp.LpSolutionOptimal
        step_s = pulp.value(problem.objective) / 1e3 + float(inner.rates.step_s_K[0])
        assert step_s == pytest.approx(found.step_s, rel=2e-6)


def solvers() -> list[Any]:
    limits = {"msg": False, "timeLimit": 60, "gapRel": 1e-9}
    return [pulp.HiGHS(**limits), pulp.PULP_CBC_CMD(**limits)]


def test_tight_memory_needs_recomputation() -> None:
    """The cases above are not all of the trivial kind."""
    kinds = {case: solve(inner_of(case), np.inf).partition for case in CASES}
    assert all(found is not None for found in kinds.values())
    used = [bool(found.counts_PCS[:, :, 1:].any()) for found in kinds.values() if found]
    assert any(used) and not all(used)
