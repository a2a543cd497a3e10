"""The closed loop's choice of plans, its price on shared cores, its scores and its report."""

from __future__ import annotations

import pytest
from plans import graph, job, spec

from planner.costmodel.estimate import estimate
from planner.reports.gpu_check import report
from planner.reports.loop_plans import BEST, Predicted, choose, shared_step_s
from planner.reports.loop_text import Row, markdown, scores

FACTS = {
    "date": "2026-11-24", "load_before": 0.1, "left_out": 0.25, "load_after": 2.0, "cores": 2,
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
    priced = estimate(graph(), machine, plan)
    alone = shared_step_s(priced, plan, machine, cores=machine.num_gpus)
    shared = shared_step_s(priced, plan, machine, cores=2)
    bubble = next(leaf.leaf_s for leaf in priced.breakdown.leaves() if leaf.name == "bubble")
    assert alone == priced.step_s
    busy = [plan.num_microbatches * rank.microbatch_s for rank in priced.ranks]
    mean_s, path_s = sum(busy) / len(busy), (max(busy) + bubble) / (machine.num_gpus / 2)
    assert mean_s > path_s  # work, not the longest chain, is what two cores are short of
    assert shared == pytest.approx(priced.step_s - max(busy) - bubble + mean_s)
    flat = spec(micro_batch_size=2)
    assert shared_step_s(estimate(graph(), machine, flat), flat, machine, 2) == estimate(graph(), machine, flat).step_s


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
