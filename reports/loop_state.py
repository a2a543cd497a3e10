"""What a closed loop has done so far, kept on disk so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from planner.costmodel.profile import Profile, encode_profile
from planner.errors import UserError
from planner.files import read_profile, write_atomic


@dataclass(slots=True)
class Progress:
    """Profiles by name, and results by plan and round, in `folder`; equal options make equal keys."""

    folder: Path
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, options: dict[str, Any], again: bool) -> Progress:
        """Go on with `folder` if `again` and it is there; UserError if it was made with other options."""
        folder.mkdir(parents=True, exist_ok=True)
        stamp, path = folder / "options.json", folder / "runs.jsonl"
        text = json.dumps(options, sort_keys=True)
        if not again:
            for old in (*folder.glob("profile-*.json"), stamp, path):
                old.unlink(missing_ok=True)
        elif stamp.exists() and stamp.read_text() != text:
            raise UserError(f"{folder}: made with {stamp.read_text()}: resume with these options, or without --resume")
        stamp.write_text(text)
        done = path.read_text().splitlines() if path.exists() else []
        return cls(folder, {line["key"]: line["found"] for line in map(json.loads, filter(_whole, done))})

    def profile(self, name: str) -> Profile | None:
        """A profile that was finished."""
        path = self.folder / f"profile-{name}.json"
        return read_profile(path) if path.exists() else None

    def keep_profile(self, name: str, profile: Profile) -> None:
        """Note a finished profile."""
        write_atomic(self.folder / f"profile-{name}.json", encode_profile(profile))

    def keep(self, key: str, found: dict[str, Any]) -> None:
        """Note a result at once."""
        self.runs[key] = found
        with (self.folder / "runs.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "found": found}) + "\n")

    def clear(self) -> None:
        """The loop is done: nothing is left to go on with."""
        for path in (*self.folder.glob("profile-*.json"), self.folder / "options.json", self.folder / "runs.jsonl"):
            path.unlink(missing_ok=True)
        self.folder.rmdir()


def _whole(line: str) -> bool:
    """Whether a line was written to its end before the interruption."""
    return line.endswith("}}")


def run_key(plan: bytes, number: int) -> str:
    """Key of a run: the plan, which holds its profile's hash, and the round."""
    return f"{hashlib.sha256(plan).hexdigest()[:16]}/{number}"
