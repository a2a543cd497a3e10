"""The shape of DeepSeek-V3 (DeepSeek-AI 2024, arXiv 2412.19437, section 4.2), without multi-token prediction.

61 layers, the first three dense; latent attention; one shared and 256 routed experts, eight per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

SEQ_LEN = 4096
GLOBAL_BATCH_SIZE = 15_360
VOCAB_SIZE = 129_280
HIDDEN, HEADS = 7168, 128
Q_RANK, KV_RANK, NOPE_DIM, ROPE_DIM, V_DIM = 1536, 512, 128, 64, 128
DENSE_FFN, EXPERT_FFN = 18_432, 2048
LAYERS, DENSE_LAYERS, EXPERTS, TOP_K = 61, 3, 256, 8


def rotary_table(length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of (length, ROPE_DIM)."""
    frequencies = 10_000.0 ** (-torch.arange(0, ROPE_DIM, 2, device=device) / ROPE_DIM)
    angles = (torch.arange(length, device=device)[:, None] * frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


class LatentAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_down = nn.Linear(HIDDEN, Q_RANK, bias=False)
        self.q_norm = nn.RMSNorm(Q_RANK)
        self.q_up = nn.Linear(Q_RANK, HEADS * (NOPE_DIM + ROPE_DIM), bias=False)
        self.kv_down = nn.Linear(HIDDEN, KV_RANK + ROPE_DIM, bias=False)
        self.kv_norm = nn.RMSNorm(KV_RANK)
        self.kv_up = nn.Linear(KV_RANK, HEADS * (NOPE_DIM + V_DIM), bias=False)
        self.out = nn.Linear(HEADS * V_DIM, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q = self.q_up(self.q_norm(self.q_down(x))).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        q_nope, q_rope = q.split([NOPE_DIM, ROPE_DIM], dim=-1)
        latent, k_rope = self.kv_down(x).split([KV_RANK, ROPE_DIM], dim=-1)
        kv = self.kv_up(self.kv_norm(latent)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k_nope, v = kv.split([NOPE_DIM, V_DIM], dim=-1)
        k_rope = rotate(k_rope[:, None], cos, sin).expand(-1, HEADS, -1, -1)
        q = torch.cat([q_nope, rotate(q_rope, cos, sin)], dim=-1)
        k = torch.cat([k_nope, k_rope], dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, ffn: int) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, ffn, bias=False)
        self.up = nn.Linear(HIDDEN, ffn, bias=False)
        self.down = nn.Linear(ffn, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MixtureOfExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.top_k = TOP_K
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(FeedForward(EXPERT_FFN) for _ in range(EXPERTS))
        self.shared = FeedForward(EXPERT_FFN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, 1)
        weights, chosen = self.router(rows).sigmoid().topk(self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, slot = (chosen == number).nonzero(as_tuple=True)
            out.index_add_(0, row, expert(rows[row]) * weights[row, slot, None])
        return out.view_as(x) + self.shared(x)


class Block(nn.Module):
    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(HIDDEN)
        self.attention = LatentAttention()
        self.ffn_norm = nn.RMSNorm(HIDDEN)
        self.ffn: nn.Module = FeedForward(DENSE_FFN) if dense else MixtureOfExperts()

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.ffn(self.ffn_norm(x))


class DeepSeekV3(nn.Module):
    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, HIDDEN)
        self.layers = nn.ModuleList(Block(dense=i < DENSE_LAYERS) for i in range(layers))
        self.norm = nn.RMSNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB_SIZE, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        cos, sin = (t.to(x.dtype) for t in rotary_table(tokens.shape[1], tokens.device))
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))


def build_model() -> nn.Module:
    return DeepSeekV3()
