"""How much rank does a layer use?  One float per layer, or, for controllers that share a budget, one per direction.

Dims: m out_features, n in_features, r rank.  U (m, r), V (r, n), W = U V.
Pure functions of tensors first, then the frozen values that a recipe names: `estimate(layer, seen)` (`axes.Estimate`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .axes import Count, Estimate, Init, Part, Whole
from .factor import core, gram, singular_values, uncast, wide, working
from .init import Spectral


def power_sigma(W: Tensor, iters: int) -> Tensor:
    """The largest singular value of W by `iters` power iterations from a random start: often too low, and 1e-8 more.

    (m, n) -> scalar.  O(iters m n).  Draws its start from torch's global generator.  Script v10's way, its 1e-8 included.
    """
    v = torch.randn(W.shape[1], device=W.device, dtype=W.dtype)     # (n,)
    v = v / (v.norm() + 1e-8)
    for _ in range(iters):
        u = W @ v                                                   # (m,)
        u = u / (u.norm() + 1e-8)
        v = W.mT @ u                                                # (n,)
        v = v / (v.norm() + 1e-8)
    return (W @ v).norm() + 1e-8


def stable_rank_power(W: Tensor, iters: int = 5) -> float:
    """||W||_F^2 / (sigma_max^2 + 1e-8), sigma_max by power iteration on the formed W: script v10's estimate, too high by
    a few to thirty percent because five cold iterations do not find sigma_max.  (m, n) -> float in [1, min(m, n)]; 1 for 0.
    """
    W = W.detach().to(working(W.dtype))
    with uncast(W.device):
        sigma2 = power_sigma(W, iters).item() ** 2 + 1e-8
    return min(max(W.square().sum().item() / sigma2, 1.0), float(min(W.shape)))


def stable_rank(U: Tensor, V: Tensor, squarings: int = 7) -> float:
    """||W||_F^2 / sigma_max^2 (Rudelson & Vershynin 2007) of W = U V from two r x r Gram matrices; W is never formed.

    The eigenvalues of Gu Gv are the s^2 of W and their sum is ||W||_F^2, so K = Gu Gv / tr(Gu Gv) has 1 / stable rank as
    its largest eigenvalue.  Squaring K `squarings` times does 2^squarings power iterations at once; 7 (ours) leave an
    error under 1 %.  U (m, r), V (r, n) -> float in [1, r]; 1 for W = 0.  O((m + n) r^2 + squarings r^3).
    """
    U, V = U.detach(), V.detach()
    wide = working(U.dtype)
    with uncast(U.device):
        Gu = (U.to(wide).mT @ U.to(wide)).cpu().numpy()             # (r, r); numpy: a tenth of torch's cost per call,
        Gv = (V.to(wide) @ V.to(wide).mT).cpu().numpy()             # (r, r)  and r x r work is nothing but calls
    fro2 = float(np.vdot(Gu, Gv))
    if not 1e-30 < fro2 < 1e30:                                     # too far out for float32: once more, wider
        Gu, Gv = gram(U).numpy(), gram(V.mT).numpy()                # (r, r), (r, r)
        fro2 = float(np.vdot(Gu, Gv))
        if fro2 == 0:
            return 1.0
    K = A = (Gu / fro2) @ Gv                                        # (r, r)
    for i in range(squarings):
        if i % 3 == 0 and i:
            A = A / np.trace(A)                                     # 8th powers of 1/r fit float32, 64th do not
        A = A @ A                                                   # (r, r)
    c = A[:, np.argmax(np.diagonal(A))]                             # (r,): iterated from the coordinate that answers most
    Gc = Gv @ c                                                     # (r,)
    return min(max(float(np.vdot(c, Gc) / np.vdot(Gc, K @ c)), 1.0), float(U.shape[1]))   # at x = V^T c


def stable_rank_exact(U: Tensor, V: Tensor) -> float:
    """||W||_F^2 / sigma_max^2 from the singular values of the core: the reference.  Float in [1, r]; 1 for W = 0."""
    s2 = singular_values(U, V).square()                             # (r,)
    return (s2.sum() / s2[0]).item() if s2[0] > 0 else 1.0


def effective_rank(U: Tensor, V: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy & Vetterli 2007).  Float in [1, r]; 1 for W = 0."""
    s = singular_values(U, V)                                       # (r,)
    if not s[0] > 0:
        return 1.0
    p = s / s.sum()                                                 # (r,)
    return torch.special.entr(p).sum().exp().item()


def share_rank(s: Tensor, share: float, power: int = 2) -> int:
    """The smallest k whose leading singular values hold `share` of sum s^power.  (r,) falling -> int in [1, r].

    power 2: energy (scripts v8, v9).  power 1: nuclear norm (script v7.5).
    """
    mass = wide(s).pow(power).cumsum(0)                          # (r,)
    if not mass[-1] > 0:
        return 1
    return min(int((mass < share * mass[-1]).sum()) + 1, len(s))


def output_energy(U: Tensor, V: Tensor, input_moment: Tensor) -> Tensor:
    """Mean square of the layer's output along its own principal directions, falling: eigenvalues of U H U^T.

    With inputs of identity covariance these are the s_j^2.  input_moment H = mean of h h^T (r, r).  -> (r,) float64, CPU.
    FloatingPointError for a moment that is not finite.
    """
    H = wide(input_moment).cpu()                                    # (r, r)
    if not H.isfinite().all():
        raise FloatingPointError("output_energy: the inputs' second moment is not finite; the model has diverged.")
    lam, E = torch.linalg.eigh(H)                                   # (r,), (r, r)
    UL = wide(U).cpu() @ (E * lam.clamp_min(0).sqrt())              # (m, r)
    return torch.linalg.eigvalsh(UL.mT @ UL).clamp_min(0).flip(0)   # (r,)


