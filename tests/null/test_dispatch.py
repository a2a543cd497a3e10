"""Dispatcher: valid for any batch, exact bounds on tiny ones by brute force, small gaps on published lengths."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from dispatch_menus import flexsp_menu, toy_menu
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.batch import points_of, table_of
from planner.batch_bounds import bound_s
from planner.branching import tight_bound_s
from planner.costmodel.pipeline import ScheduleKind
from planner.costmodel.schedule import actions
from planner.costmodel.sequences import Menu
from planner.dispatch import Dispatch, DoesNotFit, dispatch, static_dispatch, token_weights
from planner.distributions import named
from planner.relaxation import Span, relax


def never() -> float:
    """A clock that stands still: no time limit, so that answers are reproducible."""
    return 0.0


def check(menu: Menu, lengths: np.ndarray, found: Dispatch) -> None:
    """What any dispatch must satisfy, by arithmetic of its own."""
    seen = sorted(i for step in found.steps for group in step.groups for part in group.micro_batches for i in part)
    assert seen == list(range(len(lengths)))
    lasts = []
    for step in found.steps:
        ranks: list[int] = []
        slowest = 0.0
        for group in step.groups:
            kind = menu.groups[group.kind]
            assert group.first_rank % kind.ranks == 0
            ranks += range(group.first_rank, group.first_rank + kind.ranks)
            times = []
            for part in group.micro_batches:
                held = lengths[list(part)]
                assert 0 < held.sum() <= kind.capacity_tokens * (1 + 1e-9)
                times.append(kind.fixed_s + float(kind.sequence_s(held).sum()))
            assert len(times) == 1 or not menu.lockstep
            time_s = times[0] if menu.lockstep else sum(times) + (menu.pp - 1) * max(times)
            assert group.time_s == pytest.approx(time_s)
            slowest = max(slowest, time_s)
        assert len(ranks) == len(set(ranks)) and max(ranks) < menu.num_ranks
        assert step.time_s == pytest.approx(slowest)
        lasts.append(slowest)
    tail = (menu.pp - 1) * max(lasts) if menu.lockstep else 0.0
    assert found.step_s == pytest.approx(sum(lasts) + tail + menu.step_s)
    assert found.lower_bound_s <= found.step_s * (1 + 1e-9)


LENGTHS = st.lists(st.integers(1, 400), min_size=1, max_size=40)


@settings(deadline=None, max_examples=120)
@given(LENGTHS, st.sampled_from([1, 2, 4, 8, 16]), st.booleans(), st.sampled_from([1, 2, 4]))
def test_every_dispatch_is_valid(lengths: list[int], ranks: int, lockstep: bool, pp: int) -> None:
    menu = toy_menu(ranks, room=400.0, lockstep=lockstep, pp=pp)
    batch = np.array(lengths)
    found = dispatch(menu, batch, clock=never)
    check(menu, batch, found)
    assert sum(map(sum, token_weights(found, batch))) == pytest.approx(1.0)


@settings(deadline=None, max_examples=15)
@given(LENGTHS, st.booleans())
def test_never_slower_than_the_static_plan(lengths: list[int], lockstep: bool) -> None:
    menu, batch = toy_menu(8, room=400.0, lockstep=lockstep), np.array(lengths)
    for kind in range(len(menu.groups)):
        static = static_dispatch(menu, batch, kind)
        if static is not None:
            check(menu, batch, static)
            assert {g.kind for step in static.steps for g in step.groups} == {kind}
            found = dispatch(menu, batch, static_kind=kind, time_limit_s=0.0)
            assert found.step_s <= static.step_s * (1 + 1e-12)


# ---- brute force


def partitions(items: tuple[int, ...]) -> Iterator[list[tuple[int, ...]]]:
    """Every way to split `items` into non-empty parts."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for size in range(len(rest) + 1):
        for others in itertools.combinations(rest, size):
            left = tuple(i for i in rest if i not in others)
            for more in partitions(left):
                yield [(first, *others), *more]


def best_lockstep_s(menu: Menu, lengths: np.ndarray) -> float:
    """Least sum of slowest groups over every split into groups, kinds and micro-steps, the slowest of all pp times."""

    def time_s(kind: int, part: tuple[int, ...]) -> float:
        group, held = menu.groups[kind], lengths[list(part)]
        if held.sum() > group.capacity_tokens:
            return math.inf
        return group.fixed_s + float(group.sequence_s(held).sum())

    def one_step(parts: list[tuple[int, ...]]) -> float:
        best = math.inf
        for kinds in itertools.product(range(len(menu.groups)), repeat=len(parts)):
            if sum(menu.groups[k].ranks for k in kinds) <= menu.num_ranks:
                best = min(best, max(time_s(k, part) for k, part in zip(kinds, parts, strict=True)))
        return best

    best = math.inf
    for parts in partitions(tuple(range(len(lengths)))):
        for steps in partitions(tuple(range(len(parts)))):
            lasts = [one_step([parts[i] for i in step]) for step in steps]
            best = min(best, sum(lasts) + (menu.pp - 1) * max(lasts))
    return best


