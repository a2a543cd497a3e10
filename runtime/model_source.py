"""The user's model with its values: model.py, model.py:function, or a Hugging Face config.json."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from planner.runtime.errors import RuntimePlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a run needs from the user's file. `dtype`: of forward and backward; `dataset`: model.py's own, if any."""

    model: nn.Module
    dtype: torch.dtype
    sha256: str
    dataset: Callable[[], Sequence[Any]] | None


def load_source(source: str, seed: int) -> Source:
    """Build the model on the CPU under `seed`, the same on every rank. RuntimePlanError if it cannot be built."""
    from planner.profiler.errors import TraceError

    try:
        return _load(source, seed)
    except TraceError as error:
        raise RuntimePlanError(str(error)) from None


def _load(source: str, seed: int) -> Source:
    path = Path(source.rpartition(":")[0] if ".py:" in source else source)
    if not path.is_file():
        raise RuntimePlanError(f"{path}: no such file; give model.py, model.py:function or config.json")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    torch.manual_seed(seed)
    if path.suffix == ".json":
        return Source(model=_from_config(path), dtype=torch.bfloat16, sha256=digest, dataset=None)
    from planner.profiler.load import _find_builder, _import_file

    module = _import_file(path)
    function = source.rpartition(":")[2] if ".py:" in source else ""
    torch.manual_seed(seed)
    model = _find_builder(module, path, function)()
    if any(p.is_meta for p in model.parameters()):
        raise RuntimePlanError(f"{path.name}: the model has no values: build it in a function build_model()")
    dtype = getattr(module, "DTYPE", torch.bfloat16)
    return Source(model=model, dtype=dtype, sha256=digest, dataset=getattr(module, "train_dataset", None))


def _from_config(path: Path) -> nn.Module:
    from planner.profiler.hf import model_class

    cls, config = model_class(path)
    try:
        model: nn.Module = cls._from_config(config, attn_implementation="sdpa")
    except ValueError:  # it knows no such attention
        model = cls._from_config(config)
    return model
