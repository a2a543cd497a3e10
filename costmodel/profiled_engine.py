"""The engine as a profile found it: what it costs the host, and what it hides behind compute. Its cluster: profiled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from planner.costmodel.engine import EngineSpec
from planner.costmodel.hardware import ClusterSpec
from planner.costmodel.profile import PER_STAGE, Profile, Sample
from planner.costmodel.profiled import describes, world_of

_OVERLAPS = ("overlap_tp", "overlap_tp_column", "overlap_cp", "overlap_ep", "overlap_p2p", "overlap_p2p_interleaved",
             "overlap_grad_reduce", "overlap_param_gather", "overlap_zero3")  # fmt: skip
_BLOCKING = ("overlap_grad_reduce", "overlap_param_gather", "overlap_zero3")  # of FSDP2, which has no streams on CPUs


def fit_engine(engine: EngineSpec, profile: Profile, cluster: ClusterSpec, num_gpus: int) -> EngineSpec:
    """`engine` with the host's times, and with overlap capped by what a collective hides beside a GEMM.

    Where compute is on the host, launches are part of every measured time, and the rest of its time hides nowhere.
    """
    world = world_of(profile, cluster, num_gpus)
    samples, cores = _taken_with(profile, cluster, world), _cores(profile, cluster)
    changes: dict[str, Any] = {}
    launch = [s.time_s for s in samples if s.kind == "launch"]
    if cluster.device.name == "cpu":
        changes |= {"host_launch_s": 0.0, "blocking_launches": True}
        blocking: dict[str, Any] = dict.fromkeys(_BLOCKING, 0.0)
        engine = replace(engine, **blocking)
    elif launch:
        changes["host_launch_s"] = float(np.median(launch))
    changes |= _host(samples, world, cores) or _host_of_others(profile, cluster, world)
    hidden = hidden_frac(samples)
    if hidden is not None:
        changes |= {name: min(getattr(engine, name), hidden) for name in _OVERLAPS}
    return replace(engine, **changes)


def _taken_with(profile: Profile, cluster: ClusterSpec, ranks: int) -> list[Sample]:
    """Samples of the cluster's device that so many ranks took at once."""
    return [s for s in profile.samples if describes(profile.where(s), cluster) and profile.where(s).ranks == ranks]


def _host_of_others(profile: Profile, cluster: ClusterSpec, world: int) -> dict[str, Any]:
    """Host times as the nearest other number of ranks has them; ranks that share a CPU's cores take turns on them."""
    shared = cluster.device.name == "cpu"
    ranks = {one.ranks for one in profile.conditions if describes(one, cluster)} - {world}
    for other in sorted(ranks, key=lambda r: abs(np.log(r / world))):
        found = _host(_taken_with(profile, cluster, other), other, _cores(profile, cluster))
        scale = world / other if shared else 1.0
        if found:
            cut = {option: tuple(scale * s for s in both) for option, both in found["host_cut_s"].items()}
            pairs = {name: tuple(scale * s for s in found[name]) for name in ("host_shard_s", "host_sync_s")}
            return {**pairs, "host_cut_s": cut, "host_stage_s": scale * found["host_stage_s"]}
    return {}


def _cores(profile: Profile, cluster: ClusterSpec) -> int:
    """Cores that ranks on a CPU share; 0 on other devices, which nobody shares."""
    if cluster.device.name != "cpu":
        return 0
    return max((one.devices_per_node for one in profile.conditions if describes(one, cluster)), default=1)


# Collectives in a layer's forward, and as many in its backward, by the option that cuts it (costmodel.layer_comm).
_IN_A_LAYER = {"tp": {"all_reduce": 2}, "sp": {"all_gather": 2, "reduce_scatter": 2}, "cp": {"all_to_all": 4}}


