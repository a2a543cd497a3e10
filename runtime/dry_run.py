"""dry_run: apply a plan on fake ranks in this process and compare what it does with what was predicted.

The same code as in training runs one micro-batch of the first, a middle and the last pipeline rank under fake
tensors: nothing is allocated or sent, every collective is counted with its bytes. A message's bytes are those
of the whole tensor: output of an all-gather, input of a reduce-scatter, all-reduce or all-to-all.
"""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from planner.kernels import dispatch
from planner.plan import Plan
from planner.profiler.hf import load_config
from planner.profiler.load import load_python
from planner.runtime import recompute, zero
from planner.runtime.apply import parallelize_plan
from planner.runtime.errors import RuntimePlanError
from planner.runtime.mesh import forget_groups
from planner.runtime.parallel import Parallel
from planner.runtime.pipeline import stages_of
from planner.runtime.predicted import Predicted, predicted_rank
from planner.runtime.witness import Witness, on_gpu_terms

ACTIVATION_LIMIT = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class RankResult:
    """What one pipeline rank holds and sends: per-rank bytes of parameters, states and activations, messages a step."""

    rank: int
    num_params: int  # before ZeRO
    shard_params: int
    activation_bytes: int  # of one micro-batch
    sent_bytes: dict[str, int]  # of one step, by kind
    calls: dict[str, int]
    gathered: dict[str, int]
    uneven: tuple[float, float]  # parameters that padding adds to ZeRO's messages, and to this rank's shard


