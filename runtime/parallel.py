"""Parallel: a model under a plan on one rank; forward of its stages, gradients of a step, the step itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from planner.costmodel.graph import ModelGraph
from planner.costmodel.strategy import PlanSpec
from planner.runtime import zero
from planner.runtime.chain import Chain, StageDone
from planner.runtime.errors import RuntimePlanError
from planner.runtime.experts import Moe
from planner.runtime.head import HeadReached, chunked_loss
from planner.runtime.layers import mark_parameters
from planner.runtime.mesh import Mesh
from planner.runtime.optimizer import Owned, ShardedAdamW
from planner.runtime.rules import ShardMode
from planner.runtime.rules_math import summed_loss
from planner.runtime.sharded import SEQ, Context, Cut, Sharded, Split, place, take, wrap

IGNORE_INDEX = -100
Loss = Callable[[Any, torch.Tensor], torch.Tensor]


def next_token_loss(output: Any, labels: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of the cross-entropy of an output's logits; labels are already shifted."""
    logits, labels = logits_of(output).flatten(0, 1), labels.flatten()
    if isinstance(logits, Sharded) or isinstance(labels, Sharded):
        return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")  # its rule
    return summed_loss(logits, labels, IGNORE_INDEX)


def logits_of(output: Any) -> torch.Tensor:
    """The logits in a model's output: what is called so, else its first tensor of real numbers."""
    named: torch.Tensor | None = getattr(output, "logits", None)
    if named is not None:
        return named
    return next(x for x in tree_leaves(output) if isinstance(x, torch.Tensor) and x.is_floating_point())


@dataclass(frozen=True, slots=True)
class StepResult:
    """Loss per token of the whole batch, the gradient's norm before clipping, and the tokens."""

    loss: float
    grad_norm: float
    num_tokens: int


