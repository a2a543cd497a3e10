"""How tensor parallelism may cut the ops of a layer, from what flows where.

Two rules make a cut valid (Shoeybi et al. 2019, Megatron-LM, section 3; Huang et al. 2023, Redco, section 3):
a linear that reads the residual stream is split by columns, and its sharded output may pass only through ops
that treat the shards alone until a linear split by rows brings it back. A first guess cuts every linear that
reads the residual stream; each op that would need whole rows of a sharded tensor takes its guess back, until
nothing contradicts.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field

from planner.costmodel.graph import OpKind, TensorLayout, TpCut
from planner.profiler.record import RawOp, Storage


@dataclass(frozen=True, slots=True)
class Flow:
    """State of a storage: `sharded` over tp (since the column linears `origins`) or whole."""

    sharded: bool
    origins: frozenset[int] = frozenset()
    heads: bool = False  # went through attention


@dataclass(slots=True)
class Cuts:
    """Cut of each op, layout of each storage, and what tp must divide."""

    ops: list[TpCut] = field(default_factory=list)
    layouts: dict[int, TensorLayout] = field(default_factory=dict)
    divides: tuple[int, ...] = ()
    kv_heads: int = 0
    tp_reason: str = ""
    cp_reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What the derivation needs to know around the ops of a layer.

    `body`: a layer that may be cut, not prologue or epilogue. `plan`: the model's own TP plan, patterns of
    parameter or module names to "colwise"/"rowwise", empty if it has none.
    """

    storages: list[Storage]
    body: bool
    vocab_size: int
    num_experts: int
    writes: tuple[int, ...]
    plan: dict[str, str]


def derive(ops: list[RawOp], context: Context) -> Cuts:
    """Cut `ops`; falls back to replicating everything, with the reason in words."""
    conv = next((op for op in ops if op.kind is OpKind.CONV), None)
    scan = next((op for op in ops if op.kind is OpKind.SCAN and _learned(op, context)), None)
    cp_reason = "convolution over the sequence or space" if conv else ""
    cp_reason = f"recurrent op {scan.name} carries state along the sequence" if scan else cp_reason
    if context.body and (conv or scan):
        reason = "convolution" if conv else "recurrent op"
        return _replicated(
            ops, context, f"{reason} {(conv or scan).name} has no tensor-parallel cut", cp_reason
        )  # type: ignore[union-attr]
    whole: set[int] = set()
    while True:
        attempt = _Attempt(context, ops, whole)
        refused = attempt.run()
        if not refused:
            break
        whole |= refused
    cuts = attempt.cuts()
    cuts.cp_reason = cp_reason
    if context.body and TpCut.ROW not in cuts.ops:
        reason = "no column-parallel linear is followed by a row-parallel one"
        return _replicated(ops, context, reason, cp_reason)
    return cuts


def _learned(op: RawOp, context: Context) -> bool:
    return any(context.storages[i].learned for i in op.outputs)


def _replicated(ops: list[RawOp], context: Context, reason: str, cp_reason: str) -> Cuts:
    del context
    layouts = {i: TensorLayout.REPLICATED for op in ops for i in (*op.inputs, *op.outputs)}
    cuts = [TpCut.REPLICATED for _ in ops]
    return Cuts(cuts, layouts, tp_reason=reason, cp_reason=cp_reason)


