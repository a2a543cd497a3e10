"""Published or measured runs: a CSV of the schema in reports/SCHEMA.md as records. Nothing is guessed here."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

REQUIRED = (
    "id", "source", "arch", "n_layers", "hidden", "ffn_hidden", "n_heads", "vocab", "seq_len", "gpu", "gpus_per_node",
    "n_gpus", "dtype", "tp", "pp", "dp", "micro_batch", "global_batch", "recompute", "outcome",
)  # fmt: skip
_NUMBER = re.compile(r"~?(\d+(?:\.\d+)?(?:e\d+)?)(k?)(?: \(.*\))?", re.IGNORECASE)


class Skip(Exception):
    """Why a row cannot be predicted, in words that many rows share."""


@dataclass(frozen=True, slots=True)
class Row:
    """One run; `cells` are the CSV's strings by column, blank and missing ones left out."""

    cells: Mapping[str, str]

    @property
    def id(self) -> str:
        """Name of the row, unique in its file."""
        return self.cells["id"]

    @property
    def source(self) -> str:
        """Publication or measurement campaign."""
        return self.cells["source"]

    def text(self, column: str, default: str = "") -> str:
        """The cell, or `default` where it is blank."""
        return self.cells.get(column, default)

    def number(self, column: str, default: float | None = None) -> float:
        """The number that the cell starts with (`~50k (not stated)` is 50,000); Skip if it is none."""
        if column not in self.cells:
            if default is None:
                raise Skip(f"{column} not stated")
            return default
        match = _NUMBER.fullmatch(self.cells[column].strip())
        if match is None:
            raise Skip(f"{column} is not one number")
        return float(match[1]) * (1000 if match[2] else 1)

    def whole(self, column: str, default: int | None = None) -> int:
        """The whole number in the cell; Skip if it is none."""
        value = self.number(column, default)
        if value != int(value):
            raise Skip(f"{column} is not a whole number")
        return int(value)

    @property
    def failed(self) -> bool:
        """Whether the run ended out of memory (or crashed, where the source does not tell them apart)."""
        return self.text("outcome") == "oom"

    @property
    def step_s(self) -> float:
        """Measured seconds of a step, from the tokens per second where only those are stated; Skip if neither."""
        if "step_time_s" in self.cells:
            return self.number("step_time_s")
        if "tokens_per_s_per_gpu" not in self.cells:
            raise Skip("no step time")
        tokens = self.number("global_batch") * self.number("seq_len")
        return tokens / (self.number("tokens_per_s_per_gpu") * self.number("n_gpus"))


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file; ValueError of one line for a missing file, column or duplicate id."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            names = list(reader.fieldnames or ())
            missing = [name for name in REQUIRED if name not in names]
            if missing:
                raise ValueError(f"{path}: missing column {', '.join(missing)}; reports/SCHEMA.md lists the columns")
            rows = [_row(path, reader.line_num, cells, len(names)) for cells in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise ValueError(f"{path}: id {row.id!r} occurs twice")
        seen.add(row.id)
    return rows


def _row(path: Path, line: int, cells: Mapping[str | None, str | None], width: int) -> Row:
    if None in cells or any(value is None for value in cells.values()):
        raise ValueError(f"{path} line {line}: expected {width} fields")
    kept = {str(name): value.strip() for name, value in cells.items() if value and value.strip()}
    for column in ("id", "source", "outcome"):
        if column not in kept:
            raise ValueError(f"{path} line {line}: column {column} is blank")
    if kept["outcome"] not in ("ok", "oom"):
        raise ValueError(f"{path} line {line}: outcome is {kept['outcome']!r}, not ok or oom")
    return Row(kept)
