"""RMSNorm modules on the kernel op: which ones, that nothing changes, and what the cost model makes of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

sys.path.insert(0, str(Path(__file__).parent))

from cases import graph_of  # noqa: E402

from planner.costmodel.graph import OpKind  # noqa: E402
from planner.costmodel.kernel_choice import KERNELS, kernels_on  # noqa: E402
from planner.costmodel.kernels import fused_norms, kernel_of  # noqa: E402
from planner.kernels.counters import WorkCounter  # noqa: E402
from planner.runtime.norms import install  # noqa: E402


class RenamedRMSNorm(nn.LayerNorm):
    """Only its name is right."""


def norms() -> nn.ModuleDict:
    torch.manual_seed(0)
    made = nn.ModuleDict({
        "torch": nn.RMSNorm(16, eps=1e-5), "llama": LlamaRMSNorm(16), "gemma": GemmaRMSNorm(16),
        "layer": nn.LayerNorm(16), "renamed": RenamedRMSNorm(16), "no eps": nn.RMSNorm(16),
        "plain": nn.RMSNorm(16, elementwise_affine=False), "two dims": nn.RMSNorm((4, 16)),
    })  # fmt: skip
    for param in made.parameters():
        nn.init.uniform_(param, 0.5, 1.5)
    return made


def value_and_grads(module: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
    x = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(1), dtype=dtype) * 1e-3  # eps counts
    x.requires_grad_()
    out = module.to(dtype)(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in module.parameters())]


def test_what_computes_rms_norm_is_replaced_and_computes_it_still() -> None:
    before, after = norms(), norms()
    assert install(after) == 3
    assert {name for name, module in after.items() if "forward" in vars(module)} == {"torch", "no eps", "llama"}
    for name in ("torch", "no eps", "llama"):
        for got, want in zip(*(value_and_grads(m[name], torch.float32) for m in (after, before)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    out = after["llama"].float()(torch.ones(2, 16, dtype=torch.bfloat16))  # mixed types stay with the module
    assert out.dtype == torch.float32


@pytest.mark.parametrize("part", ["classes", "epilogue"])
def test_the_cost_model_has_one_kernel_for_it(part: str) -> None:
    """What it moves is what the op's formulas count, backward at the cost model's ratio; nothing inside it is kept."""
    found: Any = getattr(graph_of("hf_llama"), part)
    layer = found[0] if part == "classes" else found
    fused = fused_norms(layer, kernels_on("gpu"))
    norms = [op for op in fused.ops if op.kind is OpKind.NORM]
    assert len(norms) == (2 if part == "classes" else 1)
    assert fused_norms(layer, kernels_on("cpu")) is layer
    x = torch.randn(1, 16, 32).bfloat16().requires_grad_()
    module = LlamaRMSNorm(32).bfloat16()
    install(module)
    with WorkCounter() as counted:
        module(x)
    with WorkCounter() as back:
        module(x).sum().backward()
    assert norms[0].bytes_moved == pytest.approx(counted.total.moved_bytes, rel=0.05)
    assert kernel_of(norms[0]) == "rms_norm"
    grad_passes = KERNELS["rms_norm"].moves[1]["ours"][0]
    assert back.total.moved_bytes - counted.total.moved_bytes < 2 * grad_passes * norms[0].bytes_moved
    inside = {a for op in layer.ops if op.name.startswith(norms[0].name.rpartition(".")[0]) for a in op.outputs}
    assert not any(fused.activations[a].saved for a in inside - set(norms[0].outputs))
    assert fused.activations[norms[0].inputs[0]].saved
