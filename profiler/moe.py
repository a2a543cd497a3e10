"""Mixture-of-experts layers, whose routing depends on data: traced with balanced routing.

An expert branch is run once on all routed rows (tokens x experts per token), which has the FLOPs, bytes and
saved tensors of E experts on 1/E of the rows each; the recorder turns its GEMMs into batches of E.
Found are (a) a module with 3-D parameters [E, ., .] and (b) a list of E equal experts, beside a router.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from planner.costmodel.graph import OpKind
from planner.profiler.fold import signature
from planner.profiler.intercept import plain_op
from planner.profiler.record import Recorder

_TOP_K = (
    "top_k", "topk", "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_k", "k",
    "n_activated_experts", "num_selected_experts", "moe_top_k", "router_top_k", "moe_topk",
)  # fmt: skip
_DOWN = re.compile(r"down|w2|(^|_)out|wo$|c_proj|fc2|linear2|output", re.IGNORECASE)
_ROUTER = re.compile(r"gate|router|switch|classifier", re.IGNORECASE)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Any, chosen: Any, top_k: int) -> Any:
        ctx.save_for_backward(chosen)
        return torch.empty((rows.shape[0] * top_k, rows.shape[1]), dtype=rows.dtype, device=rows.device)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, routed: Any, weights: Any, num_tokens: int) -> Any:
        ctx.save_for_backward(routed, weights)
        return torch.empty((num_tokens, routed.shape[1]), dtype=routed.dtype, device=routed.device)


@dataclass(slots=True)
class ExpertStubs:
    """Replaces the forward of MoE modules inside the layers while attached."""

    recorder: Recorder
    skipped: set[int] = field(default_factory=set)  # modules that are never called: all experts but the first
    _patched: list[nn.Module] = field(default_factory=list)

    def attach(self, layers: list[tuple[str, nn.Module]]) -> None:
        """Find the MoE modules of `layers` and replace their forward."""
        for layer_path, layer in layers:
            stack = [(layer_path, layer, _top_k_of(layer, 0))]
            while stack:
                path, module, above = stack.pop()
                top_k = _top_k_of(module, above)
                if top_k and self._patch(path, module, top_k):
                    continue
                stack += [(f"{path}.{n}".lstrip("."), child, top_k) for n, child in module.named_children()]

    def detach(self) -> None:
        """Give the modules their own forward back."""
        for module in self._patched:
            del module.__dict__["forward"]

    def _patch(self, path: str, module: nn.Module, top_k: int) -> bool:
        run, num_experts = self._stacked(path, module) or self._listed(path, module) or (None, 0)
        if run is None:
            return False
        router = _router(module, num_experts)
        takes_choice = not router
        if takes_choice and not _STACKED_ARGS <= _num_inputs(module):
            return False
        if takes_choice:
            module.forward = self._given_choice(run, num_experts)
        else:
            module.forward = self._whole_block(module, router, run, num_experts, top_k)
        self._patched.append(module)
        return True

    # ---- the experts

    def _stacked(self, path: str, module: nn.Module) -> tuple[Callable[[Any], Any], int] | None:
        own = dict(module.named_parameters(recurse=False))
        stacked = {name: p for name, p in own.items() if p.dim() == 3}
        sizes = {p.shape[0] for p in stacked.values()}
        if len(stacked) < 2 or len(sizes) != 1 or min(sizes) < 2:
            return None
        num_experts = sizes.pop()
        for name, param in own.items():
            if param.shape[0] == num_experts and name not in _router_names(module, num_experts):
                self.recorder.expert_twins[f"{path}.{name}".lstrip(".")] = f"{path}.{name}".lstrip(".")
        return (lambda rows: _run_stacked(module, own, rows)), num_experts

    def _listed(self, path: str, module: nn.Module) -> tuple[Callable[[Any], Any], int] | None:
        for name, child in module.named_children():
            experts = list(child.children()) if isinstance(child, nn.ModuleList | nn.ModuleDict) else []
            if len(experts) < 2 or not any(True for _ in experts[0].parameters()):
                continue
            if not (_router(module, len(experts)) or _num_inputs(module) >= _STACKED_ARGS):
                continue
            if len({signature(expert) for expert in experts}) != 1:
                continue
            names = [key for key, _ in child.named_children()]
            base = f"{path}.{name}".lstrip(".")
            for key in names:
                for param, _ in experts[0].named_parameters():
                    self.recorder.expert_twins[f"{base}.{key}.{param}"] = f"{base}.{names[0]}.{param}"
            self.skipped.update(id(m) for expert in experts[1:] for m in expert.modules())
            return experts[0], len(experts)
        return None

    # ---- forwards

    def _given_choice(self, run: Callable[[Any], Any], num_experts: int) -> Callable[..., Any]:
        """Forward of a module that is handed hidden states, the chosen experts and their weights."""

        def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            chosen = next(t for t in tensors if not t.is_floating_point())
            weights = next(t for t in tensors if t.is_floating_point())
            return self._route(hidden, chosen, weights, run, num_experts)

        return forward

    def _whole_block(
        self, block: nn.Module, router: str, run: Callable[[Any], Any], num_experts: int, top_k: int
    ) -> Callable[..., Any]:
        """Forward of a block that routes by itself; other submodules with parameters are shared experts."""
        self.recorder.notes.append("expert routing is traced as balanced over the experts")

        def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            del args, kwargs
            rows = hidden.reshape(-1, hidden.shape[-1])
            chosen, weights = _choose(getattr(block, router), rows, top_k)
            out = self._route(rows, chosen, weights, run, num_experts).view(hidden.shape)
            for name, child in block.named_children():
                is_expert_list = isinstance(child, nn.ModuleList | nn.ModuleDict)
                if name == router or is_expert_list or not any(True for _ in child.parameters()):
                    continue
                extra = child(hidden)
                out = out * extra.sigmoid() if extra.shape[-1] == 1 else out + extra
            return out

        return forward

    def _route(
        self,
        hidden: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        run: Callable[[Any], Any],
        num: int,
    ) -> torch.Tensor:
        recorder = self.recorder
        rows = hidden.reshape(-1, hidden.shape[-1])
        top_k = chosen.numel() // rows.shape[0]
        with recorder.routed(num, top_k):
            with recorder.quiet():
                sent = _Dispatch.apply(rows, chosen, top_k)
            recorder.add_op(plain_op("dispatch", OpKind.PERMUTE), [rows, chosen], [sent])
            done = run(sent)
            with recorder.quiet():
                out = _Combine.apply(done, weights, rows.shape[0])
            recorder.add_op(plain_op("combine", OpKind.PERMUTE), [done, weights, chosen], [out])
        return out.view(hidden.shape)


_STACKED_ARGS = 3


def _num_inputs(module: nn.Module) -> int:
    code = getattr(type(module).forward, "__wrapped__", type(module).forward).__code__
    return code.co_argcount - 1


def _top_k_of(module: nn.Module, default: int) -> int:
    holders = [module, getattr(module, "config", None)]
    for holder in holders:
        for name in _TOP_K:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return default


def _router_names(module: nn.Module, num_experts: int) -> list[str]:
    found = []
    for name, child in module.named_children():
        linear = isinstance(child, nn.Linear) and child.out_features == num_experts
        weight = getattr(child, "weight", None)
        shaped = isinstance(weight, nn.Parameter) and weight.dim() == 2 and weight.shape[0] == num_experts
        if linear or (shaped and (_ROUTER.search(name) or _ROUTER.search(type(child).__name__))):
            found.append(name)
    for name, param in module.named_parameters(recurse=False):
        shaped = param.dim() == 2 and param.shape[0] == num_experts and not name.endswith("bias")
        if shaped and _ROUTER.search(name):
            found.append(name)
    return found


def _router(module: nn.Module, num_experts: int) -> str:
    return next(iter(_router_names(module, num_experts)), "")


def _choose(router: Any, rows: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(chosen experts, their weights), each (tokens, top_k), from a router module or its bare weight."""
    result = F.linear(rows, router) if isinstance(router, torch.Tensor) else router(rows)
    tensors = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
    given = next((t for t in tensors if not t.is_floating_point()), None)
    if given is not None:
        return given, next(t for t in tensors if t.is_floating_point() and t.shape == given.shape)
    weights, chosen = tensors[0].softmax(dim=-1).topk(top_k, dim=-1)
    return chosen, weights


