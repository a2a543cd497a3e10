"""Which implementation of planner.kernels runs what, as an engine's trait, and what the loss costs by it. No torch.

An engine without choices runs what was traced. tests/cpu/kernels/test_dispatch.py holds this file to what
planner.kernels declares, and to the bytes that its formulas count.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from planner.costmodel.graph import LayerClass, OpKind

# Ops with a Triton kernel ("ours"), which planner.runtime runs on GPUs.
TRITON_OPS = ("ce_grad", "ce_grad_", "ce_stats", "merge_partials", "moe_permute", "moe_unpermute",
              "moe_unpermute_backward", "pack_heads", "pack_sequence", "ring_step", "ring_step_backward",
              "unpack_heads", "unpack_sequence")  # fmt: skip
# A memory-bound backward kernel reads the output gradient and what forward saved and writes the input
# gradient: three passes where forward makes two (MODELLED).
BACKWARD_TRAFFIC = 1.5
# Passes over the logits in their own type, read or written: one forward, two backward.
LOSS_PASSES = {"ours": 1 + 2}
_CONVERSIONS = ("_to_copy", "to_float")


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedLoss:
    """A layer whose loss is one kernel each way: the layer as it runs, and the bytes of its logits."""

    layer: LayerClass
    logits_bytes: int


def kernels_on(device: str) -> dict[str, str]:
    """The choice of every op of the runtime on a device of this name: "ours", on a CPU "torch"."""
    return dict.fromkeys(TRITON_OPS, "torch" if device == "cpu" else "ours")


def fused_loss(layer: LayerClass, kernels: dict[str, str]) -> FusedLoss | None:
    """`layer` with the chosen cross-entropy in the place of the traced one; None without a choice or such a loss.

    Traced are a conversion to float32, a log-softmax, whose output is kept, and the pick of the target. In their place
    stands one kernel that reads the logits, which are kept instead, and in backward one that reads them and writes
    their gradient. Backward is priced as BACKWARD_TRAFFIC times forward, so forward carries its share of all passes.
    """
    passes, chain = LOSS_PASSES.get(kernels.get("ce_stats", "")), _loss_chain(layer)
    if passes is None or not chain:
        return None
    logits = layer.ops[chain[0]].inputs[0]
    num_bytes = layer.activations[logits].num_bytes
    made = {a for i in chain for a in layer.ops[i].outputs}
    ops = list(layer.ops)
    for i in chain:
        ops[i] = replace(ops[i], kind=OpKind.VIEW, bytes_moved=0)
    moved = round(passes / (1 + BACKWARD_TRAFFIC) * num_bytes)
    ops[chain[-1]] = replace(ops[chain[-1]], kind=OpKind.LOSS, cut=ops[chain[0]].cut, bytes_moved=moved)
    activations = tuple(
        replace(a, saved=i == logits) if i == logits or i in made else a for i, a in enumerate(layer.activations)
    )
    return FusedLoss(layer=replace(layer, ops=tuple(ops), activations=activations), logits_bytes=num_bytes)


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
