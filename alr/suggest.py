"""How much rank does a trained model need, and what would less cost?  Ranks for all layers from a few batches of its loss.

    found = alr.suggest_ranks(model, batches, share=0.5)
    alr.factorize_(model, found.ranks, init=found.init)             # half the numbers in the linear layers

Dims: m out_features, n in_features, q = min(m, n), r rank.  W (m, n) -> U (m, r), V (r, n).
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .axes import Init
from .budget import allocate, size
from .factor import break_even, working
from .fisher import cut_along
from .linear import Where, dense_layers, dense_weight, factorize_, low_rank_layers, picks, refuse_wrapped, unwrapped
from .observe import Observer, Seen


@dataclass(frozen=True)
class FisherStart(Init):
    """The cut of a trained weight in the metric of the loss, as `suggest_ranks` has seen it; for the layer of one name.

    ValueError for a layer that was not seen, and for a weight that is no longer the one that was.
    """

    seen: dict = field(repr=False)          # layer name -> (U, V, Seen) at full rank
    name: str | None = None

    def for_layer(self, name: str) -> FisherStart:
        return FisherStart(self.seen, name)

    def __call__(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        if self.name not in self.seen:
            raise ValueError(f"suggest_ranks has not seen this layer; it saw {', '.join(self.seen)}.")
        U, V, seen = self.seen[self.name]                           # (m, q), (q, n)
        wide = working(weight.dtype)
        W = weight.detach().to(wide)                                # (m, n)
        far = (U.to(W) @ V.to(W) - W).norm().item()
        if far > (1e-4 + 4 * torch.finfo(weight.dtype).eps) * W.norm().item():      # more than the factors' rounding (ours)
            raise ValueError("the weight is not the one that suggest_ranks saw: trained since, or of another model. Call "
                             "suggest_ranks again, or leave init out.")
        U2, V2, _ = cut_along(U, V, rank, seen.A, seen.B, seen.grams)   # (m, r), (r, n)
        return U2.to(weight), V2.to(weight)


@dataclass(frozen=True)
class Suggestion:
    """What `suggest_ranks` found.

    ranks: {layer name: rank}, for `factorize_`.  init: its `init`, which cuts each layer where the loss feels it least.
    rise: the predicted rise of the loss, in its own unit: the sum of what the loss feels of the directions that are left
    out.  A second-order figure for small cuts; large ones raise the loss by more.
    parameters: numbers in the linear layers that were seen (as suggested, as they are).
    left_dense: layers that stay as they are, since their rank would cost as much as W.
    """

    ranks: dict[str, int]
    init: FisherStart = field(repr=False)
    rise: float = 0.0
    parameters: tuple[int, int] = (0, 0)
    left_dense: tuple[str, ...] = ()


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a batch: (inputs, targets) by cross entropy over the last dim; a mapping by the model's own .loss.

    Targets are classes, or probabilities of the logits' shape.  ValueError for a batch or a model of another kind.
    """
    own = "Say what the loss is: loss=lambda model, batch: ..."
    if isinstance(batch, Mapping):
        value = getattr(model(**batch), "loss", None)
        if value is None:
            raise ValueError(f"suggest_ranks: the model gives no .loss for a batch of {', '.join(map(str, batch))}; is the "
                             f"label missing? {own}")
        return value
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        parts = f" of {', '.join(type(x).__name__ for x in batch)}" if isinstance(batch, (tuple, list)) else ""
        raise ValueError(f"suggest_ranks: a batch is a {type(batch).__name__}{parts}; wanted (inputs, targets), or a mapping "
                         f"for model(**batch). {own}")
    x, y = batch
    logits = model(x)                                               # (..., C)
    if not isinstance(logits, Tensor):
        raise ValueError(f"suggest_ranks: the model gives {type(logits).__name__}; wanted a tensor of logits (..., C). {own}")
    classes = not y.is_floating_point() and y.numel() * logits.shape[-1] == logits.numel()
    shares = y.is_floating_point() and y.shape == logits.shape and bool((y >= 0).all() and ((y.sum(-1) - 1).abs() < 1e-2).all())
    if logits.shape[-1] < 2 or not (classes or shares):
        raise ValueError(f"suggest_ranks: targets are {y.dtype} of shape {tuple(y.shape)}, logits have the shape "
                         f"{tuple(logits.shape)}; cross entropy wants classes {tuple(logits.shape[:-1])}, or probabilities of "
                         f"the logits' shape, of two classes or more. {own}")
    C = logits.shape[-1]
    return F.cross_entropy(logits.reshape(-1, C), y.reshape(-1, C).to(logits) if shares else y.reshape(-1))


def learning(function: Callable) -> Callable:
    """The function with gradients on, wherever its caller stands."""
    @functools.wraps(function)
    def with_gradients(*args, **kwargs):
        with torch.inference_mode(False), torch.enable_grad():
            return function(*args, **kwargs)
    return with_gradients


