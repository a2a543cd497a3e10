"""Which options of the plan space the runtime executes today: the one table behind `executable`,
`--executable-only`, the README's feature table and the runtime's own refusals.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.costmodel.pipeline import ScheduleKind
from planner.costmodel.strategy import PlanSpec

_NO_RUNTIME = "planner.runtime does not execute plans yet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option: what it is called in --forbid, what it is, and why the runtime cannot execute it ('' = it can)."""

    name: str
    what: str
    reason: str = _NO_RUNTIME


OPTIONS: tuple[Option, ...] = (
    Option(name="dp", what="data parallelism, ZeRO 0"),
    Option(name="dp_replicate", what="hybrid sharding: replicas of a sharded group"),
    Option(name="zero1", what="ZeRO 1: optimizer states sharded"),
    Option(name="zero2", what="ZeRO 2: gradients sharded too"),
    Option(name="zero3", what="ZeRO 3: weights sharded too"),
    Option(name="tp", what="tensor parallelism"),
    Option(name="sp", what="sequence parallelism beside TP"),
    Option(name="vocab_parallel", what="vocabulary-parallel embedding, head and loss"),
    Option(name="pp", what="pipeline parallelism, 1F1B, uneven stages"),
    Option(name="interleaved", what="interleaved 1F1B, vpp chunks a rank"),
    Option(name="zb_h1", what="zero-bubble H1"),
    Option(name="zb_v", what="zero-bubble V"),
    Option(name="ulysses", what="context parallelism by all-to-all of heads"),
    Option(name="ring", what="context parallelism by ring attention"),
    Option(name="ep", what="expert parallelism"),
    Option(name="selective", what="selective recomputation of a layer"),
    Option(name="full", what="full recomputation of a layer"),
    Option(name="offload_optimizer", what="optimizer states and step on the CPU"),
    Option(name="offload_activations", what="saved activations of a layer on the CPU"),
)


def used_options(spec: PlanSpec) -> frozenset[str]:
    """Names of the options in OPTIONS that `spec` uses."""
    used = {
        "dp": spec.dp > 1 and spec.zero_stage == 0,
        "dp_replicate": spec.dp_replicate > 1 and spec.zero_stage > 0,
        "zero1": spec.zero_stage == 1,
        "zero2": spec.zero_stage == 2,
        "zero3": spec.zero_stage == 3,
        "tp": spec.tp > 1,
        "sp": spec.sequence_parallel,
        "vocab_parallel": spec.vocab_parallel,
        "pp": spec.pp > 1,
        "interleaved": spec.schedule is ScheduleKind.INTERLEAVED,
        "zb_h1": spec.schedule is ScheduleKind.ZB_H1,
        "zb_v": spec.schedule is ScheduleKind.ZB_V,
        "ulysses": spec.ulysses > 1,
        "ring": spec.ring > 1,
        "ep": spec.ep > 1,
        "selective": any(s.recompute == "selective" for s in spec.layers),
        "full": any(s.recompute == "full" for s in spec.layers),
        "offload_optimizer": spec.offload_optimizer,
        "offload_activations": any(s.offload_activations for s in spec.layers),
    }
    return frozenset(name for name, on in used.items() if on)


def executable_reasons(spec: PlanSpec) -> tuple[str, ...]:
    """Why the runtime cannot execute `spec`, one line an option; empty if it can."""
    used = used_options(spec)
    found = [f"{option.name}: {option.reason}" for option in OPTIONS if option.name in used and option.reason]
    return tuple(found)


def executable_options() -> tuple[str, ...]:
    """Options that the runtime executes."""
    return tuple(option.name for option in OPTIONS if not option.reason)
