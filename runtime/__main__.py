"""torchrun -m planner.runtime train model.py --plan plan.json: the entry of every rank."""

from __future__ import annotations

import argparse
import os
import sys


def main() -> int:
    """Run one verb; a failure is one line on stderr and an exit code, the same on every rank that sees it."""
    from planner.errors import BUG, UserError, one_line

    parser = argparse.ArgumentParser(prog="planner.runtime", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)
    from planner.runtime import ckpt, train

    train.add_arguments(verbs.add_parser("train", help="train a model under a plan", allow_abbrev=False))
    ckpt.add_arguments(verbs.add_parser("ckpt", help="what a checkpoint holds", allow_abbrev=False))
    args = parser.parse_args()
    rank = os.environ.get("RANK", "0")
    try:
        return {"train": train, "ckpt": ckpt}[args.verb].main(args)
    except UserError as error:
        print(f"planner.runtime: rank {rank}: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except Exception as error:
        if os.environ.get("PLANNER_DEBUG"):
            raise
        what = f"{type(error).__name__}: {one_line(str(error))} (PLANNER_DEBUG=1 shows where)"
        print(f"planner.runtime: rank {rank}: {what}", file=sys.stderr, flush=True)
        code = BUG
    os._exit(code)  # other ranks may wait in a collective with this one: leave without one; torchrun ends them


if __name__ == "__main__":
    sys.exit(main())
