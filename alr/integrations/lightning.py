"""`alr` in Lightning, under either of its names.

    trainer = Trainer(max_epochs=3, callbacks=[AdaptRanks(alr.recipes.alr)])
    trainer.fit(module)                 # a LightningModule whose layers have been factorised
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from ..adapt import Recipe
from .common import Adapting

NAMES = ("lightning.pytorch", "pytorch_lightning")


def callback_classes() -> tuple[type, ...]:
    """Lightning's Callback: of the packages that are in use, or of the first that is installed."""
    used = [name for name in NAMES if name in sys.modules]
    for name in used or NAMES:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
        used = used or [name]
        break
    if not used:
        raise ImportError("alr.integrations.lightning needs lightning or pytorch_lightning: pip install lightning")
    return tuple(sys.modules[name].Callback for name in used)


class AdaptRanks(Adapting, *callback_classes()):
    """Makes a RankAdapter when training starts, and calls it after every batch that ended with an optimizer step.

    recipe: such as alr.recipes.alr; factorise the module's layers in its `__init__` or in `configure_model`.  Any optimizer
    that `RankAdapter` takes, from `configure_optimizers`.  accumulate_grad_batches, clipping and precision are the Trainer's
    affair; Lightning's own averages (WeightAveraging, StochasticWeightAveraging) follow the ranks by themselves.  Loggers
    get "rank_mean" and "low_rank_parameters" at each change.

    total_steps: optimizer steps of the whole run; without it what the Trainer estimates.  In manual optimization only you
    know it.  There a training_step may step several optimizers once each; one that steps an optimizer several times calls
    `callback.follow()` after each of these steps.

    The adapter's state is in every checkpoint; `trainer.fit(module, ckpt_path=...)` goes on from it.

    ValueError at the start: no low-rank layers; several processes; no total_steps where it is needed; a resumed run whose
    checkpoint was made without this callback.
    """

    def __init__(self, recipe: Recipe, total_steps: int | None = None, averages: Iterable[nn.Module] = (),
                 per: Literal["auto", "row", "example"] = "auto"):
        super().__init__(recipe, averages, per)
        self.total_steps = total_steps
        self._saved: dict | None = None             # from a checkpoint, until training starts
        self._theirs: list[nn.Module] = []

    def on_train_start(self, trainer, pl_module) -> None:
        if trainer.world_size > 1:
            raise ValueError(f"AdaptRanks: {type(trainer.strategy).__name__} runs {trainer.world_size} processes, and what it "
                             f"wraps "
                             "the model in cannot follow a rank that changes. Train on one device (devices=1), hold the ranks "
                             "and leave the callback out, or write the loop with alr.average_gradients(model).")
        saved, self._saved = self._saved, None
        if trainer.global_step and saved is None and self.adapter is not None:
            saved = self.saved()                                    # the same Trainer fits once more
        if trainer.global_step and saved is None:
            raise ValueError(f"AdaptRanks: training goes on from step {trainer.global_step}, and the checkpoint holds no "
                             f"state of "
                             "AdaptRanks. Load its weights alone (alr.factorize_like_, load_state_dict) and train anew.")
        # Lightning's own averages keep their copy in an attribute of one name
        self._theirs = [copy for callback in trainer.callbacks
                        if isinstance(copy := getattr(callback, "_average_model", None), nn.Module)]
        self.begin(pl_module, trainer.optimizers, self._total(trainer, pl_module), saved)

    def _total(self, trainer, pl_module) -> int | None:
        if self.total_steps is not None:
            return self.total_steps
        estimated = trainer.estimated_stepping_batches if pl_module.automatic_optimization else math.inf
        if math.isfinite(estimated):
            return int(estimated)
        if self.recipe.control.needs_total_steps:
            raise ValueError(f"AdaptRanks: {type(self.recipe.control).__name__} plans over the whole run, and its length "
                             f"is not "
                             "known " + ("(max_epochs=-1)" if pl_module.automatic_optimization else "in manual optimization") +
                             "; write AdaptRanks(recipe, total_steps=...), in optimizer steps.")
        return None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if self.follow():                                           # [] between optimizer steps
            for logger in trainer.loggers:
                logger.log_metrics(self.sizes(), step=trainer.global_step)

    def copies(self) -> list[nn.Module]:
        return self.averages + self._theirs

    def on_train_end(self, trainer, pl_module) -> None:
        self.end()

    def on_exception(self, trainer, pl_module, exception) -> None:
        self.end()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.adapter is None else self.saved()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict or None
