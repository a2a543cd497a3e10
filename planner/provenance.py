"""What a result came from: the tool's version and hashes of the code that priced it. Reads installed files."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import metadata
from pathlib import Path

_HERE = Path(__file__).parent


def tool_version() -> str:
    """Version of the installed distribution."""
    try:
        return metadata.version("planner-parallel")
    except metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return "0+uninstalled"


def _files_sha256(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


@cache
def cost_model_sha256() -> str:
    """Hash of the cost model's source; device and link constants are in the cluster's own hash."""
    return _files_sha256(sorted((_HERE / "costmodel").glob("*.py")))


def space_sha256() -> str:
    """Hash of the code that declares the plan space."""
    return _files_sha256([_HERE / "space.py", _HERE / "stages.py", _HERE / "costmodel" / "strategy.py"])
