"""The closed loop's choice of plans, its price on shared cores, its scores and its report."""

from __future__ import annotations

import numpy as np
import pytest
from plans import graph, job, spec

from planner.costmodel.pipeline import ScheduleKind
from planner.costmodel.simulate import on_shared_cores_s, simulate
from planner.reports.gpu_check import report
from planner.reports.loop_plans import BEST, Predicted, Shared, choose, shared_step_s
from planner.reports.loop_text import Row, markdown, scores
from planner.simulated import simulate_plan

FACTS = {
    "date": "2026-11-24", "load_before": 0.1, "load_after": 2.0, "cores": 2,
    "profile_s": 60.0, "samples": 9,
    "rounds": 2, "steps": 3, "device": "a CPU", "version": "1",
    "curve": [{"budget_s": 180.0, "samples": 9, "error": {"narrow": 0.1}},
              {"budget_s": 90.0, "samples": 5, "error": {"narrow": 0.14}}],
}  # fmt: skip


def row(predicted: float, *rounds: float, memory: float = 1e6, failed: str = "") -> Row:
    return Row(
        model="narrow", ranks=2, options="dp2", predicted_s=predicted, shared_s=predicted, predicted_bytes=1e6,
        rounds_s=rounds, peak_bytes=memory, failed=failed,
    )  # fmt: skip


def test_scores_by_hand() -> None:
    rows = [row(1.0, 1.1, 1.1), row(2.0, 1.0, 1.0), row(4.0, 4.0, 4.4, memory=2e6)]
    found = scores(rows, shared=False)
    assert found.spearman == pytest.approx(0.5)  # 1 2 3 against 2 1 3
    assert found.regret == pytest.approx(1.1)  # the first choice takes 1.1, the best 1.0
    assert found.time_error == pytest.approx(1 / 1.1 * 0.1)  # of 9.1 %, 100 %, 4.8 %
    assert found.memory_error == 0.0
    assert found.noise == 0.0 and found.noise_spearman == pytest.approx(1.0)


def test_the_report_says_what_is_missed_what_failed_and_whether_the_machine_was_busy() -> None:
    rows = [row(1.0, 1.1, 1.1), row(2.0, 1.0, 1.0), row(4.0, 4.0, 4.4), row(9.0, failed="a rank died")]
    text = markdown(rows, FACTS)
    assert "Spearman MISSED (0.500, wanted 0.9)" in text and "memory met" in text and "regret MISSED" in text
    assert "a rank died" in text and "busy" not in text
    assert "| 90 | 5 | 14.0% |" in text and "loses 4.0 points" in text
    assert "The machine was busy" in markdown(rows, {**FACTS, "load_before": 3.0})


def test_best_worst_and_a_spread_are_chosen() -> None:
    plan = spec(gpus=1)
    all_of_them = [Predicted(spec=plan, step_s=t, shared_s=t, peak_bytes=1.0) for t in (1, 1.1, 1.2, 2, 3, 5, 7.9, 50)]
    times = sorted(p.shared_s for p in choose(all_of_them, 5))
    assert times[:BEST] == [1, 1.1] and times[-1] == 7.9 and len(times) == 5  # 50 is hopeless


def test_idle_time_is_not_lost_on_shared_cores() -> None:
    machine = job().machine
    plan = spec(pp=8, micro_batch_size=2)
    alone = simulate_plan(graph(), machine, plan)
    pipeline = alone.simulation
    many, few = (Shared(cores=n, lockstep=machine, alone=machine) for n in (machine.num_gpus, machine.num_gpus // 4))
    assert shared_step_s(graph(), machine, many, plan) == alone.step_s
    once_s = alone.step_s - pipeline.step_s
    assert shared_step_s(graph(), machine, few, plan) == pytest.approx(once_s + pipeline.step_s)  # cores of its own
    work_s = pipeline.busy_s.mean()  # if no core was ever idle
    assert work_s < on_shared_cores_s(pipeline, 2) < pipeline.step_s
    assert on_shared_cores_s(pipeline, 1) == pytest.approx(work_s)  # nobody waits for the only core
    assert on_shared_cores_s(pipeline, 8) == pytest.approx(pipeline.step_s)


def test_three_stages_on_two_cores() -> None:
    """Every action is a second where all are busy. One works at a time: ranks 0 and 2 are alone on a core of two."""
    chain = simulate(ScheduleKind.ONE_F_ONE_B, np.ones((3, 1)), np.ones((3, 1)), np.zeros((3, 1)), 1)
    assert on_shared_cores_s(chain, 1) == pytest.approx(6 / 3)
    assert on_shared_cores_s(chain, 2) == pytest.approx(4 / 2 + 2)
    assert on_shared_cores_s(chain, 3) == pytest.approx(6)


def test_the_gpu_report_counts_what_ran() -> None:
    rows = [
        {"model": "m", "options": "mbs1", "predicted_s": 1.0, "step_s": 1.25, "predicted_bytes": 3e9,
         "peak_bytes": 2.5e9, "failed": ""},
        {"model": "m", "options": "mbs8", "predicted_s": 2.0, "step_s": None, "predicted_bytes": 9e9,
         "peak_bytes": None, "failed": "out of memory"},
    ]  # fmt: skip
    facts = {"date": "2026-11-24", "device": "a GPU", "software": {"torch": "2.13"}, "load": 0.0,
             "profile_sha256": "0" * 64}  # fmt: skip
    text = report(rows, facts)
    assert "20.0% (wanted 5 %), of peak memory 20.0%" in text and "1 of 2 cases ran" in text
    assert "out of memory" in text and "-20.0%" in text and "+20.0%" in text
