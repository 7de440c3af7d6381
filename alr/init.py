"""Where do the factors start?  A dense weight in, two factors out: `init(weight, rank) -> (U, V)`.

Dims: m out_features, n in_features, r rank.  weight (m, n) -> U (m, r), V (r, n).
The variance of an entry of U V is r var(U) var(V); a torch nn.Linear has 1 / (3 n).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectral:
    """Truncated SVD of the dense weight, S split evenly (Khodak et al. 2021): keeps a trained layer, starts a new one.

    `match`: scale the product back to the dense weight's Frobenius norm, so that the rank does not set the size.
    """

    match: bool = False

    def __call__(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        W = weight.detach().cpu()                                   # (m, n)
        W = W if W.dtype == torch.float64 else W.float()
        P, S, Zt = torch.linalg.svd(W, full_matrices=False)         # (m, q), (q,), (q, n)
        kept = S[:rank]                                             # (r,)
        if self.match and kept.norm() > 0:
            kept = kept * (S.norm() / kept.norm())
        half = kept.sqrt()                                          # (r,)
        return (P[:, :rank] * half).to(weight), (half[:, None] * Zt[:rank]).to(weight)


@dataclass(frozen=True)
class Gaussian:
    """Script v10: U ~ N(0, 1/m), V ~ N(0, 1/n).  Entries of U V have variance r / (m n), far below the dense layer's."""

    def __call__(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        m, n = weight.shape
        return weight.new_empty(m, rank).normal_(0, m ** -0.5), weight.new_empty(rank, n).normal_(0, n ** -0.5)


@dataclass(frozen=True)
class Normal:
    """Both factors N(0, std^2): scripts v3 to v7.3 with std 0.02."""

    std: float = 0.02                                               # script v3

    def __call__(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        m, n = weight.shape
        return weight.new_empty(m, rank).normal_(0, self.std), weight.new_empty(rank, n).normal_(0, self.std)
