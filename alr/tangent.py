"""Update rules that see a pair of factors as a point of the manifold of rank-r matrices: `Tangent` and `LoRATSD`.

Dims: m out_features, n in_features, r rank, b pairs of one shape, W = U V.  U (b, m, r), V (b, r, n); G = dloss/dW (m, n),
which nobody forms: g_U = G V^T, g_V = U^T G.

A tangent vector at W is what dU V + U dV can be.  In frames Q_U (m, r) and Q_V (n, r) of W's columns and rows it is
T = Q_U C Q_V^T + X Q_V^T + Q_U Y with Q_U^T X = 0 and Y Q_V = 0: three blocks of a matrix of four.  The sign of T, all of
its singular values moved to 1, is [Q_U X] Z [Q_V^T; Y] with a 2r x 2r core Z, found from C, X^T X and Y Y^T alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .axes import Count
from .factor import exact, working
from .rules import (
    COEFFICIENTS,
    Pair,
    Rule,
    Settings,
    alike,
    average,
    averaged,
    decay_,
    decayed,
    orthogonalize,
    shape_scale,
    stacked,
)

TINY = 1e-15                            # norms below count as zero: their squares are still numbers in float32 (ours)


# ------------------------------------------------------------------------------------------------ frames

def frame(X: Tensor) -> tuple[Tensor, Tensor]:
    """Q with orthonormal columns that span X's, and the A with Q = X A.  (b, L, r) -> (b, L, r), (b, r, r).

    Shifted Cholesky QR, twice (Fukaya et al. 2020), and one step of Newton-Schulz for what the shifts have left: products
    and r x r work only, on every device, with no number read by the host.  A direction that X does not have (below about
    1e-5 of ||X||_F in float32) is absent from Q too: Q Q^T projects on the columns of X, whatever its rank is, and
    whatever g is, g A is the part of it that X's columns know.  float32 or wider.  O(L r^2).
    """
    r, eps = X.shape[-1], torch.finfo(X.dtype).eps
    eye = torch.eye(r, dtype=X.dtype, device=X.device)              # (r, r)
    shift = max(16, r) * eps * eye                                  # above what rounding makes of a zero (ours)
    size = X.norm(dim=(-2, -1), keepdim=True).clamp_min(TINY)       # (b, 1, 1)
    A = inverse_factor(X.mT @ X / size.square() + shift) / size     # (b, r, r)
    Q = X @ A                                                       # (b, L, r)
    G = Q.mT @ Q                                                    # (b, r, r), near to I
    B = inverse_factor(G + shift)                                   # (b, r, r)
    B = 1.5 * B - 0.5 * B @ (B.mT @ G @ B)                          # (b, r, r)
    return Q @ B, A @ B


def inverse_factor(G: Tensor) -> Tensor:
    """The upper triangular A with A^T G A = I, for a positive definite G.  (b, r, r) -> (b, r, r)."""
    L = torch.linalg.cholesky_ex(G).L                               # (b, r, r); nothing is read by the host
    eye = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device).expand_as(L)
    return torch.linalg.solve_triangular(L, eye, upper=False).mT


def outside(Y: Tensor, Q: Tensor) -> Tensor:
    """What of Y's rows lies outside of Q's columns: Y (I - Q Q^T).  (b, r, n), (b, n, r) -> (b, r, n)."""
    return Y - (Y @ Q) @ Q.mT


class Sign(NamedTuple):
    """The sign of a tangent vector, [Q_U X] Z [Q_V^T; Y], and the A_U, A_V with Q_U = U A_U and Q_V = V^T A_V."""

    Q_U: Tensor                         # (b, m, r)
    X: Tensor                           # (b, m, r)
    Z: Tensor                           # (b, 2r, 2r)
    Q_V: Tensor                         # (b, n, r)
    Y: Tensor                           # (b, r, n)
    A_U: Tensor                         # (b, r, r)
    A_V: Tensor                         # (b, r, r)

    def formed(self) -> Tensor:
        """(b, m, n)."""
        return torch.cat([self.Q_U, self.X], -1) @ self.Z @ torch.cat([self.Q_V.mT, self.Y], -2)


def core_sign(K: Tensor, GX: Tensor, GY: Tensor, steps: int) -> Tensor:
    """Newton-Schulz on T = [Q_U X] K [Q_V^T; Y], by its core: -> Z, (b, 2r, 2r).

    GX = X^T X and GY = Y Y^T, (b, r, r); T of Frobenius norm 1.  Every iterate a T + b T T^T T + c (T T^T)^2 T has the
    core a K + K (b H + c H H), where H = diag(I, GY) K^T diag(I, GX) K.  X and Y need no bases of their own, so it does
    not matter how many of their directions are null.  O(steps r^3).
    """
    a, b, c = COEFFICIENTS
    r = GX.shape[-1]
    for _ in range(steps):
        top, low = K[:, :r], K[:, r:]                               # (b, r, 2r), (b, r, 2r)
        H = torch.baddbmm(top.mT @ top, low.mT, GX @ low)           # (b, 2r, 2r): K^T diag(I, GX) K
        H[:, r:] = GY @ H[:, r:]
        K = torch.baddbmm(K, K, torch.baddbmm(H, H, H, beta=b, alpha=c), beta=a)
    return K


def tangent_sign(C: Tensor, X: Tensor, Y: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """The sign of T = Q_U C Q_V^T + X Q_V^T + Q_U Y, where Q_U^T X = 0 and Y Q_V = 0: -> Z, and X and Y of unit size of T.

    (b, r, r), (b, m, r), (b, r, n) -> (b, 2r, 2r), (b, m, r), (b, r, n).
    """
    GX, GY = X.mT @ X, Y @ Y.mT                                     # (b, r, r), (b, r, r)
    trace = GX.diagonal(dim1=-2, dim2=-1).sum(-1) + GY.diagonal(dim1=-2, dim2=-1).sum(-1)       # (b,)
    size = (trace + C.square().sum((-2, -1))).sqrt().clamp_min(TINY)[:, None, None]             # (b, 1, 1): ||T||_F
    eye = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device).expand_as(C)
    K = torch.cat([torch.cat([C / size, eye], -1), torch.cat([eye, torch.zeros_like(C)], -1)], -2)      # (b, 2r, 2r)
    return core_sign(K, GX / size.square(), GY / size.square(), steps), X / size, Y / size


# ------------------------------------------------------------------------------------------------ the rule

@dataclass(frozen=True)
class Tangent(Rule):
    """Muon on the manifold of rank-r matrices: ours, a relative of Riemannion (Bogachev et al. 2025).

    M: the momentum, a tangent vector, seen from the tangent space of today's W (projected on it), where today's gradient
    joins it.  Z: the sign of the tangent vector that Nesterov's rule makes of the two.  Then D = (1 - lr wd) W - lr Z, of
    rank up to 2r, is cut back to rank r:

    cut "svd": the best approximation of D, by the SVD of a 2r x 2r core.
    cut "qr": U' = the Q of D V^+, and V' = U'^T D.  D minus this is (I - U' U'^T)(D - W)(I - Q_V Q_V^T), since
        (I - U' U'^T) D V^T = 0 and W (I - Q_V Q_V^T) = 0.  So what the cut drops is part of the step: its spectral norm is
        at most that of lr Z, which also bounds what "svd" drops (Weyl), and the two differ by at most the sum.

    At r = min(m, n) nothing is projected or cut, and W moves as dense Muon moves it, step for step.  W's path does not
    depend on how W is split.  A U with zero columns (grown) or a V with zero rows moves at once.  U' is orthonormal and
    near to U, so V' has W's singular values.  Decay shrinks W by lr * weight_decay under both names of `decay`: W is
    tangent to itself.

    State, in the factors' dtype: M = X F_V + F_U Y, X and Y as momentum_buffer (m, r) and (r, n), F_U and F_V, the frames
    that M was last seen from, as frame (m, r) and (r, n).  M is a matrix in the space of W: a change of factors or of rank
    leaves it alone but for what the new tangent space does not hold.  All algebra is in float32 or wider; factors in
    bfloat16 are rounded once a step, W with them.
    """

    cut: Literal["qr", "svd"] = "qr"
    keeps_tangent = True

    def state(self, U, V):
        return tuple({"momentum_buffer": torch.zeros_like(p),
                      "frame": torch.zeros_like(p)} for p in (U, V))

    def reference(self, U, V, g_U, g_V, s_U, s_V, settings):
        dtype, wide = U.dtype, working(U.dtype)
        U, V, g_U, g_V, X, F_U, Y, F_V = (x.to(wide) for x in (U, V, g_U, g_V, *parts(s_U), *parts(s_V)))
        lr, r = settings.lr * shape_scale(settings.adjust_lr_fn, U.shape[0], V.shape[1]), U.shape[1]
        U_, V_ = torch.linalg.pinv(U), torch.linalg.pinv(V)         # (r, m), (n, r)
        P_U, P_V = U @ U_, V_ @ V                                   # (m, m), (n, n): projectors on W's columns and rows
        T = of_gradients(g_U, g_V, U_, V_, P_V)                     # (m, n): P_T(G)
        M = X @ F_V + F_U @ Y                                       # (m, n)
        M = M @ P_V + P_U @ M - P_U @ M @ P_V                       # P_T(M)
        M = M.lerp(T, 1 - settings.momentum)
        Z = orthogonalize(T.lerp(M, settings.momentum) if settings.nesterov else M, settings.ns_steps)      # (m, n)
        D = (1 - settings.lr * settings.weight_decay) * (U @ V) - lr * Z    # (m, n)
        if self.cut == "svd":
            P, S, Qt = torch.linalg.svd(D, full_matrices=False)     # (m, q), (q,), (q, n)
            U2, V2 = P[:, :r], S[:r, None] * Qt[:r]                 # (m, r), (r, n)
        else:
            U2 = torch.linalg.qr(D @ V_ + U - U @ (V @ V_)).Q       # (m, r); a column of U whose row of V is zero stays
            V2 = U2.mT @ D                                          # (r, n)
        frames = [orthonormal(U), orthonormal(V.mT)]                # (m, r), (n, r)
        s_U = {"momentum_buffer": M @ frames[1], "frame": frames[0]}
        s_V = {"momentum_buffer": frames[0].mT @ (M - M @ P_V), "frame": frames[1].mT}
        return U2.to(dtype), V2.to(dtype), *({key: x.to(dtype) for key, x in s.items()} for s in (s_U, s_V))

    def step(self, pairs, settings):
        for group in alike(pairs):
            U, V, sign, momentum = self.sign(group, settings)
            for pair, *new in zip(group, *momentum):                # (m, R), (m, R), (R, n), (R, n)
                for old, x in zip((*parts(pair.s_U), *parts(pair.s_V)), new):
                    old.copy_(x[:old.shape[0], :old.shape[1]])
            lr = settings.lr * shape_scale(settings.adjust_lr_fn, U.shape[-2], V.shape[-1])
            keep = 1 - settings.lr * settings.weight_decay
            U2, V2 = (cut_svd if self.cut == "svd" else cut_qr)(U, V, sign, lr, keep)
            for pair, u, v in zip(group, U2, V2):
                r = pair.U.shape[1]
                pair.U.copy_(u[:, :r])
                pair.V.copy_(v[:r])

    def sign(self, pairs: Sequence[Pair], settings: Settings) -> tuple[Tensor, Tensor, Sign, tuple[Tensor, ...]]:
        """What pairs of one shape and like rank are moved by: (U, V, the sign, the new state as X, F_U, Y, F_V)."""
        wide = working(pairs[0].U.dtype)
        U, g_U, X, F_U = (stacked(side, wide) for side in zip(*((p.U, p.g_U, *parts(p.s_U)) for p in pairs)))   # (b, m, R)
        V, g_V, Y, F_V = (stacked([x.mT for x in side], wide).mT
                          for side in zip(*((p.V, p.g_V, *parts(p.s_V)) for p in pairs)))                       # (b, R, n)
        (Q_U, A_U), (Q_V, A_V) = frame(U), frame(V.mT)              # (b, m, R), (b, n, R)
        X, Y = seen_from(X, F_U, Y, F_V, Q_U, Q_V)                  # (b, m, R), (b, R, n)
        new_X, new_Y = g_U @ A_V, outside(A_U.mT @ g_V, Q_V)        # G Q_V and Q_U^T G (I - Q_V Q_V^T)
        X, Y = X.lerp(new_X, 1 - settings.momentum), Y.lerp(new_Y, 1 - settings.momentum)
        momentum = (X, Q_U, Y, Q_V.mT)
        if settings.nesterov:
            X, Y = new_X.lerp(X, settings.momentum), new_Y.lerp(Y, settings.momentum)
        C = Q_U.mT @ X                                              # (b, R, R)
        Z, X, Y = tangent_sign(C, X - Q_U @ C, Y, settings.ns_steps)
        return U, V, Sign(Q_U, X, Z, Q_V, Y, A_U, A_V), momentum

    def tangent(self, s_U, s_V):
        return (*parts(s_U), *parts(s_V))

    @torch.no_grad()
    def carry(self, swap, s_U, s_V):
        wide, dtype = working(swap.U.dtype), swap.U2.dtype
        with exact(swap.U2.device):
            Q_U, Q_V = frame(swap.U2.detach()[None].to(wide))[0], frame(swap.V2.detach().mT[None].to(wide))[0]
            X, F_U, Y, F_V = (x[None].to(swap.U2.device, wide) for x in (*parts(s_U), *parts(s_V)))
            X, Y = seen_from(X, F_U, Y, F_V, Q_U, Q_V)              # (1, m, k), (1, k, n)
        return ({"momentum_buffer": X[0].to(dtype), "frame": Q_U[0].to(dtype)},
                {"momentum_buffer": Y[0].to(dtype), "frame": Q_V[0].mT.to(dtype, memory_format=torch.contiguous_format)})


def parts(state: dict) -> tuple[Tensor, Tensor]:
    """What `Tangent` remembers of one factor, in the order that everything here takes it."""
    return state["momentum_buffer"], state["frame"]


def of_gradients(g_U: Tensor, g_V: Tensor, U_: Tensor, V_: Tensor, P_V: Tensor) -> Tensor:
    """P_T(G) = G P_V + P_U G (I - P_V) from G V^T = g_U and U^T G = g_V, and U^+, V^+ and P_V = V^+ V.  -> (m, n)."""
    rows = U_.mT @ g_V                                              # (m, n): P_U G
    return g_U @ V_.mT @ P_V + rows - rows @ P_V


def orthonormal(X: Tensor) -> Tensor:
    """A basis of X's columns by the SVD, with zero columns for the directions that X does not have: (L, r) -> (L, r)."""
    P, S, _ = torch.linalg.svd(X, full_matrices=False)              # (L, r), (r,)
    return P * (S > max(X.shape) * torch.finfo(X.dtype).eps * S[:1])


