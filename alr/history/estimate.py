"""Rank from gradients: the scripts' suggestions before v7.5.  `estimate(layer, seen) -> float`.

Dims: m out_features, n in_features, r rank.  U (m, r), V (r, n), G (m, n).
They read the factors' live `.grad`: what the last backward left there, or, where nobody zeroes it, a sum
(`state.Stale`).  So adapter.step() has to come after backward and before the gradients are zeroed.  A layer that has no
gradient, such as a projection that the model never uses, is answered as the script answers it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..axes import Estimate, NonNegative, Share, Whole
from .grouping import by_index, groups, number_of_groups, similarity, widest_group


def weight_gradient(U: Tensor, V: Tensor, dU: Tensor, dV: Tensor) -> Tensor:
    """G = dU V + U dV, which the scripts take for the gradient of W.  -> (m, n).

    It is the direction in which one step of gradient descent on both factors moves W, to first order; the gradient
    itself enters it as G_W V^T V + U U^T G_W.
    """
    return dU @ V.detach() + U.detach() @ dV                        # (m, n)


def layer_gradient(layer) -> Tensor | None:
    """`weight_gradient` of a layer as its factors' gradients are now, (m, n); None when a factor has none."""
    if layer.U.grad is None or layer.V.grad is None:
        return None
    return weight_gradient(layer.U, layer.V, layer.U.grad, layer.V.grad)


# ------------------------------------------------------------------------------------------------ the axis: estimate

@dataclass(frozen=True)
class LargestGroup(Estimate):
    """Size of the largest group of agreeing rows: scripts v3 to v7.1.  Without a gradient: the rank that the layer has.

    The inverted signal: when all rows agree G has rank one, and this asks for m; when none do, it asks for 1.
    `NumberOfGroups` is the repair.
    """

    threshold: Share = 0.9                                          # script v3
    gradients = True

    def __call__(self, layer, seen=None) -> float:
        G = layer_gradient(layer)                                   # (m, n)
        return float(layer.rank if G is None else widest_group(similarity(G), self.threshold))


@dataclass(frozen=True)
class NumberOfGroups(Estimate):
    """Number of groups of agreeing rows, the first rows leading: script v7.4.

    Rows without a gradient are groups of one.  Without any gradient: the rank that the layer has.
    """

    threshold: Share = 0.85                                         # script v7.4
    gradients = True

    def __call__(self, layer, seen=None) -> float:
        G = layer_gradient(layer)                                   # (m, n)
        if G is None:
            return float(layer.rank)
        return float(number_of_groups(groups(similarity(G), by_index(len(G)), self.threshold)))


@dataclass(frozen=True)
class GradientNorm(Estimate):
    """base + int(gain (|dU| + |dV|) / 2), in [low, high]: scripts v7.2, v7.3.  Scale the loss by ten and the rank follows.

    A factor without a gradient has norm 0, so a layer that the model never uses asks for `base`.
    """

    base: Whole = 16                                                # all four: script v7.2
    gain: NonNegative = 4.0
    low: Whole = 8
    high: Whole = 256
    gradients = True

    def __call__(self, layer, seen=None) -> float:
        norms = [0.0 if p.grad is None else p.grad.norm().item() for p in (layer.U, layer.V)]
        return float(min(max(self.base + int(self.gain * (sum(norms) / 2)), self.low), self.high))
