"""Single kinds of groups: packed no worse than a plain LPT, close to a bound, and what the best of them is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dispatch_menus import flexsp_menu, toy_menu

from planner import filling as filling_module
from planner.batch import points_of, table_of
from planner.batch_bounds import bound_s
from planner.costmodel.sequences import Menu
from planner.dispatch import dispatch, static_dispatch
from planner.distributions import named
from planner.filling import Filling
from planner.packing import packed
from planner.placing import BestFit, Way
from planner.pool import Pool, best_single, first_bound_s, static_bounds_s
from planner.rounding import whole_groups

STUDY = Path(__file__).parents[2] / "reports" / "seqlen_study.json"


def lpt_s(menu: Menu, kind: int, lengths: np.ndarray) -> float | None:
    """Longest first into the least busy group with room, groups by their time into micro-steps; the best of a few."""
    group = menu.groups[kind]
    if lengths.max() > group.capacity_tokens:
        return None
    side, order = menu.num_ranks // group.ranks, np.sort(lengths)[::-1]
    fewest, best = int(np.ceil(lengths.sum() / (side * group.capacity_tokens))), np.inf
    for steps in range(fewest, fewest + 4):
        busy, free = np.zeros(steps * side), np.full(steps * side, group.capacity_tokens)
        for tokens in order:
            fits = np.flatnonzero(free >= tokens)
            if not len(fits):
                break
            at = fits[busy[fits].argmin()]
            busy[at] += float(group.sequence_s(np.array([tokens]))[0])
            free[at] -= tokens
        else:
            slowest = np.sort(busy)[::-1][::side]
            best = min(best, float((slowest[slowest > 0] + group.fixed_s).sum()))
    return best + menu.step_s


@pytest.mark.parametrize("corpus", ["wikipedia", "byted"])
def test_no_worse_than_lpt_and_one_kind_alone_is_dispatched_no_worse(corpus: str) -> None:
    menu, gaps = flexsp_menu(64), []
    for seed in range(2):
        batch = named(corpus).cut(131_072).sample(256, seed)
        bounds = static_bounds_s(menu, (batch,))
        for kind, group in enumerate(menu.groups):
            greedy, static = lpt_s(menu, kind, batch), static_dispatch(menu, batch, kind)
            assert (greedy is None) == (static is None)
            if static is None:
                continue
            assert static.step_s <= greedy * (1 + 1e-9)
            alone = dispatch(replace(menu, groups=(group,)), batch, time_limit_s=0.0)
            assert alone.step_s <= static.step_s * (1 + 1e-9)
            assert bounds[kind] <= static.step_s * (1 + 1e-9)
            gaps.append(1 - bounds[kind] / static.step_s)
    assert np.median(gaps) <= 0.01


@pytest.mark.parametrize("lockstep", [True, False])
def test_a_single_kind_in_pipelines_is_above_its_bound_and_no_worse_than_best_fit(lockstep: bool) -> None:
    menu = replace(flexsp_menu(16), lockstep=lockstep, pp=4)
    batch = named("wikipedia").cut(16_384).sample(120, 5)
    table, bounds = table_of(menu, batch), static_bounds_s(menu, (batch,))
    fit, gaps = BestFit(menu, table), []
    for kind in range(len(menu.groups)):
        found = packed(menu, table, kind)
        if found is None:
            continue
        lasts = [max(group.time_s for group in step) for step in found.steps]
        assert lasts == sorted(lasts, reverse=True)
        assert found.time_s == pytest.approx(sum(lasts) + (3 * lasts[0] if lockstep else 0.0))
        assert bounds[kind] <= (found.time_s + menu.step_s) * (1 + 1e-9)
        gaps.append(1 - bounds[kind] / (found.time_s + menu.step_s))
        for steps in (2, 4, 8, 16) if lockstep else (1,):
            target = 1.1 * found.time_s / (steps + menu.longest_counts - 1)
            other = fit.place((target,) * steps, Way(kinds=(kind,), patience=np.inf))
            assert other is None or found.time_s <= other.time_s * (1 + 1e-9)
    assert len(gaps) >= 3 and np.median(gaps) <= 0.01


@pytest.mark.parametrize("lockstep", [True, False])
@pytest.mark.parametrize("pp", [1, 2])
def test_bounds_of_a_pool_are_below_those_of_its_batches(lockstep: bool, pp: int) -> None:
    menu = replace(flexsp_menu(16), lockstep=lockstep, pp=pp)
    batches = tuple(named("wikipedia").cut(65_536).sample(size, size) for size in (40, 120))
    own = np.mean([bound_s(menu, table_of(menu, batch)) for batch in batches])
    assert 0.5 * own <= first_bound_s(menu, Pool.of(batches)) <= own * (1 + 1e-3)


@pytest.mark.parametrize("lockstep", [True, False])
def test_the_best_single_kind_is_the_best_of_all(lockstep: bool) -> None:
    menu = toy_menu(8, room=150.0, fixed=3.0, lockstep=lockstep)
    for seed in range(10):
        batches = tuple(np.random.default_rng([seed, i]).integers(1, 300, 30) for i in range(2))
        found = best_single(menu, batches, 300)
        tables = [table_of(menu, batch) for batch in batches]
        each = [[packed(menu, table, k) for table in tables] for k in range(len(menu.groups))]
        means = [np.mean([p.time_s for p in row]) for k, row in enumerate(each) if menu.groups[k].ranks > 1]
        assert found.mean_s == pytest.approx(min(means)) and found.group.capacity_tokens >= 300
    assert best_single(menu, batches, 10_000) is None


def test_tight_memory_still_finds_the_fewest_micro_steps() -> None:
    menu = toy_menu(2, room=100.0, fixed=1000.0)
    lengths = np.array([60, 60, 40, 40, 50, 50, 50, 50])
    for kind in (0, 1):
        assert len(static_dispatch(menu, lengths, kind).steps) == 2
    assert dispatch(menu, lengths, time_limit_s=0.0).step_s <= static_dispatch(menu, lengths, 0).step_s


def test_the_study_was_never_slower_than_a_single_kind() -> None:
    """Over all batches: a run has one state layout, and on a batch the static plan of another may be faster."""
    slower = []
    for rows in json.loads(STUDY.read_text()).values():
        for row in rows.values():
            for system in ("best static", "ulysses static"):
                own, static = row["step_s"]["adaptive"], row["step_s"][system]
                assert static is None or sum(own) <= sum(static)
                slower += [a / s for a, s in zip(own, static or own, strict=True) if a > s * (1 + 1e-9)]
    assert max(slower, default=1.0) < 1.03 and len(slower) <= 3  # as the page says


@pytest.mark.parametrize(("lockstep", "steps"), [(True, 1), (True, 2), (False, 1)])
@pytest.mark.parametrize("at_once", [4096, 0])
def test_whole_groups_hold_every_sequence_once_in_the_ranks_there_are(
    lockstep: bool, steps: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`at_once`: items from which on a batch counts as large and is filled pair by pair."""
    monkeypatch.setattr(filling_module, "_MOST_AT_ONCE", at_once)
    menu, better = replace(flexsp_menu(16), lockstep=lockstep), 0
    for seed in range(4):
        table = table_of(menu, named("wikipedia").cut(16_384).sample(50 * steps, seed))
        points, kinds = points_of(table), tuple(range(len(menu.groups)))
        targets = [bound_s(menu, table) / steps * factor for factor in (1.05, 1.3, 2.0)]
        found = [whole_groups(menu, table, points, (target,) * steps, kinds) for target in targets]
        whole = next(w for w in found if w is not None)
        assert whole.share_CP.sum() == pytest.approx(len(table.tokens_N))
        filling = Filling(BestFit(menu, table), whole)
        assert filling.fill(points)
        before = filling.over_G.max()
        filling.level(lambda: False)
        assert filling.over_G.max() <= before
        better += filling.over_G.max() < before
        slowest = [filling.over_G[filling.step_G == step].max() for step in range(steps)]
        filling.shorten(lambda: False)
        assert all(filling.over_G[filling.step_G == step].max() <= slowest[step] for step in range(steps))
        placed = filling.placed()
        held = sorted(i for step in placed.steps for group in step for part in group.parts for i in part)
        assert held == list(range(len(table.tokens_N)))
        busy = [group.time_s - whole.limits_s[0] for step in placed.steps for group in step]
        assert max(busy) <= filling.over_G.max() + 0.5 or lockstep  # micro-batches that do not pack as they add up
        last = whole.limits_s[0] + max(filling.over_G.max(), 0.0)
        assert not lockstep or placed.time_s <= steps * last * (1 + 1e-9)
        for step in placed.steps:
            assert sum(menu.groups[group.kind].ranks for group in step) <= menu.num_ranks
            for group in step:
                room = menu.groups[group.kind].capacity_tokens
                assert all(table.tokens_N[list(part)].sum() <= room for part in group.parts)
    assert better or lockstep or at_once
