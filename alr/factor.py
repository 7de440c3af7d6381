"""Change the rank of a factorisation W = U @ V.

Dims: m out_features, n in_features, r rank now, k rank wanted.  U (m, r), V (r, n), W (m, n).

Everything here is a pure function of tensors.  The small r x r algebra runs in float64 on the CPU whatever the factors
are: it costs nothing there, it is the same on every device, and MPS has neither float64 nor a full set of solvers.
"""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Iterator

import torch
from torch import Tensor

from .axes import Factors


def break_even(m: int, n: int) -> int:
    """The largest rank at which r (m + n) numbers are not more than the m n of the dense matrix; at least 1."""
    return max(1, m * n // (m + n))


def check_rank(k: int | float, m: int, n: int, who: str = "resize", layer: str = "a matrix", least: int = 1) -> int:
    """k as a whole number, if a matrix of m x n can have that rank.

    A whole number is a rank, `least` or more (0: a layer that is off, for who can make one).  Any other real number is a
    share of the dense matrix's numbers, 0.5 half of them.  numpy's and torch's numbers count as Python's.
    ValueError for a rank or a share out of range, and for what is neither.
    """
    if getattr(k, "ndim", None) == 0 and hasattr(k, "item"):        # a tensor or an array that is one number
        k = k.item()
    if isinstance(k, bool) or not isinstance(k, numbers.Real) or not math.isfinite(k):
        raise ValueError(f"{who}: rank {k!r} asked of {layer} ({m} x {n}); it takes a whole number, {least} to {min(m, n)}, or "
                         "a share of the dense layer's numbers between 0 and 1, such as 0.5.")
    if not isinstance(k, numbers.Integral):
        if not 0 < k <= 1:
            raise ValueError(f"{who}: share {k:g} asked of {layer} ({m} x {n}); it takes 0 to 1, or a rank as a whole "
                             f"number, 1 to {min(m, n)}.")
        return min(max(1, int(k * m * n / (m + n))), m, n)
    if not least <= k <= min(m, n):
        raise ValueError(f"{who}: rank {k} asked of {layer} ({m} x {n}); it takes {least} to {min(m, n)}.")
    return int(k)


def working(dtype: torch.dtype) -> torch.dtype:
    """The precision that arithmetic on numbers of this dtype is done in: float32, or wider where they are."""
    return torch.promote_types(dtype, torch.float32)


@contextlib.contextmanager
def uncast(device: torch.device) -> Iterator[None]:
    """Products in the dtype of their factors, also inside of the caller's autocast."""
    if not torch.amp.is_autocast_available(device.type):            # meta has none
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


@contextlib.contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Products as exact as the dtype of their factors: autocast off, and TF32 and bfloat16 inside of float32 products.

    It turns the device's own knob, whichever of torch's two ways the user has set it by, `set_float32_matmul_precision` or
    `fp32_precision`, and turns it back.  A knob that followed `torch.backends.fp32_precision` follows it again.
    """
    knob = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul
    before = knob.fp32_precision                                    # "none": not set, which is float32
    with uncast(device):
        if before in ("ieee", "none"):
            yield
            return
        knob.fp32_precision = "ieee"
        try:
            yield
        finally:
            knob.fp32_precision = "none"
            if knob.fp32_precision != before:                       # set by itself, not by what it follows
                knob.fp32_precision = before


def halves(P: Tensor, S: Tensor, Zt: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of P diag(S) Zt with the root of S on each side.  (m, k), (k,), (k, n) -> (m, k), (k, n)."""
    half = S.sqrt()                                                 # (k,)
    return P * half, half[:, None] * Zt                             # (m, k), (k, n)


# ------------------------------------------------------------------------------------------------ the core

def wide(X: Tensor) -> Tensor:
    """X in float64, on the CPU where its device has no float64 (MPS)."""
    X = X.detach()
    if X.is_complex():
        raise TypeError(f"a factor is {X.dtype}, and ranks are worked out in real numbers; leave such layers dense.")
    return X.cpu().double() if X.device.type == "mps" else X.double()


def gram(X: Tensor, host: bool = True) -> Tensor:
    """X^T X in float64, on the CPU unless host=False.  (m, r) -> (r, r).

    In float32 it would lose every s below 3e-4 of the largest.
    """
    X = wide(X)
    return (X.mT @ X).cpu() if host else X.mT @ X                   # (r, r)


def root_of(G: Tensor) -> Tensor:
    """An R with R^T R = G, for a positive semidefinite G.  (r, r) -> (r, r).

    Cholesky; when G is singular and Cholesky does not exist, the symmetric root by eigh.
    """
    L, info = torch.linalg.cholesky_ex(G)
    if info.item() == 0:
        return L.mT                                                 # (r, r)
    lam, E = torch.linalg.eigh(G)                                   # (r,), (r, r)
    return lam.clamp_min(0).sqrt()[:, None] * E.mT                  # (r, r)


def root(X: Tensor) -> Tensor:
    """An R with R^T R = X^T X, so that X = Q R for a Q with orthonormal columns that nobody has to form.

    (m, r) -> (r, r), float64 on the CPU.  From QR when X is float64 itself; otherwise `root_of` its Gram matrix in
    float64, several times faster, and as exact as float32 or narrower factors can tell.
    """
    if X.dtype == torch.float64:
        return torch.linalg.qr(X.detach(), mode="r").R.cpu()        # (min(m, r), r)
    return root_of(gram(X))                                         # (r, r)


def core_of(Gu: Tensor, Gv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`core` from the Gram matrices U^T U and V V^T alone.  (r, r), (r, r) -> (r,), (r, r), (r, r).

    From eigh(C C^T), which finds S down to 1e-8 of the largest: under what float32 factors hold.
    """
    Ru = root_of(Gu)                                                # (r, r)
    CR = Gv @ Ru.mT                                                 # (r, r) = Rv^T C^T
    lam, P = torch.linalg.eigh(Ru @ CR)                             # (r,), (r, r), rising
    S, P = lam.flip(0).clamp_min(0).sqrt(), P.flip(1)               # (r,), (r, r)
    A = (CR @ P) / S.clamp_min(torch.finfo(S.dtype).tiny)           # (r, r): Z = C^T P / S
    return S, A, P.mT @ Ru


def core(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W's singular values and the way to its singular vectors, from r x r matrices alone: W is never formed.

    With roots Ru, Rv (U = Qu Ru, V^T = Qv Rv) the core C = Ru Rv^T = P S Z^T has W's singular values, since
    W = (Qu P) S (Qv Z)^T.  Returns S (r,), falling, A = Rv^T Z (r, r) and B = P^T Ru (r, r), for which
    U A = (Qu P) S and B V = S (Qv Z)^T.  float64 on the CPU.  O((m + n) r^2).

    From the SVD of C when the factors are float64; else from their Gram matrices (`core_of`), in half the time.
    """
    if U.dtype == torch.float64:
        Ru, Rv = root(U), root(V.mT)                                # (r, r), (r, r)
        P, S, Zt = torch.linalg.svd(Ru @ Rv.mT, full_matrices=False)    # (q, q), (q,), (q, q)
        return S, Rv.mT @ Zt.mT, P.mT @ Ru
    return core_of(gram(U), gram(V.mT))


def singular_values(U: Tensor, V: Tensor) -> Tensor:
    """The r singular values of W = U V, falling, from the core.  (m, r), (r, n) -> (r,) float64 on the CPU."""
    return core(U, V)[0]                                            # (r,)


# ------------------------------------------------------------------------------------------------ other ranks

def svd_full(U: Tensor, V: Tensor, k: int, eps: float = 0.0, split: str = "sqrt") -> tuple[Tensor, Tensor]:
    """The best rank-k approximation of U V by forming W and taking its whole SVD: the reference, and the scripts' way.

    (m, r), (r, n) -> (m, k), (k, n).  O(m n min(m, n)).  k may be above r: then the extra directions are whatever null
    vectors the SVD returns, scaled by sqrt(eps) in each factor (script v10: eps = 1e-8).

    Where does S go?  "sqrt": its root to each factor (scripts v3 to v7.1, v7.4 to v10).  "left": all of it to U (v7.2,
    v7.3).  Ours is "sqrt": both factors then see gradients of like size.
    """
    m, n = U.shape[0], V.shape[1]
    check_rank(k, m, n)
    wide = working(U.dtype)                                         # no half-precision SVD anywhere
    with exact(U.device):
        W = (U.detach() @ V.detach()).cpu().to(wide)                # (m, n)
    P, S, Zt = torch.linalg.svd(W, full_matrices=False)             # (m, q), (q,), (q, n)
    P, S, Zt = P[:, :k], S[:k], Zt[:k]                              # (m, k), (k,), (k, n)
    if split == "sqrt":
        U2, V2 = halves(P, S + eps, Zt)                             # (m, k), (k, n)
    elif split == "left":
        U2, V2 = P * S, Zt                                          # (m, k), (k, n)
    else:
        raise ValueError(f"svd_full: split {split!r}; it is 'sqrt' or 'left'.")
    return U2.to(U), V2.to(V)


def mixed(U: Tensor, V: Tensor, A: Tensor, B: Tensor) -> Factors:
    """The factors U A, B V, in the dtype and on the device of the old ones.  (m, r), (r, n), (r, k), (k, r) -> `Factors`."""
    wide = working(U.dtype)                                         # as exact here as forming W in that dtype would be
    with exact(U.device):
        U2 = (U.detach().to(wide) @ A.to(U.device, wide)).to(U)     # (m, k)
        V2 = (B.to(V.device, wide) @ V.detach().to(wide)).to(V)     # (k, n)
    return Factors(U2, V2, (A, B))


def core_cut(U: Tensor, V: Tensor, k: int) -> Factors:
    """The best rank-k approximation of U V, k <= r, from the r x r core: what `svd_full` gives, W never formed.

    (m, r), (r, n) -> U' (m, k), V' (k, n), S split evenly: U' = U A S^(-1/2) and V' = S^(-1/2) B V with A and B of `core`.
    O((m + n) r^2).  Orthonormal bases are never formed either.
    Directions that W does not have (s below r eps of the largest, eps of the precision worked in) start as `grow` would
    start them.  Rank 0 is W' = 0.  ValueError unless 0 <= k <= r.
    """
    r = U.shape[1]
    if not 0 <= k <= r:
        raise ValueError(f"svd_core: rank {k} asked of factors of rank {r}; it takes 0 to {r} (grow adds directions).")
    if k == 0:
        none = torch.zeros(r, 0, dtype=torch.float64)               # (r, 0)
        return mixed(U, V, none, none.mT)
    S, A, B = core(U, V)                                            # (r,), (r, r), (r, r)
    live = int((S > S[0] * r * torch.finfo(working(U.dtype)).eps).sum())    # directions that are more than rounding
    q = min(k, live)
    half = S[:q].rsqrt()                                            # (q,)
    cut = mixed(U, V, A[:, :q] * half, half[:, None] * B[:q])       # (m, q), (q, n)
    return cut if q == k else Factors(*grow(cut.U, cut.V, k, like=V))


def svd_core(U: Tensor, V: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The factors of `core_cut` alone: (m, r), (r, n) -> (m, k), (k, n)."""
    return core_cut(U, V, k)[:2]


def grow(U: Tensor, V: Tensor, k: int, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Add k - r directions and leave W exactly as it was.

    New rows of V are orthogonal to the old ones and to each other, new columns of U are zero: the product does not
    change, the gradient of U is alive at once.  Same idea as LoRA's start (Hu et al. 2022, sec. 4.1).

    (m, r), (r, n) -> (m, k), (k, n).  ValueError unless r <= k <= min(m, n).  Length of the new rows: the mean length of
    the rows of `like` (V itself), 1 when there are none (ours, untuned).  Draws from torch's global generator.
    """
    m, r, n = U.shape[0], U.shape[1], V.shape[1]
    if k < r:
        raise ValueError(f"grow: rank {k} asked of factors of rank {r}; growing never shrinks (svd_core does).")
    check_rank(k, m, n, "grow", least=0)
    if k == r:
        return U.detach().clone(), V.detach().clone()
    rows = wide(V).cpu()                                           # (r, n)
    Q = torch.linalg.qr(rows.mT).Q                                  # (n, r), spans the old rows
    X = torch.randn(n, k - r, dtype=torch.float64, device="cpu")    # (n, k - r)
    for _ in range(2):                                              # twice is enough (Giraud, Langou & Rozloznik 2005)
        X = X - Q @ (Q.mT @ X)                                      # (n, k - r)
    X = torch.linalg.qr(X).Q.mT                                     # (k - r, n)
    lengths = (rows if like is None else wide(like).cpu()).norm(dim=1)
    length = lengths.mean().item() if lengths.numel() and lengths.sum() > 0 else 1.0
    U2 = torch.cat([U.detach(), U.new_zeros(m, k - r)], dim=1)      # (m, k)
    V2 = torch.cat([V.detach(), (length * X).to(V)], dim=0)         # (k, n)
    return U2, V2


# ------------------------------------------------------------------------------------------------ what a change does

def change_of_basis(U: Tensor, V: Tensor, U2: Tensor, V2: Tensor) -> tuple[Tensor, Tensor]:
    """How gradients of the old factors become gradients of the new ones: g_U' = g_U T_U and g_V' = T_V g_V.

    Write U' = U A and V' = B V.  With G the gradient of W, g_U' = G V'^T = G V^T B^T = g_U B^T, and g_V' = A^T g_V.
    So T_U = B^T (r, k) and T_V = A^T (k, r), the least-squares solutions, whatever way the new factors were found.
    A grown direction is orthogonal to the old ones: its entries are zero, since the past says nothing of it.
    float64 on the CPU.  O((m + n) r^2).
    """
    def solve(X, Y):                                                # min-norm C with X C = Y in the span of X
        G = gram(X)                                                 # (r, r)
        C = (wide(X).mT @ wide(Y)).cpu()                          # (r, k)
        return torch.linalg.pinv(G, hermitian=True, rtol=1e-12) @ C
    return solve(V.mT, V2.mT), solve(U, U2).mT                      # (r, k), (k, r)


def relative_change(U: Tensor, V: Tensor, U2: Tensor, V2: Tensor) -> float:
    """||U V - U' V'||_F / ||U V||_F from Gram matrices (resolves about 1e-8); 0 when both are zero, inf from zero."""
    def inner(A, B, C, D):                                          # <A B, C D> = tr(B^T A^T C D)
        AC, DB = wide(A).mT @ wide(C), wide(D) @ wide(B).mT     # (r, k), (k, r)
        return torch.einsum("rk,kr->", AC.cpu(), DB.cpu()).item()
    old, new, both = inner(U, V, U, V), inner(U2, V2, U2, V2), inner(U, V, U2, V2)
    if old <= 0:
        return 0.0 if new <= 0 else float("inf")
    return max(0.0, (old + new - 2 * both) / old) ** 0.5


def mix_change(Gu: Tensor, Gv: Tensor, A: Tensor, B: Tensor) -> float:
    """`relative_change` of U' = U A, V' = B V, from the old factors' Gram matrices: (r, r), (r, r), (r, k), (k, r)."""
    D = A @ B - torch.eye(len(Gu), dtype=Gu.dtype, device=Gu.device)    # (r, r): W' - W = U D V
    whole = torch.einsum("ij,ji->", Gu, Gv).item()
    return 0.0 if whole <= 0 else max(0.0, torch.einsum("ij,ji->", D.mT @ Gu @ D, Gv).item() / whole) ** 0.5
