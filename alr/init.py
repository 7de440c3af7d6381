"""Where do the factors start?  A dense weight in, two factors out: `init(weight, rank) -> (U, V)`.

Dims: m out_features, n in_features, r rank, q = min(m, n).  weight (m, n) -> U (m, r), V (r, n).
The variance of an entry of U V is r var(U) var(V); a torch nn.Linear has 1 / (3 n).

A weight on the meta device has no numbers: every start answers with empty factors of the right shape, for a state dict
that follows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .axes import Init, NonNegative
from .factor import halves, working

EXACT = 1024                            # min(m, n) up to which the SVD is whole; 2048 x 2048 takes 5 s on one core


def empty(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors without numbers, in the weight's dtype and on its device: (m, n) -> (m, r), (r, n)."""
    m, n = weight.shape
    return weight.new_empty(m, rank), weight.new_empty(rank, n)


def leading(W: Tensor, k: int, exact: int = EXACT) -> tuple[Tensor, Tensor, Tensor]:
    """The leading k singular triples of W: (m, n) -> (m, k), (k,), (k, n).  ValueError for numbers that are not finite.

    Whole SVD on the CPU, the same on every device, while min(m, n) <= exact or k is more than a third of it; beyond that
    randomised (Halko, Martinsson & Tropp 2011, by torch.svd_lowrank with two power iterations), O(m n k), on W's device.
    """
    if not W.isfinite().all():
        raise ValueError("the weight holds numbers that are not finite.")
    q = min(W.shape)
    if q <= exact or k > q // 3:
        P, S, Zt = torch.linalg.svd(W.cpu(), full_matrices=False)   # (m, q), (q,), (q, n)
        return P[:, :k], S[:k], Zt[:k]
    P, S, Z = torch.svd_lowrank(W, min(q, k + 16), niter=2)         # (m, l), (l,), (n, l)
    return P[:, :k], S[:k], Z[:, :k].mT


@dataclass(frozen=True)
class Spectral(Init):
    """Truncated SVD of the dense weight, S split evenly (Khodak et al. 2021): keeps a trained layer, starts a new one.

    `match`: scale the product back to the dense weight's Frobenius norm, so that the rank does not set the size.
    ValueError for a weight that is not finite.
    """

    match: bool = False

    def __call__(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        if weight.is_meta:
            return empty(weight, rank)
        W = weight.detach().to(working(weight.dtype))               # (m, n)
        P, S, Zt = leading(W, rank)                                 # (m, r), (r,), (r, n)
        if self.match and S.norm() > 0:
            S = S * (W.norm().to(S.device) / S.norm())              # (r,)
        U, V = halves(P, S, Zt)                                     # (m, r), (r, n)
        return U.to(weight), V.to(weight)


@lru_cache(maxsize=256)
def marchenko_pastur(m: int, n: int) -> tuple[float, ...]:
    """The q singular values, falling, that an m x n matrix of independent entries with variance 1 has in the limit.

    The quantiles (j - 1/2) / q of Marchenko & Pastur's (1967) law, by its density on a grid of 4,096 points.
    """
    q, N = min(m, n), max(m, n)
    low, high = (math.sqrt(N) - math.sqrt(q)) ** 2, (math.sqrt(N) + math.sqrt(q)) ** 2
    angle = torch.linspace(0, math.pi, 4097, dtype=torch.float64, device="cpu")     # (g,): no kink at either end
    x = (low + high) / 2 - (high - low) / 2 * angle.cos()           # (g,), rising from low to high
    density = ((x - low).clamp_min(0) * (high - x).clamp_min(0)).sqrt() / x.clamp_min(1e-12 * high) * angle.sin()
    mass = torch.cumulative_trapezoid(density, angle)               # (g - 1,)
    mass = torch.cat([mass.new_zeros(1), mass / mass[-1]])          # (g,)
    wanted = (torch.arange(q, 0, -1, dtype=torch.float64, device="cpu") - 0.5) / q  # (q,), falling
    i = torch.searchsorted(mass, wanted).clamp(1, len(mass) - 1)    # (q,)
    part = (wanted - mass[i - 1]) / (mass[i] - mass[i - 1]).clamp_min(1e-300)
    return tuple((x[i - 1] + part * (x[i] - x[i - 1])).sqrt().tolist())


@dataclass(frozen=True)
class Fresh(Init):
    """What `Spectral` makes of a new nn.Linear, drawn without decomposing noise; the weight's numbers are not read.

    A random matrix's singular vectors are uniform and its spectrum is known (`marchenko_pastur`), so factors of any rank
    can be drawn with the statistics of the truncated SVD of torch's start, U(-1/sqrt(n), 1/sqrt(n)).  O((m + n) r^2)
    instead of O(m n min(m, n)): 0.1 s instead of 5 s at 2048 x 2048, rank 256 (one CPU core).
    """

    def __call__(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        if weight.is_meta:
            return empty(weight, rank)
        m, n = weight.shape
        wide = working(weight.dtype)
        spectrum = torch.tensor(marchenko_pastur(m, n)[:rank], device=weight.device, dtype=wide)    # (r,)
        def basis(rows):
            X = torch.randn(rows, rank, device=weight.device, dtype=wide)   # (rows, r)
            Q, R = torch.linalg.qr(X)                               # (rows, r), (r, r)
            return Q * R.diagonal().sign()                          # uniform (Mezzadri 2007)
        U, V = halves(basis(m), spectrum / math.sqrt(3 * n), basis(n).mT)   # (m, r), (r, n)
        return U.to(weight), V.to(weight)


@dataclass(frozen=True)
class Gaussian(Init):
    """Scripts v7.2 to v10: U ~ N(0, 1/m), V ~ N(0, 1/n).

    Entries of U V have variance r / (m n), far below the dense layer's.
    """

    def __call__(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        m, n = weight.shape
        U, V = empty(weight, rank)
        return U.normal_(0, m ** -0.5), V.normal_(0, n ** -0.5)


@dataclass(frozen=True)
class Normal(Init):
    """Both factors N(0, std^2): scripts v3 to v7.1 with std 0.02."""

    std: NonNegative = 0.02                                         # script v3

    def __call__(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        U, V = empty(weight, rank)
        return U.normal_(0, self.std), V.normal_(0, self.std)
