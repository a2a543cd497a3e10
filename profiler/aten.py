"""What an aten op is to the cost model: its kind, its GEMM dims, its FLOPs forward and backward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from planner.costmodel.graph import Gemm, OpKind

_NORMS = ("layer_norm", "group_norm", "batch_norm", "rms_norm")
_LOSSES = (
    "nll_loss",
    "mse_loss",
    "binary_cross_entropy",
    "kl_div",
    "smooth_l1_loss",
    "_ctc_loss",
    "huber_loss",
)
_REDUCTIONS = {
    "sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin", "prod", "var", "std", "var_mean",
    "std_mean",
    "any", "all", "logsumexp", "norm", "linalg_vector_norm", "avg_pool2d", "max_pool2d_with_indices",
    "_adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool1d", "_adaptive_avg_pool3d", "count_nonzero",
}  # fmt: skip
_ROUTERS = {"topk", "sort", "argsort", "histc", "bincount", "kthvalue"}
_SCANS = {"cumsum", "cumprod", "logcumsumexp", "cummax", "cummin"}
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu", "_thnn_fused")
_OTHERS = {"_fft_r2c", "_fft_c2c", "_fft_c2r", "linalg_qr", "_linalg_svd", "linalg_inv_ex"}
MATMULS = {"mm", "addmm", "bmm", "baddbmm"}
GROUPED = "_grouped_mm"
CHUNKED_LOSS = "_linear_cross_entropy_batch_chunked"
_MISPRICED = (GROUPED, "_scaled_dot_product")  # 0 FLOPs, and not halved when causal or 0 on a CPU
KERNELS = "planner_kernels"  # the namespace of planner.kernels
# Ops of planner.kernels whose names do not say their kind already.
_KERNELS = {"gla": OpKind.SCAN, "ce_stats": OpKind.LOSS, "ce_combine": OpKind.LOSS, "moe_permute": OpKind.PERMUTE,
            "moe_unpermute": OpKind.PERMUTE}  # fmt: skip
# Ops that only make a tensor out of nothing, without a kernel worth a launch.
ALLOCATIONS = {
    "empty",
    "empty_strided",
    "empty_like",
    "new_empty",
    "new_empty_strided",
    "scalar_tensor",
    "lift_fresh",
}


def packet_name(func: Any) -> str:
    """Short name of an op overload: "addmm" of aten.addmm.default, without a trailing in-place underscore."""
    name: str = func._overloadpacket.__name__
    return name if name.startswith("__") else (name.rstrip("_") or name)


def kind_of(name: str) -> OpKind:
    """Kind of the aten op `name`, before weights and context are known (BMM for every matmul)."""
    if name in MATMULS or name == GROUPED:
        return OpKind.BMM
    if name in _KERNELS:
        return _KERNELS[name]
    if name in ("convolution", "_convolution", "convolution_overrideable"):
        return OpKind.CONV
    if any(part in name for part in _NORMS):
        return OpKind.NORM
    if name in ("embedding", "_embedding_bag"):
        return OpKind.EMBEDDING
    if name == "_log_softmax" or name.startswith(_LOSSES):
        return OpKind.LOSS
    if name in _ROUTERS:
        return OpKind.ROUTER
    if name in _SCANS or any(part in name for part in _RECURRENT):
        return OpKind.SCAN
    if name in _REDUCTIONS:
        return OpKind.REDUCTION
    return OpKind.OTHER if name in _OTHERS else OpKind.ELEMENTWISE


def counted_flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """FLOPs that torch's FlopCounterMode counts for this call (0 for ops it has no formula for)."""
    formula = flop_registry.get(func._overloadpacket)
    return int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0


def true_flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """FLOPs of this call by the kernels' registry, where torch has no formula or a wrong one, else torch's.

    The registry is imported at the first such op: it costs a second, and most models have none.
    """
    if func.namespace == "aten" and not func._overloadpacket.__name__.startswith(_MISPRICED):
        return counted_flops(func, args, kwargs, out)
    from planner.kernels.counters import FORMULAS

    formula = FORMULAS.get(func._overloadpacket)
    return formula(*args, **kwargs, out=out).flops if formula else counted_flops(func, args, kwargs, out)


def kernel_bytes(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes that a kernel of planner.kernels moves by its formula: it may read twice, or write what only it sees."""
    from planner.kernels.counters import FORMULAS

    moved: int = FORMULAS[func._overloadpacket](*args, **kwargs, out=out).moved_bytes
    return moved


def grouped_dims(args: tuple[Any, ...]) -> Gemm:
    """Dims of one of the products of grouped_mm, groups of equal size; two-dimensional operands hold all groups."""
    left, right = args[:2]
    groups = next((t.shape[0] for t in (left, right) if t.dim() == 3), args[2].shape[0] if len(args) > 2 else 1)
    flat = left.dim() == 2, right.dim() == 2
    m, k, n = left.shape[-2], left.shape[-1], right.shape[-1]
    return Gemm(
        batch=groups,
        m=-(-m // groups) if flat == (True, False) else m,
        n=-(-n // groups) if flat == (False, True) else n,
        k=-(-k // groups) if flat == (True, True) else k,
    )


def chunked_loss_dims(args: tuple[Any, ...]) -> Gemm:
    """Dims of the logits of torch's chunked linear cross-entropy, whose gradients are two products more."""
    (vocab, width), rows = args[1].shape, args[0].numel() // args[0].shape[-1]
    return Gemm(batch=1, m=rows, n=vocab, k=width)


def operands(name: str, args: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The two factors of a matmul or convolution call."""
    return (args[1], args[2]) if name in ("addmm", "baddbmm") else (args[0], args[1])


def matmul_dims(left: torch.Tensor, right: torch.Tensor, weight_first: bool) -> Gemm:
    """Dims of left @ right; m always counts the side that is not the weight, so W @ x is read as x^T W^T."""
    batch = left.shape[0] if left.dim() == 3 else 1
    m, k, n = left.shape[-2], left.shape[-1], right.shape[-1]
    return Gemm(batch=batch, m=n, n=m, k=k) if weight_first else Gemm(batch=batch, m=m, n=n, k=k)


def conv_dims(args: tuple[Any, ...], out: torch.Tensor) -> Gemm:
    """Implicit GEMM of a convolution (Chetlur et al. 2014, cuDNN, section 3): one product per group.

    m = batch x output positions, n = output channels per group, k = input channels per group x kernel size.
    A transposed convolution multiplies at every input position.
    """
    x, weight, transposed, groups = args[0], args[1], bool(args[6]), int(args[8])
    taps = math.prod(weight.shape[2:])
    if transposed:
        m = x.shape[0] * math.prod(x.shape[2:])
        return Gemm(batch=groups, m=m, n=weight.shape[1] * taps, k=weight.shape[0] // groups)
    m = out.shape[0] * math.prod(out.shape[2:])
    return Gemm(batch=groups, m=m, n=weight.shape[0] // groups, k=weight.shape[1] * taps)


def backward_flops(forward: int, factors: tuple[torch.Tensor, torch.Tensor]) -> int:
    """Each factor that needs a gradient costs one product of the forward's size (dgrad, wgrad)."""
    if not torch.is_grad_enabled():
        return 0
    return forward * sum(factor.requires_grad for factor in factors)


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes a kernel touches of `tensor`: an expanded view is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
