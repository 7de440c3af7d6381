"""The log of a run: one JSON object per line, written at once; the first says what was run, the last seals the rest."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from .config import SettingError, naming
from .files import in_place, open_locked

PACKAGE = Path(__file__).resolve().parents[1]         # alr/
SEED_KEYS = ("epoch", "train_loss", "val_loss", "rank_min", "rank_max", "rank_avg", "ranks", "params_millions", "time_sec")
BEGINS = ('{"kind": "run"', '{"epoch": 1, "train_loss"')        # how a log begins: ours, that of the original's scripts
LONG = 1 << 20                          # characters of a first line that are looked at


def digest(lines: Sequence[str]) -> str:
    """SHA-256 of the text of the lines, joined by newlines."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class Lines:
    """Lines in memory and, where a path is given, in a file, which holds every line as soon as it is written.

    The file is made by `open`, or with the first line, and held by a lock until `close`: another process that would
    write to it is refused.  A file of that name that holds another run is moved aside, never overwritten: log.jsonl
    becomes log.1.jsonl.  One that holds anything else is refused and left as it is.  A link stays a link; a device or a
    pipe is written to in place.  `lines`: those of a checkpoint, to go on from.  setting: what the path is called.
    """

    def __init__(self, path: str | Path | None = None, lines: Sequence[str] = (), setting: str = "log_file"):
        self.path = Path(path) if path is not None else None
        self.lines, self.setting = list(lines), setting
        self._file = None

    def check(self) -> None:
        """SettingError where `open` would refuse what lies there now; nothing is made or changed."""
        with naming(self.setting, self.path):
            if self.path is None or in_place(self.path) or not self.path.exists():
                return
            if self.path.is_dir():
                raise SettingError(f"{{{self.setting}}} {self.path} is a folder; wanted the path of a file.")
            with open(self.path, encoding="utf-8", errors="replace", newline="\n") as file:
                self._check(file.readline(LONG))

    def _check(self, first: str) -> None:
        if first and not any(first.startswith(begin) or begin.startswith(first) for begin in BEGINS):   # or cut off in it
            raise SettingError(f"{{{self.setting}}} {self.path} is there and is no log of a run; it is left as it is. "
                               "Write another name.")

    def add(self, line: str) -> None:
        """Add one line; it is in the file when this returns.  OSError, with the file's name, when it cannot be."""
        self.open()
        self.lines.append(line)
        self._put(line + "\n")

    def _put(self, text: str) -> None:
        if self._file is not None:
            try:
                self._file.write(text)
                self._file.flush()
            except OSError as error:
                error.filename = str(self.path)
                raise

    def open(self) -> None:
        """Make the file, with the lines so far; nothing happens if it is open, or if there is no path."""
        if self.path is None or self._file is not None:
            return
        with naming(self.setting, self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if in_place(self.path):
                self._file = open(self.path, "a", encoding="utf-8", newline="\n")
        if self._file is not None:
            self._put("".join(line + "\n" for line in self.lines))
            return
        path = Path(os.path.realpath(self.path))
        file = self._locked(path)
        first = file.readline(LONG)
        if first and self.lines and first.rstrip("\n") == self.lines[0]:
            part = self._locked(path.with_name(f".{path.name}.part"))
            part.truncate(0)
            part.write("".join(line + "\n" for line in self.lines))
            part.flush()
            os.replace(path.with_name(f".{path.name}.part"), path)
            file.close()
            self._file = part
            return
        if first:
            try:
                self._check(first)
            except SettingError:
                file.close()
                raise
            names = (path.with_name(f"{path.stem}.{n}{path.suffix}") for n in itertools.count(1))
            aside = next(name for name in names if not name.exists())
            os.replace(path, aside)
            file.close()
            print(f"log: {self.path} held another run; that is now {aside}.", file=sys.stderr)
            file = self._locked(path)
        self._file = file
        self._put("".join(line + "\n" for line in self.lines))

    def _locked(self, path: Path) -> TextIO:
        with naming(self.setting, self.path):
            file = open_locked(path)
        if file is None:
            raise SettingError(f"{{{self.setting}}} {self.path} is being written by another process; wait for its end, or "
                               "write another name.")
        return file

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):          # of a full disk, which `add` has reported
                self._file.close()
            self._file = None


class Log(Lines):
    """The lines of one run, as text and parsed (`records`)."""

    def __init__(self, path: str | Path | None = None, lines: Sequence[str] = ()):
        super().__init__(path, lines)
        self.records = [json.loads(line) for line in self.lines]

    def write(self, kind: str, **values) -> dict:
        """Add one line and flush it.  ValueError for a number that is not finite: JSON has none."""
        return self._add({"kind": kind, **values})

    def end(self, **values) -> dict:
        """The last line: values, and the digest of all lines before it."""
        return self._add({"kind": "end", **values, "digest": digest(self.lines)})

    def _add(self, record: dict) -> dict:
        line = json.dumps(record, allow_nan=False)
        self.records.append(record)
        self.add(line)
        return record


def is_line(text: str) -> bool:
    """Is this a line of a log: a JSON object that says of which kind it is?"""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and isinstance(found.get("kind"), str)


def seed_line(epoch: dict) -> str:
    """An `epoch` line as the original scripts write it: their nine keys, in their order, and no other."""
    return json.dumps({key: epoch[key] for key in SEED_KEYS})


def provenance() -> dict:
    """Which code is this?  commit and dirty (changes under alr/; both None outside a git checkout of this project),
    source (a hash over alr/*.py, which a copy without git has too), alr, torch, python."""
    import torch

    import alr
    commit = dirty = None
    top = _git("rev-parse", "--show-toplevel")
    if top is not None and Path(top).resolve() == PACKAGE.parent:
        commit = _git("rev-parse", "HEAD")
        status = _git("status", "--porcelain", "--", ".")      # of PACKAGE, where git is called
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
