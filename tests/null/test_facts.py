"""Sums over a layer's ops and tensors, against the published counts."""

from __future__ import annotations

import dataclasses

import pytest
from shapes_for_tests import GPT, LLAMA, MOE, graph

from planner.costmodel.engine import get_engine
from planner.costmodel.expert_facts import beside_experts, routed_block
from planner.costmodel.facts import LayerFacts, LayoutBytes, layer_facts
from planner.costmodel.graph import LayerClass, OpKind, ParamGroup, TpCut
from planner.costmodel.kernel_choice import KERNELS, kernels_on

SBH = GPT.seq_len * GPT.hidden
STATS = 4 * 4 * GPT.seq_len  # mean and inverse deviation of two layer norms, float32


def total(part: LayoutBytes) -> float:
    return sum(getattr(part, field.name) for field in dataclasses.fields(part))


def test_gpt_layer_keeps_32_bytes_per_element_without_dropout_masks() -> None:
    """Korthikanti et al. 2022, section 4.1: 34 sbh, of which two are the masks of dropout (priced by the engine)."""
    facts = layer_facts(graph().classes[0], get_engine("megatron-2022"))
    none = facts.saved[0]
    assert none.inner_bytes == (6 + 2 + 8 + 8) * SBH
    assert none.outer_bytes == 4 * SBH + STATS
    assert none.gathered_bytes == 4 * SBH
    assert facts.dropped_bytes == 2 * 2 * SBH


def test_flash_attention_keeps_its_row_statistics_and_unfused_does_not() -> None:
    flash, unfused = (layer_facts(graph().classes[0], get_engine(n)) for n in ("megatron-2023", "megatron-2022"))
    assert total(flash.saved[0]) - total(unfused.saved[0]) == 4 * GPT.heads * GPT.seq_len


def test_selective_recomputation_of_attention_keeps_what_the_projection_reads() -> None:
    facts = layer_facts(graph().classes[0], get_engine("megatron-2022"))
    assert facts.selective_attention
    assert total(facts.saved[1]) == total(facts.saved[0])


def test_selective_recomputation_of_norms_drops_their_outputs() -> None:
    """The planner's engine redoes norms and activation functions: 4 + 8 bytes per element less, statistics too."""
    facts = layer_facts(graph().classes[0], get_engine("planner"))
    assert total(facts.saved[0]) - total(facts.saved[1]) == (4 + 8) * SBH + STATS


def test_a_fused_chain_keeps_nothing_inside_it() -> None:
    """SiLU's output lies inside the fused SwiGLU kernel; torch's separate kernels keep it."""
    fused, eager = (
        layer_facts(graph(LLAMA).classes[0], dataclasses.replace(get_engine("nanotron"), fuses_elementwise=fuse))
        for fuse in (True, False)
    )
    assert total(eager.saved[0]) - total(fused.saved[0]) == 2 * LLAMA.seq_len * LLAMA.ffn
    assert fused.launches < eager.launches
    assert sum(t.num_bytes for t in fused.traffic) < sum(t.num_bytes for t in eager.traffic)


def test_log_probabilities_are_counted_apart() -> None:
    facts = layer_facts(graph().epilogue, get_engine("megatron-core"))
    assert facts.loss_bytes == 4 * GPT.seq_len * GPT.vocab
    assert facts.loss_work_bytes == (8 - 4) * GPT.seq_len * GPT.vocab


def test_our_cross_entropy_moves_6_bytes_a_logit_and_keeps_2() -> None:
    """bf16 logits read, then read again and their gradient written; torch's chain moves 9 forward alone."""
    logits = GPT.seq_len * GPT.vocab
    fused, eager = (
        layer_facts(graph().epilogue, dataclasses.replace(get_engine("planner"), kernels=kernels_on(device)))
        for device in ("h100-80gb", "cpu")
    )
    (ours,) = (call for call in fused.kernels if call.cut is TpCut.VOCAB)
    moved = sum(ours.num_bytes * way["ours"][0] for way in KERNELS[ours.kernel].moves)
    assert (ours.kernel, ours.num_calls, moved) == ("cross_entropy", 1, 6 * logits)
    assert not any(t.cut is TpCut.VOCAB for t in fused.traffic) and not eager.kernels
    assert sum(t.num_bytes for t in eager.traffic if t.cut is TpCut.VOCAB) > 2 * moved
    assert (fused.loss_bytes, fused.loss_work_bytes) == (2 * logits, 2 * logits)
    assert (eager.loss_bytes, eager.loss_work_bytes) == (4 * logits, 8 * logits)
    assert total(eager.saved[0]) - total(fused.saved[0]) == pytest.approx(2 * logits, abs=4)