def best_apart_s(menu: Menu, lengths: np.ndarray) -> float:
    """Least slowest group when groups keep their ranks all step and have any number of micro-batches."""

    def group_s(kind: int, held: tuple[int, ...]) -> float:
        group, best = menu.groups[kind], math.inf
        for parts in partitions(held):
            tokens = [lengths[list(p)] for p in parts]
            if all(t.sum() <= group.capacity_tokens for t in tokens):
                times = [group.fixed_s + float(group.sequence_s(t).sum()) for t in tokens]
                best = min(best, sum(times) + (menu.pp - 1) * max(times))
        return best

    best = math.inf
    for groups in partitions(tuple(range(len(lengths)))):
        for kinds in itertools.product(range(len(menu.groups)), repeat=len(groups)):
            if sum(menu.groups[k].ranks for k in kinds) <= menu.num_ranks:
                best = min(best, max(group_s(k, g) for k, g in zip(kinds, groups, strict=True)))
    return best


@pytest.mark.parametrize("seed", range(12))
def test_lockstep_against_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 120, 5)
    menu = toy_menu(4, room=100.0, fixed=float(rng.uniform(0, 20)), pp=1 + 3 * (seed % 2))
    optimum, found = best_lockstep_s(menu, lengths), dispatch(menu, lengths, gap_frac=0.0, clock=never)
    check(menu, lengths, found)
    assert found.lower_bound_s <= optimum * (1 + 1e-9) <= found.step_s * (1 + 1e-8)
    assert found.step_s <= 1.15 * optimum


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("seed", range(8))
def test_groups_on_their_own_against_brute_force(seed: int, pp: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 120, 5)
    menu = toy_menu(4, room=100.0, fixed=float(rng.uniform(0, 20)), lockstep=False, pp=pp)
    optimum, found = best_apart_s(menu, lengths), dispatch(menu, lengths, gap_frac=0.0, clock=never)
    check(menu, lengths, found)
    assert found.lower_bound_s <= optimum * (1 + 1e-9) <= found.step_s * (1 + 1e-8)
    assert found.step_s <= 1.3 * optimum


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("lockstep", [True, False])
def test_relaxations_are_below_brute_force(seed: int, lockstep: bool) -> None:
    rng = np.random.default_rng(100 + seed)
    lengths, room, fixed = rng.integers(1, 200, 5), float(rng.uniform(60, 120)), float(rng.uniform(0, 20))
    menu = toy_menu(4, room=room, fixed=fixed, lockstep=lockstep, pp=1 + seed % 3)
    table = table_of(menu, lengths)
    optimum = (best_lockstep_s if lockstep else best_apart_s)(menu, lengths)
    for upper in (optimum, 1.2 * optimum, 3 * optimum):
        assert 0 < tight_bound_s(menu, table, upper, 40) <= optimum * (1 + 1e-9)


@pytest.mark.parametrize("lockstep", [True, False])
def test_a_relaxation_over_few_kinds_says_what_one_over_all_kinds_does(lockstep: bool) -> None:
    menu, low = replace(flexsp_menu(64), lockstep=lockstep), np.inf
    every = tuple(range(len(menu.groups)))
    for seed in range(4):
        table = table_of(menu, named("github").cut(196_608).sample(300, seed))
        points, bound = points_of(table), bound_s(menu, table)
        spans = (Span(low_s=0.5 * bound, high_s=1.5 * bound, count=1), Span(low_s=0.7, high_s=bound, count=2))
        for used in (spans, spans[:1]):
            full, few = (relax(menu, table, points, used, 4 * bound, (), start) for start in (every, ()))
            assert full is not None and few is not None and len(few.solved) <= len(every)
            assert few.bound_s == pytest.approx(full.bound_s, rel=1e-3)
            low = min(low, full.bound_s)
    assert 0 < low < np.inf


def one_f_one_b_s(micro_batches: list[float], pp: int, forward: float) -> float:
    """Makespan of equal stages that run the action table; `forward`: its share of each micro-batch."""
    table = actions(ScheduleKind.ONE_F_ONE_B, len(micro_batches), pp, 1)
    ends: dict[tuple[str, int, int], float] = {}
    at, free = [0] * pp, [0.0] * pp
    while any(at[p] < len(table[p]) for p in range(pp)):
        for p in range(pp):
            while at[p] < len(table[p]):
                op, _, i = table[p][at[p]]
                before = ("F", i, p - 1) if op == "F" else ("BW", i, p + 1)
                if 0 <= before[2] < pp and before not in ends:
                    break
                takes = micro_batches[i] * (forward if op == "F" else 1 - forward)
                free[p] = ends[op, i, p] = max(free[p], ends.get(before, 0.0)) + takes
                at[p] += 1
    return max(free)


