"""Pipeline schedules in closed form: step time and in-flight activations, for one plan or 1e5 at once.

F, B, W of a rank are its seconds per micro-batch, summed over its chunks: forward, input gradient, weight
gradient; T = F + B + W. P pipeline ranks, v chunks per rank, m micro-batches. The time of a pipeline is its
makespan: from the first forward to the last action of the last rank, optimizer and communication left out.
Every form is exact for even ranks; `pipeline_s` says what it is for uneven ones, and costmodel/simulate.py is
the truth that tests/null/test_pipeline.py compares it with.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
Row = tuple[FloatArray, FloatArray, FloatArray, FloatArray]


class ScheduleKind(StrEnum):
    """In which order a rank runs its forwards and backwards."""

    ONE_F_ONE_B = "1f1b"
    INTERLEAVED = "interleaved"
    ZB_H1 = "zb_h1"
    ZB_V = "zb_v"
    GPIPE = "gpipe"


def schedule_problem(kind: ScheduleKind, pp: int, vpp: int, num_microbatches: int) -> str | None:
    """Why this schedule cannot be used, in one line, or None."""
    m = num_microbatches
    chunks = {ScheduleKind.ZB_V: 2}.get(kind, 1)
    if pp < 1 or m < 1:
        return f"pp = {pp} and num_microbatches = {m} must both be at least 1"
    if kind is ScheduleKind.INTERLEAVED:
        if pp < 2 or vpp < 2:
            return f"interleaved needs pp >= 2 and vpp >= 2, got pp = {pp}, vpp = {vpp}"
        return f"interleaved needs num_microbatches % pp = 0, got {m} % {pp} = {m % pp}" if m % pp else None
    if vpp != chunks:
        return f"{kind.value} has vpp = {chunks}, got vpp = {vpp}"
    if kind in (ScheduleKind.ZB_H1, ScheduleKind.ZB_V) and pp < 2:
        return f"{kind.value} needs pp >= 2, got pp = {pp}"
    if kind is ScheduleKind.ZB_V and m < 2 * pp:
        return f"zb_v needs num_microbatches >= 2 pp, got {m} < {2 * pp}"
    return None


def torch_problem(kind: ScheduleKind, pp: int, num_microbatches: int) -> str | None:
    """Why torch.distributed.pipelining refuses a schedule that the cost model allows, or None."""
    if kind is ScheduleKind.ONE_F_ONE_B and num_microbatches < pp:
        return f"torch's Schedule1F1B needs num_microbatches >= pp, got {num_microbatches} < {pp}"
    return None


def rows(kind: ScheduleKind, m: ArrayLike, p: ArrayLike, v: ArrayLike) -> list[Row]:
    """Rows (a, cF, cB, cW): time = max over rows of a max_k T_k + sum_k (cF F_k + cB B_k + cW W_k).

    m, p, v broadcast together and give arrays of their common shape.
    1F1B, (m-1) max T + sum T: Alpa (Zheng et al. 2022, arXiv 2201.12023), equation 2.
    Interleaved, bubble (p-1) T / v: Narayanan et al. 2021 (arXiv 2104.04473), section 2.2.
    ZB-H1 and ZB-V: m max T + fill, with the fill a count of mean F, B and W (`_zb_h1_fill`, `_zb_v_fill`);
    every fill has a row without negative counts, and some rows have negative cB or cW.
    ValueError for gpipe, whose time is not of this form.
    """
    m, p, v = np.broadcast_arrays(np.asarray(m, float), np.asarray(p, float), np.asarray(v, float))
    one, zero = np.ones_like(m), np.zeros_like(m)
    if kind is ScheduleKind.ONE_F_ONE_B:
        return [(m - one, one, one, one)]
    if kind is ScheduleKind.INTERLEAVED:
        return [(m - 1 / v, 1 / v, 1 / v, 1 / v)]
    if kind is ScheduleKind.GPIPE:
        raise ValueError("gpipe: its time, (m-1)(max F + max(B+W)) + sum T, has no rows in max T")
    fills = _zb_h1_fill(m, p) if kind is ScheduleKind.ZB_H1 else _zb_v_fill(p)
    return [(m + zero, f / p + zero, b / p + zero, w / p + zero) for f, b, w in fills]


def _zb_h1_fill(m: FloatArray, p: FloatArray) -> list[tuple[FloatArray, FloatArray, FloatArray]]:
    """Time beyond m T of ZB-H1 on even ranks, as counts (F, B, W): the largest of three paths.

    For m >= p it is (p-1) max(F + B - W, F, B). The first path is that of Qi et al. 2023 (arXiv 2401.10241,
    table 2), which ends with rank 0's last B. The others win where W > B or W > F.
    """
    q, short = p - 1, np.maximum(p - m, 0)
    return [(q, q, 1 - np.minimum(m, p)), (q, short, 0 * q), (short, q, 0 * q)]


def _zb_v_fill(p: FloatArray) -> list[tuple[FloatArray, FloatArray, FloatArray]]:
    """Time beyond m T of the handcrafted ZB-V on even ranks with even chunks, as counts (F, B, W), m >= 2p.

    With F = B = W it is (p-1) T / 6: the last rank starts and ends that much later (Qi et al. 2023, arXiv
    2401.10241, section 6). The other ratios of F:B:W give eight paths, read off the simulator (every longest
    path of 120 random ratios for p = 2, 3, 4) and confirmed on 1,500 random (p <= 11, m, F:B:W) to 1e-14.
    """
    q, zero = p - 1, 0 * p
    chunks = [
        (zero, zero + 1, q - 1),
        (zero, q, zero),
        (zero, 2 * q, -2 * q),
        (zero + 1, zero, q - 1),
        (2 * q - 1, 1 - q, zero),
        (2 * q - 1, zero + 1, -2 * q),
        (2 * q, -q, zero - 1),
        (2 * q, zero, -2 * q - 1),
    ]
    return [(f / 2, b / 2, w / 2) for f, b, w in chunks]


def pipeline_s(
    kind: ScheduleKind,
    fwd_s: ArrayLike,
    bwd_input_s: ArrayLike,
    bwd_weight_s: ArrayLike,
    m: ArrayLike,
    v: ArrayLike,
    extra_s: ArrayLike = 0.0,
    end_s: ArrayLike = 0.0,
) -> FloatArray:
    """Seconds of the pipeline part of a step; the time arrays are (..., P), m and v broadcast over (...).

    `extra_s` (..., P) is recomputation and offload: it lengthens the input gradient. In the fill it counts where
    B has a positive count and is left out where the count is negative, so that recomputing more never pays.
    `end_s` (..., P) is the part of a rank's time that lies in one of its chunks alone (embedding, head). Interleaved
    ranks pass through their chunks together, so a round lasts sum_c max_k of the chunks' times: beside the v chunks of
    the slowest rank, what an end's chunk takes longer than those.
    Exact for gpipe, and for even ranks with even chunks. For uneven ranks (within 2x, chunks of a rank equal,
    m >= 2p) it is mostly too long, since the fill counts every rank as if the slowest came last: measured
    against the simulator +1 to +3 % on average, +10 % at most. If F:B:W is one ratio for all ranks, 1F1B and
    interleaved are never too short, ZB-H1 and ZB-V by 0.3 and 1.3 % at most. If F, B and W vary on their own
    within 2x, interleaved and ZB-H1 are too short by up to 4 %, ZB-V by 8 %. Unequal chunks in a rank are not
    seen from rank totals (interleaved with 3 or 4 layers a chunk: up to 12 % too short): simulate those.
    """
    f, b, w, x = np.broadcast_arrays(*(np.asarray(t, float) for t in (fwd_s, bwd_input_s, bwd_weight_s, extra_s)))
    total = f + b + w + x
    if kind is ScheduleKind.GPIPE:
        slowest = f.max(axis=-1) + (b + w + x).max(axis=-1)
        return np.asarray((np.asarray(m, float) - 1) * slowest + total.sum(axis=-1))
    top = total.max(axis=-1)
    if kind is ScheduleKind.INTERLEAVED:
        end, chunks = np.broadcast_to(np.asarray(end_s, float), total.shape), np.asarray(v, float)[..., None]
        chunk = (total - end) / chunks
        longest = chunk.max(axis=-1, keepdims=True)
        late = np.where(end > 0, np.maximum(chunk + end - longest, 0.0), 0.0)
        top = (chunks * longest)[..., 0] + late.sum(axis=-1)
    sum_f, sum_b, sum_w, sum_x = (t.sum(axis=-1) for t in (f, b, w, x))
    times = [
        a * top + c_f * sum_f + c_b * sum_b + c_w * sum_w + np.maximum(c_b, 0.0) * sum_x
        for a, c_f, c_b, c_w in rows(kind, m, f.shape[-1], v)
    ]
    return np.asarray(np.max(np.stack(np.broadcast_arrays(*times)), axis=0))


def in_flight_array(kind: ScheduleKind, m: ArrayLike, p: ArrayLike, v: ArrayLike, k: ArrayLike) -> FloatArray:
    """Peak number of whole-micro-batch activations alive on rank k; m, p, v, k broadcast together.

    In units of the rank's activation bytes per micro-batch, its chunks being equal (costmodel/simulate.py
    takes the bytes of each chunk). Alive from the start of F to the end of W: that B frees nothing is
    conservative, since only the inputs of weight gradients must wait for W. Interleaved: (v-1) p + 2 (p-k-1)
    + 1 chunks (Narayanan et al. 2021). ZB-H1 and ZB-V: p on every rank, which 1F1B has on its first (Qi et
    al. 2023, table 2 and section 6).
    """
    m, p, v, k = np.broadcast_arrays(*(np.asarray(x, float) for x in (m, p, v, k)))
    if kind is ScheduleKind.ONE_F_ONE_B:
        return np.asarray(np.minimum(m, p - k))
    if kind is ScheduleKind.INTERLEAVED:
        return np.asarray(np.minimum(m * v, (v - 1) * p + 2 * (p - k - 1) + 1) / v)
    return np.asarray(m if kind is ScheduleKind.GPIPE else np.minimum(m, p))


def in_flight(kind: ScheduleKind, m: int, p: int, v: int) -> FloatArray:
    """`in_flight_array` of every rank of one plan, shape (p,)."""
    return in_flight_array(kind, m, p, v, np.arange(p))
