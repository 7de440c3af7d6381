"""How the scripts changed a rank: they form W and take its SVD, whole or randomised.

Dims: m out_features, n in_features, r rank now, k rank wanted, l = k + oversample columns of the sketch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..axes import NonNegative, ResizeRule, Whole
from ..factor import check_rank, halves, svd_full, working


def randomized_svd(W: Tensor, k: int, oversample: int = 8, power: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The leading k singular triples of W, nearly (Halko, Martinsson & Tropp 2011, alg. 4.3 and 5.1).

    (m, n) -> (m, k), (k,), (k, n).  Sketch Y = W Omega with a Gaussian Omega, `power` times Y = W (W^T Y), Q = qr(Y),
    SVD of the small Q^T W.  O(m n l) for l = k + oversample: it pays where l is far below min(m, n).
    Without power iteration the expected error is at most sqrt(1 + k / (oversample - 1)) of the best (their thm. 10.5).
    With one it is within 1.1 of the best over the spectra of our tests, plus 2 eps^(1/3) ||W||_F: nothing is
    orthonormalised between the passes, so W W^T W drowns what is below eps^(1/3) of the largest s, half a percent of
    it in float32.
    Draws from torch's global generator.
    """
    m, n = W.shape
    check_rank(k, m, n, "randomized_svd")
    l = min(k + oversample, m, n)
    Y = W @ torch.randn(n, l, dtype=W.dtype, device=W.device)                        # (m, l)
    for _ in range(power):
        Y = W @ (W.mT @ Y)                                          # (m, l)
    Q = torch.linalg.qr(Y).Q                                        # (m, l)
    P, S, Zt = torch.linalg.svd(Q.mT @ W, full_matrices=False)      # (l, l), (l,), (l, n)
    return Q @ P[:, :k], S[:k], Zt[:k]                              # (m, k), (k,), (k, n)


@dataclass(frozen=True)
class SvdFull(ResizeRule):
    """Form W, full SVD, keep k: the scripts' way, both for shrinking and for growing."""

    eps: NonNegative = 1e-8                                         # under the root; script v10
    split: Literal["sqrt", "left"] = "sqrt"                         # "left": scripts v7.2, v7.3

    def __call__(self, U, V, k, seen=None):
        return svd_full(U, V, k, self.eps, self.split)


@dataclass(frozen=True)
class SvdRandom(ResizeRule):
    """Form W, randomised SVD, S split evenly: scripts v4 to v7.1, both for shrinking and for growing.

    It forms W, as the scripts did.  The r x r core (`resize.SvdCore`) is exact, and cheaper too.  A rank that stays
    or grows moves W all the same, by the rounding that `randomized_svd` tells of.
    """

    oversample: Whole = 8                                           # both: script v4
    power: Whole = 1

    def __call__(self, U, V, k, seen=None):
        W = (U.detach() @ V.detach()).cpu().to(working(U.dtype))    # (m, n)
        U2, V2 = halves(*randomized_svd(W, k, self.oversample, self.power))     # (m, k), (k, n)
        return U2.to(U), V2.to(V)
