"""A model nobody prepared for the planner: no block lists, einsum, plain functions, an odd residual."""

import torch
import torch.nn as nn

DIM, HEADS, WORDS = 64, 4, 128


def norm(x, scale):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * scale


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(DIM))
        self.wqkv = nn.Parameter(torch.randn(DIM, 3, HEADS, DIM // HEADS))
        self.wo = nn.Parameter(torch.randn(HEADS, DIM // HEADS, DIM))

    def forward(self, x):
        q, k, v = torch.einsum("bsd,dthe->tbhse", norm(x, self.scale), self.wqkv).unbind(0)
        scores = torch.einsum("bhse,bhte->bhst", q, k) / 4.0
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        scores = scores.masked_fill(future, float("-inf")).softmax(-1)
        return x + torch.einsum("bhst,bhte,hed->bsd", scores, v, self.wo)


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(DIM))
        self.inner = nn.Linear(DIM, 6 * DIM, bias=False)
        self.outer = nn.Linear(3 * DIM, DIM)

    def forward(self, x):
        a, b = self.inner(norm(x, self.scale)).chunk(2, dim=-1)
        return x + self.outer(torch.tanh(a) * b)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, DIM)
        self.first = Mixer()
        self.then = Gate()
        self.again = Mixer()
        self.more = Gate()
        self.head = nn.Linear(DIM, WORDS)

    def forward(self, tokens):
        x = self.words(tokens)
        x = self.then(self.first(x))
        return self.head(self.more(self.again(x)) + x)


model = Odd()
