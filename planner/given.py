"""A layout that the user gives by degrees, as a PlanSpec: dp fills the mesh, layers are spread evenly. No I/O."""

from __future__ import annotations

from dataclasses import dataclass

from planner.costmodel.graph import ModelGraph
from planner.costmodel.pipeline import ScheduleKind, schedule_problem
from planner.costmodel.strategy import RECOMPUTE_KINDS, LayerStrategy, PlanSpec
from planner.errors import UserError

RECOMPUTES = RECOMPUTE_KINDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """Degrees and options; dp is what is left of the GPUs."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ulysses: int = 1
    ring: int = 1
    ep: int = 1
    dp_replicate: int = 1
    zero_stage: int = 1
    micro_batch_size: int = 1
    schedule: str | None = None
    sp: bool = False
    vocab_parallel: bool = False
    chunked_loss: bool = False
    recompute: str = "none"
    offload_activations: bool = False
    offload_optimizer: bool = False


def given_spec(given: Given, graph: ModelGraph, num_gpus: int, global_batch_size: int) -> PlanSpec:
    """The plan that `given` describes. UserError with the equation that does not come out even."""
    dp = _data_ranks(given, num_gpus)
    if global_batch_size % (dp * given.micro_batch_size):
        raise UserError(
            f"global batch {global_batch_size} is not a multiple of dp x micro-batch = {dp} x {given.micro_batch_size}"
        )
    kind = _schedule(given)
    problem = schedule_problem(kind, given.pp, _vpp(given, kind), global_batch_size // (dp * given.micro_batch_size))
    if problem:
        raise UserError(problem)
    # ZeRO 0 keeps whole copies, which is replication; a single data rank has nothing to shard over.
    alone = dp * given.ulysses * given.ring == 1
    zero = 0 if alone else given.zero_stage
    shard = 1 if zero == 0 else dp // given.dp_replicate
    strategy = LayerStrategy(recompute=given.recompute, offload_activations=given.offload_activations)
    return PlanSpec(
        tp=given.tp,
        sequence_parallel=given.sp,
        pp=given.pp,
        vpp=_vpp(given, kind),
        schedule=kind,
        dp_replicate=dp // shard,
        dp_shard=shard,
        zero_stage=zero,
        ulysses=given.ulysses,
        ring=given.ring,
        ep=given.ep,
        micro_batch_size=given.micro_batch_size,
        global_batch_size=global_batch_size,
        vocab_parallel=given.vocab_parallel,
        chunked_loss=given.chunked_loss,
        offload_optimizer=given.offload_optimizer,
        stage_layers=_even(graph.num_layers, given.pp * _vpp(given, kind)),
        layers=(strategy,) * graph.num_layers,
    )


def _data_ranks(given: Given, num_gpus: int) -> int:
    others = given.tp * given.pp * given.ulysses * given.ring
    if num_gpus % others:
        raise UserError(
            f"{num_gpus} GPUs are not a multiple of tp x pp x ulysses x ring = {given.tp} x {given.pp} x "
            f"{given.ulysses} x {given.ring} = {others}"
        )
    dp = num_gpus // others
    if dp % given.dp_replicate:
        raise UserError(f"dp = {dp} is not a multiple of dp_replicate = {given.dp_replicate}")
    return dp


def _schedule(given: Given) -> ScheduleKind:
    if given.schedule:
        return ScheduleKind(given.schedule)
    return ScheduleKind.INTERLEAVED if given.vpp > 1 else ScheduleKind.ONE_F_ONE_B


def _vpp(given: Given, kind: ScheduleKind) -> int:
    return 2 if kind is ScheduleKind.ZB_V else given.vpp


def _even(layers: int, stages: int) -> tuple[tuple[int, int], ...]:
    """Layers cut into `stages` runs whose lengths differ by one at most, the longer ones in the middle first.

    The ends hold embedding and head besides, so the stages furthest from them take the odd layers.
    """
    if layers < stages:
        raise UserError(f"{layers} layers cannot fill pp x vpp = {stages} stages")
    base, odd = divmod(layers, stages)
    middle = sorted(range(stages), key=lambda s: (abs(2 * s - stages + 1), s))[:odd]
    sizes = [base + (s in middle) for s in range(stages)]
    ends = [sum(sizes[: s + 1]) for s in range(stages)]
    return tuple((end - size, end) for end, size in zip(ends, sizes, strict=True))
