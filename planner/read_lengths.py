"""Lengths from a file or a name: text, .npy, a CSV histogram, or a published distribution. One-line errors."""

from __future__ import annotations

import csv
import difflib
import io
from pathlib import Path

import numpy as np

from planner.distributions import NAMES, named
from planner.errors import UserError
from planner.lengths import IntArray, Lengths, Segment, from_samples, from_segments

MAX_BYTES = 2**31
CSV_COLUMNS = "low,high,count (lengths in (low, high], any positive weight) and, optionally, mean"


def read_lengths(what: str) -> Lengths:
    """The lengths that `what` names; UserError of one line if it cannot be used.

    A file's suffix decides: .npy one integer per sequence; .csv a histogram; anything else one length per line.
    """
    if what in NAMES:
        return named(what)
    path = Path(what)
    if not path.is_file():
        close = difflib.get_close_matches(what, NAMES, n=2)
        hint = f"; close: {', '.join(close)}" if close else f"; distributions by name: {', '.join(NAMES)}"
        raise UserError(f"--seq-dist {what}: no such file{hint}")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes: give a histogram (.csv: {CSV_COLUMNS})")
        if path.suffix == ".csv":
            return _csv(path)
        lengths = _listed(path)
        return from_samples(lengths, path.stem, f"{path.name}: {len(lengths):,} lengths")
    except OSError as error:
        raise UserError(f"--seq-dist {path}: cannot read: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"--seq-dist {path}: {error}") from None


def read_batch(path: Path) -> IntArray:
    """Lengths of one batch, in order: .npy, or text with one a line. UserError of one line if it cannot be used."""
    try:
        return _listed(path)
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _listed(path: Path) -> IntArray:
    return _npy(path) if path.suffix == ".npy" else _text(path)


def _npy(path: Path) -> IntArray:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError):
        raise ValueError("not an array of plain numbers in NumPy's .npy format") from None
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu":
        shape = getattr(array, "shape", "several")
        raise ValueError(f"needs one dimension of integers, has {getattr(array, 'dtype', 'an archive')} {shape}")
    return array.astype(np.int64)


def _text(path: Path) -> IntArray:
    values = []
    with path.open(encoding="utf-8", errors="strict") as file:
        for number, line in enumerate(file, start=1):
            word = line.strip()
            if not word or word.startswith("#"):
                continue
            if not word.isdecimal() or not 1 <= len(word) <= 12:
                raise ValueError(f"line {number}: {word[:40]!r} is not a whole number of tokens")
            values.append(int(word))
    return np.array(values, np.int64)


def _csv(path: Path) -> Lengths:
    rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))
    header = [name.strip() for name in rows[0]] if rows else []
    if header not in (["low", "high", "count"], ["low", "high", "count", "mean"]):
        raise ValueError(f"first line must be {CSV_COLUMNS}; it is {','.join(header)[:60]!r}")
    segments = []
    for number, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        try:
            low, high, count = int(row[0]), int(row[1]), float(row[2])
            mean = float(row[3]) if len(header) == 4 and row[3].strip() else None
        except (ValueError, IndexError):
            raise ValueError(f"line {number}: {','.join(row)[:60]!r} is not {','.join(header)}") from None
        if not 0 <= count < float("inf") or low < 0 or high <= low:
            raise ValueError(f"line {number}: needs 0 <= low < high and a count that is finite and not negative")
        segments.append(Segment(low=low, high=high, share=count, mean_tokens=mean))
    return from_segments(tuple(segments), path.stem, f"{path.name}: histogram of {len(segments)} classes")
