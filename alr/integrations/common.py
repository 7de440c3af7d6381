"""What the callbacks share: an adapter that is made when training starts, its events, and what goes into a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from ..adapt import RankAdapter, Recipe, Resize
from ..factor import wide
from ..linear import low_rank_layers
from .averages import follow_ranks_


class Adapting:
    """recipe, per: as for `RankAdapter`.  averages: averaged copies that follow each change (`follow_ranks_`).

    adapter: the RankAdapter, from the start of training on (None before).  events: every change so far, `Resize` values.
    """

    def __init__(self, recipe: Recipe, averages: Iterable[nn.Module] = (), per: Literal["auto", "row", "example"] = "auto"):
        super().__init__()
        if not isinstance(recipe, Recipe):
            raise TypeError(f"AdaptRanks: recipe is {recipe!r}; wanted a Recipe, such as alr.recipes.alr.")
        self.recipe, self.averages, self.per = recipe, list(averages), per
        self.adapter: RankAdapter | None = None
        self.events: list[Resize] = []

    def begin(self, model: nn.Module, optimizers: Optimizer | Sequence[Optimizer], total_steps: int | None,
              saved: dict | None) -> None:
        """Make the adapter; `saved`: what `saved()` gave when the run stopped."""
        self.end()
        if saved is not None and not alike(saved["prints"], prints(model)):
            raise ValueError("AdaptRanks: the model does not hold the weights that were saved with the adapter's state, so "
                             "it was "
                             "not restored, or from another checkpoint.")
        self.adapter = RankAdapter(model, optimizers, self.recipe, total_steps, per=self.per)
        self.events = []
        if saved is not None:
            self.adapter.load_state_dict(saved["adapter"])
            self.events = [Resize(*event) for event in saved["events"]]

    def follow(self) -> list[Resize]:
        """Count an optimizer step, and tell who averages; returns what has changed."""
        events = self.adapter.step()
        if events:
            self.events += events
            for average in self.copies():
                follow_ranks_(average, self.adapter.model, events)
        return events

    def copies(self) -> list[nn.Module]:
        """The averaged copies that follow."""
        return self.averages

    def saved(self) -> dict:
        """Tensors and plain values, for a checkpoint."""
        return {"adapter": self.adapter.state_dict(), "events": [tuple(event) for event in self.events],
                "prints": prints(self.adapter.model)}

    def end(self) -> None:
        """Leave model and optimizers as they would be without the adapter, which still tells the ranks."""
        if self.adapter is not None:
            self.adapter.close()

    def sizes(self) -> dict[str, float]:
        """For a log: {"rank_mean": mean rank of the layers, "low_rank_parameters": numbers in all factors}."""
        ranks, shapes = list(self.adapter.ranks.values()), self.adapter.shapes
        return {"rank_mean": sum(ranks) / max(len(ranks), 1),
                "low_rank_parameters": sum(r * (m + n) for r, (m, n) in zip(ranks, shapes))}


@torch.no_grad()
def prints(model: nn.Module) -> dict[str, list]:
    """Two numbers by which to know a layer's weights again: {layer: [rank, sum of |U|]}."""
    return {name: [layer.rank, wide(layer.U).abs().sum().item()] for name, layer in low_rank_layers(model).items()}


def alike(saved: dict[str, list], here: dict[str, list]) -> bool:
    """Are these the prints of the same weights, up to the order in which a device adds?"""
    return saved.keys() == here.keys() and all(r == k and math.isclose(a, b, rel_tol=1e-9) for name, (r, a) in saved.items()
                                               for k, b in [here[name]])
