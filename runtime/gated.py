"""Gated MLPs of the user's model with the SwiGLU op, where the plan's choice of kernels is not torch.

A module is taken for one by what it computes, once, on random numbers: down(silu(gate(x)) * up(x)) of linear modules,
with gate and up apart or as halves of one. Backward then needs gate and up alone: silu(gate) is not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.func import functional_call

from planner.kernels import dispatch
from planner.kernels.pointwise import swiglu

_WIDTH, _INNER = 5, 6  # of the trial: linear modules take weights of any size
_Linear = Callable[[str, torch.Tensor], torch.Tensor]
_Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Gated:
    """Names of the linear modules of a gated MLP: of gate and up, or of the one that makes both (`up_first`: up and
    then gate), and of the last one.
    """

    first: tuple[str, ...]
    down: str
    up_first: bool = False

    def run(self, x: torch.Tensor, linear: _Linear, product: _Product) -> torch.Tensor:
        """The MLP of `x` with these ways to apply a linear module by its name and to make silu(gate) * up."""
        if len(self.first) == 2:
            gate, up = linear(self.first[0], x), linear(self.first[1], x)
        else:
            gate, up = linear(self.first[0], x).chunk(2, dim=-1)
        return linear(self.down, product(up, gate) if self.up_first else product(gate, up))


def chosen(device: torch.device) -> bool:
    """Whether the op is chosen over the model's own code."""
    return dispatch.choice("swiglu", device.type) != "torch"


def install(model: nn.Module) -> int:
    """Let the op stand for silu(gate) * up in every gated MLP of the model; how many there are."""
    count = 0
    for module in model.modules():
        found = gated_mlp(module)
        if found is not None:
            module.forward = _forward(module, found)  # type: ignore[method-assign]
            count += 1
    return count


def gated_mlp(module: nn.Module) -> Gated | None:
    """What makes `module` a gated MLP and nothing else; None if it is none."""
    linears = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
    params = [f"{name}.{n}" for name, child in linears.items() for n, _ in child.named_parameters()]
    plain = all(name.endswith((".weight", ".bias")) and name.count(".") == 1 for name in params)
    nothing_else = {n for n, _ in module.named_parameters()} == set(params) and not list(module.buffers())
    if len(linears) not in (2, 3) or not plain or not nothing_else:
        return None
    return next((form for form in _forms(linears) if _computes(module, params, form)), None)


def _forms(linears: dict[str, nn.Linear]) -> Iterator[Gated]:
    """The forms that the linear modules' sizes allow."""
    for *first, down in permutations(linears):
        pieces = 3 - len(first)  # of what a first one puts out
        if all(linears[name].out_features == pieces * linears[down].in_features for name in first):
            yield Gated(tuple(first), down)
            if pieces == 2:
                yield Gated(tuple(first), down, up_first=True)


def _computes(module: nn.Module, params: list[str], form: Gated) -> bool:
    """Whether `module` in training computes `form`, on random weights and on inputs of many sizes, in float64."""
    with unset_fake_temporarily(), torch.no_grad(), torch.random.fork_rng(devices=[]), _training(module):
        torch.manual_seed(0)
        rows = {name: _INNER * (3 - len(form.first)) for name in form.first} | {form.down: _WIDTH}
        columns = dict.fromkeys(form.first, _WIDTH) | {form.down: _INNER}
        values = {}
        for name in params:
            linear, _, kind = name.rpartition(".")
            shape = (rows[linear], columns[linear]) if kind == "weight" else (rows[linear],)
            values[name] = torch.randn(shape, dtype=torch.float64)
        x = torch.randn(2, 4, _WIDTH, dtype=torch.float64) * torch.logspace(-3, 3, 4).unsqueeze(1)
        try:
            found = functional_call(module, values, (x,))
        except Exception:  # whatever a user's module does with numbers of ours, it keeps its own code
            return False

        def linear_of(name: str, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, values[f"{name}.weight"], values.get(f"{name}.bias"))

        wanted = form.run(x, linear_of, lambda gate, up: F.silu(gate) * up)
        return isinstance(found, torch.Tensor) and found.shape == wanted.shape and torch.allclose(
            found.to(torch.float64), wanted, rtol=1e-9, atol=1e-12
        )


@contextmanager
def _training(module: nn.Module) -> Iterator[None]:
    """`module` and what is in it in training, where dropout shows."""
    before = [(inner, inner.training) for inner in module.modules()]
    module.train()
    try:
        yield
    finally:
        for inner, training in before:
            inner.training = training


def _forward(module: nn.Module, form: Gated) -> Callable[..., Any]:
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs:
            return own(*args, **kwargs)
        return form.run(args[0], lambda name, x: getattr(module, name)(x), swiglu)

    return forward
