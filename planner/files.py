"""Reading with a limit and writing all or nothing. Every failure is one line with the path and the way out."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from planner.costmodel.profile import MAX_BYTES as PROFILE_MAX_BYTES
from planner.costmodel.profile import Profile, ProfileError, decode_profile
from planner.errors import StalePlanError, UserError
from planner.plan import MAX_BYTES, Plan, decode_plan


def read_plan(path: Path) -> Plan:
    """The plan at `path`; UserError if it cannot be read, PlanFileError or StalePlanError for what it holds."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot read the plan: {error.strerror}") from None
    return decode_plan(data, str(path))


def read_profile(path: Path) -> Profile:
    """The profile at `path`; UserError or StalePlanError of one line if it cannot be used."""
    try:
        with path.open("rb") as file:
            data = file.read(PROFILE_MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot read the profile: {error.strerror}") from None
    try:
        return decode_profile(data, str(path))
    except ProfileError as error:
        raise (StalePlanError if error.stale else UserError)(str(error)) from None


def check_writable(path: Path) -> None:
    """UserError, before any long work, if `path` cannot be written as it stands."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give a file with -o")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is not a regular file; give a file with -o")
    if not path.parent.is_dir():
        raise UserError(f"{path}: no folder {path.parent}; make it or give another file with -o")
    writable = os.access(path.parent, os.W_OK) and (not path.exists() or os.access(path, os.W_OK))
    if not writable:
        raise UserError(f"{path}: no right to write there; give another file with -o")


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either what it held or all of it, also after a crash.

    Temporary file in the same folder, fsync, rename over `path`, fsync of the folder. UserError if anything
    fails; the temporary file is gone then, also after Ctrl-C.
    """
    check_writable(path)
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise UserError(f"{path}: not written: {error.strerror}; nothing is left behind") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
