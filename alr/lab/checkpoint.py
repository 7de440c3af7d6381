"""Checkpoints: a folder with the weights (safetensors) and all else that a run needs to go on (state.pt).

state.pt names the weights that belong to it and is replaced last, in one rename: a folder that was cut off at any
moment holds the old pair or the new one.  With keep > 1 the states before it stay as state-STEP.pt, each with its weights.

Nothing is believed unread.  state.pt ends in a seal, as the comment of its zip archive, so that torch.load reads it as
before: the format's number, the step, the weights' name and the SHA-256 of all bytes before that; the state holds the
weights' SHA-256.  Both load without running code: safetensors, torch.load(weights_only=True).

Only files of our own are ever replaced or deleted: states with a seal, weights whose header says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from .config import MissingFile
from .files import fresh, put, replacing

STATE = "state.pt"
PARTS = (".state.part", ".model.part", ".older.part")           # files that are being written
FORMAT = 1
MARK = {"alr": "checkpoint"}            # in the header of our weights; one entry, for the order of two is not fixed
WEIGHTS = re.compile(r"model-\d{8,}(\.\d+)?\.safetensors")
OLDER = re.compile(r"state-\d{8,}\.pt")
SEAL = re.compile(rb"alr-checkpoint (\d+) (\d+) (\S+) ([0-9a-f]{64})$")
DIGEST = 64                             # hexadecimal digits at the end of a seal


class Seal(NamedTuple):
    format: int
    step: int
    weights: str
    digest: str


def save(folder: str | Path, model: nn.Module, state: dict, step: int, keep: int = 1) -> None:
    """Write the model and the state of `step`; the last `keep` pairs stay, older ones go when the new pair stands.

    OSError, with the pair before untouched, when it cannot be written (a full disk).
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        weights, digest = _save_weights(folder, model, step)
        with replacing(folder / STATE, PARTS[0]) as part:
            torch.save({**state, "weights": weights.name, "weights_digest": digest}, part)
            _seal(part, step, weights.name)
            if keep > 1:
                _keep(folder)
    except Exception as error:                          # safetensors and torch raise what they like on a full disk
        raise OSError(f"checkpoint of step {step} could not be written to {folder} ({_short(error)}); what stood there "
                      "before still stands.") from error
    _prune(folder, keep)


def _save_weights(folder: Path, model: nn.Module, step: int) -> tuple[Path, str]:
    """(the file of the weights, its SHA-256).  A file of that name with other content is left for who needs it."""
    from safetensors.torch import save_file
    tensors, seen = {}, set()
    for name, x in model.state_dict().items():
        place = (x.data_ptr(), x.shape, x.stride())
        if x.numel() == 0 or place not in seen:         # a tied matrix is written once
            seen.add(place)
            tensors[name] = x.contiguous()
    new = folder / PARTS[1]
    try:
        fresh(new)
        mode = new.stat().st_mode                       # as any file of the user's; safetensors would hide it from others
        save_file(tensors, str(new), metadata=MARK)
        new.chmod(mode)
        digest = sha256(new)
        names = (folder / f"model-{step:08d}{f'.{n}' if n else ''}.safetensors" for n in itertools.count())
        weights = next(path for path in names if not path.exists() or path.is_file() and sha256(path) == digest)
        put(new, weights)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    return weights, digest


