"""Where a number comes from. There is no default source, and a sum is as weak as its weakest part."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum


class Source(IntEnum):
    """Evidence behind a number, strongest first."""

    MEASURED = 0
    INTERPOLATED = 1
    DATASHEET = 2
    MODELLED = 3
    ASSUMED = 4


def weakest(sources: Iterable[Source]) -> Source:
    """The evidence of a sum: the weakest of its parts."""
    return max(sources)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """A value in SI base units with the evidence behind it; `note` holds the address and date."""

    value: float
    source: Source
    note: str
