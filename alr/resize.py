"""The axis `resize`: how a layer changes to another rank.  The scripts' own ways stand in `history.resize`.

Dims: m out_features, n in_features, r rank now, k rank wanted.  U (m, r), V (r, n), W = U V; G = dloss/dW (m, n).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .axes import Count, Factors, ResizeRule
from .factor import core_cut, grow, wide


@dataclass(frozen=True)
class SvdCore(ResizeRule):
    """Shrink by the core's SVD, grow without changing W: ours."""

    def __call__(self, U, V, k, seen=None) -> Factors:
        return core_cut(U, V, k) if k <= U.shape[1] else Factors(*grow(U, V, k))


@dataclass(frozen=True)
class TwoWays(ResizeRule):
    """One rule to shrink by, another to grow by."""

    shrink: ResizeRule
    grow: ResizeRule

    @property
    def needs(self) -> tuple[str, ...]:
        return self.shrink.needs + self.grow.needs

    @property
    def steps(self) -> int:
        return max(self.shrink.steps, self.grow.steps)

    @property
    def momentum(self) -> bool:
        return self.shrink.momentum or self.grow.momentum

    def __call__(self, U, V, k, seen=None):
        return (self.grow if k > U.shape[1] else self.shrink)(U, V, k, seen)


def grow_along(U: Tensor, V: Tensor, k: int, G: Tensor) -> tuple[Tensor, Tensor]:
    """Add k - r directions where the loss falls fastest, and leave W as it was.

    New rows of V are the leading right singular vectors of (I - P_U) G (I - P_V), the part of the gradient that no
    change of the present factors reaches; new columns of U are zero, so their first gradient is G v, the largest there
    is.  Length of the rows: the mean length of V's.  (m, r), (r, n), (m, n) -> (m, k), (k, n).
    """
    r = U.shape[1]
    U2, V2 = grow(U, V, k)                                          # checks k; random rows where G runs out
    Qu = torch.linalg.qr(wide(U).cpu()).Q                           # (m, r)
    Qv = torch.linalg.qr(wide(V).cpu().mT).Q                        # (n, r)
    R = wide(G).cpu()                                               # (m, n)
    R = R - Qu @ (Qu.mT @ R)
    R = R - (R @ Qv) @ Qv.mT
    if k == r or not R.norm() > 1e-12 * G.norm():
        return U2, V2
    Z = torch.linalg.svd(R, full_matrices=False).Vh[:k - r]         # (<= k - r, n)
    length = V2[r:].norm(dim=1).mean()                              # that of the drawn rows, which `grow` chose
    V2[r:r + len(Z)] = (Z / Z.norm(dim=1, keepdim=True)).to(V2) * length
    return U2, V2


@dataclass(frozen=True)
class GrowAlongGradient(ResizeRule):
    """Shrink by the core's SVD, grow along the gradient of the last `steps` optimizer steps: ours.

    It keeps a gradient as large as W for every layer during those steps, and nothing of it afterwards.
    """

    steps: Count = 4                    # ours
    needs = ("weight_gradient",)

    def __call__(self, U, V, k, seen=None) -> Factors:
        if k <= U.shape[1]:
            return core_cut(U, V, k)
        G = None if seen is None else seen.weight_gradient          # (m, n)
        return Factors(*(grow(U, V, k) if G is None else grow_along(U, V, k, G)))
