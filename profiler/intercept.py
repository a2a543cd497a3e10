"""Fused kernels that meta tensors would decompose: attention, RMSNorm and dropout as one op each.

Every one is an autograd.Function whose forward allocates what the GPU kernel writes and saves what the GPU
kernel saves, so that the recorder's saved-tensor hooks see the memory of a training step on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from planner.costmodel.graph import Attention, OpKind
from planner.profiler.record import RawOp, Recorder


class FlashAttention(torch.autograd.Function):
    """Output and log-sum-exp (float32) of fused attention, forward only: (b, heads, q, d), (b, heads, q)."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
        """Allocate and save what the kernel does."""
        batch, heads, length, _ = q.shape
        dim = v.shape[-1]
        # The kernel writes (batch, length, heads, dim), so that merging heads afterwards is a view.
        strides = (length * heads * dim, dim, heads * dim, 1)
        out = torch.empty_strided((batch, heads, length, dim), strides, dtype=q.dtype, device=q.device)
        lse = torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, out, lse, *([] if mask is None else [mask]))
        ctx.mark_non_differentiable(lse)
        return out, lse


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any) -> Any:
        rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
        ctx.save_for_backward(x, rstd, *([] if weight is None else [weight]))
        ctx.mark_non_differentiable(rstd)
        return torch.empty_like(x), rstd


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        ctx.save_for_backward(mask)
        ctx.mark_non_differentiable(mask)
        return torch.empty_like(x), mask


class _Recurrent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, shapes: Any, *weights: Any) -> Any:
        outs = [torch.empty(shape, dtype=x.dtype, device=x.device) for shape in shapes]
        ctx.save_for_backward(x, outs[0], outs[-1], *weights)  # outs[-1]: the kernel's reserve of gate values
        return tuple(outs)


_ATTENTION, _DROPOUT = F.scaled_dot_product_attention, F.dropout
_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


class Intercept(TorchFunctionMode):
    """Replaces attention, RMSNorm, dropout and recurrent kernels while `recorder` records.

    F.multi_head_attention_forward calls its attention and dropout outside of any function mode, by their
    names in torch.nn.functional, so these two names are replaced as well.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __enter__(self) -> Any:
        F.scaled_dot_product_attention, F.dropout = self._attention, self._dropout
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        F.scaled_dot_product_attention, F.dropout = _ATTENTION, _DROPOUT
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _ATTENTION:
            return self._attention(*args, **kwargs)
        if func is F.rms_norm or func is torch.rms_norm:
            return self._rms_norm(*args, **kwargs)
        if func is _DROPOUT or func is torch.dropout:
            return self._dropout(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _GATES and len(args) == 9 and isinstance(args[2], list | tuple):
            return self._recurrent(name, *args)
        return func(*args, **kwargs)

    def _attention(
        self, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Any:  # fmt: skip
        del dropout_p, scale  # flash keeps the seed of its dropout, not a mask
        recorder = self.recorder
        q, k, v = (t.unsqueeze(0) if t.dim() == 3 else t for t in (query, key, value))
        if q.dim() != 4:
            raise ValueError(f"scaled_dot_product_attention of {query.dim()}-dim tensors is not supported")
        with recorder.quiet():
            out, lse = FlashAttention.apply(q, k, v, attn_mask)
        dims = Attention(
            batch=q.shape[0], q_heads=q.shape[1], kv_heads=k.shape[1], q_len=q.shape[2], kv_len=k.shape[2],
            head_dim_qk=q.shape[3], head_dim_v=v.shape[3], causal=is_causal or self._causal(attn_mask, q, k),
        )  # fmt: skip
        del enable_gqa
        reads = [q, k, v] + ([] if attn_mask is None else [attn_mask])
        recorder.add_op(_attention_op(dims, (q, k, v)), reads, [out, lse])
        return out if query.dim() == 4 else out.squeeze(0)

    def _causal(self, mask: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> bool:
        if mask is None or q.shape[2] != k.shape[2]:
            return False
        if self.recorder.storages[self.recorder.find(mask)].causal:
            return True
        # Hugging Face hands a decoder's causal mask over as a tensor; the attention module says what it is.
        return any(getattr(m, "is_causal", False) is True for _, m in self.recorder.module_stack[-2:])

    def _rms_norm(
        self, input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None
    ) -> Any:
        del eps
        with self.recorder.quiet():
            out, rstd = _RmsNorm.apply(input, weight)
        op = plain_op("rms_norm", OpKind.NORM)
        op.vector = int(normalized_shape[-1])
        self.recorder.add_op(op, [input] + ([] if weight is None else [weight]), [out, rstd])
        return out

    def _dropout(self, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        del inplace
        if not training or p == 0.0:
            return input
        with self.recorder.quiet():
            out, mask = _Dropout.apply(input)
        self.recorder.add_op(plain_op("dropout", OpKind.ELEMENTWISE), [input], [out, mask])
        return out

    def _recurrent(
        self, name: str, x: Any, state: Any, weights: Any, has_biases: bool, num_layers: int, dropout: float,
        train: bool, bidirectional: bool, batch_first: bool,
    ) -> Any:  # fmt: skip
        """One SCAN op for all layers and steps: every 2-D weight multiplies every row once."""
        del has_biases, dropout, train, batch_first
        states = list(state) if name == "lstm" else [state]
        directions = 2 if bidirectional else 1
        rows, width = x.shape[0] * x.shape[1], directions * (weights[0].shape[0] // _GATES[name])
        shapes = [(*x.shape[:2], states[0].shape[-1] * directions), *(tuple(s.shape) for s in states)]
        reserve = (rows, _GATES[name] * width * num_layers)
        with self.recorder.quiet():
            outs = _Recurrent.apply(x, [*shapes, reserve], *weights)
        op = plain_op(name, OpKind.SCAN)
        op.flops = op.flops_counted = 2 * rows * sum(w.numel() for w in weights if w.dim() == 2)
        op.backward_flops = 2 * op.flops if any(w.requires_grad for w in weights) else 0
        self.recorder.add_op(op, [x, *weights], list(outs))
        return outs[:-1]


def plain_op(name: str, kind: OpKind) -> RawOp:
    """An op without FLOPs; the recorder fills in the rest."""
    return RawOp(name=name, module="", kind=kind, inputs=(), outputs=(), views=(), out_shape=())


def _attention_op(dims: Attention, factors: tuple[torch.Tensor, ...]) -> RawOp:
    """FLOPs of scores and weighted values, 2 per multiply-add (Dao et al. 2022, FlashAttention, section 3).

    Backward forms four products of those sizes; the recomputation of the scores inside the kernel is extra
    work of one implementation, not of the model, and is not counted here.
    """
    per_key = 2 * dims.batch * dims.q_heads * dims.q_len * dims.kv_len
    counted = per_key * (dims.head_dim_qk + dims.head_dim_v)
    op = plain_op("attention", OpKind.ATTENTION)
    op.attention = dims
    op.flops_counted = counted
    op.flops = counted // 2 if dims.causal else counted
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in factors)
    op.backward_flops = 2 * op.flops if needs_grad else 0
    return op
