"""What a choice of kernels (kernel_choice.py) makes of a layer: ops of planner.kernels in place of others. No torch.

Such an op is called planner_kernels::NAME, as where a model calls one itself, and its bytes are those that our kernel
moves forward. An engine without choices runs what was traced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from planner.costmodel.graph import LayerClass, Op, OpKind, TpCut
from planner.costmodel.kernel_choice import KERNELS

Array = NDArray[np.float64]
# A memory-bound backward kernel reads the output gradient and what forward saved and writes the input
# gradient: three passes where forward makes two (MODELLED).
BACKWARD_TRAFFIC = 1.5
SWIGLU_PASSES = 3  # over the gate, read or written: gate, up and result
_NAMESPACE = "planner_kernels"
_CONVERSIONS = ("_to_copy", "to_float")
CHUNK_ROWS = 2048  # rows of logits that the chunked loss makes at once
CHUNK_KERNELS = 8  # launches of a chunk in bf16: three products, statistics, combining them, gradient, two sums
PRODUCT_BYTES = 2**27  # of the product that is added to the head's gradient at once; each further one is two launches


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedLoss:
    """A layer whose loss is one kernel each way: the layer as it runs, its logits (an activation) and their bytes."""

    layer: LayerClass
    logits: int
    logits_bytes: int


def kernel_of(op: Op) -> str | None:
    """The kernel of KERNELS that an op is a call of; None if it is none."""
    space, _, name = op.name.rpartition(".")[2].rpartition("::")
    return name if space == _NAMESPACE and name in KERNELS else None


def _runs(kernels: Mapping[str, str], op: str) -> bool:
    """Whether a kernel stands in for what a module does by itself."""
    return kernels.get(op, "torch") != "torch"


def _named(name: str, kernel: str) -> str:
    """An op's name with the kernel in the place of what it was."""
    return f"{name.rpartition('.')[0]}.{_NAMESPACE}::{kernel}".lstrip(".")


def fused_loss(layer: LayerClass, kernels: Mapping[str, str]) -> FusedLoss | None:
    """`layer` with the chosen cross-entropy in the place of the traced one; None without a choice or such a loss.

    Traced are a conversion to float32, a log-softmax, whose output is kept, and the pick of the target. In their place
    stands one kernel that reads the logits, which are kept instead.
    """
    chain = _loss_chain(layer) if _runs(kernels, "ce_stats") else []
    if not chain:
        return None
    logits = layer.ops[chain[0]].inputs[0]
    num_bytes = layer.activations[logits].num_bytes
    made = {a for i in chain for a in layer.ops[i].outputs}
    ops = list(layer.ops)
    for i in chain:
        ops[i] = replace(ops[i], kind=OpKind.VIEW, bytes_moved=0)
    ops[chain[-1]] = replace(
        ops[chain[-1]], name=_named(ops[chain[-1]].name, "cross_entropy"), kind=OpKind.LOSS, cut=ops[chain[0]].cut,
        bytes_moved=num_bytes,
    )  # fmt: skip
    activations = tuple(
        replace(a, saved=i == logits) if i == logits or i in made else a for i, a in enumerate(layer.activations)
    )
    return FusedLoss(
        layer=replace(layer, ops=tuple(ops), activations=activations), logits=logits, logits_bytes=num_bytes
    )


# What RMSNorm is traced as where a module takes it apart, conversions aside.
_NORM_CHAIN = ("pow", "mean", "add", "rsqrt", "mul", "mul")


def fused_norms(layer: LayerClass, kernels: Mapping[str, str]) -> LayerClass:
    """`layer` with one kernel in the place of every RMSNorm, if one is chosen.

    Where a module took it apart, the kernel reads and keeps its input; nothing between is kept.
    """
    if not _runs(kernels, "rms_norm"):
        return layer
    chains = _norm_chains(layer)
    whole = {i for i, op in enumerate(layer.ops) if op.kind is OpKind.NORM and op.name.rpartition(".")[2] == "rms_norm"}
    if not chains and not whole:
        return layer
    ops, activations = list(layer.ops), list(layer.activations)
    for i in whole:
        ops[i] = replace(ops[i], name=_named(ops[i].name, "rms_norm"))
    for chain in chains:
        source, made = layer.ops[chain[0]].inputs[0], {a for i in chain for a in layer.ops[i].outputs}
        last, out = layer.ops[chain[-1]], layer.ops[chain[-1]].outputs[0]
        moved = activations[source].num_bytes + activations[out].num_bytes + last.weight_bytes
        for i in chain:
            ops[i] = replace(ops[i], kind=OpKind.VIEW, bytes_moved=0)
        ops[chain[-1]] = replace(
            last, name=_named(last.name, "rms_norm"), kind=OpKind.NORM, inputs=(source,), bytes_moved=moved
        )
        for a in made - {out}:
            activations[a] = replace(activations[a], saved=False)
        activations[source] = replace(activations[source], saved=True)
    return replace(layer, ops=tuple(ops), activations=tuple(activations))


def _norm_chains(layer: LayerClass) -> list[list[int]]:
    """Indices of the ops of every RMSNorm that a module takes apart."""
    modules: dict[str, list[int]] = {}
    for i, op in enumerate(layer.ops):
        modules.setdefault(op.name.rpartition(".")[0], []).append(i)
    found = []
    for module, members in modules.items():
        names = [layer.ops[i].name.rpartition(".")[2] for i in members]
        if module and tuple(n for n in names if n not in _CONVERSIONS) == _NORM_CHAIN:
            found.append(members)
    return found


