"""Compiles every Triton kernel for GPUs that are not here and prints what came out as JSON.

Run in a process of its own, without TRITON_INTERPRET: `python compile_gate.py`. Per kernel and architecture: registers
per thread, spilled bytes, shared memory, 128-bit global loads and matrix instructions, read from ptxas and from SASS.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

ARCHITECTURES = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}


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


CASES = {
    "ce_stats": Case(
        module="triton_ce", kernel="stats_kernel", types="*bf16 *i64 *fp32 i32 i32 i32", constants={"BLOCK": 4096}
    ),
    "ce_grad": Case(
        module="triton_ce", kernel="grad_kernel", types="*bf16 *bf16 *i64 *fp32 *fp32 i32 i32 i32 i32",
        constants={"BLOCK": 4096},
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
    return {**_resources(built.asm["ptx"], arch), **_instructions(built.asm["cubin"]), "shared": built.metadata.shared}


def _resources(ptx: str, arch: int) -> dict[str, int]:
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={ARCHITECTURES[arch]}", file.name, "-o", "/dev/null"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    numbers = {"registers": r"Used (\d+) registers", "stored": r"(\d+) bytes spill stores", "loaded": r"(\d+) bytes spill loads"}
    found = {name: int(re.search(pattern, text).group(1)) for name, pattern in numbers.items()}
    return {"registers": found["registers"], "spills": found["stored"] + found["loaded"]}


def _instructions(cubin: bytes) -> dict[str, int]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    return {
        "vector_loads": len(re.findall(r"LDG\.E\.\S*128|LDG\.E\.128|LDGSTS\.E\.\S*128|UTMALDG", sass)),
        "matrix": len(re.findall(r"\bHMMA|\bHGMMA|\bUTCHMMA|\bUTCMMA|\bOMMA|\bQMMA|\bIMMA|\bUTC\w*MMA", sass)),
    }


if __name__ == "__main__":
    wanted = sys.argv[1:] or list(CASES)
    print(json.dumps({name: {ARCHITECTURES[a]: compile_case(CASES[name], a) for a in ARCHITECTURES} for name in wanted}))
