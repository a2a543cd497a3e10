"""What is worth measuring, as data: kernels at the shapes of a model and its plan space, collectives of a mesh.

No torch here: the command line makes the list, the ranks work through it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from planner.costmodel.comm import group_place
from planner.costmodel.graph import LayerClass, ModelGraph
from planner.costmodel.hardware import COLLECTIVES, ClusterSpec
from planner.costmodel.kernel_choice import KERNELS, WAYS
from planner.costmodel.keys import Keys
from planner.costmodel.layer_times import layer_name
from planner.costmodel.price import rank_gemm
from planner.costmodel.profile import DIMS, NAMES

MICRO_BATCHES = (1, 2, 4, 8)
PROLOGUE, EPILOGUE = "<prologue>", "<epilogue>"  # instead of a layer's module path
_DEFAULT_ROWS = (128, 512, 2048, 8192)
_DEFAULT_WIDTHS = (256, 1024, 4096, 16384)
_MEMORY_BYTES = tuple(2.0**e for e in range(12, 29, 2))
_KERNEL_BYTES = tuple(2.0**e for e in range(18, 29, 2))  # gated linear attention has 1.2 MB a head, and two at least
_MOST_LAUNCHES = 100  # of an implementation that is worth measuring
_COMM_BYTES = tuple(2.0**e for e in range(12, 27, 2))
# What the cases of a kind weigh together: what is measured first before anything is known.
_WEIGHTS = {"gemm": 1.0, "attention": 0.5, "layer": 2.0, "memory": 0.5, "kernel": 0.5, "optimizer": 0.3,
            "collective": 2.0, "collective_pair": 0.1, "collective_gemm": 0.2, "launch": 0.2, "copy": 0.1,
            "runtime": 0.5}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Something to measure; `weight`: how much of a step hangs on it, relative to its kind's other cases."""

    kind: str
    name: str
    dtype: str
    dims: dict[str, float]
    weight: float
    source: str = ""  # model of a layer, and the layer's module in it
    path: str = ""

    @property
    def key(self) -> tuple[str, str, str, tuple[float, ...]]:
        """As Sample.what."""
        return (self.kind, self.name, self.dtype, tuple(float(self.dims[n]) for n in DIMS[self.kind]))


def _case(kind: str, name: str, dtype: str, sizes: Iterable[float], weight: float, **layer: str) -> Case:
    dims = dict(zip(DIMS[kind], map(float, sizes), strict=True))
    return Case(kind=kind, name=name, dtype=dtype, dims=dims, weight=weight, **layer)


def weighted(cases: Iterable[Case]) -> list[Case]:
    """The cases without repetition, weights scaled to a share of a step by kind."""
    unique = list({case.key: case for case in cases}.values())
    totals: dict[str, float] = {}
    for case in unique:
        totals[case.kind] = totals.get(case.kind, 0.0) + case.weight
    return [replace(case, weight=_WEIGHTS[case.kind] * case.weight / totals[case.kind]) for case in unique]


# ---- kernels


def op_cases(graph: ModelGraph | None, dtype: str, world: int, memory_bytes: float) -> list[Case]:
    """Kernels at the shapes of `graph` under every cut over up to `world` ranks, or at a spread of shapes."""
    if graph is None:
        found = [*_default_gemms(dtype), *_default_attentions(dtype)]
        most_params = 2.0**24
    else:
        keys = plan_keys(graph, world)
        found = [*_gemms(graph, keys), *_attentions(graph, keys)]
        most_params = float(graph.num_params)
    sizes = [b for b in _MEMORY_BYTES if b <= memory_bytes / 16]
    found += [_case("memory", name, dtype, (b,), 1.0) for name in NAMES["memory"] for b in sizes]
    params = np.unique(np.geomspace(most_params / 256, min(most_params, memory_bytes / 64), 5).round())
    found += [_case("optimizer", "adamw", "float32", (n,), 1.0) for n in params if n >= 1]
    found += [_case("copy", name, "", (b,), 1.0) for name in NAMES["copy"] for b in sizes]
    found.append(_case("launch", "", "", (), 1.0))
    return [case for case in found if _bytes(case) <= memory_bytes / 4]


