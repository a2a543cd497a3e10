"""Units: SI base units inside (seconds, bytes, FLOPs), conversions once, at the door and on screen."""

from __future__ import annotations

GIB = 1 << 30
GB = 1_000_000_000
US = 1e-6


def gib(num_bytes: float) -> str:
    """Bytes as binary GiB for the screen."""
    return f"{num_bytes / GIB:,.1f} GiB"


def seconds(time_s: float) -> str:
    """Seconds for the screen, with the unit that reads best."""
    if time_s >= 1:
        return f"{time_s:.3f} s"
    if time_s >= 1e-3:
        return f"{time_s * 1e3:.2f} ms"
    return f"{time_s * 1e6:.1f} us"
