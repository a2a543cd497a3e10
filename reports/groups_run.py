"""python -m planner.reports.groups_run: adaptive groups against the static plan on gloo ranks, predicted and measured.

Every kind of group is timed alone first, on uniform batches that keep all ranks busy, so that sharing cores is in
the prices; then batches that were not used for it are dispatched, predicted and run, adaptive and static in turns.
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

import numpy as np
import torch
import torch.distributed as dist

from planner.costmodel.sequences import GroupCost, Menu
from planner.costmodel.strategy import LayerStrategy, PlanSpec
from planner.dispatch import Dispatch, Group, MicroStep, dispatch, static_dispatch
from planner.files import write_atomic
from planner.profiler.trace import trace_model
from planner.reports.loop_model import Model
from planner.runtime.apply import parallelize
from planner.runtime.groups import Document, Grouped, next_tokens

ROOM, LAYERS, HIDDEN, HEADS, VOCAB = 512, 4, 128, 8, 1024
LENGTHS = (16, 128, 256, 512)  # per rank of a group, in the runs that price it
BATCH, TAIL, MEAN = 48, 1.05, 24.0  # documents a step; exponent and scale of their Pareto distribution
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
    return np.minimum(np.sort(drawn)[::-1], int(ROOM * ranks * 0.9))


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


def uniform(kind: int, degree: int, ranks: int, length: int) -> tuple[tuple[MicroStep, ...], Any]:
    """A document of `length` tokens a rank on every group of one kind."""
    groups = tuple(
        Group(kind=kind, first_rank=i * degree, micro_batches=((i,),), time_s=0.0) for i in range(ranks // degree)
    )
    return (MicroStep(groups=groups),), np.full(ranks // degree, length * degree)


def priced(grouped: Grouped, degrees: list[int], ranks: int, rounds: int) -> Menu:
    """Kinds with measured prices: medians over rounds, lengths in turns; the part of a step that no length changes."""
    found: dict[tuple[int, int], list[float]] = {}
    for _ in range(rounds + 1):
        for kind, degree in enumerate(degrees):
            for length in LENGTHS:
                found.setdefault((kind, length), []).append(timed(grouped, *uniform(kind, degree, ranks, length)))
    groups = []
    for kind, degree in enumerate(degrees):
        step_s = np.array([np.median(found[kind, n][1:]) for n in LENGTHS])
        tokens = np.array(LENGTHS, np.float64) * degree
        fixed_s = max(0.0, float(step_s[0] - (step_s[1] - step_s[0]) / (tokens[1] - tokens[0]) * tokens[0]))
        grid = np.array([16.0, *tokens[tokens > 16.0]])
        per_token_s = np.interp(grid, tokens, np.maximum(step_s - fixed_s, 1e-9) / tokens)
        groups.append(
            GroupCost(ulysses=degree, ring=1, strategy=NONE, fixed_s=fixed_s, grid_G=grid, per_token_s_G=per_token_s,
                      capacity_tokens=float(ROOM * degree))
        )  # fmt: skip
    return Menu(groups=tuple(groups), num_ranks=ranks, lockstep=True, pp=1, step_s=0.0)


def shared(answer: Dispatch | None) -> tuple[MicroStep, ...]:
    """Rank 0's dispatch on every rank."""
    import msgspec

    sent = [msgspec.json.encode(answer)]
    dist.broadcast_object_list(sent)
    found: Dispatch = msgspec.json.decode(sent[0], type=Dispatch)
    return found.steps


