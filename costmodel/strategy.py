"""PlanSpec: the decisions of a plan as one small value. What they cost lives elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from planner.costmodel.pipeline import ScheduleKind

RECOMPUTE_KINDS = ("none", "selective", "full")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStrategy:
    """One layer's decision: what is recomputed in backward, and whether its activations live on the host."""

    recompute: str
    offload_activations: bool = False


# The declared choice per layer, in the order that every array over strategies uses.
STRATEGIES: tuple[LayerStrategy, ...] = tuple(
    LayerStrategy(recompute=kind, offload_activations=offload)
    for offload in (False, True)
    for kind in RECOMPUTE_KINDS
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSpec:
    """Every decision of a plan.

    Mesh axes, outermost first: pp, dp_replicate, dp_shard, ring, ulysses, tp (order is data: it decides which
    links carry what). `zero_stage` shards over dp_shard x cp. `ep` shards experts over the data and context
    ranks (next to tp). `stage_layers[s]` is the half-open layer range of virtual stage s, in pipeline order;
    pipeline rank of stage s: s % pp (interleaved), or the V of zb_v. `layers[i]` is layer i's strategy.
    `chunked_loss`: head and loss are one op that makes the logits a chunk of rows at a time, and keeps none.
    """

    tp: int = 1
    sequence_parallel: bool = False
    pp: int = 1
    vpp: int = 1
    schedule: ScheduleKind = ScheduleKind.ONE_F_ONE_B
    dp_replicate: int = 1
    dp_shard: int = 1
    zero_stage: int = 0
    ulysses: int = 1
    ring: int = 1
    ep: int = 1
    micro_batch_size: int = 1
    global_batch_size: int
    vocab_parallel: bool = False
    chunked_loss: bool = False
    offload_optimizer: bool = False
    stage_layers: tuple[tuple[int, int], ...]
    layers: tuple[LayerStrategy, ...]

    @property
    def cp(self) -> int:
        """Context-parallel degree."""
        return self.ulysses * self.ring

    @property
    def dp(self) -> int:
        """Data-parallel degree."""
        return self.dp_replicate * self.dp_shard

    @property
    def num_gpus(self) -> int:
        """GPUs of the mesh."""
        return self.pp * self.dp * self.cp * self.tp

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of one optimizer step."""
        return self.global_batch_size // (self.dp * self.micro_batch_size)

    def rank_of(self, stage: int) -> int:
        """Pipeline rank that holds virtual stage `stage`."""
        if self.schedule is ScheduleKind.ZB_V:
            return min(stage, 2 * self.pp - 1 - stage)
        return stage % self.pp

    def rank_layers(self, rank: int) -> tuple[int, ...]:
        """Layer indices on pipeline rank `rank`, in order."""
        return tuple(
            layer
            for stage, (first, last) in enumerate(self.stage_layers)
            if self.rank_of(stage) == rank
            for layer in range(first, last)
        )
