"""Reading runs and turning them into cases: what is understood, what is skipped, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner.costmodel.pipeline import ScheduleKind
from planner.reports import stages
from planner.reports.accuracy import PUBLISHED
from planner.reports.cases import build_case
from planner.reports.rows import REQUIRED, Row, Skip, read_rows

BASE = {
    "id": "a", "source": "mine", "arch": "dense", "n_layers": "24", "hidden": "1024", "ffn_hidden": "4096",
    "n_heads": "16", "vocab": "50257", "seq_len": "1024", "gpu": "A100-80GB-SXM", "gpus_per_node": "8", "n_gpus": "8",
    "dtype": "bf16", "tp": "2", "pp": "2", "dp": "2", "micro_batch": "1", "global_batch": "16", "recompute": "none",
    "outcome": "ok", "engine": "megatron-core",
}  # fmt: skip


def row(**cells: str) -> Row:
    return Row({name: value for name, value in (BASE | cells).items() if value})


def write(path: Path, rows: list[dict[str, str]], columns: tuple[str, ...] = ()) -> Path:
    names = columns or tuple(dict.fromkeys(name for cells in rows for name in cells))
    lines = [",".join(names), *(",".join(cells.get(name, "") for name in names) for cells in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(("text", "value"), [("32", 32), ("~50k (not stated)", 50_000), ("128 (GA64 x DP2)", 128),
                                             ("12.5", 12.5), ("~250k", 250_000)])  # fmt: skip
def test_a_number_may_carry_a_remark(text: str, value: float) -> None:
    assert row(vocab=text).number("vocab") == value


@pytest.mark.parametrize("text", ["max 192K, packed", "2048 tokens per GPU", "1/2", "per-sequence"])
def test_what_is_not_one_number_is_skipped(text: str) -> None:
    with pytest.raises(Skip, match="seq_len is not one number"):
        row(seq_len=text).number("seq_len")


def test_step_time_comes_from_tokens_per_second_where_only_those_are_stated() -> None:
    assert row(tokens_per_s_per_gpu="1024").step_s == 16 * 1024 / (1024 * 8)
    with pytest.raises(Skip, match="no step time"):
        _ = row().step_s


def test_missing_column_duplicate_id_and_broken_lines_are_refused(tmp_path: Path) -> None:
    without = {name: value for name, value in BASE.items() if name != "gpu"}
    with pytest.raises(ValueError, match="missing column gpu"):
        read_rows(write(tmp_path / "a.csv", [without]))
    with pytest.raises(ValueError, match="'a' occurs twice"):
        read_rows(write(tmp_path / "b.csv", [BASE, BASE]))
    with pytest.raises(ValueError, match="outcome is 'crash'"):
        read_rows(write(tmp_path / "c.csv", [BASE | {"outcome": "crash"}]))
    short = tmp_path / "d.csv"
    short.write_text(",".join(REQUIRED) + "\n1,2,3\n")
    with pytest.raises(ValueError, match="line 2: expected 20 fields"):
        read_rows(short)
    with pytest.raises(ValueError, match="No such file"):
        read_rows(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="Is a directory"):
        read_rows(tmp_path)


def test_a_row_becomes_a_plan() -> None:
    case = build_case(row(megatron_sp="1", zero_stage="1"))
    spec = case.spec
    assert (spec.tp, spec.pp, spec.dp_shard, spec.dp_replicate, spec.zero_stage) == (2, 2, 2, 1, 1)
    assert spec.sequence_parallel and spec.vocab_parallel and spec.num_microbatches == 8
    assert spec.stage_layers == ((0, 12), (12, 24))
    assert case.graph.num_layers == 24
    assert build_case(row(pp="2", vpp="3")).spec.schedule is ScheduleKind.INTERLEAVED


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"engine": "", "source": "somewhere"}, "no engine is known"),
        ({"gpu": "TPU-v4"}, "no device preset for TPU-v4"),
        ({"dp": "4"}, "degrees do not multiply"),
        ({"global_batch": "15"}, "not a multiple"),
        ({"tp": ""}, "tp not stated"),
        ({"dtype": "int4"}, "dtype int4"),
        ({"recompute": "unknown"}, "recompute not stated"),
        ({"recompute": "selective:mlp"}, "recompute selective:mlp has no strategy"),
        ({"schedule": "chimera"}, "schedule chimera"),
        ({"offload": "optimizer"}, "offload"),
        ({"arch": "linear_attention"}, "architecture linear_attention"),
        ({"n_heads": "15"}, "tp does not divide"),
    ],
)
def test_what_cannot_be_priced_is_skipped_with_the_reason(cells: dict[str, str], reason: str) -> None:
    with pytest.raises(Skip, match=reason):
        build_case(row(**cells))


def test_the_network_that_the_row_states_replaces_the_presets() -> None:
    case = build_case(row(n_gpus="16", dp="4", inter_node="4x Omni-Path 100 Gb/s per node"))
    assert case.cluster.tiers[-1].bandwidth_bytes_per_s.value == 4 * 100e9 / 8 / 8
    assert build_case(row()).cluster.tiers[-1].bandwidth_bytes_per_s.value == 25e9


def test_the_vocabulary_is_padded_as_megatron_does() -> None:
    published = {r.id: r for r in read_rows(PUBLISHED)}
    assert build_case(published["SC21-0001"]).graph.vocab_size == 51_200
    odd = Row(dict(published["SC21-0004"].cells) | {"vocab": "50257"})
    assert build_case(odd).graph.vocab_size == 51_200  # the next multiple of 128 x tp 8


def test_even_stages_give_embedding_and_head_a_slot_where_that_divides() -> None:
    assert stages.even(8, 4) == ((0, 2), (2, 4), (4, 6), (6, 8))
    assert stages.even(30, 8) == stages.from_counts([3, 4, 4, 4, 4, 4, 4, 3])
    assert stages.even(24, 16) == stages.from_counts([2] * 8 + [1] * 8)


def test_nanotron_fills_a_stage_until_its_share_is_passed() -> None:
    # 16 layers of cost 1 and a head of cost 4 on 4 stages: shares end at 5, 10, 15.
    assert stages.nanotron(16, 4, 1.0, 4.0) == stages.from_counts([6, 5, 5, 0])
    assert stages.nanotron(6, 2, 1.0, 0.0) == stages.from_counts([4, 2])


def test_a_nanotron_stage_without_a_block_does_not_run() -> None:
    """Behind the last layer come head, cast and loss: three stages at most live without a layer."""
    assert stages.nanotron_fills([3, 3, 2, 3, 2, 3, 0, 0])
    assert stages.nanotron_fills([5, 5, 0, 0, 0])
    assert not stages.nanotron_fills([2, 1, 0, 0, 0, 0])


def test_balanced_stages_minimise_the_largest_with_the_head_on_the_last() -> None:
    assert stages.balanced(8, 2, 1.0, 2.0) == stages.from_counts([5, 3])
    assert stages.balanced(8, 4, 1.0, 0.0) == stages.from_counts([2, 2, 2, 2])
    assert stages.balanced(4, 1, 1.0, 9.0) == stages.from_counts([4])


def test_partition_of_pipeline_modules_is_cut_to_the_layers() -> None:
    assert stages.from_modules([0, 15, 30], 24, 2) == ((0, 13), (13, 24))
