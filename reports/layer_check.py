"""A transformer layer of Megatron-LM on 8 A100 (Korthikanti et al. 2022, Table 4) from kernels and links alone.

A check, not a fit (only `compute.TRAINING_HEAT` was chosen with it in view): the calibrated constants against the
published times of one GPT-22B layer, fp16, TP 8, micro-batch 4. Traffic per element of a token's hidden vector, in
bytes: layer norm 4 forward and 6 backward, bias-dropout-add 7 and 5 (with its mask), bias-GeLU 4 and 6; attention is
unfused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from planner.costmodel.comm import all_gather_s, all_reduce_s, reduce_scatter_s
from planner.costmodel.compute import attention_s, gemm_s, memory_bound_s
from planner.costmodel.hardware import ClusterSpec

SOURCE = "Korthikanti 2022"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCheck:
    """One published row beside its prediction, seconds."""

    recompute: str
    sequence_parallel: bool
    forward_s: float
    forward_measured_s: float
    backward_s: float
    backward_measured_s: float


def check(path: Path, cluster: ClusterSpec) -> list[LayerCheck]:
    """The rows of layer_times.csv that time one whole layer."""
    table = pd.read_csv(path)
    table = table[table.source == SOURCE]
    found = []
    for row in table.itertuples(index=False):
        forward, backward, attention = _layer_s(
            cluster, row.hidden, row.heads, row.seq_len, row.micro_batch, row.tp, bool(row.megatron_sp)
        )
        redo = {"none": 0.0, "selective": attention, "full": forward}[str(row.recompute)]
        found.append(
            LayerCheck(
                recompute=str(row.recompute),
                sequence_parallel=bool(row.megatron_sp),
                forward_s=forward,
                forward_measured_s=row.fwd_ms * 1e-3,
                backward_s=backward + redo,
                backward_measured_s=row.bwd_ms * 1e-3,
            )
        )
    return found


def _layer_s(
    cluster: ClusterSpec, hidden: int, heads: int, seq_len: int, batch: int, tp: int, sp: bool
) -> tuple[float, float, float]:
    """(forward, backward, forward of attention alone) of a GPT layer with fused element-wise kernels."""
    device, tokens = cluster.device, batch * seq_len
    gemms = ((3 * hidden // tp, hidden), (hidden, hidden // tp), (4 * hidden // tp, hidden), (hidden, 4 * hidden // tp))
    forward = sum(float(gemm_s(device, "float16", 1, tokens, n, k)) for n, k in gemms)
    backward = sum(
        float(gemm_s(device, "float16", 1, tokens, k, n) + gemm_s(device, "float16", 1, k, n, tokens)) for n, k in gemms
    )
    core = [
        float(
            attention_s(
                device,
                "float16",
                batch=batch,
                q_heads=heads / tp,
                kv_heads=heads / tp,
                q_len=seq_len,
                kv_len=seq_len,
                head_dim_qk=hidden / heads,
                head_dim_v=hidden / heads,
                causal_fraction=0.5,
                implementation="unfused",
                backward=way,
            )
        )
        for way in (False, True)
    ]
    outer, inner = tokens * hidden / (tp if sp else 1), tokens * 4 * hidden / tp
    forward += core[0] + float(memory_bound_s(device, outer * 2 * (4 + 7) + inner * 4, 5))
    backward += core[1] + float(memory_bound_s(device, outer * 2 * (6 + 5) + inner * 6, 7))
    place = (cluster, (tp, tp), 2.0 * tokens * hidden, 1, tp)
    gather = float(all_gather_s(*place))
    once = gather + float(reduce_scatter_s(*place)) if sp else float(all_reduce_s(*place))
    # Backward gathers the input again for the weight gradient, which Megatron hides behind the other GEMM.
    return forward + 2 * once, backward + 2 * once, core[0]