def seen_from(X: Tensor, F_U: Tensor, Y: Tensor, F_V: Tensor, Q_U: Tensor, Q_V: Tensor) -> tuple[Tensor, Tensor]:
    """M = X F_V + F_U Y projected on the tangent space of other frames: X' = M Q_V, Y' = Q_U^T M (I - Q_V Q_V^T).

    (b, m, r), (b, m, r), (b, r, n), (b, r, n) and frames (b, m, k), (b, n, k) -> (b, m, k), (b, k, n).  O((m + n) r k).
    """
    X2 = X @ (F_V @ Q_V) + F_U @ (Y @ Q_V)                          # (b, m, k)
    Y2 = (Q_U.mT @ X) @ F_V + (Q_U.mT @ F_U) @ Y                    # (b, k, n)
    return X2, outside(Y2, Q_V)


def cut_qr(U: Tensor, V: Tensor, sign: Sign, lr: float, keep: float) -> tuple[Tensor, Tensor]:
    """D = keep U V - lr Z cut to rank r as `Tangent` says under "qr".  -> (b, m, r), (b, r, n)."""
    Q_U, X, Z, _, Y, A_U, A_V = sign
    r = U.shape[-1]
    E = lr * Z[..., :r] @ A_V.mT                                    # (b, 2r, r)
    N = torch.baddbmm(keep * U - Q_U @ E[:, :r], X, E[:, r:], alpha=-1)         # (b, m, r): D V^+
    Q, R = torch.linalg.qr(N)                                       # Householder's: columns that N lacks are made up
    U2 = Q * torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[:, None].to(Q)    # (b, m, r): near to U
    own = U2.mT @ U                                                 # (b, r, r)
    E = lr * ((own @ A_U) @ Z[:, :r] + (U2.mT @ X) @ Z[:, r:])      # (b, r, 2r): U'^T (D - keep W) in sign's rows
    return U2, torch.baddbmm((keep * own - E[..., :r] @ A_V.mT) @ V, E[..., r:], Y, alpha=-1)


