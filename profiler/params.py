"""Which part of the graph holds each parameter, and how tensor parallelism cuts it."""

from __future__ import annotations

from torch import nn

from planner.costmodel.graph import OpKind, ParamGroup, TpCut
from planner.profiler.record import RawOp, Recorder
from planner.profiler.run import Trace


class Ownership:
    """Every parameter of the model is held exactly once: by the prologue, one layer, or the epilogue.

    `prologue`, `epilogue`: name in the model -> the same name. `layers[i]`: (name, local) pairs, where local
    names are relative to the layer's path. `tied_params`: numbers that prologue and epilogue share.
    """

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.params = params = dict(model.named_parameters())
        names = {id(p): name for name, p in params.items()}
        segments = trace.recorder.segments
        first, last = (_used(segments[i].ops) for i in (0, -1))
        left = dict.fromkeys(params)
        self.notes: list[str] = []
        self.prologue = {name: name for name in params if name in first}
        self._drop(left, self.prologue)
        self.layers: list[frozenset[tuple[str, bool]]] = []
        seen: set[int] = set()
        for call in trace.calls:
            if id(call.module) in seen:
                self.notes.append(
                    f"{call.path} is called more than once; its parameters count at its first call"
                )
            seen.add(id(call.module))
            own = {names[id(p)]: name for name, p in call.module.named_parameters() if names[id(p)] in left}
            self._drop(left, own)
            between = [n for n in (_used(call.gap.ops) if call.gap else ()) if n in left]
            self._drop(left, dict.fromkeys(between))
            self.layers.append(
                frozenset([*((n, True) for n in own.values()), *((n, False) for n in between)])
            )
        unused = [name for name in left if name not in last]
        if unused:
            count = sum(params[name].numel() for name in unused)
            self.notes.append(f"{count:,} parameters are not used by the forward pass (first: {unused[0]})")
        self.epilogue = {name: name for name in left}
        self.tied_params = sum(params[name].numel() for name in first & last)

    @staticmethod
    def _drop(left: dict[str, None], taken: dict[str, str] | dict[str, None]) -> None:
        for name in taken:
            left.pop(name, None)


def _used(ops: list[RawOp]) -> set[str]:
    return {name for op in ops for name in op.params}


def group_params(
    ops: list[RawOp],
    op_cuts: list[TpCut],
    owned: dict[str, str],
    params: dict[str, nn.Parameter],
    recorder: Recorder,
) -> tuple[ParamGroup, ...]:
    """Parameters `owned` (name in the model -> name in the layer) of `params`, grouped by treatment."""
    cut_of: dict[str, TpCut] = {}
    # A weight that is first copied or cast belongs to the matmul that uses it.
    for op, cut in sorted(zip(ops, op_cuts, strict=True), key=lambda pair: pair[0].gemm is None):
        for name in op.params:
            cut_of.setdefault(name, _param_cut(op, cut, params[name]))
    groups: dict[tuple[TpCut, bool, bool], list[str]] = {}
    for name in owned:
        twin = recorder.expert_twins.get(name, name)
        routed = name in recorder.expert_twins
        key = (cut_of.get(twin, TpCut.REPLICATED), routed, params[name].requires_grad)
        groups.setdefault(key, []).append(name)
    return tuple(
        ParamGroup(
            num_params=sum(params[name].numel() for name in members),
            cut=cut,
            routed=routed,
            names=tuple(sorted(owned[name] for name in members)),
            trainable=trainable,
        )
        # `owned` comes out of sets: sorted, so that a model has one graph whatever the process hashes to.
        for (cut, routed, trainable), members in sorted(groups.items(), key=lambda group: min(group[1]))
    )


def _param_cut(op: RawOp, cut: TpCut, param: nn.Parameter) -> TpCut:
    """Biases of row-parallel linears and norms on sharded heads are whole on every rank."""
    if cut is TpCut.ROW:
        return TpCut.ROW if param.dim() > 1 and param.shape[-1] > 1 else TpCut.OUTER
    if cut in (TpCut.INNER, TpCut.HEAD):
        wide = (
            op.kind is OpKind.ELEMENTWISE and op.out_shape[-1:] == param.shape[-1:] and len(op.out_shape) <= 3
        )
        return TpCut.COLUMN if wide else TpCut.REPLICATED
    return cut
