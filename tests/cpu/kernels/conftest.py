"""Kernels run in Triton's interpreter here, which has to be asked for before triton is first imported."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def interpreted() -> Iterator[None]:
    """Triton's interpreter, repaired; skips without triton, fails where triton came in compiled."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    import interpreter_repair
    import triton

    assert triton.knobs.runtime.interpret, "triton was imported before TRITON_INTERPRET=1 was set; set it beforehand"
    interpreter_repair.apply()
    yield
