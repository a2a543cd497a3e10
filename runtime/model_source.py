"""The user's model with its values: model.py, model.py:function, or a Hugging Face config.json."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from planner.runtime import deferred
from planner.runtime.errors import RuntimePlanError

INIT = ("whole", "deferred")
_LOW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a run needs from the user's file.

    `model`: in the dtype of its masters, float32 where `precision`, that of forward and backward, is a lower one;
    `tape`: what has the values of its parameters when initialisation is deferred; `dataset`: model.py's own, if any.
    """

    model: nn.Module
    precision: torch.dtype | None
    tape: deferred.Tape | None
    sha256: str
    dataset: Callable[[], Sequence[Any]] | None


def load_source(source: str, seed: int, init: str = "whole") -> Source:
    """Build the model on the CPU under `seed`, the same on every rank. RuntimePlanError if it cannot be built.

    `init`: "whole" as the model's own code does, or "deferred" (deferred.py), parameter by parameter when it is kept.
    """
    from planner.profiler.errors import TraceError

    try:
        return _load(source, seed, init)
    except TraceError as error:
        raise RuntimePlanError(str(error)) from None


def check_room(num_params: float, init: str) -> None:
    """RuntimePlanError when the ranks of this host cannot each hold the whole model in float32 while it is built."""
    held = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    need = 4.0 * num_params * ranks
    if init == "whole" and need > held:
        raise RuntimePlanError(
            f"{ranks} ranks that each build the whole model need {need / 2**30:.0f} GiB of host memory, this host has "
            f"{held / 2**30:.0f}: pass --init deferred"
        )


def _load(source: str, seed: int, init: str) -> Source:
    path = Path(source.rpartition(":")[0] if ".py:" in source else source)
    if not path.is_file():
        raise RuntimePlanError(f"{path}: no such file; give model.py, model.py:function or config.json")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    torch.manual_seed(seed)
    if path.suffix == ".json":
        model, tape = _build(lambda: _from_config(path), torch.bfloat16, seed, init)
        return Source(model=model, precision=torch.bfloat16, tape=tape, sha256=digest, dataset=None)
    from planner.profiler.load import _find_builder, _import_file

    module = _import_file(path)
    function = source.rpartition(":")[2] if ".py:" in source else ""
    torch.manual_seed(seed)
    dtype = getattr(module, "DTYPE", torch.bfloat16)
    model, tape = _build(_find_builder(module, path, function), dtype, seed, init)
    if any(p.is_meta for p in model.parameters()):
        raise RuntimePlanError(f"{path.name}: the model has no values: build it in a function build_model()")
    precision, dataset = dtype if dtype in _LOW else None, getattr(module, "train_dataset", None)
    return Source(model=model, precision=precision, tape=tape, sha256=digest, dataset=dataset)


def _build(
    make: Callable[[], nn.Module], dtype: torch.dtype, seed: int, init: str
) -> tuple[nn.Module, deferred.Tape | None]:
    masters = torch.float32 if dtype in _LOW else dtype
    if init == "whole":
        return make().to(masters).train(), None
    model, tape = deferred.build(make, masters, seed)
    return model.train(), tape


def _from_config(path: Path) -> nn.Module:
    from planner.profiler.hf import model_class

    cls, config = model_class(path)
    try:
        model: nn.Module = cls._from_config(config, attn_implementation="sdpa")
    except ValueError:  # it knows no such attention
        model = cls._from_config(config)
    return model
