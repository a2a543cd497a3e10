"""A model file as a user writes one: builder, dtype, data. Bombs, files in $TEST_BOMBS, make a rank die once each."""

import importlib.util
import os
import signal
from pathlib import Path

import numpy as np
import torch
from torch.distributed.checkpoint import FileSystemWriter

DTYPE = torch.float32
SEQ_LEN = 16
BOMBS = os.environ.get("TEST_BOMBS")
RANK = os.environ.get("RANK")


def build_model():
    path = Path(__file__).parents[3] / "examples/llama3.py"
    spec = importlib.util.spec_from_file_location("example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.VOCAB_SIZE = 96
    return module.Llama(layers=4, hidden=32, heads=4, ffn=48, kv_heads=2)


def with_dropout():
    model = build_model()
    model.norm = torch.nn.Sequential(model.norm, torch.nn.Dropout(0.2))
    return model


def _strikes(name):
    """Count the bomb down; True when it goes off now. Bombs go off in the order of their names."""
    path = Path(BOMBS or "/none") / name
    if not path.exists() or sorted(p.name for p in path.parent.iterdir())[0] != name:
        return False
    left = int(path.read_text()) - 1
    path.write_text(str(left))
    if left == 0:
        path.unlink()
    return left == 0


class Counting:
    """Sequences that count upwards, so that there is something to learn."""

    def __len__(self):
        return 4096

    def __getitem__(self, index):
        if RANK == "1" and _strikes("1 step"):
            os.kill(os.getpid(), signal.SIGKILL)
        return (np.arange(SEQ_LEN + 1) * (1 + index % 3) + index) % 96


def train_dataset():
    return Counting()


def _plant():
    """Make saves die: one rank with half of its shard on disk, and rank 0 with all written but not committed."""
    write, replace = FileSystemWriter.write_data, os.replace

    def write_data(self, plan, planner):
        done = write(self, plan, planner)
        if RANK == "1" and _strikes("2 write"):
            (shard,) = Path(self.path).glob("__1_*.distcp")
            os.truncate(shard, shard.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    def commit(source, target):
        if RANK == "0" and str(source).endswith(".tmp") and _strikes("3 commit"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    FileSystemWriter.write_data, os.replace = write_data, commit


if BOMBS:
    _plant()
