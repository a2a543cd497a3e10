"""The plan file: canonical, complete, refused in one line when anything is wrong, written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plans
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import files
from planner.errors import PlanFileError, StalePlanError, UserError
from planner.plan import SCHEMA, decode_plan, encode_plan, graph_sha256
from planner.profiler import graph_io

DATA = encode_plan(plans.plan())
BODY = json.loads(DATA)


def test_a_plan_reads_back_as_itself() -> None:
    again = decode_plan(DATA, "plan.json")
    assert again == plans.plan()
    assert encode_plan(again) == DATA


def test_bytes_are_canonical_and_readable() -> None:
    assert list(BODY) == sorted(BODY)
    embedded = ('"graph": ', '"cluster": ', '"engine": ')
    lines = [line for line in DATA.decode().splitlines() if not line.lstrip().startswith(embedded)]
    assert max(map(len, lines)) < 200
    assert '    "tp": 2,' in lines
    for word in (b"search_s", b"/work", b"/tmp", b"/home"):
        assert word not in DATA


def test_layout_of_the_text_does_not_matter() -> None:
    assert decode_plan(json.dumps(BODY, indent=3).encode(), "plan.json") == plans.plan()


def test_graph_hash_is_that_of_the_saved_graph() -> None:
    assert graph_sha256(plans.graph()) == graph_io.graph_sha256(plans.graph())
    assert BODY["inputs"]["graph_sha256"] == graph_io.graph_sha256(plans.graph())


def refused(data: bytes, kind: type[UserError] = PlanFileError) -> str:
    with pytest.raises(kind) as caught:
        decode_plan(data, "plan.json")
    text = str(caught.value)
    assert text.startswith("plan.json: ") and "\n" not in text
    return text


def test_truncated_anywhere() -> None:
    ends = {*range(0, len(DATA) - 2, 211), *range(60), *range(len(DATA) - 80, len(DATA) - 2)}
    for end in sorted(ends):
        refused(DATA[:end])


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(DATA) - 1), st.integers(1, 255))
def test_flipped_bits_are_refused_or_harmless(position: int, mask: int) -> None:
    data = bytearray(DATA)
    data[position] ^= mask
    try:
        found = decode_plan(bytes(data), "plan.json")
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert found == plans.plan()  # a changed blank or an equal number


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_end_in_one_line(data: bytes) -> None:
    refused(data)


def objects(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Paths of the objects of records in the plan; free tables have no fixed keys."""
    if isinstance(value, dict):
        if not path or path[-1] not in ("ledger", "refused", "fixed", "options", "leaves_s"):
            yield path
        for key, item in value.items():
            yield from objects(item, (*path, key))
    elif isinstance(value, list) and value:
        yield from objects(value[0], (*path, 0))


def changed(path: tuple[str | int, ...], change: Any) -> bytes:
    body = json.loads(DATA)
    at = body
    for step in path:
        at = at[step]
    change(at)
    return json.dumps(body).encode()


FREE = ("peak_flops_per_s", "gemm", "attention", "collectives", "kernels", "host_cut_s")  # tables by name


def test_unknown_keys_are_refused_everywhere() -> None:
    seen = 0
    for path in objects(BODY):
        if path and path[-1] in FREE and ("cluster" in path or "engine" in path):
            continue
        text = refused(changed(path, lambda at: at.update(surprise=1)))
        assert "surprise" in text, (path, text)
        seen += 1
    assert seen > 40


def test_missing_keys_are_named() -> None:
    for path in ((), ("inputs",), ("decisions",), ("predicted",), ("certificate",), ("inputs", "cluster")):
        at = BODY
        for step in path:
            at = at[step]
        for key in at:
            text = refused(changed(path, lambda found, key=key: found.pop(key)))
            assert key in text or "sha256" in text, (path, key, text)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("decisions", "tp"), "8", "tp"),
        (("decisions", "tp"), 2.5, "tp"),
        (("decisions", "schedule"), "magic", "schedule"),
        (("decisions", "layers"), 3, "layers"),
        (("decisions", "tp"), 4, "changed since it was written"),
        (("predicted", "step_s"), 1.0, "changed since it was written"),
        (("inputs", "graph_sha256"), "0" * 64, "inputs.graph has sha256"),
        (("inputs", "cluster_sha256"), "0" * 64, "inputs.cluster has sha256"),
        (("inputs", "cluster", "node_size"), 0, "node_size"),
        (("inputs", "graph", "runs", 0, "layer_class"), 9, "names no class"),
        (("sha256",), 7, "changed since it was written"),
    ],
)
def test_wrong_values_are_named(path: tuple[str | int, ...], value: object, words: str) -> None:
    text = refused(changed(path[:-1], lambda at: at.__setitem__(path[-1], value)))
    assert words in text


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a plan"),
        (b"[]", "list"),
        (b"{}", "schema is None"),
        (b'{"schema": 3}', "schema is 3"),
        (b'{"schema": "planner.graph/1"}', "planner.graph/1"),
        (b'{"schema": "planner.plan/1", "schema": "planner.plan/1"}', "twice"),
        (b'{"schema": "planner.plan/1", "x": NaN}', "NaN"),
        (b'{"schema": "planner.plan/1", "x": 1e999}', "1e999"),
        (b"\xff\xfe", "not a plan"),
        (b"[" * 100_000, "not a plan"),
        (b'{"schema": "planner.plan/1", "inputs": 3}', "inputs"),
        (b'{"schema": "planner.plan/1", "inputs": {"cluster": []}}', "cluster"),
    ],
)
def test_foreign_files(data: bytes, words: str) -> None:
    assert words in refused(data)


def test_another_version_is_stale_and_not_damaged() -> None:
    data = json.dumps({**BODY, "schema": "planner.plan/2"}).encode()
    text = refused(data, StalePlanError)
    assert SCHEMA in text and "planner.plan/2" in text
    assert StalePlanError("x").exit_code == 4


# ---- writing


def test_write_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(b"old")
    files.write_atomic(path, DATA)
    assert path.read_bytes() == DATA and os.listdir(tmp_path) == ["plan.json"]
    assert files.read_plan(path) == plans.plan()


def test_a_link_keeps_being_one(tmp_path: Path) -> None:
    target, link = tmp_path / "real.json", tmp_path / "plan.json"
    link.symlink_to(target)
    files.write_atomic(link, b"x")
    assert link.is_symlink() and target.read_bytes() == b"x"


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failures_leave_the_old_file_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(b"old")

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt):
        files.write_atomic(path, DATA)
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["plan.json"]


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A real short write: the process may write 1,000 bytes a file."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "from pathlib import Path; from planner.files import write_atomic\n"
        f"write_atomic(Path({str(tmp_path / 'plan.json')!r}), b'x' * 5000)\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "UserError" in done.stderr and "not written" in done.stderr
    assert os.listdir(tmp_path) == []


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path, words in (
        (tmp_path / "folder", "is a folder"),
        (tmp_path / "none" / "plan.json", "no folder"),
        (Path(os.devnull), "not a regular file"),
    ):
        with pytest.raises(UserError, match=words):
            files.check_writable(path)
        with pytest.raises(UserError, match=words):
            files.write_atomic(path, b"")


def test_reading_a_folder_or_nothing(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(UserError, match="cannot read the plan"):
            files.read_plan(path)


