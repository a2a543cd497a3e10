"""Every Triton kernel compiles for A100, Hopper and Blackwell within its budget."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Most registers per thread, shared and stack bytes (0: no spills); fewest 128-bit loads; the `matrix` kind."""

    registers: int
    shared: int = 4096
    stack: int = 0
    vector_loads: int = 1
    matrix: str = ""


BUDGETS = {
    "ce_stats": Budget(registers=64),
    "ce_grad": Budget(registers=40),
    "ce_combine": Budget(registers=40),
    "rms_norm": Budget(registers=64),
    "add_rms_norm": Budget(registers=128),
    "rms_norm_backward": Budget(registers=128, shared=16384),
    "swiglu": Budget(registers=40),
    "swiglu_backward": Budget(registers=64),
    "rope": Budget(registers=96),
    "ring_span": Budget(registers=64),
    "ring_step": Budget(registers=224, shared=114_000, matrix="matrix"),
    "ring_dq": Budget(registers=224, shared=120_000, matrix="matrix"),
    "ring_dkv": Budget(registers=255, shared=140_000, matrix="matrix"),
    "gla_states": Budget(registers=255, shared=65_000, matrix="matrix"),
    "gla_scores": Budget(registers=255, shared=36_000, matrix="matrix"),
    "gla_out": Budget(registers=144, shared=80_000, matrix="matrix"),
    "gla_dstates": Budget(registers=255, shared=65_000, matrix="matrix"),
    "gla_dscores": Budget(registers=160, shared=36_000, matrix="matrix"),
    "gla_dv": Budget(registers=255, shared=80_000, matrix="matrix"),
    "gla_dqk": Budget(registers=255, shared=66_000, matrix="matrix"),
    "merge": Budget(registers=64),
    "swap": Budget(registers=64),
    "moe_gather": Budget(registers=64),
    "moe_combine": Budget(registers=64),
    "moe_split": Budget(registers=64),
    "quantize": Budget(registers=64),
    "lstm": Budget(registers=128, shared=60_000, matrix="hmma"),  # tiles of 16 rows are too small for wgmma
    "lstm_backward": Budget(registers=128, shared=90_000, matrix="hmma"),
    "slstm": Budget(registers=160, shared=60_000, matrix="hmma"),
    "slstm_backward": Budget(registers=160, shared=90_000, matrix="hmma"),
    "dequantize_sum": Budget(registers=64, shared=16384),
}


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, dict[str, int]]]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    gate = Path(__file__).with_name("compile_gate.py")
    done = subprocess.run(
        [sys.executable, gate], env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_has_a_budget(compiled: dict[str, object]) -> None:
    """Each @triton.jit kernel that a launcher starts is a case, each case has a budget, none is left over."""
    assert set(compiled) == set(BUDGETS)
    sources = (Path(__file__).parents[3] / "kernels").glob("triton_*.py")
    kernels = {line.split("def ")[1].split("(")[0] for f in sources for line in f.read_text().splitlines()
               if line.startswith("def ") and line.split("(")[0].endswith("_kernel")}  # fmt: skip
    cases = Path(__file__).with_name("compile_gate.py").read_text()
    assert all(f'kernel="{kernel}"' in cases for kernel in kernels), kernels


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
@pytest.mark.parametrize("kernel", BUDGETS)
def test_within_budget(compiled: dict[str, dict[str, dict[str, int]]], kernel: str, arch: str) -> None:
    found, budget = compiled[kernel][arch], BUDGETS[kernel]
    assert found["registers"] <= budget.registers, found
    assert found["stack"] <= budget.stack, found
    assert found["shared"] <= budget.shared, found
    assert found["vector_loads"] >= budget.vector_loads, found
    assert not budget.matrix or found[budget.matrix] > 0, found
