"""Models of the closed loop: small enough for two CPU cores, different in what bounds them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

DTYPE = torch.float32
GLOBAL_BATCH_SIZE = 8
SEQ_LENS = {"narrow": 128, "wide": 64, "long": 512}
_VOCAB = 1024


class Block(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden) for _ in range(4))
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of a stream (batch, sequence, hidden)."""
        y = self.attention_norm(x)
        q, k, v = (w(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Model(nn.Module):
    """A decoder."""

    def __init__(self, layers: int, hidden: int, heads: int, vocab: int = _VOCAB) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, vocab, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of (batch, sequence) token ids."""
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def narrow() -> nn.Module:
    """Small GEMMs: communication and overheads weigh."""
    return Model(layers=8, hidden=128, heads=8)


def wide() -> nn.Module:
    """Large GEMMs and gradients, short sequences."""
    return Model(layers=8, hidden=384, heads=8)


def long() -> nn.Module:
    """Attention and activations weigh."""
    return Model(layers=8, hidden=128, heads=8)


def train_dataset() -> Sequence[torch.Tensor]:
    """Random tokens of the longest length."""
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(0, _VOCAB, (64, max(SEQ_LENS.values()) + 1), generator=generator))
