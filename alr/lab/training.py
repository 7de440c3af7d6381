"""Train: one loop for every recipe, on one process or many.

    run = train(Config(recipe="alr", corpus="pydoc", epochs=3))
    run.model, run.log, run.adapter.ranks
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ..adapt import Recipe
from . import checkpoint
from .config import Config, SettingError, naming
from .files import held
from .loop import Loop
from .processes import Workers
from .run import Run, ended, opening, prepare
from .stop import Stop


def train(config: Config = Config(), recipe: Recipe | None = None, callback: Callable[[Run], None] | None = None,
          quiet: bool = False) -> Run:
    """Train as `config` says and return the run: .model, .corpus, .log (the JSONL lines), .adapter, .optimizer.

    recipe: a value, instead of the name in config.recipe, which then is only the run's label in its log.
    callback(run): called after every step (run.step says which), while the step's gradients are still there.
    quiet: no progress bar.

    ValueError and FileNotFoundError for settings that cannot be had, before any file is written.  FloatingPointError
    when the loss is no number any more.  Ctrl-C (and SIGTERM, and SIGHUP) stops after the step that is under way, writes
    a checkpoint if config.out is given, and raises KeyboardInterrupt; a second one stops at once.  config.out and the log
    are held while this goes on: another process that would write there is refused.
    """
    workers = Workers()
    with contextlib.ExitStack() as stack:
        stack.callback(workers.stop)
        folder = Path(config.out) if config.out is not None and workers.rank == 0 else None
        if folder is not None and os.path.isdir(folder):        # before anything there is read
            stack.enter_context(claim(folder))
        run = prepare(config, recipe, workers)
        if ended(run):                                  # resumed after its end: there is nothing left to do
            return run
        if folder is not None and not os.path.isdir(folder):
            stack.enter_context(claim(folder))
            if checkpoint.exists(folder):               # another process was here between our look and our claim
                raise SettingError(f"{{out}}: {folder} holds a checkpoint already; choose another folder.")
        stack.callback(run.writer.close)
        stack.callback(run.seed_log.close)
        run.writer.open()
        run.seed_log.open()
        if not run.log:
            run.writer.write("run", **opening(run, config.recipe if recipe is not None else None))
        loop = Loop(run, workers, callback, quiet)
        stack.callback(loop.bar.close)
        try:
            with Stop(patience=2.0 if workers.size > 1 else 0.0) as stop:
                loop.go(stop)
        except KeyboardInterrupt:
            if loop.whole and run.running.isfinite():   # weights that have diverged replace no better ones
                loop.lap("work")
                loop.save()
            raise
    return run


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """A context in which this process alone writes to a folder, which is made, and goes again if it is left empty."""
    with naming("out", folder):
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
    with held(folder) as mine:
        if not mine:
            raise SettingError(f"{{out}} {folder} is in use by another process; wait for its end, or choose another folder.")
        try:
            yield
        finally:
            if made:
                with contextlib.suppress(OSError):      # it is not empty, as a rule
                    folder.rmdir()
