"""The one collective that kernels need: an all-gather in two halves, so that work fits between them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

_functional: Any = torch.ops._c10d_functional


def start_gather(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """`x` of every rank, on its way: only `finish` may read it."""
    gathered: torch.Tensor = _functional.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name)
    return gathered


def finish(gathered: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The result (ranks, ...) of `start_gather`, once it is there."""
    ready: torch.Tensor = _functional.wait_tensor(gathered)
    return ready.unflatten(0, (group.size(), -1))