def kernel_cases(dtype: str, memory_bytes: float, installed: Collection[str]) -> list[Case]:
    """Every kernel of planner.kernels by every implementation whose package is installed, over sizes."""
    return [
        _case("kernel", f"{name}/{way}/{how}", dtype, (num_bytes,), 1.0)
        for name, kernel in KERNELS.items()
        for way, moves in zip(WAYS, kernel.moves, strict=True)
        for how, (_, launches) in moves.items()
        if how in installed and launches <= _MOST_LAUNCHES
        for num_bytes in _KERNEL_BYTES
        if num_bytes <= memory_bytes / 16 and not (name == "gla" and num_bytes < 2.0**22)
    ]


def _bytes(case: Case) -> float:
    """Memory that a case's operands take, at four bytes each."""
    d = case.dims
    if case.kind == "gemm":
        return 4 * d["batch"] * (d["m"] * d["k"] + d["k"] * d["n"] + d["m"] * d["n"])
    if case.kind == "attention":  # a backward without a fused kernel holds scores
        heads = d["batch"] * d["q_heads"]
        return 4 * heads * (4 * (d["q_len"] + d["kv_len"]) * d["head_dim_qk"])
    return 0.0


def plan_keys(graph: ModelGraph, world: int) -> Keys:
    """Every tensor, context and expert cut over up to `world` ranks with small micro-batches, arrays (K,)."""
    degrees = [d for d in range(1, world + 1) if world % d == 0]
    experts = [e for e in degrees if e == 1 or any(c.num_experts for c in graph.classes)]
    rows = [
        (tp, sp, cp, ep, mbs, vocab)
        for tp, cp, ep, mbs in itertools.product(degrees, degrees, experts, MICRO_BATCHES)
        for sp, vocab in itertools.product((0, 1), (0, 1))
        if tp * cp <= world and (tp > 1 or (sp, vocab) == (0, 0)) and _divides(graph, tp)
    ]
    columns = [np.array(column, np.float64) for column in zip(*rows, strict=True)]
    tp, sp, cp, ep, mbs, vocab = columns
    return Keys(
        tp=tp, sp=sp, ulysses=cp, ring=np.ones_like(cp), ep=ep, micro_batch_size=mbs, vocab_parallel=vocab
    )  # fmt: skip


def _divides(graph: ModelGraph, tp: int) -> bool:
    return all(size % tp == 0 for layer in graph.classes for size in layer.tp_divides)


def _layers(graph: ModelGraph) -> Iterator[tuple[LayerClass, int]]:
    """(layer, how often it is in the model)."""
    counts = [0] * len(graph.classes)
    for run in graph.runs:
        counts[run.layer_class] += run.count
    yield from zip(graph.classes, counts, strict=True)
    yield graph.prologue, 1
    yield graph.epilogue, 1


def _gemms(graph: ModelGraph, keys: Keys) -> list[Case]:
    """Forward, input-gradient and weight-gradient shapes; weight: FLOPs in a step, summed over the plans."""
    flops: dict[tuple[float, ...], float] = {}
    for layer, count in _layers(graph):
        for op in layer.ops:
            if op.gemm is None:
                continue
            batch, m, n, k = (np.broadcast_to(size, keys.tp.shape) for size in rank_gemm(op, keys))
            shapes = [(m, n, k)] if op.backward_flops == 0 else [(m, n, k), (m, k, n), (k, n, m)]
            for rows in (zip(batch, *shape, strict=True) for shape in shapes):
                for sizes in rows:
                    if all(size >= 1 and size == int(size) for size in sizes):
                        flops[sizes] = flops.get(sizes, 0.0) + 2 * count * math.prod(sizes)
    total = sum(flops.values()) or 1.0
    return [_case("gemm", "", graph.dtype, sizes, part / total) for sizes, part in sorted(flops.items())]


def _attentions(graph: ModelGraph, keys: Keys) -> list[Case]:
    flops: dict[tuple[str, tuple[float, ...]], float] = {}
    for layer, count in _layers(graph):
        for op in layer.ops:
            a = op.attention
            if a is None:
                continue
            mask = "causal" if a.causal else "full"
            cut = keys.cut(op.cut) * keys.ulysses
            rows = zip(a.batch * keys.micro_batch_size, a.q_heads / cut, np.maximum(a.kv_heads / cut, 1), strict=True)
            for head in rows:
                sizes = (*head, a.q_len, a.kv_len, a.head_dim_qk, a.head_dim_v)
                if all(size >= 1 and size == int(size) for size in sizes):
                    for way in WAYS:
                        key = (f"{mask}/{way}", tuple(map(float, sizes)))
                        flops[key] = flops.get(key, 0.0) + count * math.prod(sizes[:5])
    total = sum(flops.values()) or 1.0
    return [_case("attention", name, graph.dtype, s, part / total) for (name, s), part in sorted(flops.items())]


