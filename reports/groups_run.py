"""python -m planner.reports.groups_run: adaptive groups against the static plan on gloo ranks, predicted and measured.

Every kind of group is timed alone first, on documents of one length that keep all ranks busy, so that sharing cores is
in the prices; then batches that were not used for it are dispatched, predicted and run, adaptive and static in turns.
Memory is a figure of this experiment (`ROOM` tokens a rank): it makes long documents need groups, as a GPU's does.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from planner.costmodel.sequences import GroupCost, Menu
from planner.costmodel.strategy import LayerStrategy, PlanSpec
from planner.dispatch import Dispatch, Group, MicroStep, dispatch, static_dispatch
from planner.files import write_atomic
from planner.profiler.awake import cores_awake
from planner.profiler.graph_io import decode_graph, encode_graph
from planner.profiler.trace import trace_model
from planner.reports.loop_model import Model
from planner.runtime.apply import parallelize
from planner.runtime.groups import Document, Grouped, next_tokens

ROOM, LAYERS, HIDDEN, HEADS, VOCAB = 512, 4, 128, 8, 1024
LENGTHS, FULL = (16, 64, 256, 1024), 0.9  # of documents in the runs that price a kind, and how full a group is there
BATCH, TAIL, MEAN = 96, 1.05, 24.0  # documents a step; exponent and scale of their Pareto distribution
NONE = LayerStrategy(recompute="none")


def build_model() -> torch.nn.Module:
    """The model of the experiment."""
    torch.manual_seed(0)
    return Model(LAYERS, HIDDEN, HEADS, VOCAB)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags."""
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--batches", type=int, default=6, help="that are compared (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each, in turns (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).with_name("groups_run.md"))


