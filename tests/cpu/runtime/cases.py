"""Parity cases: one for each option of the plan space, and combinations drawn from the space that search uses."""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path

import msgspec

from planner.costmodel.pipeline import ScheduleKind, torch_problem
from planner.costmodel.strategy import STRATEGIES, LayerStrategy, PlanSpec
from planner.profiler.graph_io import encode_graph
from planner.profiler.trace import trace_model
from planner.runtime.support import unsupported
from planner.space import SCHEDULES, Limits, enumerate_cells, layouts

SEQ_LEN, GLOBAL_BATCH, LAYERS = 16, 8, 4
MODELS = {"llama": 96, "gpt": 96, "odd": 128, "hf_llama": 96, "hf_gpt2": 96, "hf_mixtral": 96, "deepseek": 96,
          "biased": 96, "calling": 96}  # fmt: skip


@functools.cache
def traced(source: str, seq_len: int):
    """trace_model of a file of the tests, whose child process takes seconds, once for all tests of a process."""
    return trace_model(source, seq_len=seq_len)


@functools.cache
def graph_of(model: str):
    """The traced graph of a model of parity_models.py; Hugging Face's from their config, as a user's are."""
    here = Path(__file__).with_name("parity_models.py")
    if not model.startswith("hf_"):
        return traced(f"{here}:{model}", SEQ_LEN)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(config_of(model))
        return trace_model(str(config), seq_len=SEQ_LEN)


def config_of(model: str) -> str:
    """The config.json of a Hugging Face model of parity_models.py."""
    import parity_models

    built = getattr(parity_models, model)()
    built.config.architectures = [type(built).__name__]
    return built.config.to_json_string(use_diff=False)


