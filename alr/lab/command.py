"""The command line of training: `python -m alr.train --help` lists the flags."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass

import torch

from .. import recipes
from . import checkpoint
from .config import Config, NamesSettings, flag, with_flags
from .stop import listen
from .training import train


@dataclass(frozen=True)
class Flags(Config):
    __doc__ = Config.__doc__

    def __post_init__(self):
        """Nothing is refused while the flags are read: what tyro says of a ValueError names no flag."""


def table() -> str:
    """The recipes and their axes, one line each."""
    def short(text):
        return text.split("(")[0] if text else "-"
    columns = ("name", "every", "gradient", "estimate", "control", "resize", "state", "op", "about")
    rows = [columns] + [tuple(r[c] if c in ("name", "every", "about") else short(r[c]) for c in columns)
                        for r in recipes.table()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def say(text: object) -> None:
    with contextlib.suppress(OSError):                  # after SIGHUP there is no terminal
        print(f"train: {text}", file=sys.stderr)


def after(config: Config | None) -> str:
    """What to do after an interruption: go on, where there is something to go on from."""
    if config is None:
        return "nothing was begun"
    if config.out is None:
        return f"nothing was kept, {flag('out')} FOLDER would have kept checkpoints"
    if not checkpoint.exists(config.out):
        return f"no checkpoint was written to {config.out} yet"
    return f"go on with {flag('resume')}"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 1 for what cannot be done, 130 when interrupted."""
    listen()
    config = None
    try:
        import tyro
        config = Config(**vars(tyro.cli(Flags, prog="python -m alr.train", args=argv)))
        if config.recipe == "list":
            print(table())
            return 0
        for note in config.unread():
            say(f"note: {with_flags(note)}")
        run = train(config)
    except KeyboardInterrupt:
        say(f"interrupted; {after(config)}.")
        return 130
    except ImportError as error:
        if error.name != "tyro":
            raise
        say("the command line needs tyro (pip install tyro); from Python: from alr.lab import Config, train")
        return 1
    except (ValueError, OSError, ArithmeticError, MemoryError, torch.OutOfMemoryError) as error:
        say(error.on_command_line if isinstance(error, NamesSettings) else error or type(error).__name__)
        return 1
    except RuntimeError as error:                       # torch has no class of its own for these
        first = str(error).partition("\n")[0]
        if "alloc" in str(error):
            say(f"not enough memory: {first}")
        elif "gloo" in first or "nccl" in first.lower():
            say(f"another process of this run has ended or cannot be reached ({first}); {after(config)}.")
        else:
            raise
        return 1
    last = run.log[-1] if run.log else {}
    if run.leads and last.get("kind") == "end":
        ranks = last["ranks"].values()
        print(f"{run.log[0]['name']}: validation {last['val_loss']:.4f} nats per token, "
              f"{last['val_bpb']:.4f} bits per byte; {last['params']['total'] / 1e6:.2f} M parameters"
              + (f", ranks {min(ranks)} to {max(ranks)}" if ranks else "")
              + (f"; log in {run.writer.path}" if run.writer.path else ""))
    return 0