def sha256(path: Path, size: int | None = None) -> str:
    """SHA-256 of a file, or of its first `size` bytes."""
    found, left = hashlib.sha256(), path.stat().st_size if size is None else size
    with open(path, "rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            found.update(block)
            left -= len(block)
    return found.hexdigest()


def _seal(path: Path, step: int, weights: str) -> None:
    """Give a zip archive its comment: the seal over all bytes before its digest."""
    comment = f"alr-checkpoint {FORMAT} {step} {weights} ".encode()
    with open(path, "rb+") as file:
        file.seek(-2, os.SEEK_END)                      # the last field of an archive: how long its comment is
        file.write(struct.pack("<H", len(comment) + DIGEST) + comment)
    digest = sha256(path).encode()
    with open(path, "ab") as file:
        file.write(digest)


def seal(path: Path) -> Seal | None:
    """The seal of a state, read and not yet checked; None for a file that has none."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 512))
        found = SEAL.search(file.read())
    return found and Seal(int(found[1]), int(found[2]), found[3].decode(errors="replace"), found[4].decode())


def _keep(folder: Path) -> None:
    """Give the state that is there a second name, under which it stays."""
    now = seal(folder / STATE)
    if now is None:
        return
    older = folder / f"state-{now.step:08d}.pt"
    if not older.exists():
        try:
            os.link(folder / STATE, older)
        except OSError:                                 # a file system without links
            with replacing(older, PARTS[2]) as part:
                shutil.copyfile(folder / STATE, part)


def older(folder: str | Path) -> list[tuple[int, Path]]:
    """(step, file) of the states that were kept beside state.pt, the latest first."""
    found = [(seal(path), path) for path in Path(folder).glob("state-*.pt") if OLDER.fullmatch(path.name)]
    return sorted(((s.step, path) for s, path in found if s is not None), reverse=True)


def _prune(folder: Path, keep: int) -> None:
    """Delete what nobody needs any more, of our own alone."""
    latest, there = seal(folder / STATE), older(folder)
    kept = [path for step, path in there if step != latest.step][:keep - 1]
    with contextlib.suppress(OSError):                  # what cannot be deleted stays; the new pair stands
        for _, path in there:
            if path not in kept:
                path.unlink()
        used = {latest.weights, *(s.weights for path in kept if (s := seal(path)))}
        for path in _our_weights(folder):
            if path.name not in used:
                path.unlink()


def _our_weights(folder: Path) -> Iterator[Path]:
    for path in folder.glob("model-*.safetensors"):
        if WEIGHTS.fullmatch(path.name) and path.is_file() and not path.is_symlink() and _marked(path):
            yield path


def _marked(path: Path) -> bool:
    """Does the header of a safetensors file say that it is ours?"""
    try:
        with open(path, "rb") as file:
            size, = struct.unpack("<Q", file.read(8))
            return size < 1 << 26 and json.loads(file.read(size)).get("__metadata__") == MARK
    except (OSError, ValueError, struct.error, AttributeError):
        return False


def is_ours(name: str) -> bool:
    """Is this how a file of a checkpoint is called?"""
    return name in (STATE, *PARTS) or any(pattern.fullmatch(name) for pattern in (WEIGHTS, OLDER))


def exists(folder: str | Path) -> bool:
    return (Path(folder) / STATE).exists()


def load(folder: str | Path) -> dict:
    """The state, with everything on the CPU.  FileNotFoundError without a checkpoint, ValueError for one that is broken,
    foreign or of a newer alr."""
    path = Path(folder) / STATE
    if not path.exists():
        raise MissingFile(f"no checkpoint in {folder} ({STATE} is not there); leave out {{resume}} to start anew.")
    found = seal(path)
    if found is None:
        raise ValueError(f"{path} is no checkpoint of this program, or the end of it is missing{_advice(folder)}")
    if found.format > FORMAT:
        raise ValueError(f"{path} was written by a newer alr (format {found.format}, this one reads {FORMAT}); "
                         "go on with that version.")
    if sha256(path, path.stat().st_size - DIGEST) != found.digest:
        raise ValueError(f"{path} is not as it was written: its SHA-256 differs{_advice(folder)}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:                      # whose text tells how to run it
        raise ValueError(f"{path} holds more than tensors and plain values, which could run code and is not read"
                         f"{_advice(folder)}") from None
    except Exception as error:                          # torch raises whatever the bytes made it do
        raise ValueError(f"{path} cannot be read ({_short(error)}){_advice(folder)}") from error


def load_weights(folder: str | Path, state: dict, model: nn.Module) -> None:
    """Put the weights of `state` into the model, in place; low-rank layers take the saved ranks.

    ValueError when they are not there, not as they were written, or another model's.
    """
    from safetensors.torch import load_model
    path = Path(folder) / state["weights"]
    if not path.is_file():
        raise ValueError(f"{path}, which belongs to {STATE}, is not there{_advice(folder)}")
    if sha256(path) != state["weights_digest"]:
        raise ValueError(f"{path} is not as it was written: its SHA-256 differs{_advice(folder)}")
    try:
        load_model(model, str(path))
    except Exception as error:                          # RuntimeError of torch, SafetensorError
        raise ValueError(f"{path} does not fit the model of these settings ({_short(error)}).") from error


def _advice(folder: str | Path) -> str:
    """What to do instead, as the end of a sentence."""
    kept = older(folder)
    if not kept:
        return "; start anew in another folder."
    step, path = kept[0]
    return f"; go on from step {step}, which was kept: mv {path} {path.with_name(STATE)}"


def _short(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
