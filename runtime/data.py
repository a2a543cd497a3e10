"""Training data: a memory-mapped file of tokens, or a sequence that model.py provides; the same on every plan.

Sample n of the run is a pure function of the seed and n, so that a run resumes from a number of samples under
any plan: every data rank takes its slice of each global batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from planner.runtime.errors import TrainingError


class TokenFile(Sequence[Any]):
    """Windows of seq_len + 1 tokens of a .npy file (1-D integers) or a raw file of little-endian uint16."""

    def __init__(self, path: Path, seq_len: int) -> None:
        try:
            if path.suffix == ".npy":
                self.tokens = np.load(path, mmap_mode="r", allow_pickle=False)
            else:
                self.tokens = np.memmap(path, dtype="<u2", mode="r")
        except (OSError, ValueError) as error:
            raise TrainingError(f"{path}: cannot read tokens: {error}") from None
        if self.tokens.ndim != 1 or self.tokens.dtype.kind not in "iu":
            raise TrainingError(
                f"{path}: holds {self.tokens.dtype} of shape {self.tokens.shape}, expected 1-D integers"
            )
        self.seq_len = seq_len
        if len(self) < 1:
            raise TrainingError(f"{path}: {len(self.tokens):,} tokens are less than one sequence of {seq_len} + 1")

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len

    def __getitem__(self, index: Any) -> Any:
        first = index * self.seq_len
        return np.asarray(self.tokens[first : first + self.seq_len + 1]).astype(np.int64)


@dataclass(slots=True)
class Batches:
    """Global batches in an order that the seed fixes; every epoch is another permutation."""

    source: Sequence[Any]
    seq_len: int
    global_batch_size: int
    seed: int
    vocab_size: int = 0
    _epoch: int = -1
    _order: Any = None

    def rank_slice(self, samples: int, part: int, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens, labels) of data rank `part` of `parts` for the batch that begins after `samples` samples."""
        size = self.global_batch_size // parts
        rows = [self._sample(samples + part * size + i) for i in range(size)]
        tokens = torch.from_numpy(np.stack(rows))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def _sample(self, number: int) -> Any:
        epoch, at = divmod(number, len(self.source))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.source))
        row = np.asarray(self.source[int(self._order[at])], dtype=np.int64)
        if row.shape != (self.seq_len + 1,):
            raise TrainingError(f"sample {number} has shape {row.shape}, expected ({self.seq_len + 1},) token ids")
        if self.vocab_size and (row.min() < 0 or row.max() >= self.vocab_size):
            raise TrainingError(f"sample {number} holds token {row.max()}, the vocabulary has {self.vocab_size}")
        return row
