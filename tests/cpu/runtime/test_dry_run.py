"""The dry run against the cost model: what is exact must be exact, what differs is said."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cases import _SP, SEQ_LEN, config_of, graph_of, plan_of, spec, traced  # noqa: E402

from planner.profiler.trace import trace_model  # noqa: E402
from planner.runtime.errors import RuntimePlanError  # noqa: E402

MODEL = Path(__file__).with_name("train_model.py")
PLANS = {
    "tp": spec(tp=2),
    "tp sp zero1": spec(tp=2, dp_shard=2, zero_stage=1, **_SP),
    "chunked loss": spec(tp=2, dp_shard=2, zero_stage=1, micro_batch_size=2, chunked_loss=True, **_SP),
    "pp full": spec(tp=2, pp=2, dp_shard=2, zero_stage=1, recompute="full", **_SP),
    "ring selective": spec(tp=2, ring=2, dp_shard=2, zero_stage=1, recompute="selective", **_SP),
    "ulysses full": spec(ulysses=2, dp_shard=2, zero_stage=2, recompute="full", global_batch_size=4),  # 2 a rank
    "hundreds": spec(tp=2, pp=2, dp_replicate=16, dp_shard=8, zero_stage=1, global_batch_size=1024, **_SP),
}


@pytest.mark.parametrize("name", PLANS)
def test_parameters_and_messages_are_exact(name: str) -> None:
    """Parameters, shards and the bytes of every kind of collective, on the first and last pipeline rank."""
    from planner.runtime.dry_run import meta_model, run_rank
    from planner.runtime.predicted import predicted_rank

    plan = plan_of("", PLANS[name], traced(str(MODEL), SEQ_LEN))
    for rank in range(plan.decisions.pp):
        found, wanted = run_rank(plan, meta_model(str(MODEL), plan), rank), predicted_rank(plan, rank)
        assert (found.num_params, found.shard_params) == (wanted.num_params, wanted.shard_params)
        assert found.sent_bytes == {kind: n for kind, n in wanted.sent_bytes.items() if n}
        assert {kind: found.calls[kind] for kind in wanted.calls} == wanted.calls
        assert not found.gathered


EXPERTS = {
    "ep": ("hf_mixtral", spec(dp_shard=8, ep=4, zero_stage=1, global_batch_size=32)),
    "ep tp selective": ("hf_mixtral", spec(tp=2, dp_shard=2, ep=2, zero_stage=1, recompute="selective")),
    "listed tp": ("listed", spec(tp=2, dp_shard=2, zero_stage=1)),
    "listed ep tp sp full": ("listed", spec(tp=2, dp_shard=2, ep=2, zero_stage=1, recompute="full", **_SP)),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_expert_messages_are_exact(name: str, tmp_path: Path) -> None:
    """Rows there and back, their gradients, how many rows each expert gets, sums over TP; shards to the element."""
    from planner.runtime.dry_run import meta_model, run_rank
    from planner.runtime.predicted import predicted_rank

    model, decisions = EXPERTS[name]
    source = str(MODEL.with_name("listed_model.py"))
    if model == "listed":
        graph = traced(source, SEQ_LEN)
    else:
        source, graph = str(tmp_path / "config.json"), graph_of(model)
        Path(source).write_text(config_of(model))
    plan = plan_of("", decisions, graph)
    found = run_rank(plan, meta_model(source, plan), 0)
    wanted = predicted_rank(plan, 0, found.uneven)
    assert (found.num_params, found.shard_params) == (wanted.num_params, wanted.shard_params)
    assert found.sent_bytes == {kind: n for kind, n in wanted.sent_bytes.items() if n}
    assert found.calls.get("all_to_all") == wanted.calls.get("all_to_all")
    assert not found.gathered


def test_a_mixtral_under_ep_and_tp_is_as_predicted(tmp_path: Path) -> None:
    """`planner check` finds every difference within its limit, activations too."""
    from transformers import MixtralConfig

    from planner.runtime.dry_run import dry_run

    config = MixtralConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, num_local_experts=8, use_cache=False, sliding_window=None, router_jitter_noise=0.0,
        architectures=["MixtralForCausalLM"],
    )  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(config.to_json_string(use_diff=False))
    graph = trace_model(str(path), seq_len=256)
    decisions = spec(tp=2, dp_shard=4, ep=4, zero_stage=1, global_batch_size=32, **_SP)
    assert dry_run(plan_of("", decisions, graph), 8, str(path))


LATENT = """
import importlib.util
spec = importlib.util.spec_from_file_location("example", {example!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
vars(module).update(VOCAB_SIZE=256, HIDDEN=256, HEADS=8, Q_RANK=64, KV_RANK=64, DENSE_FFN=512, DENSE_LAYERS=4)


def build_model():
    return module.DeepSeekV3(layers=4)
"""


def test_latent_attention_keeps_no_scores(tmp_path: Path) -> None:
    """Values narrower than keys: a GPU has a fused kernel for them, a CPU would keep every score."""
    from planner.runtime.dry_run import dry_run

    source = tmp_path / "latent.py"
    source.write_text(LATENT.format(example=str(MODEL.parents[3] / "examples/deepseek_v3.py")))
    plan = plan_of("", spec(dp_shard=2, zero_stage=1), trace_model(str(source), seq_len=512))
    assert dry_run(plan, 2, str(source))


def test_wrong_number_of_ranks_is_one_line() -> None:
    """--ranks must be the plan's."""
    from planner.runtime.dry_run import dry_run

    plan = plan_of("", PLANS["tp"], traced(str(MODEL), SEQ_LEN))
    with pytest.raises(RuntimePlanError, match="--ranks 3: the plan is for 2 ranks"):
        dry_run(plan, 3, str(MODEL))
