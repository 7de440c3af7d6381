"""How does one pair of factors step?  Update rules of `optim.PairOptimizer`, each a value with a reference beside it.

Dims: m out_features, n in_features, r rank, W = U V.  U (m, r), V (r, n); g_U, g_V gradients of the same shapes.  A side is
U or V^T, (L, r) with L = m or n; b sides of one length L and like rank are worked on together, padded with zero columns to
the largest rank R of them.

`rule.reference(...)` is the obvious version of one step of one pair, a pure function to check by eye; `rule.step(...)` is
the fast one over all pairs of a param group, in place.  A test ties the two over ten steps.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import ClassVar, Iterator, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .axes import Axis
from .factor import working

BUCKET = 64     # sides whose ranks lie in one stretch of so many are worked on together (ours; wider ones waste their padding)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)    # of the quintic that sends singular values towards 1; Muon (Jordan 2024)
SCALES = ("original", "match_rms_adamw", "none")


class Pair(NamedTuple):
    """The factors of one layer, their gradients, and what the rule remembers of each."""

    U: nn.Parameter                     # (m, r)
    V: nn.Parameter                     # (r, n)
    g_U: Tensor                         # (m, r)
    g_V: Tensor                         # (r, n)
    s_U: dict
    s_V: dict


class Settings(NamedTuple):
    """What a param group says of a step."""

    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float
    decay: str
    ns_steps: int
    adjust_lr_fn: str


class Rule(Axis):
    """A rule that moves U and V by their gradients.

    carries: does its state follow a change of rank by `state.Transport`?
    """

    carries: ClassVar[bool] = True

    def state(self, U: Tensor, V: Tensor) -> tuple[dict, dict]:
        """What is remembered of U and of V at the start."""
        raise NotImplementedError

    def reference(self, U: Tensor, V: Tensor, g_U: Tensor, g_V: Tensor, s_U: dict, s_V: dict, settings: Settings):
        """One step, nothing in place: -> U', V', s_U', s_V'."""
        raise NotImplementedError

    def step(self, pairs: Sequence[Pair], settings: Settings) -> None:
        """One step of all pairs, in place."""
        raise NotImplementedError


def shape_scale(name: str, m: int, n: int) -> float:
    """What a learning rate is multiplied by for an m x n matrix; names as in torch.optim.Muon.

    original: sqrt(max(1, m / n)) (Jordan 2024), dense Muon's default.  match_rms_adamw: 0.2 sqrt(max(m, n)) (Liu et al.
    2025).  none: 1.
    """
    if name == "original":
        return math.sqrt(max(1.0, m / n))
    return 0.2 * math.sqrt(max(m, n)) if name == "match_rms_adamw" else 1.0


@contextlib.contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Products in the dtype of their factors: autocast off, TF32 off.

    Newton-Schulz on a Gram matrix works with the square of a condition number, which float32 bears and nothing below it.
    """
    before = torch.get_float32_matmul_precision()
    tf32 = device.type == "cuda" and before != "highest"
    if tf32:
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if tf32:
            torch.set_float32_matmul_precision(before)


# ------------------------------------------------------------------------------------------------ orthogonalising

def orthogonalize(X: Tensor, steps: int = 5) -> Tensor:
    """X's polar factor, nearly: all singular values moved into about [0.7, 1.2] (Jordan 2024), vectors kept.

    The obvious version, on X itself, in float32 or wider: (..., L, r) -> (..., L, r), in X's dtype.  O(steps L r^2).
    """
    a, b, c = COEFFICIENTS
    Y = X.to(working(X.dtype))
    Y = Y / Y.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-30)     # (..., L, r)
    for _ in range(steps):
        G = Y.mT @ Y                                                # (..., r, r)
        Y = a * Y + Y @ (b * G + c * G @ G)                         # (..., L, r)
    return Y.to(X.dtype)


