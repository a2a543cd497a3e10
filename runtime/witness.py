"""What a dry run sees: every message with its bytes, what a forward pass keeps for backward, on tensors without values.

Three things of a GPU are put in the place of what a CPU would do: RMSNorm as one kernel, attention with narrow values
by a fused one, and a router's choice of experts as balanced, since there are no values to choose by.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {"all_gather": "all_gather", "reduce_scatter": "reduce_scatter", "all_reduce": "all_reduce",
         "allreduce": "all_reduce", "alltoall": "all_to_all", "all_to_all": "all_to_all",
         "allgather": "all_gather", "send": "send_recv"}  # fmt: skip


@dataclass(slots=True)
class Witness(TorchDispatchMode):
    """Messages by kind (calls, bytes of the whole tensor), and the storages that ops made, by weak reference.

    Tensors with values (the choice of experts and what follows from it) are computed with; all others are fake.
    """

    calls: Counter[str] = field(default_factory=Counter)
    sent_bytes: Counter[str] = field(default_factory=Counter)
    made: dict[int, StorageWeakRef] = field(default_factory=dict)
    on_host: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        TorchDispatchMode.__init__(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        valued = bool(tensors) and all(type(t) is torch.Tensor for t in tensors)
        space, _, name = func.name().partition("::")
        kind = next((k for text, k in KINDS.items() if text in name), "") if "c10d" in space else ""
        if valued and kind == "all_to_all":
            out = _balanced_exchange(*args)
        elif valued and kind == "all_gather":
            with unset_fake_temporarily():  # all ranks choose alike
                out = args[0].repeat(args[1], *(1,) * (args[0].dim() - 1))
        elif valued:
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
        elif name == "moe_permute" and not isinstance(args[1], FakeTensor):
            out = (func(*args, **kwargs)[0], *_order_and_counts(*args[1:]))
        else:
            out = func(*args, **kwargs)
        if name.partition(".")[0] == "topk" and not valued:
            out = (out[0], _balanced_choice(args[0], out[1]))
        if kind:
            self._sent(kind, 1, max((t.nbytes for t in (*tensors, *_tensors(out))), default=0))
        elif name.startswith("ring_attention"):  # one op: K and V go to all other ranks of the ring, hop by hop
            self._sent("send_recv", _resolve_process_group(args[-1]).size() - 1, args[1].nbytes + args[2].nbytes)
        before = {t.untyped_storage()._cdata for t in tensors}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in before:
                self.made[storage._cdata] = StorageWeakRef(storage)
        return out

    def _sent(self, kind: str, calls: int, num_bytes: int) -> None:
        self.calls[kind] += calls
        self.sent_bytes[kind] += calls * num_bytes

    def copied(self, x: torch.Tensor, to_host: bool) -> torch.Tensor:
        """In the place of a copy to or from the host (recompute.watched): what lies there is not counted."""
        copy = x.clone()
        if to_host:
            self.on_host.add(copy.untyped_storage()._cdata)
        return copy

    def kept_bytes(self, model: nn.Module, besides: list[torch.Tensor]) -> int:
        """Bytes of what is still held of what was made, without parameters and `besides`."""
        known = {getattr(p, "_local_tensor", p).untyped_storage()._cdata for p in _slots(model)}
        known |= {t.untyped_storage()._cdata for t in besides} | self.on_host
        alive = [ref for key, ref in self.made.items() if key not in known and not ref.expired()]
        return sum(torch.UntypedStorage._new_with_weak_ptr(ref.cdata).nbytes() for ref in alive)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def _slots(model: nn.Module) -> Iterator[torch.Tensor]:
    """Every parameter as its module holds it now, sharded or gathered."""
    for module in model.modules():
        yield from (p for p in module._parameters.values() if p is not None)


def _balanced_choice(scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Experts in turn, of the shape of `chosen`: every one gets equally many rows."""
    with unset_fake_temporarily():
        return (torch.arange(chosen.numel()) % scores.shape[-1]).view(chosen.shape)


def _balanced_exchange(counts: torch.Tensor, _received: Any, _sent: Any, group_name: str) -> torch.Tensor:
    """Rows of each of the first rank's experts from every rank, when all ranks choose alike."""
    ranks = _resolve_process_group(group_name).size()
    with unset_fake_temporarily():
        return counts.chunk(ranks)[0].repeat(ranks)


def _order_and_counts(chosen: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What kernels.exchange.moe_permute puts out beside the rows, with values."""
    with unset_fake_temporarily():
        flat = chosen.reshape(-1)
        return flat.argsort(stable=True), torch.bincount(flat, minlength=num_experts)


class _RmsNorm(torch.autograd.Function):
    """Allocates and saves what the GPU's kernel does (aten::_fused_rms_norm): the input and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any) -> Any:
        rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        ctx.save_for_backward(x, rstd, *([] if weight is None else [weight]))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, _, *weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight[0]) if weight else None


def _rms_norm(x: torch.Tensor, shape: Any, weight: Any = None, eps: Any = None) -> torch.Tensor:
    out: torch.Tensor = _RmsNorm.apply(x, weight)
    return out


_sdpa = F.scaled_dot_product_attention


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Attention whose values are narrower than its keys (latent attention) by the GPU's kernel for it.

    A CPU has none and would keep every score.
    """
    plain = isinstance(q, FakeTensor) and isinstance(v, FakeTensor) and q.shape[1] == k.shape[1]
    if not plain or attn_mask is not None or q.shape[-1] == v.shape[-1]:
        return _sdpa(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    out: torch.Tensor = kernel(q, k, v, None, True, dropout_p, is_causal, scale=scale)[0]
    return out


class _Chunks:
    """`tensor` cut into `num` along `dim`, each part made when it is asked for (FSDP asks for its own of hundreds)."""

    def __init__(self, tensor: torch.Tensor, num: int, dim: int) -> None:
        self.tensor, self.dim, self.size = tensor, dim, -(-tensor.shape[dim] // num)

    def __getitem__(self, index: int) -> torch.Tensor:
        first = min(index * self.size, self.tensor.shape[self.dim])
        length = min(self.size, self.tensor.shape[self.dim] - first)
        return self.tensor.narrow(self.dim, first, length) if length else self.tensor.new_empty(0)


@contextmanager
def on_gpu_terms() -> Iterator[None]:
    """Inside, kernels that a CPU would take apart are one op, and FSDP makes only the shards that it keeps."""
    with (
        mock.patch.object(torch, "rms_norm", _rms_norm),
        mock.patch.object(F, "scaled_dot_product_attention", _attention),
        mock.patch.object(_fsdp_param, "_chunk_with_empty", _Chunks),
    ):
        yield
