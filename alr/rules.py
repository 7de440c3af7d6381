"""How does one pair of factors step?  Update rules of `optim.PairOptimizer`, each a value with a reference beside it.

Here are the rules that see two factors, `Spectron` and `LoRAMuon`; those that see a point of a manifold stand in `tangent`.

Dims: m out_features, n in_features, r rank, W = U V.  U (m, r), V (r, n); g_U, g_V gradients of the same shapes.  A side is
U or V^T, (L, r) with L = m or n; b sides of one length L and like rank are worked on together, padded with zero columns to
the largest rank R of them.

`rule.reference(...)` is the obvious version of one step of one pair, a pure function to check by eye; `rule.step(...)` is
the fast one over all pairs of a param group, in place.  A test ties the two over ten steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .axes import Axis
from .factor import working
from .linear import low_rank_layers
from .state import Swap, basis, carry

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
    """A rule that moves U and V by their gradients."""

    keeps_tangent: ClassVar[bool] = False       # does it remember a tangent vector of W, which `tangent` gives?

    def state(self, U: Tensor, V: Tensor) -> tuple[dict, dict]:
        """What is remembered of U and of V at the start."""
        raise NotImplementedError

    def reference(self, U: Tensor, V: Tensor, g_U: Tensor, g_V: Tensor, s_U: dict, s_V: dict, settings: Settings):
        """One step, nothing in place: -> U', V', s_U', s_V'."""
        raise NotImplementedError

    def step(self, pairs: Sequence[Pair], settings: Settings) -> None:
        """One step of all pairs, in place."""
        raise NotImplementedError

    def tangent(self, s_U: dict, s_V: dict) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The momentum of W as a tangent vector: X, F_U, Y, F_V of `axes.Momentum`."""
        raise NotImplementedError

    def carry(self, swap: Swap, s_U: dict, s_V: dict) -> tuple[dict, dict]:
        """The state of a pair whose factors have changed, for `state.Transport`: -> s_U', s_V'.  Nothing in place.

        For averages of gradients and vectors along a factor's long side; a rule with other state has its own.
        """
        T_U, T_V = basis(swap)                                      # (r, k), (k, r)
        wide = working(swap.U2.dtype)
        return (carry(s_U, swap.U, T_U.to(swap.U2.device, wide), "right", None),
                carry(s_V, swap.V, T_V.mT.to(swap.V2.device, wide), "left", None))


def shape_scale(name: str, m: int, n: int) -> float:
    """What a learning rate is multiplied by for an m x n matrix; names as in torch.optim.Muon.

    original: sqrt(max(1, m / n)) (Jordan 2024), dense Muon's default.  match_rms_adamw: 0.2 sqrt(max(m, n)) (Liu et al.
    2025).  none: 1.
    """
    if name == "original":
        return math.sqrt(max(1.0, m / n))
    return 0.2 * math.sqrt(max(m, n)) if name == "match_rms_adamw" else 1.0


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


def inverse_root(G: Tensor, floor: float = 1e-5) -> Tensor:
    """(G + floor ||G||_F I)^(-1/2), for a positive semidefinite G.  (..., r, r) -> (..., r, r), float32 or wider.

    `whitener` and six steps of Newton (Guo & Higham 2006) for what the quintic leaves of it.  Products only.  O(r^3).
    """
    eye = torch.eye(G.shape[-1], device=G.device, dtype=G.dtype)    # (r, r)
    G = G + floor * G.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-30) * eye       # (..., r, r)
    Q = whitener(G)                                                 # (..., r, r)
    M = Q @ G @ Q                                                   # (..., r, r), near to I
    for _ in range(6):
        T = 1.5 * eye - 0.5 * M                                     # (..., r, r)
        Q, M = Q @ T, T @ M @ T
    return Q


def power_step(X: Tensor, x: Tensor, times: int = 1) -> Tensor:
    """Power iteration for the longest left direction of X: (..., L, r), (..., L) -> (..., L), of length 1."""
    x = x[..., None]                                                # (..., L, 1)
    for _ in range(times):
        y = X @ (X.mT @ x)                                          # (..., L, 1)
        size = y.norm(dim=-2, keepdim=True)                         # (..., 1, 1)
        x = torch.where(size == 0, x, y / size.clamp_min(1e-30))    # (..., L, 1); X = 0 has no longest direction: x stays
    return x[..., 0]


