"""A layer's experts where tensor parallelism cuts them: which module routes, what it keeps and sends.

Engines differ in where they sum the partial results of row-parallel experts, see `EngineSpec.sums_experts_once`.
"""

from __future__ import annotations

import os.path
from dataclasses import replace

from planner.costmodel.graph import LayerClass, OpKind, TensorLayout, TpCut


def routed_block(layer: LayerClass) -> str:
    """Path of the module that a layer's tokens go through to its experts; '' without experts.

    Experts that one module stacks are parameters of it; listed ones are modules in a list that it holds.
    """
    holders = [name.split(".")[:-1] for group in layer.params if group.routed for name in group.names]
    if not holders:
        return ""
    above = os.path.commonprefix(holders)  # of lists: element by element
    return ".".join(above if all(holder == above for holder in holders) else above[:-1])


def beside_experts(layer: LayerClass) -> list[tuple[TpCut, str]]:
    """(cut, name) of the parameters in the block that no token is routed to: router, shared experts."""
    block = routed_block(layer)
    return [
        (group.cut, name)
        for group in layer.params
        if block and not group.routed
        for name in group.names
        if name.startswith(f"{block}.")
    ]


def is_cut(layer: LayerClass) -> bool:
    """Whether TP cuts the layer's experts, whose results are then partial sums."""
    return any(op.routed and op.cut is TpCut.ROW for op in layer.ops)


def combined_whole(layer: LayerClass) -> LayerClass:
    """`layer` as it is where dispatch and combination run on whole tokens, in front of the sum over TP.

    What they keep is then whole on each rank under sequence parallelism too, as is what a router inside the block
    reads.
    """
    if not is_cut(layer):
        return layer
    routes_inside = bool(beside_experts(layer))
    results = {a for op in layer.ops if op.routed for a in op.outputs}
    whole = {
        a
        for op in layer.ops
        if op.kind is OpKind.PERMUTE
        for i, a in enumerate(op.inputs)  # of dispatch: tokens, choice; of the combination: results, weights, choice
        if i or routes_inside or a in results
    }
    return replace(
        layer,
        ops=tuple(replace(op, cut=TpCut.REPLICATED) if op.kind is OpKind.PERMUTE else op for op in layer.ops),
        activations=tuple(
            replace(a, layout=TensorLayout.REPLICATED) if i in whole and a.layout is TensorLayout.OUTER else a
            for i, a in enumerate(layer.activations)
        ),
    )


def tp_tensors(layer: LayerClass, once: bool) -> tuple[list[float], list[float]]:
    """(distinct inputs of column-parallel GEMMs, outputs of row-parallel GEMMs) in bytes.

    The partial sums of routed row-parallel GEMMs are reduced after the combine, on the layer's tokens, so
    they count as one tensor of the layer's output size. `once`: shared experts' go with them.
    """
    columns = {op.inputs[0] for op in layer.ops if op.cut is TpCut.COLUMN and op.inputs and not op.routed}
    rows = [
        float(layer.activations[a].num_bytes)
        for op in layer.ops
        if op.cut is TpCut.ROW and not op.routed
        for a in op.outputs
    ]
    gathered = [float(layer.activations[a].num_bytes) for a in sorted(columns)]
    if is_cut(layer):
        rows.append(float(layer.output_bytes))
        gathered.append(float(layer.output_bytes))
        shared = [cut for cut, _ in beside_experts(layer)] if once else []
        for _ in range(shared.count(TpCut.ROW)):
            rows.remove(float(layer.output_bytes))
        if TpCut.COLUMN in shared:
            gathered.remove(float(layer.output_bytes))
    return gathered, rows
