"""A model that calls grouped_mm and ops of planner.kernels: torch counts 0 FLOPs for the first."""

import torch
import torch.nn.functional as F
from torch import nn

from planner.kernels.gla import gated_linear_attention
from planner.kernels.norm import rms_norm

DTYPE = torch.bfloat16
SEQ_LEN, HIDDEN, HEADS, EXPERTS, WIDTH, VOCAB = 128, 64, 4, 4, 96, 96


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.Parameter(torch.ones(HIDDEN))
        self.qkvg = nn.Linear(HIDDEN, 4 * HIDDEN, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH))
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN))

    def forward(self, x):
        q, k, v, g = self.qkvg(rms_norm(x, self.norm)).unflatten(-1, (4, HEADS, -1)).unbind(2)
        x = x + gated_linear_attention(q, k, v, F.logsigmoid(g))[0].flatten(2)
        rows = x.flatten(0, 1)
        ends = torch.arange(1, EXPERTS + 1, device=x.device, dtype=torch.int32) * (len(rows) // EXPERTS)
        rows = F.grouped_mm(F.silu(F.grouped_mm(rows, self.up, offs=ends)), self.down, offs=ends)
        return x + rows.view(x.shape)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build_model():
    return Model()