def longest(X: Tensor) -> Tensor:
    """The column of largest norm, with length 1; where all are zero, or there is none, one of equal numbers: (L, r) -> (L,)."""
    even = X.new_full((len(X),), len(X) ** -0.5)                    # (L,)
    if not X.shape[1]:
        return even
    x = X.index_select(1, X.norm(dim=0).argmax()[None])[:, 0]       # (L,); no host read
    size = x.norm()
    return torch.where(size == 0, even, x / size.clamp_min(1e-30))


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


def alike(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Pairs that are worked on together: of one shape, device and dtype, and of like rank.

    On the CPU in narrower stretches: padding costs more there, and calls less.
    """
    found: dict[tuple, list[Pair]] = {}
    for pair in pairs:
        (m, r), n, device = pair.U.shape, pair.V.shape[1], pair.U.device
        like = -(-r // (BUCKET // 2 if device.type == "cpu" else BUCKET))
        found.setdefault((m, n, like, device, pair.U.dtype), []).append(pair)
    return list(found.values())


def averaged(pairs: Sequence[Pair], settings: Settings) -> list[Tensor]:
    """The momenta of all factors, brought up to date in place, with Nesterov's look ahead: [U's, V's, U's, ...]."""
    momenta = [s["momentum_buffer"] for pair in pairs for s in (pair.s_U, pair.s_V)]
    grads = [g.to(M.dtype) for g, M in zip((g for pair in pairs for g in (pair.g_U, pair.g_V)), momenta)]
    torch._foreach_lerp_(momenta, grads, 1 - settings.momentum)
    return torch._foreach_lerp(grads, momenta, settings.momentum) if settings.nesterov else momenta


def average(g: Tensor, M: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """One factor's new momentum, and that with Nesterov's look ahead: the reference of `averaged`."""
    g = g.to(M.dtype)
    M = M.lerp(g, 1 - settings.momentum)
    return M, g.lerp(M, settings.momentum) if settings.nesterov else M


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
        return tuple({"momentum_buffer": torch.zeros_like(p),
                      "direction": power_step(s := side.detach().to(working(p.dtype)), longest(s), 7).to(p.dtype)}
                     for p, side in ((U, U), (V, V.mT)))

    def reference(self, U, V, g_U, g_V, s_U, s_V, settings):
        lr = settings.lr * shape_scale(settings.adjust_lr_fn, U.shape[0], V.shape[1])
        moved, sigmas, states = [], [], []
        for g, s, side in ((g_U, s_U, U), (g_V.mT, s_V, V.mT)):
            wide = working(side.dtype)
            old = s["momentum_buffer"] if side is U else s["momentum_buffer"].mT    # (L, r)
            M, X = average(g, old, settings)                                        # (L, r), (L, r)
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
        moves = averaged(pairs, settings)
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


@dataclass(frozen=True)
class LoRAMuon(Rule):
    """Muon in the metric of the partner's Gram matrix (LoRA-Muon 2026), with the decay of the product that goes with it.

    With S_U = U^T U, S_V = V V^T and the momenta M_U, M_V: dU = -lr/2 sign(M_U S_V^-1/2) S_V^-1/2 and
    dV = -lr/2 S_U^-1/2 sign(S_U^-1/2 M_V).  Each half of dU V + U dV has a spectral norm of about lr / 2, so the change of W
    is one of about lr at most, however W is split.  U' = s U + dU / s and V' = s V + dV / s with s^2 = 1 - lr * weight_decay
    shrink W by all of it and leave the step undivided; decay "product" is `decayed`, then the step.

    From a public implementation (da462/spectron): the step and the floor of the roots, 1e-5 of a Gram matrix's norm.  Not
    here: the scalar rebalancing now and then, whose interval is not known.  Ours: Muon's quintic for the sign, `ns_steps`
    of it, in place of eight steps of Polar Express; momentum as `settings` say.
    State per factor: momentum_buffer, in the factor's dtype.
    """

    def state(self, U, V):
        return tuple({"momentum_buffer": torch.zeros_like(p)} for p in (U, V))

    def reference(self, U, V, g_U, g_V, s_U, s_V, settings):
        wide = working(U.dtype)
        half = 0.5 * settings.lr * shape_scale(settings.adjust_lr_fn, U.shape[0], V.shape[1])
        moved, states = [], []
        for g, s, partner in ((g_U, s_U, V.mT), (g_V.mT, s_V, U)):
            M, X = average(g, s["momentum_buffer"] if partner is not U else s["momentum_buffer"].mT, settings)  # (L, r)
            S = partner.to(wide).mT @ partner.to(wide)                              # (r, r)
            lam, E = torch.linalg.eigh(S)                                           # (r,), (r, r)
            root = E * (lam + 1e-5 * S.norm()).rsqrt() @ E.mT                       # (r, r): S^-1/2
            moved.append(half * orthogonalize(X.to(wide) @ root, settings.ns_steps) @ root)     # (L, r)
            states.append({"momentum_buffer": M if partner is not U else M.mT})
        U2, V2 = decayed(U, V, settings, split=True)
        s = split_root(settings)
        return U2 - (moved[0] / s).to(U), V2 - (moved[1].mT / s).to(V), *states

    def step(self, pairs, settings):
        moves = averaged(pairs, settings)
        moves = {id(pair): side for pair, *side in zip(pairs, moves[::2], moves[1::2])}
        updates = {}
        for group in alike(pairs):
            wide = working(group[0].U.dtype)
            half = 0.5 * settings.lr * shape_scale(settings.adjust_lr_fn, group[0].U.shape[0], group[0].V.shape[1])
            sides = stacked([p.U for p in group], wide), stacked([p.V.mT for p in group], wide)    # (b, m, R), (b, n, R)
            moved = (stacked([moves[id(p)][0] for p in group], wide),                              # (b, m, R)
                     stacked([moves[id(p)][1].mT for p in group], wide))                           # (b, n, R)
            for i, (X, partner) in enumerate(zip(moved, sides[::-1])):
                root = inverse_root(partner.mT @ partner)           # (b, R, R)
                X = X @ root                                        # (b, L, R)
                X = X @ (half * whitener(X.mT @ X, settings.ns_steps) @ root)       # (b, L, R)
                for pair, x in zip(group, X):
                    updates[id(pair), i] = x[:, :pair.U.shape[1]].mT if i else x[:, :pair.U.shape[1]]
        decay_(pairs, settings, split=True)
        s = split_root(settings)
        for i in (0, 1):
            torch._foreach_sub_([pair[i] for pair in pairs], [(updates[id(pair), i] / s).to(pair[i].dtype) for pair in pairs])


def split_root(settings: Settings) -> float:
    """s of `LoRAMuon`: what both factors are multiplied by so that W shrinks by lr * weight_decay; 1 under "product"."""
    return (1 - settings.lr * settings.weight_decay) ** 0.5 if settings.decay == "factors" else 1.0


def decayed(U: Tensor, V: Tensor, settings: Settings, split: bool = False) -> tuple[Tensor, Tensor]:
    """The factors after a step of decoupled weight decay, not in place.  (m, r), (r, n) -> the same.

    decay "factors": both shrink by half of lr * weight_decay, so that W shrinks by all of it.  "product": by
    `product_decayed` of lr * weight_decay.
    split: under "factors", by the root of 1 - lr * weight_decay each, so that W shrinks by it exactly (LoRA-Muon).
    """
    amount = settings.lr * settings.weight_decay
    if settings.decay == "product":
        return product_decayed(U, V, amount)
    each = split_root(settings) if split else 1 - amount / 2
    return U * each, V * each


def product_decayed(U: Tensor, V: Tensor, amount: float) -> tuple[Tensor, Tensor]:
    """The factors after the gradient step of amount / 2 ||U V||_F^2, not in place: (m, r), (r, n) -> the same.

    Strong directions shrink, weak ones hardly (Khodak et al. 2021), where decay on the factors pulls all alike and so pulls
    ranks down, like a nuclear norm.  O((m + n) r^2).
    """
    return U - amount * U @ (V @ V.mT), V - amount * (U.mT @ U) @ V


@torch.no_grad()
def product_decay_(model: nn.Module, amount: float) -> None:
    """`product_decayed` of every low-rank layer of the model (of the layer itself, where it is one), in place."""
    for layer in low_rank_layers(model).values():
        U, V = product_decayed(layer.U, layer.V, amount)            # (m, r), (r, n)
        layer.U.copy_(U)
        layer.V.copy_(V)


def decay_(pairs: Sequence[Pair], settings: Settings, split: bool = False) -> None:
    """`decayed` of all pairs, in place."""
    if not settings.weight_decay:
        return
    if settings.decay == "factors":
        each = split_root(settings) if split else 1 - settings.lr * settings.weight_decay / 2
        torch._foreach_mul_([p for pair in pairs for p in pair[:2]], each)
        return
    for pair in pairs:
        U, V = decayed(pair.U, pair.V, settings)                    # (m, r), (r, n)
        pair.U.copy_(U)
        pair.V.copy_(V)
