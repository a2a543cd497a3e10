"""train: a plan and a model file become a training run with data, metrics, checkpoints and resumption."""

from __future__ import annotations

import argparse
import datetime
import math
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.plan import Plan
    from planner.runtime.checkpoint import Checkpoints
    from planner.runtime.feed import PlainFeed
    from planner.runtime.groups_feed import Feed as GroupedFeed
    from planner.runtime.model_source import Source
    from planner.runtime.parallel import Parallel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("model", help="model.py, model.py:function or config.json; its code runs with your rights")
    parser.add_argument("--plan", type=Path, required=True, help="plan.json of `planner search`")
    parser.add_argument("--data", type=Path, help="tokens: .npy, or raw uint16; default: model.py's train_dataset()")
    parser.add_argument("--documents", type=Path, help="lengths of the documents in --data, for plans with buckets")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps in all, also after resuming")
    parser.add_argument("--out", type=Path, default=Path("run"), help="folder of metrics and checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--init", choices=("whole", "deferred"), default="whole",
        help="whole: every rank builds the whole model on the CPU before it keeps its part; deferred: parameter by "
        "parameter, with other random values",
    )  # fmt: skip
    parser.add_argument("--lr", type=float, default=3e-4, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=0, help="steps of linear warm-up; cosine decay to 10 % follows")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument("--save-every", type=int, default=0, metavar="STEPS", help="0 = only at the end")
    parser.add_argument("--keep", type=int, default=3, help="checkpoints to keep")
    parser.add_argument(
        "--resume", choices=("auto", "never"), default="auto", help="auto: from the last commit in --out"
    )
    parser.add_argument(
        "--on-mismatch", choices=("refuse", "warn"), default="refuse",
        help="when the model file is not, by its SHA-256, the one that the plan was made from: refuse ends with exit "
        "code 4. A plan whose parameters, ranks or file hash do not fit is always refused",
    )  # fmt: skip
    parser.add_argument("--print-every", type=int, default=1, metavar="STEPS")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="how long a rank waits for the others")


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up to `peak`, then cosine decay to a tenth of it (Loshchilov and Hutter 2017, arXiv 1608.03983)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min(progress, 1.0))))


def dropout_seed(seed: int, step: int, position: Mapping[str, int]) -> int:
    """Seed of a step's random numbers on this rank: a function of what a resumed run knows, so that no state is kept.

    Ranks of other tokens or layers draw others; TP ranks, which share both, draw the same.
    """
    import numpy as np

    entropy = [seed, step, position["data"], position["pp"]]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def main(args: argparse.Namespace) -> int:
    """Train; returns 0. UserErrors say in one line what is wrong."""
    from planner.files import read_plan
    from planner.runtime.model_source import check_room, load_source

    plan = read_plan(args.plan)
    _adopt_kernels(plan)
    check_room(plan.inputs.graph.num_params, args.init)
    source = load_source(args.model, args.seed, args.init)
    _check_source(plan, source, args)
    import torch.distributed as dist

    started = not dist.is_initialized()
    device = _start(args.timeout_s)
    _check_hardware(plan, device)
    parallel = _apply(plan, source, args, device)
    from planner.runtime.checkpoint import Checkpoints

    if dist.get_rank() == 0:
        args.out.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(args.out / "checkpoints", args.keep)
    feed = _grouped_feed(plan, parallel, args) if plan.sequences else _plain_feed(plan, parallel, source, args)
    try:
        _loop(parallel, plan, feed, checkpoints, args)
    finally:
        feed.close()
    if started:
        dist.destroy_process_group()
    return 0


def _adopt_kernels(plan: Plan) -> None:
    """Before anything is loaded: whether what the plan's kernels need is here."""
    import torch

    from planner.runtime.chosen import adopt

    adopt(plan, "cuda" if torch.cuda.is_available() else "cpu")


def _check_source(plan: Plan, source: Source, args: argparse.Namespace) -> None:
    from planner.errors import StalePlanError

    if source.sha256 == plan.inputs.source_sha256:
        return
    text = (
        f"{args.plan}: made from a model file of sha256 {plan.inputs.source_sha256[:12]}, {args.model} has "
        f"{source.sha256[:12]}"
    )
    if args.on_mismatch == "refuse":
        raise StalePlanError(f"{text}: search again, or pass --on-mismatch warn if the model is the same")
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}; going on as asked", flush=True)


def _check_hardware(plan: Plan, device: Any) -> None:
    """Refuse a GPU that is too small for the plan; warn where the plan is for other hardware."""
    import torch
    import torch.distributed as dist

    from planner.runtime.errors import RuntimePlanError

    planned = plan.inputs.cluster.device
    found = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    if device.type == "cuda":
        room = torch.cuda.get_device_properties(device).total_memory
        if room < plan.predicted.peak_memory_bytes:
            raise RuntimePlanError(
                f"the plan needs {plan.predicted.peak_memory_bytes / 2**30:.1f} GiB a GPU, {found} has "
                f"{room / 2**30:.1f} GiB: search again for this cluster"
            )
    model = planned.name.split("-")[0]
    if dist.get_rank() == 0 and model not in found.lower():
        print(f"warning: planned for {planned.name}, runs on {found}: what was predicted does not hold", flush=True)


