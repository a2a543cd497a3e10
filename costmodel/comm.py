"""Collective times over link tiers, vectorised; seconds, float64, inputs broadcast.

A group of a mesh axis is (stride, size): ranks r0 + i*stride. On tier i, c_i members of the group sit in one domain
(c_-1 = 1, c_last = size). Legend: n bytes, k = size, B_i = bandwidth * efficiency of tier i per GPU.
Ring (NCCL, and SYSTEMS.md 2.2): a chunk is n/k; hops_i = k/c_(i-1) - k/c_i of the k-1 steps cross tier i, and c_(i-1)
members share what leaves their domain, each with its own NIC, so tier i needs (k-1) n/k / (c_(i-1) B_i). The tiers
work as a pipeline: the slowest sets the rate, latencies add. An all-reduce is the faster of ring, tree and in-switch
(NVLS) reduction, as NCCL chooses. All terms grow with bytes, fall with bandwidth and grow with latency.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planner.costmodel.hardware import ClusterSpec, CollectiveFit

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
            return members
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


def _latency_s(fits: list[CollectiveFit], hops: list[Array], chunk_bytes: Array) -> Array:
    """Start of the collective plus its hops, each dearer once chunks leave the low-latency protocol."""
    total = fits[0].base_s * (sum(hops) > 0)
    for fit, count in zip(fits, hops, strict=True):
        ramp = -np.expm1(-chunk_bytes / fit.ramp_bytes)
        total = total + count * (fit.step_s + fit.ramp_step_s * ramp)
    return np.asarray(total, np.float64)


def _rate(cluster: ClusterSpec, tier: int, fit: CollectiveFit) -> float:
    return cluster.tiers[tier].bandwidth_bytes_per_s.value * fit.efficiency


def _ring_s(cluster: ClusterSpec, domains: tuple[int, ...], name: str, num_bytes: ArrayLike, stride: ArrayLike,
            size: ArrayLike, passes: int) -> Array:
    """Ring of `passes` turns over the group: 1 for all-gather and reduce-scatter, 2 for all-reduce."""
    fits = _fits(cluster, domains, name)
    group = _group(domains, stride, size)
    chunk = np.asarray(num_bytes, np.float64) / group.size
    hops = [passes * group.hops(tier) for tier in range(len(fits))]
    wire = np.zeros_like(chunk * group.size)
    for tier, fit in enumerate(fits):
        steps = passes * (group.size - 1) + fit.fill_steps
        needed = chunk * steps / (group.inner(tier) * _rate(cluster, tier, fit))
        wire = np.maximum(wire, np.where(hops[tier] > 0, needed, 0.0))
    return wire + _latency_s(fits, hops, chunk)


def all_gather_s(cluster: ClusterSpec, domains: tuple[int, ...], num_bytes: ArrayLike, stride: ArrayLike,
                 size: ArrayLike) -> Array:
    """Seconds to gather; `num_bytes` is the full gathered tensor on each GPU. NCCL ring: (k-1) n/k per GPU."""
    return _ring_s(cluster, domains, "all_gather", num_bytes, stride, size, 1)


def reduce_scatter_s(cluster: ClusterSpec, domains: tuple[int, ...], num_bytes: ArrayLike, stride: ArrayLike,
                     size: ArrayLike) -> Array:
    """Seconds to reduce-scatter; `num_bytes` is the full tensor before it. NCCL ring: (k-1) n/k per GPU."""
    return _ring_s(cluster, domains, "reduce_scatter", num_bytes, stride, size, 1)


def all_reduce_s(cluster: ClusterSpec, domains: tuple[int, ...], num_bytes: ArrayLike, stride: ArrayLike,
                 size: ArrayLike) -> Array:
    """Seconds to all-reduce `num_bytes` per GPU: the fastest of ring, tree across domains, and in-switch (NVLS)."""
    ring = _ring_s(cluster, domains, "all_reduce", num_bytes, stride, size, 2)
    if cluster.backend == "gloo":
        return ring
    return np.minimum(ring, _tree_s(cluster, domains, num_bytes, stride, size))


def _tree_s(cluster: ClusterSpec, domains: tuple[int, ...], num_bytes: ArrayLike, stride: ArrayLike,
            size: ArrayLike) -> Array:
    """Double binary tree over domains (Sanders et al. 2009; NCCL 2.4), NVLS or a chain inside the innermost one.

    Between domains each side sends n once when there are two of them and 2n otherwise; inside, NVLS moves n
    through the switch (each GPU sends and receives n at once), a chain 2n. Without NVLS a group inside one domain
    has no tree (inf): NCCL does not offer it.
    """
    fits = _fits(cluster, domains, "all_reduce")
    group = _group(domains, stride, size)
    n = np.asarray(num_bytes, np.float64) + 0 * group.size
    nvls = cluster.tiers[0].nvls_efficiency
    inside = n / (cluster.tiers[0].bandwidth_bytes_per_s.value * nvls) if nvls else 2 * n / _rate(cluster, 0, fits[0])
    wire = np.where(group.members[0] > 1, inside, 0.0)
    depth = [group.members[0] - 1.0]
    for tier in range(1, len(fits)):
        branches = group.members[tier] / group.inner(tier)
        sent = n * np.where(branches > 2, 2.0, np.where(branches > 1, 1.0, 0.0))
        wire = np.maximum(wire, sent / (group.inner(tier) * _rate(cluster, tier, fits[tier])))
        depth.append(2 * np.ceil(np.log2(branches)))
    # The chain inside a domain goes up and down; a switch reduces in the same two traversals.
    depth[0] = 2 * depth[0]
    time = wire + _latency_s(fits, depth, n / group.size)
    one_domain = (group.size == group.members[0]) & (group.size > 1)
    return np.where(one_domain & (nvls == 0), np.inf, time)


def all_to_all_s(cluster: ClusterSpec, domains: tuple[int, ...], num_bytes: ArrayLike, stride: ArrayLike,
                 size: ArrayLike) -> Array:
    """Seconds of an all-to-all; `num_bytes` is each GPU's whole send buffer, 1/k of which stays with it.

    Bytes for peers in the same innermost domain use its links, all others leave through the outer tiers at once.
    """
    fits = _fits(cluster, domains, "all_to_all")
    group = _group(domains, stride, size)
    chunk = np.asarray(num_bytes, np.float64) / group.size
    wire = np.zeros_like(chunk * group.size)
    peers: list[Array] = []
    for tier, fit in enumerate(fits):
        inner = group.inner(tier)
        crossing = (group.members[tier] if tier == 0 else group.size) - inner
        sent = chunk * np.where(crossing > 0, crossing + fit.fill_steps, 0.0)
        wire = np.maximum(wire, sent / _rate(cluster, tier, fit))
        peers.append(group.members[tier] - inner)
    return wire + _latency_s(fits, peers, chunk)


def send_recv_s(cluster: ClusterSpec, domains: tuple[int, ...], num_bytes: ArrayLike, distance: ArrayLike) -> Array:
    """Seconds to send `num_bytes` to the rank `distance` away, over the innermost tier whose domain spans it."""
    fits = _fits(cluster, domains, "send_recv")
    n, away = np.broadcast_arrays(np.asarray(num_bytes, np.float64), np.asarray(distance, np.int64))
    time = np.zeros(n.shape)
    inner = 0
    for tier, fit in enumerate(fits):
        here = (away > 0) & (away >= inner)
        ramp = -np.expm1(-n / fit.ramp_bytes)
        seconds = fits[0].base_s + fit.step_s + fit.ramp_step_s * ramp + n / _rate(cluster, tier, fit)
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