class _Attempt:
    """One pass over the ops with the linears in `whole` left whole."""

    def __init__(self, context: Context, ops: list[RawOp], whole: set[int]) -> None:
        self.context, self.ops, self.whole = context, ops, whole
        self.flows: dict[int, Flow | None] = {}
        self.op_cuts: list[TpCut] = []
        self.gathered: set[int] = set()
        self.divides: set[int] = set()
        self.kv_heads: set[int] = set()
        self.refused: set[int] = set()
        self.base: tuple[int, ...] = ()  # shape of the residual stream

    def run(self) -> set[int]:
        """Column linears that something contradicted (to be left whole next time); empty when consistent."""
        for index, op in enumerate(self.ops):
            flows = [self._flow_of(i, op) for i in op.inputs]
            cut, out = self._cut(index, op, flows)
            self.op_cuts.append(cut)
            for i in op.outputs:
                self.flows[i] = out
        for i in self.context.writes if self.context.body else ():
            flow = self.flows.get(i)
            if flow is not None and flow.sharded:
                self.refused |= flow.origins
        return self.refused

    def cuts(self) -> Cuts:
        """The result of a consistent pass."""
        layouts: dict[int, TensorLayout] = {}
        for i, flow in self.flows.items():
            if flow is None:
                layouts[i] = TensorLayout.REPLICATED
            else:
                layouts[i] = TensorLayout.INNER if flow.sharded else TensorLayout.OUTER
        for i in self.gathered:
            layouts[i] = TensorLayout.GATHERED
        return Cuts(self.op_cuts, layouts, tuple(sorted(self.divides)), min(self.kv_heads, default=0))

    def _flow_of(self, index: int, op: RawOp) -> Flow | None:
        if index not in self.flows:
            storage = self.context.storages[index]
            shape = next((shape for i, shape in op.views if i == index), ())
            biased = len(shape) >= 4 and op.kind is not OpKind.CONV and len(self.base) == 3
            self.flows[index] = Flow(False) if storage.learned and not biased else None
            if storage.learned and not biased and not self.base and not storage.weights:
                self.base = shape
        return self.flows[index]

    def _cut(self, index: int, op: RawOp, flows: list[Flow | None]) -> tuple[TpCut, Flow | None]:
        sharded = [flow for flow in flows if flow is not None and flow.sharded]
        known = [flow for flow in flows if flow is not None]
        origins = frozenset(o for flow in sharded for o in flow.origins)
        heads = any(flow.heads for flow in sharded)
        if op.kind is OpKind.GEMM:
            return self._gemm(index, op, sharded)
        if op.kind is OpKind.EMBEDDING:
            rows = self._is_vocab_embedding(op)
            return (TpCut.VOCAB if rows else TpCut.OUTER), Flow(False)
        if op.kind is OpKind.ROUTER:
            return TpCut.REPLICATED, Flow(False) if known else None
        if op.kind is OpKind.PERMUTE:
            return TpCut.OUTER, Flow(False)
        if op.kind in (OpKind.ATTENTION, OpKind.BMM) and sharded:
            self._note_heads(op)
            return TpCut.HEAD, Flow(True, origins, True)
        if not known:
            return TpCut.REPLICATED, None if not op.params else Flow(False)
        if not sharded:
            return self._whole(op), Flow(False)
        if self._contradicts(op, flows):
            self.refused |= origins
        if self._is_vocab(op):
            return TpCut.VOCAB, Flow(self._keeps_vocab(op), origins)
        return TpCut.INNER, Flow(True, origins, heads)

    def _whole(self, op: RawOp) -> TpCut:
        experts = self.context.num_experts
        if experts and op.out_shape and op.out_shape[-1] == experts:
            return TpCut.REPLICATED  # router arithmetic
        return TpCut.OUTER

    def _gemm(self, index: int, op: RawOp, sharded: list[Flow]) -> tuple[TpCut, Flow | None]:
        assert op.gemm is not None
        width = op.gemm.n
        if sharded and self.context.body:
            heads = any(flow.heads for flow in sharded)
            self.divides |= set() if heads else {op.gemm.k}
            return TpCut.ROW, Flow(False)
        if width == self.context.vocab_size and not self.context.body:
            self.gathered |= set(op.inputs[:1])
            return TpCut.VOCAB, Flow(True)
        if self.context.num_experts and width == self.context.num_experts and not op.experts[0]:
            return TpCut.REPLICATED, Flow(False)
        if not self.context.body or width == 1 or index in self.whole or not self._planned(op):
            return TpCut.OUTER, Flow(False)
        self.gathered |= set(op.inputs[:1])
        return TpCut.COLUMN, Flow(True, frozenset({index}))

    def _planned(self, op: RawOp) -> bool:
        """Whether the model's own plan, if any, lets this linear be split by columns."""
        if not self.context.plan:
            return True
        names = (*op.params, *(name.rsplit(".", 1)[0] for name in op.params))
        return any(
            "colwise" in how and fnmatch.fnmatch(name, f"*{pattern}")
            for pattern, how in self.context.plan.items()
            for name in names
        )

    def _contradicts(self, op: RawOp, flows: list[Flow | None]) -> bool:
        """Whether `op` mixes the shards of a sharded input."""
        if not self.context.body:
            return False
        per_head = any(self._is_head_view(shape) for _, shape in op.views)
        if op.vector and not per_head:
            return True
        whole = {i for i, flow in zip(op.inputs, flows, strict=True) if flow is not None and not flow.sharded}
        # One number per row (a gate) scales every shard alike; a wider tensor would have to be cut.
        return not per_head and any(i in whole and shape[-1:] != (1,) for i, shape in op.views)

    def _is_head_view(self, shape: tuple[int, ...]) -> bool:
        """More dims than the residual stream, or heads folded into the batch dim."""
        if not self.base:
            return False
        if len(shape) > len(self.base):
            return True
        return len(shape) == len(self.base) == 3 and shape[0] > self.base[0] and shape[0] % self.base[0] == 0

    def _note_heads(self, op: RawOp) -> None:
        if op.attention is not None:
            self.divides.add(op.attention.q_heads)
            self.kv_heads.add(op.attention.kv_heads)
        elif op.gemm is not None and self.base and op.gemm.batch > self.base[0]:
            self.divides.add(op.gemm.batch // self.base[0])
            self.kv_heads.add(op.gemm.batch // self.base[0])

    def _is_vocab(self, op: RawOp) -> bool:
        vocab = self.context.vocab_size
        return not self.context.body and any(shape[-1:] == (vocab,) for _, shape in op.views)

    def _keeps_vocab(self, op: RawOp) -> bool:
        return bool(op.out_shape) and op.out_shape[-1] == self.context.vocab_size

    def _is_vocab_embedding(self, op: RawOp) -> bool:
        return bool(op.views) and op.views[0][1][0] == self.context.vocab_size