def dry_run(plan: Plan, ranks: int, source: str | None = None) -> bool:
    """Print the comparison; True when every difference is within its limit or explained.

    `source`: model.py, model.py:function or config.json of the plan's model, whose code runs here. UserErrors in
    one line when the plan does not apply.
    """
    if ranks != plan.decisions.num_gpus:
        raise RuntimePlanError(f"--ranks {ranks}: the plan is for {plan.decisions.num_gpus} ranks")
    if source is None:
        raise RuntimePlanError("--ranks needs --model: a plan holds the graph of its model, not its code")
    spec = plan.decisions
    if plan.inputs.engine.compiles:
        engine = replace(plan.inputs.engine, compiles=False, fuses_elementwise=False)
        plan = replace(plan, inputs=replace(plan.inputs, engine=engine))
        print("note: compiled layers run uncompiled here and are compared with what they would keep then")
    good = True
    for rank in sorted({0, spec.pp // 2, spec.pp - 1}):
        found = run_rank(plan, meta_model(source, plan), rank)
        wanted = predicted_rank(plan, rank, found.uneven)
        good &= _compare(found, wanted, plan)
    return good


@on_gpu_terms()
def run_rank(plan: Plan, model: nn.Module, rank: int) -> RankResult:
    """Apply the plan as pipeline rank `rank`, first in every other axis, and run one micro-batch of each stage."""
    spec = plan.decisions
    world = spec.num_gpus
    dist.init_process_group("fake", store=FakeStore(), rank=rank * (world // spec.pp), world_size=world)
    forget_groups()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), dispatch.pretending(plan.inputs.engine.kernels):
            _materialise(model)
            low = plan.inputs.graph.dtype in ("bfloat16", "float16")
            precision = getattr(torch, plan.inputs.graph.dtype) if low else None
            parallel = parallelize_plan(model, plan, precision=precision)
            return _measure(parallel, rank)
    finally:
        dist.destroy_process_group()
        forget_groups()


def meta_model(source: str, plan: Plan) -> nn.Module:
    """The plan's model on the meta device. UserErrors in one line when it cannot be built."""
    inputs = plan.inputs
    path = Path(source.rpartition(":")[0] if ".py:" in source else source)
    if not path.is_file():
        raise RuntimePlanError(f"{path}: no such file; give model.py, model.py:function or config.json")
    length = inputs.seq_len if inputs.graph.unit == "tokens" else None
    micro_batch_size = plan.decisions.micro_batch_size
    if path.suffix == ".json":
        return load_config(path, length, micro_batch_size).model
    function = source.rpartition(":")[2] if ".py:" in source else ""
    return load_python(path, function, length, micro_batch_size).model


def _materialise(model: nn.Module) -> None:
    """Fake CPU tensors in the place of meta ones; masters are float32 as in training."""
    made: dict[int, nn.Parameter] = {}
    for owner in model.modules():
        for name, param in owner._parameters.items():
            if param is not None:
                if id(param) not in made:
                    made[id(param)] = nn.Parameter(torch.empty(param.shape, dtype=torch.float32), param.requires_grad)
                owner._parameters[name] = made[id(param)]
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _measure(p: Parallel, rank: int) -> RankResult:
    spec = p.spec
    kept = 0
    calls: Counter[str] = Counter()
    sent: Counter[str] = Counter()
    m = spec.num_microbatches
    # The first micro-batch gathers what the step keeps, the last one reduces; those between are alike.
    for times, last in [(min(m - 1, 1), False), (max(m - 2, 0), False), (1, True)]:
        if not times:
            continue
        zero.before_backward(p.model, spec, last=last and spec.pp == 1)
        with Witness() as seen, mock.patch.object(recompute, "watched", seen.copied):
            outs = [_forward(p, stage, seen) for stage in stages_of(spec, rank)]
            kept = sum(num_bytes for _, num_bytes in outs)
            for out, _ in reversed(outs):  # as in a pipeline, where no chunk's backward comes before every forward
                out.backward(torch.empty_like(out))
            if last and spec.pp > 1:
                zero.reduce_now(p.model)
            if last:
                assert p.optimizer is not None
                p.optimizer.sync()
        calls.update({kind: times * n for kind, n in seen.calls.items()})
        sent.update({kind: times * n for kind, n in seen.sent_bytes.items()})
    own = [zero.local(item.param) for item in p.owned]
    return RankResult(
        rank=rank, num_params=sum(item.param.numel() for item in p.owned),
        shard_params=sum(t.numel() for t in own), activation_bytes=kept, sent_bytes=dict(sent), calls=dict(calls),
        gathered=dict(p.ctx.gathered), uneven=_uneven(p),
    )  # fmt: skip


def _uneven(p: Parallel) -> tuple[float, float]:
    """(padding of all shards, what this rank holds beyond an even share) of the parameters that ZeRO shards."""
    added = beyond = 0.0
    for param in (item.param for item in p.owned if isinstance(item.param, DTensor)):
        for place, ranks in zip(param.placements, param.device_mesh.shape, strict=True):
            if isinstance(place, Shard):
                rows = param.shape[place.dim]
                added += (-rows % ranks) * param.numel() / rows
                beyond += zero.local(param).numel() - param.numel() / ranks
    return added, beyond


def _forward(p: Parallel, stage: int, seen: Witness) -> tuple[torch.Tensor, int]:
    """Forward of a stage on one micro-batch: its output, and the bytes kept for backward beside it."""
    first, _ = p.spec.stage_layers[stage]
    seen.made.clear()
    tokens = torch.zeros((p.spec.micro_batch_size, p.ctx.seq_len), dtype=torch.int64)
    received = None
    if stage:
        shape = p.chain.shapes[first - 1]
        received = torch.empty(p.residual_shape(shape.size), dtype=p.dtype or shape.dtype).requires_grad_()
    out = p.run(stage, received, tokens, tokens)
    gc.collect()
    return out, seen.kept_bytes(p.model, [out])


def _compare(found: RankResult, wanted: Predicted, plan: Plan) -> bool:
    print(f"pipeline rank {found.rank} of {plan.decisions.pp}")
    rows = [
        ("parameters before ZeRO", found.num_params, wanted.num_params, 0.0),
        ("parameters of this shard", found.shard_params, wanted.shard_params, 0.0),
        ("activation bytes a micro-batch", found.activation_bytes, wanted.activation_bytes, ACTIVATION_LIMIT),
    ]
    rows += [
        (f"{kind} bytes a step", found.sent_bytes.get(kind, 0), wanted.sent_bytes.get(kind, 0), 0.0)
        for kind in sorted({*found.sent_bytes, *wanted.sent_bytes})
    ]
    rows += [
        (f"{kind} calls a step", found.calls.get(kind, 0), wanted.calls.get(kind, 0), 0.0)
        for kind in ("all_to_all", "send_recv") if kind in found.calls or kind in wanted.calls
    ]  # fmt: skip
    good = True
    for name, is_now, predicted, limit in rows:
        off = abs(is_now - predicted) / max(predicted, 1)
        ok = off <= limit
        good &= ok
        print(f"  {name:<32}{is_now:>20,}  predicted {round(predicted):>20,}  {off:7.2%}  {'ok' if ok else 'DIFFERS'}")
    if found.gathered:
        good = False
        print(f"  ops without a rule, run on gathered tensors: {found.gathered}")
    for note in wanted.notes:
        print(f"  note: {note}")
    return good
