"""planner env: versions and hashes, for bug reports."""

from __future__ import annotations

import argparse
import os
import platform
from importlib import metadata

from planner.commands import arguments
from planner.provenance import cost_model_sha256, space_sha256, tool_version
from planner.render import Grid, Report

_PACKAGES = (
    "torch", "numpy", "msgspec", "rich", "highspy", "pulp", "ortools", "networkx", "pandas", "matplotlib",
    "transformers",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    arguments.add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Print the versions."""
    facts = {
        "planner": tool_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": str(os.cpu_count()),
        **{name: _version(name) for name in _PACKAGES},
        "cost_model_sha256": cost_model_sha256(),
        "space_sha256": space_sha256(),
    }
    grid = Grid(columns=("<what", "<version"), rows=tuple(facts.items()))
    arguments.answer(Report(parts=(grid,), data={"schema": "planner.env/1", **facts}), args)
    return 0


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
