"""Forward and backward written by hand: script v6's, which never forms W, and v7.3's, which does.

Dims: m out_features, n in_features, r rank.  x (..., n), U (m, r), V (r, n), bias (m,) or None, y (..., m).
A recipe names them on its `op` axis: `op(x, U, V, bias) -> y`, in place of `linear.factored`.  Backward works in the
dtype of dL/dy, which autocast makes narrower than the factors, and returns gradients in theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..axes import Op


def rows(X: Tensor) -> Tensor:
    """(..., d) -> (N, d)."""
    return X.reshape(-1, X.shape[-1])


class _Own(Function):
    """Keeps x and h = x V^T.  With g = dL/dy: dU = g^T h, dh = g U, dV = dh^T x, dx = dh V."""

    @staticmethod
    def forward(ctx, x, U, V, bias):
        h = F.linear(x, V)                                          # (..., r)
        ctx.save_for_backward(x, h, U, V)
        return F.linear(h, U, bias)                                 # (..., m)

    @staticmethod
    @once_differentiable                # h is kept as a number, so a second derivative would be wrong
    def backward(ctx, g):
        x, h, U, V = ctx.saved_tensors
        need_x, need_U, need_V, need_b = ctx.needs_input_grad
        g2, x2, h2 = rows(g), rows(x).to(g.dtype), rows(h).to(g.dtype)      # (N, m), (N, n), (N, r)
        dU = (g2.mT @ h2).to(U.dtype) if need_U else None           # (m, r)
        db = g2.sum(0).to(U.dtype) if need_b else None              # (m,)
        dx = dV = None
        if need_x or need_V:
            dh = g2 @ U.to(g.dtype)                                 # (N, r)
            dV = (dh.mT @ x2).to(V.dtype) if need_V else None       # (r, n)
            dx = (dh @ V.to(g.dtype)).reshape(x.shape).to(x.dtype) if need_x else None      # (..., n)
        return dx, dU, dV, db


class _FormsW(Function):
    """Forms W = U V in both directions.  With g = dL/dy: dW = g^T x, dU = dW V^T, dV = U^T dW, dx = g W."""

    @staticmethod
    def forward(ctx, x, U, V, bias):
        ctx.save_for_backward(x, U, V)
        return F.linear(x, U @ V, bias)                             # (..., m)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, U, V = ctx.saved_tensors
        need_x, need_U, need_V, need_b = ctx.needs_input_grad
        g2, U2, V2 = rows(g), U.to(g.dtype), V.to(g.dtype)          # (N, m), (m, r), (r, n)
        db = g2.sum(0).to(U.dtype) if need_b else None              # (m,)
        dx = (g2 @ (U2 @ V2)).reshape(x.shape).to(x.dtype) if need_x else None      # (..., n)
        dU = dV = None
        if need_U or need_V:
            dW = g2.mT @ rows(x).to(g.dtype)                        # (m, n)
            dU = (dW @ V2.mT).to(U.dtype) if need_U else None       # (m, r)
            dV = (U2.mT @ dW).to(V.dtype) if need_V else None       # (r, n)
        return dx, dU, dV, db


def saved_bytes(f: Callable[[], Tensor]) -> int:
    """Bytes that the graph of f() keeps for its backward, each storage once: parameters included, views not twice."""
    sizes = {}
    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = f()                       # alive until here, or a freed storage could lend its address to the next
    del out
    return sum(sizes.values())


# ------------------------------------------------------------------------------------------------ the axis: op

@dataclass(frozen=True)
class OwnBackward(Op):
    """Script v6: backward by hand from x and h = x V^T; W is never formed.

    The same gradients as autograd's for `linear.factored`, from the same saved tensors: it saves against forming W, but
    no memory against autograd, which never formed W either.
    """

    def __call__(self, x: Tensor, U: Tensor, V: Tensor, bias: Tensor | None) -> Tensor:
        return _Own.apply(x, U, V, bias)                            # (..., m)


@dataclass(frozen=True)
class FormsW(Op):
    """Script v7.3: backward by hand, but forward forms W, so that low rank saves no work.  Repair: op=OwnBackward()."""

    def __call__(self, x: Tensor, U: Tensor, V: Tensor, bias: Tensor | None) -> Tensor:
        return _FormsW.apply(x, U, V, bias)                         # (..., m)
