import dataclasses

import numpy as np
import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st

from planner.costmodel import comm
from planner.costmodel.presets import list_clusters, load_cluster

GROUPED = (comm.all_gather_s, comm.reduce_scatter_s, comm.all_reduce_s, comm.all_to_all_s)
IDEAL = toy.cluster(toy.tier("link", 0, 100e9), node_size=1)
BYTES = st.floats(1, 1e11)
SIZES = st.integers(0, 6).map(lambda power: 2**power)
PRESETS = st.sampled_from(list_clusters())


def ring(num_bytes, size, cluster=IDEAL):
    return [float(f(cluster, (size,), num_bytes, 1, size)) for f in GROUPED]


def test_ring_by_hand():
    # 8 GB over 8 GPUs at 100 GB/s: 7 steps of 1 GB; an all-reduce takes twice as many.
    assert ring(8e9, 8) == pytest.approx([0.07, 0.07, 0.14, 0.07])


def test_ring_latencies_by_hand():
    # base 10 us, 7 hops of 1 us, half a chunk to fill, 63.2 % of 2 us per step at ramp_bytes per chunk.
    link = toy.tier("link", 0, 100e9, base_s=10e-6, step_s=1e-6, fill_steps=0.5, ramp_step_s=2e-6, ramp_bytes=1e6)
    time_s = comm.all_gather_s(toy.cluster(link, node_size=1), (8,), 8e6, 1, 8)
    assert time_s == pytest.approx(10e-6 + 7e-6 + 7.5 * 1e6 / 100e9 + 7 * 2e-6 * (1 - np.exp(-1)))


def test_alone_is_free():
    for name in list_clusters():
        cluster = load_cluster(name)
        domains = cluster.domain_sizes(cluster.node_size)
        assert [float(f(cluster, domains, 1e9, 1, 1)) for f in GROUPED] == [0, 0, 0, 0]
        assert comm.send_recv_s(cluster, domains, 1e9, 0) == 0


def test_ring_across_nodes_is_paced_by_the_network():
    # 2 nodes of 8, 16 GB: 15 steps of 1 GB; the NICs of a node share a chunk: 1 GB / (8 * 10 GB/s) each.
    time_s = comm.all_gather_s(toy.TWO_TIERS, (8, 16), 16e9, 1, 16)
    assert time_s == pytest.approx(15 / 80)


def test_strided_group_uses_the_network_alone():
    # One GPU per node, 2 nodes: 1 step of half the buffer at 10 GB/s.
    assert comm.all_gather_s(toy.TWO_TIERS, (8, 16), 2e9, 8, 2) == pytest.approx(0.1)


def test_tree_between_nodes_by_hand():
    # Four nodes of 8 with a slow fabric: a ring needs 62 steps of n/32, a tree sends 2n over the 8 NICs of a node.
    hops = toy.cluster(toy.tier("nvlink", 8, 100e9), toy.tier("net", 0, 10e9, step_s=1e-3))
    n = 32e6
    ring_s = 62 * 1e6 / 80e9 + 2 * (32 / 8 - 1) * 1e-3
    tree_s = 2 * n / 80e9 + 2 * 2 * 1e-3
    assert comm.all_reduce_s(hops, (8, 32), n, 1, 32) == pytest.approx(min(ring_s, tree_s))
    assert tree_s < ring_s


def test_nvls_by_hand():
    # In the switch each link carries n (1 + 1/8) at 80 % of 100 GB/s: less than the ring's 2 * 7/8 n.
    switched = toy.cluster(toy.tier("nvlink", 8, 100e9, nvls=0.8), toy.tier("net", 0, 10e9))
    assert comm.all_reduce_s(switched, (8, 8), 8e9, 1, 8) == pytest.approx(8 * 1.125 / 80)
    # Two GPUs gain nothing from it: n (1 + 1/2) / 0.8 > n.
    assert comm.all_reduce_s(switched, (8, 8), 8e9, 1, 2) == pytest.approx(8 / 100)


def test_all_to_all_across_nodes_by_hand():
    # 16 GB buffers, 1 GB per peer: 8 peers over the network at 10 GB/s, 7 inside at 100.
    assert comm.all_to_all_s(toy.TWO_TIERS, (8, 16), 16e9, 1, 16) == pytest.approx(8 / 10)


def test_send_recv_picks_the_tier_that_spans_the_distance():
    distances = np.array([1, 7, 8, 100])
    times = comm.send_recv_s(toy.TWO_TIERS, (8, 128), 1e9, distances)
    assert times == pytest.approx([0.01, 0.01, 0.1, 0.1])


