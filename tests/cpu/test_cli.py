"""The command line on model files: the whole way from model.py to a plan, and models that cannot be planned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from planner.files import read_plan
from planner.profiler.graph_io import decode_graph

JOB = ["--gpus", "8", "--global-batch", "32"]
COMMAND = [sys.executable, "-c", "import sys; from planner.cli import entry; sys.exit(entry())"]
HEAD = "import torch\nfrom torch import nn\n"
MODEL = HEAD + (
    "SEQ_LEN = 64\nGLOBAL_BATCH_SIZE = 32\nprint('hello from the model')\n"
    "class Block(nn.Module):\n"
    "    def __init__(self):\n        super().__init__()\n"
    "        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)\n"
    "    def forward(self, x):\n        return x + self.down(torch.relu(self.up(x)))\n"
    "class Model(nn.Module):\n"
    "    def __init__(self):\n        super().__init__()\n"
    "        self.tokens = nn.Embedding(512, 64)\n"
    "        self.blocks = nn.ModuleList(Block() for _ in range(4))\n"
    "        self.head = nn.Linear(64, 512)\n"
    "    def forward(self, tokens):\n        x = self.tokens(tokens)\n"
    "        for block in self.blocks:\n            x = block(x)\n        return self.head(x)\n"
    "def build_model():\n    return Model()\n"
)


def planner(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *args], cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_from_a_model_file_to_a_checked_plan(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    done = planner(tmp_path, "search", "model.py", "--gpus", "8", "--save-graph", "g.json", "--format", "json")
    assert done.returncode == 0, done.stderr
    assert "not a sandbox" in done.stderr and "hello" not in done.stdout + done.stderr
    found = json.loads(done.stdout)
    plan = read_plan(tmp_path / "plan.json")
    assert found["step_s"] == plan.predicted.step_s and found["gap_frac"] <= 0.01
    assert plan.inputs.global_batch_size == 32 and plan.inputs.seq_len == 64
    held = [path for stage in plan.stages for path in stage.modules]
    assert held == [f"blocks.{i}" for i in range(4)]
    assert "tokens.weight" in plan.stages[0].prologue and "head.weight" in plan.stages[-1].epilogue
    assert plan.inputs.graph == decode_graph((tmp_path / "g.json").read_bytes())
    checked = planner(tmp_path, "check", "plan.json", "--model", "model.py", "--cluster", "h100")
    assert checked.returncode == 0, checked.stderr
    (tmp_path / "model.py").write_text(MODEL.replace("256", "128"))
    stale = planner(tmp_path, "check", "plan.json", "--model", "model.py", "--quiet")
    assert stale.returncode == 4 and "search again" in stale.stderr and len(stale.stderr.splitlines()) == 1


def test_a_model_has_one_plan_file_whatever_the_process_hashes_to(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    found = []
    for seed in ("1", "2", "3"):
        args = ["search", "model.py", "--gpus", "8", "-o", f"{seed}.json", "--quiet"]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([*COMMAND, *args], cwd=tmp_path, env=environment, timeout=120, check=True, capture_output=True)
        found.append((tmp_path / f"{seed}.json").read_bytes())
    assert found[0] == found[1] == found[2]


BAD = {
    "does not import": ("import no_such_package\n", "no_such_package"),
    "no model": ("x = 1\n", "build_model"),
    "hangs": ("while True:\n    pass\n", "not traced within 4 s"),
    "calls cuda": (HEAD + "def build_model():\n    return nn.Linear(8, 8).cuda()\n", "CUDA"),
    "cannot be traced": (HEAD + "def build_model():\n    return nn.Sequential(nn.Linear(8, 9), nn.Linear(8, 8))\n",
                         "example_batch"),
    "exits": ("import sys\nsys.exit(0)\n", "sys.exit"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_model_files_end_in_one_line(tmp_path: Path, case: str) -> None:
    code, words = BAD[case]
    (tmp_path / "model.py").write_text(code)
    limit = "4" if case == "hangs" else "60"
    done = planner(tmp_path, "search", "model.py", *JOB, "--trace-limit", limit, "--quiet")
    assert done.returncode == 2 and done.stdout == ""
    assert words in done.stderr and len(done.stderr.splitlines()) == 1
    assert [name for name in os.listdir(tmp_path) if name != "__pycache__"] == ["model.py"]
