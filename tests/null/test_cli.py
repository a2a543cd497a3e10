"""The command line on a saved graph: answers, errors in one line, exit codes, Ctrl-C at any moment."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import plans
import pytest

from planner import cli
from planner.build import build_plan
from planner.check import Finding
from planner.commands import arguments
from planner.commands import search as search_verb
from planner.costmodel.engine import get_engine
from planner.files import read_plan
from planner.plan import Plan, encode_plan
from planner.profiler.graph_io import encode_graph
from planner.search import SearchOptions, SearchResult
from planner.space import Limits

JOB = ["--gpus", "16", "--global-batch", "64"]
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every command runs in its own folder with a graph, a plan and pytest's own Ctrl-C afterwards."""
    monkeypatch.chdir(tmp_path)
    Path("graph.json").write_bytes(encode_graph(plans.graph()))
    Path("given.json").write_bytes(encode_plan(plans.plan()))
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def run(*args: str) -> int:
    return cli.entry(list(args))


def run_json(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, object]:
    assert run(*args, "--format", "json") == 0
    answer: dict[str, object] = json.loads(capsys.readouterr().out)
    return answer


# ---- answers

SEARCH_FIELDS = {
    "step_s", "lower_bound_s", "gap_frac", "num_candidates", "stop_reason", "search_s", "plan_path",
    "peak_memory_bytes", "tp", "pp", "vpp", "dp_replicate", "dp_shard", "cp", "ep",
}  # fmt: skip


def test_search_writes_a_plan_that_every_verb_reads(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "search", "graph.json", *JOB, "-o", "out.json")
    assert SEARCH_FIELDS <= set(found) and found["schema"] == "planner.search/1"
    plan = read_plan(Path("out.json"))
    assert found["plan_path"] == "out.json"
    assert found["step_s"] == plan.predicted.step_s
    assert plan.certificate is not None and found["lower_bound_s"] == plan.certificate.lower_bound_s
    assert {name: found[name] for name in ("tp", "pp", "cp", "ep")} == {
        "tp": plan.decisions.tp, "pp": plan.decisions.pp, "cp": plan.decisions.cp, "ep": plan.decisions.ep,
    }  # fmt: skip
    assert run_json(capsys, "check", "out.json")["ok"] is True
    assert run_json(capsys, "estimate", "out.json")["step_s"] == found["step_s"]
    explained = run_json(capsys, "explain", "out.json")
    leaves = explained["breakdown_s"]
    assert isinstance(leaves, dict) and sum(leaves.values()) == pytest.approx(found["step_s"])
    assert run_json(capsys, "diff", "out.json", "out.json")["changes"] == []


def test_same_inputs_same_bytes() -> None:
    for name in ("a.json", "b.json"):
        assert run("search", "graph.json", *JOB, "--quiet", "-o", name) == 0
    assert Path("a.json").read_bytes() == Path("b.json").read_bytes()


def test_fix_and_forbid_bind(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "search", "graph.json", *JOB, "--fix", "tp=2,mbs=1", "--forbid", "pp,zero3")
    assert (found["tp"], found["micro_batch_size"], found["pp"]) == (2, 1, 1) and found["zero_stage"] != 3
    space = read_plan(Path("plan.json")).certificate
    assert space is not None and space.space.fixed == {"tp": 2, "micro_batch_size": 1}


def test_executable_only_follows_the_runtimes_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from planner.runtime import support

    names = {option.name for option in support.OPTIONS}
    assert names <= {*arguments.FORBIDDABLE, "dp"}
    for combination in arguments.limits_of(get_engine("planner"), "", "", True).combinations:
        assert combination <= names, f"planner.space does not know {combination - names}"
    runs = ("dp", "tp", "zero1")
    only = tuple(dataclasses.replace(o, reason="" if o.name in runs else "no") for o in support.OPTIONS)
    monkeypatch.setattr(support, "OPTIONS", only)
    assert run("search", "graph.json", *JOB, "--executable-only", "--quiet") == 0
    plan = read_plan(Path("plan.json"))
    assert plan.executable and not plan.executable_reasons
    assert plan.decisions.pp == 1 and plan.decisions.cp == 1 and plan.decisions.zero_stage in (0, 1)
    assert run("search", "graph.json", *JOB, "--quiet") == 0
    best = read_plan(Path("plan.json"))
    assert best.predicted.step_s <= plan.predicted.step_s * 1.0001


