import re

import pytest

from planner.costmodel.evidence import Source
from planner.costmodel.hardware import cluster_sha256
from planner.costmodel.presets import (
    cluster_details,
    cluster_table,
    list_clusters,
    list_devices,
    load_cluster,
    load_device,
)

TOML = """
name = "mine"
device = "h100"
node_size = 8
host_memory_gib_per_gpu = 128
source = "https://example.org 2026-11-24"

[[tier]]
name = "nvlink"
domain_size = 8
bandwidth_gb_per_s = 450
link = "nvlink4"

[[tier]]
name = "infiniband"
domain_size = 0
bandwidth_gb_per_s = 50
link = "infiniband"
"""
# 16-bit TFLOP/s, HBM TB/s, GB/s of the fast link per direction; from the vendors' data sheets.
DATASHEETS = {
    "a100-40gb": (312, 1.555, 300),
    "a100-80gb": (312, 2.039, 300),
    "a800-80gb": (312, 2.039, 200),
    "h100": (989, 3.35, 450),
    "h200": (989, 4.8, 450),
    "h800": (989, 3.35, 200),
    "h20": (148, 4.0, 450),
    "b200": (2250, 8.0, 900),
    "gb200-nvl72": (2450, 8.0, 900),
    "b300": (2250, 8.0, 900),
    "gb300-nvl72": (2450, 8.0, 900),
    "l40s": (362, 0.864, 32),
    "v100": (125, 0.9, 150),
    "mi250x": (191.5, 1.64, 100),
    "mi300x": (1300, 5.3, 448),
}


def write(tmp_path, text, name="mine.toml"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", list_clusters())
def test_every_preset_states_figures_with_address_and_date(name):
    cluster = load_cluster(name)
    device = cluster.device
    figures = [
        *device.peak_flops_per_s.values(),
        device.memory_bytes,
        device.hbm_bytes_per_s,
        device.host_link_bytes_per_s,
        *(tier.bandwidth_bytes_per_s for tier in cluster.tiers),
    ]
    for figure in figures:
        assert "2026-" in figure.note, figure
        assert (
            re.search(r"https?://|arXiv \d|reports/measurements/", figure.note)
            or figure.source is Source.ASSUMED
            or device.name == "cpu"
        ), figure
    assert device.memory_bytes.value < 300e9
    assert len(cluster_details(cluster)) > 8


@pytest.mark.parametrize(("name", "figures"), DATASHEETS.items())
def test_data_sheets(name, figures):
    cluster = load_cluster(name)
    tflops = cluster.device.peak_flops_per_s["float16"].value / 1e12
    link = cluster.tiers[0].bandwidth_bytes_per_s.value / 1e9
    assert (tflops, cluster.device.hbm_bytes_per_s.value / 1e12, link) == pytest.approx(figures)


def test_every_device_has_constants_for_a_dtype_it_runs():
    for name in list_devices():
        device = load_device(name)
        assert set(device.gemm) <= set(device.peak_flops_per_s), name
        assert "first guess" not in str(device), name


def test_tables_list_every_preset():
    assert [row["name"] for row in cluster_table()] == list(list_clusters())


def test_aliases_in_any_case():
    assert load_device("H100-SXM") is load_device("h100-80gb")
    assert load_cluster("H100") == load_cluster("h100")


def test_unknown_names_get_close_ones():
    with pytest.raises(ValueError, match="unknown device 'h10'; close names: h100-80gb"):
        load_device("h10")
    with pytest.raises(ValueError, match="unknown cluster 'h1000'; close names: h100"):
        load_cluster("h1000")


def test_user_file(tmp_path):
    cluster = load_cluster(write(tmp_path, TOML))
    assert cluster.device is load_device("h100")
    assert cluster.tiers[1].bandwidth_bytes_per_s.value == 50e9
    assert cluster.tiers[1].bandwidth_bytes_per_s.source is Source.DATASHEET
    assert cluster.host_memory_bytes_per_gpu.value == 128 * 2**30
    assert cluster.price_per_gpu_hour is None
    spaced = TOML.replace(" = ", "   =   ") + "\n# a comment\n"
    assert cluster_sha256(load_cluster(write(tmp_path, spaced, "again.toml"))) == cluster_sha256(cluster)


def test_user_constants_replace_the_links(tmp_path):
    text = TOML + "latency_us = 20\nefficiency = 0.5\n"
    fit = load_cluster(write(tmp_path, text)).tiers[1].collectives["all_gather"]
    assert (fit.step_s, fit.efficiency) == pytest.approx((20e-6, 0.5))
    assert fit.evidence is Source.ASSUMED
    assert "efficiency, step_s set in the cluster file" in fit.note


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "mine"', 'name = "mine', "not valid TOML"),
        ('name = "mine"', "", "cluster file: missing key name"),
        ("node_size = 8", "node_size = 8\nnode_sise = 8", "cluster file: unknown key node_sise"),
        ("node_size = 8", 'node_size = "8"', "node_size must be a whole number, not '8'"),
        ("node_size = 8", "node_size = 0", "node_size must be >= 1"),
        ('device = "h100"', 'device = "h100x"', "unknown device 'h100x'; close names"),
        ('link = "nvlink4"', 'link = "nvlink9"', "unknown link 'nvlink9'; close names"),
        (
            "bandwidth_gb_per_s = 50",
            "bandwidth_gb_per_s = true",
            "bandwidth_gb_per_s must be a number, not True",
        ),
        ("bandwidth_gb_per_s = 50", "bandwidth_gb_per_s = -1", "tier 'infiniband': bandwidth_bytes_per_s must be > 0"),
        ("domain_size = 0", "domain_size = 16", "the last tier must have domain_size = 0"),
        ("domain_size = 8", "domain_size = 12", "domain_size 12 must be a multiple"),
        ('name = "infiniband"', 'name = "nvlink"', "tier names must differ"),
        ("domain_size = 8", "", "tier 1: missing key domain_size"),
    ],
)
def test_bad_user_file_is_one_line(tmp_path, old, new, message):
    path = write(tmp_path, TOML.replace(old, new))
    with pytest.raises(ValueError, match=message) as caught:
        load_cluster(path)
    assert str(caught.value).startswith(path)
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read cluster file .*nowhere.toml: No such file"):
        load_cluster(str(tmp_path / "nowhere.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"cannot read cluster file .*binary.toml"):
        load_cluster(str(tmp_path / "binary.toml"))
    with pytest.raises(ValueError, match="not valid JSON"):
        load_cluster(write(tmp_path, "{", "broken.json"))
    with pytest.raises(ValueError, match="cluster: expected a table"):
        load_cluster(write(tmp_path, "[]", "list.json"))


def test_tier_must_be_an_array_of_tables(tmp_path):
    text = TOML.split("[[tier]]")[0] + "tier = 3\n"
    with pytest.raises(ValueError, match=r"tier must be written as \[\[tier\]\] tables"):
        load_cluster(write(tmp_path, text))
