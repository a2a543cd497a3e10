"""What the runtime executes today, as one table. Imports no torch, so that the planner can ask it.

`OPTIONS` says option by option why a plan that uses it cannot run ('' = it runs); `COMBINATIONS` what does not
run together although each part does. `tests/cpu/runtime` holds a parity case for every option that runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from planner.costmodel.pipeline import ScheduleKind
from planner.costmodel.strategy import PlanSpec

_NOT_YET = "planner.runtime does not execute it yet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option of a plan: whether a spec uses it, and why it cannot run ('' = it runs)."""

    name: str
    used: Callable[[PlanSpec], bool]
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """Options that do not run together, and why."""

    names: tuple[str, ...]
    used: Callable[[PlanSpec], bool]
    reason: str


ZERO_BUBBLE = (ScheduleKind.ZB_H1, ScheduleKind.ZB_V)

OPTIONS: tuple[Option, ...] = (
    Option(name="dp", used=lambda s: s.dp > 1),
    Option(name="dp_replicate", used=lambda s: s.dp_replicate > 1 and s.zero_stage > 0),
    Option(name="zero1", used=lambda s: s.zero_stage == 1),
    Option(name="zero2", used=lambda s: s.zero_stage == 2),
    Option(name="zero3", used=lambda s: s.zero_stage == 3),
    Option(name="tp", used=lambda s: s.tp > 1),
    Option(name="sp", used=lambda s: s.sequence_parallel),
    Option(name="vocab_parallel", used=lambda s: s.vocab_parallel),
    Option(name="chunked_loss", used=lambda s: s.chunked_loss),
    Option(name="pp", used=lambda s: s.pp > 1),
    Option(name="interleaved", used=lambda s: s.schedule is ScheduleKind.INTERLEAVED),
    Option(name="zb_h1", used=lambda s: s.schedule is ScheduleKind.ZB_H1),
    Option(name="zb_v", used=lambda s: s.schedule is ScheduleKind.ZB_V),
    Option(name="ulysses", used=lambda s: s.ulysses > 1),
    Option(name="ring", used=lambda s: s.ring > 1),
    Option(name="ep", used=lambda s: s.ep > 1),
    Option(name="selective", used=lambda s: any(x.recompute == "selective" for x in s.layers)),
    Option(name="full", used=lambda s: any(x.recompute == "full" for x in s.layers)),
    Option(name="offload_optimizer", used=lambda s: s.offload_optimizer),
    Option(name="offload_activations", used=lambda s: any(x.offload_activations for x in s.layers)),
)

COMBINATIONS: tuple[Combination, ...] = (
    Combination(
        names=("zero2 or zero3", "zero-bubble"),
        used=lambda s: s.schedule in ZERO_BUBBLE and s.zero_stage >= 2,
        reason="FSDP2 reduces and frees at the end of the input-gradient pass, before the weight gradients exist",
    ),
    Combination(
        names=("selective", "offload_activations"),
        used=lambda s: any(x.recompute == "selective" and x.offload_activations for x in s.layers),
        reason="selective recomputation keeps its tensors itself, where no hook of autograd moves them",
    ),
)


_RULES = "torch.compile cannot trace the rules by which a model's own code runs on parts of tensors"
_PIECES = "a compiled layer is one piece, without single ops whose results could be kept, moved or split"
COMPILED_LACKS = {
    "tp": _RULES, "ulysses": _RULES, "ring": _RULES, "ep": "experts exchange rows of any number inside a layer",
    "selective": _PIECES, "offload_activations": _PIECES, "zb_h1": _PIECES, "zb_v": _PIECES,
}  # fmt: skip
COMPILED_EXPERTS = "compiled layers with experts: rows of any number would be compiled for again and again"


def reasons(spec: PlanSpec, compiled: bool = False) -> tuple[str, ...]:
    """Why the runtime cannot execute `spec`, a line each; empty if it can. `compiled`: torch.compile has the layers."""
    found = [f"{o.name}: {o.reason}" for o in OPTIONS if o.reason and o.used(spec)]
    if compiled:
        found += [f"{o.name}, compiled: {COMPILED_LACKS[o.name]}" for o in OPTIONS if o.name in COMPILED_LACKS
                  and o.used(spec)]  # fmt: skip
    found += [f"{' with '.join(c.names)}: {c.reason}" for c in COMBINATIONS if c.used(spec)]
    return tuple(found)


def unsupported(spec: PlanSpec, compiled: bool = False) -> str | None:
    """The first reason why the runtime cannot execute `spec`, or None."""
    return next(iter(reasons(spec, compiled)), None)


def groups_unsupported(spec: PlanSpec, compiled: bool = False) -> str | None:
    """Why the runtime cannot run groups of unequal size (plans with buckets) over the data ranks of `spec`, or None."""
    if compiled:
        return f"groups with compiled layers: {_RULES}"
    if spec.pp > 1 and spec.schedule is not ScheduleKind.ONE_F_ONE_B:
        return f"groups with pp: micro-batches of different shapes run as 1f1b, not as {spec.schedule.value}"
    return None
