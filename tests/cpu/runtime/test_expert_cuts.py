"""How experts are cut by TP is found by trying, or refused in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

import parity_models  # noqa: E402

from planner.runtime import expert_cuts, experts  # noqa: E402
from planner.runtime.errors import RuntimePlanError  # noqa: E402
from planner.runtime.sharded import Cut  # noqa: E402

HIDDEN, FFN, EXPERTS, TP = 32, 32, 4, 2  # as wide inside as outside: shapes alone do not tell


def settle(block: nn.Module, num_inputs: int, cut: bool = True) -> dict[str, Cut]:
    """The cuts of a model that is this block, as the planner's graph would give them and then settled."""
    model, model.ffn = nn.Module(), nn.Module()
    model.ffn.block = block
    cuts = {}
    for name, param in model.named_parameters():
        kind = "" if "router" in name or not cut else "row" if "down" in name else "column"
        kind = "" if kind == "row" and param.dim() == 1 else kind
        routed = "experts" in name or param.dim() == 3 or name.endswith("_bias")
        cuts[name] = Cut(name=name, kind=kind, units=TP, routed=routed)
    (moe,) = {id(m): m for m in experts.find(model, cuts).values()}.values()
    tokens = torch.empty(1 if num_inputs == 1 else 64, *(64,) * (num_inputs == 1), HIDDEN, device="meta")
    choice = (torch.empty(64, 2, dtype=torch.int64, device="meta"), torch.empty(64, 2, device="meta"))
    moe.call = ((tokens, *choice[: num_inputs - 1]), {})
    expert_cuts.settle([moe], cuts, {}, TP)
    return cuts


def stacked(name: str) -> nn.Module:
    from transformers import GptOssConfig, MixtralConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config, kind = {"mixtral": (MixtralConfig, MixtralExperts), "gpt_oss": (GptOssConfig, GptOssExperts)}[name]
    made = config(hidden_size=HIDDEN, intermediate_size=FFN, num_local_experts=EXPERTS)
    made._experts_implementation = "eager"
    return kind(made)


def listed() -> nn.Module:
    block = parity_models.deepseek().layers[1].ffn
    assert block.router.weight.shape == (EXPERTS, HIDDEN)
    return block


def test_stacked_experts_in_halves_and_interleaved() -> None:
    """Mixtral: outputs first, gate and up in halves. gpt-oss: inputs first, in turn, biases on both products."""
    before = torch.random.get_rng_state()
    found = {n: (c.dim, c.outer) for n, c in settle(stacked("mixtral"), 3).items()}
    assert found == {"ffn.block.gate_up_proj": (1, 2), "ffn.block.down_proj": (2, 1)}
    found = {n: (c.dim, c.outer) for n, c in settle(stacked("gpt_oss"), 3).items()}
    assert found == {"ffn.block.gate_up_proj": (2, 1), "ffn.block.gate_up_proj_bias": (1, 1),
                     "ffn.block.down_proj": (1, 1), "ffn.block.down_proj_bias": (1, 1)}  # fmt: skip
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_block_that_routes_by_itself() -> None:
    """Listed and shared experts are cut, the router sees whole tokens and gets a part of its gradient."""
    cuts = settle(listed(), 1)
    assert {(c.dim, c.outer) for n, c in cuts.items() if "down" in n} == {(1, 1)}
    assert {(c.dim, c.outer) for n, c in cuts.items() if "gate" in n or "up" in n} == {(0, 1)}
    assert [n for n, c in cuts.items() if c.partial] == ["ffn.block.router.weight"]


def _bias(block: nn.Module) -> None:
    block.shared.down = nn.Linear(block.shared.down.in_features, HIDDEN)


def _residual(block: nn.Module) -> None:
    inner = block.forward
    block.forward = lambda x: x + inner(x)


def _dropout(block: nn.Module) -> None:
    inner = block.forward
    block.forward = lambda x: torch.dropout(inner(x), 0.1, True)


def _odd(block: nn.Module) -> None:
    for expert in block.experts:
        expert.gate, expert.up = nn.Linear(HIDDEN, 5, bias=False), nn.Linear(HIDDEN, 5, bias=False)
        expert.down = nn.Linear(5, HIDDEN, bias=False)


@pytest.mark.parametrize("spoil", [_bias, _residual, _dropout, _odd])
def test_what_each_part_would_add_again_is_refused(spoil: Callable[[nn.Module], None]) -> None:
    block = listed()
    spoil(block)
    with pytest.raises(RuntimePlanError, match="^experts of ffn.block are not cut over tp = 2: no parts.*--forbid tp$"):
        settle(block, 1)


def test_experts_that_the_plan_leaves_whole_are_refused() -> None:
    with pytest.raises(RuntimePlanError, match="the plan leaves them whole"):
        settle(listed(), 1, cut=False)