def cut_svd(U: Tensor, V: Tensor, sign: Sign, lr: float, keep: float) -> tuple[Tensor, Tensor]:
    """D = keep U V - lr Z cut to rank r by its SVD.  -> (b, m, r), (b, r, n).  About three times the cost of `cut_qr`."""
    r = U.shape[-1]
    P, Q = torch.linalg.qr(torch.cat([U, sign.X], -1)).Q, torch.linalg.qr(torch.cat([V, sign.Y], -2).mT).Q
    left, right = P.mT @ torch.cat([sign.Q_U, sign.X], -1), torch.cat([sign.Q_V.mT, sign.Y], -2) @ Q     # (b, 2r, 2r)
    core = keep * (P.mT @ U) @ (V @ Q) - lr * left @ sign.Z @ right         # (b, min(m, 2r), min(n, 2r))
    A, S, Bt = torch.linalg.svd(core, full_matrices=False)
    return P @ A[..., :r], S[:, :r, None] * (Bt[:, :r] @ Q.mT)


# ------------------------------------------------------------------------------------------------ its relative

@dataclass(frozen=True)
class LoRATSD(Rule):
    """Tangent-space spectral descent (LoRA-TSD, Andriianov et al. 2026): the step is added to the factors.

    Momenta are averages of the factors' gradients.  The tangent vector T that they make is replaced by P_T(sign T), tau
    times over, P_T the projection on the tangent space; then dU = -lr T V^T (V V^T)^-1 and
    dV = (U^T U)^-1 U^T (-lr T - dU V), so that dU V + U dV = -lr T.  balance: after the step the scalar that makes both
    factors equally long goes from one to the other, and the inverse to the momenta; W stays.

    From the authors' code and its descriptions: the step, balance, the core of T wholly in dU.  Not here: their cap on
    ||lr T||_F (0.1, for fine-tuning: at the ranks of pre-training it would set every step), their warm-up and their ridge
    (a direction that a factor does not have is left out instead, see `frame`); so weak directions that the factors do have
    take steps as long as lr over their singular value, and ill-conditioned factors diverge.  tau 3: from the paper's
    fine-tuning, better there than 1.
    Decay: `rules.decayed`.  State per factor: momentum_buffer, in the factor's dtype.
    """

    tau: Count = 3
    balance: bool = True

    def state(self, U, V):
        return tuple({"momentum_buffer": torch.zeros_like(p)} for p in (U, V))

    def reference(self, U, V, g_U, g_V, s_U, s_V, settings):
        wide = working(U.dtype)
        lr = settings.lr * shape_scale(settings.adjust_lr_fn, U.shape[0], V.shape[1])
        M_U, X = average(g_U, s_U["momentum_buffer"], settings)     # (m, r), (m, r)
        M_V, Y = average(g_V, s_V["momentum_buffer"], settings)     # (r, n), (r, n)
        X, Y, A, B = (x.to(wide) for x in (X, Y, U, V))
        U_, V_ = torch.linalg.pinv(A), torch.linalg.pinv(B)         # (r, m), (n, r)
        P_U, P_V = A @ U_, V_ @ B                                   # (m, m), (n, n)
        T = of_gradients(X, Y, U_, V_, P_V)                         # (m, n)
        for _ in range(self.tau):
            Z = orthogonalize(T, settings.ns_steps)                 # (m, n)
            T = Z @ P_V + P_U @ Z - P_U @ Z @ P_V                   # (m, n)
        dU = -lr * T @ V_                                           # (m, r)
        dV = U_ @ (-lr * T - dU @ B)                                # (r, n)
        U2, V2 = decayed(U, V, settings)
        U2, V2 = U2 + dU.to(U), V2 + dV.to(V)
        c = even(U2, V2) if self.balance else 1.0
        return U2 * c, V2 / c, {"momentum_buffer": M_U / c}, {"momentum_buffer": M_V * c}

    def step(self, pairs, settings):
        moves, moved = averaged(pairs, settings), {}
        moves = {id(pair): both for pair, *both in zip(pairs, moves[::2], moves[1::2])}
        for group in alike(pairs):
            wide = working(group[0].U.dtype)
            U, X = stacked([p.U for p in group], wide), stacked([moves[id(p)][0] for p in group], wide)     # (b, m, R)
            V, Y = (stacked([x.mT for x in side], wide).mT
                    for side in zip(*((p.V, moves[id(p)][1]) for p in group)))                              # (b, R, n)
            (Q_U, A_U), (Q_V, A_V) = frame(U), frame(V.mT)          # (b, m, R), (b, n, R)
            X, Y, R = X @ A_V, A_U.mT @ Y, U.shape[-1]              # (b, m, R), (b, R, n)
            C = Q_U.mT @ X                                          # (b, R, R)
            X = X - Q_U @ C                                         # (b, m, R)
            for _ in range(self.tau):
                # twice outside: what rounding leaves inside, every sign lifts by some 500
                Z, X, Y = tangent_sign(C, outside(X.mT, Q_U).mT, outside(outside(Y, Q_V), Q_V), settings.ns_steps)
                C, X, Y = Z[:, :R, :R], X @ Z[:, R:, :R], Z[:, :R, R:] @ Y      # P_T: the fourth block is left out
            lr = settings.lr * shape_scale(settings.adjust_lr_fn, U.shape[-2], V.shape[-1])
            dU, dV = lr * ((Q_U @ C + X) @ A_V.mT), lr * (A_U @ Y)  # (b, m, R), (b, R, n)
            moved |= {id(pair): (u[:, :pair.U.shape[1]], v[:pair.U.shape[1]]) for pair, u, v in zip(group, dU, dV)}
        decay_(pairs, settings)
        for i in (0, 1):
            torch._foreach_sub_([pair[i] for pair in pairs], [moved[id(pair)][i].to(pair[i].dtype) for pair in pairs])
        if self.balance:
            cs = [even(pair.U, pair.V) for pair in pairs]           # on the device
            torch._foreach_mul_([pair.U for pair in pairs], cs)
            torch._foreach_div_([pair.V for pair in pairs], cs)
            torch._foreach_div_([pair.s_U["momentum_buffer"] for pair in pairs], cs)
            torch._foreach_mul_([pair.s_V["momentum_buffer"] for pair in pairs], cs)


def even(U: Tensor, V: Tensor) -> Tensor:
    """The c for which c U and V / c are of one Frobenius norm; 1 where a factor is zero.  (m, r), (r, n) -> ()."""
    u, v = U.norm(), V.norm()
    c = (v / u).sqrt()
    return torch.where((u > 0) & (v > 0), c, torch.ones_like(c))
