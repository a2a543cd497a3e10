"""The `planner` command: parse and dispatch only. Each verb is a module that is imported when it is used.

Exit codes: 0 done, 1 our bug, 2 unusable input, 3 nothing fits, 4 stale plan, 5 accuracy gate, 130 interrupted
with nothing to show.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import argparse

VERBS: dict[str, tuple[str, str]] = {
    "search": ("planner.commands.search", "find the fastest plan for a model on a cluster, with a proved gap"),
    "estimate": ("planner.commands.estimate", "price a plan: a plan.json, or a layout given by flags"),
    "explain": ("planner.commands.explain", "where time and memory go, what binds, why not another layout"),
    "diff": ("planner.commands.diff", "what differs between two plans, and what it costs"),
    "check": ("planner.commands.check", "verify a plan independently of the search"),
    "dispatch": ("planner.commands.dispatch", "the groups that a plan with buckets forms for a batch of lengths"),
    "cluster": ("planner.commands.cluster", "list the known clusters, or show one with its sources"),
    "profile": ("planner.commands.profile", "measure this machine, so that plans rest on measurements"),
    "calibrate-loop": ("planner.reports.closed_loop", "profile, plan, run, compare: how good predictions are here"),
    "accuracy": ("planner.reports.accuracy", "predictions against published and measured runs"),
    "ckpt": ("planner.runtime.ckpt", "what a checkpoint folder holds"),
    "env": ("planner.commands.env", "versions, for bug reports"),
}
_EXITS = "exit codes: 0 done, 1 our bug, 2 unusable input, 3 nothing fits, 4 stale plan, 5 accuracy gate, 130 Ctrl-C"


class _Interrupts:
    """Ctrl-C raises KeyboardInterrupt and is remembered: C code may turn the exception into another one."""

    seen = False

    def __call__(self, signum: int, frame: FrameType | None) -> NoReturn:
        self.seen = True
        raise KeyboardInterrupt


def entry(argv: Sequence[str] | None = None) -> int:
    """Run one command; every failure is one line on stderr and an exit code."""
    interrupts = _Interrupts()
    try:
        signal.signal(signal.SIGINT, interrupts)
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except BaseException as error:
        return _failed(error, interrupts.seen)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the answer is out: nothing is left to interrupt


def _dispatch(argv: list[str]) -> int:
    verb = argv[0] if argv else ""
    if verb not in VERBS:
        return _top(argv)
    import importlib

    module = importlib.import_module(VERBS[verb][0])
    parser = _parser(f"planner {verb}", VERBS[verb][1] + ".", getattr(module, "EPILOG", ""))
    module.add_arguments(parser)
    run = getattr(module, "run", None) or module.main
    return int(run(parser.parse_args(argv[1:])))


def _top(argv: list[str]) -> int:
    verbs = "\n".join(f"  {name:<15}{what}" for name, (_, what) in VERBS.items())
    epilog = f"verbs:\n{verbs}\n\n`planner VERB --help` says more.\n{_EXITS}"
    parser = _parser("planner", "Automatic parallelism for PyTorch training: plans with a proved gap.", epilog)
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="what to do")
    parser.add_argument("--version", action="store_true", help="print the version")
    if argv == ["--version"]:
        from planner.provenance import tool_version

        print(f"planner {tool_version()}")
        return 0
    parser.parse_args(argv)
    raise AssertionError("a known verb is dispatched before")


def _parser(prog: str, description: str, epilog: str) -> argparse.ArgumentParser:
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`\n")

    form = argparse.RawDescriptionHelpFormatter
    return Parser(prog=prog, description=description, epilog=epilog, formatter_class=form, allow_abbrev=False)


def _failed(error: BaseException, interrupted: bool) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, BrokenPipeError):
        # The reader left (`| head`): nobody to tell, and Python must not try to flush again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if interrupted or isinstance(error, KeyboardInterrupt):
        print("planner: interrupted; nothing was written", file=sys.stderr)
        return 130
    return _report(error)


def _report(error: BaseException) -> int:
    from planner.errors import UserError, one_line
    from planner.profiler.errors import TraceError

    if isinstance(error, UserError | TraceError):
        print(f"planner: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, UserError) else 2
    if isinstance(error, OSError) and error.filename is None and sys.stdout is not None:
        print(f"planner: cannot write the answer: {error.strerror}", file=sys.stderr)
        return 2
    if os.environ.get("PLANNER_DEBUG"):
        import traceback

        traceback.print_exception(error)
    text = one_line(f"{type(error).__name__}: {error}")
    print(f"planner: a bug of ours: {text}; please report it with PLANNER_DEBUG=1's traceback", file=sys.stderr)
    return 1