@pytest.mark.parametrize("name", ["planner", "megatron-core", "nanotron"])
def test_full_recomputation_keeps_the_layers_input(name: str) -> None:
    assert layer_facts(graph().classes[0], get_engine(name)).saved[2] == LayoutBytes(outer_bytes=2.0 * SBH)


def with_names(routed: tuple[str, ...], cut: TpCut, *others: str) -> LayerClass:
    """The layer of a model of experts with parameters of these names, `others` cut as `cut`."""
    groups = (ParamGroup(num_params=1, cut=TpCut.ROW, routed=True, names=routed),
              ParamGroup(num_params=1, cut=cut, routed=False, names=others))  # fmt: skip
    return dataclasses.replace(graph(MOE).classes[0], params=groups)


def test_the_block_of_experts_by_names() -> None:
    """Stacked weights are parameters of the block, listed experts children of its list; what is beside them."""
    stacked = with_names(("mlp.experts.down", "mlp.experts.up"), TpCut.REPLICATED, "mlp.gate.weight", "norm.weight")
    assert (routed_block(stacked), beside_experts(stacked)) == ("mlp.experts", [])
    names = tuple(f"ffn.experts.{i}.{n}.weight" for i in range(2) for n in ("up", "down"))
    listed = with_names(names, TpCut.REPLICATED, "ffn.router.weight", "norm.weight")
    assert (routed_block(listed), beside_experts(listed)) == ("ffn", [(TpCut.REPLICATED, "ffn.router.weight")])
    assert routed_block(graph().classes[0]) == ""


def once_and_apart(layer: LayerClass) -> tuple[LayerFacts, LayerFacts]:
    once = get_engine("planner")
    return layer_facts(layer, once), layer_facts(layer, dataclasses.replace(once, sums_experts_once=False))


def test_a_single_sum_behind_experts_keeps_whole_tokens_in_front_of_it() -> None:
    """The experts' results, two a token, bf16; their weights and numbers are whole in both."""
    once, apart = (facts.saved[0] for facts in once_and_apart(graph(MOE).classes[0]))
    results = 2 * 2 * MOE.seq_len * MOE.hidden
    assert once.replicated_bytes - apart.replicated_bytes == apart.outer_bytes - once.outer_bytes == results
    moves = [op.cut for op in once_and_apart(graph(MOE).classes[0])[0].layer.ops if op.kind is OpKind.PERMUTE]
    assert moves == [TpCut.REPLICATED] * 2


def test_shared_experts_go_with_the_routed_ones_in_a_single_sum() -> None:
    """Their input is gathered and their output summed with those of the routed ones, or apart."""
    once, apart = once_and_apart(graph(MOE).classes[0])
    assert once.gathered_bytes == apart.gathered_bytes and once.row_bytes == apart.row_bytes
    names = tuple(f"ffn.experts.{i}.down.weight" for i in range(2))
    once, apart = once_and_apart(with_names(names, TpCut.ROW, "ffn.shared.down.weight"))
    assert len(once.row_bytes) == len(apart.row_bytes) - 1 and once.gathered_bytes == apart.gathered_bytes


def test_recomputation_stops_in_front_of_the_sum_behind_experts() -> None:
    facts = layer_facts(graph(MOE).classes[0], get_engine("planner"))
    assert facts.last_gemm is None
    assert facts.last_sum_bytes == facts.row_bytes[-1] == 2 * MOE.seq_len * MOE.hidden
