"""`LowRankLinear`: a linear layer whose weight is U @ V.  Put it into any model (`factorize_`) and take it out again.

Dims: m out_features, n in_features, r rank.  U (m, r), V (r, n), W = U V (m, n).
"""

from __future__ import annotations

from typing import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .factor import check_rank
from .init import Spectral


def factored(x: Tensor, U: Tensor, V: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias by way of r: (..., n) -> (..., m).  O(r (m + n)) per row; W is never formed."""
    return F.linear(F.linear(x, V), U, bias)                        # (..., r) -> (..., m)


class LowRankLinear(nn.Module):
    """y = x (U V)^T + bias, for x of any leading shape.

    U (out_features, rank), V (rank, in_features), bias (out_features,) or None.  The rank is read from the tensors and
    kept nowhere else; loading a state dict of another rank resizes the layer (build the optimizer after loading).
    Starts as torch's nn.Linear would, truncated to the rank (`init.Spectral`).  ValueError unless
    1 <= rank <= min(in_features, out_features).
    """

    op: Callable = staticmethod(factored)                           # what forward calls; v6 and v7.3 have their own

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True, device=None, dtype=None):
        super().__init__()
        check_rank(rank, out_features, in_features, "LowRankLinear", "a layer")
        dense = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        U, V = Spectral()(dense.weight, rank)                       # (m, r), (r, n)
        self.in_features, self.out_features = in_features, out_features
        self.U, self.V, self.bias = nn.Parameter(U.contiguous()), nn.Parameter(V.contiguous()), dense.bias

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int, init=Spectral()) -> "LowRankLinear":
        """The same layer with its weight as two factors that `init` makes from it; the bias is the same Parameter."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.in_features, new.out_features = linear.in_features, linear.out_features
        grad = linear.weight.requires_grad
        U, V = init(linear.weight.detach(), rank)                   # (m, r), (r, n)
        new.U, new.V = nn.Parameter(U.contiguous(), grad), nn.Parameter(V.contiguous(), grad)
        new.bias = linear.bias
        return new.train(linear.training)

    @property
    def rank(self) -> int:
        return self.U.shape[1]

    @property
    def weight(self) -> Tensor:
        """W = U V, formed now (m, n): for export and for code that reads `.weight`; forward never does."""
        return self.U @ self.V

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.U, self.V, self.bias)                # (..., n) -> (..., m)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # a saved layer of another rank makes this one take that rank; anything else that differs is torch's to refuse
        U, V = state_dict.get(prefix + "U"), state_dict.get(prefix + "V")
        fits = U is not None and V is not None and U.dim() == V.dim() == 2 and U.shape[1] == V.shape[0]
        if fits and U.shape[0] == self.out_features and V.shape[1] == self.in_features and U.shape[1] != self.rank:
            grad = self.U.requires_grad
            self.U = nn.Parameter(self.U.new_empty(U.shape), grad)
            self.V = nn.Parameter(self.V.new_empty(V.shape), grad)
        super()._load_from_state_dict(state_dict, prefix, *args)


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """Every LowRankLinear of the model by name, in module order."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRankLinear)}


def _refuse_wrapped(model: nn.Module, who: str) -> None:
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise ValueError(f"{who}: the model is wrapped in {type(model).__name__}, which would go on holding the old "
                         f"parameters. Call {who}(model.module, ...) and wrap again.")


def _swap_module(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def factorize_(model: nn.Module, rank: int | float | Mapping[str, int | float] | Callable[[str, nn.Linear], int | float],
               where: Callable[[str], bool] | None = None, init=Spectral(), op: Callable | None = None) -> nn.Module:
    """Replace the model's nn.Linear layers by LowRankLinear ones, in place; returns the model.  `densify_` undoes it.

    rank: one number, {layer name: number}, or a function (name, linear) -> number; an int is a rank, a float a share of
    the dense layer's parameters (0.5: half).  where(name) -> bool picks layers; without it all of them (or the mapping's).
    init(weight, rank) -> (U, V); the default is the truncated SVD, so a trained model keeps the best approximation of
    what it knows.  op: what forward computes, `factored` if not said.
    Only exact nn.Linear layers are taken: a subclass may have a forward of its own.  Hooks of a replaced layer are gone.
    Make the optimizer afterwards: one made before still holds the old weights.

    ValueError, before anything is changed: nothing matched; a rank out of range; a weight shared with another module;
    a DDP-wrapped model; a model that is itself an nn.Linear.
    """
    _refuse_wrapped(model, "factorize_")
    linears = {name: mod for name, mod in model.named_modules() if type(mod) is nn.Linear}
    if "" in linears:
        raise ValueError("factorize_: the model is itself an nn.Linear and cannot be replaced in place; "
                         "use LowRankLinear.from_linear(linear, rank).")
    if isinstance(rank, Mapping):
        unknown = sorted(set(rank) - set(linears))
        if unknown:
            raise ValueError(f"factorize_: rank names {unknown[0]!r}, which is not an nn.Linear of the model; "
                             f"it has {len(linears)}, the first is {next(iter(linears), None)!r}.")
    chosen = [name for name in linears if (where is None or where(name))
              and not (isinstance(rank, Mapping) and name not in rank)]
    if not chosen:
        raise ValueError(f"factorize_: no nn.Linear matched `where`. The model has {len(linears)}"
                         + (f", the first is {next(iter(linears))!r}." if linears else "."))
    holders: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(p), []).append(name)
    ranks = {}
    for name in chosen:
        linear = linears[name]
        others = [h.rpartition(".")[0] for h in holders[id(linear.weight)] if h != f"{name}.weight"]
        if others:
            raise ValueError(f"factorize_: {name!r} shares its weight with {others[0]!r}; "
                             f"leave it out with where=lambda name: name != {name!r}.")
        k = rank[name] if isinstance(rank, Mapping) else rank(name, linear) if callable(rank) else rank
        ranks[name] = check_rank(k, linear.out_features, linear.in_features, "factorize_", name)
    for name, k in ranks.items():
        new = LowRankLinear.from_linear(linears[name], k, init)
        if op is not None:
            new.op = op
        _swap_module(model, name, new)
    return model


@torch.no_grad()
def product_decay_(model: nn.Module, amount: float) -> None:
    """One step of decay on the products: the gradient step of amount/2 ||U V||_F^2 on every low-rank layer, in place.

    U -= amount U V V^T, V -= amount U^T U V: strong directions shrink, weak ones hardly (Frobenius decay, Khodak et al.
    2021), where decay on the factors pulls all alike and so pulls ranks down, like a nuclear norm.  O((m + n) r^2).
    """
    for layer in low_rank_layers(model).values():
        U, V = layer.U, layer.V                                     # (m, r), (r, n)
        down_U, down_V = U @ (V @ V.mT), (U.mT @ U) @ V             # (m, r), (r, n)
        U.sub_(down_U, alpha=amount)
        V.sub_(down_V, alpha=amount)


@torch.no_grad()
def densify_(model: nn.Module, dearer: bool = False) -> nn.Module:
    """Replace every LowRankLinear by the nn.Linear of weight U V, in place; returns the model.  Make the optimizer anew.

    dearer: only the layers whose factors hold as many numbers as W or more, so that nothing is paid for being low-rank.
    """
    _refuse_wrapped(model, "densify_")
    for name, low in low_rank_layers(model).items():
        if dearer and low.U.numel() + low.V.numel() < low.out_features * low.in_features:
            continue
        if name == "":
            raise ValueError("densify_: the model is itself a LowRankLinear and cannot be replaced in place.")
        dense = nn.Linear(low.in_features, low.out_features, bias=low.bias is not None, device="meta")
        dense.weight = nn.Parameter(low.weight, low.U.requires_grad)
        dense.bias = low.bias
        _swap_module(model, name, dense.train(low.training))
    return model
