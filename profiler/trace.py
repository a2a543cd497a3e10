"""trace_model: a ModelGraph from a torch model, traced in a child process."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import planner
from planner.costmodel.graph import ModelGraph
from planner.profiler.errors import TraceError
from planner.profiler.graph_io import decode_graph, is_graph

_SECRET = re.compile(
    r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE|AUTH|COOKIE|_KEY$", re.IGNORECASE
)


def trace_model(
    source: str, *, seq_len: int | None = None, micro_batch_size: int = 1, time_limit_s: float = 120.0
) -> ModelGraph:
    """ModelGraph of `source`: model.py, model.py:function, a Hugging Face config.json, or a saved graph.

    The model is built and run once on the meta device, in a child process that has no GPU, a scrubbed
    environment and `time_limit_s` seconds of wall time. That keeps a faulty model from taking the planner
    down. It is NOT a sandbox: model.py runs with your rights, so trace only files that you would run.

    Raises TraceError with one line that says what is wrong, where, and what to do.
    """
    if micro_batch_size < 1 or (seq_len is not None and seq_len < 1):
        raise TraceError(f"seq_len {seq_len} and micro_batch_size {micro_batch_size} must be at least 1")
    path = Path(source.rpartition(":")[0] if ".py:" in source else source)
    if not path.is_file():
        raise TraceError(
            f"{path}: no such file; give model.py, model.py:function, config.json or a saved graph"
        )
    if path.suffix == ".json":
        saved = _saved_graph(path)
        if saved is not None:
            return saved
    elif path.suffix != ".py":
        raise TraceError(
            f"{path}: unknown kind of file; give model.py, model.py:function, config.json or a saved graph"
        )
    return decode_graph(_run_child(source, path, seq_len or 0, micro_batch_size, time_limit_s))


def _saved_graph(path: Path) -> ModelGraph | None:
    data = path.read_bytes()
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{path}: not valid JSON ({error})") from None
    return decode_graph(data) if is_graph(body) or path.name.endswith(".graph.json") else None


def child_environment() -> dict[str, str]:
    """The environment without what looks like a secret, without GPUs and without network look-ups."""
    kept = {name: value for name, value in os.environ.items() if not _SECRET.search(name)}
    root = str(Path(planner.__file__).parents[1])
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [root, kept.get("PYTHONPATH", "")]))
    kept.update(CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    kept.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    return kept


def _run_child(source: str, path: Path, seq_len: int, micro_batch_size: int, time_limit_s: float) -> bytes:
    with tempfile.TemporaryDirectory(prefix="planner-trace-") as folder:
        result = Path(folder) / "result"
        command = [sys.executable, "-P", "-m", "planner.profiler.child"]
        command += [source, str(result), str(seq_len), str(micro_batch_size)]
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # what the model prints is of no interest and must not mix with ours
            stderr=None if os.environ.get("PLANNER_TRACE_DEBUG") else subprocess.DEVNULL,
            env=child_environment(),
            start_new_session=True,
        )
        try:
            status = child.wait(timeout=time_limit_s)
        except subprocess.TimeoutExpired:
            raise TraceError(
                f"{path.name}: not traced within {time_limit_s:g} s: it hangs or builds real tensors; "
                "look for endless loops and downloads, or give a longer time limit"
            ) from None
        finally:
            _kill_group(child)
        data = result.read_bytes() if result.is_file() else b""
    if data[:1] == b"G":
        return data[1:]
    if data[:1] == b"E":
        raise TraceError(data[1:].decode())
    raise TraceError(
        f"{path.name}: {_death(status)} before the model was traced: run the file on its own to see why"
    )


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """End the child and whatever it started, also after Ctrl-C."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _death(status: int) -> str:
    if status >= 0:
        return f"the process that runs it ended with exit status {status}"
    with contextlib.suppress(ValueError):
        return f"the process that runs it was killed by {signal.Signals(-status).name}"
    return f"the process that runs it was killed by signal {-status}"
