"""Train: one loop for every recipe, on one process or many.

    run = train(Config(recipe="alr", corpus="pydoc", epochs=3))
    run.model, run.log, run.adapter.ranks
"""

from __future__ import annotations

from collections.abc import Callable

from ..adapt import Recipe
from .config import Config
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
        workers.stop()
    return run