def whitener(G: Tensor, steps: int = 5) -> Tensor:
    """The Q for which X Q is `orthogonalize(X)`, from G = X^T X alone: (..., r, r) -> (..., r, r).  O(steps r^3).

    Every iterate is X times a polynomial in G, so the long side is needed twice (for G and for X Q), not 2 steps times.
    G holds the square of X's condition number: give it in float32 or wider, and with TF32 off.  ValueError for less.
    """
    if G.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"whitener: G is {str(G.dtype).removeprefix('torch.')}, in which the square of a condition number is "
                         "lost; form it in float32: Xf = X.float(); whitener(Xf.mT @ Xf).")
    a, b, c = COEFFICIENTS
    eye = torch.eye(G.shape[-1], device=G.device, dtype=G.dtype)    # (r, r)
    size = G.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(1e-30)[..., None, None]     # ||X||_F^2
    G, Q = G / size, None                                           # (..., r, r)
    for left in reversed(range(steps)):
        P = a * eye + b * G + c * G @ G                             # (..., r, r); commutes with G
        Q = P * size.rsqrt() if Q is None else Q @ P                # (..., r, r)
        G = P @ G @ P if left else G
    return Q


def power_step(X: Tensor, x: Tensor, times: int = 1) -> Tensor:
    """Power iteration for the longest left direction of X: (..., L, r), (..., L) -> (..., L), of length 1."""
    x = x[..., None]                                                # (..., L, 1)
    for _ in range(times):
        x = X @ (X.mT @ x)                                          # (..., L, 1)
        x = x / x.norm(dim=-2, keepdim=True).clamp_min(1e-30)
    return x[..., 0]


def longest(X: Tensor) -> Tensor:
    """The column of largest norm, with length 1: (L, r) -> (L,)."""
    x = X.index_select(1, X.norm(dim=0).argmax()[None])[:, 0]       # (L,); no host read
    return x / x.norm().clamp_min(1e-30)


# ------------------------------------------------------------------------------------------------ sides

