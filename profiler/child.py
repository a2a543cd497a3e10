"""Child process of the tracer: traces one source and writes the graph, or a line of error, to a file.

Usage: python -m planner.profiler.child SOURCE RESULT_FILE SEQ_LEN MICRO_BATCH_SIZE
SEQ_LEN 0 means the model's own.
The first byte of the result says what follows: G a graph as canonical JSON, E an error message.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path

from planner.profiler.errors import TraceError, one_line

_CUDA = (
    "not compiled with CUDA",
    "No CUDA GPUs",
    "NVIDIA driver",
    "cuda runtime error",
    "CUDA error",
    "HIP error",
)
_DATA_DEPENDENT = (
    "cannot be called on meta tensors",
    "data-dependent",
    "aten::nonzero",
    "torch.nonzero()",
    "aten::_local_scalar_dense",
    "aten::masked_select",
    "aten::unique",
    "Cannot copy out of meta tensor",
    "repeat_interleave",
    "is not implemented for meta",
    "meta tensors because",
)


def trace(path: Path, function: str, seq_len: int | None, micro_batch_size: int) -> bytes:
    """Trace the model at `path` and return the encoded graph."""
    from planner.profiler.assemble import assemble
    from planner.profiler.graph_io import encode_graph
    from planner.profiler.run import run_forward

    if path.suffix == ".json":
        from planner.profiler.hf import load_config

        subject = load_config(path, seq_len, micro_batch_size)
    else:
        from planner.profiler.load import load_python

        subject = load_python(path, function, seq_len, micro_batch_size)
    return encode_graph(assemble(subject, run_forward(subject)))


def explain(error: BaseException, path: Path) -> str:
    """One line: where, what, and what to do."""
    if isinstance(error, TraceError):
        return str(error)
    where, text = _where(error, path), f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):
        return f"{Path(error.filename or path).name}:{error.lineno}: syntax error: {error.msg}"
    if isinstance(error, ModuleNotFoundError):
        return f"{where}: needs module {error.name!r}, which is not installed: install it in this environment"
    if isinstance(error, SystemExit):
        return f'{where}: calls sys.exit: move it under `if __name__ == "__main__":` or remove it'
    if any(part in text for part in _CUDA):
        return f"{where}: uses CUDA ({text}): models are traced on the meta device; take out cuda() calls"
    if any(part in text for part in _DATA_DEPENDENT):
        return (
            f"{where}: the computation depends on values of tensors ({text}), which a trace on meta tensors "
            "does not have: make shapes and branches independent of data; experts are recognised by a list "
            "of equal modules beside a router, in a module with `top_k`"
        )
    return f"{where}: {text}; if the input does not fit, define example_batch(micro_batch_size, seq_len)"


def _where(error: BaseException, path: Path) -> str:
    """file:line of the deepest frame in the user's folder, else the name of the file."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent == path.parent]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else path.name


def main(argv: list[str]) -> int:
    """Entry point; the exit status is 0 whenever the result file was written."""
    source, result, seq_len, micro_batch_size = argv
    name, _, function = source.rpartition(":") if ".py:" in source else (source, "", "")
    path = Path(name).resolve()
    warnings.simplefilter("ignore")  # the model's own warnings are not the planner's
    try:
        data = b"G" + trace(path, function, int(seq_len) or None, int(micro_batch_size))
    except (Exception, SystemExit) as error:
        if os.environ.get("PLANNER_TRACE_DEBUG"):
            traceback.print_exc()
        data = b"E" + one_line(explain(error, path)).encode()
    Path(result).write_bytes(data)
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    os._exit(status)  # threads and exit handlers of the user's module do not hold us up
