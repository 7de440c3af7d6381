"""What the factors alone do not show: the inputs that a layer sees, and the gradient of the whole W.

Dims: m out_features, n in_features, r rank, B rows of a batch (all leading dims flattened).  x (B, n), h = x V^T (B, r),
y = h U^T (B, m), W = U V (m, n), G = dloss/dW (m, n).

An axis value that needs them has `attach(adapter)`, which calls `watch`; the hooks work on the steps that end in a
decision and on no other, so they cost nothing in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor

from .factor import core, for_layer, grow, svd_core

MOMENTS = ("hidden", "felt")            # what `watch` keeps on a layer from one decision to the next, both (r, r)


def watch(adapter, hidden: bool = False, felt: bool = False, gradient: bool = False, steps: int = 1) -> None:
    """Keep, on every low-rank layer, what its last `steps` batches before a decision have shown.

    hidden: layer.hidden = mean of h h^T (r, r).  felt: layer.felt = mean of d d^T (r, r) with d = B dloss/dh, of the loss
    summed over tokens.  gradient: layer.dense_gradient = sum of G (m, n), as large as W.
    Axes of one recipe that want the same are served by one set of hooks.
    """
    steps = min(steps, adapter.recipe.every)                        # a window does not reach back beyond a decision
    asked = {(kind, steps) for kind, on in (("hidden", hidden), ("felt", felt), ("gradient", gradient)) if on}
    wanted = {kind for kind, _ in asked - adapter.watched}
    adapter.watched |= asked

    def due():
        """Steps until the next decision, if it is near."""
        r, now = adapter.recipe, adapter.steps + 1                  # the step whose forward this is
        wait = -(now - r.offset) % r.every
        return wait if wait < steps and (r.stop is None or now + wait <= r.stop) else None

    def keep(layer, name, moment, wait):
        old = getattr(layer, name, None)
        fresh = wait == steps - 1 or old is None or old.shape != moment.shape
        setattr(layer, name, moment / steps if fresh else old + moment / steps)

    def look(layer, args, y):
        wait = due()
        if wait is None or not y.requires_grad:
            return
        x = args[0].detach().flatten(0, -2)                         # (B, n)
        if "hidden" in wanted:
            h = x.to(layer.V.dtype) @ layer.V.detach().mT           # (B, r)
            keep(layer, "hidden", h.mT @ h / len(h), wait)
        if wanted != {"hidden"}:
            y.register_hook(lambda g: feel(layer, x, g.detach().flatten(0, -2), wait))

    def feel(layer, x, g, wait):                                    # (B, n), (B, m)
        if "felt" in wanted:
            d = g.to(layer.U.dtype) @ layer.U.detach()              # (B, r)
            keep(layer, "felt", d.mT @ d * len(d), wait)
        if "gradient" in wanted:
            G = g.mT @ x.to(g.dtype)                                # (m, n)
            old = getattr(layer, "dense_gradient", None)
            layer.dense_gradient = G if old is None else old + G

    for layer in adapter.layers.values() if wanted else ():
        layer.register_forward_hook(look)


# ------------------------------------------------------------------------------------------- worth of directions

def output_energy(U: Tensor, V: Tensor, hidden: Tensor) -> Tensor:
    """Mean square of the layer's output along its own principal directions, falling: eigenvalues of U H U^T.

    With inputs of identity covariance these are the s_j^2.  hidden H = mean of h h^T (r, r).  -> (r,) float64, CPU.
    """
    H = hidden.double().cpu()                                       # (r, r)
    L, info = torch.linalg.cholesky_ex(H + torch.eye(len(H), dtype=H.dtype) * 1e-12 * H.diagonal().sum())
    if info.item():
        raise FloatingPointError("output_energy: the inputs' second moment is not finite; the model has diverged.")
    UL = U.detach().double().cpu() @ L                              # (m, r)
    return torch.linalg.eigvalsh(UL.mT @ UL).clamp_min(0).flip(0)   # (r,)


def loss_lost(U: Tensor, V: Tensor, grad_U: Tensor) -> Tensor:
    """By how much the loss would change, to first order, without each singular direction: |s_j p_j^T G z_j|.

    From the factor's own gradient, G is not needed: s_j p_j^T G z_j = (U A)_j^T (g_U B^T)_j / s_j, with A, B of
    `factor.core`.  In the order of the singular values, which it need not follow.  -> (r,) float64, CPU.
    """
    S, A, B = core(U, V)                                            # (r,), (r, r), (r, r)
    M = (U.detach().double().mT @ grad_U.double()).cpu()            # (r, r)
    return ((A.mT @ M) * B).sum(1).abs() / S.clamp_min(S[0] * 1e-12)        # (r,)


@dataclass(frozen=True)
class OutputSpectrum:
    """Worth by what reaches the next layer: shares of the output's energy, which depend on the inputs too."""

    relative: bool = True

    def attach(self, adapter) -> None:
        watch(adapter, hidden=True)

    def __call__(self, layer) -> tuple[float, ...]:
        if getattr(layer, "hidden", None) is None or len(layer.hidden) != layer.rank:
            return (1.0 / layer.rank,) * layer.rank                 # nothing seen yet: all alike
        e = output_energy(layer.U, layer.V, layer.hidden)           # (r,)
        return tuple((e / e.sum() if self.relative and e[0] > 0 else e).tolist())


