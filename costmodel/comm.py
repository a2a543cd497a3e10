"""Collective times over link tiers, vectorised; seconds, float64, inputs broadcast.

A group of a mesh axis is (stride, size): ranks r0 + i*stride. On tier i, c_i members of the group sit in one domain
(c_-1 = 1, c_last = size). Legend: n bytes, k = size, B_i = bandwidth * efficiency of tier i per GPU.
Ring (NCCL, and SYSTEMS.md 2.2): a chunk is n/k; every one of the k-1 steps occupies every link, and c_(i-1) members
share what leaves their domain, each with its own NIC, so tier i needs (k-1) n/k / (c_(i-1) B_i) and a gap per step.
The tiers work as a pipeline: the slowest sets the pace, the latencies of one turn (k/c_(i-1) - k/c_i hops cross tier
i) add. An all-reduce is the faster of ring, tree and in-switch (NVLS) reduction, as NCCL chooses. All terms grow with
bytes, fall with bandwidth and grow with latency.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planner.costmodel.hardware import ClusterSpec, CollectiveFit
from planner.costmodel.measured import along

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Where a group lies: `members[i]` = c_i as arrays, tier by tier."""

    size: Array
    members: tuple[Array, ...]

    def inner(self, tier: int) -> Array:
        """Members in one domain of the tier inside `tier`: those that share what leaves it."""
        return self.members[tier - 1] if tier else np.ones_like(self.size)

    def hops(self, tier: int) -> Array:
        """Ring steps that cross `tier`."""
        return self.size / self.inner(tier) - self.size / self.members[tier]


