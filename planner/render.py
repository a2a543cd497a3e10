"""Reports on the screen, as Markdown and as JSON: one value, three forms. 112 columns, colour only on a TTY."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WIDTH = 112
GIB = 2**30
FORMATS = ("table", "json", "md")


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A table; columns whose name starts with '<' are text and left-aligned."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a command answers: lines and tables for people, `data` for programs."""

    parts: tuple[str | Grid, ...]
    data: dict[str, Any]


def show(report: Report, form: str, color: bool | None = None) -> str:
    """The report as text in `form`, one of FORMATS."""
    if form == "json":
        return json.dumps(report.data, indent=1, sort_keys=True, allow_nan=False) + "\n"
    if form == "md":
        return "\n".join(part if isinstance(part, str) else _markdown(part) for part in report.parts) + "\n"
    return _screen(report.parts, sys.stdout.isatty() if color is None else color)


def _markdown(grid: Grid) -> str:
    names = [name.lstrip("<") for name in grid.columns]
    marks = [":--" if name.startswith("<") else "--:" for name in grid.columns]
    rows = [names, marks, *([cell.replace("|", "\\|") for cell in row] for row in grid.rows)]
    return "\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _screen(parts: Sequence[str | Grid], color: bool) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    target = io.StringIO()
    console = Console(file=target, width=WIDTH, force_terminal=color, highlight=False, soft_wrap=False)
    for part in parts:
        if isinstance(part, str):
            head, _, rest = part.partition("  ")
            console.print(Text.assemble((head, "bold"), ("  " + rest) if rest else ""))
            continue
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", show_edge=False)
        for name in part.columns:
            left = name.startswith("<")
            table.add_column(name.lstrip("<"), justify="left" if left else "right", no_wrap=not left, overflow="fold")
        for row in part.rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
    return "\n".join(line.rstrip() for line in target.getvalue().splitlines()) + "\n"


def seconds(value: float) -> str:
    """Seconds with four significant digits: 14.82 s, 3.214 ms."""
    for limit, scale, unit in ((1.0, 1, "s"), (1e-3, 1e3, "ms"), (0.0, 1e6, "us")):
        if value >= limit:
            return f"{value * scale:,.4g} {unit}" if value * scale < 1e4 else f"{value * scale:,.0f} {unit}"
    return f"{value:.4g} s"


def gib(value: float) -> str:
    """Bytes as binary GiB, one decimal."""
    return f"{value / GIB:,.1f}"


def percent(value: float, digits: int = 1) -> str:
    """A fraction in per cent."""
    return f"{100 * value:.{digits}f}"


def count(value: float) -> str:
    """A large number in the unit people use: 175.3 B."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= limit:
            return f"{value / limit:.4g} {unit}"
    return f"{value:,.0f}"
