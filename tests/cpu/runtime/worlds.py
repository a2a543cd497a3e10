"""A world of gloo ranks for one test: spawned, timed, ended. Each rank runs a function of this package by name."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import queue
import socket
import time
import traceback
from typing import Any


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _rank(target: str, rank: int, size: int, port: int, payload: str, results: Any) -> None:
    os.environ.update(OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank),
                      WORLD_SIZE=str(size), LOCAL_RANK=str(rank))  # fmt: skip
    import datetime
    import importlib

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    module, _, name = target.rpartition(".")
    try:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=300))
        value = getattr(importlib.import_module(module), name)(json.loads(payload))
        results.put((rank, "ok", value))
    except BaseException:
        results.put((rank, "error", traceback.format_exc()))
    finally:
        results.close()
        results.join_thread()
        os._exit(0)


def run_world(size: int, target: str, payload: Any, timeout_s: float = 900.0) -> list[Any]:
    """`target(payload)` on `size` ranks, results in rank order; AssertionError with a failing rank's traceback."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.pipelining",
         "torch._dynamo", "planner.runtime.apply", "transformers.models.llama.modeling_llama"]
    )  # fmt: skip
    results = context.Queue()
    port = free_port()
    args = [(target, rank, size, port, json.dumps(payload), results) for rank in range(size)]
    ranks = [context.Process(target=_rank, args=a, daemon=True) for a in args]
    for process in ranks:
        process.start()
    found: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    try:
        while len(found) < size:
            try:
                rank, status, value = results.get(timeout=max(0.1, min(5.0, deadline - time.monotonic())))
            except queue.Empty:
                dead = [i for i, p in enumerate(ranks) if p.exitcode is not None and i not in found]
                assert not dead, f"rank {dead[0]} ended without a result; of the others came {str(found)[-4000:]}"
                assert time.monotonic() < deadline, f"ranks {sorted(set(range(size)) - set(found))} hang"
                continue
            assert status == "ok", f"rank {rank}:\n{value}"
            found[rank] = value
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return [found[i] for i in range(size)]