@settings(deadline=None, max_examples=40)
@given(LENGTHS, st.booleans(), st.integers(2, 6), st.floats(0.15, 0.5))
def test_a_pipeline_takes_no_longer_than_its_price(lengths: list[int], lockstep: bool, pp: int, forward: float) -> None:
    """In the order of the dispatch, longest first; in others it may (hypothesis finds such batches at once)."""
    menu, batch = toy_menu(4, room=400.0, lockstep=lockstep, pp=pp), np.array(lengths)
    found = dispatch(menu, batch, time_limit_s=0.0)
    if lockstep:
        assert one_f_one_b_s([step.time_s for step in found.steps], pp, forward) <= found.step_s * (1 + 1e-9)
        return
    for group in found.steps[0].groups:
        kind = menu.groups[group.kind]
        times = [kind.fixed_s + float(kind.sequence_s(batch[list(part)]).sum()) for part in group.micro_batches]
        assert one_f_one_b_s(times, pp, forward) <= group.time_s * (1 + 1e-9)


def test_relaxations_raise_the_bound_where_memory_and_fixed_costs_differ() -> None:
    menu, lengths = flexsp_menu(64), named("github").cut(196_608).sample(512, 3)
    table = table_of(menu, lengths)
    found = dispatch(menu, lengths, gap_frac=0.0, time_limit_s=1.0)
    upper = found.step_s - menu.step_s
    assert bound_s(menu, table) * (1 - 1e-3) <= tight_bound_s(menu, table, upper, 20) <= upper


def test_large_batches_go_in_bundles_and_keep_their_lengths() -> None:
    for lockstep in (True, False):
        menu, lengths = replace(flexsp_menu(1024), lockstep=lockstep), named("wikipedia").cut(65_536).sample(6000, 5)
        found = dispatch(menu, lengths, gap_frac=0.1, time_limit_s=30.0)
        check(menu, lengths, found)


def test_the_time_limit_is_asked_often_enough() -> None:
    ticks = iter(range(1_000_000))
    menu, lengths = flexsp_menu(64), named("github").cut(196_608).sample(512, 4)
    found = dispatch(menu, lengths, gap_frac=0.0, time_limit_s=20.0, clock=lambda: float(next(ticks)))
    assert found.search_s <= 26.0  # a look at the clock before every placement and every relaxation


def test_bound_is_met_where_work_divides_evenly() -> None:
    menu, lengths = toy_menu(8, fixed=2.0), np.full(8, 40)
    found = dispatch(menu, lengths, clock=never)
    assert found.step_s == pytest.approx(2.0 + 40 * (40 / 20 + 1))
    assert found.gap_frac < 2e-4  # to the tolerance of the bisection


def test_bound_does_not_fall_when_a_sequence_joins() -> None:
    menu, lengths = flexsp_menu(64), named("wikipedia").cut(196_608).sample(200, 1)
    bounds = [bound_s(menu, table_of(menu, lengths[:n])) for n in range(20, 201, 20)]
    assert (np.diff(bounds) >= -1e-4 * np.array(bounds[1:])).all()  # to the bisection's tolerance


def test_gaps_on_wikipedia_with_the_published_constants() -> None:
    menu, corpus = flexsp_menu(64), named("wikipedia").cut(196_608)
    found = [dispatch(menu, corpus.sample(512, seed), clock=never) for seed in range(20)]
    gaps = np.array([f.gap_frac for f in found])
    assert gaps.mean() <= 0.03
    assert np.median(gaps) <= 0.015


def test_the_answer_is_a_function_of_the_batch() -> None:
    menu, lengths = flexsp_menu(64), named("wikipedia").cut(196_608).sample(256, 7)
    first, second = (dispatch(menu, lengths, clock=never) for _ in range(2))
    assert (first.steps, first.step_s) == (second.steps, second.step_s)


def test_short_sequences_pay_no_communication() -> None:
    menu = flexsp_menu(64)
    found = dispatch(menu, np.full(640, 500), clock=never)
    assert {menu.groups[g.kind].ranks for step in found.steps for g in step.groups} == {1}


def test_what_cannot_be_dispatched_is_one_line() -> None:
    menu = toy_menu(4)
    with pytest.raises(ValueError, match="the batch is empty"):
        dispatch(menu, np.zeros(0, np.int64))
    with pytest.raises(ValueError, match="sequence 1 has 0 tokens"):
        dispatch(menu, np.array([5, 0]))
    with pytest.raises(DoesNotFit, match="sequence 0 has 401 tokens, the longest that fits any group is 400"):
        dispatch(menu, np.array([401]))
