"""GPT with a trillion parameters (Narayanan et al. 2021, table 1): 128 layers, 25,600 wide, 160 heads.

The same block as gpt3_175b.py, written with torch's own pieces; vocabulary padded to 51,200.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

SEQ_LEN = 2048
GLOBAL_BATCH_SIZE = 3072
VOCAB_SIZE = 51_200
LAYERS, HIDDEN, HEADS = 128, 25_600, 160


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(hidden)
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.dense = nn.Linear(hidden, hidden)
        self.mlp_norm = nn.LayerNorm(hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.query_key_value(x).unflatten(-1, (self.heads, 3, -1)).transpose(1, 2)
        q, k, v = heads.unbind(dim=3)
        return self.dense(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attend(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Gpt(nn.Module):
    def __init__(self, layers: int = LAYERS, hidden: int = HIDDEN, heads: int = HEADS) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB_SIZE, hidden)
        self.positions = nn.Parameter(torch.empty(SEQ_LEN, hidden))
        self.layers = nn.Sequential(*(Block(hidden, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(hidden)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        return F.linear(self.norm(self.layers(x)), self.tokens.weight)


def build_model() -> nn.Module:
    return Gpt()
