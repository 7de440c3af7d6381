"""What does the optimizer remember of a layer whose rank has changed?

Dims: m out_features, n in_features, r old rank, k new rank.  U (m, r) -> U' (m, k), V (r, n) -> V' (k, n).
A policy is called once for all layers that changed together: `policy(optimizers, swaps)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .factor import change_of_basis

LINEAR = ("exp_avg", "momentum_buffer")                             # averages of gradients: linear in them
SQUARE = ("exp_avg_sq", "max_exp_avg_sq")                           # averages of their squares


class Swap(NamedTuple):
    """One layer's old and new Parameters."""

    U: nn.Parameter                     # (m, r)
    V: nn.Parameter                     # (r, n)
    U2: nn.Parameter                    # (m, k)
    V2: nn.Parameter                    # (k, n)


def replace_parameter(optimizers: Sequence[Optimizer], old: nn.Parameter, new: nn.Parameter) -> tuple[Optimizer, dict]:
    """Put `new` where `old` stands in its param group; returns the optimizer and old's state, taken out of it.

    KeyError if no optimizer holds `old`.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for i, p in enumerate(group["params"]):
                if p is old:
                    group["params"][i] = new
                    return optimizer, optimizer.state.pop(old, {})
    raise KeyError(f"no optimizer holds the parameter of shape {tuple(old.shape)} whose rank changes; was the optimizer "
                   "made before factorize_ or before load_state_dict? Make it after them.")


@dataclass(frozen=True)
class Stale:
    """Tell the optimizer nothing: it goes on holding the old parameters, and the layer is never trained again.

    The historic flaw of scripts v3 to v6, v7.1 to v7.3 and v9.  Kept to show it.
    """

    def check(self, optimizers: Sequence[Optimizer]) -> None:
        pass

    def __call__(self, optimizers: Sequence[Optimizer], swaps: Sequence[Swap]) -> None:
        pass


@dataclass(frozen=True)
class Reset:
    """Forget: of every parameter, embeddings included (script v10), or of the changed factors only."""

    everything: bool = True

    def check(self, optimizers: Sequence[Optimizer]) -> None:
        pass

    def __call__(self, optimizers: Sequence[Optimizer], swaps: Sequence[Swap]) -> None:
        for U, V, U2, V2 in swaps:
            replace_parameter(optimizers, U, U2)
            replace_parameter(optimizers, V, V2)
        if self.everything and swaps:
            for optimizer in optimizers:
                optimizer.state.clear()


@dataclass(frozen=True)
class Transport:
    """Carry the moments to the new basis.

    Gradients obey g_U' = g_U T_U and g_V' = T_V g_V (`factor.change_of_basis`), so an average of gradients does too, and
    the first moment is exact.  The second is a diagonal, which no rotation keeps; we carry the variance:
    v' = (T o T)(v - m^2) + m'^2, the form of LDAdam (Robert et al. 2024), on bias-corrected moments.  Directions that
    are new start with m = 0 and the mean second moment of the old ones (ours, untuned): with v = 0 and an old step
    count, Adam's first step for them would be about three times its usual length.

    For Adam, AdamW, NAdam, RAdam, SGD with momentum, Muon; others are refused by name.
    first=False: the first moment starts again from zero and only the second is carried (the experiment of chapter 12).
    """

    first: bool = True

    def check(self, optimizers: Sequence[Optimizer]) -> None:
        """TypeError for an optimizer whose state this policy does not understand."""
        known = tuple(getattr(torch.optim, name) for name in ("Adam", "AdamW", "NAdam", "RAdam", "SGD", "Muon")
                      if hasattr(torch.optim, name))
        for optimizer in optimizers:
            if not isinstance(optimizer, known) and not getattr(optimizer, "transportable", False):
                raise TypeError(f"Transport: {type(optimizer).__name__} keeps state that is not known to be averages of "
                                f"gradients ({', '.join(LINEAR)}) or of their squares ({', '.join(SQUARE)}). "
                                "Use state=Reset(everything=False), or set `transportable = True` on an optimizer of "
                                "your own that keeps nothing else.")

    @torch.no_grad()
    def __call__(self, optimizers: Sequence[Optimizer], swaps: Sequence[Swap]) -> None:
        for U, V, U2, V2 in swaps:
            T_U, T_V = change_of_basis(U, V, U2, V2)                # (r, k), (k, r)
            for old, new, T, side in ((U, U2, T_U, "right"), (V, V2, T_V.mT, "left")):
                optimizer, state = replace_parameter(optimizers, old, new)
                if not state:
                    continue
                group = next(g for g in optimizer.param_groups if any(p is new for p in g["params"]))
                wide = torch.promote_types(new.dtype, torch.float32)
                moved = carry(state, old, T.to(new.device, wide), side, group.get("betas"))
                if not self.first:
                    moved |= {key: torch.zeros_like(M) for key, M in moved.items() if key in LINEAR and M is not None}
                optimizer.state[new] = moved


@dataclass(frozen=True)
class Slice:
    """Cut the moments to the new shape, as if the basis had not turned (InRank's surgery); grown parts start at zero.

    Kept to show it: after an SVD the new coordinates are not the first k of the old ones.
    """

    def check(self, optimizers: Sequence[Optimizer]) -> None:
        Transport().check(optimizers)

    @torch.no_grad()
    def __call__(self, optimizers: Sequence[Optimizer], swaps: Sequence[Swap]) -> None:
        for U, V, U2, V2 in swaps:
            for old, new in ((U, U2), (V, V2)):
                optimizer, state = replace_parameter(optimizers, old, new)
                m, n = min(old.shape[0], new.shape[0]), min(old.shape[1], new.shape[1])
                cut = {}
                for key, M in state.items():
                    cut[key] = M
                    if isinstance(M, Tensor) and M.dim() == 2:
                        cut[key] = M.new_zeros(new.shape)           # (m, k) or (k, n)
                        cut[key][:m, :n] = M[:m, :n]
                if state:
                    optimizer.state[new] = cut


def carry(state: dict, old: Tensor, T: Tensor, side: str, betas: tuple[float, float] | None) -> dict:
    """One parameter's optimizer state in the new basis.

    side "right": moments (m, r) become (m, k) as M T.  side "left": (r, n) become (k, n) as T^T M.  T (r, k).
    Scalars (step), None and vectors along the side that keeps its length (L,) stay.  TypeError for any other tensor
    that is not known.
    """
    def times(M: Tensor, T: Tensor) -> Tensor:
        out = M.to(T.dtype) @ T if side == "right" else T.mT @ M.to(T.dtype)    # (m, k) or (k, n)
        return out.to(M.dtype)

    step = float(state.get("step", 1))
    fix1, fix2 = (1 - betas[0] ** step, 1 - betas[1] ** step) if betas and step > 0 else (1.0, 1.0)
    size = T.square().sum(0)                                        # (k,)
    fresh = size <= 1e-12 * size.max().clamp_min(1e-30)             # (k,): directions that the old basis did not have
    out, kept_side = {}, old.shape[0 if side == "right" else 1]
    for key, M in state.items():
        if not isinstance(M, Tensor) or M.dim() == 0 or M.shape == (kept_side,):
            out[key] = M
        elif M.shape != old.shape or key not in LINEAR + SQUARE:
            raise TypeError(f"Transport: optimizer state {key!r} of shape {tuple(M.shape)}, for a parameter of shape "
                            f"{tuple(old.shape)}, is not one it can carry; use state=Reset(everything=False).")
        elif key in LINEAR:
            out[key] = times(M, T)
        else:
            mean = state["exp_avg"] / fix1                          # (m, r) or (r, n)
            variance = (M / fix2 - mean.square()).clamp_min(0)
            second = (times(variance, T.square()) + times(mean, T).square()) * fix2
            if fresh.any() and not fresh.all():
                dim = 1 if side == "right" else 0
                kept = second.index_select(dim, (~fresh).nonzero()[:, 0])
                second = second.index_copy(dim, fresh.nonzero()[:, 0],
                                           kept.mean(dim, keepdim=True).expand_as(
                                               second.index_select(dim, fresh.nonzero()[:, 0])).contiguous())
            out[key] = second
    return out
