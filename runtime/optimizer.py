"""AdamW on this rank's shards, on the device or on the host; gradient clipping over the whole mesh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from planner.runtime.mesh import Mesh
from planner.runtime.sharded import Cut
from planner.runtime.zero import local


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWConfig:
    """Hyperparameters of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) and of clipping (0 = none)."""

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0


def squares(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """Squared L2 norms, (N,) in float64 on the tensors' device: summed in float64 without a copy, nobody waits."""
    return torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads]) ** 2


@dataclass(slots=True)
class Owned:
    """A parameter of this rank: its canonical name, Cut, and whether the other end of the pipeline has it too."""

    name: str
    param: nn.Parameter
    cut: Cut
    tied: bool = False


@dataclass(slots=True)
class ShardedAdamW:
    """torch.optim.AdamW over the local shards. `offload` keeps masters, moments and the step on the host."""

    owned: list[Owned]
    mesh: Mesh
    config: AdamWConfig
    offload: bool
    masters: dict[str, nn.Parameter] = field(default_factory=dict)
    inner: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        for item in self.owned:
            shard = local(item.param).detach()
            self.masters[item.name] = nn.Parameter(shard.to("cpu", copy=True) if self.offload else shard)
        c = self.config
        self.inner = torch.optim.AdamW(
            list(self.masters.values()), lr=c.lr, betas=c.betas, eps=c.eps, weight_decay=c.weight_decay, fused=True
        )

    def sync(self) -> None:
        """Finish gradients: sums over TP ranks of partial ones, over sharers of KV heads, over tied ends."""
        spec = self.mesh.spec
        for item in self.owned:
            if item.param.grad is None:
                item.param.grad = torch.zeros_like(item.param)
            grad = local(item.param.grad)
            if spec.tp > 1 and item.cut.partial and not item.cut.kind:
                dist.all_reduce(grad, group=self.mesh.tp)
            if item.cut.kind and item.cut.units < spec.tp:
                dist.all_reduce(grad, group=self.mesh.tp_sharing(item.cut.units))
            if item.tied:
                dist.all_reduce(grad, group=self.mesh.ends)

    def _copies(self, item: Owned) -> int:
        """Ranks that hold the same shard of a parameter."""
        spec = self.mesh.spec
        tp = spec.tp // item.cut.units if item.cut.kind else spec.tp
        data = spec.dp * spec.cp
        if item.cut.routed:
            shards = spec.ep * (max(spec.dp_shard * spec.cp // spec.ep, 1) if spec.zero_stage else 1)
        else:
            shards = spec.dp_shard * spec.cp if spec.zero_stage else 1
        return tp * (data // shards) * (2 if item.tied else 1)

    def grad_norm(self) -> float:
        """L2 norm of the whole gradient, every element once."""
        found = squares([local(item.param.grad) for item in self.owned if item.param.grad is not None])
        total = (found / found.new_tensor([self._copies(item) for item in self.owned])).sum()
        dist.all_reduce(total)
        return float(total.sqrt())

    def publish(self) -> None:
        """Copy masters on the host to the device's parameters; on the device they are the same memory."""
        for item in self.owned if self.offload else ():
            local(item.param).detach().copy_(self.masters[item.name].detach())

    def step(self, lr: float | None = None) -> float:
        """Clip and update; returns the gradient's norm before clipping. Gradients are cleared."""
        norm = self.grad_norm()
        limit = self.config.max_grad_norm
        scale = limit / (norm + 1e-6) if limit and norm > limit else 1.0
        for group in self.inner.param_groups:
            group["lr"] = self.config.lr if lr is None else lr
        for item in self.owned:
            assert item.param.grad is not None
            master, grad = self.masters[item.name], local(item.param.grad)
            if scale != 1.0:
                grad.mul_(scale)  # in place: a copy would be the peak of the step
            master.grad = grad.to(master.device, master.dtype)
        self.inner.step()
        self.publish()
        for item in self.owned:
            item.param.grad = None
            self.masters[item.name].grad = None
        return norm
