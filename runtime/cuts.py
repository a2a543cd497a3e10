"""Which part of every parameter a rank holds: the plan's TP cuts, made exact by one dry pass on meta tensors.

The plan says of each parameter whether it is column-, row- or vocabulary-parallel. On which dim, in how many
units (KV heads) and pieces (fused q, k, v) follows from how the model's code uses it: the pass runs the model
on meta tensors with a first guess and corrects it (`Recut`) until every rule is content.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from planner.costmodel.graph import LayerClass, ModelGraph, ParamGroup, TpCut
from planner.costmodel.strategy import PlanSpec
from planner.runtime.errors import RuntimePlanError
from planner.runtime.sharded import TP, Context, Cut, Recut, Split, Unshardable, take

_KINDS = {TpCut.COLUMN: "column", TpCut.HEAD: "column", TpCut.ROW: "row", TpCut.VOCAB: "vocab"}
_MOST_TRIES = 200


def layer_paths(graph: ModelGraph) -> tuple[str, ...]:
    """Module path of every layer, in order."""
    return tuple(path for run in graph.runs for path in run.paths)


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by canonical name, shared ones once."""
    return dict(model.named_parameters())


def _groups(graph: ModelGraph) -> Iterator[tuple[str, ParamGroup]]:
    classes: list[tuple[str, LayerClass]] = [("", graph.prologue), ("", graph.epilogue)]
    paths = layer_paths(graph)
    classes += [(p, graph.classes[c]) for p, c in zip(paths, graph.layer_classes, strict=True)]
    for path, layer in classes:
        for group in layer.params:
            yield path, group


def cut_table(model: nn.Module, graph: ModelGraph, spec: PlanSpec) -> dict[str, Cut]:
    """A Cut for every parameter. RuntimePlanError when the graph and the model name different parameters."""
    params = named(model)
    cuts: dict[str, Cut] = {}
    for path, group in _groups(graph):
        for short in group.names:
            name = f"{path}.{short}" if path and f"{path}.{short}" in params else short
            if name not in params:
                raise RuntimePlanError(
                    f"the plan has a parameter {name!r} that the model lacks: it was made for another model; plan again"
                )
            cuts[name] = _cut(name, params[name], group, spec)
    missing = [name for name in params if name not in cuts]
    if missing:
        raise RuntimePlanError(
            f"the model has {len(missing)} parameters that the plan lacks (first: {missing[0]}): plan again"
        )
    return cuts


def _cut(name: str, param: nn.Parameter, group: ParamGroup, spec: PlanSpec) -> Cut:
    kind = _KINDS.get(group.cut, "") if spec.tp > 1 else ""
    kind = "" if kind == "vocab" and not spec.vocab_parallel else kind
    if not kind:
        return Cut(name=name, routed=group.routed)
    dims = [d for d, size in enumerate(param.shape) if size % spec.tp == 0]
    first = param.dim() - 1 if kind == "row" and not group.routed else 0
    order = sorted(dims, key=lambda d: (d != first, d))
    return Cut(name=name, kind=kind, dim=(order or [0])[0], units=spec.tp, routed=group.routed, candidates=order[1:])


def local_part(value: torch.Tensor, cut: Cut, ctx: Context) -> torch.Tensor:
    """TP part of a whole parameter on this rank (a view where possible); shapes only on meta."""
    if not cut.kind:
        return value
    with torch.no_grad():
        split = Split(cut.dim, TP, cut.units, cut.outer)
        return take(value.detach(), cut.dim, split, ctx)


def alike(cuts: dict[str, Cut], graph: ModelGraph) -> dict[str, list[Cut]]:
    """The cuts of a parameter and of its twins in layers of the same class, by name."""
    twins: dict[tuple[int, str], list[Cut]] = {}
    for i, (path, layer) in enumerate(zip(layer_paths(graph), graph.layer_classes, strict=True)):
        for short in (name for group in graph.classes[layer].params for name in group.names):
            full = f"{path}.{short}" if path else short
            inside = full in cuts
            twins.setdefault((layer if inside else -1 - i, short), []).append(cuts[full if inside else short])
    return {cut.name: found for found in twins.values() for cut in found}


def settle(cuts: dict[str, Cut], twins: dict[str, list[Cut]], dry_run: Callable[[], None], ctx: Context) -> None:
    """Correct `cuts` in place until `dry_run` meets no contradiction. RuntimePlanError if none is left to try.

    `twins`: what else changes with a parameter, so that equal layers take one try instead of one each.
    """
    ctx.strict = True
    for _ in range(_MOST_TRIES):
        try:
            dry_run()
            return
        except Recut as change:
            for cut in twins.get(change.origin, [cuts[change.origin]]):
                _recut(cut, change)
        except Unshardable as error:
            if not _next_candidate(cuts, twins, error):
                if not ctx.strict:
                    raise RuntimePlanError(f"the model cannot be run as the plan cuts it: {error}") from None
                ctx.strict = False
    raise RuntimePlanError(f"no consistent tensor-parallel cut found in {_MOST_TRIES} tries: plan with --forbid tp")


def _recut(cut: Cut, change: Recut) -> None:
    if change.dim >= 0 and change.dim != cut.dim:
        cut.dim, cut.candidates = change.dim, []
    elif change.units and change.units < cut.units and cut.units % change.units == 0:
        cut.units = change.units
    elif change.outer and change.outer > cut.outer:
        cut.outer = change.outer
    else:
        raise RuntimePlanError(f"parameter {cut.name} cannot be cut as the plan says: plan with --forbid tp")


def _next_candidate(cuts: dict[str, Cut], twins: dict[str, list[Cut]], error: Unshardable) -> bool:
    """Move the first parameter that the error blames, and that is no plain linear weight, to another dim."""
    for origin in error.origins:
        if cuts[origin].kind == "column" and cuts[origin].candidates:
            for cut in twins.get(origin, [cuts[origin]]):
                cut.dim = cut.candidates.pop(0)
                cut.outer = 1
            return True
    return False


def share_bias_cuts(cuts: dict[str, Cut]) -> None:
    """A column-parallel bias is cut like its weight's output dim."""
    for name, cut in cuts.items():
        stem, _, leaf = name.rpartition(".")
        weight = cuts.get(f"{stem}.weight")
        if leaf == "bias" and cut.kind in ("column", "vocab") and weight is not None:
            cut.dim, cut.units, cut.outer = 0, weight.units, weight.outer


def meta_parameters(whole: dict[str, nn.Parameter], cuts: dict[str, Cut], ctx: Context) -> dict[str, nn.Parameter]:
    """Local parameters without values, for the dry pass."""
    found = {}
    for name, param in whole.items():
        shape = local_part(torch.empty(param.shape, dtype=param.dtype, device="meta"), cuts[name], ctx)
        local = nn.Parameter(shape, requires_grad=param.requires_grad)
        local.planner_cut = cuts[name]  # type: ignore[attr-defined]
        found[name] = local
    return found
