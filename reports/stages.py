"""Which layers a pipeline stage holds, by the rule of the software that ran: half-open ranges in pipeline order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

Stages = tuple[tuple[int, int], ...]


def from_counts(counts: Sequence[int]) -> Stages:
    """Consecutive ranges of the given lengths."""
    edges = [0, *itertools.accumulate(counts)]
    return tuple(itertools.pairwise(edges))


def even(num_layers: int, num_stages: int) -> Stages:
    """Equal stages; where L + 2 divides instead, embedding and head each take one layer's slot."""
    if num_layers % num_stages == 0:
        return from_counts([num_layers // num_stages] * num_stages)
    if (num_layers + 2) % num_stages == 0:
        size = (num_layers + 2) // num_stages
        counts = [size] * num_stages
        counts[0] -= 1
        counts[-1] -= 1
        return from_counts(counts)
    base, more = divmod(num_layers, num_stages)
    return from_counts([base + (stage < more) for stage in range(num_stages)])


def nanotron(num_layers: int, num_stages: int, layer_cost: float, head_cost: float) -> Stages:
    """Blocks (embedding 0, layers, norm 0, head) go to a stage until their running cost passes its share.

    The block that passes the share still belongs to the stage (nanotron, models/base.py, build_model).
    """
    total = num_layers * layer_cost + head_cost
    counts, stage, spent = [0] * num_stages, 0, 0.0
    for _ in range(num_layers):
        counts[stage] += 1
        spent += layer_cost
        if spent > total * (stage + 1) / num_stages:
            stage += 1
    return from_counts(counts)


def nanotron_fills(counts: Sequence[int]) -> bool:
    """Whether every stage gets a block.

    Each stage takes a block at least, and behind the layers only three are left:
    the head with the norm in front of it, the cast of the logits, and the loss. A stage without a block fails.
    """
    return sum(count == 0 for count in counts) <= 3


def balanced(num_layers: int, num_stages: int, layer_cost: float, head_cost: float) -> Stages:
    """The smallest largest stage cost when the last stage also bears the head; early stages take the surplus."""
    best: tuple[float, list[int]] | None = None
    for last in range(num_layers // num_stages + 1):
        base, more = divmod(num_layers - last, num_stages - 1) if num_stages > 1 else (0, 0)
        counts = [base + (stage < more) for stage in range(num_stages - 1)] + [last]
        cost = max(max(counts[:-1], default=0) * layer_cost, last * layer_cost + head_cost)
        if sum(counts) == num_layers and (best is None or cost <= best[0]):
            best = (cost, counts)
    return from_counts(best[1]) if best else from_counts([num_layers])


def from_modules(edges: Sequence[int], num_layers: int, before: int) -> Stages:
    """A partition of pipeline modules of which `before` come in front of the layers."""
    cuts = [min(max(edge - before, 0), num_layers) for edge in edges]
    return tuple(itertools.pairwise(cuts))