def _start(timeout_s: float) -> Any:
    import torch
    import torch.distributed as dist

    from planner.runtime.errors import RuntimePlanError

    if dist.is_initialized():
        return torch.device("cpu")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    wait = datetime.timedelta(seconds=timeout_s)
    if "RANK" not in os.environ:  # no torchrun: one rank, which needs no port
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=wait)
        return device
    try:
        store, rank, world = next(iter(dist.rendezvous("env://", timeout=wait)))
        # torchrun keeps its store over restarts: without a prefix of their own, ranks find addresses of dead ones.
        fresh = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=fresh, rank=rank, world_size=world, timeout=wait)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).splitlines()[0].rstrip(". ")
        what = "the port is in use: give torchrun another --master-port" if "EADDRINUSE" in reason else (
            f"not all of {os.environ.get('WORLD_SIZE')} ranks came within {timeout_s:.0f} s")  # fmt: skip
        raise RuntimePlanError(f"the ranks did not meet at {where}: {what} ({reason})") from None
    return device


def _apply(plan: Plan, source: Source, args: argparse.Namespace, device: Any) -> Parallel:
    import torch.distributed as dist

    from planner.runtime.apply import parallelize_plan
    from planner.runtime.optimizer import AdamWConfig

    adamw = AdamWConfig(lr=args.lr, weight_decay=args.weight_decay, max_grad_norm=args.max_grad_norm)
    parallel = parallelize_plan(
        source.model, plan, device=device, precision=source.precision, adamw=adamw,
        packs=plan.sequences is not None, tape=source.tape,
    )  # fmt: skip
    if parallel.plain_loss and dist.get_rank() == 0:
        print(f"note: not the plan's chunked loss: {parallel.plain_loss}; the logits are kept", flush=True)
    return parallel


def _plain_feed(plan: Plan, parallel: Parallel, source: Source, args: argparse.Namespace) -> PlainFeed:
    from planner.runtime.data import Batches, TokenFile
    from planner.runtime.errors import RuntimePlanError
    from planner.runtime.feed import PlainFeed

    inputs = plan.inputs
    if args.data is not None:
        data: Any = TokenFile(args.data, inputs.seq_len)
    elif source.dataset is not None:
        data = source.dataset()
    else:
        raise RuntimePlanError(f"no data: pass --data tokens.npy or define train_dataset() in {args.model}")
    vocab = inputs.graph.vocab_size
    return PlainFeed(parallel, Batches(data, inputs.seq_len, inputs.global_batch_size, args.seed, vocab))


def _grouped_feed(plan: Plan, parallel: Parallel, args: argparse.Namespace) -> GroupedFeed:
    from planner.runtime.corpus import open_corpus
    from planner.runtime.errors import RuntimePlanError
    from planner.runtime.groups_feed import feed_of

    if args.data is None:
        raise RuntimePlanError("a plan with buckets trains on documents: pass --data with --documents, or NAME.bin")
    return feed_of(plan, parallel, open_corpus(args.data, args.documents), args.seed)


def _resume(parallel: Parallel, checkpoints: Checkpoints, args: argparse.Namespace) -> int:
    import torch.distributed as dist

    from planner.runtime.checkpoint import committed

    found = [str(committed(checkpoints.folder)[-1])] if committed(checkpoints.folder) else [""]
    dist.broadcast_object_list(found)
    if args.resume == "never" or not found[0]:
        return 0
    facts = checkpoints.load(parallel, Path(found[0]))
    if dist.get_rank() == 0:
        print(f"resumed from {found[0]} at step {facts['step']}", flush=True)
    return int(facts["step"])


def _loop(
    parallel: Parallel, plan: Plan, feed: PlainFeed | GroupedFeed, checkpoints: Checkpoints, args: argparse.Namespace
) -> None:
    import torch

    from planner.plan import plan_body
    from planner.runtime.errors import TrainingError
    from planner.runtime.measure import Metrics

    size = feed.samples_per_step
    first = _resume(parallel, checkpoints, args)
    options = {"seed": args.seed, "lr": args.lr, "warmup": args.warmup, "resumed_at_step": first,
               "loss": "chunked" if parallel.head is not None else f"plain: {parallel.plain_loss}".rstrip(": "),
               "rms_norms_by_kernel": parallel.norms, "swiglus_by_kernel": parallel.gated_mlps}  # fmt: skip
    metrics = Metrics(args.out, plan, parallel.device, args.print_every, options)
    digest = plan_body(plan)["sha256"]
    for step in range(first, args.steps):
        torch.manual_seed(dropout_seed(args.seed, step, parallel.mesh.position))
        work = metrics.data(partial(feed, step))
        lr = learning_rate(step, args.steps, args.lr, args.warmup)
        result = metrics.run(parallel, partial(work, lr))
        if not math.isfinite(result.loss) or not math.isfinite(result.grad_norm):
            raise TrainingError(
                f"loss is {result.loss}, gradient norm {result.grad_norm} at step {step + 1}: nothing was saved after "
                "the last checkpoint; lower --lr or look at the data"
            )
        metrics.step(step + 1, result.loss, result.grad_norm, lr, result.num_tokens)
        done = step + 1
        if done == args.steps or args.save_every and done % args.save_every == 0:
            facts = {"step": done, "samples": done * size, "optimizer_steps": done, "seed": args.seed, "plan": digest}
            checkpoints.save(parallel, facts)
    checkpoints.wait()
    metrics.finish()
