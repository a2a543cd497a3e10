"""Plans as rows, lines and JSON fields: what several verbs print about one. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from planner.build import options_of
from planner.costmodel.evidence import Source
from planner.costmodel.graph import ModelGraph
from planner.costmodel.hardware import ClusterSpec
from planner.costmodel.interval import COVERAGE_FRAC, PLACEMENTS, Interval, has_experts, interval_of, placement_of
from planner.costmodel.kernel_choice import OPS, is_measured, kernels_on
from planner.costmodel.keys import Machine
from planner.costmodel.strategy import RECOMPUTE_KINDS, PlanSpec
from planner.plan import Inputs, Part, Plan
from planner.render import GIB, Grid, count, gib, percent, seconds

# Degrees by the names that scripts may rely on.
DEGREES = ("tp", "pp", "vpp", "dp_replicate", "dp_shard", "cp", "ep")
_STRONG = (Source.MEASURED.name.lower(), Source.INTERPOLATED.name.lower())
COLUMNS = (
    "#", "pp", "vpp", "<schedule", "dp", "<zero", "<cp", "tp", "ep", "mbs", "<recompute", "step s", "MFU %", "peak GiB",
    "free %",
)  # fmt: skip


def leaves(part: Part) -> Iterator[Part]:
    """The leaves below a part, in order."""
    if not part.children:
        yield part
    for child in part.children:
        yield from leaves(child)


def strong_frac(part: Part, evidence: tuple[str, ...] = _STRONG) -> float:
    """Share of the step's seconds that rests on figures of such evidence: measured or interpolated ones."""
    total = part.time_s
    return sum(leaf.time_s for leaf in leaves(part) if leaf.evidence in evidence) / total if total else 0.0


def headline(graph: ModelGraph, global_batch_size: int) -> str:
    """The model in one line."""
    length = f"seq {graph.traced_seq_len:,}  " if graph.unit == "tokens" else ""
    return (
        f"model    {graph.source} ({graph.name})  {graph.num_layers} layers  {count(graph.num_params)} params  "
        f"{length}global batch {global_batch_size:,}"
    )