@learning
def suggest_ranks(model: nn.Module, batches: Iterable[Any], share: float,
                  loss: Callable[[nn.Module, Any], Tensor] = cross_entropy, where: Where = None, min_rank: int = 1,
                  multiple: int = 1, per: Literal["auto", "row", "example"] = "auto"
                  ) -> Suggestion:
    """Ranks that keep what the loss of these batches feels most, for `share` of the linear layers' numbers in all.

    The layers are put into factors of full rank in a copy of the model, so that nothing is lost; one half of the batches
    finds each layer's directions, the other half measures how much the loss feels each of them (`observe`); one budget
    is shared among all layers by importance per parameter.  The model itself is not changed.  The copy is in the mode that the
    model is in: call model.eval() first for a loss without dropout.

    batches: at least two, each (inputs, targets), a mapping for model(**batch), or whatever `loss(model, batch)` takes; a mean
    over its terms.  where: which layers, as in `factorize_`.  min_rank, multiple: as in `Budget`.  per: see `Observer`.
    A layer that no batch reaches stays as it is, as if `where` had left it out; a warning names it.
    Cost: a copy of the model, one forward and backward per batch, and the SVD of every weight.

    ValueError: fewer than two batches; a share that is no share; a min_rank or multiple below 1; no linear layer; a batch
    that needs a `loss` of its own; a loss that is no single number, not finite, or that reaches none of the layers.

        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> batches = [(torch.randn(32, 16), torch.randint(4, (32,))) for _ in range(4)]
        >>> found = suggest_ranks(model, batches, share=0.5)
        >>> model = factorize_(model, found.ranks, init=found.init)
    """
    inner = unwrapped(model)
    refuse_wrapped(inner, "suggest_ranks")
    batches = list(batches)
    if len(batches) < 2:
        raise ValueError(f"suggest_ranks: {len(batches)} batches; wanted at least 2, one to find directions and one to measure "
                         "what the loss feels of them.")
    if isinstance(share, bool) or not isinstance(share, float) or not 0 < share <= 1:
        raise ValueError(f"suggest_ranks: share is {share!r}; wanted a float above 0 and at most 1, such as 0.5.")
    for word, value in (("min_rank", min_rank), ("multiple", multiple)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:      # rank 0 is a layer to leave out by hand
            raise ValueError(f"suggest_ranks: {word} is {value!r}; wanted a whole number of at least 1.")
    names = [name for name in dense_layers(inner) if picks(where, name)]
    whole = copy.deepcopy(inner)
    with warnings.catch_warnings():                                 # what is not taken, it says of the user's own model
        warnings.filterwarnings("ignore", "factorize_: .* layers are low-rank now")
        factorize_(whole, {name: min(dense_weight(mod).shape) for name, mod in dense_layers(whole).items() if name in names}
                   if names else 1.0, where)                        # without names: factorize_'s own refusal
    for p in whole.parameters():
        p.requires_grad_(p.is_floating_point() or p.is_complex())
        p.grad = None
    layers = {name: layer for name, layer in low_rank_layers(whole).items() if name in names}
    observer = Observer(layers, ("importance",), len(batches), per)
    for batch in batches:
        value = loss(whole, batch)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            came = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            if isinstance(value, Tensor) and value.numel() == 1:
                came = "a number without a gradient"
            raise ValueError(f"suggest_ranks: the loss of a batch is {came}; wanted one number to go back from, a mean over "
                             "its terms, with its graph.")
        if not torch.isfinite(value):
            raise ValueError(f"suggest_ranks: the loss of a batch is {value.item()}.")
        value.backward()
        for p in whole.parameters():
            p.grad = None
        observer.commit()
    seen = observer.close()
    unseen = [name for name in layers if not seen[name].rows > 0]
    if len(unseen) == len(layers):
        raise ValueError(f"suggest_ranks: the loss went through the forward of none of the layers ({unseen[0]!r} is the "
                         "first). Does somebody read their .weight?")
    if unseen:
        warnings.warn("suggest_ranks: the loss of no batch went through the forward of "
                      f"{unseen[0]!r}" + (f" and of {len(unseen) - 1} more layers" if unseen[1:] else "") + ", so nothing is "
                      "known of the directions there; left as it is. Does somebody read .weight, or do the batches never get "
                      "there?", stacklevel=3)
    return _shared({name: layer for name, layer in layers.items() if name not in unseen}, seen, share, min_rank, multiple)


def _shared(layers, seen: dict[str, Seen], share: float, min_rank: int, multiple: int) -> Suggestion:
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    dense = sum(m * n for m, n in shapes.values())
    ranks = dict(zip(layers, allocate([seen[name].importance.tolist() for name in layers], list(shapes.values()), share * dense,
                                      min_rank, [break_even(*shapes[name]) for name in layers], multiple)))
    if size(list(ranks.values()), list(shapes.values())) > share * dense:
        raise ValueError(f"suggest_ranks: min_rank={min_rank} in every layer takes more than share={share:g} of their numbers; "
                         "take a smaller min_rank or a larger share.")
    left = tuple(name for name in layers if ranks[name] >= break_even(*shapes[name]))
    ranks = {name: r for name, r in ranks.items() if name not in left}
    kept = {name: (layers[name].U.detach(), layers[name].V.detach(), seen[name]) for name in layers}
    rise = sum(seen[name].importance[r:].sum().item() for name, r in ranks.items())
    factors = size(list(ranks.values()), [shapes[name] for name in ranks]) + sum(m * n for m, n in map(shapes.get, left))
    return Suggestion(ranks, FisherStart(kept), rise, (factors, dense), left)
