"""The command line of training: `python -m alr.train --help` lists the flags."""

from __future__ import annotations

import sys

import torch

from .. import recipes
from .config import Config
from .training import train


def table() -> str:
    """The recipes and their axes, one line each."""
    def short(text):
        return text.split("(")[0] if text else "-"
    columns = ("name", "every", "gradient", "estimate", "control", "resize", "state", "op", "about")
    rows = [columns] + [tuple(r[c] if c in ("name", "every", "about") else short(r[c]) for c in columns)
                        for r in recipes.table()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 1 for what cannot be done, 130 when interrupted."""
    try:
        import tyro
    except ImportError:
        print("train: the command line needs tyro (pip install tyro); from Python: from alr.train import Config, train",
              file=sys.stderr)
        return 1
    try:
        config = tyro.cli(Config, prog="python -m alr.train", args=argv)
        if config.recipe == "list":
            print(table())
            return 0
        run = train(config)
    except KeyboardInterrupt:
        hint = "go on with --resume" if config.out else "with --out it could go on from here"
        print(f"train: interrupted; {hint}.", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    last = run.log[-1] if run.log else {}
    if run.leads and last.get("kind") == "end":
        ranks = last["ranks"].values()
        print(f"{run.log[0]['name']}: validation {last['val_loss']:.4f} nats per token, "
              f"{last['val_bpb']:.4f} bits per byte; {last['params']['total'] / 1e6:.2f} M parameters"
              + (f", ranks {min(ranks)} to {max(ranks)}" if ranks else "")
              + (f"; log in {run.writer.path}" if run.writer.path else ""))
    return 0