def test_mesh_and_bus_by_hand():
    # Eight GPUs with a wire per pair: 2 of them have 1/7 of the bandwidth, 8 have it all; on a bus it is the reverse.
    mesh = toy.cluster(toy.tier("xgmi", 8, 70e9, topology="mesh"), toy.tier("net", 0, 1e9))
    bus = toy.cluster(toy.tier("pcie", 8, 70e9, topology="bus"), toy.tier("net", 0, 1e9))
    sizes = np.array([2, 8])
    assert comm.all_gather_s(mesh, (8, 8), 7e9, 1, sizes) == pytest.approx([3.5 / 10, 7 * 0.875 / 70])
    assert comm.all_gather_s(bus, (8, 8), 7e9, 1, sizes) == pytest.approx([3.5 / 70, 7 * 0.875 / 10])
    assert comm.send_recv_s(mesh, (8, 8), 7e9, 1) == pytest.approx(7 / 10)


def test_group_members():
    assert comm.group_members(8, 1, np.array([4, 16])).tolist() == [4, 8]
    assert comm.group_members(8, np.array([2, 8, 16]), 4).tolist() == [4, 1, 1]
    assert comm.group_members(8, 1, 12).tolist() == 6  # 8 does not divide 12


def test_sent_bytes():
    assert comm.all_gather_sent_bytes(8.0, 8) == comm.reduce_scatter_sent_bytes(8.0, 8) == 7.0
    assert comm.all_reduce_sent_bytes(8.0, 8) == 14.0
    assert comm.all_to_all_sent_bytes(8.0, 8) == 7.0
    assert comm.send_recv_sent_bytes(8.0) == 8.0
    assert comm.all_reduce_sent_bytes(8.0, 1) == 0.0


def test_wrong_number_of_domains_is_one_line():
    with pytest.raises(ValueError, match="cluster 'toy' has 2 tiers, got 1 domain sizes"):
        comm.all_gather_s(toy.TWO_TIERS, (8,), 1.0, 1, 8)


@given(num_bytes=BYTES, size=SIZES)
def test_ring_all_reduce_is_reduce_scatter_and_all_gather(num_bytes, size):
    link = toy.tier("link", 0, 100e9, step_s=3e-6, ramp_step_s=2e-6)
    gather, scatter, reduce, _ = ring(num_bytes, size, toy.cluster(link, node_size=1))
    assert reduce == pytest.approx(gather + scatter)
    sent = comm.all_gather_sent_bytes(num_bytes, size) + comm.reduce_scatter_sent_bytes(num_bytes, size)
    assert comm.all_reduce_sent_bytes(num_bytes, size) == sent


@given(num_bytes=BYTES, size=SIZES)
def test_wire_time_is_sent_bytes_over_bandwidth(num_bytes, size):
    sent = [
        comm.all_gather_sent_bytes,
        comm.reduce_scatter_sent_bytes,
        comm.all_reduce_sent_bytes,
        comm.all_to_all_sent_bytes,
    ]
    assert ring(num_bytes, size) == pytest.approx([f(num_bytes, size) / 100e9 for f in sent])


def widened(cluster, tier, by):
    rate = cluster.tiers[tier].bandwidth_bytes_per_s
    tiers = list(cluster.tiers)
    wide = dataclasses.replace(rate, value=rate.value * by)
    tiers[tier] = dataclasses.replace(tiers[tier], bandwidth_bytes_per_s=wide)
    return dataclasses.replace(cluster, tiers=tuple(tiers))


@given(name=PRESETS, num_bytes=BYTES, more=st.floats(1, 100), stride=SIZES, size=SIZES)
def test_more_bytes_are_never_faster(name, num_bytes, more, stride, size):
    cluster = load_cluster(name)
    domains = cluster.domain_sizes(4096)
    for f in GROUPED:
        before = f(cluster, domains, num_bytes, stride, size)
        assert f(cluster, domains, num_bytes * more, stride, size) >= before * (1 - 1e-12)
    before = comm.send_recv_s(cluster, domains, num_bytes, stride)
    assert comm.send_recv_s(cluster, domains, num_bytes * more, stride) >= before


@given(name=PRESETS, num_bytes=BYTES, by=st.floats(1, 100), tier=st.integers(0, 1), stride=SIZES, size=SIZES)
def test_more_bandwidth_is_never_slower(name, num_bytes, by, tier, stride, size):
    cluster = load_cluster(name)
    wide, domains = widened(cluster, tier, by), cluster.domain_sizes(4096)
    for f in GROUPED:
        before = f(cluster, domains, num_bytes, stride, size)
        assert f(wide, domains, num_bytes, stride, size) <= before * (1 + 1e-12)
    before = comm.send_recv_s(cluster, domains, num_bytes, stride)
    assert comm.send_recv_s(wide, domains, num_bytes, stride) <= before


@given(name=PRESETS, num_bytes=BYTES, stride=st.lists(SIZES, min_size=1, max_size=5), size=SIZES)
def test_arrays_give_what_single_calls_give(name, num_bytes, stride, size):
    cluster = load_cluster(name)
    domains = cluster.domain_sizes(4096)
    for f in GROUPED:
        each = [float(f(cluster, domains, num_bytes, one, size)) for one in stride]
        assert f(cluster, domains, num_bytes, np.array(stride), size).tolist() == each
