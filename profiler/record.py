"""Recorder: what one forward pass on meta tensors does, op by op and storage by storage.

Tensors that share a storage are one activation: views move no bytes, and autograd keeps storages alive.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from planner.costmodel.graph import Attention, Gemm, OpKind
from planner.profiler import aten


@dataclass(slots=True)
class Storage:
    """One tensor storage. `produced` is (segment, op) or None for inputs, parameters and buffers.

    `scales`: derived from the batch, so its bytes grow with the micro-batch. `learned`: derived from
    parameters or from real-valued inputs, so it cannot be made again from nothing (rotary tables and masks
    can). `weights`: names of the parameters it is made of, if it is made of nothing else.
    """

    keep: Any
    num_bytes: int
    produced: tuple[int, int] | None = None
    scales: bool = False
    learned: bool = False
    weights: tuple[str, ...] = ()
    is_state: bool = False  # parameter or buffer
    causal: bool = False  # derived from tril or triu
    saved_in: int | None = None  # segment that saved it first


@dataclass(slots=True, kw_only=True)
class RawOp:
    """One recorded op; `inputs` and `outputs` are storage indices without parameters and buffers.

    `views`: (storage, shape) of every tensor that it reads, parameters included.
    """

    name: str
    module: str
    kind: OpKind
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    views: tuple[tuple[int, tuple[int, ...]], ...]
    out_shape: tuple[int, ...]
    params: tuple[str, ...] = ()
    flops: int = 0
    backward_flops: int = 0
    flops_counted: int = 0
    bytes_moved: int = 0
    weight_bytes: int = 0
    gemm: Gemm | None = None
    attention: Attention | None = None
    experts: tuple[int, int] = (0, 0)  # of a routed op: experts, experts per token
    vector: int = 0  # length of the last dim it reduces over (norm, softmax, mean), 0 if it does not


@dataclass(slots=True)
class Segment:
    """A stretch of the forward pass: one layer call, or what lies between two of them."""

    index: int
    path: str
    ops: list[RawOp] = field(default_factory=list)
    saved: set[int] = field(default_factory=set)


class Recorder(TorchDispatchMode):
    """Dispatch mode that fills `segments`; the caller opens and closes them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.storages: list[Storage] = []
        self.segments: list[Segment] = [Segment(0, "")]
        self.module_stack: list[tuple[str, nn.Module]] = [("", model)]
        self.experts = (0, 0)  # (experts, experts per token) while the expert branch of an MoE layer runs
        self.notes: list[str] = []
        self.expert_twins: dict[str, str] = {}  # expert parameter -> the parameter that was traced for it
        self._index: dict[int, int] = {}
        self._quiet = 0
        for name, param in model.named_parameters():
            storage = self.storages[self.find(param)]
            storage.weights = storage.weights or (name,)
            storage.is_state = storage.learned = True
        for _, buffer in model.named_buffers():
            self.storages[self.find(buffer)].is_state = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch's documented opt-out; the default imports torch._dynamo (1.5 s) on first use

    @property
    def segment(self) -> Segment:
        """The open segment."""
        return self.segments[-1]

    def open_segment(self, path: str) -> Segment:
        """Start a new segment."""
        self.segments.append(Segment(len(self.segments), path))
        return self.segment

    def find(self, tensor: torch.Tensor) -> int:
        """Index of the storage of `tensor`, registered on first sight."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._index:
            self._index[key] = len(self.storages)
            self.storages.append(Storage(storage, storage.nbytes()))
        return self._index[key]

    def add_inputs(self, batch: object) -> None:
        """Mark the tensors of a batch as model inputs."""
        for tensor in _tensors(batch):
            storage = self.storages[self.find(tensor)]
            storage.scales, storage.learned = True, tensor.is_floating_point()

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Run ops without recording them."""
        self._quiet += 1
        try:
            yield
        finally:
            self._quiet -= 1

    @contextlib.contextmanager
    def routed(self, num_experts: int, experts_per_token: int) -> Iterator[None]:
        """Ops inside are those of `num_experts` experts over all routed rows, balanced."""
        self.experts = (num_experts, experts_per_token)
        try:
            yield
        finally:
            self.experts = (0, 0)

    # ---- autograd: what is saved for backward

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Saved-tensors hook: note that the open segment keeps the storage of `tensor`."""
        index = self.find(tensor)
        storage = self.storages[index]
        if storage.is_state or storage.saved_in is not None:
            return tensor
        owner = self.segment
        if not storage.learned and storage.produced is not None:
            # Tables made once and used by every layer (rotary, masks) count where they were made.
            owner = self.segments[storage.produced[0]]
        storage.saved_in = owner.index
        owner.saved.add(index)
        return tensor

    # ---- ops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._quiet:
            self._record(func, args, kwargs, out)
        return out

    def _record(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = aten.packet_name(func)
        tensors, outs = _tensors((args, kwargs)), _tensors(out)
        if not outs or (not tensors and outs[0].numel() <= 1):
            return
        mutates = func._schema.is_mutable
        sources = {self.find(t) for t in tensors}
        if not mutates and tensors and all(self.find(t) in sources for t in outs):
            return  # a view
        if name in aten.ALLOCATIONS:
            for tensor in outs:
                self.find(tensor)
            return
        self.add_op(self._describe(func, name, args, kwargs, out), tensors, outs)

    def _describe(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> RawOp:
        own = func.namespace == aten.KERNELS
        op = RawOp(
            name=f"{aten.KERNELS}::{name}" if own else name, module="", kind=aten.kind_of(name), inputs=(), outputs=(),
            views=(), out_shape=(), bytes_moved=aten.kernel_bytes(func, args, kwargs, out) if own else 0,
        )  # fmt: skip
        op.flops_counted = aten.counted_flops(func, args, kwargs, out)
        op.flops = aten.true_flops(func, args, kwargs, out)
        if op.kind in (OpKind.BMM, OpKind.CONV):
            left, right = aten.operands(name, args)
            op.backward_flops = aten.backward_flops(op.flops, (left, right))
            if op.kind is OpKind.CONV:
                op.gemm = aten.conv_dims(args, out)
            elif name == aten.GROUPED:
                op.kind, op.gemm = OpKind.GEMM, aten.grouped_dims(args)
            else:
                first, second = (bool(self.storages[self.find(t)].weights) for t in (left, right))
                op.kind = OpKind.GEMM if first or second else OpKind.BMM
                op.gemm = aten.matmul_dims(left, right, first and not second)
        elif name == aten.CHUNKED_LOSS:
            op.kind, op.gemm = OpKind.BMM, aten.chunked_loss_dims(args)  # of activations: no rule cuts its weight
            logits = 2 * op.gemm.m * op.gemm.n * op.gemm.k
            op.flops, op.backward_flops = logits, op.flops - logits  # it makes gradients at once
        elif op.kind is OpKind.SCAN and any(self.storages[self.find(t)].learned for t in _tensors(args)):
            op.backward_flops = 2 * op.flops  # a custom op hides from here whether its inputs require gradients
        elif op.kind is OpKind.NORM and name.endswith("layer_norm"):
            op.vector = args[1][-1]
        elif op.kind is OpKind.NORM and own:
            op.vector = args[0].shape[-1]
        elif name in ("_softmax", "_safe_softmax", "_log_softmax", "mean", "sum", "amax", "var_mean"):
            op.vector = _reduced(args)
        return op

    def add_op(self, op: RawOp, tensors: list[torch.Tensor], outs: list[torch.Tensor]) -> None:
        """Record `op`, which reads `tensors` and writes `outs`: fills in what follows from its tensors."""
        ins = [(self.find(t), t) for t in tensors]
        sources = [self.storages[i] for i, _ in ins]
        op.name = f"{self.module_stack[-1][0]}.{op.name}".lstrip(".")
        op.module = self.module_stack[-1][0]
        op.params = tuple(sorted({name for s in sources for name in s.weights}))
        op.views = tuple((i, tuple(t.shape)) for i, t in ins)
        op.out_shape = tuple(outs[0].shape)
        op.inputs = tuple(dict.fromkeys(i for i, _ in ins if not self.storages[i].is_state))
        op.outputs = tuple(dict.fromkeys(self.find(t) for t in outs))
        self._price_bytes(op, ins, outs)
        op.experts = self.experts
        if self.experts[0]:
            _spread_over_experts(op, self.experts[0])
        self._inherit(op, sources)
        self.segment.ops.append(op)

    def _price_bytes(self, op: RawOp, ins: list[tuple[int, torch.Tensor]], outs: list[torch.Tensor]) -> None:
        written = sum(aten.tensor_bytes(t) for t in outs)
        if op.kind is OpKind.EMBEDDING:
            # Rows that are looked up are read once; the rest of the table is not touched.
            op.weight_bytes = min(
                written, sum(aten.tensor_bytes(t) for i, t in ins if self.storages[i].weights)
            )
            op.bytes_moved = 2 * written + sum(
                aten.tensor_bytes(t) for i, t in ins if not self.storages[i].weights
            )
            return
        op.weight_bytes = sum(aten.tensor_bytes(t) for i, t in ins if self.storages[i].weights)
        op.bytes_moved = op.bytes_moved or sum(aten.tensor_bytes(t) for _, t in ins) + written

    def _inherit(self, op: RawOp, sources: list[Storage]) -> None:
        here = (self.segment.index, len(self.segment.ops))
        only_weights = bool(sources) and all(s.weights for s in sources)
        for index in op.outputs:
            target = self.storages[index]
            # A scalar (the loss) is one number whatever the batch.
            target.scales |= any(s.scales for s in sources) and bool(op.out_shape)
            target.learned |= any(s.learned for s in sources)
            target.causal |= any(s.causal for s in sources) or op.name.rsplit(".", 1)[-1] in ("tril", "triu")
            if target.produced is None and not target.is_state:
                target.produced = here
                target.weights = op.params if only_weights else ()


def _reduced(args: Any) -> int:
    tensor = args[0]
    dims = args[1] if len(args) > 1 and args[1] is not None else range(tensor.dim())
    dims = [dims] if isinstance(dims, int) else list(dims)
    last = tensor.dim() - 1
    return tensor.shape[-1] if tensor.dim() and any(d % tensor.dim() == last for d in dims) else 0


def _spread_over_experts(op: RawOp, num_experts: int) -> None:
    """One expert ran on all routed rows; E experts run on 1/E of them each, rounded up, with E weights."""
    op.bytes_moved += op.weight_bytes * (num_experts - 1)
    op.weight_bytes *= num_experts
    if op.gemm is not None and op.gemm.batch == 1:
        op.gemm = replace(op.gemm, batch=num_experts, m=-(-op.gemm.m // num_experts))


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
