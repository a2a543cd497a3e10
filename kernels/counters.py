"""Counting what code costs: FLOPs, bytes moved, kernels, collectives; and prices of torch's own ops.

torch's FlopCounterMode gives 0 for grouped_mm, for attention on a CPU and for the chunked linear cross-entropy, and
the dense count for causal attention. `FORMULAS` holds the right ones; `flop_mapping` hands them to FlopCounterMode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from planner.kernels.op import FORMULAS, Formula, Work, streamed

_aten: Any = torch.ops.aten
_COLLECTIVE_NAMESPACES = ("_c10d_functional", "c10d")
_COLLECTIVES = ("all", "reduce_scatter", "broadcast", "scatter", "gather", "send", "recv", "isend", "irecv")


def attention_flops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, matmuls: tuple[int, int]) -> int:
    """FLOPs of (batch, heads, length, dim) attention; `matmuls` counts products over q's dim and over v's dim.

    Forward is (1, 1), backward (3, 2): Q K^T again, dQ, dK, and dP, dV (Dao et al. 2022, arXiv 2205.14135, appendix B).
    A causal mask aligned to the top left leaves i+1 of the keys to query i.
    """
    queries, keys = q.shape[-2], k.shape[-2]
    full = min(queries, keys)
    pairs = full * (full + 1) // 2 + max(queries - keys, 0) * keys if causal else queries * keys
    heads = q.shape[0] * q.shape[1]
    return 2 * heads * pairs * (matmuls[0] * q.shape[-1] + matmuls[1] * v.shape[-1])


def _sdpa(causal_at: int) -> Formula:
    def work(*args: Any, out: Any, is_causal: bool = False, **kwargs: Any) -> Work:
        causal = bool(args[causal_at]) if len(args) > causal_at else is_causal
        return streamed(args[:3], out[:2], attention_flops(*args[:3], causal, (1, 1)))

    return work


def _sdpa_backward(causal_at: int) -> Formula:
    def work(*args: Any, out: Any, is_causal: bool = False, **kwargs: Any) -> Work:
        causal = bool(args[causal_at]) if len(args) > causal_at else is_causal
        grads = [g for g in out[:3] if g is not None]
        return streamed(args[:6], grads, attention_flops(*args[1:4], causal, (3, 2)), kernels=2)

    return work


def _grouped_mm(a: torch.Tensor, b: torch.Tensor, *rest: Any, out: torch.Tensor, **kwargs: Any) -> Work:
    """Groups along the rows (2-D x 3-D), the inner dim (2-D x 2-D), the columns (3-D x 2-D) or a batch (3-D x 3-D).

    Every row of a 2-D operand belongs to one group, so each meets one group's matrix whatever the group sizes are.
    """
    if a.dim() == b.dim() == 3:
        flops = 2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2]
    else:
        flops = 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]
    return streamed((a, b), out, flops)


def _linear_ce(
    x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, *rest: Any, out: Any, **kwargs: Any
) -> Work:
    """Logits, and in the same call the gradients of input and weight that are wanted: 2 N H V each."""
    need = [bool(flag) for flag in rest[-3:-1]]
    flops = (1 + sum(need)) * 2 * x.numel() * weight.shape[0]
    return streamed((x, weight, target), [t for t in out if t is not None], flops)


def _register_torch_ops() -> None:
    flash, efficient, cudnn = (f"_scaled_dot_product_{kind}_attention" for kind in ("flash", "efficient", "cudnn"))
    # Where is_causal stands among the positional arguments.
    forward = {flash: 4, f"{flash}_for_cpu": 4, efficient: 6, cudnn: 6}
    backward = {f"{flash}_backward": 11, f"{flash}_for_cpu_backward": 7, f"{efficient}_backward": 11}
    backward[f"{cudnn}_backward"] = 14
    for names, formula in ((forward, _sdpa), (backward, _sdpa_backward)):
        for name, position in names.items():
            FORMULAS[getattr(_aten, name)] = formula(position)
    FORMULAS[_aten._grouped_mm] = _grouped_mm
    try:
        import torch.nn.modules.linear_cross_entropy  # noqa: F401  torch >= 2.13 defines the op
    except ImportError:
        return
    FORMULAS[torch.ops.torch_nn._linear_cross_entropy_batch_chunked] = _linear_ce


_register_torch_ops()


def flop_mapping() -> dict[Any, Any]:
    """`custom_mapping` for torch's FlopCounterMode: every formula of the registry."""

    def adapt(formula: Formula) -> Any:
        def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            return formula(*args, out=out_val, **kwargs).flops

        flops._get_raw = True  # type: ignore[attr-defined]
        return flops

    return {packet: adapt(formula) for packet, formula in FORMULAS.items()}


def price(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Work:
    """Work of one dispatched call: its formula, else torch's FLOP formula and each tensor moved once.

    A view moves nothing; an allocation launches nothing.
    """
    packet = func._overloadpacket
    if packet in FORMULAS:
        return FORMULAS[packet](*args, out=out, **kwargs)
    given = (args, {name: value for name, value in kwargs.items() if name != "out"})  # which is written, not read
    tensors = [t for t in tree_leaves(given) if isinstance(t, torch.Tensor)]
    outs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
    if func.is_view or not tensors or not outs or packet.__name__.startswith(("empty", "new_empty", "detach")):
        return Work()
    flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
    if torch.Tag.inplace_view in func.tags:
        return Work()
    reads = tensors[1:] if packet.__name__ in ("copy_", "zero_", "fill_") else tensors
    read, written = sum(map(_touched, reads)), sum(map(_touched, outs))
    return Work(flops=int(flops), read_bytes=read, written_bytes=written, kernels=1)


def _touched(tensor: torch.Tensor) -> int:
    """Bytes a kernel touches of `tensor`: an expanded view is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class WorkCounter(TorchDispatchMode):
    """Sums the work of everything dispatched inside; `collectives` and `sent_bytes` are counted apart.

    >>> with WorkCounter() as counted:
    ...     _ = torch.ones(4) + 1
    >>> counted.total.kernels
    2
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = Work()
        self.collectives = 0
        self.sent_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # what it runs on its local parts, collectives included, is what counts
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace in _COLLECTIVE_NAMESPACES:
            if func._overloadpacket.__name__.lstrip("_").startswith(_COLLECTIVES):  # not waits and wrappers
                self.collectives += 1
                self.sent_bytes += sum(map(_touched, [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]))
        else:
            self.total = self.total + price(func, args, kwargs, out)
        return out
