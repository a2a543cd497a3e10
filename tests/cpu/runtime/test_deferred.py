"""Deferred initialisation: values as the model's own code makes them, parameter by parameter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from planner.runtime import deferred
from planner.runtime.errors import RuntimePlanError
from planner.runtime.model_source import check_room


class Model(nn.Module):
    """Initialises as users do: twice, in place, through views, from constants and other parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64, padding_idx=3)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)
        nn.init.trunc_normal_(self.down.weight, std=0.02, a=-0.03, b=0.03)
        self.up.bias.data.copy_(torch.arange(256.0) / 256)
        with torch.no_grad():
            self.up.weight[:8].zero_()
            self.down.bias.copy_(self.up.bias[:64] * 2)
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.mix = nn.Parameter(torch.randn(64, 4).double() * 0.1)
        self.register_buffer("freqs", 1.0 / 10000 ** (torch.arange(0, 8, 2) / 8))
        self.table = torch.outer(torch.arange(5.0), self.freqs)


def test_values_are_those_of_the_code() -> None:
    """What is not random to the bit, what is by its statistics; the same in any order and again."""
    torch.manual_seed(7)
    before = torch.get_rng_state()
    model, tape = deferred.build(Model, torch.float32, 1)
    names = [n for n, _ in model.named_parameters()]
    made = {n: tape.value(p) for n, p in model.named_parameters()}
    assert torch.equal(torch.get_rng_state(), before)
    again = {n: tape.value(p) for n, p in reversed(list(model.named_parameters()))}
    eager = Model().to(torch.float32)
    assert names == [n for n, _ in eager.named_parameters()] and model.head.weight is model.embed.weight
    for name, param in eager.named_parameters():
        assert made[name].shape == param.shape and made[name].dtype == param.dtype
        assert torch.equal(made[name], again[name])
        assert not isinstance(made[name], torch._subclasses.FakeTensor)
    for name in ("up.bias", "down.bias", "scale"):
        assert torch.equal(made[name], eager.get_parameter(name)), name
    assert not made["embed.weight"][3].any() and not made["up.weight"][:8].any()
    for name in ("embed.weight", "up.weight", "down.weight", "mix"):
        value, same = made[name], eager.get_parameter(name)
        assert value.std() == pytest.approx(float(same.detach().std()), rel=0.15) and not torch.equal(value, same), name
    assert made["down.weight"].abs().max() <= 0.03
    assert torch.equal(model.freqs, eager.freqs) and torch.equal(model.table, eager.table)
    other, tape = deferred.build(Model, torch.float32, 2)
    assert not torch.equal(tape.value(other.up.weight), made["up.weight"])


def test_bad_input_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that reads values, and a host that cannot hold what its ranks would build."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))
            self.size = int(self.weight.sum())

    with pytest.raises(RuntimePlanError, match="use --init whole"):
        deferred.build(Reads, torch.float32, 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    check_room(405e9, "deferred")
    with pytest.raises(RuntimePlanError, match="pass --init deferred"):
        check_room(405e9, "whole")
