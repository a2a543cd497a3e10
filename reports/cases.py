"""From a row to what the cost model prices: shape, cluster, engine, plan. Raises Skip with the reason."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from planner.costmodel.engine import EngineSpec, get_engine
from planner.costmodel.graph import ModelGraph
from planner.costmodel.hardware import ClusterSpec
from planner.costmodel.pipeline import ScheduleKind, schedule_problem
from planner.costmodel.strategy import LayerStrategy, PlanSpec
from planner.reports import stages
from planner.reports.rows import Row, Skip
from planner.reports.shapes import Shape, build_graph
from planner.reports.systems import Software, cluster_of, software_of

_DTYPES = {
    "bf16": "bfloat16", "fp16": "float16", "fp8": "float8", "mxfp8": "float8",
    "fp16/bf16 (not stated)": "bfloat16", "bf16/fp16 (not stated)": "bfloat16",
}  # fmt: skip
_SCHEDULES = {
    "1f1b": ScheduleKind.ONE_F_ONE_B, "none": ScheduleKind.ONE_F_ONE_B, "grad-accum": ScheduleKind.ONE_F_ONE_B,
    "interleaved": ScheduleKind.INTERLEAVED, "zb-1p": ScheduleKind.ZB_H1, "zb-v": ScheduleKind.ZB_V,
    "v-zb": ScheduleKind.ZB_V, "gpipe": ScheduleKind.GPIPE,
}  # fmt: skip
_PARTITION = re.compile(r"layer partition (\[[\d, ]+\])")
PIPE_MODULES_BEFORE = 2  # DeepSpeed's GPT2ModelPipe: embedding and a transpose come before the layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A row as the cost model sees it."""

    row: Row
    software: Software
    graph: ModelGraph
    cluster: ClusterSpec
    engine: EngineSpec
    spec: PlanSpec

    @property
    def runs(self) -> bool:
        """Whether the software can run the layout at all, whatever memory it has."""
        counts = [end - start for start, end in self.spec.stage_layers]
        return self.software.stages != "nanotron" or stages.nanotron_fills(counts)


def build_case(row: Row) -> Case:
    """The case of `row`; Skip says why there is none."""
    software = software_of(row)
    cluster = cluster_of(row)
    engine = get_engine(software.engine)
    tp = row.whole("tp")
    shape = shape_of(row, software, tp)
    device = cluster.device
    if shape.dtype not in device.peak_flops_per_s:
        raise Skip(f"{device.name} has no {shape.dtype}")
    return Case(row=row, software=software, graph=build_graph(shape), cluster=cluster, engine=engine,
                spec=_spec(row, shape, software, tp))  # fmt: skip