def group_members(domain: int, stride: ArrayLike, size: ArrayLike) -> NDArray[np.int64]:
    """Members of a (stride, size) group inside one domain: min(size, domain // stride), cut to divide `size`."""
    stride_i, size_i = np.broadcast_arrays(np.asarray(stride, np.int64), np.asarray(size, np.int64))
    members = np.clip(domain // stride_i, 1, size_i)
    while True:  # at most `domain` rounds, one for powers of two
        uneven = size_i % members != 0
        if not uneven.any():
            return np.asarray(members, np.int64)
        members = members - uneven


def _group(domains: tuple[int, ...], stride: ArrayLike, size: ArrayLike) -> _Group:
    """Place the group; inside a domain that it fills only in part, the tier outside must be divisible too."""
    counts: list[NDArray[np.int64]] = []
    outer = np.asarray(size, np.int64) + 0 * np.asarray(stride, np.int64)
    whole = outer.astype(np.float64)
    for domain in reversed(domains[:-1]):
        outer = group_members(domain, stride, outer)
        counts.append(outer)
    members = (*(count.astype(np.float64) for count in reversed(counts)), whole)
    return _Group(size=whole, members=members)


def _fits(cluster: ClusterSpec, domains: tuple[int, ...], name: str) -> list[CollectiveFit]:
    if len(domains) != len(cluster.tiers):
        raise ValueError(f"cluster {cluster.name!r} has {len(cluster.tiers)} tiers, got {len(domains)} domain sizes")
    return [tier.collectives[name] for tier in cluster.tiers]


def group_place(domains: tuple[int, ...], stride: int, size: int) -> tuple[float, ...]:
    """Members of a (stride, size) group in one domain of each tier."""
    return tuple(float(count) for count in _group(domains, stride, size).members)


def group_table(name: str, members: Sequence[float]) -> str:
    """Name of the measured table of one collective over a group with `members` in one domain of each tier."""
    return f"{name}/{'x'.join(f'{count:g}' for count in members)}"


def _or_measured(cluster: ClusterSpec, name: str, group: _Group, num_bytes: ArrayLike, formula_s: Array) -> Array:
    """`formula_s`, or the measured curve for groups that lie as one that was measured."""
    if not cluster.measured:
        return formula_s
    members = np.stack(np.broadcast_arrays(*group.members, formula_s)[:-1])
    n = np.broadcast_to(np.asarray(num_bytes, np.float64), members.shape[1:])
    seconds = np.broadcast_to(formula_s, members.shape[1:])
    for key, table in cluster.measured.items():
        kind, _, place = key.partition("/")
        if kind == name:
            here = (members == np.array([float(c) for c in place.split("x")]).reshape(-1, *[1] * n.ndim)).all(axis=0)
            seconds = np.where(here & (n > 0), along(table, n), seconds)
    return np.asarray(seconds, np.float64)


def _ramp_s(fit: CollectiveFit, message_bytes: Array) -> Array:
    """Extra time of a hop whose messages leave the low-latency protocol."""
    return -fit.ramp_step_s * np.expm1(-message_bytes / fit.ramp_bytes)


def _rate(cluster: ClusterSpec, tier: int, efficiency: float, members: Array) -> Array:
    """Bytes per second that one of `members` GPUs in a domain reaches on `tier`, by its topology."""
    spec = cluster.tiers[tier]
    others = np.maximum(members, 2.0) - 1
    share = {"switch": np.ones_like(others), "mesh": others / max(spec.domain_size - 1, 1), "bus": 1 / others}
    return np.asarray(spec.bandwidth_bytes_per_s.value * efficiency * share[spec.topology], np.float64)


def _ring_s(cluster: ClusterSpec, fits: list[CollectiveFit], group: _Group, num_bytes: ArrayLike, passes: int) -> Array:
    """Ring of `passes` turns over the group: 1 for all-gather and reduce-scatter, 2 for all-reduce.

    Each of the passes * (k-1) steps occupies every link of the ring: the slowest tier sets the pace. A chunk's own
    way round the ring, hop by hop, is paid once on top.
    """
    chunk = np.asarray(num_bytes, np.float64) / group.size
    steps = passes * (group.size - 1)
    paced = np.zeros_like(chunk)
    way = fits[0].base_s * (steps > 0)
    for tier, fit in enumerate(fits):
        hops = passes * group.hops(tier)
        message = chunk / group.inner(tier)
        rate = _rate(cluster, tier, fit.efficiency, group.members[tier])
        occupied = (steps + fit.fill_steps) * message / rate + steps * _ramp_s(fit, message)
        paced = np.maximum(paced, np.where(hops > 0, occupied, 0.0))
        way = way + hops * fit.step_s
    return np.asarray(paced + way, np.float64)


def all_gather_s(
    cluster: ClusterSpec, domains: tuple[int, ...], num_bytes: ArrayLike, stride: ArrayLike, size: ArrayLike
) -> Array:
    """Seconds to gather; `num_bytes` is the full gathered tensor on each GPU. NCCL ring: (k-1) n/k per GPU."""
    group = _group(domains, stride, size)
    formula_s = _ring_s(cluster, _fits(cluster, domains, "all_gather"), group, num_bytes, 1)
    return _or_measured(cluster, "all_gather", group, num_bytes, formula_s)


def reduce_scatter_s(
    cluster: ClusterSpec, domains: tuple[int, ...], num_bytes: ArrayLike, stride: ArrayLike, size: ArrayLike
) -> Array:
    """Seconds to reduce-scatter; `num_bytes` is the full tensor before it. NCCL ring: (k-1) n/k per GPU."""
    group = _group(domains, stride, size)
    formula_s = _ring_s(cluster, _fits(cluster, domains, "reduce_scatter"), group, num_bytes, 1)
    return _or_measured(cluster, "reduce_scatter", group, num_bytes, formula_s)


def all_reduce_s(
    cluster: ClusterSpec, domains: tuple[int, ...], num_bytes: ArrayLike, stride: ArrayLike, size: ArrayLike
) -> Array:
    """Seconds to all-reduce `num_bytes` per GPU: the fastest of ring, tree across domains, and in-switch (NVLS)."""
    fits, group = _fits(cluster, domains, "all_reduce"), _group(domains, stride, size)
    formula_s = _ring_s(cluster, fits, group, num_bytes, 2)
    if cluster.backend != "gloo":
        formula_s = np.minimum(formula_s, _tree_s(cluster, fits, group, num_bytes))
    return _or_measured(cluster, "all_reduce", group, num_bytes, formula_s)


def _tree_s(cluster: ClusterSpec, fits: list[CollectiveFit], group: _Group, num_bytes: ArrayLike) -> Array:
    """Double binary tree over domains (Sanders et al. 2009; NCCL 2.4), NVLS or a chain inside the innermost one.

    Between domains each side sends n once when there are two of them and 2n otherwise. Inside, with c members: NVLS
    reads every member's n and a member stores its own n/c (multimem load-reduce and store, Klenk et al. 2020), so a
    link carries n (1 + 1/c); a chain 2n. Without NVLS a group inside one domain has no tree (inf): NCCL offers none.
    """
    n = np.asarray(num_bytes, np.float64) + 0 * group.size
    nvls = cluster.tiers[0].nvls_efficiency
    inner = group.members[0]
    inside = (n * (1 + 1 / inner) if nvls else 2 * n) / _rate(cluster, 0, nvls or fits[0].efficiency, inner)
    wire = np.where(inner > 1, inside, 0.0)
    # The chain inside a domain goes up and down; the measured start of a switched reduction grows with c likewise.
    way = fits[0].base_s + 2 * (inner - 1) * (fits[0].step_s + _ramp_s(fits[0], n / group.size))
    for tier, fit in enumerate(fits[1:], 1):
        branches = group.members[tier] / group.inner(tier)
        sent = n * np.where(branches > 2, 2.0, np.where(branches > 1, 1.0, 0.0))
        rate = group.inner(tier) * _rate(cluster, tier, fit.efficiency, group.members[tier])
        wire = np.maximum(wire, sent / rate)
        message = n / (group.size * group.inner(tier))
        way = way + 2 * np.ceil(np.log2(branches)) * (fit.step_s + _ramp_s(fit, message))
    time = np.where(group.size > 1, wire + way, 0.0)
    one_domain = (group.size == inner) & (group.size > 1)
    return np.where(one_domain & (nvls == 0), np.inf, time)


def all_to_all_s(
    cluster: ClusterSpec, domains: tuple[int, ...], num_bytes: ArrayLike, stride: ArrayLike, size: ArrayLike
) -> Array:
    """Seconds of an all-to-all; `num_bytes` is each GPU's whole send buffer, 1/k of which stays with it.

    Bytes for peers in the same innermost domain use its links, all others leave through the outer tiers at once.
    """
    fits = _fits(cluster, domains, "all_to_all")
    group = _group(domains, stride, size)
    chunk = np.asarray(num_bytes, np.float64) / group.size
    wire = np.zeros_like(chunk * group.size)
    way = fits[0].base_s * (group.size > 1)
    for tier, fit in enumerate(fits):
        inner = group.inner(tier)
        crossing = (group.members[tier] if tier == 0 else group.size) - inner
        sent = chunk * np.where(crossing > 0, crossing + fit.fill_steps, 0.0)
        wire = np.maximum(wire, sent / _rate(cluster, tier, fit.efficiency, group.members[tier]))
        way = way + (group.members[tier] - inner) * (fit.step_s + _ramp_s(fit, chunk))
    return _or_measured(cluster, "all_to_all", group, num_bytes, np.asarray(wire + way, np.float64))


def send_recv_s(cluster: ClusterSpec, domains: tuple[int, ...], num_bytes: ArrayLike, distance: ArrayLike) -> Array:
    """Seconds to send `num_bytes` to the rank `distance` away, over the innermost tier whose domain spans it."""
    fits = _fits(cluster, domains, "send_recv")
    n, away = np.broadcast_arrays(np.asarray(num_bytes, np.float64), np.asarray(distance, np.int64))
    time = np.zeros(n.shape)
    inner = 0
    for tier, fit in enumerate(fits):
        here = (away > 0) & (away >= inner)
        seconds = fits[0].base_s + fit.step_s + _ramp_s(fit, n) + n / _rate(cluster, tier, fit.efficiency, np.ones(()))
        table = cluster.measured.get(f"send_recv/{cluster.tiers[tier].name}")
        seconds = seconds if table is None else along(table, n)
        time = np.where(here, np.maximum(time, seconds), time)
        inner = domains[tier]
    return time


def all_gather_sent_bytes(num_bytes: ArrayLike, size: ArrayLike) -> Array:
    """Bytes each GPU sends in a ring all-gather: n (k-1)/k."""
    k = np.asarray(size, np.float64)
    return np.asarray(np.asarray(num_bytes, np.float64) * (k - 1) / k, np.float64)


def reduce_scatter_sent_bytes(num_bytes: ArrayLike, size: ArrayLike) -> Array:
    """Bytes each GPU sends in a ring reduce-scatter: n (k-1)/k."""
    return all_gather_sent_bytes(num_bytes, size)


def all_reduce_sent_bytes(num_bytes: ArrayLike, size: ArrayLike) -> Array:
    """Bytes each GPU sends in a ring all-reduce: 2 n (k-1)/k."""
    return 2 * all_gather_sent_bytes(num_bytes, size)


def all_to_all_sent_bytes(num_bytes: ArrayLike, size: ArrayLike) -> Array:
    """Bytes each GPU sends to others in an all-to-all: n (k-1)/k of its buffer."""
    return all_gather_sent_bytes(num_bytes, size)


def send_recv_sent_bytes(num_bytes: ArrayLike) -> Array:
    """Bytes the sender sends: n."""
    return np.asarray(num_bytes, np.float64)
