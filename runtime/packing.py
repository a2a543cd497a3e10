"""Packed documents over the ranks of a group: who holds which tokens, and who attends to what in a turn of the ring.

Tokens lie in the order of their documents. Over ring ranks every document is cut into 2R nearly equal chunks, of which
rank r holds r and 2R-1-r, so that causal work is equal (zigzag of each document; raw lengths, nothing is rounded up);
the tokens of a ring rank are cut once more over its Ulysses ranks. Only the end of a rank is padded, to the length of
the fullest. Padding is document -1. Arrays: (R, n), a row per ring rank.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import unset_fake_temporarily

from planner.kernels.ring import zigzag_positions

IntArray = NDArray[np.int64]
Groups = tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]  # Ulysses, ring


@dataclass(frozen=True, slots=True)
class Ring:
    """What one ring rank computes: position and document of every rank's tokens, (R, n) int32 on the device.

    `blocks`: (turn, first and last query, first and last key, visible pairs) of each call of the kernel, flattened;
    in turn t the keys are those of rank (rank - t) % R.
    """

    positions: torch.Tensor
    documents: torch.Tensor
    blocks: list[int]


def split_documents(lengths: list[int], ring: int, multiple: int) -> tuple[IntArray, IntArray]:
    """(positions, documents) of every ring rank's tokens, padded to a common multiple of `multiple`."""
    ranges: list[list[tuple[int, int, int]]] = [[] for _ in range(ring)]
    held = np.zeros(ring, np.int64)
    for document, length in enumerate(lengths):
        base, left = divmod(length, 2 * ring)
        sizes = np.full(2 * ring, base)
        order = np.argsort(held, kind="stable")  # ranks with the fewest tokens take what does not divide
        takers = np.concatenate([order, order])[:left]
        for i, rank in enumerate(takers):
            sizes[rank if i < ring else 2 * ring - 1 - rank] += 1
        ends = np.cumsum(sizes)
        for chunk in range(2 * ring):
            if sizes[chunk]:
                rank = min(chunk, 2 * ring - 1 - chunk)
                ranges[rank].append((document, int(ends[chunk] - sizes[chunk]), int(ends[chunk])))
                held[rank] += sizes[chunk]
    size = max(multiple, -(-int(held.max()) // multiple) * multiple)
    positions, documents = np.zeros((ring, size), np.int64), np.full((ring, size), -1)
    for rank, row in enumerate(ranges):
        at = 0
        for document, first, last in row:
            positions[rank, at : at + last - first] = np.arange(first, last)
            documents[rank, at : at + last - first] = document
            at += last - first
    return positions, documents


def ring_of(positions: IntArray, documents: IntArray, rank: int, causal: bool, device: torch.device) -> Ring:
    """The turns of ring rank `rank`. A GPU's kernel skips what nobody sees: there a turn is one call."""
    ring, size = positions.shape
    blocks: list[int] = []
    for turn in range(ring):
        source = (rank - turn) % ring
        found = _visible(positions, documents, rank, source, causal)
        if device.type != "cpu":
            found = [(0, size, 0, size, sum(pairs for *_, pairs in found))]
        for block in found:
            blocks += [turn, *block]
    vectors = (torch.from_numpy(x.astype(np.int32)).to(device) for x in (positions, documents))
    return Ring(*vectors, blocks)


def _visible(
    positions: IntArray, documents: IntArray, rank: int, source: int, causal: bool
) -> list[tuple[int, int, int, int, int]]:
    """Per document on both ranks: queries and keys that can see each other, and their visible pairs."""
    mine, theirs = _runs(documents[rank]), _runs(documents[source])
    found = []
    for document, (q0, q1) in mine.items():
        if document < 0 or document not in theirs:
            continue
        k0, k1 = theirs[document]
        pairs = (q1 - q0) * (k1 - k0)
        if causal:
            q, k = positions[rank, q0:q1], positions[source, k0:k1]
            q0 += int(np.searchsorted(q, k[0]))
            k1 = k0 + int(np.searchsorted(k, q[-1], side="right"))
            pairs = int(np.searchsorted(k, q, side="right").sum())
        if pairs:
            found.append((q0, q1, k0, k1, pairs))
    return found


def _runs(documents: IntArray) -> dict[int, tuple[int, int]]:
    """Where each document's tokens lie, which are contiguous."""
    edges = np.flatnonzero(np.diff(documents, prepend=-2, append=-2))
    return {int(documents[a]): (int(a), int(b)) for a, b in zip(edges[:-1], edges[1:], strict=True)}


@functools.lru_cache(maxsize=64)
def whole_sequence(length: int, rank: int, ring: int, causal: bool, device: torch.device) -> Ring:
    """The turns when every rank holds its two zigzag chunks of one sequence of `length`."""
    with unset_fake_temporarily():  # a dry run's fake tensors have no values
        positions = np.stack([zigzag_positions(length, r, ring).numpy().astype(np.int64) for r in range(ring)])
        return ring_of(positions, np.zeros_like(positions), rank, causal, device)


@dataclass(frozen=True, slots=True)
class Packed:
    """A micro-batch of documents on one rank of a group. `held`: position of each local token, on the device.

    `document`: which document each local token is of, -1 for padding. `length`: positions that the model is shown, at
    least 2. `cuts`: tokens of each document, padding last, on a rank that sees them all. Groups are None when single.
    """

    held: torch.Tensor
    document: IntArray
    length: int
    cuts: list[int]
    all_positions: IntArray
    all_documents: IntArray
    ring_rank: int
    ulysses: dist.ProcessGroup | None
    ring: dist.ProcessGroup | None
    made: dict[bool, Ring] = field(default_factory=dict)

    def turns(self, causal: bool) -> Ring:
        """What this rank computes, made once for all layers."""
        if causal not in self.made:
            where = self.held.device
            self.made[causal] = ring_of(self.all_positions, self.all_documents, self.ring_rank, causal, where)
        return self.made[causal]


def pack(
    lengths: list[int], degrees: tuple[int, int], at: int, groups: Groups, tp: int, device: torch.device
) -> Packed:
    """Documents of `lengths` tokens on rank `at` of a group of `degrees` = (ulysses, ring) ranks, Ulysses inner.

    `tp`: into how many parts sequence parallelism cuts a rank's tokens. No documents: padding alone.
    """
    ulysses, ring = degrees
    positions, documents = split_documents(lengths, ring, ulysses * tp)
    ring_rank, part = divmod(at, ulysses)
    size = positions.shape[1] // ulysses
    mine = slice(part * size, (part + 1) * size)
    padding = positions.size - sum(lengths)
    return Packed(
        held=torch.from_numpy(positions[ring_rank, mine].copy()).to(device), document=documents[ring_rank, mine],
        length=max([2, *lengths]), cuts=[*lengths, *([padding] if padding else [])], all_positions=positions,
        all_documents=documents, ring_rank=ring_rank, ulysses=groups[0], ring=groups[1],
    )  # fmt: skip
