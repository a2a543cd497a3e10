"""LayerFacts: what pricing needs to know of a LayerClass, summed once so that pricing is array arithmetic.

Bytes are at the traced shape, whole (no parallelism), split by TensorLayout because tensor and sequence
parallelism divide each layout differently.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from planner.costmodel import expert_facts
from planner.costmodel.engine import EngineSpec
from planner.costmodel.graph import Activation, LayerClass, Op, OpKind, TensorLayout, TpCut
from planner.costmodel.kernel_choice import choices_of
from planner.costmodel.kernels import FusedLoss, chunked_head, fused_loss, fused_norms, fused_swiglu, kernel_of

RECOMPUTES = ("none", "selective", "full")
_LOG_PROB_BYTES = 4  # torch's loss keeps float32 log-probabilities
MEMORY_BOUND = frozenset(
    {
        OpKind.NORM,
        OpKind.ELEMENTWISE,
        OpKind.EMBEDDING,
        OpKind.LOSS,
        OpKind.ROUTER,
        OpKind.PERMUTE,
        OpKind.SCAN,
        OpKind.REDUCTION,
        OpKind.OTHER,
    }
)


@dataclass(frozen=True, slots=True)
class LayoutBytes:
    """Bytes by layout; `fixed_bytes` do not grow with the micro-batch."""

    inner_bytes: float = 0.0
    outer_bytes: float = 0.0
    gathered_bytes: float = 0.0
    replicated_bytes: float = 0.0
    fixed_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """Memory traffic of the memory-bound kernels of one cut: bytes read and written, and kernels launched."""

    cut: TpCut
    routed: bool
    num_bytes: float
    num_kernels: int


@dataclass(frozen=True, slots=True)
class KernelCalls:
    """Calls of one kernel of planner.kernels that are cut alike: bytes that ours moves forward in all of them.

    `choices`: implementations of forward and backward, "" where nobody chose.
    """

    kernel: str
    cut: TpCut
    choices: tuple[str, str]
    num_bytes: float
    num_calls: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFacts:
    """Static sums of one layer class under one engine.

    `saved` is indexed like RECOMPUTES: activations kept until backward. `kernels` are not in `traffic`.
    `selective_traffic`, `selective_kernels` and `selective_attention` are redone by selective recomputation.
    `gathered_bytes`: inputs of column-parallel GEMMs, each all-gathered (SP) or gradient-all-reduced (no SP);
    `row_bytes`: outputs of row-parallel GEMMs.
    `last_gemm`: the last product, if backward needs neither its result nor what follows (a residual addition);
    `last_sum_bytes`: the last of `row_bytes`, if backward needs nothing that follows its sum, else 0.
    `dropped_bytes`: tensors of the residual stream that dropout acts on, if the engine has it: what row-parallel
    GEMMs and the embedding put out. `loss_bytes`: log-probabilities, or with a fused loss logits,
    kept for backward; `loss_work_bytes`: what the peak of the loss's backward needs beside them; `loss_rows`: rows of
    logits over the vocabulary. `head`: the product that the chunked loss would take over, with `loss_saved` of what is
    saved gone. `traced`: of the layer as it was traced and as a profile measures it, where kernels of the engine's
    stand in for some of its ops.
    """

    layer: LayerClass
    matmuls: tuple[Op, ...]
    attentions: tuple[Op, ...]
    traffic: tuple[Traffic, ...]
    kernels: tuple[KernelCalls, ...]
    saved: tuple[LayoutBytes, LayoutBytes, LayoutBytes]
    selective_traffic: tuple[Traffic, ...]
    selective_kernels: tuple[KernelCalls, ...]
    selective_attention: bool
    gathered_bytes: tuple[float, ...]
    row_bytes: tuple[float, ...]
    last_gemm: Op | None
    last_sum_bytes: float
    vocab_row_bytes: float
    vocab_gathered_bytes: float
    permute_bytes: tuple[float, ...]
    dropped_bytes: float
    loss_bytes: float
    loss_work_bytes: float
    loss_rows: float
    head: Op | None
    loss_saved: LayoutBytes
    launches: int
    traced: LayerFacts | None = None


def _sum_layouts(layer: LayerClass, keep: set[int]) -> LayoutBytes:
    sums = dict.fromkeys(TensorLayout, 0.0)
    fixed = 0.0
    for index in keep:
        activation = layer.activations[index]
        if activation.scales_with_batch:
            sums[activation.layout] += activation.num_bytes
        else:
            fixed += activation.num_bytes
    return LayoutBytes(
        sums[TensorLayout.INNER],
        sums[TensorLayout.OUTER],
        sums[TensorLayout.GATHERED],
        sums[TensorLayout.REPLICATED],
        fixed,
    )


def _selective_keep(layer: LayerClass, saved: set[int], kinds: frozenset[OpKind]) -> tuple[set[int], set[int]]:
    """(activations kept, ops redone) when ops of `kinds` are recomputed in backward.

    A saved activation that such an op produced is dropped; what the op reads is kept instead, or recomputed
    in turn when an op of `kinds` (or a view) produced it (Korthikanti et al. 2022, section 5; Chen et al.
    2016, arXiv 1604.06174). Recomputed attention keeps its output, which the projection behind it reads.
    """
    redo_kinds = kinds | {OpKind.VIEW}
    keep: set[int] = set()
    redone: set[int] = set()
    stack = list(saved)
    seen: set[int] = set()
    while stack:
        index = stack.pop()
        if index in seen:
            continue
        seen.add(index)
        producer = layer.activations[index].producer
        if producer < 0 or layer.ops[producer].kind not in redo_kinds or _core_output(layer, producer, index):
            keep.add(index)
            continue
        redone.add(producer)
        stack.extend(layer.ops[producer].inputs)
    return keep, redone


def _core_output(layer: LayerClass, op_index: int, activation: int) -> bool:
    op = layer.ops[op_index]
    return op.kind is OpKind.ATTENTION and activation == op.outputs[0]


def _saved(layer: LayerClass, engine: EngineSpec) -> set[int]:
    """What autograd keeps, without what this engine's kernels do not need.

    A fused chain of elementwise ops is differentiated from its inputs, so nothing inside it is kept; attention
    with its scores in memory has no row statistics beside them.
    """
    saved = {i for i, a in enumerate(layer.activations) if a.saved}
    if engine.attention == "unfused":
        saved -= {a for op in layer.ops if op.kind is OpKind.ATTENTION for a in op.outputs[1:]}
    if engine.fuses_elementwise:
        own = [i for i, op in enumerate(layer.ops) if kernel_of(op) is None]
        for members in _fused_groups(layer, own, fuse=True):
            made = {a for i in members for a in layer.ops[i].outputs}
            outside = {a for i, op in enumerate(layer.ops) if i not in members for a in op.inputs}
            read = {a for i in members for a in layer.ops[i].inputs}
            saved -= (made & read) - outside
    return saved


def _fused_groups(layer: LayerClass, op_indices: Iterable[int], fuse: bool) -> list[list[int]]:
    """`op_indices` by kernel: each its own; with `fuse`, connected elementwise ops of one cut share one."""
    group_of = {i: i for i in op_indices}

    def find(i: int) -> int:
        while group_of[i] != i:
            i = group_of[i]
        return i

    if fuse:
        for i in group_of:
            op = layer.ops[i]
            if op.kind is not OpKind.ELEMENTWISE:
                continue
            for a in op.inputs:
                j = layer.activations[a].producer
                joins = j in group_of and layer.ops[j].kind is OpKind.ELEMENTWISE and layer.ops[j].cut is op.cut
                if joins:
                    group_of[find(i)] = find(j)
    groups: dict[int, list[int]] = {}
    for i in group_of:
        groups.setdefault(find(i), []).append(i)
    return list(groups.values())


def _op_traffic(layer: LayerClass, op_indices: list[int], fuse: bool) -> tuple[Traffic, ...]:
    """Traffic of the memory-bound ops in `op_indices` that are no kernels of ours, by cut."""
    sums: dict[tuple[TpCut, bool], tuple[float, int]] = {}
    for members in _fused_groups(layer, [i for i in op_indices if kernel_of(layer.ops[i]) is None], fuse):
        first = layer.ops[members[0]]
        num_bytes = _group_bytes(layer, members)
        old = sums.get((first.cut, first.routed), (0.0, 0))
        sums[first.cut, first.routed] = (old[0] + num_bytes, old[1] + 1)
    return tuple(Traffic(cut, routed, b, n) for (cut, routed), (b, n) in sums.items())


def _kernel_calls(
    layer: LayerClass, op_indices: list[int], kernels: Mapping[str, str]
) -> tuple[KernelCalls, ...]:
    """Calls of kernels of ours in `op_indices`, by kernel and cut."""
    sums: dict[tuple[str, TpCut], tuple[float, int]] = {}
    for op in (layer.ops[i] for i in op_indices):
        kernel = kernel_of(op)
        if kernel is not None:
            num_bytes, count = sums.get((kernel, op.cut), (0.0, 0))
            sums[kernel, op.cut] = (num_bytes + op.bytes_moved, count + 1)
    return tuple(KernelCalls(kernel, cut, choices_of(kernels, kernel), *s) for (kernel, cut), s in sums.items())


def _group_bytes(layer: LayerClass, members: list[int]) -> float:
    if len(members) == 1:
        return float(layer.ops[members[0]].bytes_moved)
    inside = set(members)
    produced = {a for i in members for a in layer.ops[i].outputs}
    read = {a for i in members for a in layer.ops[i].inputs} - produced
    escapes = {
        a
        for i, op in enumerate(layer.ops)
        if i not in inside
        for a in op.inputs
        if a in produced
    }
    last = {a for a in produced if layer.activations[a].saved} | escapes
    if not last:
        last = set(layer.ops[members[-1]].outputs)
    weights = sum(layer.ops[i].weight_bytes for i in members)
    return float(weights + sum(layer.activations[a].num_bytes for a in read | last))


def layer_facts(layer: LayerClass, engine: EngineSpec) -> LayerFacts:
    """Sum up `layer` as `engine` runs it."""
    as_run = fused_swiglu(fused_norms(layer, engine.kernels), engine.kernels)
    fused = fused_loss(as_run, engine.kernels)
    facts = _facts(as_run, fused, engine, engine.kernels)
    same = fused is None and as_run is layer and not facts.kernels
    return facts if same else replace(facts, traced=_facts(layer, None, engine, {}))


def _facts(
    layer: LayerClass, fused: FusedLoss | None, engine: EngineSpec, kernels: Mapping[str, str]
) -> LayerFacts:
    head = chunked_head(layer) if engine.kernels else None
    layer = layer if fused is None else fused.layer
    layer = expert_facts.combined_whole(layer) if engine.sums_experts_once else layer
    ops = layer.ops
    matmul_kinds = (OpKind.GEMM, OpKind.BMM, OpKind.CONV)
    matmuls = tuple(op for op in ops if op.kind in matmul_kinds and op.gemm is not None)
    bound = [i for i, op in enumerate(ops) if op.kind in MEMORY_BOUND]
    traffic = _op_traffic(layer, bound, engine.fuses_elementwise)
    calls = _kernel_calls(layer, bound, kernels)
    saved = _saved(layer, engine)
    kinds = frozenset(engine.selective_recompute)
    keep, redone = _selective_keep(layer, saved, kinds)
    again = [i for i in bound if i in redone]
    none = _sum_layouts(layer, saved)
    full = LayoutBytes(outer_bytes=float(layer.input_bytes))
    gathered, rows = expert_facts.tp_tensors(layer, engine.sums_experts_once)
    last = _last_gemm(layer)
    vocab_rows = _vocab_rows(layer)
    lost = {i for i, a in enumerate(layer.activations) if a.saved and _makes_loss(layer, a)}
    loss = float(sum(layer.activations[i].num_bytes for i in lost))
    work = loss * (engine.logit_bytes / _LOG_PROB_BYTES - 1)
    if fused is not None:  # the gradient of the logits stands beside them
        loss = work = float(fused.logits_bytes)
        lost = {fused.logits}
    return LayerFacts(
        layer=layer,
        matmuls=matmuls,
        attentions=tuple(op for op in ops if op.attention is not None),
        traffic=traffic,
        kernels=calls,
        saved=(none, _sum_layouts(layer, keep), full),
        selective_traffic=_op_traffic(layer, again, engine.fuses_elementwise),
        selective_kernels=_kernel_calls(layer, again, kernels),
        selective_attention=OpKind.ATTENTION in kinds,
        gathered_bytes=tuple(gathered),
        row_bytes=tuple(rows),
        last_gemm=last,
        last_sum_bytes=_last_sum(layer, last, rows),
        vocab_row_bytes=vocab_rows,
        vocab_gathered_bytes=float(
            sum(
                layer.activations[op.inputs[0]].num_bytes
                for op in ops
                if op.cut is TpCut.VOCAB and op.kind is OpKind.GEMM and op.inputs
            )
        ),
        dropped_bytes=vocab_rows + sum(rows) if engine.dropout else 0.0,
        loss_bytes=loss,
        loss_work_bytes=work,
        loss_rows=float(
            sum(op.gemm.m for op in layer.ops if lost and op.cut is TpCut.VOCAB and op.gemm is not None)
        ),
        head=head,
        loss_saved=_sum_layouts(layer, lost & saved),
        permute_bytes=tuple(float(_out_bytes(layer, op)) for op in ops if op.kind is OpKind.PERMUTE),
        launches=len(matmuls) + 2 * sum(op.attention is not None for op in ops) + sum(t.num_kernels for t in traffic)
        + sum(c.num_calls for c in calls),
    )


def _last_gemm(layer: LayerClass) -> Op | None:
    """The layer's last GEMM if backward keeps neither its result nor anything made after it."""
    for op in reversed(layer.ops):
        if any(layer.activations[a].saved for a in op.outputs):
            return None
        if op.kind is OpKind.GEMM:
            return None if op.routed else op
    return None


