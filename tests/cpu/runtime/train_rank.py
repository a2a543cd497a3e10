"""Ranks of the training tests: several runs of `planner.runtime train` in one world."""

from __future__ import annotations

import argparse
import io
import shutil
from contextlib import redirect_stdout
from unittest import mock

import torch.distributed as dist

from planner.ahead import Ahead
from planner.errors import UserError
from planner.runtime import groups_feed, train


class Dies(Ahead):
    """A dispatcher that is killed as soon as it has answered once."""

    def take(self, step, lengths):
        answer = super().take(step, lengths)
        self.process.kill()
        self.process.wait()
        return answer


def run(runs):
    """Each run is a list of arguments, or ("copy", from, to); returns its error message or ''.

    ("heard", arguments) returns what was printed instead; in ("dies", arguments) the dispatcher is killed.
    """
    found = []
    for arguments in runs:
        if arguments[0] == "copy":
            if dist.get_rank() == 0:
                shutil.copytree(arguments[1], arguments[2])
            dist.barrier()
            continue
        if arguments[0] in ("heard", "dies"):
            dispatcher = Dies if arguments[0] == "dies" else Ahead
            with redirect_stdout(io.StringIO()) as heard, mock.patch.object(groups_feed, "Ahead", dispatcher):
                errors = run([arguments[1]])
            assert errors == [""], errors
            found.append(heard.getvalue())
            continue
        parser = argparse.ArgumentParser()
        train.add_arguments(parser)
        try:
            train.main(parser.parse_args(arguments))
            found.append("")
        except UserError as error:
            found.append(f"{error.exit_code} {error}")
    return found
