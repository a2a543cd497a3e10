"""Every plan gives the losses, gradients and parameters of one process, in float64."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cases import ALONE, DRAWN, RESUMED, TOGETHER, case, drawn, spec  # noqa: E402
from cells import LEAST, TABLE, least, render  # noqa: E402
from worlds import run_world  # noqa: E402

from planner.costmodel.pipeline import ScheduleKind  # noqa: E402
from planner.runtime.support import COMPILED_EXPERTS, COMPILED_LACKS, OPTIONS, reasons  # noqa: E402

LIMIT = 1e-9  # relative to the largest element of a tensor, after three steps


def check(ranks: int, named: list[tuple[str, str, object]], folder: Path, compiled: bool = False) -> None:
    """Run the cases in one world of `ranks`; AssertionError names every case that differs and by how much."""
    runs = [case(model, plan, folder, RESUMED.get(name), compiled) for name, model, plan in named]
    found = run_world(ranks, "parity_rank.run", runs, 500.0)
    failed = [(len(results) - 1, rank, results[-1]) for rank, results in enumerate(found) if "error" in results[-1]]
    wrong = [f"rank {rank}, {named[i][0]}: {r['error']}\n{r['trace']}" for i, rank, r in failed]
    for first, (name, _, plan) in zip(found[0], named, strict=not failed):
        if "error" in first:
            continue
        worst = max(first["loss"], first["norm"], first["grads"][1], first["params"][1], first["resumed"])
        if not worst <= LIMIT:
            wrong.append(f"{name}: {first}")
        if first["chunked_loss"] != plan.chunked_loss:
            wrong.append(f"{name}: chunked_loss is {first['chunked_loss']}")
        if first["gathered"]:
            wrong.append(f"{name}: ops without a rule ran on gathered tensors: {first['gathered']}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_option_alone(ranks: int, tmp_path: Path) -> None:
    """One case an option, more where models differ."""
    named = [(name, model, plan) for name, (n, model, plan) in ALONE.items() if n == ranks]
    check(ranks, named, tmp_path)


@pytest.mark.parametrize("ranks", [4, 8])
def test_options_together(ranks: int, tmp_path: Path) -> None:
    """Where mechanisms meet."""
    named = [(name, model, plan) for name, (n, model, plan) in TOGETHER.items() if n == ranks]
    check(ranks, named, tmp_path)


def test_compiled_layers(tmp_path: Path) -> None:
    """torch.compile on every layer, under what it runs with; what it does not run with is refused."""
    plans = {
        "zero3 full": spec(dp_shard=2, zero_stage=3, recompute="full"),
        "pp interleaved": spec(pp=2, vpp=2, schedule=ScheduleKind.INTERLEAVED, micro_batch_size=2),
    }
    check(2, [(name, "llama", plan) for name, plan in plans.items()], tmp_path, compiled=True)
    run = case("hf_mixtral", spec(dp_shard=2), tmp_path, compiled=True)
    assert COMPILED_EXPERTS in run_world(2, "parity_rank.run", [run])[0][0]["error"]
    assert set(COMPILED_LACKS) < {o.name for o in OPTIONS}
    for name in COMPILED_LACKS:
        assert reasons(least(name), compiled=True)[0].startswith(name) and not reasons(least(name))


@pytest.mark.parametrize(("model", "ranks", "count"), DRAWN)
def test_plans_of_the_space(model: str, ranks: int, count: int, tmp_path: Path) -> None:
    """Plans drawn from what search enumerates, with a random strategy for every layer."""
    check(ranks, [(name, model, plan) for name, plan in drawn(model, ranks, count, seed=ranks)], tmp_path)


def test_every_executable_option_has_a_case() -> None:
    """A new option without a parity case fails here."""
    used = {o.name for o in OPTIONS for _, _, plan in (*ALONE.values(), *TOGETHER.values()) if o.used(plan)}
    assert {o.name for o in OPTIONS if not o.reason} <= used


def test_the_table_of_cells_is_fresh() -> None:
    """reports/runtime_cells.md says what support.py and the cases say; every option has its least plan there."""
    assert set(LEAST) == {o.name for o in OPTIONS}
    assert all(o.used(least(o.name)) for o in OPTIONS)
    assert TABLE.read_text() == render(), "stale: run `python tests/cpu/runtime/cells.py`"
