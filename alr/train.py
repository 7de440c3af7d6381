"""Train: one loop for every recipe, on one process or many.  `python -m alr.train --help` lists the flags.

    run = train(Config(recipe="alr", corpus="pydoc", epochs=3))
    run.model, run.log, run.adapter.ranks
"""

from __future__ import annotations

import sys
from typing import Callable

import torch

from . import recipes
from .adapt import Recipe
from .config import Config
from .loop import Loop, evaluate
from .run import Run, ended, load, opening, prepare
from .stop import Stop
from .workers import Workers

__all__ = ["Config", "Run", "evaluate", "load", "main", "train"]


def train(config: Config = Config(), recipe: Recipe | None = None, callback: Callable[[Run], None] | None = None,
          quiet: bool = False) -> Run:
    """Train as `config` says and return the run: .model, .corpus, .log (the JSONL lines), .adapter, .optimizer.

    recipe: a value, instead of the name in config.recipe, which then is only the run's label in its log.
    callback(run): called after every step (run.step says which), while the step's gradients are still there.
    quiet: no progress bar.

    ValueError and FileNotFoundError for settings that cannot be had, before any file is written.  FloatingPointError
    when the loss is no number any more.  Ctrl-C (and SIGTERM) stops after the step that is under way, writes a
    checkpoint if config.out is given, and raises KeyboardInterrupt; a second one stops at once.
    """
    workers = Workers()
    run = prepare(config, recipe, workers)
    if ended(run):                                      # resumed after its end: there is nothing left to do
        workers.stop()
        return run
    if not run.log:
        run.writer.write("run", **opening(run, config.recipe if recipe is not None else None))
    loop = Loop(run, workers, callback, quiet)
    try:
        with Stop(patience=2.0 if workers.size > 1 else 0.0) as stop:
            loop.go(stop)
    except KeyboardInterrupt:
        if loop.whole and run.running.isfinite():       # weights that have diverged replace no better ones
            loop.lap("work")
            loop.save()
        raise
    finally:
        loop.bar.close()
        run.writer.close()
        loop.net = None                                 # a DDP wrapper that outlives its process group may hang
        workers.stop()
    return run


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


if __name__ == "__main__":
    sys.exit(main())
