"""Who may import whom (the map in the house style), and that `planner --help` stays light."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = ("costmodel", "profiler", "runtime", "kernels", "reports")
# What the modules of a layer may import of planner.*, and which outside packages they may not.
ALLOWED = {
    "costmodel": ("planner.costmodel",),
    "kernels": ("planner.kernels",),
    # The recorder asks the kernels' registry for FLOPs and bytes, and the kernels are timed; kernels imports nobody.
    # What the runtime costs the host is measured by running it (runtime_bench.py).
    "profiler": ("planner.profiler", "planner.costmodel", "planner.kernels", "planner.runtime.apply",
                 "planner.runtime.optimizer", "planner.runtime.parallel", "planner.runtime.zero"),
    "planner": ("planner.",),
    "runtime": ("planner.runtime", "planner.costmodel", "planner.kernels", "planner.plan", "planner.errors",
                "planner.files", "planner.check", "planner.profiler.load", "planner.profiler.hf",
                "planner.profiler.errors",
                "planner.dispatch", "planner.ahead", "planner.menus"),
    "reports": ("planner",),
}  # fmt: skip
# planner/ imports costmodel only; its command line alone reaches for the others, inside functions.
OTHERS = ("planner.profiler", "planner.runtime", "planner.kernels", "planner.reports")
COSTMODEL_OUTSIDE = {"numpy"}
HEAVY = {"torch", "pandas", "matplotlib", "numpy", "pulp", "highspy", "ortools", "networkx", "msgspec", "rich", "scipy"}
PLANNER_OUTSIDE = {"numpy", "msgspec", "rich", "highspy"}  # highspy inside a function: see the verbs below


def layer_of(path: Path) -> str:
    top = path.relative_to(ROOT).parts[0]
    return top if top in LAYERS else "planner"


def sources() -> list[Path]:
    folders = [ROOT / name for name in (*LAYERS, "planner")]
    found = [path for folder in folders for path in folder.rglob("*.py")]
    return [path for path in found if not any(parent.is_symlink() for parent in path.parents)]


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, whether at the top of the file outside TYPE_CHECKING) of every import."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    found: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            whole = node.module != "planner"
            names = [str(node.module)] if whole else [f"planner.{alias.name}" for alias in node.names]
            found += [(name, id(node) in top) for name in names]
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    layer = layer_of(path)
    commands = layer == "planner" and (path.name == "cli.py" or path.parent.name == "commands")
    for module, at_top in imports(path):
        if module.split(".")[0] != "planner":
            continue
        assert module == "planner" or module.startswith(ALLOWED[layer]), f"{path}: {layer} imports {module}"
        if layer == "planner" and module.startswith(OTHERS):
            assert commands and not at_top, f"{path}: only the command line imports {module}, and inside a function"


@cache
def defined(module: str) -> set[str]:
    """Names that a module of ours has at its top, inside `if` and `try` too, and the modules below it."""
    parts = module.split(".")[1:]
    path = ROOT.joinpath(*parts) if parts and parts[0] in LAYERS else ROOT.joinpath("planner", *parts)
    found = {child.stem for child in path.iterdir()} if path.is_dir() else set()
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for statement in ast.parse(file.read_text()).body if file.exists() else ():
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            found.add(statement.name)
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_of_ours_names_what_is_there(path: Path) -> None:
    """Reports that no test runs, above all: they would say so only when somebody wants to measure."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "planner":
            for alias in node.names:
                assert alias.name in defined(node.module), f"{path}: {node.module} has no {alias.name}"


def test_every_layer_was_looked_at() -> None:
    seen = {layer_of(path) for path in sources()}
    assert seen == {*LAYERS, "planner"}
    assert any(path.name == "simulate.py" for path in sources())


@pytest.mark.parametrize("layer", ["costmodel", "planner"])
def test_outside_packages(layer: str) -> None:
    allowed = COSTMODEL_OUTSIDE if layer == "costmodel" else PLANNER_OUTSIDE
    standard = sys.stdlib_module_names | {"planner", "__future__"}
    for path in (p for p in sources() if layer_of(p) == layer):
        outside = {module.split(".")[0] for module, _ in imports(path)} - standard - allowed
        assert not outside, f"{path} imports {outside}"


def test_every_package_is_shipped() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in sources()}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(listed) == {name if name.startswith("planner") else f"planner.{name}" for name in names}


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_help_imports_nothing_heavy() -> None:
    code = f"import sys; from planner.cli import entry; entry(['--help']); print({HEAVY!r} & set(sys.modules))"
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("verb", ["search", "estimate", "explain", "diff", "check", "dispatch", "cluster", "env"])
def test_verbs_import_no_torch_pandas_or_solver(verb: str) -> None:
    heavy = HEAVY - {"numpy", "msgspec", "rich"}
    show = f"print({heavy!r} & set(sys.modules))"
    code = f"import sys; from planner.cli import entry; entry(['{verb}', '--help']); {show}"
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"


def test_help_takes_less_than_300_ms_of_cpu() -> None:
    def cpu_s() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run("from planner.cli import entry; entry(['--help'])")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_s() for _ in range(3)) <= 0.3
