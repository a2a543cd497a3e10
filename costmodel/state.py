"""Model states under ZeRO: bytes per rank, and the communication that keeps them in step.

Everything broadcasts over arrays. The ZeRO group of dense parameters is dp_shard x cp (stride tp); routed
(expert) parameters are already split over ep of those ranks, so their group is what is left of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from planner.costmodel import comm, compute
from planner.costmodel.keys import Array, Machine
from planner.costmodel.layer_comm import exposed

# Buckets grow with the group so that latency does not rule them (Megatron-Core: max(40e6, 1e6 x dp) parameters).
BUCKET_PARAMS_PER_RANK = 1e6
_LEAST_BYTES = 4.0  # of a collective that takes its latency


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
        weights = _weight_bytes(shard, layout, machine)
        states = engine.optimizer_bytes / np.where(layout.zero >= 1, shard, 1.0)
        total = total + params * (weights + np.where(layout.offload_optimizer > 0, 0.0, states))
    return total + grad_bytes(dense, routed, layout, machine)


def grad_bytes(dense: Array, routed: Array, layout: StateLayout, machine: Machine) -> Array:
    """The gradients in `state_bytes`: whole until ZeRO-1."""
    per_param = machine.engine.grad_bytes
    sharded = layout.zero >= 2
    total: Array = per_param * dense / np.where(sharded, layout.shard, 1.0)
    return total + per_param * routed / np.where(sharded, layout.routed_shard, 1.0)


def _weight_bytes(shard: Array, layout: StateLayout, machine: Machine) -> Array:
    """Bytes of weights per parameter beside the optimizer's states.

    FSDP2 keeps what the optimizer steps on, sharded from ZeRO-1 on, and until ZeRO-3 whole copies of it for the step.
    What it steps on is counted with the optimizer, in float32 here. One rank alone has its weights once.
    """
    engine = machine.engine
    if not engine.gathers_copies:
        return np.asarray(engine.weight_bytes / np.where(layout.zero >= 3, shard, 1.0), np.float64)
    copies = np.where(layout.zero >= 3, 0.0, engine.weight_bytes)
    if machine.dtype != "float32":
        return copies
    stepped_on = engine.weight_bytes / np.where(layout.zero >= 1, shard, 1.0)
    return np.where(layout.data_ranks > 1, copies + stepped_on, engine.weight_bytes)


def host_state_bytes(dense: Array, routed: Array, layout: StateLayout, machine: Machine) -> Array:
    """Optimizer states and staged gradients in host memory when the optimizer is offloaded."""
    engine = machine.engine
    total = np.zeros_like(dense * layout.zero)
    for params, shard in ((dense, layout.shard), (routed, layout.routed_shard)):
        per_rank = params / np.where(layout.zero >= 1, shard, 1.0)
        total = total + per_rank * (engine.optimizer_bytes + engine.grad_bytes)
    result: Array = np.where(layout.offload_optimizer > 0, total, 0.0)
    return result


def _in_buckets(
    call: Callable[[Array], Array], params: Array, bytes_per_param: float, ranks: Array, machine: Machine
) -> Array:
    """Seconds of `call` (bytes -> seconds) on `params` parameters over `ranks`, one bucket after the other."""
    bucket = np.maximum(machine.engine.bucket_params, BUCKET_PARAMS_PER_RANK * ranks)
    buckets = np.maximum(params / bucket, 1.0)
    seconds: Array = buckets * call(params * bytes_per_param / buckets)
    return np.where(params > 0, seconds, 0.0)


def _copy_s(params: Array, bytes_per_param: float, machine: Machine) -> Array:
    """FSDP2's copies between parameters and the flat buffers that it sends: `bytes_per_param` read and written."""
    if not machine.engine.gathers_copies:
        return np.zeros_like(params)
    return np.where(params > 0, compute.memory_bound_s(machine.cluster.device, params * bytes_per_param, 1), 0.0)


def gather_s(dense: Array, routed: Array, layout: StateLayout, machine: Machine) -> Array:
    """All-gather of the weights of `dense` + `routed` parameters over their ZeRO groups."""
    weight = machine.engine.weight_bytes
    stride = layout.tp * layout.ep

    def over(size: Array, step: Array) -> Callable[[Array], Array]:
        return lambda n: comm.all_gather_s(machine.cluster, machine.domains, n, step, size)

    copied = np.where(layout.shard > 1, dense, 0.0) + np.where(layout.routed_shard > 1, routed, 0.0)
    first = _in_buckets(over(layout.shard, layout.tp), dense, weight, layout.shard, machine)
    first = first + _copy_s(copied, 2 * weight, machine)
    return first + _in_buckets(over(layout.routed_shard, stride), routed, weight, layout.routed_shard, machine)


def scatter_s(dense: Array, routed: Array, layout: StateLayout, machine: Machine) -> Array:
    """Reduce-scatter of gradients over the ZeRO groups."""
    grad = machine.engine.reduce_bytes
    stride = layout.tp * layout.ep

    def over(size: Array, step: Array) -> Callable[[Array], Array]:
        return lambda n: comm.reduce_scatter_s(machine.cluster, machine.domains, n, step, size)

    copied = np.where(layout.shard > 1, dense, 0.0) + np.where(layout.routed_shard > 1, routed, 0.0)
    first = _in_buckets(over(layout.shard, layout.tp), dense, grad, layout.shard, machine)
    first = first + _copy_s(copied, machine.engine.grad_bytes + grad, machine)
    return first + _in_buckets(over(layout.routed_shard, stride), routed, grad, layout.routed_shard, machine)


