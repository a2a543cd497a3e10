"""One progress line on stderr while something takes long, on a TTY only."""

from __future__ import annotations

import sys
import time

from planner.search import Progress

_EVERY_S = 0.1


class ProgressLine:
    """`searching 18,204/41,216  best 14.9 s  bound 14.6 s`, rewritten in place and gone at the end."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled and sys.stderr.isatty()
        self._last_s = 0.0

    def __call__(self, progress: Progress) -> None:
        """Show the state of a search, at most ten times a second."""
        now_s = time.monotonic()
        if not self._enabled or now_s - self._last_s < _EVERY_S:
            return
        self._last_s = now_s
        best = f"{progress.best_s:.4g} s" if progress.best_s is not None else "none yet"
        text = f"searching {progress.done:,}/{progress.total:,}  best {best}  bound {progress.bound_s:.4g} s"
        sys.stderr.write(f"\r\x1b[K{text}  (Ctrl-C keeps the best)")
        sys.stderr.flush()

    def clear(self) -> None:
        """Take the line away."""
        if self._enabled and self._last_s:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
