"""What the rows' words mean: which software ran (engine, model code, stage rule) and on which cluster.

An entry states a fact about a piece of software or a campaign, from its documentation or source; none holds a
number that was fitted to rows. A row whose `engine` and `cluster` columns are filled needs no entry here.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from dataclasses import dataclass

from planner.costmodel.evidence import Quantity, Source
from planner.costmodel.hardware import ClusterSpec
from planner.costmodel.presets import load_cluster
from planner.costmodel.units import GB, GIB
from planner.reports.rows import Row, Skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """How a campaign's software maps a row to a plan.

    `stages`: "even" (Megatron), "nanotron" or "balanced" (by FLOPs). `vocab_multiple`: the vocabulary is padded
    to a multiple of this times tp. `memory`: what the printed peak counts, "allocated" or "reserved" by torch's
    allocator, or "process" (nvidia-smi), in units of `memory_unit_bytes`.
    """

    engine: str
    stages: str = "even"
    vocab_multiple: int = 1
    memory: str = "allocated"
    memory_unit_bytes: int = GIB
    tied: bool | None = None  # where the row does not say
    fused_projections: bool = True


MEGATRON_VOCAB = 128
_MEGATRON_2021 = Software(engine="megatron-2021", vocab_multiple=MEGATRON_VOCAB, tied=True)
_MEGATRON_CORE = Software(engine="megatron-core", vocab_multiple=MEGATRON_VOCAB)
_NEMO = dataclasses.replace(_MEGATRON_CORE, engine="nemo")
_SAIL = Software(engine="megatron-2023", vocab_multiple=MEGATRON_VOCAB, tied=False)
_BLOOM = Software(engine="megatron-deepspeed-zero1", vocab_multiple=MEGATRON_VOCAB, tied=True, memory="process")
_XLA = Software(engine="xla", fused_projections=False)

# Source, and where a source compares systems "source|system", to the software that ran.
SOFTWARE: dict[str, Software] = {
    "Megatron SC21 (Narayanan 2021)": _MEGATRON_2021,
    "Korthikanti 2022 (activation recomputation)": dataclasses.replace(_MEGATRON_2021, engine="megatron-2022"),
    "Megatron-LM 2020 (images/tables.tex)": _MEGATRON_2021,
    "vTrain": dataclasses.replace(_MEGATRON_2021, engine="megatron-deepspeed"),
    "BigScience-A100 (BLOOM tuning)": _BLOOM,
    "BigScience-A100 (BLOOM tuning)|fp32": dataclasses.replace(_BLOOM, engine="megatron-deepspeed-bf16"),
    "AMP": dataclasses.replace(_MEGATRON_2021, engine="deepspeed-pipe"),
    "Megatron-LM README (mcore r0.8, 2024)": _MEGATRON_CORE,
    "NeMo docs performance summary": _NEMO,
    "Megatron-Bridge perf docs": _NEMO,
    "Megatron-Bridge skills & cards": _NEMO,
    "NVIDIA dgxc-benchmarking": _NEMO,
    "NVIDIA dgxc-benchmarking|xla": _XLA,
    "ZeroBubble": dataclasses.replace(_SAIL, engine="megatron-2023-unfused", memory_unit_bytes=GB),
    "VocabularyParallelism": _SAIL,
    "VocabularyParallelism|Redis": dataclasses.replace(_SAIL, stages="balanced"),
    "Ultra-Scale Playbook (nanotron)": Software(engine="nanotron", stages="nanotron", tied=False),
    "llm-foundry (MosaicML)": Software(engine="llm-foundry", tied=True),
    "PaddleNLP": Software(engine="megatron-core"),
    "Alpa": Software(engine="megatron-2021", vocab_multiple=MEGATRON_VOCAB, tied=True, memory_unit_bytes=GB),
    "Aceso": dataclasses.replace(_MEGATRON_2021, engine="megatron-2022"),
    "ZeRO++": Software(engine="deepspeed"),
}  # fmt: skip
_NOTED = {"xla": "JAX/XLA", "fp32": "fp32 gradient accumulation"}  # variant, and the words of the row that say so
# Systems whose schedule or layout the cost model does not have.
UNMODELLED = {
    "Vocab-1": "vocabulary parallelism over pipeline stages", "Vocab-2": "vocabulary parallelism over pipeline stages",
    "Interlaced": "vocabulary parallelism over pipeline stages", "ZB-2p": "ZB-2p schedule", "V-Half": "V-Half schedule",
    "V-Min": "V-Min schedule", "Aceso": "operator-level plan, not published", "Alpa": "plan not published",
}  # fmt: skip


def software_of(row: Row) -> Software:
    """The software that ran `row`; Skip if nothing is known of it."""
    if row.text("engine"):
        unit = {"": GIB, "GiB": GIB, "GB": GB}.get(row.text("memory_unit"))
        if unit is None:
            raise Skip("memory_unit is neither GiB nor GB")
        return Software(engine=row.text("engine"), memory=row.text("memory_kind", "allocated"), memory_unit_bytes=unit)
    system = row.text("system")
    for word, reason in UNMODELLED.items():
        if word in system:
            raise Skip(f"not in the cost model: {reason}")
    variants = [system.rpartition(": ")[2]]
    variants += [name for name, words in _NOTED.items() if words in row.text("notes")]
    for key in (*(f"{row.source}|{variant}" for variant in variants), row.source):
        if key in SOFTWARE:
            return SOFTWARE[key]
    raise Skip("no engine is known for this source")


_GPUS = {
    "H100-80GB-SXM": "h100", "H100-80GB": "h100", "A100-80GB-SXM": "a100-80gb", "A100-80GB": "a100-80gb",
    "A100-40GB-SXM": "a100-40gb", "V100-32GB": "v100", "V100-32GB-SXM3": "v100", "V100-16GB": "v100",
    "V100-32GB-SXM3 (DGX-2)": "v100", "H200-141GB-SXM": "h200", "B200-180GB": "b200", "GB200-186GB": "gb200-nvl72",
    "B300-288GB": "b300", "GB300-288GB": "gb300-nvl72",
    "A800-80GB": "a800-80gb", "MI250X-GCD-64GB": "mi250x", "MI300X-192GB": "mi300x", "T4-16GB": "t4-g4dn",
}  # fmt: skip
_NODE_RATES = (  # what a node's network carries, in words of the rows; bits per second of the node
    (re.compile(r"(\d+)x ?(?:Omni-Path )?(\d+) ?Gb/s"), lambda m: int(m[1]) * int(m[2]) * 1e9),
    (re.compile(r"([\d.]+) Tbps/node"), lambda m: float(m[1]) * 1e12),
    (re.compile(r"(\d+) ?(?:Gbps|Gb/s)"), lambda m: int(m[1]) * 1e9),
)


def cluster_of(row: Row) -> ClusterSpec:
    """The cluster of `row`: a preset, with the stated node size and network rate where they differ."""
    if row.text("cluster"):
        return load_cluster(row.text("cluster"))
    gpu = row.text("gpu")
    if gpu not in _GPUS:
        raise Skip(f"no device preset for {gpu.split(' (')[0]}")
    preset = "h100-efa" if gpu.startswith("H100") and "EFA" in row.text("inter_node") else _GPUS[gpu]
    return _with_network(preset, row.whole("gpus_per_node"), row.text("inter_node"))


@functools.cache
def _with_network(preset: str, gpus_per_node: int, network: str) -> ClusterSpec:
    cluster = load_cluster(preset)
    inner, outer = cluster.tiers[0], cluster.tiers[-1]
    nodes = {"node_size": gpus_per_node} if inner.domain_size > 8 else _nodes(cluster, gpus_per_node)
    for pattern, rate in _NODE_RATES:
        match = pattern.search(network)
        if match is not None:
            value = rate(match) / 8 / gpus_per_node
            stated = Quantity(value=value, source=Source.DATASHEET, note=f"as the row says: {network}")
            outer = dataclasses.replace(outer, bandwidth_bytes_per_s=stated)
            break
    tiers = nodes.pop("tiers", cluster.tiers)
    return dataclasses.replace(cluster, **nodes, tiers=(*tiers[:-1], outer))


def _nodes(cluster: ClusterSpec, gpus_per_node: int) -> dict[str, object]:
    if cluster.node_size == gpus_per_node or gpus_per_node == 1:
        return {}
    # Sixteen GPUs in a node (DGX-2) are joined by switches, whatever joins eight.
    topology = "switch" if gpus_per_node > cluster.node_size else cluster.tiers[0].topology
    inner = dataclasses.replace(cluster.tiers[0], domain_size=gpus_per_node, topology=topology)
    return {"node_size": gpus_per_node, "tiers": (inner, *cluster.tiers[1:])}