@dataclass(slots=True)
class Parallel:
    """A model under a plan on this rank."""

    model: nn.Module
    spec: PlanSpec
    graph: ModelGraph
    mesh: Mesh
    ctx: Context
    chain: Chain
    cuts: dict[str, Cut]
    loss: Loss
    device: torch.device
    input_name: str
    original: Callable[..., Any]  # the model's own forward
    full_shapes: dict[str, tuple[int, ...]]
    owned: list[Owned] = field(default_factory=list)
    slots: list[tuple[nn.Module, str, Cut]] = field(default_factory=list)
    places: list[tuple[nn.Module, str, str]] = field(default_factory=list)  # slot -> name
    moe: dict[str, Moe] = field(default_factory=dict)  # routed parameter -> its block
    schedule: Any = None
    optimizer: ShardedAdamW | None = None
    dtype: torch.dtype | None = None  # of activations, when not that of the parameters
    scale: int = 1  # tokens of the batch that the pipeline is working on
    packs: bool = False  # micro-batches are packed documents (groups.py)
    head: nn.Linear | None = None  # of the chunked loss
    norms: int = 0  # RMSNorms that the kernel op runs
    gated_mlps: int = 0  # the same of SwiGLU
    plain_loss: str = ""  # why the loss is the plain one although the plan has the chunked one

    @property
    def uses_rules(self) -> bool:
        """Whether tensors are cut inside the model (TP, context parallelism or packed documents)."""
        return self.spec.tp > 1 or self.spec.cp > 1 or self.packs

    @property
    def moe_blocks(self) -> list[Moe]:
        """Every block with routed parameters, once."""
        return list({id(moe): moe for moe in self.moe.values()}.values())

    def expert_offset(self, item: Owned) -> int:
        """First expert of this rank in a parameter that stacks experts; 0 for any other."""
        moe = self.moe.get(item.name)
        if moe is None or moe.experts is not None:
            return 0
        return self.expert_rank * moe.num_experts // self.spec.ep

    @property
    def expert_rank(self) -> int:
        """Which part of the experts this rank holds."""
        return self.mesh.position["data"] % self.spec.ep

    def residual_shape(self, shape: tuple[int, ...]) -> list[int]:
        """Local shape of a residual-stream tensor of this whole shape."""
        local = list(shape)
        for s in self.ctx.residual(shape):
            local[s.dim] = local[s.dim] // s.units * len(self.ctx.held(s.axis, s.units))
        return local

    def handed_on(self, layer: int) -> tuple[int, ...]:
        """Whole shape of what `layer` hands on: that of the dry pass, as long as packed documents are now."""
        size = self.chain.shapes[layer].size
        if self.ctx.packed is None:
            return size
        at = place(size, 1, Split(0, SEQ, self.ctx.seq_len)).dim
        return (*size[:at], size[at] // self.ctx.seq_len * self.ctx.packed.length, *size[at + 1 :])

    # ---- one micro-batch

    def shard_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids or labels (micro-batch, sequence) as the model sees them."""
        axis = self.ctx.seq_axis
        if not axis:
            return tokens
        split = Split(1, axis, self.ctx.units(axis))
        if self.ctx.packed is not None:  # this rank's own already
            mine = tokens if axis == SEQ else tokens.chunk(self.spec.tp, 1)[self.ctx.tp_rank]
            return Sharded(mine, (split,), self.ctx, tokens)
        wide = take(tokens, 1, Split(1, SEQ, self.ctx.units(SEQ)), self.ctx) if self.spec.cp > 1 else tokens
        return Sharded(take(tokens, 1, split, self.ctx), (split,), self.ctx, wide)

    def run(
        self, stage: int, received: torch.Tensor | None, tokens: torch.Tensor, labels: torch.Tensor | None
    ) -> torch.Tensor:
        """Forward of a virtual stage: its local output activation, or on the last one the loss's token sum."""
        return self.model(stage, received, tokens, labels)

    def _forward(
        self, stage: int, received: torch.Tensor | None, tokens: torch.Tensor, labels: torch.Tensor | None
    ) -> torch.Tensor:
        """What the model's forward is replaced by: plain local tensors at its edge, for FSDP's hooks."""
        first, last = self.spec.stage_layers[stage]
        whole = received
        if received is not None:
            whole = wrap(received, self.ctx.residual(self.handed_on(first - 1)), self.ctx)
        self.ctx.skip_embedding, self.ctx.column = first > 0, None
        mark_parameters(self.slots)
        with ShardMode(self.ctx) if self.uses_rules else nullcontext(), self.chain.only(first, last, whole):
            try:
                output = self.original(**{self.input_name: self.shard_tokens(tokens)})
            except StageDone as done:
                hidden = done.hidden
                return hidden.local if isinstance(hidden, Sharded) else hidden
            except HeadReached as reached:
                assert self.head is not None and labels is not None
                self.ctx.column = None
                return chunked_loss(self.ctx, reached.hidden, self.head.weight, self.shard_tokens(labels))
            assert labels is not None
            self.ctx.column = None  # the head's input is autograd's to keep
            return self.loss(output, self.shard_tokens(labels))

    # ---- one step

    def step(self, tokens: torch.Tensor, labels: torch.Tensor, lr: float | None = None) -> StepResult:
        """One optimizer step on this rank's sequences, (num_microbatches * micro_batch_size, seq_len) each."""
        assert self.optimizer is not None
        total, count = self.backward(tokens, labels)
        self.optimizer.sync()
        norm = self.optimizer.step(lr)
        return StepResult(total, norm, count)

    def backward(self, tokens: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
        """Gradients of the mean loss over all tokens of the global batch; (that loss, number of tokens)."""
        spec, m = self.spec, self.spec.num_microbatches
        if tokens.shape[0] != m * spec.micro_batch_size or labels.shape != tokens.shape:
            raise RuntimePlanError(
                f"a step needs {m} x {spec.micro_batch_size} sequences on this rank, got {tokens.shape[0]} "
                f"with labels {tuple(labels.shape)}"
            )
        counted = (labels != IGNORE_INDEX).sum().to(torch.float64).to(self.device)
        dist.all_reduce(counted, group=self.mesh.data)
        count = int(counted.item()) // spec.cp
        if not count:
            raise RuntimePlanError("no token of this batch has a label: nothing to learn from")
        if spec.pp > 1:
            total = self._pipeline(tokens, labels, count)
        else:
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            for i, (x, y) in enumerate(zip(tokens.chunk(m), labels.chunk(m), strict=True)):
                zero.before_backward(self.model, spec, last=i == m - 1)
                loss = self.run(0, None, x, y) / count
                total += loss.detach()
                loss.backward()
        dist.all_reduce(total, group=self.mesh.data)
        return float(total), count

    def _pipeline(self, tokens: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor:
        spec = self.spec
        zero.before_backward(self.model, spec, last=False)
        losses: list[torch.Tensor] = []
        self.scale = count
        last = spec.rank_of(len(spec.stage_layers) - 1) == self.mesh.position["pp"]
        target = labels if last else None
        into = losses if last else None
        self.schedule.step(tokens=tokens, labels=labels, target=target, losses=into, return_outputs=False)
        zero.reduce_now(self.model)
        total = torch.stack([x.detach() for x in losses]).sum().double() if last else torch.zeros(())
        total = total.to(torch.float64).to(self.device)
        dist.all_reduce(total, group=self.mesh.pp)
        return total
