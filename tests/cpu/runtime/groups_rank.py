"""Ranks of the group tests: random dispatches of random documents, gradients against one process, in float64."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from parity_rank import build, whole, worst

from planner.costmodel.sequences import GroupCost
from planner.costmodel.strategy import STRATEGIES, PlanSpec
from planner.dispatch import Group, MicroStep
from planner.profiler.graph_io import decode_graph
from planner.runtime.apply import parallelize
from planner.runtime.errors import RuntimePlanError
from planner.runtime.groups import Grouped, next_tokens
from planner.runtime.parallel import IGNORE_INDEX, next_token_loss
from planner.runtime.zero import local

LONGEST = 23


def kinds_of(spec):
    """Every ulysses x ring that ranks and heads allow, each with another strategy; with ep of the spec's half."""
    ranks, heads = spec.dp * spec.cp, 4 // spec.tp
    again = spec.layers[0].recompute == "full"
    strategies = [s for s in STRATEGIES if spec.ep == 1 or (s.recompute == "full") == again]
    shapes = [(u, r) for u in (1, 2, 4, 8) for r in (1, 2, 4, 8) if u * r <= ranks and u <= heads]
    grid = np.array([16.0, 32.0])
    return [
        GroupCost(ulysses=u, ring=r, strategy=strategies[i % len(strategies)], fixed_s=0.0, grid_G=grid,
                  per_token_s_G=grid, capacity_tokens=1e9)
        for i, (u, r) in enumerate(shapes)
    ]  # fmt: skip


def cut(dice, ranks):
    """`ranks` in aligned blocks of powers of two, some of them idle."""
    found, at = [], 0
    while at < ranks:
        size = dice.choice([s for s in (1, 2, 4, 8) if at % s == 0 and at + s <= ranks])
        found.append((at, size))
        at += size
    kept = [block for block in found if dice.random() < 0.8]
    return kept or [found[0]]


def drawn(dice, ranks, kinds):
    """(lengths, dispatch): micro-steps of random groups, each with its own number of micro-batches."""
    steps, count = [], 0
    for _ in range(dice.randint(1, 3)):
        groups = []
        for first, size in cut(dice, ranks):
            kind = dice.choice([k for k, kind in enumerate(kinds) if kind.ranks == size])
            parts = []
            for _ in range(dice.choice([1, 1, 2, 3])):
                held = dice.randint(1, 4)
                parts.append(tuple(range(count, count + held)))
                count += held
            groups.append(Group(kind=kind, first_rank=first, micro_batches=tuple(parts), time_s=0.0))
        steps.append(MicroStep(groups=tuple(groups)))
    lengths = [min(LONGEST, int(dice.paretovariate(0.9))) for _ in range(count)]
    lengths[0] = max(2, lengths[0])  # at least one label
    return np.array(lengths), tuple(steps)


def alone(lengths):
    """A dispatch of each document on a rank of its own."""
    groups = tuple(Group(kind=0, first_rank=i, micro_batches=((i,),), time_s=0.0) for i in range(len(lengths)))
    return (MicroStep(groups=groups),) if groups else ()


def documents_of(seed, lengths, vocab):
    made = np.random.default_rng(seed)
    found = []
    for length in lengths:
        tokens, labels = next_tokens(made.integers(vocab, size=length))
        found.append((tokens, np.where((made.random(length) < 0.1) & (length > 4), IGNORE_INDEX, labels)))
    return found


def reference(case, documents):
    """Loss and gradients of one process, a document at a time."""
    model = build(case)
    count = sum(int((labels != IGNORE_INDEX).sum()) for _, labels in documents)
    total = 0.0
    for tokens, labels in documents:
        loss = next_token_loss(model(torch.from_numpy(tokens)[None]), torch.from_numpy(labels)[None]) / count
        loss.backward()
        total += float(loss.detach())
    return total, count, {n: p.grad for n, p in model.named_parameters()}


def run_case(case):
    graph = decode_graph(Path(case["graph"]).read_bytes())
    spec = msgspec.convert(case["spec"], PlanSpec)
    parallel = parallelize(build(case), spec, graph, seq_len=case["seq_len"], packs=True)
    ranks = spec.dp * spec.cp
    grouped = Grouped(parallel, kinds_of(spec))
    errors, refused = [], []
    for sizes in ([], [1] * ranks):
        try:
            grouped.backward(alone(sizes), np.array(sizes, np.int64), lambda _: next_tokens(np.zeros(1, np.int64)))
        except RuntimePlanError as error:
            refused.append(str(error))
    for seed in case["seeds"]:
        lengths, steps = drawn(random.Random(seed), ranks, grouped.kinds)
        documents = documents_of(seed, lengths, case["vocab"])
        loss, count = grouped.backward(steps, lengths, documents.__getitem__)
        parallel.optimizer.sync()
        grads = whole(parallel, lambda item: local(item.param.grad))
        for item in parallel.owned:
            item.param.grad = None
        if dist.get_rank():
            continue  # one rank compares
        want, want_count, want_grads = reference(case, documents)
        assert count == want_count
        name, error = worst(grads, want_grads)
        errors.append((seed, max(error, abs(loss - want) / want), name))
    return {"errors": errors, "refused": refused, "gathered": dict(parallel.ctx.gathered)}


def run(cases):
    from planner.runtime.mesh import _groups

    found = []
    for case in cases:
        result = run_case(case)
        found.append({**result, "groups": sum(dist.get_rank() in ranks for ranks in _groups)})
    return found