def _last_sum(layer: LayerClass, last_gemm: Op | None, rows: list[float]) -> float:
    """Bytes of the layer's last sum over TP if backward keeps nothing made after it: a GEMM's, or the experts'."""
    if last_gemm is not None:
        return rows[-1] if last_gemm.cut is TpCut.ROW else 0.0
    for op in reversed(layer.ops if expert_facts.is_cut(layer) else ()):
        if any(layer.activations[a].saved for a in op.outputs):
            return 0.0
        if op.kind is OpKind.PERMUTE:
            return rows[-1]
    return 0.0


def _makes_loss(layer: LayerClass, activation: Activation) -> bool:
    producer = activation.producer
    return producer >= 0 and layer.ops[producer].kind is OpKind.LOSS and activation.scales_with_batch


def _vocab_rows(layer: LayerClass) -> float:
    """Bytes of the embedding's output, which a sharded vocabulary leaves as partial sums."""
    ops = [op for op in layer.ops if op.cut is TpCut.VOCAB and op.kind is OpKind.EMBEDDING]
    return float(sum(layer.activations[a].num_bytes for op in ops for a in op.outputs))


def _out_bytes(layer: LayerClass, op: Op) -> int:
    """Bytes of the token rows that a permutation moves: the larger of what it reads and writes."""
    read = sum(layer.activations[a].num_bytes for a in op.inputs[:1])
    written = sum(layer.activations[a].num_bytes for a in op.outputs)
    return max(read, written)
