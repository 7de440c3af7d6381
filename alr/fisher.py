"""What does the loss feel of each direction?  Worth, and a cut, in the metric of the loss instead of that of W.

Dims: m out_features, n in_features, r rank, k wanted rank, B tokens.  U (m, r), V (r, n); h = V x (r,) the layer's hidden
values at one token, d = dloss/dh = U^T g (r,) what the loss of the batch, summed over tokens, feels of them.

Cutting puts some M (r, r) of rank k between the factors, W' = U M V.  A token's loss then changes by d^T (M - I) h to
first order; with h and d taken for independent (K-FAC: Martens & Grosse 2015) the mean square of that is

    || K^(1/2) (I - M) H^(1/2) ||_F^2      with H = mean of h h^T, K = mean of d d^T, both (r, r),

and half of it is what the empirical Fisher matrix gives for the rise of the mean loss, in nats per token.  The best M of
rank k is the truncated SVD of K^(1/2) H^(1/2); what each direction of it is worth can be compared between layers.

Trained models are compressed in such metrics, formed at the size of W: FWSVD (Hsu et al. 2022), GFWSVD (Chekalina et
al. 2025).  Between two factors everything is r x r, cheap enough to do while the model trains (ours).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from .factor import grow, svd_core
from .watch import MOMENTS, watch

DAMPING = 0.01                          # share of isotropic inputs and gradients mixed in (ours, untuned)
# Times the mean diagonal: under a second moment, where a grown direction is zero yet; the next where rounding of the sums
# over tokens, in float32, has left it a negative eigenvalue (at most about r times float32's 1e-7)
FLOORS = (1e-10, 1e-7, 1e-6, 1e-5)


def _root(moment: Tensor, gram: Tensor, damping: float) -> Tensor:
    """L with L L^T = moment + damping of an isotropic one of the same size: (r, r), (r, r) -> (r, r)."""
    moment, gram = moment.double().cpu(), gram.double().cpu()       # (r, r), (r, r)
    # whatever the factors' scale; directions that have hardly grown would magnify the moment's rounding
    scale = (torch.linalg.pinv(gram, rtol=1e-6, hermitian=True) @ moment).diagonal().mean()
    X = moment + damping * scale * gram                             # (r, r)
    for floor in FLOORS:
        L, info = torch.linalg.cholesky_ex(X + floor * X.diagonal().mean() * torch.eye(len(X), dtype=X.dtype))
        if not info.item():
            return L
    raise FloatingPointError("fisher: a second moment is not positive definite: the layer has diverged, has dependent "
                             "directions, or has seen no data and no gradient.")


def metric(U: Tensor, V: Tensor, hidden: Tensor, felt: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor, Tensor]:
    """The directions of W as the loss ranks them: S (r,), falling, A (r, r) and B (r, r) with A B = I.

    S^2 / 2 is the rise of the loss without a direction, nats per token; the best cut to rank k keeps U A_k, B_k V.
    hidden H, felt K (r, r).  The result does not depend on how W is split into factors.  float64, CPU.  O((m + n) r^2).
    """
    U, V = U.detach().double(), V.detach().double()
    LH, LK = _root(hidden, V @ V.mT, damping), _root(felt, U.mT @ U, damping)       # (r, r), (r, r)
    P, S, _ = torch.linalg.svd(LK.mT @ LH)                          # (r, r), (r,), (r, r)
    return S, torch.linalg.solve_triangular(LK.mT, P, upper=True), P.mT @ LK.mT


def fisher_cut(U: Tensor, V: Tensor, k: int, hidden: Tensor, felt: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """The rank-k factors whose loss is nearest, k <= r, split evenly: (m, r), (r, n) -> (m, k), (k, n)."""
    return _cut(U, V, k, *metric(U, V, hidden, felt, damping)[1:])


def _cut(U, V, k, A, B):                                            # (m, r), (r, n), (r, r), (r, r)
    wide = torch.promote_types(U.dtype, torch.float32)
    U2 = U.detach().to(wide) @ A[:, :k].to(U.device, wide)          # (m, k)
    V2 = B[:k].to(V.device, wide) @ V.detach().to(wide)             # (k, n)
    U2, V2 = svd_core(U2, V2, k)
    return U2.to(U), V2.to(V)


def _known(layer) -> bool:
    """Has this layer, at its present rank, been watched?"""
    return all(getattr(layer, name, None) is not None and len(getattr(layer, name)) == layer.rank
               for name in MOMENTS)


_LAST = weakref.WeakKeyDictionary()     # layer -> what `metric` was given, what it gave; not on the layer, which is copied


def _metric(layer) -> tuple[Tensor, Tensor, Tensor]:
    """`metric` of a layer; the cut finds what the worth computed, as long as nothing it depends on has changed."""
    given = (layer.U, layer.V, layer.hidden, layer.felt)
    seen, found = _LAST.get(layer, ([], None))
    if not seen or not all(ref() is x and version == x._version for (ref, version), x in zip(seen, given)):
        found = metric(*given)
        _LAST[layer] = [(weakref.ref(x), x._version) for x in given], found
    return found


@dataclass(frozen=True)
class FisherSpectrum:
    """What each direction is worth to the loss, S_j^2 / 2 in nats per token, falling; for `control.Budget`.

    Unlike shares of energy these compare directions of different layers.  Before anything was seen: all alike.
    """

    steps: int = 4                      # batches before each decision that are looked at (ours)

    def attach(self, adapter) -> None:
        watch(adapter, hidden=True, felt=True, steps=self.steps)

    def __call__(self, layer) -> tuple[float, ...]:
        if not _known(layer):
            return (1.0 / layer.rank,) * layer.rank
        return tuple((_metric(layer)[0].square() / 2).tolist())


@dataclass(frozen=True)
class FisherCut:
    """Shrink so that the loss changes least, grow as `grow` does."""

    steps: int = 4                      # as above

    def attach(self, adapter) -> None:
        watch(adapter, hidden=True, felt=True, steps=self.steps)

    def of(self, layer):
        """The resize of one layer, which knows what it has seen."""
        def resize(U, V, k):
            if k > U.shape[1] or not _known(layer):
                return self(U, V, k)
            return _cut(U, V, k, *_metric(layer)[1:])
        return resize

    def __call__(self, U: Tensor, V: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return svd_core(U, V, k) if k <= U.shape[1] else grow(U, V, k)
