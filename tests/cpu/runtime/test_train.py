"""Training runs: the same curve under any plan, resumption under any plan, bad input in one line, killed ranks."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cases import _SP, _V, SEQ_LEN, config_of, plan_of, spec, traced  # noqa: E402
from worlds import free_port, run_world  # noqa: E402

from planner.costmodel.pipeline import ScheduleKind  # noqa: E402
from planner.costmodel.strategy import PlanSpec  # noqa: E402
from planner.plan import encode_plan  # noqa: E402
from planner.runtime.train import dropout_seed  # noqa: E402

MODEL = Path(__file__).with_name("train_model.py")
PLANS = {
    "tp2 pp2": spec(tp=2, pp=2, **_SP),
    "zero3": spec(dp_shard=4, zero_stage=3, recompute="full", chunked_loss=True),
    "zb_v tp2": spec(tp=2, **_V),
    "ring tp2 offload": spec(tp=2, ring=2, zero_stage=1, offload_optimizer=True),
    "hybrid": spec(dp_replicate=2, dp_shard=2, zero_stage=2, micro_batch_size=2),
}


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("plans")
    graph = traced(str(MODEL), SEQ_LEN)
    found = {}
    for name, plan in {**PLANS, "one": spec()}.items():
        path = folder / f"{name}.json"
        path.write_bytes(encode_plan(plan_of("", plan, graph)))
        found[name] = str(path)
    return found


def arguments(plan: str, out: Path, steps: int, *more: str) -> list[str]:
    rates = ("--lr", "3e-3", "--warmup", "2")
    return [str(MODEL), "--plan", plan, "--out", str(out), "--steps", str(steps), *rates, *more]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_every_plan_learns_alike_and_resumes_any_other(plans: dict[str, str], tmp_path: Path) -> None:
    """One curve under five plans and one process; a checkpoint goes on under each of the others."""
    runs: list[object] = [arguments(p, tmp_path / n, 6, "--save-every", "3") for n, p in plans.items() if n != "one"]
    first = tmp_path / "tp2 pp2/checkpoints/step-00000003"
    for name in (*PLANS, "again"):
        target = tmp_path / f"resumed {name}"
        runs.append(["copy", str(first), str(target / "checkpoints/step-00000003")])
        runs.append(arguments(plans["tp2 pp2" if name == "again" else name], target, 6))
    assert all(not message for rank in run_world(4, "train_rank.run", runs) for message in rank)
    alone = [
        arguments(plans["one"], tmp_path / "one", 6),
        ["copy", str(first), str(tmp_path / "resumed one/checkpoints/step-00000003")],
        arguments(plans["one"], tmp_path / "resumed one", 6),
    ]
    assert run_world(1, "train_rank.run", alone) == [["", ""]]
    reference = losses(tmp_path / "one")
    assert reference[-1] < reference[0]
    for name in PLANS:
        assert losses(tmp_path / name) == pytest.approx(reference, rel=1e-5), name
    for name in (*PLANS, "one"):
        assert losses(tmp_path / f"resumed {name}") == pytest.approx(reference[3:], rel=1e-5), name
    assert losses(tmp_path / "resumed again") == losses(tmp_path / "tp2 pp2")[3:]  # same plan: to the last bit
    record = json.loads((tmp_path / "zero3/run.json").read_text())
    assert record["plan"]["decisions"]["zero_stage"] == 3 and len(record["peak_tensor_bytes"]) == 4
    assert record["options"]["loss"] == "chunked"
    assert [p.name for p in sorted((tmp_path / "zero3/checkpoints").iterdir())] == ["step-00000003", "step-00000006"]


def hf_run(folder: Path, model: str, plan: PlanSpec, *more: str) -> tuple[list[str], list[str]]:
    """Arguments of a run of a Hugging Face config under `plan`, and of the same in one process."""
    folder.mkdir()
    (folder / "config.json").write_text(config_of(model))
    np.save(folder / "tokens.npy", np.arange(4000, dtype=np.uint16) * 7 % 96)
    found = []
    for name, decisions in (("plan", plan), ("one", spec())):
        path = folder / f"{name}.json"
        path.write_bytes(encode_plan(plan_of(model, decisions)))
        options = ["--data", str(folder / "tokens.npy"), *more]
        found.append([str(folder / "config.json"), *arguments(str(path), folder / f"{name} out", 3)[1:], *options])
    return found[0], found[1]


def test_hugging_face_configs_and_dropout(tmp_path: Path) -> None:
    """A config.json trains as in one process, to bfloat16's accuracy; dropout goes on to the bit after resuming.

    Two of them are initialised parameter by parameter: tied ones, and experts, on the ranks that keep them.
    """
    hf = {"hf_llama": spec(tp=2, **_SP), "hf_gpt2": spec(pp=2), "hf_mixtral": spec(dp_shard=2, ep=2, zero_stage=2)}
    later = {"hf_gpt2": ("--init", "deferred"), "hf_mixtral": ("--init", "deferred")}
    runs = [hf_run(tmp_path / model, model, plan, *later.get(model, ())) for model, plan in hf.items()]
    source = f"{MODEL}:with_dropout"
    plan = tmp_path / "dropout.json"
    plan.write_bytes(encode_plan(plan_of("", spec(dp_shard=2, zero_stage=3), traced(source, SEQ_LEN))))
    unbroken = [source, *arguments(str(plan), tmp_path / "unbroken", 4, "--save-every", "2")[1:]]
    step = "checkpoints/step-00000002"
    resumed: list[object] = [
        unbroken,
        ["copy", str(tmp_path / "unbroken" / step), str(tmp_path / "resumed" / step)],
        [source, *arguments(str(plan), tmp_path / "resumed", 4)[1:]],
    ]
    assert all(not m for rank in run_world(2, "train_rank.run", [r[0] for r in runs] + resumed) for m in rank)
    assert run_world(1, "train_rank.run", [r[1] for r in runs]) == [[""] * len(runs)]
    for model in hf:
        assert losses(tmp_path / model / "plan out") == pytest.approx(losses(tmp_path / model / "one out"), rel=2**-8)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "unbroken")[2:]


def test_random_numbers_of_a_step() -> None:
    """Other steps, tokens and layers draw others; nothing else does."""
    at = {"data": 1, "pp": 2, "tp": 0}
    seeds = [dropout_seed(0, 3, at), dropout_seed(1, 3, at), dropout_seed(0, 4, at)]
    seeds += [dropout_seed(0, 3, {**at, "data": 0}), dropout_seed(0, 3, {**at, "pp": 0})]
    assert len(set(seeds)) == 5 and dropout_seed(0, 3, {**at, "tp": 1}) == seeds[0]


class Evil:
    """Unpickled without care, it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.path,)