def stacked(sides: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """(L, r) each, r as it comes -> (b, L, R), in one dtype."""
    R = max(s.shape[1] for s in sides)
    return torch.stack([s if s.shape[1] == R else F.pad(s, (0, R - s.shape[1])) for s in sides]).to(dtype)


def buckets(sides: Sequence[Tensor]) -> list[list[int]]:
    """Which sides are worked on together: of one length, device and dtype, and of like rank."""
    found: dict[tuple, list[int]] = {}
    for i, s in enumerate(sides):
        found.setdefault((s.shape[0], -(-s.shape[1] // BUCKET), s.device, s.dtype), []).append(i)
    return list(found.values())


# ------------------------------------------------------------------------------------------------ the rules

@dataclass(frozen=True)
class Spectron(Rule):
    """Momentum, orthogonalised, on both factors, with one radius for the two of them (Spectron 2026), in our Gram form.

    With O_U and O_V the orthogonalised momenta, U -= rho O_U and V -= rho O_V, where
    rho = lr / (sigma_max(U) + sigma_max(V) + 1).  Orthogonalised matrices have a spectral norm of about 1, so that of
    the change of W is at most about lr, whatever the scale or the rank of the factors.  sigma_max comes from one power
    iteration a step, started from the last one's vector.

    State per factor: momentum_buffer, in the factor's dtype, and `direction` (L,), which no change of rank touches.
    """

    def state(self, U, V):
        return tuple({"momentum_buffer": torch.zeros_like(p, memory_format=torch.preserve_format),
                      "direction": power_step(s := side.detach().to(working(p.dtype)), longest(s), 7).to(p.dtype)}
                     for p, side in ((U, U), (V, V.mT)))

    def reference(self, U, V, g_U, g_V, s_U, s_V, settings):
        lr = settings.lr * shape_scale(settings.adjust_lr_fn, U.shape[0], V.shape[1])
        moved, sigmas, states = [], [], []
        for g, s, side in ((g_U, s_U, U), (g_V.mT, s_V, V.mT)):
            wide = working(side.dtype)
            old = s["momentum_buffer"] if side is U else s["momentum_buffer"].mT    # (L, r)
            M = old.lerp(g.to(old.dtype), 1 - settings.momentum)                    # (L, r)
            X = g.to(old.dtype).lerp(M, settings.momentum) if settings.nesterov else M
            moved.append(orthogonalize(X.to(wide), settings.ns_steps))              # (L, r)
            x = power_step(side.to(wide), s["direction"].to(wide))                  # (L,)
            sigmas.append((side.to(wide).mT @ x).norm())
            states.append({"momentum_buffer": M if side is U else M.mT, "direction": x.to(side.dtype)})
        rho = lr / (sigmas[0] + sigmas[1] + 1)
        U2, V2 = decayed(U, V, settings)
        return U2 - (rho * moved[0]).to(U), V2 - (rho * moved[1].mT).to(V), *states

    def step(self, pairs, settings):
        params = [p for pair in pairs for p in (pair.U, pair.V)]
        states = [s for pair in pairs for s in (pair.s_U, pair.s_V)]
        momenta = [s["momentum_buffer"] for s in states]
        grads = [g.to(M.dtype) for pair in pairs for g, M in ((pair.g_U, pair.s_U["momentum_buffer"]),
                                                              (pair.g_V, pair.s_V["momentum_buffer"]))]
        torch._foreach_lerp_(momenta, grads, 1 - settings.momentum)
        moves = torch._foreach_lerp(grads, momenta, settings.momentum) if settings.nesterov else momenta
        def side(x, i):
            return x.mT if i % 2 else x                             # even: U (m, r), odd: V (r, n) -> (L, r)
        weights, moved = [side(p, i) for i, p in enumerate(params)], [side(x, i) for i, x in enumerate(moves)]
        updates, sigmas = [None] * len(params), [None] * len(params)
        for places in buckets(weights):
            wide = working(params[places[0]].dtype)
            X = stacked([moved[i] for i in places], wide)           # (b, L, R)
            O = X @ whitener(X.mT @ X, settings.ns_steps)           # (b, L, R)
            W = stacked([weights[i] for i in places], wide)         # (b, L, R)
            x = power_step(W, torch.stack([states[i]["direction"] for i in places]).to(wide))       # (b, L)
            sigma = (W.mT @ x[..., None]).norm(dim=(1, 2))          # (b,)
            for j, i in enumerate(places):
                states[i]["direction"] = x[j].to(params[i].dtype)
                updates[i], sigmas[i] = side(O[j, :, :weights[i].shape[1]], i), sigma[j]
        radii = []
        for i, pair in enumerate(pairs):
            scale = settings.lr * shape_scale(settings.adjust_lr_fn, pair.U.shape[0], pair.V.shape[1])
            radii += [scale / (sigmas[2 * i] + sigmas[2 * i + 1] + 1)] * 2
        torch._foreach_mul_(updates, radii)
        decay_(pairs, settings)
        torch._foreach_sub_(params, [u.to(p.dtype) for u, p in zip(updates, params)])


def decayed(U: Tensor, V: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """The factors after a step of decoupled weight decay, not in place.  (m, r), (r, n) -> the same.

    decay "factors": both shrink by half of lr * weight_decay, so that W shrinks by all of it.  "product": the gradient
    step of lr * weight_decay / 2 ||U V||_F^2 (Khodak et al. 2021): strong directions shrink, weak ones hardly.
    """
    amount = settings.lr * settings.weight_decay
    if settings.decay == "product":
        return U - amount * U @ (V @ V.mT), V - amount * (U.mT @ U) @ V
    return U * (1 - amount / 2), V * (1 - amount / 2)


def decay_(pairs: Sequence[Pair], settings: Settings) -> None:
    """`decayed` of all pairs, in place."""
    if not settings.weight_decay:
        return
    if settings.decay == "factors":
        torch._foreach_mul_([p for pair in pairs for p in pair[:2]], 1 - settings.lr * settings.weight_decay / 2)
        return
    for pair in pairs:
        U, V = decayed(pair.U, pair.V, settings)                    # (m, r), (r, n)
        pair.U.copy_(U)
        pair.V.copy_(V)
