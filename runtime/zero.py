"""ZeRO 0-3 and hybrid sharding through FSDP2, one setting each.

  0  parameters replicate; gradients are all-reduced with the last micro-batch
  1  shards live between steps, whole parameters and gradients within one; reduce-scatter with the last micro-batch
  2  as 1, gradients reduce-scattered in every micro-batch
  3  as 2, parameters gathered for each layer's forward and backward
(Rajbhandari et al. 2020, arXiv 1910.02054, sections 5 and 7; Zhao et al. 2023, arXiv 2304.11277.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from planner.costmodel.strategy import PlanSpec


def shard(
    module: nn.Module, mesh: DeviceMesh, spec: PlanSpec, precision: torch.dtype | None, ignored: set[Any]
) -> None:
    """Give the parameters of `module` that are not managed yet to FSDP2."""
    policy = MixedPrecisionPolicy()
    if precision is not None:
        policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False)
    ranks = mesh["shard"].size()
    fully_shard(
        module,
        mesh=mesh if mesh.size(0) > 1 else mesh["shard"],
        shard_placement_fn=lambda param: _placement(param, ranks),
        reshard_after_forward=spec.zero_stage == 3,
        mp_policy=policy,
        ignored_params=ignored,
    )
    assert isinstance(module, FSDPModule)
    if hasattr(module, "set_reduce_scatter_unused_params"):  # an expert without tokens must not break the collective
        module.set_reduce_scatter_unused_params(True)
    module.set_force_sum_reduction_for_comms(True)
    module.set_gradient_divide_factor(1.0)  # the loss is already per token of the whole batch: sum, not mean


def _placement(param: nn.Parameter, ranks: int) -> Shard:
    """Rows, but of stacked experts too few for `ranks` a dim that divides: rows would leave most ranks without any."""
    dims = range(param.dim()) if param.dim() > 2 else ()
    return Shard(next((d for d in dims if param.shape[d] % ranks == 0), 0))


def before_backward(model: nn.Module, spec: PlanSpec, last: bool) -> None:
    """Say whether the coming backward reduces gradients, and frees gathered parameters."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(spec.zero_stage >= 2 or last)
        model.set_is_last_backward(last)
        model.set_reshard_after_backward(spec.zero_stage == 3 or last)


def gather_now(model: nn.Module) -> None:
    """Gather all parameters at once, for a step whose ranks do not go through its layers side by side."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()


def reduce_now(model: nn.Module) -> None:
    """Reduce the gradients of a whole step at once, after micro-batches that summed them up on each rank."""
    if not isinstance(model, FSDPModule):
        return
    model.set_is_last_backward(True)
    model.set_reshard_after_backward(True)
    model.set_requires_gradient_sync(True)
    root = fully_shard.state(model)  # type: ignore[attr-defined]
    for state in root._state_ctx.all_states:
        for group in state._fsdp_param_groups:
            group.post_backward()
    root._root_post_backward_final_callback()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Part of this rank of a DTensor, or the tensor itself; shares memory with it."""
    return getattr(tensor, "_local_tensor", tensor)
