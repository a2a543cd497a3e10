"""Kernels over two gloo ranks, in processes of their own (two_ranks.py says what has to hold)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_collectives_and_sharding_rules(tmp_path: Path) -> None:
    script = Path(__file__).with_name("two_ranks.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, tmp_path], env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