def fused_swiglu(layer: LayerClass, kernels: Mapping[str, str]) -> LayerClass:
    """`layer` with one kernel in the place of silu(gate) * up in every gated MLP, if one is chosen.

    Its gradient needs gate and up alone, so that silu(gate) is not kept.
    """
    pairs = _swiglu_pairs(layer) if _runs(kernels, "swiglu") else []
    if not pairs:
        return layer
    ops, activations = list(layer.ops), list(layer.activations)
    for silu, product in pairs:
        (gate,), (middle,), (out,) = ops[silu].inputs, ops[silu].outputs, ops[product].outputs
        factors = tuple(dict.fromkeys((gate, *(a for a in ops[product].inputs if a != middle))))
        ops[silu] = replace(ops[silu], kind=OpKind.VIEW, bytes_moved=0)
        ops[product] = replace(
            ops[product], name=_named(ops[product].name, "swiglu"), inputs=factors,
            bytes_moved=SWIGLU_PASSES * activations[out].num_bytes,
        )  # fmt: skip
        activations[middle] = replace(activations[middle], saved=False)
        for a in factors:
            activations[a] = replace(activations[a], saved=True)
    return replace(layer, ops=tuple(ops), activations=tuple(activations))


def _swiglu_pairs(layer: LayerClass) -> list[tuple[int, int]]:
    """(silu, product with it) of every gated MLP: child modules that are linear make both factors and read the result.

    Gate and up are apart or halves of one result, as runtime/gated.py knows them.
    """
    found = []
    for i, op in enumerate(layer.ops):
        module = op.name.rpartition(".")[0]
        if not module or not op.name.endswith(".mul"):
            continue
        makers = {layer.activations[a].producer for a in op.inputs} - {-1}
        silu = next((m for m in makers if _inside(layer.ops[m], module, "silu")), None)
        if silu is None or _readers(layer, silu) != [i]:
            continue
        factors = (makers - {silu}) | {layer.activations[a].producer for a in layer.ops[silu].inputs}
        linears = [*(layer.ops[m] for m in factors if m >= 0), *(layer.ops[j] for j in _readers(layer, i))]
        if len(linears) == len(factors) + 1 and all(_is_child_linear(o, module) for o in linears):
            found.append((silu, i))
    return found


def _inside(op: Op, module: str, name: str) -> bool:
    """Whether `op` is a `name` of `module` or of something in it."""
    return op.name.startswith(f"{module}.") and op.name.endswith(f".{name}")


def _is_child_linear(op: Op, module: str) -> bool:
    """Whether `op` is the product of a linear module that is a child of `module`."""
    inside = op.name.removeprefix(f"{module}.")
    return op.kind is OpKind.GEMM and inside != op.name and inside.count(".") == 1


def _readers(layer: LayerClass, index: int) -> list[int]:
    """Ops that read what op `index` puts out."""
    made = set(layer.ops[index].outputs)
    return [i for i, op in enumerate(layer.ops) if made & set(op.inputs)]


def _loss_chain(layer: LayerClass) -> list[int]:
    """Indices of (conversion,) log-softmax and pick of the target, [] if that is not the loss."""
    chain: list[int] = []
    for i, op in enumerate(layer.ops):
        producer = layer.activations[op.inputs[0]].producer if op.inputs else -1
        if op.kind is OpKind.LOSS and op.name.endswith("log_softmax"):
            widened = producer >= 0 and layer.ops[producer].name.endswith(_CONVERSIONS)
            chain = [producer, i] if widened else [i]
        elif op.kind is OpKind.LOSS and chain and producer == chain[-1]:
            return [*chain, i]
    return []


def chunked_head(layer: LayerClass) -> Op | None:
    """The product of a module without bias whose result only the loss reads: what the chunked loss can take over."""
    chain = _loss_chain(layer)
    if not chain:
        return None
    path, product = _made_by(layer, layer.ops[chain[0]].inputs[0])
    readers = {i for i, op in enumerate(layer.ops) if op.kind is not OpKind.VIEW and path & set(op.inputs)}
    if product is None or product.kind is not OpKind.GEMM or product.cut is not TpCut.VOCAB:
        return None
    return product if product.name.endswith(".mm") and readers == {chain[0]} else None


def _made_by(layer: LayerClass, activation: int) -> tuple[set[int], Op | None]:
    """(an activation and what it is a view of, the op that made them)."""
    path = {activation}
    while (producer := layer.activations[activation].producer) >= 0:
        op = layer.ops[producer]
        if op.kind is not OpKind.VIEW:
            return path, op
        activation = op.inputs[0]
        path.add(activation)
    return path, None


def weight_sum_bytes(chunks: Array, width: int) -> Array:
    """Bytes that the chunked loss moves per weight of the head beside its products' operands.

    The gradient is zeroed, summed over chunks in float32 (16 bits: each product is written, read and added; 32: summed
    inside the product), converted, and scaled in backward.
    """
    narrow = width < 4
    total: Array = 4 + chunks * (8 + 2 * width * narrow) + (4 + width) * narrow + 2 * width
    return total
