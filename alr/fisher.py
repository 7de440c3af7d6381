"""What does the loss feel of each direction?  Importance, and a cut, in the metric of the loss instead of that of W.

Dims: m out_features, n in_features, r rank, k wanted rank, B rows of a batch.  U (m, r), V (r, n); h = V x (r,) the
layer's hidden values at one row, d = dloss/dh = U^T g (r,) what the loss of the batch, summed over its terms, feels of them.

Cutting puts some M (r, r) of rank k between the factors, W' = U M V.  A row's loss then changes by d^T (M - I) h to
first order; with h and d taken for independent (K-FAC: Martens & Grosse 2015) the mean square of that is

    || K^(1/2) (I - M) H^(1/2) ||_F^2      with H = mean of h h^T, K = mean of d d^T, both (r, r),

and half of it is what the empirical Fisher matrix gives for the rise of the mean loss, in proportion: second order and
independence make single numbers wrong by a factor of two and more, their order is what they are good for (notebook
15_how_much_rank).
The best M of rank k is the truncated SVD of K^(1/2) H^(1/2), whose directions this file finds (`metric`).  How much the
loss feels each of them is then not modelled but measured: half the mean of (d^T a_j b_j^T h)^2 over the rows of the next
batches (`observe`), which needs no independence.  Those numbers can be compared between layers.

Trained models are compressed in such metrics, formed at the size of W: FWSVD (Hsu et al. 2022), GFWSVD (Chekalina et
al. 2025).  Between two factors everything is r x r, cheap enough to do while the model trains (ours).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .axes import Count, Estimate, Factors, ResizeRule
from .factor import core_cut, core_of, gram, grow, mixed, wide

DAMPING = 0.01                          # share of isotropic inputs and gradients mixed in (ours, untuned)
# Times the mean diagonal, added to a second moment before Cholesky.  The first covers grown directions that are still zero;
# each further one is tried when rounding left a negative eigenvalue (sums over rows in float32: about r times 1e-7 at most).
FLOORS = (1e-10, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)


def _root(moment: Tensor, gram: Tensor, damping: float) -> Tensor | None:
    """L with L L^T = moment + damping of an isotropic one of the same size: (r, r), (r, r) -> (r, r).  None for zero."""
    # whatever the factors' scale; directions that have hardly grown would magnify the moment's rounding
    scale = (torch.linalg.pinv(gram, rtol=1e-6, hermitian=True) @ moment).diagonal().mean()
    X = moment + damping * scale * gram                             # (r, r)
    size = X.diagonal().mean()
    if not size > 0:
        return None
    eye = torch.eye(len(X), dtype=X.dtype, device=X.device)
    for floor in FLOORS:
        L, info = torch.linalg.cholesky_ex(X + floor * size * eye)
        if not info.item():
            return L
    raise FloatingPointError("a second moment is far from positive semidefinite, which no rounding explains.")


def metric_of(Gu: Tensor, Gv: Tensor, input_moment: Tensor, grad_moment: Tensor,
              damping: float = DAMPING) -> tuple[Tensor, Tensor, Tensor]:
    """`metric` from the Gram matrices U^T U and V V^T, all (r, r) in float64 on the CPU.

    Where nothing was felt (a dead input, a gate at zero) all S are 0 and the directions are W's own, by singular value.
    FloatingPointError for moments that are not finite.
    """
    if not (input_moment.isfinite().all() and grad_moment.isfinite().all()):
        raise FloatingPointError("a second moment is not finite.")
    if len(Gu) == 0:                                                # a layer that is off
        return Gu.new_zeros(0), Gu, Gv
    LH, LK = _root(input_moment, Gv, damping), _root(grad_moment, Gu, damping)      # (r, r), (r, r)
    if LH is None or LK is None:
        S, A, B = core_of(Gu, Gv)                                   # (r,), (r, r), (r, r)
        half = S.clamp_min(S[0] * 1e-12 + torch.finfo(S.dtype).tiny).rsqrt()    # (r,)
        return torch.zeros_like(S), A * half, half[:, None] * B
    P, S, _ = torch.linalg.svd(LK.mT @ LH)                          # (r, r), (r,), (r, r)
    return S, torch.linalg.solve_triangular(LK.mT, P, upper=True), P.mT @ LK.mT


def metric(U: Tensor, V: Tensor, input_moment: Tensor, grad_moment: Tensor,
           damping: float = DAMPING) -> tuple[Tensor, Tensor, Tensor]:
    """The directions of W as the loss ranks them: S (r,), falling, A (r, r) and B (r, r) with A B = I.

    S^2 / 2 is the rise of the loss without a direction, in proportion; the best cut to rank k keeps U A_k, B_k V.
    input_moment H, grad_moment K (r, r).  The result does not depend on how W is split into factors.  float64, CPU.
    O((m + n) r^2).
    """
    return metric_of(gram(U), gram(V.mT), wide(input_moment).cpu(), wide(grad_moment).cpu(), damping)


def fisher_cut(U: Tensor, V: Tensor, k: int, input_moment: Tensor, grad_moment: Tensor,
               damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """The rank-k factors whose loss is nearest, k <= r, split evenly: (m, r), (r, n) -> (m, k), (k, n)."""
    return cut_along(U, V, k, *metric(U, V, input_moment, grad_moment, damping)[1:])[:2]


def cut_along(U: Tensor, V: Tensor, k: int, A: Tensor, B: Tensor, grams: tuple[Tensor, Tensor] | None = None) -> Factors:
    """Keep the first k of the directions A (r, r), B (r, r), split evenly: (m, r), (r, n) -> (m, k), (k, n).

    Worked out in r x r matrices, in float64: the new factors are U A_k C and D B_k V, with C, D those of the core.
    grams: U^T U and V V^T, where they are known already.
    """
    if k == 0:
        return core_cut(U, V, 0)
    Gu, Gv = grams or (gram(U), gram(V.mT))                         # (r, r), (r, r)
    A, B = A[:, :k].to(Gu), B[:k].to(Gu)                            # (r, k), (k, r)
    S, C, D = core_of(A.mT @ Gu @ A, B @ Gv @ B.mT)                 # (k,), (k, k), (k, k)
    if not S[-1] > S[0] * len(Gu) * torch.finfo(torch.float32).eps:     # some of them are no direction of W at all
        return core_cut(*mixed(U, V, A, B)[:2], k)._replace(mix=None)
    half = S.rsqrt()                                                # (k,)
    return mixed(U, V, A @ (C * half), (half[:, None] * D) @ B)


# ------------------------------------------------------------------------------------------------ the axes

@dataclass(frozen=True)
class FisherSpectrum(Estimate):
    """How much the loss feels each direction, falling; for `control.Budget`.

    Unlike shares of energy these compare directions of different layers: in proportion to the rise of the loss without
    the direction, with one factor for all layers (1, in nats, where the loss is a mean over all rows of one backward
    pass).  A layer that saw nothing has no importance.
    """

    steps: Count = 4                    # optimizer steps before each decision that are looked at (ours)
    needs = ("importance",)
    gives = "spectrum"

    def __call__(self, layer, seen) -> tuple[float, ...]:
        return tuple(seen.importance.tolist())


@dataclass(frozen=True)
class FisherCut(ResizeRule):
    """Shrink so that the loss changes least, grow as `grow` does."""

    steps: Count = 4                    # as above
    needs = ("importance",)

    def __call__(self, U, V, k, seen=None) -> Factors:
        if k > U.shape[1]:
            return Factors(*grow(U, V, k))
        return core_cut(U, V, k) if seen is None or seen.A is None else cut_along(U, V, k, seen.A, seen.B, seen.grams)
