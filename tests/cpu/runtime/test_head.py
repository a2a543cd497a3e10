"""When the chunked loss takes the place of a model's head, and when the plain one stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from planner.runtime.head import head_of, watching


class Model(nn.Module):
    def __init__(self, after: Callable[[torch.Tensor], torch.Tensor], bias: bool = False, times: int = 1) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 8, bias=bias)
        self.after, self.times = after, times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        for _ in range(self.times):
            x = self.head(x)
        return self.after(x)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Model(lambda x: x), ""),
        (Model(lambda x: x.float()), ""),
        (Model(lambda x: 30 * torch.tanh(x / 30)), "does not read what a linear module puts out"),
        (Model(lambda x: x.mul_(2)), "does not read what a linear module puts out"),
        (Model(lambda x: x, bias=True), "has a bias"),
        (Model(lambda x: x, times=2), "more than once"),
        (Model(lambda x: x.flatten(0, 1)), "does not read what a linear module puts out"),
    ],
)
def test_only_a_head_whose_logits_go_into_the_loss_is_taken(model: Model, reason: str) -> None:
    with torch.no_grad(), torch.device("meta"), watching(model.to("meta")) as products:
        logits = model(torch.empty(2, 3, 8))
    found, why = head_of(products, logits)
    assert found is (None if reason else model.head)
    assert reason in why and bool(reason) == bool(why)