def test_estimate_prices_a_layout_by_flags(capsys: pytest.CaptureFixture[str]) -> None:
    layout = ["--tp", "2", "--pp", "4", "--sp", "--recompute", "full", "--mbs", "2", "-o", "mine.json"]
    found = run_json(capsys, "estimate", "graph.json", *JOB, *layout)
    assert (found["tp"], found["pp"], found["dp_shard"], found["recompute"]) == (2, 4, 2, "full")
    assert found["fits"] is True and found["lower_bound_s"] is None
    assert run_json(capsys, "check", "mine.json")["ok"] is True
    best = run_json(capsys, "search", "graph.json", *JOB)
    assert float(str(best["lower_bound_s"])) <= float(str(found["step_s"]))


def test_a_layout_that_does_not_fit_is_priced_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("estimate", "graph.json", *JOB, "--zero", "0", "--mbs", "4", "--memory-margin", "0.8") == 0
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_why_says_what_another_layout_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("search", "graph.json", *JOB, "--quiet") == 0
    capsys.readouterr()
    why = run_json(capsys, "explain", "plan.json", "--why", "pp=8")
    assert why["possible"] is True and why["pp"] == 8
    plan_s, why_s = float(str(why["plan_step_s"])), float(str(why["step_s"]))
    change = why["change_s"]
    assert isinstance(change, dict) and sum(change.values()) == pytest.approx(why_s - plan_s, abs=1e-9)
    assert why_s >= plan_s * 0.99
    cannot = run_json(capsys, "explain", "plan.json", "--why", "tp=32")
    assert cannot["possible"] is False and "16 GPUs are not a multiple of 32" in str(cannot["reason"])


def test_diff_names_what_changed(capsys: pytest.CaptureFixture[str]) -> None:
    for name, fix in (("a.json", "tp=1"), ("b.json", "tp=2")):
        assert run("search", "graph.json", *JOB, "--quiet", "--fix", fix, "-o", name) == 0
    capsys.readouterr()
    found = run_json(capsys, "diff", "a.json", "b.json")
    changes = found["changes"]
    assert isinstance(changes, list)
    assert {"field": "tp", "before": "1", "after": "2"} in changes
    steps = found["step_s"]
    assert isinstance(steps, list) and sum(dict(found["change_s"]).values()) == pytest.approx(steps[1] - steps[0])


def test_objectives(capsys: pytest.CaptureFixture[str]) -> None:
    fastest = run_json(capsys, "search", "graph.json", *JOB)
    fewest = run_json(capsys, "search", "graph.json", *JOB, "--objective", "gpus")
    assert fewest["num_gpus"] == 1
    limit = 2 * float(str(fastest["step_s"]))
    enough = run_json(capsys, "search", "graph.json", *JOB, "--objective", "gpus", "--max-step-s", str(limit))
    assert 1 < int(str(enough["num_gpus"])) <= 16 and float(str(enough["step_s"])) <= limit
    cheap = run_json(capsys, "search", "graph.json", *JOB, "--objective", "cost")
    per_step = int(str(cheap["num_gpus"])) * float(str(cheap["step_s"]))
    assert per_step <= 16 * float(str(fastest["step_s"])) * 1.01
    assert run("search", "graph.json", *JOB, "--objective", "gpus", "--max-step-s", "1e-6") == 3


def test_infeasible_says_by_how_much_and_what_would_help(capsys: pytest.CaptureFixture[str]) -> None:
    tight = ["--forbid", "offload_optimizer,tp,pp,zero", "--memory-margin", "0.95"]
    assert run("search", "graph.json", "--gpus", "2", "--global-batch", "64", *tight) == 3
    text = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"misses by [\d.]+ GiB", text) and "ways out: " in text
    assert re.search(r"allow (tp|pp|zero|offload_optimizer)|--memory-margin|--gpus \d+", text)
    assert not Path("plan.json").exists()


