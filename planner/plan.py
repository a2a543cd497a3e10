"""Plan: what to run, what it is predicted to do and what was proved, in one self-contained JSON file.

The file holds its inputs (graph, cluster, engine), so that it can be priced, explained and checked alone
(docs/adr/0003). Its bytes are a function of the inputs and the tool's version: no clock, no path, no host.
Schema `planner.plan/1` may grow optional keys only within a major version of the planner.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import msgspec

from planner.costmodel.engine import EngineSpec
from planner.costmodel.graph import SCHEMA as GRAPH_SCHEMA
from planner.costmodel.graph import ModelGraph, TpCut, check_graph
from planner.costmodel.hardware import ClusterSpec, cluster_from_dict, cluster_sha256, cluster_to_dict
from planner.costmodel.strategy import PlanSpec
from planner.costmodel.strict import canonical_json, refuse_unknown
from planner.errors import PlanFileError, StalePlanError

SCHEMA = "planner.plan/1"
MAX_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What the plan is for. Hashes are of canonical JSON; `source_sha256` is of the file that was traced."""

    graph: ModelGraph
    graph_sha256: str
    source_sha256: str
    cluster: ClusterSpec
    cluster_sha256: str
    engine: EngineSpec
    profile_sha256: str | None
    num_gpus: int
    seq_len: int
    global_batch_size: int
    memory_margin_frac: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One mesh axis."""

    name: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """Axes outermost first. `ep` ranks, each `ep_stride` apart, share the experts; they nest in the data axes."""

    axes: tuple[Axis, ...]
    ep: int
    ep_stride: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A virtual stage: layers [first_layer, last_layer) and the module or parameter paths that it holds.

    `prologue` and `epilogue` are parameter names; a tied head's parameters are on both ends.
    """

    stage: int
    pipeline_rank: int
    first_layer: int
    last_layer: int
    modules: tuple[str, ...]
    prologue: tuple[str, ...] = ()
    epilogue: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamCut:
    """Parameters of one layer class (names within the layer) that tensor parallelism cuts alike."""

    cut: TpCut
    routed: bool
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassCuts:
    """TP cuts of one layer class; `reason` says why it is not cut, empty if it is."""

    name: str
    reason: str
    params: tuple[ParamCut, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of the step; a node's seconds are the exact sum (math.fsum) of the leaves below it."""

    name: str
    time_s: float
    evidence: str
    children: tuple[Part, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Predicted peak of one pipeline rank; `simulated_peak_bytes` is by event simulation chunk by chunk."""

    rank: int
    states_bytes: float
    activations_bytes: float
    work_bytes: float
    fixed_bytes: float
    host_bytes: float
    in_flight: float
    peak_bytes: float
    simulated_peak_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """What the plan is predicted to do; `samples_per_s` counts sequences (images), `tokens_per_s` seq_len of each.

    `mfu_frac`: model FLOPs (causal attention halved, recomputation not counted) over the dense peak.
    """

    step_s: float
    simulated_step_s: float
    samples_per_s: float
    tokens_per_s: float
    mfu_frac: float
    model_flops: float
    peak_memory_bytes: float
    memory_limit_bytes: float
    breakdown: Part
    memory: tuple[RankMemory, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """The declared space: what the user fixed or forbade, and what the engine offers."""

    fixed: dict[str, int | str]
    forbidden: tuple[str, ...]
    zero_stages: tuple[int, ...]
    executable_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What the search proved: no plan of `space` is faster than `lower_bound_s` under this cost model.

    `ledger` counts candidates by the rule that closed them, `refused` those left out and why.
    """

    lower_bound_s: float
    gap_frac: float
    num_candidates: int
    stop_reason: str
    ledger: dict[str, int]
    refused: dict[str, int]
    space: Space
    space_sha256: str
    cost_model_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A runner-up: its options, and its seconds by breakdown leaf."""

    options: dict[str, int | str]
    step_s: float
    peak_memory_bytes: float
    leaves_s: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Sequences of (low, high] tokens, and what carries most of their tokens (`share_of_group` of them).

    `pack_tokens` per rank and `sequences_per_pack` are means over the packs that hold them.
    """

    low: int
    high: int
    share_of_sequences: float
    share_of_tokens: float
    ulysses: int
    ring: int
    recompute: str
    offload_activations: bool
    share_of_group: float
    pack_tokens: float
    sequences_per_pack: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupKind:
    """A kind of group that the dispatcher may form, and how many tokens its ulysses x ring data ranks hold together."""

    ulysses: int
    ring: int
    recompute: str
    offload_activations: bool
    capacity_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SequencePlan:
    """What a plan does with sequences of different lengths, by bucket; the dispatcher follows every batch.

    Expected over `num_batches` sampled batches: `step_s` and its 10th and 90th percentile. `lower_bound_s`: no state
    layout, group or dispatch of the declared space has a smaller mean on them. `static_step_s`: the best plan with
    groups of one kind that holds the longest sequence (None: none does). `bucket_error_frac`: what rounding lengths
    up to the buckets' edges would cost; the dispatcher does not round. `kinds`: its menu, priced anew when it is used.
    `quantiles`: (tokens, share of the sequences with at most so many) of the distribution, to notice when data drifts.
    """

    distribution: str
    source: str
    tokens_per_step: int
    longest_tokens: int
    cut_frac: float
    num_batches: int
    step_s: float
    step_p10_s: float
    step_p90_s: float
    lower_bound_s: float
    gap_frac: float
    static_step_s: float | None
    bucket_error_frac: float
    num_layouts: int
    stop_reason: str
    buckets: tuple[Bucket, ...]
    kinds: tuple[GroupKind, ...] = ()
    quantiles: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A plan. `certificate` is None when the plan was given by hand instead of searched.

    With `sequences`, `decisions` is its state layout with the static plan that holds full-length sequences.
    """

    tool_version: str
    inputs: Inputs
    decisions: PlanSpec
    mesh: Mesh
    num_microbatches: int
    stages: tuple[Stage, ...]
    tp_cuts: tuple[ClassCuts, ...]
    predicted: Predicted
    certificate: Certificate | None
    alternatives: tuple[Alternative, ...]
    executable: bool
    executable_reasons: tuple[str, ...]
    sequences: SequencePlan | None = None


def graph_sha256(graph: ModelGraph) -> str:
    """SHA-256 of the graph's canonical JSON, which is the hash of its saved file."""
    return hashlib.sha256(canonical_json({"schema": GRAPH_SCHEMA, **msgspec.to_builtins(graph)})).hexdigest()


def plan_body(plan: Plan) -> dict[str, Any]:
    """The plan as JSON data, with its schema and the hash of everything else in it."""
    body: dict[str, Any] = msgspec.to_builtins(plan)
    body["inputs"]["cluster"] = cluster_to_dict(plan.inputs.cluster)
    # JSON has no infinity: a trait without a limit is left out, and read back as its default, which has none.
    traits = body["inputs"]["engine"]
    body["inputs"]["engine"] = {key: value for key, value in traits.items() if value != math.inf}
    body["schema"] = SCHEMA
    body["sha256"] = hashlib.sha256(canonical_json(body)).hexdigest()
    return body


def encode_plan(plan: Plan) -> bytes:
    """Canonical bytes: sorted keys, one value a line where it fits, embedded inputs on one line each."""
    text = _pretty(plan_body(plan), 0, "")
    return text.encode("ascii") + b"\n"


def _pretty(value: Any, indent: int, key: str) -> str:
    flat = json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False)
    if key in ("graph", "cluster", "engine") or not isinstance(value, dict | list | tuple) or len(flat) + indent <= 112:
        return flat
    pad, end = " " * (indent + 2), " " * indent
    if isinstance(value, dict):
        lines = [f"{pad}{json.dumps(k)}: {_pretty(v, indent + 2, k)}" for k, v in sorted(value.items())]
        return "{\n" + ",\n".join(lines) + f"\n{end}}}"
    return "[\n" + ",\n".join(pad + _pretty(v, indent + 2, "") for v in value) + f"\n{end}]"


def decode_plan(data: bytes, name: str) -> Plan:
    """The plan in `data`; `name` is what errors call the file.

    PlanFileError: not JSON, not a plan, unknown or missing keys, wrong types, or changed since it was written.
    StalePlanError: another schema version.
    """
    body = _parse(data, name)
    schema = body.pop("schema", None)
    if not isinstance(schema, str) or not schema.startswith("planner.plan/"):
        raise PlanFileError(f"{name}: not a plan: schema is {_short(schema)}, expected {SCHEMA!r}")
    if schema != SCHEMA:
        raise StalePlanError(f"{name}: written as {_short(schema)}, this version reads {SCHEMA!r}: search again")
    written = body.pop("sha256", None)
    actual = hashlib.sha256(canonical_json({**body, "schema": schema})).hexdigest()
    plan = _convert(body, name)
    if written != actual:
        raise PlanFileError(
            f"{name}: changed since it was written (sha256 {actual[:12]}, the file says {_short(written, 12)}): "
            "search again, or price a plan of your own with `planner estimate`"
        )
    return plan


def _short(value: Any, length: int = 40) -> str:
    text = value if isinstance(value, str) else repr(value)
    return repr(text[:length]) if isinstance(value, str) else text[:length]


def _parse(data: bytes, name: str) -> dict[str, Any]:
    if len(data) > MAX_BYTES:
        raise PlanFileError(f"{name}: {len(data):,} bytes is more than a plan can be ({MAX_BYTES:,})")
    try:
        body = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise PlanFileError(f"{name}: not a plan: {error or 'nested too deeply'}") from None
    if not isinstance(body, dict):
        raise PlanFileError(f"{name}: not a plan: holds {type(body).__name__}, expected an object")
    return body


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} appears twice")
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_constant(text)


