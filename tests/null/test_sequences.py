"""Cost of packed groups: agrees with the estimate where both apply, and has the shape that the papers state."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from planner.costmodel.engine import get_engine
from planner.costmodel.estimate import Estimate, estimate, machine_for, model_facts
from planner.costmodel.graph import ModelGraph
from planner.costmodel.hardware import LinkTier
from planner.costmodel.keys import Machine
from planner.costmodel.presets import load_cluster
from planner.costmodel.sequences import DataShape, GroupCost, Menu, menu
from planner.costmodel.strategy import STRATEGIES, LayerStrategy, PlanSpec
from planner.dispatch import dispatch
from planner.layouts import exchanging_alike
from planner.reports.shapes import Shape, build_graph

SEQ = 8192
ZERO1 = DataShape(zero_stage=1)
DEGREES = ((1, 1), (2, 1), (8, 1), (1, 8), (16, 1), (4, 4))


@cache
def graph() -> ModelGraph:
    return build_graph(Shape(num_layers=8, hidden=4096, ffn=16_384, heads=32, kv_heads=32, head_dim=128, vocab=50_304,
                             seq_len=SEQ, gated=False, tied=False, rotary=False))  # fmt: skip


@cache
def machine(engine: str = "planner") -> Machine:
    return machine_for(graph(), load_cluster("a100-80gb"), get_engine(engine), 16)


@cache
def groups(shape: DataShape = ZERO1, tokens: float = 16 * SEQ) -> Menu:
    facts = model_facts(graph(), machine().engine)
    return menu(graph(), facts, machine(), shape, DEGREES, 131_072, tokens, 70 * 2**30)


def pick(found: Menu, ulysses: int, ring: int, strategy: LayerStrategy = STRATEGIES[0]) -> GroupCost:
    return next(g for g in found.groups if (g.ulysses, g.ring, g.strategy) == (ulysses, ring, strategy))


def plan(ulysses: int, ring: int, micro: int, strategy: LayerStrategy) -> PlanSpec:
    """Two micro-batches: room is for steps in which gradients are there while activations are."""
    dp = 16 // (ulysses * ring)
    return PlanSpec(
        ulysses=ulysses, ring=ring, dp_shard=dp, zero_stage=1, micro_batch_size=micro,
        global_batch_size=2 * dp * micro,
        stage_layers=((0, 8),), layers=(strategy,) * 8,
    )  # fmt: skip


@pytest.mark.parametrize("degree", [(1, 1), (2, 1), (8, 1), (1, 8), (16, 1), (4, 4)])
@pytest.mark.parametrize("strategy", STRATEGIES[:3], ids=lambda s: s.recompute)
def test_equal_sequences_cost_what_the_estimate_says(degree: tuple[int, int], strategy: LayerStrategy) -> None:
    ulysses, ring = degree
    micro = ulysses * ring  # a full rank's worth of tokens
    group = pick(groups(), ulysses, ring, strategy)
    packed_s = group.fixed_s + float(group.sequence_s(np.full(micro, SEQ)).sum())
    rank = estimate(graph(), machine(), plan(ulysses, ring, micro, strategy)).ranks[0]
    assert packed_s == pytest.approx(rank.microbatch_s, rel=0.02)


@pytest.mark.parametrize(("strategy", "passes"), [(STRATEGIES[0], 3), (STRATEGIES[2], 4)])
def test_a_ring_starts_once_a_pack(strategy: LayerStrategy, passes: int) -> None:
    """Hops that take longer whatever they hold: K and V forward, K and V and their gradients backward."""
    late_s, m = 1e-3, machine()

    def later(tier: LinkTier) -> LinkTier:
        fit = tier.collectives["send_recv"]
        return replace(tier, collectives={**tier.collectives, "send_recv": replace(fit, step_s=fit.step_s + late_s)})

    slow = replace(m, cluster=replace(m.cluster, tiers=tuple(map(later, m.cluster.tiers))))
    facts, usable = model_facts(graph(), m.engine), 70 * 2**30
    found = [menu(graph(), facts, which, ZERO1, DEGREES, 131_072, 16 * SEQ, usable) for which in (m, slow)]
    for ulysses, ring in DEGREES:
        fast, late = (pick(menu, ulysses, ring, strategy) for menu in found)
        assert late.fixed_s - fast.fixed_s == pytest.approx(passes * (ring - 1) * 8 * late_s, abs=1e-9)
        assert late.per_token_s_G == pytest.approx(fast.per_token_s_G)


@pytest.mark.parametrize("degree", [(8, 1), (1, 8), (4, 4)])
def test_a_pack_is_placed_at_what_its_documents_add_and_one_start(degree: tuple[int, int]) -> None:
    """n documents in one micro-batch: what each takes alone, less n - 1 starts."""
    group = pick(groups(), *degree)
    one = replace(groups(), groups=(group,), num_ranks=group.ranks)
    lengths = np.array([9000, 4000, 500, 500, 60, 33])
    together, *alone = (dispatch(one, part) for part in (lengths, *np.split(lengths, len(lengths))))
    assert [len(g.micro_batches) for step in together.steps for g in step.groups] == [1]
    each = [found.step_s - one.step_s - group.fixed_s for found in alone]
    assert each == pytest.approx(list(group.sequence_s(lengths)))
    assert together.step_s - one.step_s == pytest.approx(group.fixed_s + sum(each))


@pytest.mark.parametrize("strategy", STRATEGIES[:3], ids=lambda s: s.recompute)
def test_room_is_what_fills_the_memory(strategy: LayerStrategy) -> None:
    group = pick(groups(), 1, 1, strategy)
    micro = group.capacity_tokens / SEQ
    whole = int(micro)
    fits = estimate(graph(), machine(), plan(1, 1, max(whole, 1), strategy)).peak_memory_bytes
    over = estimate(graph(), machine(), plan(1, 1, whole + 1, strategy)).peak_memory_bytes
    assert (fits <= 70 * 2**30 * 1.001) == (whole >= 1)
    assert over > 70 * 2**30


def test_cost_per_token_grows_with_length_and_quadratically_in_the_end() -> None:
    group = pick(groups(), 1, 1)
    lengths = np.array([4096, 65_536, 131_072])
    per_token = group.sequence_s(lengths) / lengths
    assert (np.diff(per_token) > 0).all()
    short, long = per_token[1] - per_token[0], per_token[2] - per_token[0]
    assert long / short == pytest.approx(2.0, rel=0.1)


def test_degree_one_pays_no_communication_and_crossing_nodes_costs_more() -> None:
    device = [d * float(pick(groups(), d, 1).sequence_s(np.array([2048]))[0]) for d in (1, 2, 8, 16)]
    assert device[0] < device[1] <= device[2] < device[3]
    assert device[3] / device[2] > device[2] / device[1]


def test_a_swap_hides_behind_long_sequences_only() -> None:
    offload = LayerStrategy(recompute="none", offload_activations=True)
    lengths = np.array([2048, 131_072])
    found = groups(DataShape(zero_stage=3))
    extra = pick(found, 1, 1, offload).sequence_s(lengths) - pick(found, 1, 1).sequence_s(lengths)
    assert extra[0] / lengths[0] > 2 * max(extra[1], 0.0) / lengths[1]


def test_selective_and_full_recomputation_make_room_and_cost_time() -> None:
    found = [pick(groups(), 1, 1, s) for s in STRATEGIES[:3]]
    assert found[0].capacity_tokens < found[1].capacity_tokens < found[2].capacity_tokens
    seconds = [float(g.sequence_s(np.array([8192]))[0]) for g in found]
    assert seconds[0] < seconds[1] < seconds[2]


def test_pipeline_stages_share_the_layers_and_the_memory() -> None:
    one, four = groups(), groups(DataShape(pp=4, zero_stage=1), 4 * SEQ)
    ratio = float(pick(four, 1, 1).sequence_s(np.array([SEQ]))[0] / pick(one, 1, 1).sequence_s(np.array([SEQ]))[0])
    assert 0.25 <= ratio < 0.45  # the last stage holds the head too
    assert four.num_ranks == 4 and four.pp == 4


def test_experts_spread_over_data_ranks_add_what_the_estimate_says() -> None:
    shape = Shape(num_layers=4, hidden=2048, ffn=2048, heads=16, kv_heads=16, head_dim=128, vocab=50_304, seq_len=SEQ,
                  gated=True, tied=False, rotary=True, num_experts=16, top_k=2)  # fmt: skip
    experts = build_graph(shape)
    m = machine_for(experts, load_cluster("a100-80gb"), get_engine("planner"), 16)
    facts, degrees = model_facts(experts, m.engine), ((1, 1), (8, 1))
    found, whole = (
        menu(experts, facts, m, DataShape(ep=ep, zero_stage=1), degrees, SEQ, 16 * SEQ, 70 * 2**30) for ep in (8, 1)
    )
    assert found.lockstep and not whole.lockstep

    def packed_s(menu: Menu, ulysses: int) -> float:
        group = pick(menu, ulysses, 1)
        return group.fixed_s + float(group.sequence_s(np.full(ulysses, SEQ)).sum())

    def priced(ep: int, ulysses: int, micro: int) -> Estimate:
        spec = plan(ulysses, 1, micro, STRATEGIES[0])
        return estimate(experts, m, replace(spec, ep=ep, stage_layers=((0, 4),), layers=spec.layers[:4]))

    assert packed_s(found, 1) == pytest.approx(priced(8, 1, 1).ranks[0].microbatch_s, rel=1e-4)
    for ulysses, _ in degrees:
        added_s = priced(8, ulysses, ulysses).ranks[0].microbatch_s - priced(1, ulysses, ulysses).ranks[0].microbatch_s
        assert packed_s(found, ulysses) - packed_s(whole, ulysses) == pytest.approx(added_s, rel=1e-3)
    room = int(pick(found, 1, 1).capacity_tokens) // SEQ
    assert room * SEQ > pick(whole, 1, 1).capacity_tokens
    assert priced(8, 1, room).peak_memory_bytes <= 70 * 2**30 * 1.001 < priced(8, 1, room + 1).peak_memory_bytes
    once, again = exchanging_alike(found, 8)
    assert {g.strategy.recompute for g in again.groups} == {"full"}
    assert len(once.groups) + len(again.groups) == len(found.groups)


def test_what_cannot_be_priced_is_refused() -> None:
    facts = model_facts(graph(), machine().engine)
    with pytest.raises(ValueError, match="pp = 3 does not divide 8"):
        menu(graph(), facts, machine(), DataShape(pp=3), DEGREES, 8192, 1e5, 70 * 2**30)
    unfused = replace(machine(), engine=get_engine("megatron-2022"))
    with pytest.raises(ValueError, match="need a fused kernel"):
        menu(graph(), facts, unfused, DataShape(), DEGREES, 8192, 1e5, 70 * 2**30)