def test_cluster_and_env(capsys: pytest.CaptureFixture[str]) -> None:
    names = [row["name"] for row in run_json(capsys, "cluster", "list")["clusters"]]  # type: ignore[attr-defined]
    assert "h100" in names
    shown = run_json(capsys, "cluster", "show", "h100")
    assert len(str(shown["sha256"])) == 64
    assert run_json(capsys, "env")["numpy"]


@pytest.mark.parametrize("form", ["table", "md"])
@pytest.mark.parametrize(
    "args",
    [
        ["search", "graph.json", *JOB],
        ["estimate", "given.json"],
        ["explain", "given.json"],
        ["check", "given.json"],
        ["diff", "given.json", "given.json"],
        ["cluster", "list"],
    ],
    ids=lambda args: args[0],
)
def test_screens_fit_and_are_plain(
    args: list[str], form: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("planner.commands.check._refuse_stale", lambda *_: None)
    assert run(*args, "--format", form) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    if form == "table":
        assert max(map(len, text.splitlines())) <= 112 and len(text.splitlines()) <= 50


def shape(text: str) -> str:
    """A screen without figures and without the order that figures give: what must not change unnoticed."""
    text = re.sub(r"[-+]?\d[\d,.]*(e[-+]\d+)?", "#", text)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return "\n".join(sorted(line for line in lines if not line.startswith(("step =", "+ ")))) + "\n"


@pytest.mark.parametrize("name", ["estimate", "diff", "check"])
def test_screens_look_as_before(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.commands.check._refuse_stale", lambda *_: None)
    job, spec = plans.job(), plans.spec(**{**plans.SPEC, "tp": 4, "recompute": "none"})
    Path("other.json").write_bytes(encode_plan(build_plan(job, spec, "0.2.0", ())))
    args = {"estimate": ["given.json"], "diff": ["given.json", "other.json"], "check": ["given.json"]}[name]
    assert run(name, *args) == 0
    found = shape(capsys.readouterr().out)
    golden = GOLDEN / f"screen_{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(found)
    assert found == golden.read_text()


# ---- errors: one line, an exit code, nothing written

BAD: dict[str, tuple[list[str], int, str]] = {
    "no verb": ([], 2, "VERB"),
    "unknown verb": (["sarch"], 2, "sarch"),
    "no gpus": (["search", "graph.json"], 2, "--gpus"),
    "zero gpus": (["search", "graph.json", "--gpus", "0"], 2, "at least 1, not '0'"),
    "negative gpus": (["search", "graph.json", "--gpus", "-8"], 2, "at least 1"),
    "half a gpu": (["search", "graph.json", "--gpus", "1.5"], 2, "whole number"),
    "not whole nodes": (["search", "graph.json", "--gpus", "13", "--global-batch", "8"], 2, "use 8 or 16"),
    "unknown flag": (["search", "graph.json", "--gpu", "8"], 2, "--gpu"),
    "unknown cluster": (["search", "graph.json", *JOB, "--cluster", "h1000"], 2, "h100"),
    "unknown engine": (["search", "graph.json", *JOB, "--engine", "magic"], 2, "megatron-core"),
    "unknown kernel": (["search", "graph.json", *JOB, "--kernels", "rmsnorm=liger"], 2, "close: rms_norm"),
    "unknown implementation": (["estimate", "given.json", "--kernels", "gla=liger"], 2, "it has torch, ours, fla"),
    "not a kernel": (["search", "graph.json", *JOB, "--kernels", "rms_norm=ours,liger"], 2, "'liger' is neither"),
    "kernel twice": (["search", "graph.json", *JOB, "--kernels", "rope=ours,rope=torch"], 2, "rope is given twice"),
    "kernels of others": (["search", "graph.json", *JOB, "--engine", "nanotron", "--kernels", "ours"], 2, "its own"),
    "kernels on CPUs": (["search", "graph.json", "--gpus", "2", "--global-batch", "8", "--cluster", "cpu-gloo",
                         "--kernels", "rms_norm=liger"], 2, "rms_norm=liger: cluster cpu-gloo has CPUs"),
    "no model": (["search", "none.py", *JOB], 2, "no such file"),
    "odd model": (["search", "model.txt", *JOB], 2, "no such file"),
    "no batch": (["search", "graph.json", "--gpus", "8"], 2, "--global-batch"),
    "batch nothing divides": (["search", "graph.json", "--gpus", "16", "--global-batch", "7", "--forbid", "tp,pp,cp"],
                              3, "--global-batch 16"),
    "other length": (["search", "graph.json", *JOB, "--seq-len", "4096"], 2, "traced at 2048"),
    "fix without value": (["search", "graph.json", *JOB, "--fix", "tp"], 2, "option=value"),
    "fix unknown": (["search", "graph.json", *JOB, "--fix", "tpp=2"], 2, "tp"),
    "fix zero": (["search", "graph.json", *JOB, "--fix", "tp=0"], 2, "at least 1"),
    "fix twice": (["search", "graph.json", *JOB, "--fix", "mbs=1,micro_batch_size=2"], 2, "twice"),
    "fix schedule": (["search", "graph.json", *JOB, "--fix", "schedule=zigzag"], 2, "zb_v"),
    "forbid unknown": (["search", "graph.json", *JOB, "--forbid", "rings"], 2, "ring"),
    "fix and forbid": (["search", "graph.json", *JOB, "--fix", "tp=2", "--forbid", "tp"], 2, "exclude each other"),
    "fix and compile": (["search", "graph.json", *JOB, "--engine", "planner-compiled", "--fix", "tp=2"], 2, "not with"),
    "gap of 1": (["search", "graph.json", *JOB, "--gap", "1"], 2, "below 1"),
    "gap of nan": (["search", "graph.json", *JOB, "--gap", "nan"], 2, "below 1"),
    "no time": (["search", "graph.json", *JOB, "--time-limit", "0"], 2, "above 0"),
    "output is a folder": (["search", "graph.json", *JOB, "-o", "."], 2, "is a folder"),
    "output nowhere": (["search", "graph.json", *JOB, "-o", "no/plan.json"], 2, "no folder"),
    "output device": (["search", "graph.json", *JOB, "-o", "/dev/full"], 2, "not a regular file"),
    "plan missing": (["explain", "none.json"], 2, "cannot read"),
    "plan is a graph": (["explain", "graph.json"], 2, "planner.graph/1"),
    "plan is a folder": (["check", "."], 2, "cannot read"),
    "estimate of nothing": (["estimate", "none.json"], 2, "no such file"),
    "tp too wide": (["estimate", "graph.json", *JOB, "--tp", "3"], 2, "not a multiple"),
    "layers": (["estimate", "graph.json", *JOB, "--pp", "16"], 2, "8 layers cannot fill"),
    "heads": (["estimate", "graph.json", "--gpus", "32", "--global-batch", "64", "--tp", "32"], 2, "tp"),
    "sp without tp": (["estimate", "graph.json", *JOB, "--sp"], 2, "sequence parallelism needs tp > 1"),
    "micro-batch": (["estimate", "graph.json", *JOB, "--mbs", "3"], 2, "not a multiple"),
    "zb_v": (["estimate", "graph.json", "--gpus", "4", "--global-batch", "4", "--pp", "4", "--schedule", "zb_v"], 2,
             "num_microbatches >= 2 pp"),
    "stale": (["check", "given.json"], 4, "cost model"),
    "stale cluster": (["check", "given.json", "--cluster", "b200"], 4, "cluster"),
    "why unknown": (["explain", "given.json", "--why", "speed=9"], 2, "unknown option"),
    "cluster name": (["cluster", "show"], 2, "needs a name"),
    "cluster file": (["cluster", "show", "mine.toml"], 2, "mine.toml"),
    "cluster list name": (["cluster", "list", "h100"], 2, "planner cluster show h100"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors_are_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    args, code, words = BAD[case]
    before = sorted(os.listdir())
    assert run(*args) == code
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1, err
    assert words in err and err.startswith("planner")
    assert sorted(os.listdir()) == before


def test_our_bug_is_one_line_and_asks_for_a_report(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(search_verb, "search", broken)
    assert run("search", "graph.json", *JOB) == 1
    err = capsys.readouterr().err
    assert "RuntimeError: first second" in err and len(err.splitlines()) == 1


def test_a_plan_that_the_checker_refuses_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    real = search_verb.check_plan
    monkeypatch.setattr(
        search_verb, "check_plan", lambda plan: tuple(type(f)(name=f.name, ok=False, detail="no") for f in real(plan))
    )
    assert run("search", "graph.json", *JOB, "--quiet") == 1
    assert not Path("plan.json").exists()


def test_when_the_simulator_refuses_every_time_interleaving_is_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound of the whole space stays, so the gap is against it."""
    real_search, real_check, calls = search_verb.search, search_verb.check_plan, []

    def once(*args: object) -> SearchResult:
        calls.append(args[3])
        return real_search(*args)  # type: ignore[arg-type]

    def refuse_first(plan: Plan) -> tuple[Finding, ...]:
        good = len(calls) > 1
        return (*real_check(plan), Finding(name="step time", ok=good, detail="simulated 2 s"))

    monkeypatch.setattr(search_verb, "search", once)
    monkeypatch.setattr(search_verb, "check_plan", refuse_first)
    first = real_search(plans.graph(), plans.job().machine, plans.BATCH, Limits(), SearchOptions())
    assert run("search", "graph.json", *JOB, "--format", "json") == 0
    out, err = capsys.readouterr()
    assert "interleaved" in calls[1].forbidden and "simulated 2 s" in err
    found, plan = json.loads(out), read_plan(Path("plan.json"))
    assert found["lower_bound_s"] <= first.lower_bound_s * (1 + 1e-9)
    assert plan.certificate is not None
    assert plan.certificate.refused["interleaved: simulated step time"] == len(first.plans)


# ---- Ctrl-C


def test_interrupt_with_nothing_ends_in_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(search_verb, "search", interrupted)
    assert run("search", "graph.json", *JOB, "--quiet") == 130
    assert capsys.readouterr().err == "planner: interrupted; nothing was written\n"


def test_interrupt_keeps_the_best(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = search_verb.search

    def interrupted_later(graph, machine, batch, limits, options: SearchOptions, on_progress):  # type: ignore[no-untyped-def]
        def press(progress) -> None:  # type: ignore[no-untyped-def]
            if progress.best_s is not None:
                raise KeyboardInterrupt

        return real(graph, machine, batch, limits, SearchOptions(gap_frac=0.0), press)

    monkeypatch.setattr(search_verb, "search", interrupted_later)
    found = run_json(capsys, "search", "graph.json", *JOB, "--quiet")
    assert found["stop_reason"] == "interrupted" and 0 <= float(str(found["gap_frac"])) < 1
    assert read_plan(Path("plan.json")).predicted.step_s == found["step_s"]


def test_ctrl_c_at_any_moment(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A real SIGINT after ever longer: a plan with exit code 0, or one line and 130; never a traceback or a rest."""
    up = tmp_path_factory.mktemp("up") / "up"  # there when the interpreter has started and ours begins
    shape = plans.replace(plans.SHAPE, num_layers=96, hidden=12_288, heads=96, kv_heads=96, ffn=49_152)
    (tmp_path / "big.json").write_bytes(encode_graph(plans.build_graph(shape)))
    args = ["search", "big.json", "--gpus", "1024", "--global-batch", "1536", "--gap", "0", "--format", "json"]
    code = f"import sys; open({str(up)!r}, 'w').close(); from planner.cli import entry; sys.exit(entry())"
    command = [sys.executable, "-c", code, *args, "--quiet"]
    codes: list[int] = []
    delay_s = 0.1
    while delay_s < 30 and codes.count(0) < 2:
        delay_s *= 1.4
        child = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while not up.exists() and child.poll() is None:
            time.sleep(0.01)
        up.unlink()
        time.sleep(delay_s)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
        codes.append(child.returncode)
        if child.returncode == 0:
            assert json.loads(out)["stop_reason"] in ("interrupted", "exhausted", "gap") and err == ""
            assert read_plan(tmp_path / "plan.json")
            (tmp_path / "plan.json").unlink()
        elif child.returncode != -signal.SIGINT:  # else the import of ours was not done yet
            assert child.returncode == 130 and out == ""
            assert err == "planner: interrupted; nothing was written\n"
        assert sorted(os.listdir(tmp_path)) == ["big.json", "given.json", "graph.json"]
    assert 0 in codes and 130 in codes
