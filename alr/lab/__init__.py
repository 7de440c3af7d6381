"""A training program for the book: corpora, models, optimizers by name, one loop, checkpoints, logs.

    from alr.lab import Config, train
    run = train(Config(recipe="alr", corpus="pydoc", epochs=3))
    run.model, run.log, run.adapter.ranks
"""

from .config import Config
from .loop import evaluate
from .run import Run, load
from .training import train

__all__ = ["Config", "Run", "evaluate", "load", "train"]
