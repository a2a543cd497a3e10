"""Groups of unequal size over the same data ranks give the gradients of one process, whatever the dispatch."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cases import _SP, case, spec, traced  # noqa: E402
from worlds import run_world  # noqa: E402

from planner.build import Job  # noqa: E402
from planner.commands.sequences import plan_lengths  # noqa: E402
from planner.costmodel.engine import get_engine  # noqa: E402
from planner.costmodel.estimate import machine_for  # noqa: E402
from planner.costmodel.presets import load_cluster  # noqa: E402
from planner.lengths import from_samples  # noqa: E402
from planner.plan import GroupKind, encode_plan  # noqa: E402
from planner.space import Limits  # noqa: E402

LIMIT = 1e-9  # relative to the largest element of a tensor
NOTHING = "no token of this batch has a label: nothing to learn from"  # without documents, or of one token each
# (model, state layout, dispatches drawn): every ZeRO stage, TP under the groups, learned positions, tied ends, experts
# on all ranks and spread over those of several groups, pipelines in lockstep and by micro-step.
PLANS = {
    4: [
        ("llama", spec(dp_shard=4, zero_stage=3), 5),
        ("gpt", spec(dp_shard=4, zero_stage=1), 4),
        ("llama", spec(ulysses=2, ring=2, chunked_loss=True), 4),
        ("hf_llama", spec(tp=2, dp_shard=2, zero_stage=3, chunked_loss=True, **_SP), 4),
        ("hf_mixtral", spec(dp_shard=4, zero_stage=2), 1),
        ("hf_mixtral", spec(dp_shard=4, ep=4), 2),
        ("deepseek", spec(dp_shard=4, ep=2, zero_stage=3, recompute="full"), 2),
        ("llama", spec(pp=2, dp_shard=2, zero_stage=3), 3),
        ("hf_llama", spec(pp=2, dp_shard=2, zero_stage=1, chunked_loss=True), 3),
    ],
    8: [
        ("llama", spec(dp_shard=8, zero_stage=3), 3),
        ("gpt", spec(tp=2, dp_shard=4, zero_stage=1, **_SP), 3),
        ("gpt", spec(pp=2, tp=2, dp_shard=2, **_SP), 3),
        ("hf_mixtral", spec(pp=2, dp_shard=4, ep=2, zero_stage=1), 2),
        ("deepseek", spec(tp=2, dp_shard=4, ep=2, zero_stage=2), 1),
    ],
}


@pytest.mark.parametrize("ranks", PLANS)
def test_gradients_of_any_dispatch(ranks: int, tmp_path: Path) -> None:
    """Random batches, mixes of lengths, group shapes, micro-step counts; each kind of group has its own strategy."""
    cases = [
        {**case(model, plan, tmp_path), "seeds": list(range(1000 * i, 1000 * i + count))}
        for i, (model, plan, count) in enumerate(PLANS[ranks])
    ]
    for i, found in enumerate(zip(*run_world(ranks, "groups_rank.run", cases, 500.0), strict=True)):
        name = f"{PLANS[ranks][i][0]} {i}"
        assert not found[0]["gathered"], name
        assert all(rank["refused"] == [NOTHING] * 2 for rank in found), name
        for seed, error, parameter in found[0]["errors"]:
            assert error <= LIMIT, f"{name}, dispatch {seed}: {parameter} differs by {error:.1e}"


# ---- training

MODEL = Path(__file__).with_name("train_model.py")
LONGEST_DOCUMENT = 200


def documents() -> np.ndarray:
    """Lengths of a corpus with a long tail."""
    dice = np.random.default_rng(0)
    return np.minimum(LONGEST_DOCUMENT, (10 * dice.pareto(1.1, 600)).astype(np.int64) + 1)


def bucket_plan(path: Path, ranks: int, degrees: list[tuple[int, int]], zero: int, pp: int = 1) -> Path:
    """A plan with buckets for `ranks` GPUs, whose dispatcher may form groups of `degrees` only."""
    graph = traced(str(MODEL), 256)
    machine = machine_for(graph, load_cluster("h100"), get_engine("planner"), ranks)
    job = Job(graph=graph, machine=machine, global_batch_size=ranks, memory_margin_frac=0.05)
    args = argparse.Namespace(tokens_per_step=900, global_batch=None, gap=0.01, time_limit=30.0, executable_only=True)
    lengths = from_samples(documents(), "corpus", "of the test")
    plan = plan_lengths(args, job, lengths, Limits(fixed={"tp": 1, "pp": pp, "zero": zero}))
    assert plan.executable and plan.sequences is not None
    kinds = tuple(
        GroupKind(ulysses=u, ring=r, recompute="none", offload_activations=False, capacity_tokens=0.0)
        for u, r in degrees
    )
    path.write_bytes(encode_plan(replace(plan, sequences=replace(plan.sequences, kinds=kinds))))
    return path


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_plans_with_buckets_train_and_resume(tmp_path: Path) -> None:
    """The curve of one process, under groups of two shapes, two ZeRO stages and a pipeline; resumption; bad input.

    Without its dispatcher a run goes on, and says so once; documents of other lengths are said.
    """
    lengths = documents()
    dice = np.random.default_rng(1)
    np.save(tmp_path / "lengths.npy", lengths)
    np.save(tmp_path / "tokens.npy", (np.arange(lengths.sum()) + dice.integers(2, size=lengths.sum())) % 96)
    np.save(tmp_path / "short.npy", lengths[1:])
    zero3 = bucket_plan(tmp_path / "zero3.json", 4, [(1, 1), (2, 1), (2, 2)], 3)
    np.save(tmp_path / "even.npy", np.append(np.full(lengths.sum() // 100 - 1, 100), 100 + lengths.sum() % 100))
    zero1 = bucket_plan(tmp_path / "zero1.json", 4, [(1, 1), (1, 2)], 1, pp=2)
    one = bucket_plan(tmp_path / "one.json", 1, [(1, 1)], 0)

    def run(plan: Path, out: str, data: str = "tokens.npy", sizes: str = "lengths.npy", steps: int = 4) -> list[str]:
        data_flags = ["--data", str(tmp_path / data), "--documents", str(tmp_path / sizes)]
        rates = ["--lr", "3e-3", "--save-every", "2"]
        more = ["--out", str(tmp_path / out), "--steps", str(steps), *data_flags, *rates]
        return [str(MODEL), "--plan", str(plan), *more]

    runs: list[object] = [run(zero3, "a"), run(zero1, "b")]
    runs.append(["copy", str(tmp_path / "a/checkpoints/step-00000002"), str(tmp_path / "c/checkpoints/step-00000002")])
    runs.append(run(zero1, "c"))
    runs += [run(zero3, "d", sizes="short.npy"), run(zero3, "e", data="absent.npy")]
    runs += [["dies", run(zero3, "dies")], ["heard", run(zero3, "even", sizes="even.npy", steps=1)]]
    said = run_world(4, "train_rank.run", runs)
    for messages in said:
        assert messages[:3] == ["", "", ""]
        assert "the documents have" in messages[3] and "cannot read the corpus" in messages[4]
    assert said[0][5].count("warning: the dispatcher ended (exit code -9)") == said[0][5].count("dispatcher") == 1
    assert said[0][6].count("warning: lengths drift from corpus") == 1
    assert not any("warning" in text for messages in said[1:] for text in messages[5:])
    assert run_world(1, "train_rank.run", [run(one, "one")]) == [[""]]
    reference = losses(tmp_path / "one")
    assert reference[-1] < reference[0]
    assert losses(tmp_path / "a") == pytest.approx(reference, rel=1e-5)
    assert losses(tmp_path / "b") == pytest.approx(reference, rel=1e-5)
    assert losses(tmp_path / "c") == pytest.approx(reference[2:], rel=1e-5)
    assert losses(tmp_path / "dies") == pytest.approx(reference, rel=1e-5)