def _default_gemms(dtype: str) -> list[Case]:
    shapes = itertools.product((1,), _DEFAULT_ROWS, _DEFAULT_WIDTHS, _DEFAULT_WIDTHS)
    return [_case("gemm", "", dtype, shape, 1 / 64) for shape in shapes]


def _default_attentions(dtype: str) -> list[Case]:
    return [
        _case("attention", name, dtype, (1, heads, heads, length, length, 64, 64), 1 / 64)
        for name in NAMES["attention"]
        for heads, length in itertools.product((4, 16), (256, 1024, 4096))
    ]


# ---- layers


def layer_cases(graph: ModelGraph, source: str) -> list[Case]:
    """Every layer class and both ends of the model in `source`, both ways, at the micro-batch sizes of plans."""
    paths = {}
    for run in graph.runs:
        paths.setdefault(run.layer_class, run.paths[0])
    places = [(layer, paths[i]) for i, layer in enumerate(graph.classes) if i in paths]
    places += [(graph.prologue, PROLOGUE), (graph.epilogue, EPILOGUE)]
    return [
        _case("layer", f"{layer_name(layer)}/{way}", graph.dtype, (size, graph.traced_seq_len), 1.0, source=source,
              path=path)  # fmt: skip
        for layer, path in places
        for size in MICRO_BATCHES
        for way in WAYS
    ]


# ---- what the runtime costs the host

# Layers of reference/model.py and ops of each as the runtime runs them: on GPUs silu(gate) * up is one kernel.
_REFERENCE = {"cpu": (8.0, 15.0), "cuda": (8.0, 14.0)}


def runtime_cases(world: int, platform: str) -> list[Case]:
    """The small model by itself and under every option that costs the host time, cut over all ranks; [] if it cannot.

    It has 8 heads.
    """
    if world not in (2, 4, 8):
        return []
    return [_case("runtime", name, "float32", _REFERENCE[platform], 1.0) for name in NAMES["runtime"]]


# ---- collectives


def comm_cases(cluster: ClusterSpec, world: int, memory_bytes: float) -> list[Case]:
    """Collectives of every kind of group that a mesh over `world` ranks can have on this cluster, over sizes.

    Groups that lie alike on the tiers take the same time: one of them stands for all. Then two at once, and one
    beside a GEMM.
    """
    if world < 2:
        return []
    domains = cluster.domain_sizes(world)
    sizes = [b for b in _COMM_BYTES if 4 * b <= memory_bytes / 4]
    found = [
        _case("collective", name, "float32", (b, size, stride), 1.0)
        for size, stride in _groups(domains, world)
        for name in COLLECTIVES
        if name != "send_recv"
        for b in sizes
    ]
    for distance in _distances(domains, world):
        found += [_case("collective", "send_recv", "float32", (b, 2, distance), 1.0) for b in sizes]
    some = (2.0**16, 2.0**20, 2.0**23)
    for b, name in itertools.product(some, ("all_reduce", "all_gather")):
        found.append(_case("collective_pair", name, "float32", (b, world, 1), 1.0))
        for side in (256, 1024):
            found.append(_case("collective_gemm", name, "float32", (b, world, 1, side, side, side), 1.0))
    # What is hidden is known only beside the GEMM and the collective alone.
    found += [_case("gemm", "", "float32", (1, side, side, side), 1.0) for side in (256, 1024)]
    found += [
        _case("collective", name, "float32", (b, world, 1), 1.0) for b in some for name in ("all_reduce", "all_gather")
    ]
    return found


def _groups(domains: tuple[int, ...], world: int) -> list[tuple[int, int]]:
    """(size, stride) of groups that differ in how they lie on the tiers."""
    parts = [d for d in range(1, world + 1) if world % d == 0]
    seen: dict[tuple[float, ...], tuple[int, int]] = {}
    for size, stride in itertools.product(parts[1:], parts):
        if world % (size * stride) == 0:
            seen.setdefault(group_place(domains, stride, size), (size, stride))
    return sorted(seen.values())


def _distances(domains: tuple[int, ...], world: int) -> list[int]:
    """One distance per tier: the nearest rank that only this tier reaches."""
    inner = [1, *(size for size in domains if size < world)]
    return sorted({size for size in inner if world % (2 * size) == 0} or {1})