def _host(samples: Sequence[Sample], world: int, cores: int) -> dict[str, Any]:
    """Host times from a small model under each option: what it took longer than without, and than its collectives.

    What cuts tensors does it over two ranks, and the others are its replicas. {} when the model was not measured
    without any option, and under FSDP2.
    """
    rows = {s.name: s for s in samples if s.kind == "runtime"}
    if not {"plain/forward", "plain/backward", "shard/forward", "shard/backward"} <= set(rows):
        return {}
    first = rows["plain/forward"]
    layers, ops = first.dims["layers"], first.dims["ops"]

    def more_s(option: str, way: str, than: str = "plain") -> float:
        return (rows[f"{option}/{way}"].time_s - rows[f"{than}/{way}"].time_s) / layers

    ways = ("forward", "backward")
    shard = tuple(max(more_s("shard", way), 0.0) for way in ways)
    sync: tuple[float, ...] = (0.0, 0.0)
    if {f"sync/{way}" for way in ways} <= set(rows):
        sent_s = (_latency_s(samples, name, world) for name in ("all_gather", "reduce_scatter"))
        sync = tuple(max(more_s("sync", way, "shard") - s, 0.0) for way, s in zip(ways, sent_s, strict=True))
    cut = {}
    for option, calls in _IN_A_LAYER.items():
        if not {f"{option}/{way}" for way in ways} <= set(rows):
            continue
        sent = sum(count * _latency_s(samples, name, 2) for name, count in calls.items())
        replicas = option == "cp" or world > 2  # context ranks share parameters
        known = [sent + (part if replicas else 0.0) for part in shard]
        cut[option] = tuple(
            max(more_s(option, way) - part, 0.0) / ops for way, part in zip(ways, known, strict=True)
        )
    stage_s = _stage_s(rows, samples, world, cores)
    return {"host_shard_s": shard, "host_sync_s": sync, "host_cut_s": cut, "host_stage_s": stage_s}


def _stage_s(rows: Mapping[str, Sample], samples: Sequence[Sample], world: int, cores: int) -> float:
    """Host time of a stage for one pass of a micro-batch, from a pipeline over all ranks; 0 if none was measured.

    Of m micro-batches on p stages 1F1B takes m + p - 1 times a stage's (Narayanan et al. 2021, section 2.2.1). Where
    stages share cores, kernels were measured as slow as they are with all of them busy: then the step is the mean
    stage's work, or the pipeline with a core to every stage, if that is longer.
    """
    if "pp/step" not in rows:
        return 0.0
    count, share = PER_STAGE * world, max(world / cores, 1.0) if cores else 1.0
    both_s = rows["pp/step"].time_s / max(count, (count + world - 1) / share)
    kernels_s = sum(rows[f"plain/{way}"].time_s for way in ("forward", "backward")) / world
    return max((both_s - kernels_s) / 2 - _latency_s(samples, "send_recv", 2), 0.0)


def _latency_s(samples: Sequence[Sample], name: str, ranks: int) -> float:
    """Seconds of the smallest collective of this name over all ranks, 0 if there is none."""
    found = [s for s in samples if s.kind == "collective" and s.name == name and s.dims["ranks"] == ranks]
    return min(found, key=lambda s: s.dims["num_bytes"]).time_s if found else 0.0


def hidden_frac(samples: Iterable[Sample]) -> float | None:
    """Median share of the shorter of GEMM and collective that running both at once hides; None if not measured."""
    times = {s.what: s.time_s for s in samples}
    found = []
    for (kind, name, dtype, sizes), both_s in times.items():
        if kind != "collective_gemm":
            continue
        alone = (times.get(("collective", name, dtype, sizes[:3])), times.get(("gemm", "", dtype, (1.0, *sizes[3:]))))
        if alone[0] and alone[1]:
            found.append((alone[0] + alone[1] - both_s) / min(alone[0], alone[1]))
    return float(np.clip(np.median(found), 0.0, 1.0)) if found else None


def pair_frac(samples: Iterable[Sample]) -> float | None:
    """Median time of two equal collectives at once over that of one after the other; None if not measured."""
    times = {s.what: s.time_s for s in samples}
    found = [
        both_s / (2 * times["collective", name, dtype, sizes])
        for (kind, name, dtype, sizes), both_s in times.items()
        if kind == "collective_pair" and ("collective", name, dtype, sizes) in times
    ]
    return float(np.median(found)) if found else None
