"""Rows of whole sequences: kept by every dispatch, and they cut off what only divided sequences do."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from dispatch_menus import toy_menu

from planner import branching
from planner.batch import points_of, table_of
from planner.branching import tight_bound_s
from planner.costmodel.sequences import Menu
from planner.patterns import long_patterns, maximal, prices, wide


def feasible(menu: Menu, kind: int, held: list[int], last_s: float) -> bool:
    """Whether sequences of these lengths fit one group, by arithmetic of its own."""
    group = menu.groups[kind]
    own_s = float(group.sequence_s(np.array(held, float)).sum()) if held else 0.0
    room = sum(held) / group.capacity_tokens
    if menu.lockstep:
        return room <= 1 and own_s + group.fixed_s <= last_s
    return own_s + group.fixed_s * max(1.0, room) <= last_s


@pytest.mark.parametrize("lockstep", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_patterns_are_all_that_fit(seed: int, lockstep: bool) -> None:
    rng = np.random.default_rng(seed)
    menu = toy_menu(4, room=float(rng.uniform(80, 200)), fixed=float(rng.uniform(0, 10)), lockstep=lockstep)
    lengths = np.repeat(rng.choice(np.arange(40, 160), 4, replace=False), rng.integers(1, 4, 4))
    table = table_of(menu, lengths)
    points, kind = points_of(table), 2
    last_s = float(rng.uniform(1.2, 2.5)) * float(menu.groups[kind].sequence_s(lengths[:1].astype(float))[0] + 10)
    found = long_patterns(points, table, kind, np.isfinite(points.seconds_DK[:, kind]), last_s, lockstep)
    assert found is not None
    long_L, patterns = found
    tokens, most = points.tokens_D[long_L].astype(int), points.count_D[long_L].astype(int)
    every = [
        times for times in itertools.product(*(range(m + 1) for m in most))
        if feasible(menu, kind, [t for t, n in zip(tokens, times, strict=True) for _ in range(n)], last_s)
    ]  # fmt: skip
    assert sorted(map(tuple, patterns.astype(int).tolist())) == sorted(every)
    kept = {tuple(row) for row in maximal(patterns).astype(int).tolist()}
    beaten = {a for a in every if any(a != b and all(x <= y for x, y in zip(a, b, strict=True)) for b in every)}
    assert kept == set(every) - beaten


def test_few_patterns_of_the_longest_alone() -> None:
    menu = toy_menu(4, room=1e4)
    table = table_of(menu, np.repeat(np.arange(100, 112), 6))
    points, last_s = points_of(table), 6.5 * float(menu.groups[2].sequence_s(np.array([111.0]))[0])
    found = long_patterns(points, table, 2, np.ones(12, bool), last_s, True, 50)
    assert found is not None and found[1].shape[1] == len(found[0]) == 2
    assert long_patterns(points, table, 2, np.ones(12, bool), last_s, True, 3) is None


def test_a_row_is_kept_by_whole_sequences_and_broken_by_divided_ones() -> None:
    """Three of a third of a group's time and one of a sixth: two groups hold six of them, and the seventh no more."""
    patterns = np.array([(a, b) for a in range(7) for b in range(2) if 0.3 * a + 0.15 * b <= 1.0], float)
    row = prices(patterns, np.array([6.0, 1.0]), 2.0)
    assert row is not None
    assert (patterns @ row).max() <= 1 + 1e-9
    assert row @ [6, 1] == pytest.approx(7 / 3)  # three and none, or two and one: 4/3 and 1 groups
    assert prices(patterns, np.array([6.0, 1.0]), 7 / 3) is None
    assert prices(patterns, np.array([3.0, 0.0]), 1.0) is None


def test_rows_raise_the_bound_of_wide_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups: three long sequences each, and a shorter one that makes one of them last longer."""
    menu = replace(toy_menu(8, room=1000.0, fixed=1.0, lockstep=False), num_ranks=16)
    menu = replace(menu, groups=menu.groups[-1:])
    long_s, short_s = menu.groups[0].sequence_s(np.array([200.0, 100.0])).tolist()
    table = table_of(menu, np.array([200] * 6 + [100]))
    best = 3 * long_s + short_s + 1.0
    assert tight_bound_s(menu, table, 0.999 * best, 20) == pytest.approx(0.999 * best)
    assert tight_bound_s(menu, table, best, 20) <= best * (1 + 1e-9)
    monkeypatch.setattr(branching, "_CUTS", 0)
    monkeypatch.setattr(branching, "_FEW_CUTS", 0)
    assert tight_bound_s(menu, table, 0.999 * best, 20) < 0.98 * best


def test_only_wide_groups_are_looked_at() -> None:
    assert wide(np.array([1.0, 4.0, 64.0]), 64.0).tolist() == [1, 2]
