"""Gated MLPs with the SwiGLU op: which modules, that nothing changes, and what the cost model makes of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

sys.path.insert(0, str(Path(__file__).parent))

from cases import graph_of  # noqa: E402

from planner.costmodel.graph import LayerClass  # noqa: E402
from planner.costmodel.kernel_choice import KERNELS, kernels_on  # noqa: E402
from planner.costmodel.kernels import fused_swiglu, kernel_of  # noqa: E402
from planner.kernels.counters import WorkCounter  # noqa: E402
from planner.runtime.gated import install  # noqa: E402

WIDTH, INNER = 8, 16


class Mlp(nn.Module):
    """down(silu(a(x)) * b(x)), but for what a test changes."""

    def __init__(self, inner: int = INNER, bias: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.b, self.a = nn.Linear(WIDTH, inner, bias=bias), nn.Linear(WIDTH, inner, bias=bias)
        self.down, self.dropout = nn.Linear(inner, WIDTH, bias=bias), dropout

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(x) * F.silu(self.a(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.dropout(self.middle(x), self.dropout, self.training))


class Gelu(Mlp):
    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.a(x)) * self.b(x)


class Clamped(Mlp):
    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return super().middle(x).clamp(max=100.0)


class Residual(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class Scaled(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))


class Inner32(Mlp):
    """Rounds to float32 on the way, which the op would not in float64."""

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return super().middle(x).float().to(x.dtype)


def made() -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """(gated MLPs, modules that are none)."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": 2}
    gated = {
        "swapped": Mlp(), "square": Mlp(WIDTH), "biases": Mlp(bias=True), "llama": LlamaMLP(LlamaConfig(**sizes)),
        "halves": Phi3MLP(Phi3Config(**sizes, pad_token_id=0)),
    }  # fmt: skip
    others = {
        "gelu": Gelu(), "clamped": Clamped(), "residual": Residual(), "scaled": Scaled(), "rounded": Inner32(),
        "dropout": Mlp(dropout=0.1).eval(), "plain": nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8)),
    }  # fmt: skip
    return nn.ModuleDict(gated), nn.ModuleDict(others)


def value_grads_and_kept(module: nn.Module) -> tuple[list[torch.Tensor], int]:
    """(output and gradients in float64, bytes that autograd keeps of what is not a parameter)."""
    x = torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    module, kept = module.double(), dict[int, int]()

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = module(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=x.dtype).view(out.shape)).sum().backward()
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    num_bytes = sum(n for at, n in kept.items() if at not in weights)
    return [out.detach(), x.grad, *(p.grad for p in module.parameters())], num_bytes


def test_what_computes_a_gated_mlp_is_replaced_and_computes_it_still() -> None:
    state = torch.get_rng_state()
    (gated, others), (before, _) = made(), made()
    torch.set_rng_state(state)
    assert install(gated) == len(gated)
    assert install(others) == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert not others["dropout"].training
    for name, module in gated.items():
        (got, less), (want, more) = value_grads_and_kept(module), value_grads_and_kept(before[name])
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-14)
        assert more - less == 8 * got[0].numel() // WIDTH * (WIDTH if name == "square" else INNER), name


@pytest.mark.parametrize("model", ["llama", "hf_llama", "deepseek"])
def test_the_cost_model_has_one_kernel_for_it(model: str) -> None:
    """It moves what the op's formulas count and keeps gate and up, not silu(gate)."""
    for layer in graph_of(model).classes:
        fused = fused_swiglu(layer, kernels_on("gpu"))
        assert fused_swiglu(layer, kernels_on("cpu")) is layer
        silus = [op for op in layer.ops if op.name.endswith(".silu")]
        products = [op for op, was in zip(fused.ops, layer.ops, strict=True) if op.inputs != was.inputs]
        assert len(products) == len(silus) > 0
        for op in products:
            moved = sum(op.bytes_moved * way["ours"][0] for way in KERNELS[kernel_of(op)].moves)
            assert moved == pytest.approx(counted(layer, op), rel=1e-3)
        gone = {a for op in silus for a in op.outputs}
        assert {i for i in range(len(layer.activations)) if saved(layer, i) and not saved(fused, i)} == gone


def saved(layer: LayerClass, index: int) -> bool:
    return layer.activations[index].saved


def counted(layer: LayerClass, op: Any) -> int:
    """Bytes that the op and its gradient move at the size of what `op` puts out, in its type."""
    from planner.kernels.pointwise import swiglu

    num_bytes = layer.activations[op.outputs[0]].num_bytes
    gate, up = (torch.randn(num_bytes // 8, dtype=torch.float64).requires_grad_() for _ in range(2))
    grad = torch.ones_like(gate)
    with WorkCounter() as work:
        torch.autograd.grad(swiglu(gate, up), (gate, up), grad)
    return work.total.moved_bytes


def test_a_model_that_calls_the_kernels_is_the_same_model() -> None:
    """add_rms_norm, rope and swiglu in the place of the model's own additions, norms, rotations and products."""
    import parity_models

    torch.manual_seed(0)
    own, calling = parity_models.llama().double(), parity_models.calling().double()
    for mine, theirs in zip(calling.parameters(), own.parameters(), strict=True):
        mine.data.copy_(theirs.data)
    tokens = torch.arange(32).view(2, 16)
    torch.testing.assert_close(calling(tokens), own(tokens), rtol=1e-12, atol=1e-12)


def test_what_no_module_of_the_runtime_does_is_not_priced_as_one() -> None:
    """Stacked experts are no gated MLP of linear modules."""
    for layer in graph_of("hf_mixtral").classes:
        assert any(op.name.endswith(".silu") for op in layer.ops)
        assert fused_swiglu(layer, kernels_on("gpu")) is layer
