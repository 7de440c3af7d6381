"""An optimizer for pairs of factors: a step bounds the change of the product W = U V, not of its factors.

Dims: m out_features, n in_features, r rank.  U (m, r), V (r, n).  A side is U or V^T, (L, r) with L = m or n;
b sides of one length L and like rank are worked on together, padded with zero columns to the largest rank R of them.
"""

from __future__ import annotations

from typing import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from .linear import low_rank_layers

BUCKET = 64     # sides whose ranks lie in one stretch of so many are worked on together (ours; wider ones waste their padding)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)    # of the quintic that sends singular values towards 1; Muon (Jordan 2024)


def orthogonalize(X: Tensor, steps: int = 5) -> Tensor:
    """X's polar factor, nearly: all singular values moved into about [0.7, 1.2] (Jordan 2024), vectors kept.

    The obvious version, on X itself: (..., L, r) -> (..., L, r).  O(steps L r^2).
    """
    a, b, c = COEFFICIENTS
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-30)     # (..., L, r)
    for _ in range(steps):
        G = X.mT @ X                                                # (..., r, r)
        X = a * X + X @ (b * G + c * G @ G)                         # (..., L, r)
    return X


def whitener(G: Tensor, steps: int = 5) -> Tensor:
    """The Q for which X Q is `orthogonalize(X)`, from G = X^T X alone: (..., r, r) -> (..., r, r).  O(steps r^3).

    Every iterate is X times a polynomial in G, so the long side is needed twice (for G and for X Q), not 2 steps times.
    """
    a, b, c = COEFFICIENTS
    eye = torch.eye(G.shape[-1], device=G.device, dtype=G.dtype)    # (r, r)
    size = G.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(1e-30)[..., None, None]     # ||X||_F^2
    G, Q = G / size, None                                           # (..., r, r)
    for left in reversed(range(steps)):
        P = a * eye + b * G + c * G @ G                             # (..., r, r); commutes with G
        Q = P * size.rsqrt() if Q is None else Q @ P                # (..., r, r)
        G = P @ G @ P if left else G
    return Q