def _convert(body: dict[str, Any], name: str) -> Plan:
    try:
        refuse_unknown(_without_cluster(body), Plan, "$")
        if isinstance(body.get("inputs"), dict) and "cluster" in body["inputs"]:
            cluster = cluster_from_dict(body["inputs"]["cluster"])
            body = {**body, "inputs": {**body["inputs"], "cluster": cluster}}
        plan: Plan = msgspec.convert(body, Plan, strict=True)
        check_graph(plan.inputs.graph)
    except (ValueError, RecursionError, OverflowError) as error:  # msgspec.ValidationError is a ValueError
        raise PlanFileError(f"{name}: damaged or not a {SCHEMA}: {error}") from None
    for what, said, is_now in (
        ("graph", plan.inputs.graph_sha256, graph_sha256(plan.inputs.graph)),
        ("cluster", plan.inputs.cluster_sha256, cluster_sha256(plan.inputs.cluster)),
    ):
        if said != is_now:
            raise PlanFileError(f"{name}: inputs.{what} has sha256 {is_now[:12]}, the file says {_short(said, 12)}")
    return plan


def _without_cluster(body: Mapping[str, Any]) -> dict[str, Any]:
    inputs = body.get("inputs")
    if not isinstance(inputs, dict):
        return dict(body)
    return {**body, "inputs": {key: value for key, value in inputs.items() if key != "cluster"}}
