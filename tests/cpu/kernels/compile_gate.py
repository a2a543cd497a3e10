"""Compiles every Triton kernel for GPUs that are not here and prints what came out as JSON.

Run in a process of its own, without TRITON_INTERPRET: `python compile_gate.py`. Per kernel and architecture: registers
per thread, bytes of stack (where spilled registers go), shared memory, 128-bit global loads and matrix instructions.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}
MATRIX = {80: r"\bHMMA", 90: r"\bHGMMA", 100: r"\bUTC\w*MMA"}  # the newest matrix instruction of each


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kernel at one shape: `types` of its run-time arguments in order, its constants and warps."""

    module: str
    kernel: str
    types: str
    constants: dict[str, object]
    num_warps: int = 8
    num_stages: int = 2
    unaligned: tuple[str, ...] = field(default=())


def _gla(types: str, constants: str, *, kernel: str, num_warps: int = 4, block: int = 64) -> Case:
    """A kernel of triton_gla.py at head dim 128; `constants`: which of its dims it has."""
    dims = {"K": 128, "V": 128, "BK": block, "BV": 64}
    given = {"C": 64, "PRECISION": "tf32", **{name: dims[name] for name in constants.split()}}
    return Case(module="triton_gla", kernel=kernel, types=types, constants=given, num_warps=num_warps)


CASES = {
    "ce_stats": Case(
        module="triton_ce", kernel="stats_kernel", types="*bf16 *i64 *fp32 i32 i32 i32", constants={"BLOCK": 4096}
    ),
    "ce_grad": Case(
        module="triton_ce", kernel="grad_kernel", types="*bf16 *bf16 *i64 *fp32 *fp32 i32 i32 i32 i32",
        constants={"BLOCK": 4096},
    ),
    "ce_combine": Case(
        module="triton_ce", kernel="combine_kernel", types="*fp32 *i64 *fp32 *fp32 *fp32 i32 i32 i32",
        constants={"BLOCK": 256}, num_warps=4,
    ),
    "rms_norm": Case(
        module="triton_norm", kernel="forward_kernel", types="*bf16 *bf16 *bf16 *bf16 *bf16 *fp32 i32 i32 fp32",
        constants={"ADD": False, "ROWS": 1, "BLOCK": 4096},
    ),
    "add_rms_norm": Case(
        module="triton_norm", kernel="forward_kernel", types="*bf16 *bf16 *bf16 *bf16 *bf16 *fp32 i32 i32 fp32",
        constants={"ADD": True, "ROWS": 1, "BLOCK": 8192},
    ),
    "rms_norm_backward": Case(
        module="triton_norm", kernel="backward_kernel",
        types="*bf16 *bf16 *bf16 *bf16 *fp32 *bf16 *fp32 i32 i32",
        constants={"ADD": True, "ROWS": 1, "BLOCK": 4096},
    ),
    "swiglu": Case(
        module="triton_pointwise", kernel="swiglu_kernel", types="*bf16 *bf16 *bf16 i32 i32 i32",
        constants={"BLOCK": 2048},
    ),
    "swiglu_backward": Case(
        module="triton_pointwise", kernel="swiglu_backward_kernel",
        types="*bf16 *bf16 *bf16 *bf16 *bf16 i32 i32 i32 i32", constants={"BLOCK": 2048},
    ),
    "rope": Case(
        module="triton_pointwise", kernel="rope_kernel", types="*bf16 *fp32 *fp32 *bf16 i32 i32 i32 i32",
        constants={"BACK": False, "HEADS": 32, "HALF": 64}, num_warps=4,
    ),
    "ring_span": Case(
        module="triton_ring", kernel="span_kernel", types="*i32 *i32 *i32 *i32 *i32 i32 i32",
        constants={"QUERIES": True, "CAUSAL": True, "TILE": 128, "BLOCK": 1024}, num_warps=4,
    ),
    "ring_step": Case(
        module="triton_ring", kernel="step_kernel",
        types="*bf16 *bf16 *bf16 *fp32 *fp32 *fp32 *fp32 *i32 *i32 *i32 *i32 *i32 i32 i32 i32 i32 fp32",
        constants={"CAUSAL": True, "M": 128, "N": 64, "D": 128},
    ),
    "ring_dq": Case(
        module="triton_ring", kernel="dq_kernel",
        types="*bf16 *fp32 *bf16 *bf16 *bf16 *fp32 *fp32 *i32 *i32 *i32 *i32 *i32 i32 i32 i32 i32 fp32",
        constants={"CAUSAL": True, "M": 64, "N": 64, "D": 128},
    ),
    "ring_dkv": Case(
        module="triton_ring", kernel="dkv_kernel",
        types="*bf16 *fp32 *bf16 *bf16 *bf16 *fp32 *fp32 *fp32 *i32 *i32 *i32 *i32 *i32 i32 i32 i32 i32 fp32",
        constants={"CAUSAL": True, "M": 64, "N": 64, "D": 128},
    ),
    "gla_states": _gla("*bf16 *bf16 *bf16 *fp32 *fp32 *fp32 i32 i32", "K V BK BV", kernel="states_kernel"),
    "gla_scores": _gla("*bf16 *bf16 *bf16 *bf16 i32 i32", "K BK", kernel="scores_kernel"),
    "gla_out": _gla("*bf16 *bf16 *bf16 *bf16 *fp32 *bf16 i32 i32 fp32", "K V BK BV", kernel="out_kernel"),
    "gla_dstates": _gla("*bf16 *bf16 *bf16 *fp32 *fp32 *fp32 i32 i32 fp32", "K V BK BV", kernel="dstates_kernel"),
    "gla_dscores": _gla("*bf16 *bf16 *bf16 i32 i32 fp32", "V BV", kernel="dscores_kernel"),
    "gla_dv": _gla("*bf16 *bf16 *bf16 *bf16 *fp32 *bf16 i32 i32 fp32", "K V BK BV", kernel="dv_kernel"),
    "gla_dqk": _gla(
        "*bf16 *bf16 *bf16 *bf16 *bf16 *fp32 *fp32 *bf16 *bf16 *bf16 *bf16 i32 i32 fp32", "K V BK BV",
        kernel="dqk_kernel", num_warps=8, block=32,
    ),
    "merge": Case(
        module="triton_ring", kernel="merge_kernel", types="*bf16 *fp32 *bf16 *fp32 *bf16 *fp32 i32 i32",
        constants={"ROWS": 32, "D": 128},
    ),
    "quantize": Case(
        module="triton_quantize", kernel="quantize_kernel", types="*bf16 *i8 *fp32 i32 i32",
        constants={"QMAX": 7.0, "INT4": True, "ROWS": 16, "BLOCK": 256},
    ),
    "dequantize_sum": Case(
        module="triton_quantize", kernel="dequantize_sum_kernel", types="*i8 *fp32 *bf16 i32 i32 i32",
        constants={"INT4": True, "ROWS": 16, "BLOCK": 256}, num_warps=4,
    ),
    "swap": Case(
        module="triton_exchange", kernel="swap_kernel", types="*bf16 *bf16 i32 i32 i32",
        constants={"ROWS": 4, "BLOCK": 1024}, num_warps=4,
    ),
    "moe_gather": Case(
        module="triton_exchange", kernel="gather_kernel", types="*bf16 *i64 *bf16 i32 i32 i32",
        constants={"ROWS": 4, "BLOCK": 1024}, num_warps=4,
    ),
    "moe_combine": Case(
        module="triton_exchange", kernel="combine_kernel", types="*bf16 *i64 *fp32 *bf16 i32 i32",
        constants={"BLOCK": 1024}, num_warps=4,
    ),
    "moe_split": Case(
        module="triton_exchange", kernel="split_kernel", types="*bf16 *bf16 *i64 *fp32 *bf16 *fp32 i32 i32",
        constants={"BLOCK": 1024}, num_warps=4,
    ),
    "lstm": Case(
        module="triton_lstm", kernel="forward_lstm_kernel",
        types="*bf16 *bf16 *bf16 *fp32 *bf16 *fp32 *bf16 i32 i32 i32", constants={"B": 16, "D": 64}, num_warps=4,
    ),
    "lstm_backward": Case(
        module="triton_lstm", kernel="backward_lstm_kernel",
        types="*bf16 *fp32 *bf16 *fp32 *fp32 *bf16 *bf16 *fp32 *fp32 i32 i32 i32", constants={"B": 16, "D": 64},
        num_warps=4,
    ),
    "slstm": Case(
        module="triton_slstm", kernel="forward_slstm_kernel",
        types="*bf16 *bf16 *bf16 *fp32 *fp32 *fp32 *bf16 *fp32 *fp32 *fp32 *bf16 i32 i32 i32",
        constants={"B": 16, "D": 64}, num_warps=4,
    ),
    "slstm_backward": Case(
        module="triton_slstm", kernel="backward_slstm_kernel",
        types="*bf16 *fp32 *fp32 *bf16 *fp32 *fp32 *fp32 *fp32 *bf16 *bf16 *fp32 *fp32 *fp32 i32 i32 i32",
        constants={"B": 16, "D": 64}, num_warps=4,
    ),
}  # fmt: skip