def replicate_s(dense: Array, routed: Array, layout: StateLayout, machine: Machine) -> Array:
    """All-reduce of gradients: over all data ranks without ZeRO, of each shard over the replicas with it."""
    grad = machine.engine.reduce_bytes
    sharded = layout.zero >= 1

    def over(size: Array, step: Array) -> Callable[[Array], Array]:
        return lambda n: comm.all_reduce_s(machine.cluster, machine.domains, n, step, size)

    shard = np.where(sharded, layout.shard, 1.0)
    size = layout.data_ranks / shard
    total = _in_buckets(over(size, layout.tp * shard), dense / shard, grad, size, machine)
    copied = np.where(~sharded & (layout.data_ranks > 1), dense + routed, 0.0)
    total = total + _copy_s(copied, machine.engine.grad_bytes + grad, machine)
    routed_shard = np.where(sharded, layout.routed_shard, 1.0)
    size = np.where(sharded, layout.routed_replicate, layout.data_ranks / layout.ep)
    stride = layout.tp * layout.ep * routed_shard
    return total + _in_buckets(over(size, stride), routed / routed_shard, grad, size, machine)


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
    # A host that launches ahead hides this; one that is the device does not.
    waits = (layout.data_ranks > 1) & engine.blocking_launches
    gathered, reduced = (np.where(layout.zero >= z, s, 0.0) for z, s in zip((3, 2), engine.host_sync_s, strict=True))
    host = [np.where(waits, s + gathered, 0.0) for s in engine.host_shard_s]
    host[1] = host[1] + np.where(waits, reduced, 0.0)
    return fwd + host[0], again + exposed(scatter, window, engine.overlap_grad_reduce) + host[1]


def once_s(layers: Array, layout: StateLayout, machine: Machine) -> Array:
    """What `step_sync` leaves out where FSDP2 gathers and reduces the `layers` layers of a rank one by one, seconds.

    The host's time for each, and the latency of every call but the first. 0 where a host launches ahead and hides it.
    """
    engine, zero = machine.engine, layout.zero
    gathered, reduced = engine.host_sync_s
    host = np.where(zero < 3, gathered, 0.0) + np.where(zero < 2, reduced, 0.0)

    def latency_s(call: Callable[..., Array], stride: Array, ranks: Array) -> Array:
        return call(machine.cluster, machine.domains, _LEAST_BYTES * np.ones_like(zero), stride, ranks)

    gather, scatter = (latency_s(call, layout.tp, layout.shard) for call in (comm.all_gather_s, comm.reduce_scatter_s))
    shard = np.where(zero >= 1, layout.shard, 1.0)
    calls = latency_s(comm.all_reduce_s, layout.tp * shard, layout.data_ranks / shard)
    calls = calls + np.where((zero == 1) | (zero == 2), gather, 0.0) + np.where(zero == 1, scatter, 0.0)
    waits = (layout.data_ranks > 1) & engine.blocking_launches & engine.gathers_copies
    return np.where(waits, layers * host + np.maximum(layers - 1, 0.0) * calls, 0.0)


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
    Where the device is a CPU it is its own host: gradients stay where they are.
    """
    engine, device = machine.engine, machine.cluster.device
    reduce = replicate_s(dense, routed, layout, machine)
    reduce = reduce + np.where(layout.zero == 1, scatter_s(dense, routed, layout, machine), 0.0)
    gathers = (layout.zero >= 1) & (layout.zero <= 2)
    gather = np.where(gathers, gather_s(dense, routed, layout, machine), 0.0)
    copied = (layout.zero == 0) & (layout.data_ranks > 1)  # FSDP2 copies what it steps on even where nothing is cut
    gather = gather + np.where(copied, _copy_s(dense + routed, 2 * engine.weight_bytes, machine), 0.0)
    sharded = layout.zero >= 1
    per_rank = dense / np.where(sharded, layout.shard, 1.0) + routed / np.where(sharded, layout.routed_shard, 1.0)
    offload = layout.offload_optimizer > 0
    # Adam reads weights, gradients and states and writes weights and states.
    adam_bytes = 2 * engine.optimizer_bytes + engine.grad_bytes + engine.weight_bytes
    update = compute.optimizer_s(device, per_rank, adam_bytes)
    host = update if device.name == "cpu" else per_rank / engine.host_adam_params_per_s
    host = host + compute.host_copy_s(device, per_rank * engine.weight_bytes)
    if device.name != "cpu":
        host = host + compute.host_copy_s(device, per_rank * engine.grad_bytes)
    return StepSync(
        reduce_s=exposed(reduce, backward_s, engine.overlap_grad_reduce),
        gather_s=exposed(gather, forward_s, engine.overlap_param_gather),
        optimizer_s=np.where(offload, 0.0, update),
        host_s=np.where(offload, host, 0.0),
    )
