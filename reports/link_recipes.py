"""What is fitted of each link, what the measurements cannot tell apart, and which links and collectives borrow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from planner.costmodel.evidence import Source
from planner.reports.calibrate_links import Link, Recipe
from planner.reports.fitting import Parameter

_NODE = (
    Parameter(name="base_s", start=5e-6, low=1e-7, high=1e-4, log=True),
    Parameter(name="step_s", start=1e-6, low=1e-8, high=2e-5, log=True),
    Parameter(name="efficiency", start=0.8, low=0.05, high=1.0),
    Parameter(name="fill_steps", start=0.5, low=0.0, high=4.0),
    Parameter(name="ramp_step_s", start=3e-6, low=1e-8, high=1e-4, log=True),
    Parameter(name="ramp_bytes", start=3e5, low=1e4, high=1e8, log=True),
)
_NVLS = (Parameter(name="nvls_efficiency", start=0.65, low=0.4, high=0.8),)
_PAIR = tuple(item for item in _NODE if item.name not in ("step_s", "fill_steps"))  # one hop: no telling apart
# 24 of 25 and 47 of 50 GB/s are what NVIDIA calls full speed (nccl-tests issues 119 and 290): 0.96 at most.
_NETWORK = (
    Parameter(name="step_s", start=1e-5, low=1e-6, high=1e-4, log=True),
    Parameter(name="efficiency", start=0.9, low=0.3, high=0.96),
    Parameter(name="ramp_step_s", start=1e-4, low=1e-7, high=2e-3, log=True),
    Parameter(name="ramp_bytes", start=3e5, low=1e4, high=1e8, log=True),
)
_EFFICIENCY = (Parameter(name="efficiency", start=0.8, low=0.05, high=1.0),)
_NETWORK_FIXED = {"base_s": 0.0, "fill_steps": 0.0}  # base_s is the inner link's
_FEW = {"step_s": 1e-5, "ramp_step_s": 2e-5, "ramp_bytes": 3e5, **_NETWORK_FIXED}  # near InfiniBand's fit
_XGMI = {"base_s": 1e-5, "step_s": 2e-6, "ramp_step_s": 5e-6, "ramp_bytes": 2e6, "fill_steps": 0.5}  # near NVLink's

# TCP has one protocol, and a rank that shares a core delays every hop.
_GLOO = (
    Parameter(name="step_s", start=2e-4, low=1e-6, high=5e-3, log=True),
    Parameter(name="efficiency", start=0.2, low=0.01, high=1.0),
)
_GLOO_FIXED = {"base_s": 5e-5, "fill_steps": 0.0, "ramp_step_s": 0.0, "ramp_bytes": 1e6}
_RING_HOP_S = 5e-6

TOPOLOGIES = {"nvlink2": "mesh", "xgmi": "mesh", "pcie": "bus"}
_ON_NODE = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")


def _node(link: str, collective: str) -> Recipe:
    switched = link in ("nvlink4", "nvlink5") and collective == "all_reduce"
    return Recipe(
        link=link,
        collective=collective,
        parameters=_NODE + (_NVLS if switched else ()),
        fixed={},
        topology=TOPOLOGIES.get(link, "switch"),
    )


def _pair(link: str) -> Recipe:
    return Recipe(
        link=link,
        collective="send_recv",
        parameters=_PAIR,
        fixed={"step_s": 0.0, "fill_steps": 0.0},
        topology=TOPOLOGIES.get(link, "switch"),
    )


def _network(link: str, collective: str) -> Recipe:
    return Recipe(link=link, collective=collective, parameters=_NETWORK, fixed=_NETWORK_FIXED)


def recipes() -> tuple[Recipe, ...]:
    """Every fit, links inside a node before those between nodes."""
    on_node = ("nvlink3", "nvlink4", "nvlink5", "pcie")
    return (
        *(_node(link, collective) for link in on_node for collective in _ON_NODE),
        *(_pair(link) for link in on_node),
        _node("nvlink2", "all_reduce"),
        Recipe(link="xgmi", collective="all_reduce", parameters=_EFFICIENCY, fixed=_XGMI, topology="mesh"),
        _network("infiniband", "all_reduce"),
        _network("efa4", "all_reduce"),
        *(_network("efa", collective) for collective in ("all_reduce", "all_gather", "reduce_scatter")),
        *(
            Recipe(link="gloo", collective=collective, parameters=_GLOO, fixed=_GLOO_FIXED, backend="gloo")
            for collective in (*_ON_NODE, "send_recv")
        ),
        Recipe(link="roce", collective="all_reduce", parameters=_EFFICIENCY, fixed=_FEW),
        Recipe(link="omnipath", collective="all_reduce", parameters=_EFFICIENCY, fixed=_FEW),
    )


def nvl72_recipe(nvlink5: Link) -> Recipe:
    """A whole rack: NVLink 5 with its own in-switch rate."""
    ring = nvlink5.collectives["all_reduce"]
    fixed = {
        name: getattr(ring, name)
        for name in ("base_s", "step_s", "efficiency", "fill_steps", "ramp_step_s", "ramp_bytes")
    }
    return Recipe(link="nvlink5-nvl72", collective="all_reduce", parameters=_NVLS, fixed=fixed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Borrow:
    """Constants of one link and collective taken from another, with changes."""

    link: str
    collective: str
    from_link: str
    from_collective: str
    changes: Mapping[str, float]
    evidence: Source
    why: str


def _all_reduce_for(link: str, collectives: tuple[str, ...]) -> tuple[Borrow, ...]:
    return tuple(
        Borrow(
            link=link,
            collective=name,
            from_link=link,
            from_collective="all_reduce",
            changes={},
            evidence=Source.MODELLED,
            why="only its all-reduce was measured",
        )
        for name in collectives
    )


_OTHERS = ("all_gather", "reduce_scatter", "all_to_all", "send_recv")
BORROWED = (
    *(borrow for link in ("nvlink2", "xgmi", "efa4", "roce", "omnipath") for borrow in _all_reduce_for(link, _OTHERS)),
    *(
        Borrow(
            link="infiniband",
            collective=name,
            from_link="infiniband",
            from_collective="all_reduce",
            changes={"step_s": _RING_HOP_S},
            evidence=Source.MODELLED,
            why="only its all-reduce was measured, a tree; a ring's hop takes 2.7-9.6 us by protocol ("
            "https://github.com/NVIDIA/nccl src/graph/tuning.cc read 2026-11-24)",
        )
        for name in _OTHERS[:3]
    ),
    Borrow(
        link="infiniband",
        collective="send_recv",
        from_link="infiniband",
        from_collective="all_reduce",
        changes={"step_s": _RING_HOP_S, "efficiency": 0.94},
        evidence=Source.MODELLED,
        why="47 of 50 GB/s, https://github.com/NVIDIA/nccl-tests/issues/290 read 2026-11-24; a hop as in a ring",
    ),
    *(
        Borrow(
            link="efa",
            collective=name,
            from_link="efa",
            from_collective="all_gather",
            changes={},
            evidence=Source.MODELLED,
            why="only its rings and trees were measured",
        )
        for name in _OTHERS[2:]
    ),
    *(
        Borrow(
            link="nvlink5-nvl72",
            collective=name,
            from_link="nvlink5",
            from_collective=name,
            changes={},
            evidence=Source.MODELLED,
            why="only all-reduce was measured across a rack",
        )
        for name in _OTHERS
    ),
    *(
        Borrow(
            link="slingshot",
            collective=name,
            from_link="infiniband",
            from_collective=name,
            changes={"efficiency": 0.85},
            evidence=Source.ASSUMED,
            why="no measurement found",
        )
        for name in ("all_reduce", *_OTHERS)
    ),
    *(
        Borrow(
            link="gloo-ethernet",
            collective=name,
            from_link="gloo",
            from_collective=name,
            changes={"efficiency": 0.8},
            evidence=Source.ASSUMED,
            why="the hops of loopback; a share of a slow wire that TCP is known to reach",
        )
        for name in ("all_reduce", *_OTHERS)
    ),
)
