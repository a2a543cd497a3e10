"""Model states under ZeRO: bytes per rank, and the communication that keeps them in step.

Everything broadcasts over arrays. The ZeRO group of dense parameters is dp_shard x cp (stride tp); routed
(expert) parameters are already split over ep of those ranks, so their group is what is left of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.costmodel import comm, compute
from planner.costmodel.price import Array, Machine, exposed


@dataclass(frozen=True, slots=True, kw_only=True)
class StateLayout:
    """How model states lie over the ranks of one pipeline stage; arrays that broadcast together."""

    tp: Array
    cp: Array
    ep: Array
    dp_replicate: Array
    dp_shard: Array
    zero: Array
    offload_optimizer: Array

    @property
    def shard(self) -> Array:
        """Ranks over which ZeRO shards dense states."""
        return self.dp_shard * self.cp

    @property
    def routed_shard(self) -> Array:
        """Ranks over which ZeRO shards expert states."""
        return np.maximum(self.shard / self.ep, 1.0)

    @property
    def data_ranks(self) -> Array:
        """Ranks that hold the same dense parameters before sharding."""
        return self.dp_replicate * self.shard

    @property
    def routed_replicate(self) -> Array:
        """Replicas of an expert shard."""
        return np.maximum(self.data_ranks / (self.ep * self.routed_shard), 1.0)


def state_bytes(dense: Array, routed: Array, frozen: Array, layout: StateLayout, machine: Machine) -> Array:
    """Weights, gradients and optimizer states on the GPU (Rajbhandari et al. 2020, section 5).

    ZeRO-1 shards optimizer states, ZeRO-2 gradients too, ZeRO-3 weights too. With the optimizer on the host
    its states leave the GPU.
    """
    engine = machine.engine
    total = frozen * engine.weight_bytes
    for params, shard in ((dense, layout.shard), (routed, layout.routed_shard)):
        weights = engine.weight_bytes / np.where(layout.zero >= 3, shard, 1.0)
        grads = engine.grad_bytes / np.where(layout.zero >= 2, shard, 1.0)
        states = engine.optimizer_bytes / np.where(layout.zero >= 1, shard, 1.0)
        total = total + params * (weights + grads + np.where(layout.offload_optimizer > 0, 0.0, states))
    return total


def host_state_bytes(dense: Array, routed: Array, layout: StateLayout, machine: Machine) -> Array:
    """Optimizer states and staged gradients in host memory when the optimizer is offloaded."""
    engine = machine.engine
    total = np.zeros_like(dense * layout.zero)
    for params, shard in ((dense, layout.shard), (routed, layout.routed_shard)):
        per_rank = params / np.where(layout.zero >= 1, shard, 1.0)
        total = total + per_rank * (engine.optimizer_bytes + engine.grad_bytes)
    result: Array = np.where(layout.offload_optimizer > 0, total, 0.0)
    return result


def gather_s(dense: Array, routed: Array, layout: StateLayout, machine: Machine) -> Array:
    """All-gather of the weights of `dense` + `routed` parameters over their ZeRO groups."""
    cluster, domains, weight = machine.cluster, machine.domains, machine.engine.weight_bytes
    first = comm.all_gather_s(cluster, domains, dense * weight, layout.tp, layout.shard)
    stride = layout.tp * layout.ep
    return first + comm.all_gather_s(cluster, domains, routed * weight, stride, layout.routed_shard)


def scatter_s(dense: Array, routed: Array, layout: StateLayout, machine: Machine) -> Array:
    """Reduce-scatter of gradients over the ZeRO groups."""
    cluster, domains, grad = machine.cluster, machine.domains, machine.engine.reduce_bytes
    first = comm.reduce_scatter_s(cluster, domains, dense * grad, layout.tp, layout.shard)
    stride = layout.tp * layout.ep
    return first + comm.reduce_scatter_s(cluster, domains, routed * grad, stride, layout.routed_shard)


def replicate_s(dense: Array, routed: Array, layout: StateLayout, machine: Machine) -> Array:
    """All-reduce of gradients: over all data ranks without ZeRO, of each shard over the replicas with it."""
    cluster, domains, grad = machine.cluster, machine.domains, machine.engine.reduce_bytes
    sharded = layout.zero >= 1
    shard = np.where(sharded, layout.shard, 1.0)
    size = layout.data_ranks / shard
    total = comm.all_reduce_s(cluster, domains, dense * grad / shard, layout.tp * shard, size)
    routed_shard = np.where(sharded, layout.routed_shard, 1.0)
    routed_size = np.where(sharded, layout.routed_replicate, layout.data_ranks / layout.ep)
    stride = layout.tp * layout.ep * routed_shard
    return total + comm.all_reduce_s(cluster, domains, routed * grad / routed_shard, stride, routed_size)


def layer_sync_s(
    dense: Array, routed: Array, forward_s: Array, backward_s: Array, layout: StateLayout, machine: Machine
) -> tuple[Array, Array]:
    """Exposed ZeRO communication of one layer in every micro-batch, (forward, backward).

    ZeRO-3 gathers weights for forward and again for backward; ZeRO-2 and 3 reduce-scatter gradients in every
    micro-batch (Rajbhandari et al. 2020, section 7).
    """
    engine = machine.engine
    gather = gather_s(dense, routed, layout, machine)
    scatter = np.where(layout.zero >= 2, scatter_s(dense, routed, layout, machine), 0.0)
    fwd = np.where(layout.zero >= 3, exposed(gather, forward_s, engine.overlap_zero3), 0.0)
    again = np.where(layout.zero >= 3, exposed(gather, backward_s, engine.overlap_zero3), 0.0)
    window = np.where(layout.zero >= 3, np.maximum(backward_s - gather, 0.0), backward_s)
    return fwd, again + exposed(scatter, window, engine.overlap_grad_reduce)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSync:
    """What a rank does once per optimizer step, exposed seconds."""

    reduce_s: Array
    gather_s: Array
    optimizer_s: Array
    host_s: Array

    @property
    def total_s(self) -> Array:
        """Sum of the parts."""
        return self.reduce_s + self.gather_s + self.optimizer_s + self.host_s


def step_sync(
    dense: Array, routed: Array, forward_s: Array, backward_s: Array, layout: StateLayout, machine: Machine
) -> StepSync:
    """Gradient reduction, optimizer and parameter gather of a rank that holds `dense` + `routed` parameters.

    Reduction hides behind one micro-batch's backward, the gather of ZeRO-1/2 behind one forward. An offloaded
    optimizer moves gradients down and weights up and steps on the CPU (Ren et al. 2021, ZeRO-Offload, section 4).
    """
    engine, device = machine.engine, machine.cluster.device
    reduce = replicate_s(dense, routed, layout, machine)
    reduce = reduce + np.where(layout.zero == 1, scatter_s(dense, routed, layout, machine), 0.0)
    gathers = (layout.zero >= 1) & (layout.zero <= 2)
    gather = np.where(gathers, gather_s(dense, routed, layout, machine), 0.0)
    sharded = layout.zero >= 1
    per_rank = dense / np.where(sharded, layout.shard, 1.0) + routed / np.where(sharded, layout.routed_shard, 1.0)
    offload = layout.offload_optimizer > 0
    # Adam reads weights, gradients and states and writes weights and states.
    adam_bytes = 2 * engine.optimizer_bytes + engine.grad_bytes + engine.weight_bytes
    copies = compute.host_copy_s(device, per_rank * engine.grad_bytes)
    copies = copies + compute.host_copy_s(device, per_rank * engine.weight_bytes)
    return StepSync(
        reduce_s=exposed(reduce, backward_s, engine.overlap_grad_reduce),
        gather_s=exposed(gather, forward_s, engine.overlap_param_gather),
        optimizer_s=np.where(offload, 0.0, compute.optimizer_s(device, per_rank, adam_bytes)),
        host_s=np.where(offload, copies + per_rank / engine.host_adam_params_per_s, 0.0),
    )
