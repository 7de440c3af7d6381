"""Records of earlier code: kept with their verdicts, named with what has changed since.  Read from data/archive.toml.

    [[earlier]]
    suite = "evolution"
    arms = ["v3", "v4"]
    since = 2026-11-26                  # when the code changed
    why = "The recipes equal their scripts to the letter now; these runs were made by an earlier reading of them."

An entry goes when its arms are recorded anew.
"""

from __future__ import annotations

import datetime
import tomllib
from dataclasses import dataclass
from pathlib import Path

from .paths import DATA

ARCHIVE = DATA / "archive.toml"


@dataclass(frozen=True)
class Earlier:
    """Arms of one suite whose records today's code would not repeat."""

    suite: str
    arms: tuple[str, ...]
    since: datetime.date
    why: str


def load(path: Path = ARCHIVE) -> list[Earlier]:
    """All entries.  ValueError for one that lacks a field or has another."""
    if not path.exists():
        return []
    found = []
    for i, entry in enumerate(tomllib.loads(path.read_text(encoding="utf-8")).get("earlier", []), 1):
        if set(entry) != {"suite", "arms", "since", "why"} or not isinstance(entry["since"], datetime.date):
            raise ValueError(f"{path}, entry {i}: wanted suite, arms, since (a date) and why; found {', '.join(entry)}.")
        found.append(Earlier(entry["suite"], tuple(entry["arms"]), entry["since"], entry["why"]))
    return found


def arms(suite: str, path: Path = ARCHIVE) -> dict[str, Earlier]:
    """The archived arms of a suite."""
    return {arm: earlier for earlier in load(path) if earlier.suite == suite for arm in earlier.arms}
