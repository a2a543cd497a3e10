import dataclasses
import json

import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st

from planner.costmodel.hardware import cluster_from_dict, cluster_sha256, cluster_to_dict
from planner.costmodel.presets import list_clusters, load_cluster


def changed(**values):
    return dataclasses.replace(toy.TWO_TIERS, **values)


def test_json_round_trip():
    for name in list_clusters():
        cluster = load_cluster(name)
        again = cluster_from_dict(json.loads(json.dumps(cluster_to_dict(cluster))))
        assert again == cluster
        assert cluster_sha256(again) == cluster_sha256(cluster)


def test_sha256_is_that_of_the_content():
    # Pinned: a change here makes every plan written before stale.
    assert cluster_sha256(toy.TWO_TIERS)[:12] == "c70a7205838d"
    assert cluster_sha256(changed()) == cluster_sha256(toy.TWO_TIERS)
    other = dataclasses.replace(toy.DEVICE, num_sms=99)
    assert cluster_sha256(changed(device=other)) != cluster_sha256(toy.TWO_TIERS)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data.update(colour="red"), "cluster: unknown key colour; known: name, device"),
        (lambda data: data.pop("tiers"), "cluster: missing key tiers"),
        (
            lambda data: data["tiers"][0].update(domain_size="8"),
            r"tiers\[0\].domain_size: expected int, not '8'",
        ),
        (lambda data: data["tiers"][0].update(topology="torus"), "tier 'nvlink': unknown topology 'torus'"),
        (lambda data: data["tiers"][0]["collectives"].pop("all_reduce"), "tier 'nvlink': no constants for all_reduce"),
        (lambda data: data["device"]["memory_bytes"].update(source="RUMOUR"), "unknown evidence 'RUMOUR'"),
        (lambda data: data["device"]["attention"].clear(), "attention must name at least 'flash'"),
    ],
)
def test_bad_json_is_one_line(edit, message):
    data = cluster_to_dict(toy.TWO_TIERS)
    edit(data)
    with pytest.raises(ValueError, match=message) as caught:
        cluster_from_dict(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("record", "values", "message"),
    [
        (toy.GEMM, {"sustained_frac": 0.9}, "sustained_frac must be <= peak_frac"),
        (toy.GEMM, {"hbm_frac": 0.0}, r"hbm_frac must be in \(0, 1\], not 0.0"),
        (toy.GEMM, {"overhead_s": -1.0}, "overhead_s must be >= 0, not -1.0"),
        (toy.ATTENTION, {"forward_frac": 1.5}, "forward_frac must be in"),
        (toy.COLLECTIVE, {"ramp_bytes": 0.0}, "ramp_bytes must be > 0"),
        (toy.DEVICE, {"num_sms": 0}, "device 'toy': num_sms must be > 0"),
        (toy.DEVICE, {"attention": {}}, "attention must name at least 'flash'"),
        (toy.TWO_TIERS, {"backend": "mpi"}, "unknown backend 'mpi'; known: nccl, rccl, gloo"),
        (toy.TWO_TIERS, {"node_size": 3}, "domain_size 8 must be a multiple of the level inside it"),
        (toy.TWO_TIERS, {"tiers": ()}, r"at least one \[\[tier\]\] is needed"),
        (toy.TWO_TIERS, {"tiers": toy.TWO_TIERS.tiers[:1]}, "the last tier must have domain_size = 0"),
    ],
)
def test_impossible_records_are_refused(record, values, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(record, **values)


def test_domain_sizes():
    assert toy.TWO_TIERS.domain_sizes(4) == (4, 4)
    assert toy.TWO_TIERS.domain_sizes(32) == (8, 32)
    assert load_cluster("gb200-nvl72").domain_sizes(72) == (72, 72)
    assert load_cluster("gb200-nvl72").domain_sizes(1024) == (64, 1024)  # 64 of each 72 divide the job
    with pytest.raises(ValueError, match="12 GPUs is not a multiple of the node's 8"):
        toy.TWO_TIERS.domain_sizes(12)
    with pytest.raises(ValueError, match="num_gpus must be >= 1, not 0"):
        toy.TWO_TIERS.domain_sizes(0)


@given(nodes=st.integers(1, 3000), name=st.sampled_from(list_clusters()))
def test_domain_sizes_nest(nodes, name):
    cluster = load_cluster(name)
    sizes = cluster.domain_sizes(nodes * cluster.node_size)
    assert sizes[-1] == nodes * cluster.node_size
    for tier, inner, outer in zip(cluster.tiers, sizes, sizes[1:], strict=False):
        assert inner <= tier.domain_size
        assert outer % inner == 0
