"""The closed forms of pipeline.py against the simulator, hand arithmetic and measured iterations."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.costmodel.pipeline import (
    ScheduleKind,
    in_flight,
    in_flight_array,
    pipeline_s,
    rows,
    schedule_problem,
)
from planner.costmodel.simulate import Simulation, simulate

RATIOS = [
    (1, 1, 1),
    (1, 1.3, 0.7),
    (1, 2, 1),
    (1, 0.5, 1.5),
    (3, 1, 1),
    (1, 3, 0.2),
    (0.2, 1, 0.9),
    (0.1, 0.1, 4),
]
CHUNKS = {ScheduleKind.INTERLEAVED: (2, 3, 4), ScheduleKind.ZB_V: (2,)}


def _shapes(kind: ScheduleKind) -> list[tuple[int, int, int]]:
    grid = [
        (p, m, v)
        for p in (1, 2, 3, 4, 8)
        for m in (1, 2, 3, 5, 8, 12, 16, 31)
        for v in CHUNKS.get(kind, (1,))
    ]
    return [(p, m, v) for p, m, v in grid if schedule_problem(kind, p, v, m) is None]


def _simulate_ranks(
    kind: ScheduleKind, f: np.ndarray, b: np.ndarray, w: np.ndarray, m: int, v: int
) -> Simulation:
    """Simulate ranks whose chunks are equal: times of shape (P,), a micro-batch of the whole rank."""
    return simulate(kind, *(np.repeat(x[:, None] / v, v, axis=1) for x in (f, b, w)), m)


@pytest.mark.parametrize("kind", list(ScheduleKind))
def test_even_ranks_are_exact(kind: ScheduleKind) -> None:
    """Closed form = simulator for even ranks, every ratio F:B:W, m below and above p; in-flight too."""
    for p, m, v in _shapes(kind):
        for ratio in RATIOS:
            f, b, w = (np.full(p, float(x)) for x in ratio)
            simulation = _simulate_ranks(kind, f, b, w, m, v)
            closed_s = float(pipeline_s(kind, f, b, w, m, v))
            assert closed_s == pytest.approx(simulation.step_s, rel=1e-9), (p, m, v, ratio)
            np.testing.assert_allclose(in_flight(kind, m, p, v), simulation.in_flight, rtol=1e-12)


@pytest.mark.parametrize("kind", list(ScheduleKind))
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_even_ranks_are_exact_for_any_ratio(kind: ScheduleKind, data: st.DataObject) -> None:
    """The same with hypothesis choosing p, m, v and ratios up to 100:1."""
    p = data.draw(st.integers(2, 9))
    v = data.draw(st.sampled_from(CHUNKS.get(kind, (1,))))
    m = data.draw(st.integers(1, 30))
    m = {ScheduleKind.INTERLEAVED: m * p, ScheduleKind.ZB_V: m + 2 * p}.get(kind, m)
    times = [np.full(p, data.draw(st.floats(0.1, 10))) for _ in range(3)]
    closed_s = float(pipeline_s(kind, *times, m, v))
    assert closed_s == pytest.approx(_simulate_ranks(kind, *times, m, v).step_s, rel=1e-9)


@pytest.mark.parametrize(("p", "m", "v"), [(8, 32, 1), (8, 32, 2), (8, 32, 4), (16, 64, 2)])
def test_interleaved_bubble_and_memory(p: int, m: int, v: int) -> None:
    """Bubble (p-1)/(v m) of the work, 1 + (p-1)/(p v) of 1F1B's activations (arXiv 2104.04473, 2.2)."""
    kind = ScheduleKind.INTERLEAVED if v > 1 else ScheduleKind.ONE_F_ONE_B
    simulation = _simulate_ranks(kind, np.ones(p), np.ones(p), np.ones(p), m, v)
    assert simulation.bubble_s / simulation.busy_s == pytest.approx((p - 1) / (v * m), rel=1e-12)
    assert simulation.in_flight[0] == pytest.approx(p * (1 + (p - 1) / (p * v)) if v > 1 else p, rel=1e-12)


