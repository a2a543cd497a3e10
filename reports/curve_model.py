"""The small Llama of the loss curves, in float32, and data that it can learn: sequences that count in some stride."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

DTYPE = torch.float32
SEQ_LEN, GLOBAL_BATCH_SIZE, LAYERS = 32, 8, 4
_VOCAB, _STRIDES = 128, 5


def build_model() -> nn.Module:
    """Llama with four layers and fewer KV heads than heads."""
    path = Path(__file__).resolve().parents[1] / "examples/llama3.py"
    spec = importlib.util.spec_from_file_location("example", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module)["VOCAB_SIZE"] = _VOCAB
    model: nn.Module = module.Llama(layers=LAYERS, hidden=64, heads=4, ffn=160, kv_heads=2)
    return model


class Counting(Sequence[Any]):
    """Token i + 1 is token i plus the sequence's stride."""

    def __len__(self) -> int:
        return 8192

    def __getitem__(self, index: Any) -> Any:
        return (np.arange(SEQ_LEN + 1) * (1 + index % _STRIDES) + index) % _VOCAB


def train_dataset() -> Sequence[Any]:
    """The data of `planner.runtime train`."""
    return Counting()