def spec(*, stages=None, layers=None, recompute="none", offload=False, **options) -> PlanSpec:
    parts = options.get("pp", 1) * options.get("vpp", 1)
    stages = stages or tuple((i * LAYERS // parts, (i + 1) * LAYERS // parts) for i in range(parts))
    layers = layers or (LayerStrategy(recompute=recompute, offload_activations=offload),) * LAYERS
    options.setdefault("global_batch_size", GLOBAL_BATCH)
    return PlanSpec(stage_layers=stages, layers=layers, **options)


def case(
    model: str, plan: PlanSpec, folder: Path, resumes: PlanSpec | None = None, compiled: bool = False
) -> dict:
    """What a rank needs to run one case, as JSON. `resumes`: the plan that goes on from its checkpoint."""
    graph = folder / f"{model}.graph.json"
    if not graph.exists():
        graph.write_bytes(encode_graph(graph_of(model)))
    return {"model": model, "spec": msgspec.to_builtins(plan), "graph": str(graph), "vocab": MODELS[model],
            "seq_len": SEQ_LEN, "folder": str(folder), "compiled": compiled,
            "resumes": msgspec.to_builtins(resumes)}  # fmt: skip


_SP = {"sequence_parallel": True, "vocab_parallel": True}
_INTER = {"pp": 2, "vpp": 2, "schedule": ScheduleKind.INTERLEAVED}
_H1 = {"pp": 2, "schedule": ScheduleKind.ZB_H1}
_V = {"pp": 2, "vpp": 2, "schedule": ScheduleKind.ZB_V}

# name -> (ranks, model, plan): each option of runtime/support.py alone, on two ranks where two are enough.
ALONE: dict[str, tuple[int, str, PlanSpec]] = {
    "dp": (2, "llama", spec(dp_shard=2)),
    "dp accumulating": (2, "gpt", spec(dp_shard=2, micro_batch_size=2)),
    "zero1": (2, "llama", spec(dp_shard=2, zero_stage=1)),
    "zero2": (2, "llama", spec(dp_shard=2, zero_stage=2)),
    "zero3": (2, "gpt", spec(dp_shard=2, zero_stage=3)),
    "dp_replicate": (4, "llama", spec(dp_replicate=2, dp_shard=2, zero_stage=3)),
    "tp": (2, "llama", spec(tp=2)),
    "tp hand-written": (2, "odd", spec(tp=2)),
    "tp hf llama": (2, "hf_llama", spec(tp=2)),
    "tp hf gpt2": (2, "hf_gpt2", spec(tp=2)),
    "tp of 2 kv heads": (4, "llama", spec(tp=4)),
    "tp of 2 kv heads, hf": (4, "hf_llama", spec(tp=4, sequence_parallel=True)),
    "sp": (2, "gpt", spec(tp=2, sequence_parallel=True)),
    "sp hand-written": (2, "odd", spec(tp=2, sequence_parallel=True)),
    "vocab_parallel": (2, "llama", spec(tp=2, vocab_parallel=True)),
    "vocab_parallel tied": (2, "gpt", spec(tp=2, **_SP)),
    "vocab_parallel hf": (2, "hf_gpt2", spec(tp=2, **_SP)),
    "chunked_loss": (2, "llama", spec(tp=2, chunked_loss=True, **_SP)),
    "chunked_loss tied hf": (2, "hf_gpt2", spec(dp_shard=2, zero_stage=3, micro_batch_size=2, chunked_loss=True)),
    "pp uneven": (2, "llama", spec(pp=2, stages=((0, 1), (1, 4)))),
    "pp hand-written": (2, "odd", spec(pp=2)),
    "pp hf": (2, "hf_llama", spec(pp=2)),
    "pp tied": (2, "gpt", spec(pp=2)),
    "pp tied hf": (2, "hf_gpt2", spec(pp=2)),
    "interleaved": (2, "llama", spec(**_INTER)),
    "zb_h1": (2, "llama", spec(**_H1)),
    "zb_v": (2, "gpt", spec(**_V)),
    "ulysses": (2, "llama", spec(ulysses=2)),
    "ulysses of 2 kv heads": (4, "hf_llama", spec(ulysses=4)),
    "ring": (2, "gpt", spec(ring=2)),
    "ring hf": (2, "hf_llama", spec(ring=2)),
    "ring and ulysses": (4, "llama", spec(ring=2, ulysses=2)),
    "experts under dp": (2, "hf_mixtral", spec(dp_shard=2, zero_stage=3)),
    "experts under ulysses": (2, "hf_mixtral", spec(ulysses=2)),
    "ep stacked": (2, "hf_mixtral", spec(dp_shard=2, ep=2, zero_stage=1)),
    "ep listed": (2, "deepseek", spec(dp_shard=2, ep=2)),
    "ep over context ranks": (2, "deepseek", spec(ring=2, ep=2, zero_stage=1)),
    "tp of stacked experts": (2, "hf_mixtral", spec(tp=2)),
    "sp of listed experts": (2, "deepseek", spec(tp=2, **_SP)),
    "full": (2, "llama", spec(dp_shard=2, recompute="full", zero_stage=3)),
    "selective": (2, "gpt", spec(tp=2, recompute="selective", **_SP)),
    "offload_activations": (2, "llama", spec(dp_shard=2, offload=True)),
    "offload_activations of full": (2, "gpt", spec(tp=2, recompute="full", offload=True, **_SP)),
    "offload_optimizer": (2, "llama", spec(dp_shard=2, zero_stage=1, offload_optimizer=True)),
}

# Several options at once, chosen for where they meet.
TOGETHER: dict[str, tuple[int, str, PlanSpec]] = {
    "tp sp zero3 full": (4, "llama", spec(tp=2, dp_shard=2, zero_stage=3, recompute="full", **_SP)),
    "chunked_loss pp tp sp tied": (4, "hf_gpt2", spec(pp=2, tp=2, chunked_loss=True, **_SP)),
    "chunked_loss ring tp": (4, "hf_llama", spec(ring=2, tp=2, vocab_parallel=True, chunked_loss=True)),
    "chunked_loss zb_v tp": (4, "llama", spec(tp=2, chunked_loss=True, **_V)),
    "chunked_loss of a whole head under sp": (4, "llama", spec(
        tp=2, sequence_parallel=True, dp_shard=2, zero_stage=2, recompute="full", chunked_loss=True)),
    "tp dp selective": (4, "gpt", spec(dp_replicate=2, tp=2, recompute="selective", vocab_parallel=True)),
    "ring tp sp": (4, "hf_llama", spec(ring=2, tp=2, recompute="full", **_SP)),
    "ulysses zero3": (4, "hf_gpt2", spec(ulysses=2, dp_shard=2, zero_stage=3)),
    "zb_v tp sp tied": (4, "gpt", spec(tp=2, **_V, **_SP)),
    "zb_h1 tp full": (4, "hf_llama", spec(tp=2, recompute="full", **_H1, **_SP)),
    "interleaved ulysses zero1": (4, "llama", spec(ulysses=2, zero_stage=1, offload_optimizer=True, **_INTER)),
    "interleaved zero3": (4, "llama", spec(dp_shard=2, zero_stage=3, **_INTER)),
    "zb_v zero1": (4, "llama", spec(dp_shard=2, zero_stage=1, **_V)),
    "1f1b zero2 mixed layers": (4, "llama", spec(chunked_loss=True, pp=2, dp_shard=2, zero_stage=2, layers=(
        LayerStrategy(recompute="full"), LayerStrategy(recompute="none", offload_activations=True),
        LayerStrategy(recompute="selective"), LayerStrategy(recompute="full", offload_activations=True)))),
    "ep within zero3, full": (4, "hf_mixtral", spec(dp_shard=4, ep=2, zero_stage=3, recompute="full")),
    "ep pp": (4, "deepseek", spec(dp_shard=2, ep=2, pp=2, zero_stage=1)),
    "ep of replicas": (4, "deepseek", spec(dp_replicate=2, dp_shard=2, ep=4, zero_stage=2)),
    "ep tp sp zero3 full": (4, "hf_mixtral", spec(
        tp=2, dp_shard=2, ep=2, zero_stage=3, recompute="full", global_batch_size=4, **_SP)),
    "ep tp selective": (4, "deepseek", spec(
        tp=2, dp_shard=2, ep=2, zero_stage=1, recompute="selective", global_batch_size=4)),
    "experts tp ulysses": (4, "hf_mixtral", spec(
        tp=2, ulysses=2, zero_stage=2, micro_batch_size=2, global_batch_size=4, **_SP)),
    "experts tp zb_h1": (4, "deepseek", spec(tp=2, global_batch_size=4, **_H1, **_SP)),
    "experts with biases tp zero3": (4, "biased", spec(
        tp=2, dp_shard=2, zero_stage=3, global_batch_size=4, **_SP)),
    "interleaved tp sp selective": (4, "llama", spec(tp=2, recompute="selective", **_INTER, **_SP)),
    "zb_h1 tp sp selective": (4, "llama", spec(tp=2, recompute="selective", **_H1, **_SP)),
    "zb_h1 ring": (4, "llama", spec(ring=2, **_H1)),
    "zb_h1 ep": (4, "hf_mixtral", spec(dp_shard=2, ep=2, **_H1)),
    "zb_v ep": (4, "deepseek", spec(dp_shard=2, ep=2, zero_stage=1, **_V)),
    "ep ulysses zero2 selective": (4, "deepseek", spec(
        chunked_loss=True, ulysses=2, dp_shard=2, ep=2, zero_stage=2, recompute="selective", offload_optimizer=True)),
    "interleaved ep ring zero2": (4, "deepseek", spec(ring=2, ep=2, zero_stage=2, offload=True, **_INTER)),
    "interleaved replicas ring full": (8, "llama", spec(
        chunked_loss=True, dp_replicate=2, ring=2, zero_stage=1, recompute="full", **_INTER)),
    "zb_h1 replicas ulysses": (8, "hf_llama", spec(chunked_loss=True, dp_replicate=2, ulysses=2, zero_stage=1, **_H1)),
    "zb_v replicas ulysses": (8, "gpt", spec(
        dp_replicate=2, ulysses=2, zero_stage=1, offload_optimizer=True, **_V)),
    "ep fewer experts than shards": (8, "hf_mixtral", spec(dp_shard=8, ep=4, zero_stage=3)),
    "kernels called, ring tp sp selective": (4, "calling", spec(ring=2, tp=2, recompute="selective", **_SP)),
    "kernels called, zb_v ulysses zero1 selective": (4, "calling", spec(
        ulysses=2, zero_stage=1, recompute="selective", **_V)),
    "kernels called, tp zero3 full": (4, "calling", spec(tp=2, dp_shard=2, zero_stage=3, recompute="full", **_SP)),
    "everything": (8, "llama", spec(pp=2, tp=2, dp_shard=2, zero_stage=1, recompute="full", **_SP)),
}  # fmt: skip

# Case -> the plan that goes on from its checkpoint.
RESUMED = {
    "ep tp sp zero3 full": spec(dp_shard=4, ep=4, zero_stage=2),
    "experts with biases tp zero3": spec(tp=4, vocab_parallel=True),
}

# (model, ranks, plans) of those drawn, with the ranks as seed.
DRAWN = (("llama", 4, 10), ("gpt", 4, 3), ("llama", 8, 4))


def drawn(model: str, ranks: int, count: int, seed: int) -> list[tuple[str, PlanSpec]]:
    """`count` plans that run, drawn from the cells and layouts that search enumerates."""
    graph = graph_of(model)
    cells = enumerate_cells(graph, ranks, GLOBAL_BATCH, Limits())
    dice = random.Random(seed)
    found: list[tuple[str, PlanSpec]] = []
    while len(found) < count:
        i = dice.randrange(len(cells))
        c = {n: int(getattr(cells, n)[i]) for n in cells.__slots__}
        options = layouts(c["dp"], c["ulysses"] * c["ring"], c["ep"], Limits())
        replicate, shard, zero, offload = (int(x) for x in dice.choice(list(options)))
        kind = SCHEDULES[c["schedule"]]
        plan = spec(
            tp=c["tp"], sequence_parallel=bool(c["sp"]), vocab_parallel=bool(c["vocab_parallel"]),
            ulysses=c["ulysses"], ring=c["ring"], ep=c["ep"], micro_batch_size=c["micro_batch_size"], pp=c["pp"],
            vpp=c["vpp"], schedule=kind, dp_replicate=replicate, dp_shard=shard, zero_stage=zero,
            offload_optimizer=bool(offload), layers=tuple(dice.choice(STRATEGIES) for _ in range(LAYERS)),
        )  # fmt: skip
        if unsupported(plan) or torch_problem(kind, plan.pp, plan.num_microbatches):
            continue
        found.append((describe(plan), plan))
    return found


def describe(plan: PlanSpec) -> str:
    """The plan's options that differ from the default, in one line."""
    shown = {k: v for k, v in msgspec.to_builtins(plan).items() if k not in ("stage_layers", "layers")}
    plain = {k: v for k, v in msgspec.to_builtins(spec()).items()}
    return " ".join(f"{k}={v}" for k, v in shown.items() if v != plain[k])


def plan_of(model: str, plan: PlanSpec, graph=None):
    """The Plan of a spec, priced for H100s."""
    from planner.build import Job, build_plan
    from planner.costmodel.engine import get_engine
    from planner.costmodel.estimate import machine_for
    from planner.costmodel.presets import load_cluster
    from planner.runtime.support import reasons

    graph = graph or graph_of(model)
    machine = machine_for(graph, load_cluster("h100"), get_engine("planner"), plan.num_gpus)
    job = Job(graph=graph, machine=machine, global_batch_size=plan.global_batch_size, memory_margin_frac=0.05)
    return build_plan(job, plan, "test", reasons(plan))