def test_hand_arithmetic() -> None:
    """4 ranks, 8 micro-batches, F = 1, B = 1.2, W = 0.8 (T = 3), by hand from the papers' formulas."""
    f, b, w = np.ones(4), np.full(4, 1.2), np.full(4, 0.8)
    expected = {
        ScheduleKind.GPIPE: (8 + 3) * 3.0,
        ScheduleKind.ONE_F_ONE_B: (8 + 3) * 3.0,
        ScheduleKind.ZB_H1: 8 * 3.0 + 3 * (1 + 1.2 - 0.8),
        ScheduleKind.ZB_V: 8 * 3.0 + 3 * 1.2 / 2,  # path (0, q, 0): q input gradients of a half-rank chunk
    }
    for kind, step_s in expected.items():
        v = CHUNKS.get(kind, (1,))[0]
        assert float(pipeline_s(kind, f, b, w, 8, v)) == pytest.approx(step_s, rel=1e-12), kind
    assert float(pipeline_s(ScheduleKind.INTERLEAVED, f, b, w, 8, 2)) == pytest.approx(8 * 3 + 3 * 3 / 2)
    assert in_flight(ScheduleKind.ONE_F_ONE_B, 8, 4, 1).tolist() == [4, 3, 2, 1]
    assert in_flight(ScheduleKind.ONE_F_ONE_B, 2, 4, 1).tolist() == [2, 2, 2, 1]
    assert in_flight(ScheduleKind.INTERLEAVED, 8, 4, 2).tolist() == [5.5, 4.5, 3.5, 2.5]
    assert in_flight(ScheduleKind.ZB_H1, 8, 4, 1).tolist() == [4, 4, 4, 4]
    assert in_flight(ScheduleKind.GPIPE, 8, 4, 1).tolist() == [8, 8, 8, 8]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from([ScheduleKind.ONE_F_ONE_B, ScheduleKind.INTERLEAVED]),
    sizes=st.lists(st.floats(1, 2), min_size=2, max_size=8),
    ratio=st.tuples(*[st.floats(0.2, 2)] * 3),
    rounds=st.integers(1, 4),
    extra=st.integers(0, 3),
)
def test_uneven_ranks_of_one_ratio_are_never_optimistic(
    kind: ScheduleKind, sizes: list[float], ratio: tuple[float, float, float], rounds: int, extra: int
) -> None:
    """1F1B and interleaved with equal chunks, one F:B:W: m max T <= simulated <= closed form."""
    p, v = len(sizes), 2 if kind is ScheduleKind.INTERLEAVED else 1
    m = p * rounds + (extra if v == 1 else 0)
    f, b, w = (x * np.array(sizes) for x in ratio)
    step_s = _simulate_ranks(kind, f, b, w, m, v).step_s
    assert m * (f + b + w).max() <= step_s * (1 + 1e-9)
    assert step_s <= float(pipeline_s(kind, f, b, w, m, v)) * (1 + 1e-9)


# Relative error of the closed form over 150 random uneven pipelines (p 2..8, m 2p..6p), measured: what holds.
# "ratio": rank totals within 2x, one F:B:W for all. "free": F, B, W of every rank within 2x on their own.
UNEVEN = [
    (ScheduleKind.ONE_F_ONE_B, "ratio", -1e-9, 0.12),
    (ScheduleKind.ONE_F_ONE_B, "free", -1e-9, 0.10),
    (ScheduleKind.INTERLEAVED, "ratio", -1e-9, 0.12),
    (ScheduleKind.INTERLEAVED, "free", -0.06, 0.10),
    (ScheduleKind.ZB_H1, "ratio", -1e-9, 0.10),
    (ScheduleKind.ZB_H1, "free", -0.04, 0.10),
    (ScheduleKind.ZB_V, "ratio", -0.015, 0.12),
    (ScheduleKind.ZB_V, "free", -0.08, 0.12),
]


@pytest.mark.parametrize(("kind", "mode", "lowest", "highest"), UNEVEN)
def test_uneven_ranks_error(kind: ScheduleKind, mode: str, lowest: float, highest: float) -> None:
    """The range of (closed form / simulated - 1) that `pipeline_s` states."""
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(150):
        p, v = int(rng.integers(2, 9)), CHUNKS.get(kind, (1,))[0]
        m = (
            p * int(rng.integers(2, 7))
            if kind is ScheduleKind.INTERLEAVED
            else int(rng.integers(2 * p, 6 * p))
        )
        size = rng.uniform(1, 2, (1, p)) if mode == "ratio" else rng.uniform(1, 2, (3, p))
        f, b, w = np.exp(rng.uniform(-0.5, 0.5, (3, 1))) * size
        errors.append(
            float(pipeline_s(kind, f, b, w, m, v)) / _simulate_ranks(kind, f, b, w, m, v).step_s - 1
        )
    print(f"{kind.value} {mode}: {min(errors):+.2%} .. {max(errors):+.2%}, mean {np.mean(errors):+.2%}")
    assert lowest <= min(errors) and max(errors) <= highest


