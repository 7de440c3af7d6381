"""What AdaLoRA's importance makes of a layer: how much the loss changes, to first order, without a direction.

Dims: m out_features, n in_features, r rank.  W = U V = sum of s_j p_j z_j^T, G = dloss/dW (m, n).

A direction's sensitivity is |s_j p_j^T G z_j|, that of the singular value in AdaLoRA (Zhang and others 2023, their
equation 8).  Left out: the terms of single entries of p_j and z_j, and two moving averages over all steps, in whose place
G is the sum over a few steps before the decision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .axes import Count, Estimate, Factors, ResizeRule
from .estimate import loss_lost
from .factor import core, core_cut, grow
from .fisher import cut_along


def sensitivity(U: Tensor, V: Tensor, G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each singular direction's |s_j p_j^T G z_j|, falling, and the directions in that order.

    (m, r), (r, n), (m, n) -> (r,), A (r, r), B (r, r), for which W = sum of U A_j B_j V; float64 on the CPU.  O(m n r).
    FloatingPointError for a G that is not finite.
    """
    if not G.isfinite().all():
        raise FloatingPointError("sensitivity: the weight's gradient is not finite; the model has diverged.")
    S, A, B = core(U, V)                                            # (r,), (r, r), (r, r): U A = P S, B V = S Z^T
    half = torch.where(S > 0, S.rsqrt(), 0.0)                       # (r,)
    felt, order = loss_lost(U, V, G @ V.detach().to(G).mT).sort(descending=True, stable=True)       # (r,), (r,)
    return felt, (A * half)[:, order], (half[:, None] * B)[order]


@dataclass(frozen=True)
class Sensitivity(Estimate):
    """Importance by what the loss would lose to first order, from the gradient of a few steps, falling; for `Budget`.

    It keeps a gradient as large as W for every layer during those steps, and nothing of it afterwards.
    """

    steps: Count = 4                    # optimizer steps before each decision that are looked at, as FisherSpectrum's
    needs = ("weight_gradient",)
    gives = "spectrum"

    def __call__(self, layer, seen) -> tuple[float, ...]:
        return tuple(sensitivity(layer.U, layer.V, seen.weight_gradient)[0].tolist())


@dataclass(frozen=True)
class SensitivityCut(ResizeRule):
    """Keep the singular directions of the largest sensitivity, whatever their singular values; grow as `grow` does."""

    steps: Count = 4                    # as above
    needs = ("weight_gradient",)

    def __call__(self, U, V, k, seen=None) -> Factors:
        if k > U.shape[1]:
            return Factors(*grow(U, V, k))
        if seen is None or seen.weight_gradient is None:
            return core_cut(U, V, k)
        _, A, B = sensitivity(U, V, seen.weight_gradient)           # (r, r), (r, r)
        return cut_along(U, V, k, A, B)
