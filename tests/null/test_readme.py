"""The README says what the code does: executed options, exit codes, the test command of CI."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

from planner.cli import VERBS
from planner.costmodel.presets import cluster_from_table
from planner.errors import BUG, INFEASIBLE, INTERRUPTED, OK, STALE, USAGE
from planner.runtime.support import COMBINATIONS, OPTIONS

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
ROW = re.compile(r"^\| `(\w+)`: (.*) \| (\w+) \| (\w+) \| (\w+) \| (.*) \|$")


def executed(name: str) -> str:
    """What the last column says of an option."""
    reason = next(option.reason for option in OPTIONS if option.name == name)
    return f"no: {reason}" if reason else "yes"


def together() -> str:
    """The line under the table about options that do not run together."""
    return "Not executed together: " + "; ".join(f"{' with '.join(c.names)} ({c.reason})" for c in COMBINATIONS) + "."


def test_feature_table_is_the_runtimes() -> None:
    lines = README.read_text().splitlines()
    if os.environ.get("UPDATE_GOLDEN"):
        for i, line in enumerate(lines):
            match = ROW.match(line)
            if match:
                lines[i] = f"{line[: line.rindex('| ', 0, -2)]}| {executed(match[1])} |"
            elif line.startswith("Not executed together: "):
                lines[i] = together()
        README.write_text("\n".join(lines) + "\n")
    rows = {match[1]: match[6] for line in lines if (match := ROW.match(line))}
    assert rows == {option.name: executed(option.name) for option in OPTIONS}
    assert together() in lines


def test_every_verb_and_exit_code_is_explained() -> None:
    text = README.read_text()
    assert all(f"`planner {verb}" in text for verb in VERBS)
    for code in (OK, BUG, USAGE, INFEASIBLE, STALE, INTERRUPTED, 5):
        assert re.search(rf"^\| {code} \| ", text, re.MULTILINE)


def test_the_example_cluster_loads() -> None:
    block = re.search(r"```toml\n(.*?)```", README.read_text(), re.DOTALL)
    assert block is not None
    cluster = cluster_from_table(tomllib.loads(block[1]))
    assert (cluster.name, cluster.node_size, len(cluster.tiers)) == ("mine", 8, 2)


def test_ci_runs_the_readmes_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    pick = re.search(r"command=\$\((.*)\)$", script, re.MULTILINE)
    assert pick is not None
    done = subprocess.run(["bash", "-c", pick[1]], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    for part in ("-c constraints.txt", "ruff check", "mypy", "pytest"):
        assert part in done.stdout
    assert len(done.stdout.splitlines()) == 1