def _run_stacked(module: nn.Module, own: dict[str, nn.Parameter], rows: torch.Tensor) -> torch.Tensor:
    """A (gated) MLP on `rows` with the first expert's slices of [E, ., .] parameters."""
    hidden = rows.shape[-1]
    stacked = [name for name, p in own.items() if p.dim() == 3]
    down = next((name for name in stacked if _DOWN.search(name)), stacked[-1])
    ups = [_linear(own, name, rows, _other(own[name], hidden)) for name in stacked if name != down]
    inner = _other(own[down], hidden)
    activate = next(
        (f for n in ("act_fn", "act", "activation") if callable(f := getattr(module, n, None))), F.silu
    )
    parts = [piece for up in ups for piece in (up.chunk(2, dim=-1) if up.shape[-1] == 2 * inner else (up,))]
    middle = activate(parts[0]) * parts[1] if len(parts) > 1 else activate(parts[0])
    return _linear(own, down, middle, hidden)


def _other(param: nn.Parameter, hidden: int) -> int:
    first, second = param.shape[1:]
    return int(second if first == hidden else first)


def _linear(own: dict[str, nn.Parameter], name: str, rows: torch.Tensor, width: int) -> torch.Tensor:
    weight = own[name][0]
    weight = weight if weight.shape[0] == width else weight.t()
    bias = next(
        (p[0] for n, p in own.items() if p.dim() == 2 and n.startswith(name) and p.shape[1] == width), None
    )
    return F.linear(rows, weight, bias)
