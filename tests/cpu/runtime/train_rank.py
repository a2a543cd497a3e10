"""Ranks of the training tests: several runs of `planner.runtime train` in one world."""

from __future__ import annotations

import argparse
import shutil

import torch.distributed as dist

from planner.errors import UserError
from planner.runtime import train


def run(runs):
    """Each run is a list of arguments, or ("copy", from, to); returns its error message or ''."""
    found = []
    for arguments in runs:
        if arguments[0] == "copy":
            if dist.get_rank() == 0:
                shutil.copytree(arguments[1], arguments[2])
            dist.barrier()
            continue
        parser = argparse.ArgumentParser()
        train.add_arguments(parser)
        try:
            train.main(parser.parse_args(arguments))
            found.append("")
        except UserError as error:
            found.append(f"{error.exit_code} {error}")
    return found
