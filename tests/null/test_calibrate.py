import dataclasses

import numpy as np
import pandas as pd
import pytest
import toy

from planner.costmodel.compute import gemm_s
from planner.reports import calibrate, calibrate_gemm, calibrate_links, link_rows
from planner.reports.fitting import Parameter, errors, fit, folds


def test_fit_finds_the_minimum_inside_its_bounds():
    parameters = (
        Parameter(name="a", start=1.0, low=0.0, high=10.0),
        Parameter(name="b", start=1e-3, low=1e-6, high=1.0, log=True),
    )
    found = fit(parameters, lambda v: abs(v["a"] - 3) + abs(np.log(v["b"] / 1e-5)), 400)
    assert found["a"] == pytest.approx(3, rel=1e-2)
    assert found["b"] == pytest.approx(1e-5, rel=1e-2)
    beyond = fit(parameters[:1], lambda v: (v["a"] - 20) ** 2, 400)
    assert 9.9 < beyond["a"] <= 10


def test_errors_by_hand():
    found = errors(np.array([1.1, 0.8, 1.0]), np.ones(3))
    assert (found.rows, found.median_abs, found.bias) == pytest.approx((3, 0.1, 0.0))


def test_folds_are_disjoint_complete_and_stable():
    parts = folds(11, 5)
    assert sorted(np.concatenate(parts)) == list(range(11))
    assert [part.tolist() for part in folds(11, 5)] == [part.tolist() for part in parts]


def test_gemm_constants_come_back_from_rows_they_made():
    true = dataclasses.replace(toy.GEMM, ramp_k=200.0, wave_quantum=0.5, overhead_s=3e-6)
    device = dataclasses.replace(toy.DEVICE, gemm={"bfloat16": true})
    m, n, k = (2.0 ** np.random.default_rng(1).integers(9, 14, 200) for _ in range(3))
    rows = pd.DataFrame(
        {
            "m": m,
            "n": n,
            "k": k,
            "device": "toy",
            "dtype": "bfloat16",
            "source": "toy",
            "url_or_path": "x",
            "hot": False,
        }
    )
    rows["time_s"] = gemm_s(device, "bfloat16", 1, m, n, k, heat=0.0)
    report = calibrate_gemm.calibrate(rows, toy.DEVICE, "bfloat16")
    assert report is not None and report.constants is not None
    assert report.held_out.median_abs < 0.01
    assert report.constants.sustained_frac == pytest.approx(0.8, rel=0.02)


def test_link_constants_come_back_from_rows_they_made():
    sizes = 2.0 ** np.arange(12, 30)
    rows = pd.DataFrame({"num_bytes": np.tile(sizes, 2), "per_node": np.repeat([2.0, 8.0], len(sizes))})
    gpus = rows.per_node
    rows["time_s"] = 1e-5 + (gpus - 1) * 2e-6 + (gpus - 1) / gpus * rows.num_bytes / (0.8 * 100e9)
    rows = rows.assign(
        link="toy",
        collective="all_gather",
        source="toy",
        address="x",
        nodes=1.0,
        gb_per_s=100.0,
        inner="",
        inner_gb_per_s=0.0,
    )
    parameters = (
        Parameter(name="base_s", start=1e-6, low=1e-7, high=1e-3, log=True),
        Parameter(name="step_s", start=1e-5, low=1e-8, high=1e-3, log=True),
        Parameter(name="efficiency", start=0.5, low=0.05, high=1.0),
    )
    fixed = {"fill_steps": 0.0, "ramp_step_s": 0.0, "ramp_bytes": 1e6}
    recipe = calibrate_links.Recipe(link="toy", collective="all_gather", parameters=parameters, fixed=fixed)
    constants, nvls, report = calibrate_links.calibrate(rows, recipe, {})
    assert (constants.base_s, constants.step_s, constants.efficiency) == pytest.approx((1e-5, 2e-6, 0.8), rel=0.02)
    assert nvls == 0
    assert report.held_out.median_abs < 0.01


def test_network_rates_per_gpu():
    assert link_rows.network("8x400Gb/s NDR IB per node", 8) == ("infiniband", 50)
    assert link_rows.network("4x100Gb/s EFA per node", 8) == ("efa", 6.25)
    assert link_rows.network("1 GPU per node, 400Gb/s NIC", 1) == ("infiniband", 50)
    with pytest.raises(ValueError, match="no NIC rate in 'carrier pigeon'"):
        link_rows.network("carrier pigeon", 8)


def test_missing_data_is_one_line(tmp_path, capsys):
    assert calibrate.main([str(tmp_path)]) == 2
    assert "has no gemm.csv, comm.csv" in capsys.readouterr().err
