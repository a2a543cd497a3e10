"""The profiler itself: it measures on this machine within its budget, goes on, survives a dead rank, and is used."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from planner.costmodel.engine import get_engine
from planner.costmodel.estimate import machine_for
from planner.costmodel.facts import layer_facts
from planner.costmodel.kernel_choice import sample_names
from planner.costmodel.presets import load_cluster
from planner.costmodel.profile import decode_profile
from planner.files import read_plan
from planner.profiler.awake import cores_awake
from planner.profiler.cases import Case, layer_cases, runtime_cases
from planner.profiler.graph_io import decode_graph
from planner.profiler.import_kineto import import_trace
from planner.profiler.model_bench import Bench
from planner.profiler.ops import make_op
from planner.profiler.profile import Outcome, Request, measure_cases, ranks_of, run_profile, traced_reference
from planner.profiler.timing import Clock, Job, Ranks, measure, summary
from planner.profiler.trace import trace_model

CPU, ALONE = torch.device("cpu"), Ranks(None, 1)
COMMAND = [sys.executable, "-c", "import sys; from planner.cli import entry; sys.exit(entry())"]
MODEL = (
    "import torch\nfrom torch import nn\nDTYPE = torch.float32\n"
    "SEQ_LEN = 64\nGLOBAL_BATCH_SIZE = 32\n"
    "class Block(nn.Module):\n"
    "    def __init__(self):\n        super().__init__()\n"
    "        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)\n"
    "    def forward(self, x):\n        return x + self.down(torch.relu(self.up(x)))\n"
    "class Model(nn.Module):\n"
    "    def __init__(self):\n        super().__init__()\n"
    "        self.tokens = nn.Embedding(512, 64)\n"
    "        self.blocks = nn.ModuleList(Block() for _ in range(4))\n"
    "        self.head = nn.Linear(64, 512)\n"
    "    def forward(self, tokens):\n        x = self.tokens(tokens)\n"
    "        for block in self.blocks:\n            x = block(x)\n        return self.head(x)\n"
    "def build_model():\n    return Model()\n"
)


def request_of(ranks: int, budget_s: float, what: str = "comm") -> Request:
    return Request(
        what=what, platform="cpu", cluster=load_cluster("cpu-gloo"), graphs={}, ranks=ranks, threads=1,
        budget_s=budget_s, today="2026-11-24", tool_version="1",
    )  # fmt: skip


def gemm(m: int, weight: float = 1.0) -> Case:
    return Case(kind="gemm", name="", dtype="float32", dims={"batch": 1, "m": m, "n": 64, "k": 64}, weight=weight)


def collective(name: str, num_bytes: int, ranks: int = 2) -> Case:
    dims = {"num_bytes": num_bytes, "ranks": ranks, "stride": 1}
    return Case(kind="collective", name=name, dtype="float32", dims=dims, weight=1.0)


def planner(folder: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *args], cwd=folder, capture_output=True, text=True, timeout=240, check=False,
                          env={**os.environ, **env})  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.py"
    path.write_text(MODEL)
    return path


# ---- timing


@pytest.mark.alone
def test_a_sleep_takes_as_long_as_it_takes() -> None:
    found = measure(Job(work=lambda: time.sleep(0.01)), Clock(CPU), ALONE)
    assert 0.01 <= found.time_s < 0.05 and found.repeats >= 3


def test_only_what_is_prepared_counts() -> None:
    def prepare() -> object:
        time.sleep(0.02)
        return lambda: time.sleep(0.005)

    assert 0.005 <= measure(Job(prepare=prepare), Clock(CPU), ALONE, repeats=3).time_s < 0.015  # type: ignore[arg-type]


@pytest.mark.alone
def test_ranks_that_share_a_core_count_their_own_work() -> None:
    """A rank that waits lets another work; its own work takes a turn for each of them."""
    shared = Clock(CPU, turns=4.0)
    assert shared.timed_s(lambda: time.sleep(0.2)) < 0.1

    def work() -> None:
        end_s = time.process_time() + 0.02
        while time.process_time() < end_s:
            pass

    assert shared.timed_s(work) >= 4 * 0.02


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="the scheduler has no idle class here")
def test_cores_are_awake_while_ranks_run_and_nobody_is_left() -> None:
    def spinning() -> list[int]:
        found = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        return [int(pid) for pid in found if os.sched_getscheduler(int(pid)) == os.SCHED_IDLE]

    with cores_awake(1):
        deadline = time.monotonic() + 30
        while not spinning():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert [os.getsid(pid) for pid in spinning()] == [os.getsid(0)]
    assert not spinning()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_ranks_have_cores_of_their_own_in_turn(tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    with ranks_of(["timeit", "-n", "1", "-r", "1", "__import__('time').sleep(60)"], 3, 1, "cpu", tmp_path) as ranks:
        assert [os.sched_getaffinity(rank.pid) for rank in ranks] == [{cores[i % len(cores)]} for i in range(3)]
        assert {os.getsid(rank.pid) for rank in ranks} == {os.getsid(0)}  # else what keeps cores awake takes half


def test_noise_and_throttling_are_said() -> None:
    assert summary([1.0, 1.01, 0.99, 1.0, 1.0]).note == ""
    assert "noisy" in summary([1.0, 2.0, 0.6, 1.5, 0.7]).note
    assert "throttled" in summary([1.0, 1.0, 1.0, 1.1, 1.3, 1.3, 1.3]).note


@pytest.mark.parametrize(
    ("kind", "name", "dims"),
    [
        ("gemm", "", {"batch": 2, "m": 8, "n": 16, "k": 32}),
        ("gemm", "", {"batch": 1, "m": 8, "n": 16, "k": 32}),
        *(
            ("attention", name, {"batch": 1, "q_heads": 4, "kv_heads": 2, "q_len": 16, "kv_len": 16,
                                 "head_dim_qk": 8, "head_dim_v": 8})
            for name in ("causal/forward", "causal/backward", "full/forward", "full/backward")
        ),
        *(("memory", name, {"num_bytes": 4096}) for name in ("elementwise", "norm", "softmax", "embedding", "loss")),
        ("optimizer", "adamw", {"num_params": 1000}),
        ("copy", "h2d", {"num_bytes": 1000}),
        ("copy", "d2h", {"num_bytes": 1000}),
        ("launch", "", {}),
        *(("kernel", name, {"num_bytes": 4096}) for name in sample_names() if name.endswith("/torch")),
    ],
)  # fmt: skip
def test_every_kernel_runs(kind: str, name: str, dims: dict[str, float]) -> None:
    case = Case(kind=kind, name=name, dtype="float32", dims=dims, weight=1.0)
    assert make_op(case, CPU).seconds(Clock(CPU), 2) > 0


def test_layers_and_ends_of_a_model_run(model: Path) -> None:
    graph = trace_model(str(model))
    bench = Bench(str(model), graph.traced_seq_len, CPU)
    cases = [case for case in layer_cases(graph, str(model)) if case.dims["micro_batch_size"] == 2]
    assert {case.path for case in cases} == {"blocks.0", "<prologue>", "<epilogue>"} and len(cases) == 6
    saved = {}
    for case in cases:
        made = bench.make(case)
        assert made.seconds(Clock(CPU), 2) > 0
        saved[case.path] = made.saved_bytes
    # x into up, its output into relu (kept once as output), that into down: 64 + 256 + 256 a token less the shared one
    assert saved["blocks.0"] == 2 * 64 * (64 + 256) * 4


# ---- runs


@pytest.mark.alone
def test_a_run_measures_goes_on_and_stops(tmp_path: Path) -> None:
    cases = [gemm(64), gemm(1024), collective("all_reduce", 4096), collective("send_recv", 4096)]
    first = measure_cases(request_of(2, 60.0), cases[:2])
    assert first.measured == 2 and first.settled and not first.died
    (where,) = first.profile.conditions
    assert (where.ranks, where.backend, where.platform) == (2, "gloo", "cpu") and where.software["torch"]
    again = measure_cases(request_of(2, 60.0), cases, known=first.profile)
    assert again.measured == 2 and len(again.profile.samples) == 4
    cut = measure_cases(request_of(2, 0.01), cases, known=first.profile)
    assert not cut.settled and cut.measured == 0 and cut.profile == first.profile


@pytest.mark.alone
def test_what_the_runtime_costs_the_host_is_measured() -> None:
    """A small model under every option, and the figures that turn its times into those of an op."""
    cases = runtime_cases(2, "cpu")
    found = measure_cases(request_of(2, 120.0), cases)
    assert not found.failed and not found.died and found.measured == len(cases) == 13
    graph = decode_graph(traced_reference().encode())
    for platform, cluster in (("cpu", "cpu-gloo"), ("cuda", "h100")):  # as each runs the layer
        engine = machine_for(graph, load_cluster(cluster), get_engine("planner"), 2).engine
        dims = runtime_cases(2, platform)[0].dims
        launches = {layer_facts(layer, engine).launches for layer in graph.classes}
        assert (len(graph.layer_classes), launches) == (dims["layers"], {dims["ops"]})
    assert not any(runtime_cases(world, "cpu") for world in (1, 3, 12))


def test_what_a_device_cannot_run_is_left_out() -> None:
    bad = Case(kind="gemm", name="", dtype="float7", dims=dict(gemm(64).dims), weight=9.0)
    found = measure_cases(request_of(1, 60.0), [bad, gemm(64)])
    assert [case.dtype for case, _ in found.failed] == ["float7"] and found.measured == 1


def test_a_dead_rank_costs_nothing_that_was_measured() -> None:
    """Rank 1 is killed in the middle of a sweep: one line, and the samples so far."""
    done: list[Outcome] = []

    def kill(progress: object) -> None:
        if getattr(progress, "done", 0) >= 2:
            found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, text=True,
                                   check=True).stdout.split()  # fmt: skip
            for pid in map(int, found):
                environment = Path(f"/proc/{pid}/environ")
                if environment.exists() and b"RANK=1\0" in environment.read_bytes().split(b"LOCAL_RANK", 1)[0] + b"\0":
                    os.kill(pid, signal.SIGKILL)

    cases = [collective(name, 2**e) for name in ("all_reduce", "all_gather") for e in range(10, 24)]
    run = threading.Thread(target=lambda: done.append(measure_cases(request_of(2, 120.0), cases, on_progress=kill)))
    run.start()
    run.join(180)
    (outcome,) = done
    assert outcome.died.startswith("rank 1 was killed by SIGKILL") and "\n" not in outcome.died
    assert 2 <= outcome.measured < len(cases) and not outcome.settled
    assert len(outcome.profile.samples) == outcome.measured


def test_nothing_to_measure_is_one_line() -> None:
    with pytest.raises(ValueError, match="comm needs --ranks 2"):
        run_profile(request_of(1, 10.0))


# ---- the command line


@pytest.mark.alone
def test_measured_planned_and_priced(tmp_path: Path, model: Path) -> None:
    made = planner(tmp_path, "profile", "model", "model.py", "--budget", "25s", "-o", "p.json")
    assert made.returncode == 0, made.stderr
    written = decode_profile((tmp_path / "p.json").read_bytes(), "p.json")
    assert {s.kind for s in written.samples} == {"layer"}
    shown = planner(tmp_path, "profile", "show", "p.json", "--format", "json")
    assert json.loads(shown.stdout)["sha256"]
    args = ["search", "model.py", "--gpus", "1", "--cluster", "cpu-gloo", "--global-batch", "8", "--fix", "mbs=4"]
    found = planner(tmp_path, *args, "--profile", "p.json", "-o", "plan.json")
    assert found.returncode == 0, found.stderr
    assert "% of it as measured" in " ".join(found.stdout.split())
    plan = read_plan(tmp_path / "plan.json")
    assert plan.inputs.profile_sha256 == json.loads(shown.stdout)["sha256"]
    assert any(name.startswith("layer/") for name in plan.inputs.cluster.device.measured)
    assert planner(tmp_path, "check", "plan.json").returncode == 0
    wrong = planner(tmp_path, *args[:4], "--profile", "p.json", "--cluster", "h100")
    assert wrong.returncode == 2 and "not of h100" in wrong.stderr and len(wrong.stderr.splitlines()) <= 2


@pytest.mark.alone
def test_a_rank_of_torchrun_is_a_rank(tmp_path: Path) -> None:
    code = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--no-python",
            *COMMAND, "profile", "comm", "--budget", "20s", "-o", "p.json", "--quiet"]  # fmt: skip
    done = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    written = decode_profile((tmp_path / "p.json").read_bytes(), "p.json")
    assert written.conditions[0].ranks == 2 and {s.kind for s in written.samples} >= {"collective"}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("profile", "ops", "--cluster", "h200"), "no GPU here"),
        (("profile", "model"), "needs a model.py"),
        (("profile", "ops", "--budget", "never"), "number above 0"),
        (("profile", "comm", "--ranks", "3"), "--ranks 3: cluster 'cpu-gloo'"),
        (("profile", "show", "none.json"), "cannot read the profile"),
        (("profile", "diff", "model.py", "model.py"), "not a profile"),
        (("profile", "import", "nccl-tests", "none.txt"), "cannot read"),
        (("profile", "import", "torch-trace", "model.py"), "not JSON"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, model: Path, args: tuple[str, ...], said: str) -> None:
    done = planner(tmp_path, *args)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "profile.json").exists()


# ---- traces of torch.profiler


def test_a_trace_of_this_torch_is_read(tmp_path: Path) -> None:
    a, b = torch.randn(96, 48), torch.randn(48, 24)
    q = torch.randn(1, 2, 32, 16)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, record_shapes=True) as recorded:
        for _ in range(5):
            torch.mm(a, b)
            torch.nn.functional.linear(a, torch.ones(7, 48), torch.ones(7))
            torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    path = tmp_path / "trace.json.gz"
    recorded.export_chrome_trace(str(path))
    made = import_trace(path, "2026-11-24", "1")
    found = {(s.kind, s.name, s.sizes): s for s in made.samples}
    one = found["gemm", "", (1.0, 96.0, 24.0, 48.0)]
    assert one.repeats == 5 and 1e-7 < one.time_s < 1e-2
    assert ("gemm", "", (1.0, 96.0, 7.0, 48.0)) in found
    assert any(kind == "attention" for kind, _, _ in found)
    cut = tmp_path / "cut.json.gz"
    cut.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="cut off"):
        import_trace(cut, "2026-11-24", "1")


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    run = subprocess.Popen([*COMMAND, "profile", "ops", "--budget", "120s", "-o", "p.json"], cwd=tmp_path,
                           stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)})  # fmt: skip
    deadline = time.monotonic() + 100
    while sum(path.read_text().count("\n") for path in tmp_path.glob("planner-profile-*/out.jsonl")) < 4:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    text, _ = run.communicate(timeout=60)
    assert run.returncode == 0 and "interrupted" in text
    assert decode_profile((tmp_path / "p.json").read_bytes(), "p.json").samples
