"""Faulty models end in one line that says what is wrong, where and what to do; nothing hangs or crashes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from planner.costmodel.graph import ModelGraph
from planner.profiler import child
from planner.profiler.errors import TraceError
from planner.profiler.graph_io import GraphFileError, decode_graph, encode_graph, graph_sha256
from planner.profiler.trace import child_environment, trace_model

HEAD = "import torch\nfrom torch import nn\n"
LINEAR = "def build_model():\n    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))\n"
FORWARD = (
    "class M(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    "        self.a = nn.Linear(8, 8)\n"
    "    def forward(self, x):\n        x = self.a(x)\n"
)
BAD = {
    "syntax": ("def build_model(:\n", ["model.py:1", "syntax error"]),
    "missing_module": ("import no_such_package\n", ["model.py:1", "no_such_package", "install"]),
    "import_raises": ("x = 1\nraise RuntimeError('boom')\n", ["model.py:2", "boom"]),
    "no_model": ("x = 1\n", ["no model", "build_model"]),
    "needs_arguments": (
        HEAD + "class A(nn.Module):\n    def __init__(self, n):\n        pass\n",
        ["without arguments"],
    ),
    "two_models": (
        HEAD
        + "class A(nn.Linear):\n    def __init__(self):\n        super().__init__(1, 1)\n"
        + "class B(A):\n    pass\n",
        ["more than one", "A, B", "build_model"],
    ),
    "not_a_module": (HEAD + "def build_model():\n    return 3\n", ["int", "nn.Module"]),
    "cuda": (
        HEAD + "def build_model():\n    return nn.Linear(8, 8).cuda()\n",
        ["model.py:4", "CUDA", "meta"],
    ),
    "exits": ("import sys\nsys.exit(0)\n", ["model.py:2", "sys.exit"]),
    "killed": ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n", ["SIGSEGV"]),
    "os_exit": ("import os\nos._exit(3)\n", ["exit status 3"]),
    "shape": (
        HEAD + "def build_model():\n    return nn.Sequential(nn.Linear(8, 9), nn.Linear(8, 8))\n",
        ["example_batch"],
    ),
    "two_inputs": (
        HEAD + "class M(nn.Module):\n    def forward(self, a, b):\n        return a\n",
        ["needs 2 inputs", "example_batch"],
    ),
    "branch": (
        HEAD + FORWARD + "        return x if x.sum() > 0 else -x\n",
        ["model.py:9", "depends on values", "independent"],
    ),
    "nonzero": (HEAD + FORWARD + "        return x[x > 0]\n", ["model.py:9", "depends on values"]),
}


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "model.py"
    path.write_text(text)
    return str(path)


def error_of(source: str, tmp_path: Path) -> str:
    """What the child would report, without the two seconds that starting one takes."""
    result = tmp_path / "result"
    child.main([source, str(result), "16", "1"])
    data = result.read_bytes()
    assert data[:1] == b"E"
    return data[1:].decode()


@pytest.mark.parametrize("case", ["killed", "os_exit", "exits", "cuda"])
def test_bad_model_in_a_child_process(case: str, tmp_path: Path) -> None:
    text, parts = BAD[case]
    with pytest.raises(TraceError) as caught:
        trace_model(write(tmp_path, text), seq_len=16)
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize("case", sorted(set(BAD) - {"killed", "os_exit"}))
def test_bad_model_gives_one_line(case: str, tmp_path: Path) -> None:
    text, parts = BAD[case]
    message = error_of(write(tmp_path, text), tmp_path)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_printing_is_not_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    noisy = HEAD + "import sys\nprint('G{}', flush=True)\nprint('x', file=sys.stderr)\n" + LINEAR
    graph = trace_model(write(tmp_path, noisy), seq_len=16)
    assert graph.num_params == 2 * (64 + 8)
    assert capfd.readouterr().out == ""


def wait_for_pid(path: Path) -> int:
    """The process id that a child writes to `path`, ended by a semicolon."""
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text().endswith(";")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(path.read_text()[:-1])


def is_running(pid: int) -> bool:
    """Whether the process lives; one that has ended and waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_hanging_model_is_killed_with_its_children(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    text = "import subprocess, time\nchild = subprocess.Popen(['sleep', '60'])\n"
    text += f"open({str(mark)!r}, 'w').write(str(child.pid) + ';')\ntime.sleep(60)\n"
    start = time.monotonic()
    with pytest.raises(TraceError, match="not traced within 10 s"):  # torch's import comes off it
        trace_model(write(tmp_path, text), time_limit_s=10.0)
    assert time.monotonic() - start < 12.0
    assert not is_running(wait_for_pid(mark))


def test_missing_file_and_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no such file"):
        trace_model(str(tmp_path / "none.py"))
    (tmp_path / "model.txt").write_text("")
    with pytest.raises(TraceError, match="unknown kind of file"):
        trace_model(str(tmp_path / "model.txt"))
    with pytest.raises(TraceError, match="at least 1"):
        trace_model(str(tmp_path / "model.txt"), micro_batch_size=0)


def test_function_after_colon(tmp_path: Path) -> None:
    source = write(tmp_path, HEAD + LINEAR.replace("build_model", "make"))
    assert trace_model(f"{source}:make", seq_len=16).source == "model.py:make"
    assert "no function 'other'; it has: make" in error_of(f"{source}:other", tmp_path)
    assert "or pass model.py:FUNCTION" in error_of(source, tmp_path)


def test_bad_config_files(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(TraceError, match="not valid JSON"):
        trace_model(str(path))
    path.write_text(json.dumps({"hidden_size": 8}))
    assert "no model_type" in error_of(str(path), tmp_path)
    path.write_text(json.dumps({"model_type": "no_such", "auto_map": {"AutoModel": "evil.py--Model"}}))
    assert "'no_such' is unknown" in error_of(str(path), tmp_path)


def test_secrets_do_not_reach_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "my_password", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "x")
    environment = child_environment()
    assert not {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "my_password", "WANDB_API_KEY"} & set(environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert environment["PATH"] == os.environ["PATH"]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> ModelGraph:
    return trace_model(write(tmp_path_factory.mktemp("linear"), HEAD + LINEAR), seq_len=16)


def test_graph_json_round_trip(tmp_path: Path, graph: ModelGraph) -> None:
    data = encode_graph(graph)
    assert decode_graph(data) == graph
    assert encode_graph(decode_graph(data)) == data
    assert graph_sha256(graph) == graph_sha256(decode_graph(data))
    saved = tmp_path / "any_name.json"
    saved.write_bytes(data)
    assert trace_model(str(saved)) == graph


def test_damaged_graph_files_are_refused(graph: ModelGraph) -> None:
    body = json.loads(encode_graph(graph))
    for change, words in (
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"schema": "planner.graph/0"}, "expected 'planner.graph/1'"),
        ({"vocab_size": "8"}, "vocab_size"),
        ({"runs": [{"layer_class": 7, "count": 1, "paths": ["a"]}]}, "names no class"),
    ):
        with pytest.raises(GraphFileError, match=words) as caught:
            decode_graph(json.dumps(body | change).encode())
        assert "\n" not in str(caught.value)
    with pytest.raises(GraphFileError, match="not JSON"):
        decode_graph(b"\xff")
    nested = json.loads(encode_graph(graph))
    nested["epilogue"]["ops"][0]["extra"] = 1
    with pytest.raises(GraphFileError, match=r"unknown key 'extra' at graph.epilogue.ops\[0\]"):
        decode_graph(json.dumps(nested).encode())


def test_interrupt_ends_the_child(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    text = f"import os, time\nopen({str(mark)!r}, 'w').write(str(os.getpid()) + ';')\ntime.sleep(60)\n"
    source = write(tmp_path, text)
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where a job runs behind
        f"from planner.profiler.trace import trace_model\ntrace_model({source!r})"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, cwd=root) as parent:
        try:
            pid = wait_for_pid(mark)
            assert is_running(pid)
            parent.send_signal(signal.SIGINT)
            parent.wait(timeout=10)
            assert not is_running(pid)
        finally:
            parent.kill()
