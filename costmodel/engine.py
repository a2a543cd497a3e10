"""EngineSpec: how the software that executes a plan behaves. Traits only; physics lives elsewhere.

An overlap trait is the fraction of min(communication, compute it may hide behind) that is really hidden:
0 = the transfer blocks, 1 = perfect overlap without slow-down (SYSTEMS: never all-or-nothing). Traits of
public engines are read from their documentation and source; values between 0 and 1 are ASSUMED until the
calibration of reports/ fits them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from planner.costmodel.graph import OpKind
from planner.costmodel.kernel_choice import kernels_on


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """Behaviour of a training engine.

    `weight_bytes`, `grad_bytes`, `optimizer_bytes` are per parameter (18 in all for bf16 weights, fp32
    gradients and fp32 master + Adam moments: Rajbhandari et al. 2020, arXiv 1910.02054 section 3.1).
    `reduce_bytes`: bytes per gradient on the wire. `selective_recompute`: op kinds that selective recomputation
    redoes in backward.
    `sp_saves_gathered`: sequence parallelism keeps the gathered input of a column-parallel linear for
    backward (DTensor) instead of gathering it again (Megatron: Korthikanti et al. 2022, section 4.2.2).
    `recompute_stops_early`: full recomputation ends at the last tensor that backward needs, in front of the layer's
    last product and the sum of its parts (torch.utils.checkpoint, `set_checkpoint_early_stop`).
    `selective_gathers_again`: selective recomputation under sequence parallelism redoes the norms and the gathers of
    their outputs, which `sp_saves_gathered` keeps otherwise.
    `sums_experts_once`: a block of experts takes its tokens whole over TP and sums its result once, routed and shared
    experts together, behind the combination, which therefore keeps whole tokens; otherwise routed and shared experts
    communicate apart, and what the combination keeps is split by sequence parallelism.
    `attention_flops_per_sm`: FLOP/s that the attention kernel reaches at best on one multiprocessor, for kernels
    that do not know the device's newer instructions. `p2p_scatter`: tensor-parallel ranks send a boundary tensor in
    shares and gather it over NVLink behind the cut (Narayanan et al. 2021, section 4.1; the gather is not priced).
    `accumulate_bytes`: HBM traffic per parameter and micro-batch of adding a gradient to its buffer in a kernel of
    its own (6 in 16 bits, 10 into float32); 0 where the weight-gradient GEMM accumulates itself. `logit_bytes`:
    memory per logit at the peak of the loss's backward. `bucket_params`: least parameters of a gradient-reduction or
    weight-gathering call, each of which pays the latency of a collective. `context_bytes`: CUDA context, communicator
    buffers and library workspaces. `gathers_copies`: forward reads copies of the weights that are gathered from the
    shards that the optimizer steps on, at every ZeRO stage, and has no weights but these shards and copies; gradients
    have no buffers, they exist from their backward on (FSDP2).
    `transients_in_turn`: what only one layer's backward needs (its gathered weights, recomputed activations, gradients)
    and what only the loss needs are not there at once; without it they add up.
    `compiles`: the runtime gives every layer to torch.compile.
    `keeps_received`: pipeline ranks have a buffer for all micro-batches that they receive (torch pipelining).
    """

    name: str
    attention: str = "flash"  # "flash" | "cudnn" | "flash3" | "unfused"
    attention_flops_per_sm: float = math.inf
    dropout: bool = False
    fuses_elementwise: bool = False
    compiles: bool = False
    weight_bytes: float = 2.0
    grad_bytes: float = 4.0
    reduce_bytes: float = 4.0
    accumulate_bytes: float = 6.0
    bucket_params: float = 40e6
    logit_bytes: float = 12.0
    optimizer_bytes: float = 12.0
    gathers_copies: bool = False
    zero_stages: tuple[int, ...] = (0, 1, 2, 3)
    selective_recompute: tuple[OpKind, ...] = (OpKind.NORM, OpKind.ELEMENTWISE)
    sp_saves_gathered: bool = False
    recompute_stops_early: bool = False
    selective_gathers_again: bool = False
    sums_experts_once: bool = False
    overlap_tp: float = 0.0
    overlap_tp_column: float = 0.0  # backward of column-parallel GEMMs only: beside their weight gradient
    overlap_cp: float = 0.0
    overlap_ep: float = 0.0
    p2p_scatter: bool = False
    keeps_received: bool = False
    transients_in_turn: bool = False
    overlap_p2p: float = 0.0
    overlap_p2p_interleaved: float = 0.0
    overlap_grad_reduce: float = 0.0
    overlap_param_gather: float = 0.0
    overlap_zero3: float = 0.0
    overlap_offload: float = 0.0
    context_bytes: float = 1.5e9
    fragmentation_frac: float = 0.03  # of activations: what the caching allocator cannot reuse
    host_launch_s: float = 5e-6  # CPU time to issue one op of the traced graph; the device may have to wait for it
    host_collective_s: float = 0.0  # the same for one tensor-parallel collective
    host_collective_crossing_s: float = 0.0  # more of it, times tp, in a pipeline that crosses nodes
    # Host seconds beside kernels and collectives, (forward, backward), as a profile finds them: of a layer under FSDP2
    # in every micro-batch (`host_shard_s`), more where its weights are gathered and its gradients reduced
    # (`host_sync_s`), and of an op of a layer on parts of tensors by what cuts them ("tp", "sp": both, "cp"). Of a
    # pipeline stage, for the pass of a micro-batch in either direction: `host_stage_s`.
    host_shard_s: tuple[float, float] = (0.0, 0.0)
    host_sync_s: tuple[float, float] = (0.0, 0.0)
    host_cut_s: dict[str, tuple[float, float]] = field(default_factory=dict)
    host_stage_s: float = 0.0
    blocking_launches: bool = False  # the host waits for every kernel (CUDA_LAUNCH_BLOCKING): nothing is hidden
    host_adam_params_per_s: float = 1.0e9  # CPU optimizer rate per GPU's share of the host
    kernels: dict[str, str] = field(default_factory=dict)  # op of planner.kernels -> implementation (kernel_choice.py)
    note: str = ""


_BLOOM = EngineSpec(
    name="megatron-deepspeed-bf16",
    host_launch_s=80e-6,
    host_collective_s=20e-6,
    blocking_launches=True,
    accumulate_bytes=0.0,
    grad_bytes=6.0,
    logit_bytes=8.0,
    attention="unfused",
    fuses_elementwise=True,
    zero_stages=(1,),
    context_bytes=3.5e9,
    note="Megatron-DeepSpeed of BLOOM: ZeRO-1, fp32 gradients beside the 16-bit ones (DeepSpeed BF16_Optimizer), "
    "reduction and gathering buffers of 5e8 elements each (DeepSpeed's defaults), no dropout, blocking launches",
)
_PLANNER = EngineSpec(
    name="planner",
    recompute_stops_early=True,
    selective_gathers_again=True,
    sums_experts_once=True,
    sp_saves_gathered=True,
    gathers_copies=True,
    keeps_received=True,
    transients_in_turn=True,
    overlap_cp=0.8,
    overlap_grad_reduce=0.8,
    overlap_param_gather=0.8,
    overlap_zero3=0.8,
    overlap_offload=0.8,
    kernels=kernels_on("gpu"),
    note="planner.runtime: DTensor TP, FSDP2, torch pipelining, flash SDPA",
)
_ENGINES = (
    _PLANNER,
    replace(
        _PLANNER,
        name="planner-compiled",
        compiles=True,
        fuses_elementwise=True,
        note="planner.runtime with torch.compile on every layer: chains of elementwise ops are one kernel",
    ),
    EngineSpec(
        name="megatron-core",
        p2p_scatter=True,
        accumulate_bytes=0.0,
        overlap_tp=0.7,
        logit_bytes=8.0,
        attention="cudnn",
        fuses_elementwise=True,
        selective_recompute=(OpKind.ATTENTION,),
        zero_stages=(0, 1),
        overlap_cp=0.8,
        overlap_p2p_interleaved=0.8,
        overlap_grad_reduce=0.8,
        overlap_param_gather=0.8,
        overlap_offload=0.8,
        note="Megatron-Core with distributed optimizer, overlapped gradient reduce and parameter gather",
    ),
    EngineSpec(
        name="nemo",
        p2p_scatter=True,
        overlap_tp=0.7,
        accumulate_bytes=0.0,
        logit_bytes=8.0,
        attention="cudnn",
        fuses_elementwise=True,
        selective_recompute=(OpKind.ATTENTION,),
        zero_stages=(0, 1),
        grad_bytes=2.0,
        reduce_bytes=2.0,
        overlap_cp=0.8,
        overlap_p2p_interleaved=0.8,
        overlap_grad_reduce=0.8,
        overlap_param_gather=0.8,
        overlap_offload=0.8,
        note="NeMo and Megatron-Bridge performance recipes: Megatron-Core with tensor-parallel overlap and 16-bit "
        "gradients (grad_reduce_in_fp32 off)",
    ),
    EngineSpec(
        name="megatron-2021",
        p2p_scatter=True,
        logit_bytes=8.0,
        accumulate_bytes=6.0,
        attention="unfused",
        dropout=True,
        fuses_elementwise=True,
        selective_recompute=(OpKind.ATTENTION,),
        zero_stages=(0,),
        reduce_bytes=2.0,
        note="Megatron-LM of Narayanan 2021: unfused attention, blocking all-reduce of fp16 gradients",
    ),
    EngineSpec(
        name="megatron-2022",
        p2p_scatter=True,
        accumulate_bytes=0.0,
        overlap_tp_column=0.8,
        logit_bytes=8.0,
        attention="unfused",
        dropout=True,
        fuses_elementwise=True,
        selective_recompute=(OpKind.ATTENTION,),
        zero_stages=(0,),
        note="Megatron-LM of Korthikanti 2022: unfused attention, blocking all-reduce of fp32 gradients",
    ),
    EngineSpec(
        name="megatron-2023",
        p2p_scatter=True,
        overlap_tp_column=0.8,
        logit_bytes=8.0,
        fuses_elementwise=True,
        selective_recompute=(OpKind.ATTENTION,),
        zero_stages=(0, 1),
        grad_bytes=2.0,
        reduce_bytes=2.0,
        accumulate_bytes=0.0,
        note="Megatron-LM with FlashAttention and 16-bit gradients (the forks of the zero-bubble authors)",
    ),
    EngineSpec(
        name="megatron-2023-unfused",
        p2p_scatter=True,
        overlap_tp_column=0.8,
        attention="unfused",
        dropout=True,
        logit_bytes=8.0,
        fuses_elementwise=True,
        selective_recompute=(OpKind.ATTENTION,),
        zero_stages=(0, 1),
        grad_bytes=2.0,
        reduce_bytes=2.0,
        accumulate_bytes=0.0,
        note="the same with scores in memory and dropout",
    ),
    EngineSpec(
        name="megatron-deepspeed",
        accumulate_bytes=6.0,
        host_launch_s=80e-6,
        host_collective_s=20e-6,
        logit_bytes=8.0,
        attention="unfused",
        dropout=True,
        fuses_elementwise=True,
        zero_stages=(0,),
        reduce_bytes=2.0,
        note="Megatron-DeepSpeed: unfused attention, fp16 gradients reduced after the last backward",
    ),
    _BLOOM,
    replace(
        _BLOOM,
        name="megatron-deepspeed-zero1",
        grad_bytes=2.0,
        reduce_bytes=2.0,
        optimizer_bytes=16.0,
        note="the same before it accumulated in fp32: 16-bit gradients, whose fp32 copy is sharded (DeepSpeed "
        "ZeroOptimizer, stage_1_and_2)",
    ),
    EngineSpec(
        name="deepspeed-pipe",
        accumulate_bytes=6.0,
        host_launch_s=60e-6,
        logit_bytes=8.0,
        attention="unfused",
        dropout=True,
        fuses_elementwise=True,
        zero_stages=(0,),
        reduce_bytes=2.0,
        note="DeepSpeed's pipeline engine with Megatron-LM 1.1.5 layers",
    ),
    EngineSpec(
        name="nanotron",
        host_launch_s=20e-6,
        host_collective_s=220e-6,
        host_collective_crossing_s=170e-6,
        zero_stages=(0, 1),
        sp_saves_gathered=True,
        accumulate_bytes=10.0,
        grad_bytes=6.0,
        logit_bytes=16.0,
        note="nanotron: FlashAttention-2, ZeRO 0/1, no recompute by default; gradients are accumulated in fp32 beside "
        "the 16-bit ones (Ultra-Scale Playbook, memory of weights, gradients and optimizer states)",
    ),
    EngineSpec(
        name="llm-foundry",
        logit_bytes=4.0,
        attention_flops_per_sm=0.93e12,
        zero_stages=(3,),
        reduce_bytes=2.0,
        overlap_grad_reduce=0.8,
        overlap_zero3=0.8,
        note="llm-foundry of 2023: torch FSDP1 with 16-bit reduction, fused loss, first-generation flash attention, "
        "which reaches about 100 TFLOP/s on the 108 of an A100 (Dao 2023, arXiv 2307.08691, figure 4)",
    ),
    EngineSpec(
        name="xla",
        accumulate_bytes=0.0,
        attention="cudnn",
        fuses_elementwise=True,
        selective_recompute=(OpKind.ATTENTION, OpKind.NORM, OpKind.ELEMENTWISE),
        zero_stages=(3,),
        overlap_grad_reduce=0.8,
        overlap_zero3=0.8,
        note="Paxml and MaxText: JAX/XLA FSDP with latency-hiding scheduler",
    ),
    EngineSpec(
        name="torchtitan",
        sp_saves_gathered=True,
        zero_stages=(3,),
        fuses_elementwise=True,
        overlap_cp=0.8,
        overlap_grad_reduce=0.8,
        overlap_param_gather=0.8,
        overlap_zero3=0.8,
        overlap_offload=0.8,
        note="torchtitan: FSDP2 with torch.compile per block",
    ),
    EngineSpec(
        name="deepspeed",
        overlap_grad_reduce=0.8,
        overlap_param_gather=0.5,
        overlap_zero3=0.7,
        overlap_offload=0.8,
        note="DeepSpeed ZeRO with Ulysses; overlap_comm on",
    ),
)
ENGINES: dict[str, EngineSpec] = {engine.name: engine for engine in _ENGINES}


def get_engine(name: str) -> EngineSpec:
    """The engine called `name`; ValueError with the known names otherwise."""
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}; known: {', '.join(ENGINES)}")
    return ENGINES[name]
