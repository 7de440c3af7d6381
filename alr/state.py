"""What does the optimizer remember of a layer whose rank has changed?

Dims: m out_features, n in_features, r old rank, k new rank.  U (m, r) -> U' (m, k), V (r, n) -> V' (k, n).
A policy is asked once for all layers that change together: `policy.plan(optimizers, swaps)` computes, and may refuse;
`Plan.apply()` writes, and cannot fail.  `policy(optimizers, swaps)` does both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .axes import StatePolicy
from .factor import change_of_basis, exact, working

LINEAR = ("exp_avg", "momentum_buffer")                             # averages of gradients: linear in them
SQUARE = ("exp_avg_sq", "max_exp_avg_sq")                           # averages of their squares


class Swap(NamedTuple):
    """One layer's old and new Parameters; mix: see `axes.Factors`."""

    U: nn.Parameter                     # (m, r)
    V: nn.Parameter                     # (r, n)
    U2: nn.Parameter                    # (m, k)
    V2: nn.Parameter                    # (k, n)
    mix: tuple[Tensor, Tensor] | None = None


class Move(NamedTuple):
    """One Parameter that an optimizer is to hold in place of another, with the state it begins with ({}: none)."""

    optimizer: Optimizer
    group: dict
    place: int                          # in group["params"]
    old: nn.Parameter
    new: nn.Parameter
    state: dict


class Plan(NamedTuple):
    """What is to be written into the optimizers; nothing has been yet."""

    moves: tuple[Move, ...] = ()
    forget: tuple[Optimizer, ...] = ()  # those whose whole state is dropped first

    def apply(self) -> None:
        for optimizer in self.forget:
            optimizer.state.clear()
        for optimizer, group, place, old, new, state in self.moves:
            optimizer.state.pop(old, None)
            group["params"][place] = new
            if state:
                optimizer.state[new] = state


def places_of(optimizers: Sequence[Optimizer], p: nn.Parameter) -> list[tuple[Optimizer, dict, int]]:
    """(optimizer, param group, place in it), wherever a Parameter is held; several optimizers may take turns with it."""
    return [(optimizer, group, i) for optimizer in optimizers for group in optimizer.param_groups
            for i, held in enumerate(group["params"]) if held is p]


def place_of(optimizers: Sequence[Optimizer], p: nn.Parameter) -> tuple[Optimizer, dict, int] | None:
    """The first of its places; None where nobody holds it."""
    return next(iter(places_of(optimizers, p)), None)


def holder(optimizers: Sequence[Optimizer], p: nn.Parameter) -> Optimizer | None:
    """The optimizer that steps a Parameter; None where nobody holds it."""
    found = place_of(optimizers, p)
    return None if found is None else found[0]


def fitting(state: dict, p: Tensor) -> dict:
    """A copy of an optimizer's state of a Parameter, where it is of p's shape; {} where it is of another."""
    fits = all(not isinstance(x, Tensor) or x.dim() == 0 or x.shape == p.shape or (x.dim() == 1 and len(x) in p.shape)
               for x in state.values())
    return dict(state) if fits else {}


def moves(optimizers: Sequence[Optimizer], swaps: Sequence[Swap]) -> list[tuple[Swap, str, Move]]:
    """Both Parameters of every swap, as (swap, "U" or "V", Move with the old state), in every optimizer that holds them.

    U and V that one optimizer holds come one after the other.  ValueError if no optimizer holds an old one.
    """
    out = []
    for swap in swaps:
        both = (("U", swap.U, swap.U2), ("V", swap.V, swap.V2))
        for _, old, _ in both:
            if place_of(optimizers, old) is None:
                raise ValueError(f"no optimizer holds the parameter of shape {tuple(old.shape)} whose rank changes; was the "
                                 "optimizer made before factorize_ or before load_state_dict? Make it after them.")
        out += [(swap, side, Move(*place, old, new, optimizer.state.get(old, {}))) for optimizer in optimizers
                for side, old, new in both for place in places_of([optimizer], old)]
    return out