@dataclass(frozen=True)
class LossSpectrum:
    """Worth by what the loss would lose: first order, from the gradient of the last batch, sorted."""

    def __call__(self, layer) -> tuple[float, ...]:
        if layer.U.grad is None:
            raise RuntimeError("LossSpectrum: the layer has no gradient; call adapter.step() before gradients are zeroed.")
        return tuple(loss_lost(layer.U, layer.V, layer.U.grad).sort(descending=True).values.tolist())


# ------------------------------------------------------------------------------------------------------- growth

def grow_along(U: Tensor, V: Tensor, k: int, G: Tensor) -> tuple[Tensor, Tensor]:
    """Add k - r directions where the loss falls fastest, and leave W as it was.

    New rows of V are the leading right singular vectors of (I - P_U) G (I - P_V), the part of the gradient that no
    change of the present factors reaches; new columns of U are zero, so their first gradient is G v, the largest there
    is.  Length of the rows: the mean length of V's.  (m, r), (r, n), (m, n) -> (m, k), (k, n).
    """
    r = U.shape[1]
    U2, V2 = grow(U, V, k)                                          # checks k; random rows where G runs out
    Qu = torch.linalg.qr(U.detach().double().cpu()).Q               # (m, r)
    Qv = torch.linalg.qr(V.detach().double().cpu().mT).Q            # (n, r)
    R = G.detach().double().cpu()                                   # (m, n)
    R = R - Qu @ (Qu.mT @ R)
    R = R - (R @ Qv) @ Qv.mT
    if k == r or not R.norm() > 1e-12 * G.norm():
        return U2, V2
    Z = torch.linalg.svd(R, full_matrices=False).Vh[:k - r]         # (<= k - r, n)
    length = V.detach().norm(dim=1).mean()
    V2[r:r + len(Z)] = (Z / Z.norm(dim=1, keepdim=True)).to(V2) * length
    return U2, V2


@dataclass(frozen=True)
class TwoWays:
    """One rule to shrink by, another to grow by."""

    shrink: Callable                    # (U, V, k) -> (U', V'), as on the recipe's axis `resize`
    grow: Callable

    def attach(self, adapter) -> None:
        for rule in (self.shrink, self.grow):
            if hasattr(rule, "attach"):
                rule.attach(adapter)

    def of(self, layer):
        """The resize of one layer."""
        return TwoWays(for_layer(self.shrink, layer), for_layer(self.grow, layer))

    def __call__(self, U: Tensor, V: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return (self.grow if k > U.shape[1] else self.shrink)(U, V, k)


@dataclass(frozen=True)
class GrowAlongGradient:
    """Shrink by the core's SVD, grow along the gradient of the last `steps` batches: ours."""

    steps: int = 4                      # ours

    def attach(self, adapter) -> None:
        watch(adapter, gradient=True, steps=self.steps)

    def of(self, layer):
        """The resize of one layer, which knows its gradient; the gradient is used up."""
        def resize(U, V, k):
            G = layer.__dict__.pop("dense_gradient", None)
            if k <= U.shape[1]:
                return svd_core(U, V, k)
            return grow(U, V, k) if G is None else grow_along(U, V, k, G)
        return resize

    def __call__(self, U: Tensor, V: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return svd_core(U, V, k) if k <= U.shape[1] else grow(U, V, k)
