"""Our schedule tables against torch.distributed.pipelining, action by action, without process groups."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from planner.costmodel.pipeline import ScheduleKind, torch_problem
from planner.costmodel.schedule import actions, stage_of

Order = list[tuple[str, int, int]]  # (op, stage, micro-batch)
_OPS = {"F": "F", "B": "BW", "I": "B", "W": "W"}  # torch's letter -> ours


def _recorded_order(class_name: str, m: int, p: int, rank: int) -> Order:
    """What torch's single-stage schedule really runs on a stage that only writes down its calls.

    Not `_get_pipeline_order`, torch's own table of the same: in torch 2.13 it numbers the last 1F1B rank's
    forwards 1..m instead of 0..m-1.
    """
    seen: Order = []
    stage = MagicMock(stage_index=rank)
    for name in ("get_fwd_recv_ops", "get_fwd_send_ops", "get_bwd_recv_ops", "get_bwd_send_ops"):
        getattr(stage, name).return_value = []
    stage.forward_one_chunk.side_effect = lambda i, *_, **__: seen.append(("F", rank, i))
    stage.backward_one_chunk.side_effect = lambda i, **_: seen.append(("BW", rank, i))
    schedule = MagicMock(_stage=stage, _n_microbatches=m, _num_stages=p, scale_grads=False)
    schedule._check_inputs.return_value = ([()] * m, [{}] * m)
    getattr(torch_schedules, class_name)._step_microbatches(schedule)
    return seen


def _listed_order(class_name: str, m: int, p: int, v: int, rank: int) -> Order:
    """Torch's table of a multi-stage schedule, without idle slots.

    The method that makes it reads only these fields of a schedule, so it runs on a stand-in: the real
    constructors ask for stages on a process group.
    """
    fields: dict[str, Any] = {
        "pp_group_size": p,
        "_n_microbatches": m,
        "_num_stages": p * v,
        "num_stages": p * v,
    }
    stand_in = SimpleNamespace(**fields, n_local_stages=v, microbatches_per_round=m // max(1, m // p))
    listed = getattr(torch_schedules, class_name)._calculate_single_rank_operations(stand_in, rank)
    return [
        (_OPS[a.computation_type.value], a.stage_index, a.microbatch_index) for a in listed if a is not None
    ]


def _torch_order(kind: ScheduleKind, m: int, p: int, v: int, rank: int) -> Order:
    if kind is ScheduleKind.ONE_F_ONE_B:
        return _recorded_order("Schedule1F1B", m, p, rank)
    if kind is ScheduleKind.GPIPE:
        return _recorded_order("ScheduleGPipe", m, p, rank)
    name = {
        ScheduleKind.INTERLEAVED: "ScheduleInterleaved1F1B",
        ScheduleKind.ZB_H1: "ScheduleInterleavedZeroBubble",  # with one stage a rank it is ZB-H1
        ScheduleKind.ZB_V: "ScheduleZBVZeroBubble",
    }[kind]
    return _listed_order(name, m, p, v, rank)


@pytest.mark.parametrize(
    ("kind", "m", "p", "v"),
    [(kind, m, p, 1) for kind in ("1f1b", "gpipe") for p, m in ((1, 3), (4, 2), (4, 4), (4, 9), (8, 32))]
    + [("zb_h1", m, p, 1) for p, m in ((2, 2), (4, 2), (4, 4), (4, 9), (8, 32))]
    + [("interleaved", m, p, v) for p, m in ((2, 2), (4, 4), (4, 12), (8, 32)) for v in (2, 3, 4)]
    + [("zb_v", m, p, 2) for p, m in ((2, 4), (2, 5), (4, 8), (4, 11), (8, 32))],
)
def test_order_is_torchs(kind: str, m: int, p: int, v: int) -> None:
    """Same actions in the same order on every rank."""
    schedule = ScheduleKind(kind)
    for rank, order in enumerate(actions(schedule, m, p, v)):
        ours = [(a.op, stage_of(schedule, p, rank, a.chunk), a.microbatch) for a in order]
        assert ours == _torch_order(schedule, m, p, v, rank), f"rank {rank}"


def test_torch_refuses_what_torch_problem_says() -> None:
    """Schedule1F1B's own check, m >= p, is the one that torch_problem reports."""
    stage = SimpleNamespace(num_stages=4, stage_index=0, stage_index_to_group_rank={}, is_last=False)
    stage.has_backward = True
    with pytest.raises(ValueError, match="Number of microbatches"):
        torch_schedules.Schedule1F1B(stage, n_microbatches=3)  # type: ignore[arg-type]
    assert torch_problem(ScheduleKind.ONE_F_ONE_B, 4, 3) is not None
    assert torch_problem(ScheduleKind.ONE_F_ONE_B, 4, 4) is None