def pickle_size(*sizes: int) -> bytes:
    """The middle of a pickle of torch.Size(sizes): its elements as a tuple on the stack."""
    return b"".join(pickle.BININT1 + bytes([size]) for size in sizes) + pickle.TUPLE2


def test_bad_input_is_one_line(plans: dict[str, str], tmp_path: Path) -> None:
    """Wrong world, wrong model, damaged checkpoints, bad data."""
    good = tmp_path / "good"
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.zeros(5, dtype=np.int32))
    huge = tmp_path / "huge.npy"
    np.save(huge, np.full(4000, 5000, dtype=np.int32))
    assert run_world(1, "train_rank.run", [arguments(plans["one"], good, 2)]) == [[""]]

    def damaged(name: str, file: str, change: Callable[[bytes], bytes]) -> Path:
        shutil.copytree(good, tmp_path / name)
        path = tmp_path / name / "checkpoints/step-00000002" / file
        path.write_bytes(change(path.read_bytes()))
        return tmp_path / name

    broken = damaged("broken", "__0_0.distcp", lambda data: data[: len(data) // 3])
    foreign = tmp_path / "foreign/checkpoints/step-00000002"
    foreign.mkdir(parents=True)
    (foreign / "planner.json").write_text("{}")
    ran = tmp_path / "ran"
    evil = damaged("evil", ".metadata", lambda _: pickle.dumps(Evil(str(ran))))
    other = damaged(
        "other", ".metadata", lambda data: data.replace(pickle_size(96, 32), pickle_size(95, 32))
    )  # fmt: skip
    garbage = damaged("garbage", ".metadata", lambda _: b"no pickle")
    stray = damaged("stray", "planner.json", lambda data: data)
    (stray / "checkpoints/step-notes.txt").write_text("a file of somebody")
    (stray / "checkpoints/step-00000009").mkdir()
    runs = [
        arguments(plans["zero3"], tmp_path / "a", 3),
        arguments(plans["one"], broken, 3),
        arguments(plans["one"], tmp_path / "foreign", 3),
        arguments(plans["one"], evil, 3),
        arguments(plans["one"], other, 3),
        arguments(plans["one"], garbage, 3),
        arguments(plans["one"], stray, 3),
        arguments(plans["one"], tmp_path / "b", 3, "--data", str(tokens)),
        arguments(plans["one"], tmp_path / "c", 3, "--data", str(huge)),
        arguments(plans["one"], tmp_path / "d", 3, "--lr", "1e30", "--max-grad-norm", "0"),
        [str(MODEL.with_name("parity_models.py")) + ":llama", *arguments(plans["one"], tmp_path / "e", 3)[1:]],
    ]
    (found,) = run_world(1, "train_rank.run", runs)
    wanted = [
        ("2", "the plan is for 4 ranks (dp_shard 4), torchrun started 1"),
        ("2", "cannot be read"),
        ("2", "not a planner.checkpoint/1"),
        ("2", "which no checkpoint needs: it was refused, not run"),
        ("2", "is (95, 32) in it and (96, 32) in the model"),
        ("2", "cannot be read"),
        ("", ""),
        ("1", "less than one sequence"),
        ("1", "holds token 5000, the vocabulary has 96"),
        ("1", "nothing was saved after"),
        ("4", "search again"),
    ]
    assert not ran.exists()
    assert len(found) == len(wanted)
    for message, (code, text) in zip(found, wanted, strict=True):
        assert message.startswith(code) and text in message and "\n" not in message, message


def test_killed_ranks_restart_from_the_last_commit(plans: dict[str, str], tmp_path: Path) -> None:
    """SIGKILL in a step, in the write of a shard and before the commit: the curve of an unbroken run, to the bit."""
    bombs = tmp_path / "bombs"
    bombs.mkdir()
    for name, count in (("1 step", 37), ("2 write", 2), ("3 commit", 1)):  # 37: samples read in the fifth step
        (bombs / name).write_text(str(count))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3",
        "--master-port", str(free_port()), "-m", "planner.runtime", "train",
    ]  # fmt: skip
    plan = tmp_path / "two.json"
    two = spec(pp=2, schedule=ScheduleKind.ZB_H1)
    plan.write_bytes(encode_plan(plan_of("", two, traced(str(MODEL), SEQ_LEN))))
    env = {**os.environ, "TEST_BOMBS": str(bombs), "OMP_NUM_THREADS": "1"}
    out = tmp_path / "killed"
    args = arguments(str(plan), out, 8, "--save-every", "2")
    done = subprocess.run([*command, *args], env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(bombs.iterdir())
    resumed = [line.split() for line in done.stdout.splitlines() if line.startswith("resumed from")]
    starts = [int(words[-1]) for words in resumed]
    assert len(starts) == 3 and starts[0] in (2, 4) and starts == sorted(starts), starts
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == [f"step-{n:08d}" for n in (4, 6, 8)]
    unbroken = arguments(str(plan), tmp_path / "unbroken", 8)
    assert run_world(2, "train_rank.run", [unbroken]) == [[""], [""]]
    seen = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    reference = losses(tmp_path / "unbroken")
    assert all(row["loss"] == reference[row["step"] - 1] for row in seen)  # repeated steps too
    assert {row["step"] for row in seen} == set(range(1, 9))
