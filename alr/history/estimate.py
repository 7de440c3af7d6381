"""Rank from gradients: the scripts' suggestions before v7.5.  `estimate(layer, seen) -> float`.

Dims: m out_features, n in_features, r rank.  U (m, r), V (r, n), G (m, n).
They read the factors' live `.grad`, so adapter.step() has to come after backward and before the gradients are zeroed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..axes import Estimate, NonNegative, Share, Whole
from .grouping import by_norm, groups, largest_group, number_of_groups, similarity


def factor_gradients(layer, who: str) -> tuple[Tensor, Tensor]:
    """dU (m, r) and dV (r, n).  ValueError when there are none."""
    if layer.U.grad is None or layer.V.grad is None:
        raise ValueError(f"{who}: the factors {tuple(layer.U.shape)} and {tuple(layer.V.shape)} have no gradient; call "
                         "adapter.step() after backward and optimizer.step(), before the gradients are zeroed.")
    return layer.U.grad, layer.V.grad


def weight_gradient(U: Tensor, V: Tensor, dU: Tensor, dV: Tensor) -> Tensor:
    """G = dU V + U dV, which the scripts take for the gradient of W.  -> (m, n).

    It is the direction in which one step of gradient descent on both factors moves W, to first order; the gradient
    itself enters it as G_W V^T V + U U^T G_W.
    """
    return dU @ V.detach() + U.detach() @ dV                        # (m, n)


def gradient_labels(layer, threshold: Share, who: str) -> Tensor:
    """Groups of the rows of G, the largest gradients leading.  layer -> (m,) labels.

    The scripts may have led in another order; this one needs no random numbers (ours, as v2's).
    """
    dU, dV = factor_gradients(layer, who)                           # (m, r), (r, n)
    G = weight_gradient(layer.U, layer.V, dU, dV)                   # (m, n)
    return groups(similarity(G), by_norm(G), threshold)


# ------------------------------------------------------------------------------------------------ the axis: estimate

@dataclass(frozen=True)
class LargestGroup(Estimate):
    """Size of the largest group of agreeing rows: scripts v3 to v7.1.

    The inverted signal: when all rows agree G has rank one, and this asks for m; when none do, it asks for 1.
    `NumberOfGroups` is the repair.
    """

    threshold: Share = 0.9                                          # script v3

    def __call__(self, layer, seen=None) -> float:
        return float(largest_group(gradient_labels(layer, self.threshold, "LargestGroup")))


@dataclass(frozen=True)
class NumberOfGroups(Estimate):
    """Number of groups of agreeing rows: script v7.4.  Rows without a gradient are groups of one."""

    threshold: Share = 0.85                                         # script v7.4

    def __call__(self, layer, seen=None) -> float:
        return float(number_of_groups(gradient_labels(layer, self.threshold, "NumberOfGroups")))


@dataclass(frozen=True)
class GradientNorm(Estimate):
    """base + int(gain (|dU| + |dV|) / 2), in [low, high]: script v7.2.  Scale the loss by ten and the rank follows."""

    base: Whole = 16                                                # all four: script v7.2
    gain: NonNegative = 4.0
    low: Whole = 8
    high: Whole = 256

    def __call__(self, layer, seen=None) -> float:
        dU, dV = factor_gradients(layer, "GradientNorm")            # (m, r), (r, n)
        mean = (dU.norm().item() + dV.norm().item()) / 2
        return float(min(max(self.base + int(self.gain * mean), self.low), self.high))
