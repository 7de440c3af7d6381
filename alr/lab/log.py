"""The log of a run: one JSON object per line, written at once; the first says what was run, the last seals the rest."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]         # alr/


def digest(lines: Sequence[str]) -> str:
    """SHA-256 of the text of the lines, joined by newlines."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class Log:
    """Lines in memory and, where a path is given, in a file, which holds every line as soon as it is written.

    The file is made with the first line.  A file of that name that holds another run is moved aside, never overwritten:
    log.jsonl becomes log.1.jsonl.  `lines`: those of a checkpoint, to go on from.
    """

    def __init__(self, path: str | Path | None = None, lines: Sequence[str] = ()):
        self.path = Path(path) if path is not None else None
        self.lines = list(lines)
        self.records = [json.loads(line) for line in self.lines]
        self._file = None

    def write(self, kind: str, **values) -> dict:
        """Add one line and flush it.  ValueError for a number that is not finite: JSON has none."""
        return self._add({"kind": kind, **values})

    def end(self, **values) -> dict:
        """The last line: values, and the digest of all lines before it."""
        return self._add({"kind": "end", **values, "digest": digest(self.lines)})

    def _add(self, record: dict) -> dict:
        line = json.dumps(record, allow_nan=False)
        self._open()
        self.lines.append(line)
        self.records.append(record)
        if self._file is not None:
            self._file.write(line + "\n")
            self._file.flush()
        return record

    def _open(self) -> None:
        if self.path is None or self._file is not None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size and not self._same_run():
            names = (self.path.with_name(f"{self.path.stem}.{n}{self.path.suffix}") for n in itertools.count(1))
            aside = next(name for name in names if not name.exists())
            os.replace(self.path, aside)
            print(f"log: {self.path} held another run; that is now {aside}.", file=sys.stderr)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text("".join(line + "\n" for line in self.lines), encoding="utf-8")
        os.replace(part, self.path)
        self._file = open(self.path, "a", encoding="utf-8")

    def _same_run(self) -> bool:
        with open(self.path, encoding="utf-8", errors="replace") as file:
            return bool(self.lines) and file.readline().rstrip("\n") == self.lines[0]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def provenance() -> dict:
    """Which code is this?  commit and dirty (changes under alr/; both None outside a git checkout of this project),
    source (a hash over alr/*.py, which a copy without git has too), alr, torch, python."""
    import torch

    import alr
    commit = dirty = None
    top = _git("rev-parse", "--show-toplevel")
    if top is not None and Path(top).resolve() == PACKAGE.parent:
        commit = _git("rev-parse", "HEAD")
        status = _git("status", "--porcelain", "--", "alr")
        dirty = None if status is None else bool(status)
    source = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        source.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return {"commit": commit, "dirty": dirty, "source": source.hexdigest()[:16], "alr": alr.__version__,
            "torch": str(torch.__version__), "python": sys.version.split()[0]}


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(PACKAGE), *args], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
