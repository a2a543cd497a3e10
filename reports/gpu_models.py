"""Models of the check on one GPU: decoders of 0.35 to 2 billion parameters in bfloat16."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from planner.reports.loop_model import Model

DTYPE = torch.bfloat16
GLOBAL_BATCH_SIZE = 8
VOCAB = 32_000


def gpt_350m() -> nn.Module:
    """24 layers of 1,024."""
    return Model(layers=24, hidden=1024, heads=16, vocab=VOCAB)


def gpt_1b() -> nn.Module:
    """24 layers of 2,048."""
    return Model(layers=24, hidden=2048, heads=16, vocab=VOCAB)


def gpt_2b() -> nn.Module:
    """24 layers of 2,560."""
    return Model(layers=24, hidden=2560, heads=20, vocab=VOCAB)


def train_dataset() -> Sequence[torch.Tensor]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(0, VOCAB, (64, 4097), generator=generator))