class _Policy(StatePolicy):
    def __call__(self, optimizers: Sequence[Optimizer], swaps: Sequence[Swap]) -> None:
        self.plan(optimizers, swaps).apply()


@dataclass(frozen=True)
class Stale(_Policy):
    """Tell the optimizer nothing: it goes on holding the old parameters, and the layer is never trained again.

    The historic flaw of scripts v3 to v6, v7.1 to v7.3 and v9.  Kept to show it.

    It has a second half: `optimizer.zero_grad()` does not reach the new parameters either, so their .grad is a running
    sum since the change, and decisions that look at gradients read the sum.  zero=True takes this half away.
    """

    zero: bool = False                  # clear the frozen factors' gradients after every step (and decision)
    tells = False

    def plan(self, optimizers, swaps) -> Plan:
        return Plan()


@dataclass(frozen=True)
class Reset(_Policy):
    """Forget: of every parameter, embeddings included (script v10), or of the changed factors only.

    always: forget at every decision, whether or not a rank has changed (script v7.4).
    ValueError for always without everything: where no rank has changed, there are no changed factors.
    """

    everything: bool = True
    always: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.always and not self.everything:
            raise ValueError("Reset: always=True forgets at every decision, also where no factor has changed; it goes with "
                             "everything=True alone.")

    def check(self, optimizers) -> None:
        for optimizer in optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                raise TypeError("Reset: LBFGS keeps one flat history of all parameters, which no rank change can follow; "
                                "use another optimizer, or a recipe that holds its ranks.")

    def plan(self, optimizers, swaps) -> Plan:
        found = moves(optimizers, swaps)
        forgets = self.everything and (swaps or self.always)
        return Plan(tuple(move._replace(state={}) for _, _, move in found), tuple(optimizers) if forgets else ())


@dataclass(frozen=True)
class Transport(_Policy):
    """Carry the moments to the new basis.

    Gradients obey g_U' = g_U T_U and g_V' = T_V g_V (`factor.change_of_basis`), so an average of gradients does too, and
    the first moment is exact for factors that stood still while it was gathered.  The second is a diagonal, which no
    rotation keeps; we carry the variance: v' = (T o T)(v - m^2) + m'^2, the form of LDAdam (Robert et al. 2024), on
    bias-corrected moments.  Directions that are new start with m = 0 and the mean second moment of the old ones (ours,
    untuned): with v = 0 and an old step count, Adam's first step for them would be about three times its usual length.

    For Adam, AdamW, NAdam, RAdam, SGD with momentum, Muon, and `optim.PairOptimizer`; others are refused by name.
    first=False: the first moment starts again from zero and only the second is carried.  count=False: the moments are
    carried and the step counter of the changed factors starts again from zero, so that Adam takes its averages for young
    ones and divides by 1 - beta^step once more.  Both are experiments of notebook 12_optimizer_reset.
    """

    first: bool = True
    count: bool = True

    def check(self, optimizers) -> None:
        """TypeError for an optimizer whose state this policy does not understand, or that counts no steps to set back."""
        known = tuple(getattr(torch.optim, name) for name in ("Adam", "AdamW", "NAdam", "RAdam", "SGD", "Muon")
                      if hasattr(torch.optim, name))
        for optimizer in optimizers:
            if not isinstance(optimizer, known) and not getattr(optimizer, "transportable", False):
                advice = "Use an optimizer of that list" if isinstance(optimizer, torch.optim.LBFGS) else \
                    "Use state=Reset(everything=False), or set `transportable = True` on an optimizer of your own that " \
                    "keeps nothing else"
                raise TypeError(f"Transport: {type(optimizer).__name__} keeps state that is not known to be averages of "
                                f"gradients ({', '.join(LINEAR)}) or of their squares ({', '.join(SQUARE)}), as Adam, AdamW, "
                                f"NAdam, RAdam, SGD and Muon do. {advice}.")
            if not self.count and not (isinstance(optimizer, known[:4])):
                raise TypeError(f"Transport: count=False sets the step counter of Adam's family back, and "
                                f"{type(optimizer).__name__} corrects no averages by one. Use Adam, AdamW, NAdam or RAdam "
                                "for the factors, or leave count out.")

    @torch.no_grad()
    def plan(self, optimizers, swaps) -> Plan:
        out = []
        for _, held in groupby(moves(optimizers, swaps), lambda one: (id(one[0]), id(one[2].optimizer))):
            found = list(held)                                      # both factors, or the one that this optimizer steps
            for (_, _, move), state in zip(found, carried(found)):
                if not self.first:
                    state |= {key: torch.zeros_like(M) for key, M in state.items() if key in LINEAR and M is not None}
                if not self.count and "step" in state:
                    state["step"] = torch.zeros_like(state["step"])
                out.append(move._replace(state=state))
        return Plan(tuple(out))