def test_interleaved_ends_in_one_chunk() -> None:
    """Equal chunks, embedding in the first and head in the last: never much too short, wherever the layers lie."""
    rng = np.random.default_rng(1)
    errors, blind = [], []
    for _ in range(150):
        p, v = int(rng.integers(2, 7)), int(rng.integers(2, 6))
        m = p * int(rng.integers(2, 7))
        layers = rng.integers(1, 4) + (rng.random(p) < 0.5)
        ends = np.zeros(p)
        ends[0], ends[-1] = rng.uniform(0, 0.5), rng.uniform(0.5, 3)
        time = np.repeat(layers[:, None].astype(float), v, axis=1)
        time[0, 0] += ends[0]
        time[-1, -1] += ends[-1]
        step_s = simulate(ScheduleKind.INTERLEAVED, time, 1.1 * time, 0.9 * time, m).step_s
        f = time.sum(axis=1)
        args = (ScheduleKind.INTERLEAVED, f, 1.1 * f, 0.9 * f, m, v)
        errors.append(float(pipeline_s(*args, end_s=3 * ends)) / step_s - 1)
        blind.append(float(pipeline_s(*args)) / step_s - 1)
    print(f"ends: {min(errors):+.2%} .. {max(errors):+.2%}; blind to them {min(blind):+.2%} .. {max(blind):+.2%}")
    assert min(errors) >= -0.03 and np.mean(errors) <= 0.06
    assert min(blind) < min(errors) - 0.05


def test_measured_iterations() -> None:
    """13 measured 1F1B iterations from measured stage times (m = 128, p = 8, A100): <= 1.6 %, mean <= 1 %.

    Left out of the prediction: P2P and the optimizer. The artifact's file names each row (test id T04).
    """
    with (Path(__file__).parent / "data_vocab_artifact.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    errors = []
    for row in table:
        fwd_s, bwd_s = (np.array(row[column].split(), float) / 1e3 for column in ("fwd_ms", "bwd_ms"))
        none = np.zeros_like(fwd_s)
        step_s = _simulate_ranks(ScheduleKind.ONE_F_ONE_B, fwd_s, bwd_s, none, 128, 1).step_s
        closed_s = float(pipeline_s(ScheduleKind.ONE_F_ONE_B, fwd_s, bwd_s, none, 128, 1))
        assert closed_s == pytest.approx(step_s, rel=1e-3), row["row"]
        errors.append(abs(step_s / (float(row["step_ms"]) / 1e3) - 1))
    assert len(errors) == 13
    assert max(errors) <= 0.016 and np.mean(errors) <= 0.01, errors


def test_arrays_broadcast() -> None:
    """1e5 plans at once give what one at a time gives."""
    rng = np.random.default_rng(0)
    p, m = rng.integers(2, 9, 100_000), rng.integers(16, 64, 100_000)
    for kind in (ScheduleKind.ONE_F_ONE_B, ScheduleKind.INTERLEAVED, ScheduleKind.ZB_H1, ScheduleKind.ZB_V):
        v = CHUNKS.get(kind, (1,))[0]
        table = rows(kind, m, p, v)
        one = rows(kind, int(m[7]), int(p[7]), v)
        for many, single in zip(table, one, strict=True):
            assert all(column.shape == (100_000,) for column in many)
            assert [float(c[7]) for c in many] == [float(c) for c in single]
        flight = in_flight_array(kind, m[:, None], p[:, None], v, np.arange(8))
        np.testing.assert_array_equal(flight[7, : p[7]], in_flight(kind, int(m[7]), int(p[7]), v))
    times = rng.uniform(1, 2, (3, 5, 4))
    batch = pipeline_s(ScheduleKind.ZB_H1, *times, np.full(5, 9), 1)
    assert batch.shape == (5,)
    assert float(batch[3]) == float(pipeline_s(ScheduleKind.ZB_H1, *times[:, 3], 9, 1))


@pytest.mark.parametrize(
    ("kind", "pp", "vpp", "m", "says"),
    [
        ("1f1b", 4, 1, 2, None),
        ("1f1b", 4, 2, 8, "vpp = 1"),
        ("1f1b", 4, 1, 0, "at least 1"),
        ("interleaved", 4, 2, 8, None),
        ("interleaved", 4, 2, 6, "6 % 4 = 2"),
        ("interleaved", 1, 2, 6, "pp >= 2"),
        ("interleaved", 4, 1, 8, "vpp >= 2"),
        ("zb_h1", 1, 1, 8, "pp >= 2"),
        ("zb_h1", 2, 1, 1, None),
        ("zb_v", 4, 2, 7, "7 < 8"),
        ("zb_v", 4, 1, 8, "vpp = 2"),
        ("zb_v", 1, 2, 8, "pp >= 2"),
        ("zb_v", 4, 2, 8, None),
    ],
)
def test_schedule_problem(kind: str, pp: int, vpp: int, m: int, says: str | None) -> None:
    """One line that shows the numbers, or None."""
    problem = schedule_problem(ScheduleKind(kind), pp, vpp, m)
    assert (problem is None) if says is None else (problem is not None and says in problem)


def test_gpipe_has_no_rows() -> None:
    """Its time depends on max F and max (B + W) apart."""
    with pytest.raises(ValueError, match="gpipe"):
        rows(ScheduleKind.GPIPE, 4, 2, 1)