def shape_of(row: Row, software: Software, tp: int) -> Shape:
    """The model of `row`; Llama-like when its MLP is gated, GPT-like otherwise."""
    arch, detail = row.text("arch"), row.text("arch_detail")
    if arch not in ("dense", "moe"):
        raise Skip(f"architecture {arch} has no shape builder")
    heads, hidden = row.whole("n_heads"), row.whole("hidden")
    experts = row.whole("n_experts", 0)
    split_heads = row.number("head_dim", hidden / heads) * heads != hidden
    if arch == "moe" and split_heads and "Moonlight" in row.text("model_name"):
        raise Skip("latent attention has no shape builder")
    gated = bool(row.whole("gated_mlp", int("llama" in detail.lower())))
    multiple = software.vocab_multiple * tp
    tied = row.whole("tied_embed", -1)
    if tied < 0:
        tied = int("implies tied embeddings" in row.text("notes") or bool(software.tied))
    dtype = _DTYPES.get(row.text("dtype"))
    if dtype is None:
        raise Skip(f"dtype {row.text('dtype')} has no kernel model")
    return Shape(
        num_layers=row.whole("n_layers"), hidden=hidden, heads=heads, kv_heads=row.whole("n_kv_heads", heads),
        ffn=row.whole("expert_ffn") if experts else row.whole("ffn_hidden"),
        head_dim=row.whole("head_dim", hidden // heads), vocab=-(-row.whole("vocab") // multiple) * multiple,
        seq_len=row.whole("seq_len"), gated=gated, tied=bool(tied), rotary=gated,
        qk_norm="qwen3" in row.text("model_name").lower(), num_experts=experts, top_k=row.whole("top_k", 0),
        fused_projections=software.fused_projections, dtype=dtype,
    )  # fmt: skip


def _spec(row: Row, shape: Shape, software: Software, tp: int) -> PlanSpec:
    pp, vpp, dp = row.whole("pp"), row.whole("vpp", 1), row.whole("dp")
    ring, ulysses = row.whole("cp", 1), row.whole("ulysses", 1)
    if tp * pp * dp * ring * ulysses != row.whole("n_gpus"):
        raise Skip("degrees do not multiply to the GPUs")
    batch, micro = row.whole("global_batch"), row.whole("micro_batch")
    if batch % dp or (batch // dp) % micro:
        raise Skip("global batch is not a multiple of dp x micro-batch")
    if max(shape.heads % tp, shape.ffn % tp):
        raise Skip("tp does not divide heads and FFN")
    if row.text("offload", "none") != "none":
        raise Skip("offload is not described well enough to price")
    schedule = _schedule(row, pp, vpp)
    problem = schedule_problem(schedule, pp, vpp, batch // (dp * micro))
    if problem:
        raise Skip(f"schedule not in the cost model: {problem.split(',')[0]}")
    zero = row.whole("zero_stage", 0)
    kind = _recompute(row)
    return PlanSpec(
        tp=tp, sequence_parallel=tp > 1 and row.text("megatron_sp", "0").startswith(("1", "yes")), pp=pp, vpp=vpp,
        schedule=schedule, dp_replicate=1 if zero else dp, dp_shard=dp if zero else 1, zero_stage=zero,
        ulysses=ulysses, ring=ring, ep=row.whole("ep", 1), micro_batch_size=micro, global_batch_size=batch,
        vocab_parallel=tp > 1, stage_layers=_stages(row, shape, software, pp, vpp),
        layers=(LayerStrategy(recompute=kind),) * shape.num_layers,
    )  # fmt: skip


def _schedule(row: Row, pp: int, vpp: int) -> ScheduleKind:
    words = row.text("schedule", "1f1b").lower()
    if pp == 1:
        return ScheduleKind.ONE_F_ONE_B
    if vpp > 1 and not words.startswith(("zb", "v-")):
        return ScheduleKind.INTERLEAVED
    name = words.split(" ")[0]
    if name not in _SCHEDULES:
        raise Skip(f"not in the cost model: schedule {row.text('schedule')}")
    return _SCHEDULES[name]


def _recompute(row: Row) -> str:
    words = row.text("recompute", "unknown")
    if words.startswith(("none", "full (")) or words in ("full", "selective", "selective:core_attn"):
        return words.split(" ")[0].split(":")[0]
    if words.startswith("selective:save_qkv_proj"):
        return "full"
    if words.startswith("selective:save_dot_only"):
        return "selective"
    if words == "unknown":
        raise Skip("recompute not stated")
    raise Skip(f"recompute {words.split(' (')[0]} has no strategy")


def _stages(row: Row, shape: Shape, software: Software, pp: int, vpp: int) -> stages.Stages:
    printed = _PARTITION.search(row.text("notes"))
    if printed:
        return stages.from_modules(ast.literal_eval(printed[1]), shape.num_layers, PIPE_MODULES_BEFORE)
    if software.stages == "even" or pp == 1:
        return stages.even(shape.num_layers, pp * vpp)
    # FLOPs per token without attention, as both rules count them.
    width = shape.heads * shape.head_dim
    layer = 4 * width * shape.hidden + (2 + shape.gated) * shape.ffn * shape.hidden
    rule = stages.nanotron if software.stages == "nanotron" else stages.balanced
    return rule(shape.num_layers, pp, layer, shape.vocab * shape.hidden)
