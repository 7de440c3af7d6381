"""`LowRankLinear`: a linear layer whose weight is U @ V.  Put it into any model (`factorize_`) and take it out again.

Dims: m out_features, n in_features, r rank.  U (m, r), V (r, n), W = U V (m, n).
"""

from __future__ import annotations

import numbers
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .axes import Init
from .factor import check_rank, uncast
from .init import Fresh, Spectral

REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)    # what a factor can be made of
Where = Callable[[str], bool] | str | Sequence[str] | None     # which layers: a test, or shell patterns, of their names


def factored(x: Tensor, U: Tensor, V: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias by way of r: (..., n) -> (..., m).  O(r (m + n)) per row; W is never formed."""
    return F.linear(F.linear(x, V), U, bias)                        # (..., r) -> (..., m)


class LowRankLinear(nn.Module):
    """y = x (U V)^T + bias, for x of any leading shape.

    U (out_features, rank), V (rank, in_features), bias (out_features,) or None.  The rank is read from the tensors and
    kept nowhere else; loading a state dict of another rank resizes the layer.  Starts as torch's nn.Linear would,
    truncated to the rank (`init.Fresh`).  ValueError unless 1 <= rank <= min(in_features, out_features); a float is a
    share of the dense layer's numbers.  A decision (`RankAdapter`) may bring a layer to rank 0, where it is its bias alone.

        >>> layer = LowRankLinear(48, 32, rank=4)
        >>> layer(torch.zeros(5, 48)).shape, layer.rank
        (torch.Size([5, 32]), 4)
    """

    op = staticmethod(factored)         # what forward calls; v6 and v7.3 have their own (torch.jit.script: no annotation)
    dense: type[nn.Module] = nn.Linear                              # what `densify_` makes of it

    def __init__(self, in_features: int, out_features: int, rank: int | float, bias: bool = True, device=None, dtype=None):
        super().__init__()
        rank = check_rank(rank, out_features, in_features, "LowRankLinear", "a layer")
        check_real(dtype or torch.get_default_dtype(), "LowRankLinear")
        self.in_features, self.out_features = in_features, out_features
        self.U = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.V = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew, as the constructor does."""
        if self.U.is_meta:
            return
        U, V = Fresh()(self.U.new_empty(1, 1).expand(self.out_features, self.in_features), self.rank)
        self.U.copy_(U)
        self.V.copy_(V)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -self.in_features ** -0.5, self.in_features ** -0.5)

    @classmethod
    def from_linear(cls, linear: nn.Module, rank: int | float, init: Init = Spectral()) -> LowRankLinear:
        """The same layer with its weight as two factors that `init` makes from it; the bias is the same Parameter.

        linear: an nn.Linear, or a Conv1D of transformers (GPT-2's, whose weight is stored as (n, m)).
        """
        W = dense_weight(linear)                                    # (m, n)
        check_real(W.dtype, "from_linear")
        m, n = W.shape
        rank = check_rank(rank, m, n, "from_linear", "a layer")
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.in_features, new.out_features = n, m
        U, V = init(W.detach(), rank)                               # (m, r), (r, n)
        new.U, new.V = successor(linear.weight, U.contiguous()), successor(linear.weight, V.contiguous())
        for key, value in linear.__dict__.items():                  # what somebody has written on it, as `group = "head"`
            if not (key.startswith("_") or callable(value) or hasattr(new, key) or key in ("nf", "nx")):
                setattr(new, key, value)
        new.bias = linear.bias
        if type(linear) is not nn.Linear:
            new.dense = type(linear)
        return new.train(linear.training)

    @property
    def rank(self) -> int:
        return self.U.shape[1]

    @property
    def weight(self) -> Tensor:
        """W = U V, formed now (m, n): for export and for code that reads `.weight`; forward never does.

        Writing into it changes nothing: it is a new tensor at every call.
        """
        return self.U @ self.V

    def forward(self, input: Tensor) -> Tensor:
        return self.op(input, self.U, self.V, self.bias)            # (..., n) -> (..., m)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            raise ValueError("LowRankLinear: its weight is U @ V, which cannot be set or shared with another module. Leave a "
                             "tied layer out of factorize_ (where=lambda name: ...), or load U and V.")
        super().register_parameter(name, param)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"

    def __prepare_scriptable__(self) -> LowRankLinear:
        """What torch.jit.script is given: this layer, if its forward can be read."""
        if "op" in self.__dict__ and self.op is not factored:
            raise RuntimeError(f"torch.jit.script: a layer's forward is {self.op!r}, which cannot be scripted. Before a "
                               "decision the layers are observed: script copy.deepcopy(model), or call adapter.close() first.")
        return self

    def take_rank(self, rank: int) -> None:
        """Make room for factors of another rank, whose numbers follow: new, empty Parameters."""
        refuse_inference("load_state_dict")
        for name, shape in (("U", (self.out_features, rank)), ("V", (rank, self.in_features))):
            old = getattr(self, name)
            new = successor(old, old.new_empty(shape))
            old.stands_now = new                        # for an optimizer that still holds the old one
            setattr(self, name, new)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        before = dict(self._parameters)
        # a saved layer of another rank makes this one take that rank; anything else that differs is torch's to refuse
        U, V = state_dict.get(prefix + "U"), state_dict.get(prefix + "V")
        fits = U is not None and V is not None and U.dim() == V.dim() == 2 and U.shape[1] == V.shape[0]
        if fits and U.shape[0] == self.out_features and V.shape[1] == self.in_features and U.shape[1] != self.rank:
            check_rank(U.shape[1], self.out_features, self.in_features, "load_state_dict", prefix.rstrip(".") or "the layer",
                       least=0)
            self.take_rank(U.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, new in self._parameters.items():          # assign=True puts in Parameters of its own
            old = before.get(name)
            if new is not None and old is not None and new is not old:
                old.stands_now = new
                new.__dict__.pop("stands_now", None)        # it may have stood here before


def standing(p: nn.Parameter) -> nn.Parameter:
    """What stands in a layer now where p stood, after state dicts that have replaced it; p itself as a rule."""
    while (new := getattr(p, "stands_now", None)) is not None:
        p = new
    return p


def successor(old: nn.Parameter, new: Tensor) -> nn.Parameter:
    """The Parameter of another shape that stands where `old` stood: its attributes and gradient hooks go along."""
    refuse_inference("a change of rank")
    p = nn.Parameter(new, old.requires_grad)
    p.__dict__.update({key: value for key, value in old.__dict__.items() if key != "stands_now"})
    for hook in (old._backward_hooks or {}).values():
        p.register_hook(hook)
    for hook in (old._post_accumulate_grad_hooks or {}).values():
        p.register_post_accumulate_grad_hook(hook)
    return p


# ------------------------------------------------------------------------------------------------ what is in a model

def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """Every LowRankLinear of the model by name, in module order."""
    return {name: layer for name, layer in unwrapped(model).named_modules() if isinstance(layer, LowRankLinear)}


def is_conv1d(mod: nn.Module) -> bool:
    """Is it the Conv1D of transformers, a linear layer that stores its weight as (n, m)?"""
    return type(mod).__name__ == "Conv1D" and type(mod).__module__.startswith("transformers.")


def dense_weight(linear: nn.Module) -> Tensor:
    """The weight of a linear layer as (m, n)."""
    return linear.weight.mT if is_conv1d(linear) else linear.weight


def dense_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that `factorize_` can take, by name: exact nn.Linear, and Conv1D of transformers.

    A subclass may have a forward of its own; a layer whose weight is computed (parametrised, weight-normed) or not there
    yet (lazy) has no Parameter to replace; complex and whole numbers (quantised) have no factors here.
    """
    return {name: mod for name, mod in model.named_modules() if (type(mod) is nn.Linear or is_conv1d(mod))
            and type(mod._parameters.get("weight")) is nn.Parameter and mod.weight.dtype in REAL}


def holders(model: nn.Module) -> dict[int, list[tuple[str, nn.Module, str]]]:
    """Who holds each Parameter, by its id: (name of the module, the module, the Parameter's name there); a module once."""
    found: dict[int, list] = {}
    for name, mod in model.named_modules():
        for key, p in mod._parameters.items():
            if p is not None:
                found.setdefault(id(p), []).append((name, mod, key))
    return found


def sharing(held: dict[int, list[tuple[str, nn.Module, str]]], layer: nn.Module, key: str) -> list[str]:
    """The other names of a layer's Parameter among `holders`, such as '2.U'."""
    return [f"{name}.{k}".lstrip(".") for name, mod, k in held.get(id(layer._parameters.get(key)), ())
            if not (mod is layer and k == key)]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that torch.compile was given, or the model itself."""
    return getattr(model, "_orig_mod", model)


def refuse_wrapped(model: nn.Module, who: str) -> None:
    """ValueError for a model of which somebody else holds the parameters: DDP, FSDP, DTensor, peft, an offload of accelerate.

    TypeError for what is no model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: the model is {model!r}; wanted an nn.Module, such as nn.Sequential(nn.Linear(8, 8)).")
    for name, mod in model.named_modules():
        at = f" (at {name!r})" if name else ""
        if isinstance(mod, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            raise ValueError(f"{who}: the model is wrapped in {type(mod).__name__}{at}, which would go on holding the old "
                             f"parameters. Give {who} the module inside (.module), leave the wrapper out, and average "
                             "gradients with alr.average_gradients(model) after backward.")
        if "FullyShardedDataParallel" in [k.__name__ for k in type(mod).__mro__] or type(mod).__name__.startswith("FSDP"):
            raise ValueError(f"{who}: the model is sharded by FSDP{at}, whose pieces cannot change their shape. Call "
                             f"{who} before sharding, with a recipe that holds its ranks (alr.recipes.uniform), or train "
                             "with alr.average_gradients(model) in place of FSDP.")
        if hasattr(mod, "_hf_hook") and any(p is not None and p.is_meta for p in mod._parameters.values()):
            raise ValueError(f"{who}: accelerate keeps the weights of {type(mod).__name__}{at} elsewhere (offloaded). Load the "
                             "model without device_map, or call accelerate.hooks.remove_hook_from_submodules(model) first.")
        if type(mod).__module__.startswith("peft."):
            raise ValueError(f"{who}: the model holds adapters of peft{at} ({type(mod).__name__}). Merge them first "
                             "(merge_and_unload), or factorize the model before peft is given it.")
    for name, p in model.named_parameters():
        if type(p.data).__name__ == "DTensor" or type(p).__name__ == "DTensor":
            raise ValueError(f"{who}: {name!r} is a DTensor (fully_shard, tensor parallel), whose pieces cannot change "
                             f"their shape. Call {who} before the model is distributed.")


def check_real(dtype: torch.dtype, who: str) -> None:
    """ValueError for a dtype that factors cannot have."""
    if dtype not in REAL:
        raise ValueError(f"{who}: a weight of {dtype}; wanted float16, bfloat16, float32 or float64. Leave such layers dense.")


def refuse_inference(who: str) -> None:
    """RuntimeError in inference mode, where tensors are made that no backward pass can use."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(f"{who}: in inference mode it would make Parameters that cannot be trained; call it outside of "
                           "torch.inference_mode() (torch.no_grad() does no harm).")


def picks(where: Where, name: str) -> bool:
    """Does `where` pick the layer of that name?"""
    if where is None:
        return True
    if callable(where):
        return bool(where(name))
    return any(fnmatchcase(name, pattern) for pattern in ([where] if isinstance(where, str) else where))


def check_where(where: Any, who: str) -> None:
    listed = isinstance(where, Sequence) and all(isinstance(pattern, str) for pattern in where)
    if not (where is None or callable(where) or listed):
        raise ValueError(f"{who}: where is {where!r}; wanted a function of a layer's name, or shell patterns of names such "
                         "as ('blocks.*',).")


def left_out(model: nn.Module) -> Counter:
    """Modules, by type, that hold matrices and are neither low-rank, nor what factorize_ can take, nor embeddings."""
    skip = (nn.Embedding, nn.EmbeddingBag, LowRankLinear)
    taken = set(map(id, dense_layers(model).values()))
    found = Counter()
    for mod in model.modules():
        own = dict(mod._parameters)
        if hasattr(mod, "parametrizations"):
            own |= {f"{name}.{key}": p for name, part in mod.parametrizations.items() for key, p in part._parameters.items()}
        if any(nn.parameter.is_lazy(p) for p in own.values()):      # its shape is not known yet
            found[type(mod).__name__] += 1
            continue
        matrices = sum(p is not None and p.dim() >= 2 and min(p.shape) > 1 for p in own.values())
        if matrices and not isinstance(mod, skip) and id(mod) not in taken and "ParametrizationList" not in type(mod).__name__:
            odd = {str(p.dtype).removeprefix("torch.") for p in own.values() if p is not None and p.dtype not in REAL}
            found[" of ".join([type(mod).__name__, *sorted(odd)])] += 1
    return found


# ------------------------------------------------------------------------------------------------ in and out

def factorize_(model: nn.Module, rank: int | float | Mapping[str, int | float] | Callable[[str, nn.Module], int | float],
               where: Where = None, init: Init = Spectral(), op: Callable | None = None) -> nn.Module:
    """Replace the model's linear layers by LowRankLinear ones, in place; returns the model.  `densify_` undoes it.

    rank: one number, {layer name: number}, or a function (name, linear) -> number; a whole number is a rank, a float a
    share of the dense layer's parameters (0.5: half).  where: which layers, by a function of the name or by shell patterns
    of names; without it all of them (or the mapping's).  init(weight, rank) -> (U, V); the default is the truncated SVD,
    so a trained model keeps the best approximation of what it knows; `init.Fresh()` starts a large new model in a fraction
    of the time.  op: what forward computes, `factored` if not said.
    Attributes and gradient hooks of a weight go along to both factors, and attributes of a layer to the new one.

    It takes exact nn.Linear layers and Conv1D of transformers.  A warning of one line names the kinds of modules that
    hold matrices and were not taken.  A replaced layer's own hooks are gone.
    Initialise weights before, and make the optimizer afterwards: one made before still holds the old weights.

    ValueError, before anything is changed: nothing matched; a rank out of range; a weight that is not finite, or shared
    with another module; a wrapped or sharded model; a model that is itself a linear layer.

        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> sorted(low_rank_layers(factorize_(model, rank=4)))
        ['0', '2']
    """
    model_given, model = model, unwrapped(model)
    refuse_wrapped(model, "factorize_")
    refuse_inference("factorize_")
    check_where(where, "factorize_")
    if rank is None or isinstance(rank, (str, bool)) or not (isinstance(rank, Mapping) or callable(rank)
                                                             or hasattr(rank, "__float__")):
        raise ValueError(f"factorize_: rank is {rank!r}; wanted a whole number, a share such as 0.5, {{name: number}} or a "
                         "function (name, linear) -> number.")
    if isinstance(init, type) or not callable(init):
        raise ValueError(f"factorize_: init is {init!r}; wanted a start such as alr.init.Spectral(), or a function "
                         "(weight, rank) -> (U, V).")
    linears = dense_layers(model)
    if "" in linears:
        raise ValueError("factorize_: the model is itself a linear layer and cannot be replaced in place; "
                         "use LowRankLinear.from_linear(linear, rank).")
    if isinstance(rank, Mapping):
        if not rank:
            raise ValueError("factorize_: rank is an empty mapping, so every layer would stay dense; leave the call out.")
        unknown = sorted(set(rank) - set(linears))
        if unknown:
            raise ValueError(f"factorize_: rank names {unknown[0]!r}, which is no linear layer of the model; "
                             f"it has {len(linears)}, the first is {next(iter(linears), None)!r}.")
    chosen = [name for name in linears if picks(where, name) and not (isinstance(rank, Mapping) and name not in rank)]
    others = left_out(model)
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
    if not chosen:
        already = len(low_rank_layers(model))
        raise ValueError("factorize_: no linear layer matched `where`. " + (
            f"The model has {len(linears)}, the first is {next(iter(linears))!r}." if linears else
            f"The model holds {already} LowRankLinear already; change a rank with RankAdapter.resize({{name: rank}})."
            if already else "The model has none.") + (f" Not taken, though they hold matrices: {told}." if told else ""))
    holders: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(p), []).append(name)
    ranks = {}
    for name in chosen:
        linear = linears[name]
        m, n = dense_weight(linear).shape
        sharing = [h.rpartition(".")[0] for h in holders[id(linear.weight)] if h != f"{name}.weight"]
        if sharing:
            raise ValueError(f"factorize_: {name!r} shares its weight with {sharing[0]!r}; "
                             f"leave it out with where=lambda name: name != {name!r}.")
        k = rank[name] if isinstance(rank, Mapping) else rank(name, linear) if callable(rank) else rank
        try:
            ranks[name] = check_rank(k, m, n, "factorize_", name)
        except ValueError as error:
            whole = isinstance(k, numbers.Integral) and not isinstance(k, bool) and k >= 1
            if isinstance(rank, Mapping) or callable(rank) or not whole:
                raise
            raise ValueError(f"{error} For another rank in small layers: rank=lambda name, linear: "
                             f"min({k}, linear.in_features, linear.out_features).") from None
    made = {}
    for name, k in ranks.items():                                   # all of them, before the first is put in
        start = init.for_layer(name) if isinstance(init, Init) else init
        try:
            with uncast(linears[name].weight.device):
                made[name] = LowRankLinear.from_linear(linears[name], k, start)
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise ValueError(f"factorize_: {name!r}: {error}") from error
        if op is not None:
            made[name].op = op
    for name, new in made.items():
        swap_module(model, name, new)
    if told:
        warnings.warn(f"factorize_: {len(made)} layers are low-rank now; not taken, though they hold matrices: {told}.",
                      stacklevel=2)
    return model_given


def factorize_like_(model: nn.Module, state: Mapping[str, Any]) -> nn.Module:
    """Give the model the low-rank layers, and the ranks, of a saved one, in place; returns the model.  Its weights are
    loaded afterwards.

    state: a state dict with keys "NAME.U" and "NAME.V", or anything by name that has a shape or a size, such as the
    metadata of a torch.distributed checkpoint.  Then `model.load_state_dict(state)`, or dcp.load.
    ValueError for a saved layer that the model does not have in that shape.

        >>> small = factorize_(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), rank=1)
        >>> model = factorize_like_(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), small.state_dict())
        >>> model.load_state_dict(small.state_dict())
        <All keys matched successfully>
    """
    inner = unwrapped(model)
    refuse_wrapped(inner, "factorize_like_")
    refuse_inference("factorize_like_")
    shapes = {key: tuple(getattr(x, "shape", None) or getattr(x, "size", ())) for key, x in state.items()}
    names = [key[:-2] for key in shapes if key.endswith(".U") and f"{key[:-2]}.V" in shapes]
    if not names:
        raise ValueError("factorize_like_: no pair of keys 'NAME.U', 'NAME.V' in the state: it is of a dense model.")
    dense, low = dense_layers(inner), low_rank_layers(inner)
    for name in names:
        (m, r), (r2, n) = shapes[f"{name}.U"], shapes[f"{name}.V"]
        layer = low.get(name, dense.get(name))
        here = None
        if layer is not None:
            here = (layer.out_features, layer.in_features) if name in low else tuple(dense_weight(layer).shape)
        if here != (m, n) or r != r2:
            raise ValueError(f"factorize_like_: {name!r} is saved as ({m} x {r}) ({r2} x {n}); the model has "
                             f"{'no linear layer of that name' if here is None else f'{here[0]} x {here[1]} there'}.")
        check_rank(r, m, n, "factorize_like_", name, least=0)
    for name in names:
        r = shapes[f"{name}.U"][1]
        if name not in low:
            low[name] = LowRankLinear.from_linear(dense[name], max(r, 1), Fresh())
            swap_module(inner, name, low[name])
        if low[name].rank != r:
            low[name].take_rank(r)
    return model


@torch.no_grad()
def densify_(model: nn.Module, only_if_larger: bool = False) -> nn.Module:
    """Replace every LowRankLinear by the dense layer of weight U V, in place; returns the model.

    A layer goes back to the kind that it was made from (nn.Linear, or Conv1D of transformers).  Make the optimizer and the
    adapter anew.  only_if_larger: only layers whose factors hold as many numbers as W or more, for which being low-rank
    saves nothing.

    ValueError, before anything is changed: a layer that stands in two places, or shares a factor with another module; a
    wrapped or sharded model; a model that is itself a LowRankLinear.

        >>> model = factorize_(nn.Sequential(nn.Linear(8, 8)), rank=2)
        >>> densify_(model)
        Sequential(
          (0): Linear(in_features=8, out_features=8, bias=True)
        )
    """
    inner = unwrapped(model)
    refuse_wrapped(inner, "densify_")
    refuse_inference("densify_")
    layers = {name: low for name, low in low_rank_layers(inner).items()
              if not only_if_larger or low.U.numel() + low.V.numel() >= low.out_features * low.in_features}
    if "" in layers:
        raise ValueError("densify_: the model is itself a LowRankLinear and cannot be replaced in place.")
    held = holders(inner)
    stands: dict[int, list[str]] = {}
    for name, parent in inner.named_modules():
        for key, mod in parent._modules.items():
            stands.setdefault(id(mod), []).append(f"{name}.{key}".lstrip("."))
    for name, low in layers.items():
        if twice := stands[id(low)][1:]:
            raise ValueError(f"densify_: {name!r} is the same module as {twice[0]!r}; give one of the two places a copy of it "
                             "first, copy.deepcopy(layer).")
        if others := [other for key in "UV" for other in sharing(held, low, key)]:
            raise ValueError(f"densify_: {name!r} shares a factor with {others[0]!r}; give it one of its own first, "
                             "nn.Parameter(factor.detach().clone()).")
    for name, low in layers.items():
        with uncast(low.U.device):
            W = low.weight                                          # (m, n)
        if low.dense is nn.Linear:
            dense = nn.Linear(low.in_features, low.out_features, bias=low.bias is not None, device="meta")
        else:
            with torch.device("meta"):
                dense = low.dense(low.out_features, low.in_features)
            W = W.mT.contiguous()                                   # (n, m)
        dense.weight = nn.Parameter(W, low.U.requires_grad)
        dense.bias = low.bias
        swap_module(inner, name, dense.train(low.training))
    return model


def swap_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the module of that name stands."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
