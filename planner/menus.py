"""dispatching_of(plan): the kinds of groups that a plan with buckets lets its dispatcher form, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from planner.costmodel.estimate import machine_for, model_facts
from planner.costmodel.sequences import DataShape, Menu, menu
from planner.costmodel.strategy import LayerStrategy
from planner.errors import PlanFileError
from planner.lengths import IntArray, Lengths
from planner.lengths import drift as drift_of
from planner.plan import Plan, SequencePlan

_QUANTILES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatching:
    """What a dispatcher needs: its menu, and the kind that a static plan of the same layout uses."""

    menu: Menu
    static_kind: int | None


def sequences_of(plan: Plan) -> SequencePlan:
    """The plan's buckets. PlanFileError if it has none, or none that say which kinds of groups there are."""
    found = plan.sequences
    if found is None:
        raise PlanFileError("the plan has no buckets for lengths: make one with `planner search --seq-dist`")
    if not found.kinds:
        raise PlanFileError("the plan does not say which groups may be formed (of an older version): search again")
    return found


def dispatching_of(plan: Plan, num_gpus: int | None = None) -> Dispatching:
    """The menu on the plan's GPUs, or on `num_gpus` of its cluster. PlanFileError if the layout does not divide."""
    wanted, spec, inputs = sequences_of(plan), plan.decisions, plan.inputs
    gpus = num_gpus or inputs.num_gpus
    if gpus % (spec.tp * spec.pp):
        raise PlanFileError(f"{gpus} ranks are no multiple of tp {spec.tp} x pp {spec.pp}")
    ranks = gpus // (spec.tp * spec.pp)
    if ranks % spec.ep:
        raise PlanFileError(f"{ranks} data ranks are no multiple of ep {spec.ep}")
    try:
        machine = machine_for(inputs.graph, inputs.cluster, inputs.engine, gpus)
    except ValueError as error:
        raise PlanFileError(str(error)) from None
    shape = DataShape(
        tp=spec.tp, sequence_parallel=spec.sequence_parallel, vocab_parallel=spec.vocab_parallel, pp=spec.pp,
        ep=spec.ep, zero_stage=spec.zero_stage, offload_optimizer=spec.offload_optimizer,
    )  # fmt: skip
    named = {
        (k.ulysses, k.ring, LayerStrategy(recompute=k.recompute, offload_activations=k.offload_activations))
        for k in wanted.kinds
        if k.ulysses * k.ring <= ranks
    }
    degrees = tuple(sorted({(ulysses, ring) for ulysses, ring, _ in named}))
    usable = inputs.cluster.device.memory_bytes.value * (1 - inputs.memory_margin_frac)
    facts = model_facts(inputs.graph, machine.engine)
    tokens = wanted.tokens_per_step * gpus / inputs.num_gpus
    full = menu(inputs.graph, facts, machine, shape, degrees, wanted.longest_tokens, tokens, usable)
    groups = tuple(group for group in full.groups if (group.ulysses, group.ring, group.strategy) in named)
    if not groups:
        raise PlanFileError(f"no group of the plan fits {ranks} data ranks")
    static = (spec.ulysses, spec.ring, spec.layers[0])
    at = next((i for i, g in enumerate(groups) if (g.ulysses, g.ring, g.strategy) == static), None)
    return Dispatching(menu=replace(full, groups=groups), static_kind=at)


def quantiles_of(lengths: Lengths) -> tuple[tuple[int, float], ...]:
    """(tokens, share of the sequences with at most so many) at up to 64 lengths, the longest last."""
    share = np.minimum(np.cumsum(lengths.share_N), 1.0)
    levels = np.arange(1, _QUANTILES) / _QUANTILES
    places = np.unique(np.append(np.searchsorted(share, levels), len(share) - 1))
    return tuple((int(lengths.tokens_N[i]), float(share[i])) for i in places[:-1]) + ((lengths.longest_tokens, 1.0),)


def drift(planned: SequencePlan, lengths: IntArray) -> str | None:
    """One line if `lengths`, cut as the plan cuts, cannot be drawn from what it was made for (see lengths.drift)."""
    if not planned.quantiles or not len(lengths):
        return None
    tokens, share = (np.array(column) for column in zip(*planned.quantiles, strict=True))
    # Between two quantiles the plan knows nothing: lengths are rounded up to the next, where both shares are exact.
    coarse = tokens[np.searchsorted(tokens, np.minimum(lengths, tokens[-1]))]
    expected = Lengths(
        name=planned.distribution, source=planned.source, tokens_N=tokens, share_N=np.diff(share, prepend=0.0)
    )
    return drift_of(expected, coarse)
