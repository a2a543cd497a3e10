"""Micro-steps that grow and that end elsewhere: every sequence once, and never longer than before."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from dispatch_menus import flexsp_menu

from planner.batch import table_of
from planner.descent import Descents
from planner.distributions import named
from planner.placing import BestFit, Placed, Way


def check(fit: BestFit, placed: Placed) -> None:
    menu, table = fit.menu, fit.table
    held = sorted(i for step in placed.steps for group in step for part in group.parts for i in part)
    assert held == list(range(len(table.tokens_N)))
    for step in placed.steps:
        assert sum(menu.groups[group.kind].ranks for group in step) <= menu.num_ranks
        for group in step:
            assert len(group.parts) == 1
            assert table.tokens_N[list(group.parts[0])].sum() <= menu.groups[group.kind].capacity_tokens
    lasts = [max(group.time_s for group in step) for step in placed.steps]
    assert placed.time_s == pytest.approx(sum(lasts) + (menu.longest_counts - 1) * max(lasts))


@pytest.mark.parametrize("pp", [1, 4])
def test_descents_shorten_what_grew(pp: int) -> None:
    menu, shorter = replace(flexsp_menu(16), pp=pp), 0
    kinds = tuple(range(len(menu.groups)))
    for seed in range(4):
        fit = BestFit(menu, table_of(menu, named("byted").cut(65_536).sample(120, seed)))
        grown = [fit.grown(Way(kinds=kinds, patience=np.inf), longer, np.inf) for longer in (1.0, 1.6)]
        assert all(placed is not None for placed in grown)
        for placed in grown:
            check(fit, placed)
        longest = max((p for p in grown if p is not None), key=lambda p: p.time_s)
        strategies = [group.strategy for group in menu.groups]
        descents, again = Descents(fit), Descents(fit)
        assert descents.grow(strategies, 1.2, longest).time_s <= longest.time_s
        assert descents.grow(strategies, 1.2, longest) is longest  # every strategy grows once
        descents, best, start = Descents(fit), longest, longest
        for _ in range(6):
            found = descents.more(best, 50, lambda: False)
            assert found.time_s <= best.time_s
            best = found
        check(fit, best)
        shorter += best.time_s < 0.99 * longest.time_s
        for _ in range(6):
            start = again.more(start, 50, lambda: False)
        assert start == best
    assert shorter


def test_what_would_last_too_long_does_not_grow() -> None:
    menu = flexsp_menu(16)
    fit = BestFit(menu, table_of(menu, named("byted").cut(65_536).sample(120, 0)))
    way = Way(kinds=tuple(range(len(menu.groups))), patience=1.0)
    placed = fit.grown(way, 1.3, np.inf)
    assert placed is not None and fit.grown(way, 1.3, 0.5 * placed.time_s) is None


def test_descents_end_and_stop_when_late() -> None:
    menu = flexsp_menu(8)
    fit = BestFit(menu, table_of(menu, np.full(8, 4000)))
    start = fit.anyhow()
    assert start is not None
    descents = Descents(fit)
    assert descents.more(start, 10_000, lambda: True) is start and not descents.ended
    best = descents.more(start, 100_000, lambda: False)
    best = descents.more(best, 100_000, lambda: False)
    assert descents.ended and descents.more(best, 10, lambda: False) is best
