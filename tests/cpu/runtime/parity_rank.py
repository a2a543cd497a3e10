"""One rank of a parity run: apply a plan, take three steps, compare with one process."""

from __future__ import annotations

import copy
import importlib.util
import traceback
from pathlib import Path
from unittest import mock

import msgspec
import torch
import torch.distributed as dist

from planner.costmodel.strategy import PlanSpec
from planner.profiler.graph_io import decode_graph
from planner.runtime import gated, head
from planner.runtime import norms as norm_modules
from planner.runtime.apply import parallelize
from planner.runtime.checkpoint import Checkpoints, committed, moments_of
from planner.runtime.layout import boxes
from planner.runtime.optimizer import AdamWConfig
from planner.runtime.parallel import next_token_loss
from planner.runtime.zero import local

STEPS = 3
head.CHUNK_ROWS = 5  # several chunks, the last one shorter
_GATED = ("llama", "hf_llama", "deepseek", "calling")  # models with gated MLPs
_ADAMW = AdamWConfig(lr=1e-3, max_grad_norm=0.5)


def load(path):
    spec = importlib.util.spec_from_file_location("parity_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(case):
    torch.manual_seed(0)
    models = load(Path(__file__).with_name("parity_models.py"))
    return getattr(models, case["model"])().to(torch.float64).train()


def batches(case, vocab):
    made = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        tokens = torch.randint(vocab, (case["spec"]["global_batch_size"], case["seq_len"] + 1), generator=made)
        labels = tokens[:, 1:].clone()
        labels[torch.rand(labels.shape, generator=made) < 0.2] = -100  # ranks have different numbers of tokens
        yield tokens[:, :-1], labels


def reference(case, vocab):
    """Losses, norms, gradients of step 1 and parameters after the last step of one process."""
    model = build(case)
    names = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(names.values(), lr=_ADAMW.lr, betas=_ADAMW.betas, eps=_ADAMW.eps, weight_decay=0.1)
    losses, norms, grads = [], [], None
    for tokens, labels in batches(case, vocab):
        loss = next_token_loss(model(tokens), labels) / (labels != -100).sum()
        loss.backward()
        losses.append(float(loss.detach()))
        grads = grads or {n: p.grad.clone() for n, p in names.items()}
        norm = torch.cat([p.grad.flatten() for p in names.values()]).norm()
        norms.append(float(norm))
        for p in names.values():
            p.grad *= min(1.0, _ADAMW.max_grad_norm / (float(norm) + 1e-6)) if norm > _ADAMW.max_grad_norm else 1.0
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, grads, {n: p.detach() for n, p in names.items()}


def whole(parallel, values):
    """Whole tensors from every rank's boxes, on every rank; elements that no rank holds are NaN."""
    mine = [
        (item.name, box.of_whole(), values(item)[box.of_local()].clone())
        for item in parallel.owned
        for box in boxes(parallel, item)
    ]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found = {n: torch.full(s, float("nan"), dtype=torch.float64) for n, s in parallel.full_shapes.items()}
    for name, index, value in (entry for rank in everyone for entry in rank):
        found[name][index] = value
    return found


def error(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))


def worst(ours, theirs):
    found = {n: error(ours[n], theirs[n]) for n in theirs}
    found = {n: float("inf") if e != e else e for n, e in found.items()}
    return max(found.items(), key=lambda pair: pair[1])


def state(parallel):
    """Whole parameters and moments."""
    values = [lambda item: local(item.param).detach()]
    values += [lambda item, n=n: moments_of(parallel, item)[n] for n in ("exp_avg", "exp_avg_sq")]
    return [whole(parallel, value) for value in values]


def resumed(parallel, case, graph):
    """How far the state under another plan is from the one that was saved."""
    checkpoints = Checkpoints(Path(case["folder"]) / case["model"])
    checkpoints.save(parallel, {"step": STEPS, "optimizer_steps": STEPS})
    checkpoints.wait()
    other = parallelize(build(case), msgspec.convert(case["resumes"], PlanSpec), graph, seq_len=case["seq_len"])
    checkpoints.load(other, committed(checkpoints.folder)[-1])
    return max(worst(ours, theirs)[1] for ours, theirs in zip(state(other), state(parallel), strict=True))


_cache = {}


def run_case(case):
    graph = decode_graph(Path(case["graph"]).read_bytes())
    spec = msgspec.convert(case["spec"], PlanSpec)
    vocab = case["vocab"]
    key = (case["model"], spec.global_batch_size, case["seq_len"])
    if key not in _cache:
        _cache[key] = reference(case, vocab)
    losses, norms, grads, params = _cache[key]
    fused = case["model"] == "llama" and spec.chunked_loss  # other cases have torch's own norms and loss
    by_kernel = spec.chunked_loss or spec.zero_stage == 3
    with (
        mock.patch.object(norm_modules, "chosen", lambda device: fused),
        mock.patch.object(gated, "chosen", lambda device: by_kernel),
    ):
        parallel = parallelize(
            build(case), spec, graph, seq_len=case["seq_len"], adamw=copy.copy(_ADAMW), compiled=case["compiled"]
        )
    assert (parallel.norms > 0) == fused
    assert (parallel.gated_mlps > 0) == (by_kernel and case["model"] in _GATED)
    at, size = parallel.mesh.position["dp"], spec.global_batch_size // spec.dp
    got_losses, got_norms, got_grads = [], [], None
    for tokens, labels in batches(case, vocab):
        rows = slice(at * size, (at + 1) * size)
        loss, _ = parallel.backward(tokens[rows], labels[rows])
        parallel.optimizer.sync()
        got_grads = got_grads or whole(parallel, lambda item: local(item.param.grad))
        got_norms.append(parallel.optimizer.step())
        got_losses.append(loss)
    got_params = whole(parallel, lambda item: local(item.param).detach())
    return {
        "loss": max(abs(a - b) / abs(b) for a, b in zip(got_losses, losses, strict=True)),
        "norm": max(abs(a - b) / abs(b) for a, b in zip(got_norms, norms, strict=True)),
        "grads": worst(got_grads, grads),
        "params": worst(got_params, params),
        "gathered": dict(parallel.ctx.gathered),
        "resumed": resumed(parallel, case, graph) if case["resumes"] else 0.0,
        "chunked_loss": parallel.head is not None,
    }


def run(cases):
    """Results of the cases up to the first that raises: a rank that went on alone would meet peers in another case."""
    results = []
    for case in cases:
        try:
            results.append(run_case(case))
        except Exception as problem:
            return [*results, {"error": repr(problem)[:500], "trace": traceback.format_exc()[-3500:]}]
    return results
