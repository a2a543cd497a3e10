"""Two profiles of one place compared: what has changed in the machine, beyond what the measurements scatter."""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass

from planner.costmodel.profile import Profile, Sample

_FLOOR_FRAC = 0.03  # no median of a few runs is better than this
_LEAST_CHANGE_FRAC = 0.05
_SIGMAS = 3.0
OLD_DAYS = 90


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One kernel: samples in both, geometric mean of new over old time, and its uncertainty."""

    kind: str
    name: str
    dtype: str
    ranks: int
    samples: int
    ratio: float
    uncertainty_frac: float

    @property
    def changed(self) -> bool:
        """Beyond three standard errors and 5 %."""
        return abs(math.log(self.ratio)) > max(_SIGMAS * self.uncertainty_frac, math.log(1 + _LEAST_CHANGE_FRAC))


def compare(old: Profile, new: Profile) -> tuple[Change, ...]:
    """Every kernel that both measured on the same device with the same ranks and threads."""
    before = {(s.what, old.where(s).place): s for s in old.samples}
    groups: dict[tuple[str, str, str, int], list[tuple[Sample, Sample]]] = {}
    for sample in new.samples:
        place = new.where(sample).place
        match = before.get((sample.what, place))
        if match is not None:
            groups.setdefault((sample.kind, sample.name, sample.dtype, place[2]), []).append((match, sample))
    return tuple(_change(*key, pairs) for key, pairs in sorted(groups.items()))


def _change(kind: str, name: str, dtype: str, ranks: int, pairs: list[tuple[Sample, Sample]]) -> Change:
    """Weighted mean of log ratios; errors of one run are not independent, so that they add up in full by half."""
    sigmas = [math.hypot(a.spread_frac, b.spread_frac, _FLOOR_FRAC) for a, b in pairs]
    weights = [1 / sigma**2 for sigma in sigmas]
    logs = [math.log(b.time_s / a.time_s) for a, b in pairs]
    mean = sum(w * x for w, x in zip(weights, logs, strict=True)) / sum(weights)
    independent = math.sqrt(1 / sum(weights))
    shared = sorted(sigmas)[len(sigmas) // 2] / 2
    return Change(
        kind=kind, name=name, dtype=dtype, ranks=ranks, samples=len(pairs), ratio=math.exp(mean),
        uncertainty_frac=math.hypot(independent, shared),
    )  # fmt: skip


def differences(old: Profile, new: Profile) -> tuple[str, ...]:
    """What differs in devices and software, in words."""
    said = []
    for what, one, other in (
        ("device", {c.device for c in old.conditions}, {c.device for c in new.conditions}),
        ("software", _software(old), _software(new)),
        ("ranks", {str(c.ranks) for c in old.conditions}, {str(c.ranks) for c in new.conditions}),
    ):
        if one != other:
            said.append(f"{what}: {', '.join(sorted(one)) or 'none'} -> {', '.join(sorted(other)) or 'none'}")
    return tuple(said)


def _software(profile: Profile) -> set[str]:
    return {f"{name} {version}" for c in profile.conditions for name, version in c.software.items()}


def age_days(profile: Profile, today: str) -> int:
    """Days since the oldest sample; ValueError if a date is none."""
    oldest = min(datetime.date.fromisoformat(s.measured_on) for s in profile.samples)
    return (datetime.date.fromisoformat(today) - oldest).days


def doubts(profile: Profile, today: str) -> tuple[str, ...]:
    """Why to trust the profile less: age, noise, throttling."""
    said = []
    days = age_days(profile, today)
    if days > OLD_DAYS:
        said.append(f"the oldest sample is {days} days old: `planner profile check` says whether it still holds")
    for word, why in (("noisy", "other work ran beside them"), ("throttled", "the device slowed down meanwhile")):
        count = sum(word in s.note for s in profile.samples)
        if count > 0.2 * len(profile.samples):
            said.append(f"{count} of {len(profile.samples)} samples were {word}: {why}")
    return tuple(said)
