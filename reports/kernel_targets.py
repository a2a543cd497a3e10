"""What the kernels are to reach, beside what kernel_bench.py measured: met, missed or not measured. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Report = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A figure of a report (None if it has not got it) and what it must be: at least, or with `most` at most."""

    what: str
    wanted: float
    unit: str  # "%" or "x"
    found: Callable[[Report], float | None]
    most: bool = False


def _pass(report: Report, kernel: str, part: str) -> Mapping[str, Any]:
    row = next((row for row in report["kernels"] if row["name"] == kernel), None)
    return row["passes"].get(part, {}) if row else {}


def _roof(kernel: str, part: str) -> Callable[[Report], float | None]:
    return lambda report: _pass(report, kernel, part).get("roof_frac")


def _against(kernel: str, parts: tuple[str, ...], peer: str | None = None) -> Callable[[Report], float | None]:
    """Seconds of a peer, None the fastest, over ours, summed over passes."""

    def found(report: Report) -> float | None:
        seconds = [_pass(report, kernel, part).get("seconds", {}) for part in parts]
        names = set.intersection(*map(set, seconds)) - {"ours"}
        others = [sum(s[name] for s in seconds) for name in names if peer in (None, name)]
        return min(others) / sum(s["ours"] for s in seconds) if others and all("ours" in s for s in seconds) else None

    return found


def _ring(length: int, name: str) -> Callable[[Report], float | None]:
    return lambda report: next((row[name] for row in report["ring"] if row["length"] == length), None)


def _memory(report: Report) -> float | None:
    return report["memory"]["extra_chunks"] if report["memory"] else None


_BOTH = ("forward", "backward")


def _roofs(kernel: str, wanted: float, *parts: str) -> list[Target]:
    return [Target(what=f"{kernel} {p}, of the roof", wanted=wanted, unit="%", found=_roof(kernel, p)) for p in parts]


def _peers(kernel: str, wanted: float, peer: str | None, *parts: tuple[str, ...]) -> list[Target]:
    named = f"{peer or 'the best peer'} over ours"
    return [
        Target(what=f"{kernel} {' + '.join(p)}, {named}", wanted=wanted, unit="x", found=_against(kernel, p, peer))
        for p in parts
    ]


TARGETS = (
    *_roofs("rms_norm", 0.90, "forward"), *_roofs("rms_norm", 0.80, "backward"),
    *(t for name in ("add_rms_norm", "swiglu", "rope") for t in (
        *_roofs(name, 0.88, *_BOTH), *_peers(name, 1.0, None, ("forward",), ("backward",)))),
    *_roofs("cross_entropy", 0.85, *_BOTH), *_peers("cross_entropy", 3.0, "loss_parallel", _BOTH),
    *_roofs("linear_cross_entropy", 0.85, "forward+backward"),
    Target(what="linear_cross_entropy, extra memory in chunks of logits", wanted=2, unit="x", found=_memory, most=True),
    Target(what="ring step of 8192, over the bare kernel", wanted=0.06, unit="%", found=_ring(8192, "overhead_frac"),
           most=True),
    Target(what="ring step of 2048, over the bare kernel", wanted=0.15, unit="%", found=_ring(2048, "overhead_frac"),
           most=True),
    Target(what="ring step of 8192, torch's merge over what ours adds", wanted=3.0, unit="x",
           found=_ring(8192, "merge_ratio")),
    *_peers("gla", 1.5, "fla", ("forward",), _BOTH),
    *(t for name in ("quantize_int8", "quantize_int4") for t in _roofs(name, 0.85, "forward")),
    *(t for name in ("ulysses_pack", "moe_permute") for t in _roofs(name, 0.85, *_BOTH)),
    *_peers("lstm", 1.0, "flashrnn", _BOTH), *_peers("slstm", 1.0, "flashrnn", _BOTH),
)  # fmt: skip


def judged(report: Report) -> list[dict[str, Any]]:
    """Every target with what was found: `met` is None where it was not measured."""
    rows = []
    for target in TARGETS:
        found = target.found(report)
        met = None if found is None else found <= target.wanted if target.most else found >= target.wanted
        rows.append({"what": target.what, "wanted": _shown(target, target.wanted), "met": met,
                     "found": None if found is None else _shown(target, found)})  # fmt: skip
    return rows


def _shown(target: Target, value: float) -> str:
    sign = ("<= " if target.most else ">= ") if value is target.wanted else ""
    return f"{sign}{value:.0%}" if target.unit == "%" else f"{sign}{value:.2f}"


def table(report: Report) -> str:
    """The targets as a Markdown table."""
    words = {True: "met", False: "missed", None: "not measured"}
    lines = ["| target | wanted | found | |", "|---" * 4 + "|"]
    lines += [f"| {r['what']} | {r['wanted']} | {r['found'] or '-'} | {words[r['met']]} |" for r in judged(report)]
    return "\n".join(lines) + "\n"