def rank_main(args: argparse.Namespace, folder: Path) -> None:
    """One rank: price the kinds, then run every batch both ways in turns; rank 0 writes what was found."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=args.ranks,
                            timeout=datetime.timedelta(seconds=300))  # fmt: skip
    from planner.profiler.graph_io import decode_graph

    graph = decode_graph((folder / "graph.json").read_bytes())
    spec = PlanSpec(dp_shard=args.ranks, zero_stage=3, global_batch_size=args.ranks, stage_layers=((0, LAYERS),),
                    layers=(NONE,) * LAYERS)  # fmt: skip
    degrees = [d for d in (1, 2, 4, 8) if d <= args.ranks]
    plain = [
        GroupCost(ulysses=d, ring=1, strategy=NONE, fixed_s=0.0, grid_G=np.ones(1), per_token_s_G=np.ones(1),
                  capacity_tokens=1.0) for d in degrees
    ]  # fmt: skip
    grouped = Grouped(parallelize(build_model(), spec, graph, seq_len=graph.traced_seq_len, packs=True), plain)
    menu = priced(grouped, degrees, args.ranks, args.rounds)
    rows = []
    for seed in range(args.batches):
        lengths = batch_of(seed, args.ranks)
        adaptive = dispatch(menu, lengths, time_limit_s=1.0)
        static = static_dispatch(menu, lengths, len(degrees) - 1)
        assert static is not None
        plans = [shared(adaptive), shared(static)]
        times: list[list[float]] = [[], []]
        for turn in range(args.rounds + 1):
            for which in (0, 1) if turn % 2 else (1, 0):
                times[which].append(timed(grouped, plans[which], lengths))
        rows.append(
            {"tokens": int(lengths.sum()), "longest": int(lengths.max()),
             "predicted_s": [adaptive.step_s, static.step_s], "measured_s": [t[1:] for t in times]}
        )  # fmt: skip
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(rows))


def text(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """The report."""
    lines = [
        "# Adaptive groups against the static plan, measured",
        f"`python -m planner.reports.groups_run --ranks {args.ranks} --batches {args.batches} --rounds {args.rounds}` "
        f"made this page: {args.ranks} gloo ranks on {os.cpu_count()} cores, {LAYERS} layers of {HIDDEN}, ZeRO-3, "
        f"{BATCH} documents a step, {ROOM} tokens of room a rank (a figure of the experiment). Static: every document "
        "on all ranks (Ulysses), packed. Prices of the kinds of groups were measured before, on uniform batches; the "
        f"batches below were not used for that. Medians of {args.rounds} runs, both plans in turns; in brackets, the "
        "middle half.",
        "",
        "| tokens | longest | adaptive s | static s | measured ratio | predicted ratio |",
        "|---|---|---|---|---|---|",
    ]
    measured, predicted = [], []
    for row in rows:
        a, s = (np.array(x) for x in row["measured_s"])
        ratios = s / a
        measured.append(float(np.median(ratios)))
        predicted.append(row["predicted_s"][1] / row["predicted_s"][0])
        low, high = np.quantile(ratios, [0.25, 0.75])
        lines.append(
            f"| {row['tokens']:,} | {row['longest']:,} | {np.median(a):.3f} | {np.median(s):.3f} | "
            f"{measured[-1]:.2f} ({low:.2f} to {high:.2f}) | {predicted[-1]:.2f} |"
        )
    lines.append("")
    lines.append(f"All batches (geometric mean): measured {_mean(measured):.2f}, predicted {_mean(predicted):.2f}.")
    return "\n".join(lines) + "\n"


def _mean(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def main(args: argparse.Namespace) -> int:
    """Start the ranks, wait, write the report."""
    with tempfile.TemporaryDirectory() as name:
        from planner.profiler.graph_io import encode_graph

        folder = Path(name)
        (folder / "graph.json").write_bytes(encode_graph(trace_model(f"{__file__}:build_model", seq_len=256)))
        command = [sys.executable, "-m", "planner.reports.groups_run", "--ranks", str(args.ranks)]
        command += ["--batches", str(args.batches), "--rounds", str(args.rounds)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GROUPS_RUN_FOLDER": name}
        ranks = [subprocess.Popen(command, env={**env, "RANK": str(r)}) for r in range(args.ranks)]
        try:
            codes = [process.wait() for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        if any(codes):
            print(f"groups_run: a rank ended with code {next(c for c in codes if c)}", file=sys.stderr)
            return 1
        report = text(json.loads((folder / "found.json").read_text()), args)
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
