"""Mixed precision: float32 masters, bfloat16 compute, the loss of float32 to bfloat16's accuracy under every plan."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cases import _SP, _V, case, spec  # noqa: E402
from worlds import run_world  # noqa: E402


def test_bfloat16_over_float32_masters(tmp_path: Path) -> None:
    """Plans agree with each other within bfloat16 rounding (2**-8 relative), and masters stay float32."""
    plans = [spec(dp_shard=2, zero_stage=3), spec(pp=2), spec(tp=2, **_SP), spec(**_V)]
    plans.append(spec(dp_shard=2, zero_stage=2, micro_batch_size=2, chunked_loss=True))
    found = run_world(2, "precision_rank.run", [case("llama", p, tmp_path) for p in plans])
    reference = found[0][0][0]
    assert reference[-1] < 2 * reference[0]
    for losses, dtypes in found[0]:
        assert dtypes == ["torch.float32"]
        assert losses == pytest.approx(reference, rel=2**-8)