class PairOptimizer(Optimizer):
    """Momentum, orthogonalised, on both factors, with one radius for the two of them: after Spectron (2026).

    With O_U and O_V the orthogonalised momenta, U -= rho O_U and V -= rho O_V, where
    rho = lr / (sigma_max(U) + sigma_max(V) + 1).  Orthogonalised matrices have a spectral norm of about 1, so that of
    the change of W is at most about lr, whatever the scale or the rank of the factors: lr needs no retuning when a rank
    changes.  sigma_max comes from one power iteration a step, started from the last one's vector.

    pairs: (U, V) by layer, for instance `pairs(model)`; every other parameter belongs to another optimizer.
    lr: radius in spectral norm (0.03: ours, between 0.015 and 0.06, which single runs on words and on characters chose).
    momentum 0.95, nesterov: Muon's.
    weight_decay: decoupled, of both factors by half, so that W shrinks by lr * weight_decay.
    State per factor: momentum_buffer, and `direction` (L,), which no change of rank touches.  `Transport` carries both.
    ValueError: a parameter list that is not pairs of fitting shapes.
    """

    transportable = True

    def __init__(self, pairs: Iterable[tuple[nn.Parameter, nn.Parameter]], lr: float = 0.03, momentum: float = 0.95,
                 nesterov: bool = True, weight_decay: float = 0.0, ns_steps: int = 5):
        flat = [p for pair in pairs for p in pair]
        if not flat:
            raise ValueError("PairOptimizer: no pairs; call alr.factorize_(model, rank=...) before it is made.")
        super().__init__(flat, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay,
                                "ns_steps": ns_steps})
        for U, V in zip(flat[::2], flat[1::2]):
            if U.dim() != 2 or V.dim() != 2 or U.shape[1] != V.shape[0]:
                raise ValueError(f"PairOptimizer: {tuple(U.shape)} and {tuple(V.shape)} are no factors of one matrix; "
                                 "wanted (m, r) and (r, n).")

    @torch.no_grad()
    def step(self, closure=None):
        """One step of every pair that has gradients; a pair with one gradient missing is left as it is."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            flat = group["params"]
            live = [(U, V) for U, V in zip(flat[::2], flat[1::2]) if U.grad is not None and V.grad is not None]
            if live:
                self._step(group, [p for pair in live for p in pair])
        return loss

    def _step(self, group, params):
        buffers = [self._buffer(p) for p in params]
        grads = [p.grad for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        moves = torch._foreach_lerp(grads, buffers, group["momentum"]) if group["nesterov"] else buffers
        sides: dict[tuple, list[int]] = {}                          # (L, bucket, device, dtype) -> places in params
        for i, p in enumerate(params):
            L, r = p.shape[i % 2], p.shape[1 - i % 2]                       # even: U (m, r); odd: V (r, n)
            sides.setdefault((L, -(-r // BUCKET), p.device, p.dtype), []).append(i)
        updates, sigmas = [None] * len(params), [None] * len(params)
        for places in sides.values():
            X = _stack([_side(moves[i], i) for i in places])        # (b, L, R)
            O = X @ whitener(X.mT @ X, group["ns_steps"])           # (b, L, R)
            sigma = self._sigma([params[i] for i in places], places)                # (b,)
            for j, i in enumerate(places):
                r = params[i].shape[1 - i % 2]
                updates[i], sigmas[i] = _side(O[j, :, :r], i), sigma[j]
        radii = [group["lr"] / (sigmas[i] + sigmas[i + 1] + 1) for i in range(0, len(params), 2) for _ in (0, 1)]
        torch._foreach_mul_(updates, radii)
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"] / 2)
        torch._foreach_sub_(params, updates)

    def _buffer(self, p):
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]

    def _sigma(self, params, places):
        """sigma_max of each side, by power iteration from where the last step left off.  -> (b,)"""
        X = _stack([_side(p, i) for p, i in zip(params, places)])   # (b, L, R)
        fresh = any("direction" not in self.state[p] for p in params)
        x = torch.stack([self.state[p].get("direction", _longest(X[j])) for j, p in enumerate(params)])[..., None]
        for _ in range(8 if fresh else 1):                          # (b, L, 1)
            x = X @ (X.mT @ x)
            x = x / x.norm(dim=1, keepdim=True).clamp_min(1e-30)
        for j, p in enumerate(params):
            self.state[p]["direction"] = x[j, :, 0]
        return (X.mT @ x).norm(dim=(1, 2))


def _side(p: Tensor, place: int) -> Tensor:
    """U as it is, V transposed, and back: (m, r) or (r, n) <-> (L, r)."""
    return p.mT if place % 2 else p


def _stack(sides: list[Tensor]) -> Tensor:
    """(L, r) each, r as it comes -> (b, L, R)."""
    R = max(s.shape[1] for s in sides)
    return torch.stack([s if s.shape[1] == R else F.pad(s, (0, R - s.shape[1])) for s in sides])


def _longest(X: Tensor) -> Tensor:
    """The column of largest norm, with length 1: (L, R) -> (L,)."""
    x = X[:, X.norm(dim=0).argmax()]                                # (L,)
    return x / x.norm().clamp_min(1e-30)


def pairs(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """(U, V) of every LowRankLinear of the model, in module order."""
    return [(layer.U, layer.V) for layer in low_rank_layers(model).values()]


def optimizers(model: nn.Module, lr: float = 0.03, weight_decay: float = 0.0, rest_lr: float = 0.01,
               rest_weight_decay: float = 0.01, **adamw) -> list[Optimizer]:
    """What to train a factorised model with: [PairOptimizer on its factors, AdamW on everything else].

    Both take .step() and .zero_grad(); `RankAdapter` takes the list.  rest_lr: embeddings and head bear, and want, more
    than AdamW's usual rate for matrices (0.01: ours, from single runs, flat between 0.006 and 0.024 there; chapter 16).
    """
    made = PairOptimizer(pairs(model), lr, weight_decay=weight_decay)
    mine = {id(p) for group in made.param_groups for p in group["params"]}
    rest = [p for p in model.parameters() if id(p) not in mine]
    return [made, torch.optim.AdamW(rest, rest_lr, weight_decay=rest_weight_decay, **adamw)] if rest else [made]
