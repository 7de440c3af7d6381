"""Rank as the truncation of the step: a layer keeps k of the directions that W and the optimizer's momentum have.

Dims: m out_features, n in_features, r rank, k rank wanted, W = U V.  U (m, r), V (r, n).

`tangent.Tangent` remembers a tangent vector M of W.  Its part outside of W's own block, M - P_U M P_V, has up to 2r
directions: a new column on a row of W, or a new row on a column of W.  W moves along them with its next steps, and each
step is cut back to rank r.  A decision cuts to rank k instead, so it may keep some of these directions beside W's.  They
begin with no weight: W is changed by what is left out alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .axes import Count, Factors, Momentum, NonNegative, ResizeRule
from .factor import check_rank, core_cut, gram, grow, wide
from .fisher import cut_along
from .tangent import orthonormal, seen_from


def outward(U: Tensor, V: Tensor, momentum: Momentum) -> tuple[Tensor, Tensor, Tensor]:
    """The singular directions of M - P_U M P_V, what a tangent momentum has outside of W's block: sizes, columns, rows.

    (m, r), (r, n) -> (q,), falling, (m, q), (q, n), q <= 2r; float64 on the CPU.  The blocks of that part are
    (I - P_U) M P_V and P_U M (I - P_V), in different rows and columns, so its singular values are those of both.  A
    direction of the first block has a new column, and its row is left zero here; one of the second has a new row, and its
    column is left zero.  Sizes below 1e-6 of ||M||_F are rounding and left out.  O((m + n) r^2).
    """
    X, F_U, Y, F_V, U, V = (wide(x).cpu() for x in (*momentum[:4], U, V))
    Q_U, Q_V = orthonormal(U), orthonormal(V.mT)                    # (m, r), (n, r)
    X, Y = (x[0] for x in seen_from(*(x[None] for x in (X, F_U, Y, F_V, Q_U, Q_V))))    # (m, r), (r, n)
    P, S, _ = torch.linalg.svd(X - Q_U @ (Q_U.mT @ X), full_matrices=False)     # (m, r), (r,)
    _, T, Z = torch.linalg.svd(Y, full_matrices=False)              # (r,), (r, n)
    sizes, order = torch.cat([S, T]).sort(descending=True, stable=True)         # (2r,), (2r,)
    there = sizes > 1e-6 * (X.square().sum() + Y.square().sum()).sqrt()         # (2r,)
    sizes, order = sizes[there], order[there]                       # (q,), (q,)
    columns = torch.cat([P, P.new_zeros(len(P), len(T))], 1)[:, order]          # (m, q)
    rows = torch.cat([Z.new_zeros(len(S), Z.shape[1]), Z])[order]   # (q, n)
    return sizes, columns, rows


def augmented(U: Tensor, V: Tensor, k: int, columns: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of rank k that leave W as it is and have the first k - r of the new columns and rows.

    (m, r), (r, n), (m, q), (q, n) -> (m, k), (k, n).  Where q < k - r the rest is drawn as `factor.grow` draws it.  New
    columns and rows are as long as the mean of the old ones.  ValueError unless r <= k <= min(m, n).
    """
    r = U.shape[1]
    check_rank(k, U.shape[0], V.shape[1], "augmented")
    if k < r:
        raise ValueError(f"augmented: rank {k} asked of factors of rank {r}; it adds directions (FisherCut removes them).")
    columns, rows = columns[:, :k - r] * U.norm(dim=0).mean().item(), rows[:k - r] * V.norm(dim=1).mean().item()
    U2 = torch.cat([U.detach(), columns.to(U)], 1)                  # (m, <= k)
    V2 = torch.cat([V.detach(), rows.to(V)])                        # (<= k, n)
    return grow(U2, V2, k, like=V)


def promise(U: Tensor, V: Tensor, A: Tensor, B: Tensor, importance: Tensor, length: float) -> float:
    """The importance that a new direction of W would have, once it has grown to this spectral norm.

    (m, r), (r, n), (r, r), (r, r), (r,) -> one number.  The directions U A_j B_j V have the sizes c_j and the importances
    w_j, half of c_j^2 times a curvature each.  A new one is taken to meet their mean curvature, so that it would have
    length^2 sum w / sum c^2: a guess, since nothing was observed there.  Equal for all new directions of a layer, as
    `Tangent` moves all of them equally far.
    """
    Gu, Gv = gram(U), gram(V.mT)                                    # (r, r), (r, r)
    squares = (A.mT @ Gu @ A).diagonal() * (B @ Gv @ B.mT).diagonal()           # (r,): c^2
    total = squares.sum().item()
    return length ** 2 * importance.sum().item() / total if total > 0 else 0.0


@dataclass(frozen=True)
class TangentCut(ResizeRule):
    """Keep k of the directions that W and the tangent momentum have; for `PairOptimizer` with `tangent.Tangent`: ours.

    Growing adds the momentum's strongest directions outside of W and keeps W.  Shrinking is `fisher.FisherCut`, but that a
    direction of W is given up for a new one where the loss feels it less than it would feel the new one after `ahead` more
    steps of the optimizer (`promise`); 0: never.  At least one direction of W stays.  Where there is no momentum (after a
    reset, before the first step), directions are drawn as `factor.grow` draws them, and none is given up.

    The layer's W does not depend on how the old one was split.  The momentum is carried by the optimizer: as it is where
    a layer grows, projected where it shrinks.

        >>> import alr
        >>> from dataclasses import replace
        >>> from torch import nn
        >>> model = alr.factorize_(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4)), rank=3)
        >>> optimizer = alr.PairOptimizer(model)
        >>> adapter = alr.RankAdapter(model, optimizer, replace(alr.recipes.alr, resize=TangentCut()), total_steps=100)
        >>> x = torch.randn(8, 32)
        >>> model(x).square().mean().backward()
        >>> optimizer.step()
        >>> before = model(x)
        >>> adapter.resize({"0": 5})[0].new
        5
        >>> torch.allclose(model(x), before, atol=1e-6)
        True
    """

    steps: Count = 4                    # optimizer steps before each decision that are looked at, as FisherCut's
    ahead: NonNegative = 0.0            # steps (ours)
    needs = ("importance",)
    momentum = True

    def __call__(self, U, V, k, seen=None) -> Factors:
        momentum = None if seen is None else seen.momentum
        if k > U.shape[1]:
            return Factors(*(grow(U, V, k) if momentum is None else augmented(U, V, k, *outward(U, V, momentum)[1:])))
        if seen is None or seen.A is None:
            return core_cut(U, V, k)
        if momentum is None or not self.ahead:
            return cut_along(U, V, k, seen.A, seen.B, seen.grams)
        least = promise(U, V, seen.A, seen.B, seen.importance, self.ahead * momentum.lr)
        _, columns, rows = outward(U, V, momentum)                  # (m, q), (q, n)
        fresh = min(int((seen.importance[:k] < least).sum()), len(rows), max(k - 1, 0))
        cut = cut_along(U, V, k - fresh, seen.A, seen.B, seen.grams)
        return cut if not fresh else Factors(*augmented(cut.U, cut.V, k, columns, rows))
