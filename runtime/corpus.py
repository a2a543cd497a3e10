"""A memory-mapped corpus of documents, and its global batches in an order that the seed fixes.

Formats: a .npy file of tokens (1-D integers) or a raw file of little-endian uint16, with the lengths of its documents
in a .npy of their own; or Megatron-LM's indexed pair NAME.bin and NAME.idx (`MMIDIDX`, version 1), a document a
sequence. Document n of the run is a pure function of the seed and n, so a run resumes from a number of documents.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from planner.runtime.errors import TrainingError
from planner.runtime.packing import IntArray

_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # of Megatron-LM's indexed datasets


@dataclass(frozen=True, slots=True)
class Corpus:
    """Tokens of all documents, mapped, and where each document begins and how long it is, in tokens."""

    path: Path
    tokens: Any
    starts: IntArray
    lengths: IntArray

    def document(self, index: int, longest: int) -> IntArray:
        """The first `longest` tokens of a document."""
        start = int(self.starts[index])
        return np.asarray(self.tokens[start : start + min(int(self.lengths[index]), longest)]).astype(np.int64)


def open_corpus(path: Path, lengths: Path | None) -> Corpus:
    """The corpus at `path`. TrainingError in one line if it cannot be read or its lengths do not add up."""
    try:
        if lengths is None and path.suffix == ".bin" and path.with_suffix(".idx").is_file():
            return _checked(_indexed(path))
        if lengths is None:
            raise TrainingError(f"{path}: where its documents end is not known: pass --documents lengths.npy")
        mapped = path.suffix == ".npy"
        tokens = np.load(path, mmap_mode="r", allow_pickle=False) if mapped else np.memmap(path, "<u2", "r")
        sizes = np.load(lengths, allow_pickle=False)
    except (OSError, ValueError, struct.error) as error:
        if isinstance(error, TrainingError):
            raise
        raise TrainingError(f"{path}: cannot read the corpus: {error}") from None
    for name, array in ((path, tokens), (lengths, sizes)):
        if getattr(array, "ndim", 0) != 1 or array.dtype.kind not in "iu":
            raise TrainingError(f"{name}: holds {getattr(array, 'dtype', 'an archive')}, expected 1-D integers")
    sizes = sizes.astype(np.int64)
    if int(sizes.sum()) != len(tokens):
        raise TrainingError(f"{lengths}: the documents have {int(sizes.sum()):,} tokens, {path} has {len(tokens):,}")
    return _checked(Corpus(path, tokens, np.cumsum(sizes) - sizes, sizes))


def _checked(corpus: Corpus) -> Corpus:
    if not len(corpus.lengths):
        raise TrainingError(f"{corpus.path}: no documents")
    if int(corpus.lengths.min()) < 1:
        at = int(corpus.lengths.argmin())
        raise TrainingError(f"{corpus.path}: document {at} has {int(corpus.lengths[at])} tokens, each needs at least 1")
    return corpus


def _indexed(path: Path) -> Corpus:
    """Header, then int32 lengths and int64 byte offsets of the sequences."""
    data = path.with_suffix(".idx").read_bytes()
    magic, version, code, count, _ = struct.unpack_from("<9sQBQQ", data)
    if magic != _MAGIC or version != 1 or code not in _DTYPES:
        raise TrainingError(f"{path.with_suffix('.idx')}: not an index of integers in Megatron-LM's format, version 1")
    first = struct.calcsize("<9sQBQQ")
    sizes = np.frombuffer(data, "<i4", count, first).astype(np.int64)
    at = np.frombuffer(data, "<i8", count, first + 4 * count)
    tokens = np.memmap(path, _DTYPES[code], "r")
    starts = at // tokens.dtype.itemsize
    if count and int((starts + sizes).max()) > len(tokens):
        raise TrainingError(f"{path}: its index goes beyond its {len(tokens):,} tokens")
    return Corpus(path, tokens, starts, sizes)


@dataclass(slots=True)
class DocumentBatches:
    """Global batches of about `tokens_per_step` tokens: the same number of documents each, cut to `longest`."""

    corpus: Corpus
    longest: int
    tokens_per_step: int
    seed: int
    vocab_size: int = 0
    num_documents: int = field(init=False)  # of a batch
    _orders: dict[int, IntArray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        mean = float(np.minimum(self.corpus.lengths, self.longest).mean())
        self.num_documents = max(1, round(self.tokens_per_step / mean))

    def documents(self, first: int, count: int) -> IntArray:
        """Which documents are number `first`, `first` + 1, ... of the run; every epoch is another permutation."""
        size = len(self.corpus.lengths)
        epochs, places = np.divmod(np.arange(first, first + count), size)
        for epoch in set(epochs.tolist()) - set(self._orders):
            self._orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(size)
        for old in [e for e in self._orders if e < int(epochs[0])]:
            del self._orders[old]
        return np.array([self._orders[int(e)][p] for e, p in zip(epochs, places, strict=True)], np.int64)

    def batch(self, step: int) -> IntArray:
        """The documents of a step."""
        return self.documents(step * self.num_documents, self.num_documents)

    def lengths_of(self, documents: IntArray) -> IntArray:
        """Their tokens, as cut."""
        return np.minimum(self.corpus.lengths[documents], self.longest)

    def read(self, document: int) -> IntArray:
        """Its tokens, as cut. TrainingError for one that is not in the vocabulary."""
        tokens = self.corpus.document(document, self.longest)
        if self.vocab_size and (tokens.min() < 0 or tokens.max() >= self.vocab_size):
            worst = tokens.max() if tokens.min() >= 0 else tokens.min()
            raise TrainingError(f"document {document} holds token {worst}, the vocabulary has {self.vocab_size}")
        return tokens