def cluster_line(cluster: ClusterSpec, num_gpus: int, engine: str) -> str:
    """The machine in one line."""
    nodes = max(1, num_gpus // cluster.node_size)
    links = ", ".join(f"{t.name} {t.bandwidth_bytes_per_s.value / 1e9:g} GB/s" for t in cluster.tiers)
    return (
        f"cluster  {cluster.name}  {nodes:,} x {min(num_gpus, cluster.node_size)} = {num_gpus:,} GPUs  "
        f"{cluster.device.memory_bytes.value / GIB:.0f} GiB each  {links}  engine {engine}"
    )


def kernels_text(inputs: Inputs) -> str:
    """The implementation of most kernels, and of the others by op: "ours; rms_norm liger (measured)"."""
    counts = Counter(inputs.engine.kernels.values())
    most = max(counts, key=lambda how: counts[how], default="the engine's own")
    others = [
        f"{op} {how}" + " (measured)" * is_measured(inputs.cluster.device.measured, inputs.graph.dtype, op, how)
        for op, how in sorted(inputs.engine.kernels.items())
        if how != most and OPS.get(op) != (how,)
    ]
    return "; ".join(filter(None, (most, ", ".join(others))))


def kernel_lines(plan: Plan) -> tuple[str, ...]:
    """One line about a choice that is not the one of a device where nobody chose; nothing about any other."""
    kernels, default = plan.inputs.engine.kernels, kernels_on(plan.inputs.cluster.device.name)
    chosen = any(how != default.get(op) for op, how in kernels.items())
    return (f"kernels  {kernels_text(plan.inputs)}",) if chosen else ()


def option_cells(spec: PlanSpec) -> tuple[str, ...]:
    """The layout columns of COLUMNS, "pp" to "recompute"."""
    dp = f"{spec.dp_replicate}x{spec.dp_shard}" if spec.dp_replicate > 1 and spec.dp_shard > 1 else str(spec.dp)
    cp = f"u{spec.ulysses} r{spec.ring}" if spec.cp > 1 else "1"
    extras = "+sp" * spec.sequence_parallel
    return (
        str(spec.pp), str(spec.vpp), spec.schedule.value, dp,
        str(spec.zero_stage) + "+cpu" * spec.offload_optimizer, cp, f"{spec.tp}{extras}", str(spec.ep),
        str(spec.micro_batch_size), _strategies(spec),
    )  # fmt: skip


def _strategies(spec: PlanSpec) -> str:
    """Layers by what they recompute, and how many keep their activations on the host: "4 none 92 sel 75 off"."""
    counts = {kind: sum(s.recompute == kind for s in spec.layers) for kind in RECOMPUTE_KINDS}
    used = {kind[:4] if kind != "selective" else "sel": n for kind, n in counts.items() if n}
    offloaded = sum(s.offload_activations for s in spec.layers)
    words = [f"{n} {kind}" for kind, n in used.items()] if len(used) > 1 else [options_of(spec)["recompute"]]
    return " ".join(str(word) for word in words) + (f" {offloaded} off" if offloaded else "")


def plan_row(
    number: int, spec: PlanSpec, step_s: float, mfu_frac: float, peak_bytes: float, machine: Machine
) -> tuple[str, ...]:
    """One row under COLUMNS."""
    free = 1 - peak_bytes / machine.cluster.device.memory_bytes.value
    figures = (f"{step_s:.4g}", percent(mfu_frac), gib(peak_bytes), percent(free, 0))
    return (str(number), *option_cells(spec), *figures)


def step_line(part: Part) -> str:
    """Where the step's seconds go, largest first; what is below half a per cent is summed up."""
    large, rest = [], 0.0
    for leaf in sorted(leaves(part), key=lambda leaf: -leaf.time_s):
        if leaf.time_s >= 0.005 * part.time_s:
            large.append(f"{leaf.name} {leaf.time_s:.3g}")
        else:
            rest += leaf.time_s
    large += [f"other {rest:.2g}"] if rest > 0 else []
    here = strong_frac(part, _STRONG[:1])
    exact = f", {percent(here, 0)} % of it as measured" if here else ""
    return f"step     = {' + '.join(large)} (s); {percent(strong_frac(part), 0)} % on measured figures{exact}"


def interval_for(plan: Plan) -> Interval:
    """How far steps of such plans lay from their predictions."""
    inputs, spec = plan.inputs, plan.decisions
    moe = has_experts(inputs.graph)
    return interval_of(inputs.engine.name, placement_of(inputs.cluster, inputs.num_gpus, spec.tp, spec.pp, moe))


def interval_line(plan: Plan) -> str:
    """The interval beside the predicted step time, and what it rests on."""
    found, step_s = interval_for(plan), plan.predicted.step_s
    whose = f"under {found.engine}" if found.engine else "under other engines"
    return (
        f"interval {seconds(found.low_ratio * step_s)} to {seconds(found.high_ratio * step_s)} holds "
        f"{percent(COVERAGE_FRAC, 0)} % of steps, as of {found.num_runs:,} runs {whose} {PLACEMENTS[found.placement]}"
    )


def certificate_line(plan: Plan) -> str:
    """What was proved, in one line."""
    proof = plan.certificate
    if proof is None:
        return "status   given by hand: nothing was proved about it"
    words = {
        "gap": "every candidate closed",
        "exhausted": "the whole space was searched",
        "time_limit": "stopped at the time limit",
        "interrupted": "interrupted",
    }
    return (
        f"status   best of {proof.num_candidates:,} candidates; lower bound {seconds(proof.lower_bound_s)}: at most "
        f"{100 * proof.gap_frac:.2g} % faster exists (proved); {words.get(proof.stop_reason, proof.stop_reason)}"
    )


def memory_grid(plan: Plan) -> Grid:
    """Memory of the first, fullest and last pipeline ranks."""
    ranks = plan.predicted.memory
    fullest = max(range(len(ranks)), key=lambda k: ranks[k].peak_bytes)
    rows = []
    for k in sorted({0, fullest, len(ranks) - 1}):
        m = ranks[k]
        held = (m.states_bytes, m.activations_bytes, m.work_bytes, m.fixed_bytes)
        sums = (m.peak_bytes, m.simulated_peak_bytes, m.host_bytes)
        rows.append((f"rank {k}", *(gib(x) for x in (*held, *sums)), f"{m.in_flight:.1f}"))
    names = ("states", "activations", "transient", "fixed", "peak", "simulated", "on host", "in flight")
    return Grid(columns=("<GiB", *names), rows=tuple(rows))


def plan_data(plan: Plan) -> dict[str, object]:
    """The JSON fields of a plan that every verb gives."""
    spec, predicted, proof = plan.decisions, plan.predicted, plan.certificate
    interval = interval_for(plan)
    return {
        "step_s": predicted.step_s,
        "step_s_low": interval.low_ratio * predicted.step_s,
        "step_s_high": interval.high_ratio * predicted.step_s,
        "simulated_step_s": predicted.simulated_step_s,
        "tokens_per_s": predicted.tokens_per_s,
        "mfu_frac": predicted.mfu_frac,
        "peak_memory_bytes": predicted.peak_memory_bytes,
        "memory_limit_bytes": predicted.memory_limit_bytes,
        "num_gpus": spec.num_gpus,
        "global_batch_size": spec.global_batch_size,
        "lower_bound_s": proof.lower_bound_s if proof else None,
        "gap_frac": proof.gap_frac if proof else None,
        "num_candidates": proof.num_candidates if proof else None,
        "stop_reason": proof.stop_reason if proof else None,
        "ledger": proof.ledger if proof else None,
        "executable": plan.executable,
        "executable_reasons": list(plan.executable_reasons),
        "breakdown_s": {leaf.name: leaf.time_s for leaf in leaves(predicted.breakdown)},
        **options_of(spec),
    }
