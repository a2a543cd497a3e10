"""What differs between two plans: decisions, inputs, predictions. No I/O."""

from __future__ import annotations

from dataclasses import dataclass

from planner.build import options_of
from planner.plan import Plan
from planner.views import kernels_text, leaves


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One field that differs."""

    field: str
    before: str
    after: str


def input_changes(a: Plan, b: Plan) -> tuple[Change, ...]:
    """What the plans were made for."""
    fields = (
        ("model", a.inputs.graph.source, b.inputs.graph.source),
        ("graph sha256", a.inputs.graph_sha256[:12], b.inputs.graph_sha256[:12]),
        ("cluster", a.inputs.cluster.name, b.inputs.cluster.name),
        ("cluster sha256", a.inputs.cluster_sha256[:12], b.inputs.cluster_sha256[:12]),
        ("engine", a.inputs.engine.name, b.inputs.engine.name),
        ("GPUs", str(a.inputs.num_gpus), str(b.inputs.num_gpus)),
        ("seq_len", str(a.inputs.seq_len), str(b.inputs.seq_len)),
        ("global batch", str(a.inputs.global_batch_size), str(b.inputs.global_batch_size)),
        ("memory margin", str(a.inputs.memory_margin_frac), str(b.inputs.memory_margin_frac)),
        ("tool version", a.tool_version, b.tool_version),
    )
    return _differing(fields)


def decision_changes(a: Plan, b: Plan) -> tuple[Change, ...]:
    """What the plans decide."""
    mine, other = options_of(a.decisions), options_of(b.decisions)
    fields = [(name, str(mine[name]), str(other[name])) for name in mine]
    fields += [("stages", _stages(a), _stages(b)), ("kernels", kernels_text(a.inputs), kernels_text(b.inputs))]
    found = _differing(tuple(fields))
    named = {change.field for change in found}
    if a.decisions.layers != b.decisions.layers and not named & {"recompute", "offload_activations_layers"}:
        count = sum(x != y for x, y in zip(a.decisions.layers, b.decisions.layers, strict=False))
        found += (Change(field="layer strategies", before="", after=f"{count} layers differ"),)
    return found


def _stages(plan: Plan) -> str:
    """Layers of every stage, runs folded: "12 x8"."""
    sizes = [last - first for first, last in plan.decisions.stage_layers]
    runs: list[list[int]] = []
    for size in sizes:
        if runs and runs[-1][0] == size:
            runs[-1][1] += 1
        else:
            runs.append([size, 1])
    return " ".join(f"{size}x{times}" if times > 1 else str(size) for size, times in runs)


def _differing(fields: tuple[tuple[str, str, str], ...]) -> tuple[Change, ...]:
    return tuple(Change(field=name, before=x, after=y) for name, x, y in fields if x != y)


def cost_changes(a: Plan, b: Plan) -> tuple[tuple[str, float, float], ...]:
    """(leaf, seconds before, seconds after) of every part of the step that changed, largest change first."""
    mine = {leaf.name: leaf.time_s for leaf in leaves(a.predicted.breakdown)}
    other = {leaf.name: leaf.time_s for leaf in leaves(b.predicted.breakdown)}
    rows = [(name, mine.get(name, 0.0), other.get(name, 0.0)) for name in sorted({**mine, **other})]
    return tuple(sorted((row for row in rows if row[1] != row[2]), key=lambda row: -abs(row[2] - row[1])))