def loss_lost(U: Tensor, V: Tensor, grad_U: Tensor) -> Tensor:
    """By how much the loss would change, to first order, without each singular direction: |s_j p_j^T G z_j|.

    From the factor's own gradient, G is not needed: s_j p_j^T G z_j = (U A)_j^T (g_U B^T)_j / s_j, with A, B of
    `factor.core`.  In the order of the singular values, which it need not follow.  -> (r,) float64, CPU.
    """
    S, A, B = core(U, V)                                            # (r,), (r, r), (r, r)
    M = (wide(U).mT @ wide(grad_U)).cpu()                           # (r, r)
    return ((A.mT @ M) * B).sum(1).abs() / S.clamp_min(S[0] * 1e-12)        # (r,)


# ------------------------------------------------------------------------------------------------ the axis: estimate

@dataclass(frozen=True)
class StableRankPower(Estimate):
    """Script v10: form W, `iters` cold power iterations."""

    iters: Count = 5                                                # script v10

    def __call__(self, layer, seen=None) -> float:
        return stable_rank_power(layer.weight, self.iters)


@dataclass(frozen=True)
class StableRank(Estimate):
    """The stable rank of W from the factors alone, without forming W, to well under 1 %: ours."""

    squarings: Whole = 7                                            # 2^7 iterations; ours

    def __call__(self, layer, seen=None) -> float:
        return stable_rank(layer.U, layer.V, self.squarings)


@dataclass(frozen=True)
class EffectiveRank(Estimate):
    """Entropy of the spectrum (Roy & Vetterli 2007)."""

    def __call__(self, layer, seen=None) -> float:
        return effective_rank(layer.U, layer.V)


@dataclass(frozen=True)
class SpectralShare(Estimate):
    """Ranks needed to keep `share` of the sum of s^power: energy (power 2; v8, v9) or nuclear norm (power 1; v7.5)."""

    share: Part
    power: Count = 2

    def __call__(self, layer, seen=None) -> float:
        return float(share_rank(singular_values(layer.U, layer.V), self.share, self.power))


@dataclass(frozen=True)
class Spectrum(Estimate):
    """How much each direction of W holds, for `control.Budget`: its share of the layer's energy, s_j^2 / sum s^2, falling.

    relative=False: the energy s_j^2 itself, so that layers with large weights count for more.
    """

    relative: bool = True
    gives = "spectrum"

    def __call__(self, layer, seen=None) -> tuple[float, ...]:
        energy = singular_values(layer.U, layer.V).square()         # (r,)
        if self.relative and energy[0] > 0:
            energy = energy / energy.sum()
        return tuple(energy.tolist())


@lru_cache(maxsize=1024)
def fresh_stable_rank(m: int, n: int, r: int, init: Init, draws: int = 3) -> float:
    """The mean stable rank of layers of that shape and rank as `init` starts them.  torch's generators are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)                      # torch.manual_seed would seed every device
        return sum(stable_rank(*init(torch.nn.Linear(n, m, bias=False, device="cpu").weight.detach(), r))
                   for _ in range(draws)) / draws


@dataclass(frozen=True)
class ScaledStableRank(Estimate):
    """r times the stable rank over its value for a fresh layer of the same shape and rank: r means "as it started"."""

    init: Init = Spectral()

    def __call__(self, layer, seen=None) -> float:
        m, n, r = layer.out_features, layer.in_features, layer.rank
        return r * stable_rank(layer.U, layer.V) / fresh_stable_rank(m, n, r, self.init)


@dataclass(frozen=True)
class OutputSpectrum(Estimate):
    """Importance by what reaches the next layer: shares of the output's energy, which depend on the inputs too.

    A layer that saw nothing has no importance.
    """

    relative: bool = True
    needs = ("input_moment",)
    gives = "spectrum"

    def __call__(self, layer, seen) -> tuple[float, ...]:
        if not seen.rows:
            return (0.0,) * layer.rank
        e = output_energy(layer.U, layer.V, seen.input_moment)      # (r,)
        return tuple((e / e.sum() if self.relative and e[0] > 0 else e).tolist())


@dataclass(frozen=True)
class LossSpectrum(Estimate):
    """Importance by what the loss would lose: first order, from the gradient of the last batch, sorted."""

    gives = "spectrum"

    def __call__(self, layer, seen=None) -> tuple[float, ...]:
        if layer.U.grad is None:
            raise RuntimeError("LossSpectrum: the layer has no gradient; call adapter.step() before gradients are zeroed.")
        return tuple(loss_lost(layer.U, layer.V, layer.U.grad).sort(descending=True).values.tolist())


@dataclass(frozen=True)
class Place(Estimate):
    """Importance by place alone: the j-th direction of every layer counts 1 / j, whatever is in it.

    With `Budget(per_parameter=False)` all layers then have one rank, their caps permitting, and follow the same schedule:
    what a budget gains by sharing unequally is the difference to this.
    """

    gives = "spectrum"

    def __call__(self, layer, seen=None) -> tuple[float, ...]:
        return tuple(1 / j for j in range(1, layer.rank + 1))
