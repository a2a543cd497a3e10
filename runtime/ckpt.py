"""planner ckpt: what a checkpoint folder holds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("folder", type=Path, help="a checkpoint, or the folder of a run's checkpoints")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")


def main(args: argparse.Namespace) -> int:
    """Print one line a checkpoint; CheckpointError if there is none."""
    from planner.runtime.checkpoint import committed, inspect
    from planner.runtime.errors import CheckpointError

    found = [args.folder] if (args.folder / "planner.json").is_file() else committed(args.folder)
    if not found:
        raise CheckpointError(f"{args.folder}: holds no committed checkpoint")
    for path in found:
        facts = inspect(path)
        if args.json:
            print(json.dumps({"path": str(path), **facts}, sort_keys=True))
            continue
        size = sum(f.stat().st_size for f in path.iterdir())
        count = sum(_numel(shape) for shape in facts["parameters"].values())
        print(
            f"{path.name}  step {facts['step']}  {facts['samples']:,} samples  {count:,} parameters in "
            f"{len(facts['parameters'])} tensors  {size / 2**20:.1f} MiB  plan {facts['plan'][:12]}"
        )
    return 0


def _numel(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