def compile_case(case: Case, arch: int) -> dict[str, int]:
    """Resources of `case` on `arch`; raises what Triton or ptxas raise."""
    kernel = getattr(importlib.import_module(f"planner.kernels.{case.module}"), case.kernel)
    types = iter(case.types.split())
    signature = {n: "constexpr" if n in case.constants else next(types) for n in kernel.arg_names}
    aligned = [i for i, n in enumerate(kernel.arg_names) if signature[n][0] in "*i" and n not in case.unaligned]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=case.constants, attrs=attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return {**_inspect(built.asm["cubin"], arch), "shared": built.metadata.shared}


def _inspect(cubin: bytes, arch: int) -> dict[str, int]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        sass = _output(tools / "nvdisasm", "-c", "-ndf", file.name)  # without data flow
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "stack": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "vector_loads": len(re.findall(r"LDG\.E\.\S*128|LDGSTS\.E\.\S*128|UTMALDG", sass)),
        "matrix": len(re.findall(MATRIX[arch], sass)),
        "hmma": len(re.findall(MATRIX[80], sass)),
    }


def _output(*command: object) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


def compile_named(job: tuple[str, int]) -> dict[str, int]:
    """`compile_case` of a case by its name."""
    return compile_case(CASES[job[0]], job[1])


if __name__ == "__main__":
    jobs = list(itertools.product(sys.argv[1:] or CASES, ARCHITECTURES))
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        built = dict(zip(jobs, pool.map(compile_named, jobs), strict=True))
    names = dict.fromkeys(name for name, _ in jobs)
    print(json.dumps({name: {label: built[name, a] for a, label in ARCHITECTURES.items()} for name in names}))
