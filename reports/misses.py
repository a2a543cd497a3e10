"""Rows that miss by more than a quarter, by cause. A cause is a test on the row and a sentence; first match wins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from planner.reports.metrics import PATHOLOGICAL
from planner.reports.predict import Prediction

MISS = 0.25
# nanotron's runs above this share of the device's memory are 3 to 10 times slower than the rest of their group.
CROWDED_FRAC = 0.88


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """Why rows miss."""

    name: str
    applies: Callable[[Prediction], bool]
    why: str


def _nanotron(p: Prediction) -> bool:
    return p.case.engine.name == "nanotron"


def _across_nodes(p: Prediction) -> bool:
    return p.case.spec.num_gpus > p.case.cluster.node_size


CAUSES = (
    Cause(
        name="pathological by the data set's own note",
        applies=lambda p: PATHOLOGICAL in p.row.text("notes"),
        why="At most 5 % MFU. Most have pp > 1 over several nodes and lose 0.6 to 1.4 s per micro-batch whatever its "
        "size, more often with ZeRO 0 (torch DDP) than with ZeRO 1. No field of a row tells which: tp 2, pp 8, dp 2 "
        "under ZeRO 0 takes 0.05 s a micro-batch for 8B and 1.18 s for 3B on as many GPUs; tp 1, pp 4 under ZeRO 1 is "
        "normal for 1B on 32 and 128 GPUs and 30 times slower on 64. Not modelled.",
    ),
    Cause(
        name="memory nearly full",
        applies=lambda p: p.measured_bytes > CROWDED_FRAC * p.case.cluster.device.memory_bytes.value,
        why="The caching allocator frees and allocates again in every step. Such plans are called not fitting by the "
        "memory margin; their time is not predicted.",
    ),
    Cause(
        name="nanotron, tp and pp together over several nodes",
        applies=lambda p: _nanotron(p) and p.case.spec.tp > 1 and p.case.spec.pp > 1 and _across_nodes(p),
        why="Runs here are bound by the host: 10, 15, 25, 52 ms per layer and micro-batch at tp 2, 4, 8, 16 whatever "
        "the model, its depth or the micro-batch, where tp alone, pp alone and one node need 4.5. Modelled as a cost "
        "per collective and rank (`host_collective_crossing_s`); these rows also have stalls like the pathological "
        "ones, or tp across nodes.",
    ),
    Cause(
        name="nanotron on 256 or 512 GPUs",
        applies=lambda p: _nanotron(p) and p.case.spec.num_gpus > 128,
        why="Steps of 0.2 to 1 s whose gradient and weight collectives on EFA vary several-fold between equal plans.",
    ),
    Cause(
        name="tensor parallelism across nodes",
        applies=lambda p: p.case.spec.tp > p.case.cluster.node_size,
        why="Ring over the network at small messages; the link constants are interpolated there.",
    ),
    Cause(
        name="launch-bound",
        applies=lambda p: p.parts_s["launch"] > 0.15 * p.step_s,
        why="One host cost per op and engine; hosts and ops differ.",
    ),
    Cause(
        name="T4 cluster",
        applies=lambda p: "t4" in p.case.cluster.device.name,
        why="No kernel table and no link table for T4 and g4dn: power capping, sockets without peer access.",
    ),
    Cause(
        name="mixture of experts",
        applies=lambda p: p.row.text("arch") == "moe",
        why="Grouped GEMMs, dispatch kernels and their overlap change with every release; one engine stands for all.",
    ),
    Cause(name="other", applies=lambda p: True, why="Not explained."),
)


def by_cause(predictions: Sequence[Prediction]) -> list[tuple[Cause, list[Prediction]]]:
    """Missed rows by cause, in the order of CAUSES, causes without rows left out."""
    found: dict[str, list[Prediction]] = {cause.name: [] for cause in CAUSES}
    for p in predictions:
        if p.measured_s and abs(p.time_error) > MISS:
            found[next(cause.name for cause in CAUSES if cause.applies(p))].append(p)
    return [(cause, found[cause.name]) for cause in CAUSES if found[cause.name]]
