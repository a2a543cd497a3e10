"""The study's page: its rows are those of its command, and speed-ups and orders stand beside what was published."""

from __future__ import annotations

import json

import pytest

from planner.reports.rows import Row as Cells
from planner.reports.seqlen_study import FAMILIES, FLEXSP_CELLS, HERE, longer
from planner.reports.seqlen_text import ALL_TO_ALL, SYSTEMS, Row, all_to_all_rate
from planner.reports.systems import cluster_of


def row(name: str, **step_s: float) -> Row:
    steps = {system: (float(step_s[key]),) if (key := system.replace(" ", "_").replace("-", "_")) in step_s else None
             for system in SYSTEMS}  # fmt: skip
    return Row(name=name, step_s=steps, gap_frac=(0.0,), static_gap_frac=0.0, tokens=1.0)


def test_the_report_has_every_row_of_the_command() -> None:
    data = json.loads((HERE / "seqlen_study.json").read_text())
    assert {family: set(rows) for family, rows in data.items()} == {
        family: {work.name for work in workloads()} for family, workloads in FAMILIES.items()
    }


def test_orders_and_speedups_beside_the_published_ones() -> None:
    """FlexSP at 384K on Wikipedia, 7B: 1.46 over DeepSpeed, 1.77 over Megatron; batch-adaptive 1.32 over DeepSpeed."""
    found = row("GPT-7B 384K wikipedia, longer", flexsp_like=2, batch_adaptive=3, as_run=4, ulysses_static=1,
                tp_x_cp_static=5)  # fmt: skip
    assert found.speedup("flexsp-like", "ulysses") == 2
    assert found.published("flexsp-like", "ulysses") == "1.46"
    assert found.published("flexsp-like", "tp x cp static") == "1.77"
    assert found.order() == "as published"
    swapped = row("GPT-7B 384K wikipedia", flexsp_like=2, batch_adaptive=3, as_run=5, tp_x_cp_static=4)
    assert swapped.order() == "FBMD, published FBDM"
    scale = row("7B 2M byted, 1,024 GPUs", bytescale_like=1, as_run=3)
    assert scale.published("bytescale-like", "as run") == "3.31 to 4.26" and not scale.order()


def test_their_all_to_all_is_as_slow_as_their_table_says() -> None:
    own, theirs = cluster_of(Cells(FLEXSP_CELLS)), [work.cluster for work in longer() if "their" in work.name]
    assert len(theirs) == 2
    for cluster in theirs:
        assert all_to_all_rate(cluster, 64) == pytest.approx(ALL_TO_ALL[64] * 1e9, rel=0.03)
        assert all_to_all_rate(cluster, 8) == all_to_all_rate(own, 8)
