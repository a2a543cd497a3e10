"""The dry run against the cost model: what is exact must be exact, what differs is said."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cases import _SP, plan_of, spec  # noqa: E402

from planner.profiler.trace import trace_model  # noqa: E402
from planner.runtime.errors import RuntimePlanError  # noqa: E402

MODEL = Path(__file__).with_name("train_model.py")
PLANS = {
    "tp": spec(tp=2),
    "tp sp zero1": spec(tp=2, dp_shard=2, zero_stage=1, **_SP),
    "pp full": spec(tp=2, pp=2, dp_shard=2, zero_stage=1, recompute="full", **_SP),
    "hundreds": spec(tp=2, pp=2, dp_replicate=16, dp_shard=8, zero_stage=1, global_batch_size=1024, **_SP),
}


@pytest.mark.parametrize("name", PLANS)
def test_parameters_and_messages_are_exact(name: str) -> None:
    """Parameters, shards and the bytes of every kind of collective, on the first and last pipeline rank."""
    from planner.runtime.dry_run import meta_model, run_rank
    from planner.runtime.predicted import predicted_rank

    plan = plan_of("", PLANS[name], trace_model(str(MODEL), seq_len=16))
    for rank in range(plan.decisions.pp):
        found, wanted = run_rank(plan, meta_model(str(MODEL), plan), rank), predicted_rank(plan, rank)
        assert (found.num_params, found.shard_params) == (wanted.num_params, wanted.shard_params)
        assert found.sent_bytes == {kind: n for kind, n in wanted.sent_bytes.items() if n}
        assert not found.gathered


def test_wrong_number_of_ranks_is_one_line() -> None:
    """--ranks must be the plan's."""
    from planner.runtime.dry_run import dry_run

    plan = plan_of("", PLANS["tp"], trace_model(str(MODEL), seq_len=16))
    with pytest.raises(RuntimePlanError, match="--ranks 3: the plan is for 2 ranks"):
        dry_run(plan, 3, str(MODEL))