def batch_of(seed: int, ranks: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Heavy-tailed lengths; one document at least needs every rank."""
    drawn = (MEAN * (np.random.default_rng(seed).pareto(TAIL, BATCH) + 0.2)).astype(np.int64) + 2
    return np.minimum(np.sort(drawn)[::-1], int(FULL * ROOM * ranks))


def documents(lengths: Any) -> list[Document]:
    """Random tokens."""
    made = np.random.default_rng(0)
    return [next_tokens(made.integers(VOCAB, size=int(n))) for n in lengths]


def timed(grouped: Grouped, steps: tuple[MicroStep, ...], lengths: Any) -> float:
    """Seconds of a step on the slowest rank, without reading documents."""
    read = documents(lengths)
    dist.barrier()
    start_s = time.perf_counter()
    grouped.step(steps, lengths, read.__getitem__)
    took = torch.tensor(time.perf_counter() - start_s)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return float(took)


def uniform(kind: int, degree: int, ranks: int, length: int, count: int) -> tuple[tuple[MicroStep, ...], Any]:
    """`count` documents of `length` tokens on every group of one kind."""
    groups = tuple(
        Group(kind=kind, first_rank=i * degree, micro_batches=(tuple(range(i * count, (i + 1) * count)),), time_s=0.0)
        for i in range(ranks // degree)
    )
    return (MicroStep(groups=groups),), np.full(ranks // degree * count, length)


def priced(grouped: Grouped, degrees: list[int], ranks: int, rounds: int) -> Menu:
    """Kinds with measured prices, medians over rounds, all in turns: t(one short) and t(many) give what a document
    costs and what a micro-step does whatever is in it; the latter is taken from the other lengths' times.
    """
    cases = {
        (kind, n): max(1, int(FULL * ROOM * degree) // n)
        for kind, degree in enumerate(degrees)
        for n in (*(n for n in LENGTHS if n < FULL * ROOM * degree), int(FULL * ROOM * degree))
    }
    found: dict[tuple[int, int, int], list[float]] = {}
    for _ in range(rounds + 1):
        for (kind, n), many in cases.items():
            for count in (1, many) if n == LENGTHS[0] else (many,):
                batch = uniform(kind, degrees[kind], ranks, n, count)
                found.setdefault((kind, n, count), []).append(timed(grouped, *batch))
    step_s = {key: float(np.median(times[1:])) for key, times in found.items()}
    groups = []
    for kind, degree in enumerate(degrees):
        grid = np.array([n for k, n in cases if k == kind], np.float64)
        many = cases[kind, LENGTHS[0]]
        one_s, many_s = step_s[kind, LENGTHS[0], 1], step_s[kind, LENGTHS[0], many]
        fixed_s = max(0.0, one_s - (many_s - one_s) / (many - 1))
        each_s = np.array([(step_s[kind, int(n), cases[kind, int(n)]] - fixed_s) / cases[kind, int(n)] for n in grid])
        groups.append(
            GroupCost(ulysses=degree, ring=1, strategy=NONE, fixed_s=fixed_s, grid_G=grid,
                      per_token_s_G=np.maximum(each_s, 1e-9) / grid, capacity_tokens=float(ROOM * degree))
        )  # fmt: skip
    return Menu(groups=tuple(groups), num_ranks=ranks, lockstep=True, pp=1, step_s=0.0)


def shared(answers: list[Dispatch] | None) -> list[tuple[MicroStep, ...]]:
    """Rank 0's dispatches on every rank."""
    sent = [msgspec.json.encode(answers)]
    dist.broadcast_object_list(sent)
    return [answer.steps for answer in msgspec.json.decode(sent[0], type=list[Dispatch])]


def dispatched(menu: Menu, lengths: Any) -> list[Dispatch]:
    """The batch's adaptive dispatch, and the static one, with all ranks in every group."""
    static = static_dispatch(menu, lengths, len(menu.groups) - 1)
    assert static is not None
    return [dispatch(menu, lengths, time_limit_s=2.0), static]


def compared(grouped: Grouped, menu: Menu, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every batch both ways in turns, with what was predicted."""
    rows = []
    for seed in range(args.batches):
        lengths = batch_of(seed, args.ranks)
        answers = dispatched(menu, lengths) if dist.get_rank() == 0 else None
        plans = shared(answers)
        times: list[list[float]] = [[], []]
        for turn in range(args.rounds + 1):
            for which in (0, 1) if turn % 2 else (1, 0):
                times[which].append(timed(grouped, plans[which], lengths))
        rows.append(
            {"tokens": int(lengths.sum()), "longest": int(lengths.max()), "measured_s": [t[1:] for t in times],
             "predicted_s": [answer.step_s for answer in answers or ()]}
        )  # fmt: skip
    return rows


def rank_main(args: argparse.Namespace, folder: Path) -> None:
    """One rank: price the kinds, then run every batch both ways in turns; rank 0 writes what was found."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=args.ranks,
                            timeout=datetime.timedelta(seconds=300))  # fmt: skip
    graph = decode_graph((folder / "graph.json").read_bytes())
    spec = PlanSpec(dp_shard=args.ranks, zero_stage=3, global_batch_size=args.ranks, stage_layers=((0, LAYERS),),
                    layers=(NONE,) * LAYERS)  # fmt: skip
    degrees = [d for d in (1, 2, 4, 8) if d <= args.ranks]
    plain = [
        GroupCost(ulysses=d, ring=1, strategy=NONE, fixed_s=0.0, grid_G=np.ones(1), per_token_s_G=np.ones(1),
                  capacity_tokens=1.0) for d in degrees
    ]  # fmt: skip
    grouped = Grouped(parallelize(build_model(), spec, graph, seq_len=graph.traced_seq_len, packs=True), plain)
    start_s = time.perf_counter()
    menu = priced(grouped, degrees, args.ranks, args.rounds)
    priced_s = time.perf_counter() - start_s
    rows = compared(grouped, menu, args)
    if rank == 0:
        kinds = [{"ranks": g.ranks, "fixed_s": g.fixed_s, "tokens": g.grid_G.tolist(),
                  "each_s": g.sequence_s(g.grid_G).tolist()} for g in menu.groups]  # fmt: skip
        seconds = [priced_s, time.perf_counter() - start_s - priced_s]
        found = {"rows": rows, "kinds": kinds, "seconds": seconds}
        (folder / "found.json").write_text(json.dumps(found))


def text(found: dict[str, Any], args: argparse.Namespace, load: float) -> str:
    """The report. `load`: the machine's load average before."""
    lines = [
        "# Adaptive groups against the static plan, measured",
        f"`python -m planner.reports.groups_run --ranks {args.ranks} --batches {args.batches} --rounds {args.rounds}` "
        f"made this page in {sum(found['seconds']):.0f} s: {args.ranks} gloo ranks on {os.cpu_count()} cores (load "
        f"average {load:.2f} before), {LAYERS} layers of {HIDDEN}, float32, ZeRO-3, {BATCH} documents a step, "
        f"{ROOM} tokens of room a rank (figures of the experiment; of 48 documents a step the adaptive plan lost 5 % "
        "in a first trial of one run: a micro-step's fixed cost weighed most). Static: every document on all ranks "
        "(Ulysses), packed. Prices of the kinds of groups were measured before, on documents of one length; the "
        "batches below "
        f"were not used for that. Medians of {args.rounds} runs, both plans in turns; in brackets, the middle half. "
        "Ranks share cores: what a plan saves is the work of exchanges and of small calls, not idle time. The "
        "dispatcher was not given the static plan to fall back on, so that its own answer is what runs.",
        "",
        "| tokens | longest | adaptive s | predicted | static s | predicted | measured ratio | predicted ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    measured, predicted = [], []
    for row in found["rows"]:
        a, s = (np.array(x) for x in row["measured_s"])
        ahead_a, ahead_s = row["predicted_s"]
        measured.append(float(np.median(s) / np.median(a)))
        predicted.append(ahead_s / ahead_a)
        low, high = np.quantile(s / a, [0.25, 0.75])
        lines.append(
            f"| {row['tokens']:,} | {row['longest']:,} | {_spread(a)} | {ahead_a:.3f} | {_spread(s)} | {ahead_s:.3f} | "
            f"{measured[-1]:.2f} ({low:.2f} to {high:.2f}) | {predicted[-1]:.2f} |"
        )
    lines += ["", f"All batches (geometric mean): measured {_mean(measured):.2f}, predicted {_mean(predicted):.2f}."]
    lines += ["", "| group of | a micro-step, empty, s | a document of so many tokens, s |", "|---|---|---|"]
    for kind in found["kinds"]:
        each = ", ".join(f"{n:,.0f}: {s:.4f}" for n, s in zip(kind["tokens"], kind["each_s"], strict=True))
        lines.append(f"| {kind['ranks']} | {kind['fixed_s']:.3f} | {each} |")
    return "\n".join(lines) + "\n"


def _spread(times: Any) -> str:
    low, high = np.quantile(times, [0.25, 0.75])
    return f"{np.median(times):.3f} ({low:.3f} to {high:.3f})"


def _mean(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def main(args: argparse.Namespace) -> int:
    """Start the ranks, wait, write the report."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "graph.json").write_bytes(encode_graph(trace_model(f"{__file__}:build_model", seq_len=256)))
        command = [sys.executable, "-m", "planner.reports.groups_run", "--ranks", str(args.ranks)]
        command += ["--batches", str(args.batches), "--rounds", str(args.rounds)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GROUPS_RUN_FOLDER": name}
        ranks = [subprocess.Popen(command, env={**env, "RANK": str(r)}) for r in range(args.ranks)]
        try:
            with cores_awake(args.ranks):
                codes = [process.wait() for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        if any(codes):
            print(f"groups_run: a rank ended with code {next(c for c in codes if c)}", file=sys.stderr)
            return 1
        report = text(json.loads((folder / "found.json").read_text()), args, load)
    write_atomic(args.output, report.encode())
    print(report)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="planner.reports.groups_run")
    add_arguments(parser)
    parsed = parser.parse_args()
    where = os.environ.get("GROUPS_RUN_FOLDER")
    if where:
        rank_main(parsed, Path(where))
        os._exit(0)
    sys.exit(main(parsed))
