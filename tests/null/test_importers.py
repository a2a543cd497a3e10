"""Profiles from other tools' files: nccl-tests and torch's Kineto traces, whole and broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner.costmodel import comm
from planner.costmodel.presets import load_cluster
from planner.costmodel.profiled import fit_cluster
from planner.profiler.import_kineto import import_trace
from planner.profiler.import_nccl import ImportFileError, import_nccl_tests

CORPUS = Path(__file__).parents[1] / "corpus" / "nccl_tests"


@pytest.mark.parametrize("suffix", ["txt", "json"])
def test_nccl_tests(suffix: str) -> None:
    made = import_nccl_tests(CORPUS / f"h100x16_all_reduce.{suffix}", "2025-02-20", "1", "all_reduce")
    (where,) = made.conditions
    assert (where.device, where.ranks, where.devices_per_node) == ("NVIDIA H100 80GB HBM3", 16, 8)
    assert len(made.samples) == 7
    one = next(s for s in made.samples if s.dims["num_bytes"] == 16777216)
    assert one.time_s == pytest.approx((977.6 + 951.6) / 2 * 1e-6)
    assert one.name == "all_reduce" and one.dtype == "float32"
    fitted = fit_cluster(load_cluster("h100"), made, 16)
    assert float(comm.all_reduce_s(fitted, (8, 16), 16777216, 1, 16)) == pytest.approx(one.time_s)


def test_both_forms_of_nccl_tests_say_the_same() -> None:
    text, body = (import_nccl_tests(CORPUS / f"h100x16_all_reduce.{s}", "2025-02-20", "1", "all_reduce")
                  for s in ("txt", "json"))  # fmt: skip
    assert [(s.what, s.time_s) for s in text.samples] == [(s.what, s.time_s) for s in body.samples]
    assert body.conditions[0].software == {"nccl": "2.27.3"}


@pytest.mark.parametrize(
    ("suffix", "change", "said"),
    [
        ("json", lambda t: t.replace('"time": 977.6', '"time": "nan"'), r"results\[3\]: time is 'nan'"),
        ("json", lambda t: t[: len(t) // 2], "cut off"),
        ("json", lambda t: t.replace("all_reduce_perf", "broadcast_perf"), "broadcast_perf is of no collective"),
        ("txt", lambda t: t.replace(" 977.6", "   nan"), r"txt:27: time is 'nan'"),
        ("txt", lambda t: t[:1500], "no rows"),
        ("txt", lambda t: "hello", "does not say which program"),
        ("txt", lambda t: t.replace("#  Rank", "# Rnk"), "does not say|names no ranks"),
    ],
)
def test_broken_nccl_tests_are_one_line(tmp_path: Path, suffix: str, change: object, said: str) -> None:
    path = tmp_path / f"out.{suffix}"
    path.write_text(change((CORPUS / f"h100x16_all_reduce.{suffix}").read_text()))  # type: ignore[operator]
    named = "" if suffix == "json" or "hello" in path.read_text() else "all_reduce"
    with pytest.raises(ImportFileError, match=said) as error:
        import_nccl_tests(path, "2025-02-20", "1", named)
    assert "\n" not in str(error.value)


def gpu_trace() -> dict[str, object]:
    """A trace of a GPU in the layout that Kineto writes: one GEMM with its kernel and two NCCL kernels."""
    op = {"Input Dims": [[512, 256], [256, 128]], "Input type": ["c10::BFloat16", "c10::BFloat16"], "External id": 7}
    nccl = {"Collective name": "allreduce", "In msg nelems": 1000, "Out msg nelems": 1000, "Group size": 4,
            "dtype": "BFloat16", "Process Group Ranks": "[0, 2, 4, 6]"}  # fmt: skip
    return {
        "deviceProperties": [{"name": "NVIDIA H200", "totalGlobalMem": 150_000_000_000}],
        "distributedInfo": {"backend": "nccl", "rank": 0, "world_size": 8},
        "traceEvents": [
            {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 900, "args": op},
            {"ph": "X", "cat": "kernel", "name": "nvjet", "ts": 5, "dur": 11.5, "args": {"External id": 7}},
            {"ph": "X", "cat": "kernel", "name": "ncclDevKernel", "ts": 20, "dur": 70, "args": nccl},
            {"ph": "X", "cat": "kernel", "name": "ncclDevKernel", "ts": 120, "dur": 50, "args": nccl},
        ],
    }


def test_a_gpu_trace_counts_kernels_and_the_fastest_collective(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(gpu_trace()))
    made = import_trace(path, "2026-11-24", "1")
    times = {s.what: s.time_s for s in made.samples}
    assert times["gemm", "", "bfloat16", (1.0, 512.0, 128.0, 256.0)] == pytest.approx(11.5e-6)
    assert times["collective", "all_reduce", "bfloat16", (2000.0, 4.0, 2.0)] == pytest.approx(50e-6)
    assert made.conditions[0].device == "NVIDIA H200" and made.conditions[0].ranks == 8


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps(gpu_trace())[:400], "cut off"),
        ("{}", "no traceEvents"),
        ('{"traceEvents": []}', "record_shapes=True"),
    ],
)
def test_broken_traces_are_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "trace.json"
    path.write_text(text)
    with pytest.raises(ImportFileError, match=said):
        import_trace(path, "2026-11-24", "1")


def test_a_trace_of_two_gib_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with path.open("wb") as file:
        file.truncate(2 * 2**30)  # sparse
    with pytest.raises(ImportFileError, match="2.0 GiB of trace"):
        import_trace(path, "2026-11-24", "1")