@dataclass(frozen=True)
class Slice(_Policy):
    """Cut the moments to the new shape, as if the basis had not turned (InRank's surgery); grown parts start at zero.

    Kept to show it: after an SVD the new coordinates are not the first k of the old ones.
    """

    def check(self, optimizers) -> None:
        Transport().check(optimizers)

    @torch.no_grad()
    def plan(self, optimizers, swaps) -> Plan:
        out = []
        for _, _, move in moves(optimizers, swaps):
            m, n = (min(a, b) for a, b in zip(move.old.shape, move.new.shape))
            cut = {}
            for key, M in move.state.items():
                cut[key] = M
                if isinstance(M, Tensor) and M.dim() == 2:
                    cut[key] = M.new_zeros(move.new.shape)          # (m, k) or (k, n)
                    cut[key][:m, :n] = M[:m, :n]
            out.append(move._replace(state=cut))
        return Plan(tuple(out))


def basis(swap: Swap) -> tuple[Tensor, Tensor]:
    """`factor.change_of_basis` of a swap: T_U (r, k), T_V (k, r), float64 on the CPU."""
    return (swap.mix[1].mT, swap.mix[0].mT) if swap.mix else change_of_basis(*swap[:4])


def carried(found: Sequence[tuple[Swap, str, Move]]) -> Sequence[dict]:
    """The old state of the factors that one optimizer holds, in the new basis; one that steps pairs is asked (`carry`)."""
    swap, _, first = found[0]
    own = getattr(first.optimizer, "carry", None) if len(found) == 2 and found[1][2].group is first.group else None
    if own is not None and (state := own(first.group, swap, *(move.state for _, _, move in found))) is not None:
        return state
    if not any(move.state for _, _, move in found):
        return [{} for _ in found]
    T_U, T_V = basis(swap)                                          # (r, k), (k, r)
    turns = {"U": (T_U, "right"), "V": (T_V.mT, "left")}
    return [carry(move.state, move.old, turns[side][0].to(move.new.device, working(move.new.dtype)), turns[side][1],
                  move.group.get("betas")) if move.state else {} for _, side, move in found]


def carry(state: dict, old: Tensor, T: Tensor, side: str, betas: tuple[float, float] | None) -> dict:
    """One parameter's optimizer state in the new basis.

    side "right": moments (m, r) become (m, k) as M T.  side "left": (r, n) become (k, n) as T^T M.  T (r, k).
    Scalars (step), None and vectors along the side that keeps its length (L,) stay.  TypeError for any other tensor
    that is not known.
    """
    def times(M: Tensor, T: Tensor) -> Tensor:
        with exact(T.device):
            out = M.to(T.dtype) @ T if side == "right" else T.mT @ M.to(T.dtype)    # (m, k) or (k, n)
        return out.to(M.dtype)

    step = float(state.get("step", 1))
    fix1, fix2 = (1 - betas[0] ** step, 1 - betas[1] ** step) if betas and step > 0 else (1.0, 1.0)
    size = T.square().sum(0)                                        # (k,)
    largest = size.max().clamp_min(1e-30) if len(size) else 1.0
    fresh = size <= 1e-12 * largest                                 # (k,): directions that the old basis did not have
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
