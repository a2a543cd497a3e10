"""A small plan for tests, made without torch and without a search."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from planner.build import Job, build_plan
from planner.costmodel.engine import get_engine
from planner.costmodel.estimate import estimate, machine_for
from planner.costmodel.graph import ModelGraph
from planner.costmodel.presets import load_cluster
from planner.costmodel.strategy import PlanSpec
from planner.given import Given, given_spec
from planner.plan import Certificate, Plan, Space
from planner.reports.shapes import Shape, build_graph

SHAPE = Shape(
    num_layers=8, hidden=2048, ffn=8192, heads=16, kv_heads=4, head_dim=128, vocab=32_000, seq_len=2048, gated=True,
    tied=False, rotary=True,
)  # fmt: skip
MOE = replace(SHAPE, num_experts=8, top_k=2)
GPUS, BATCH = 16, 64


@cache
def graph(shape: Shape = SHAPE) -> ModelGraph:
    return build_graph(shape)


@cache
def job(shape: Shape = SHAPE, cluster: str = "h100", gpus: int = GPUS, engine: str = "planner") -> Job:
    machine = machine_for(graph(shape), load_cluster(cluster), get_engine(engine), gpus)
    return Job(graph=graph(shape), machine=machine, global_batch_size=BATCH, memory_margin_frac=0.08)


def spec(shape: Shape = SHAPE, gpus: int = GPUS, **given: object) -> PlanSpec:
    return given_spec(Given(**given), graph(shape), gpus, BATCH)  # type: ignore[arg-type]


SPEC = {"tp": 2, "pp": 4, "sp": True, "vocab_parallel": True, "recompute": "selective"}


@cache
def plan() -> Plan:
    """A plan with a certificate that is right by construction: its bound is 1 % below its step time."""
    chosen = spec(**SPEC)
    step_s = estimate(graph(), job().machine, chosen).step_s
    proof = Certificate(
        lower_bound_s=0.99 * step_s,
        gap_frac=1 - 0.99,
        num_candidates=1234,
        stop_reason="gap",
        ledger={"solved": 1, "closed_by_bound": 1233},
        refused={},
        space=Space(fixed={"tp": 2}, forbidden=("cp",), zero_stages=(0, 1, 2, 3), executable_only=False),
        space_sha256="0" * 64,
        cost_model_sha256="0" * 64,
    )
    runner_up = spec(**{**SPEC, "pp": 2})
    return build_plan(job(), chosen, "0.1.0", ("ring: not yet",), proof, (runner_up,))
