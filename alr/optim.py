"""An optimizer for factorised models: a step bounds the change of the product W = U V, not of its factors.

    optimizer = PairOptimizer(model)                    # factors by pairs, all else by AdamW: one optimizer
    loss.backward(); optimizer.step(); optimizer.zero_grad()

Dims: m out_features, n in_features, r rank.  U (m, r), V (r, n).
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from .axes import Momentum
from .factor import exact, working
from .linear import low_rank_layers, refuse_inference, refuse_wrapped, standing, unwrapped
from .rules import SCALES, Pair, Rule, Settings, shape_scale
from .state import Swap, fitting
from .tangent import Tangent

DECAYS = ("factors", "product")


class PairOptimizer(Optimizer):
    """Steps every pair of factors by `rule`, and every other parameter by AdamW.  One optimizer, two kinds of param groups.

    params: a model (the pairs of its LowRankLinear layers, and the rest); or an iterable of pairs (U, V); or param groups:
    {"pairs": [(U, V), ...], "lr": ...} and {"params": [...], "lr": ...}, the latter for AdamW.  Schedulers, GradScaler,
    transformers' Trainer, Lightning and accelerate take it as any other optimizer.

    rule: how a pair steps (`rules.Rule`); Muon on rank-r matrices if not said, which ended lower than Spectron's
    and level with LoRA-TSD's (notebook 17_optimizer).
    lr: about the spectral norm of a step of W, before adjust_lr_fn (0.02: Muon's own; the best of 0.01, 0.02 and 0.04 in the
    suite equal_rates, for `LoRATSD` too; for `LoRAMuon` 0.04 was, for `Spectron` 0.06).
    adjust_lr_fn: by what lr is multiplied for a layer of a certain shape, under the names and with
    the default of torch.optim.Muon: "original", sqrt(max(1, m / n)); "match_rms_adamw"; or "none".
    momentum 0.95, nesterov, ns_steps 5: Muon's.
    weight_decay: decoupled; decay says of what: "factors", both by half, so that W shrinks by lr * weight_decay, or
    "product", the gradient step of the Frobenius norm of W.
    rest_lr, rest_betas, rest_eps, rest_weight_decay: AdamW's, for all else (0.01: embeddings and a head bear, and want, more
    than AdamW's usual rate for matrices; ours, from single runs, flat between 0.006 and 0.024 there; notebook 16_alr).

    State is made at once; `state.Transport` carries it through a change of rank.
    ValueError: no pairs; what is no pair of fitting factors; a pair of which one factor is frozen; a setting out of range.

        >>> from alr import factorize_
        >>> model = factorize_(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), rank=2)
        >>> optimizer = PairOptimizer(model, lr=0.02)
        >>> [len(group["params"]) for group in optimizer.param_groups]
        [4, 2]
    """

    transportable = True
    moved = False                                           # has it stepped, or been loaded: is there anything to forget?

    def __init__(self, params: nn.Module | Iterable, lr: float = 0.02, momentum: float = 0.95, nesterov: bool = True,
                 weight_decay: float = 0.0, decay: str = "factors", ns_steps: int = 5, adjust_lr_fn: str | None = "original",
                 rule: Rule = Tangent(), rest_lr: float = 0.01, rest_betas: tuple[float, float] = (0.9, 0.999),
                 rest_eps: float = 1e-8, rest_weight_decay: float = 0.01):
        if not isinstance(rule, Rule):
            raise ValueError(f"PairOptimizer: rule is {rule!r}; wanted a value such as Tangent().")
        refuse_inference("PairOptimizer")
        self.rule = rule
        self.pair_defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay,
                              "decay": decay, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn or "none"}
        self.rest_defaults = {"lr": rest_lr, "betas": rest_betas, "eps": rest_eps, "weight_decay": rest_weight_decay}
        whole = isinstance(params, nn.Module)
        if whole:
            refuse_wrapped(params, "PairOptimizer")
            model = unwrapped(params)
            refuse_sparse(model)
            params = [{"pairs": pairs(model)}]
            mine = {id(p) for pair in params[0]["pairs"] for p in pair}
            rest = [p for p in model.parameters() if id(p) not in mine]
            params += [{"params": rest}] if rest else []
        else:
            params = list(params)
            if params and (isinstance(params[0], Tensor) or named(params[0])):
                raise ValueError("PairOptimizer: params are single Parameters, which nobody can pair; give the model, "
                                 "PairOptimizer(model), or pairs (U, V).")
            if params and not isinstance(params[0], dict):
                params = [{"pairs": params}]
        if not any(group.get("pairs") for group in params):
            raise ValueError("PairOptimizer: no pairs; " + (
                "call alr.factorize_(model, rank=...) before it is made." if whole else
                'a group of them is {"pairs": [(U, V), ...]}, and {"params": [...]} is for AdamW. Give the model, '
                "PairOptimizer(model), or its pairs, alr.optim.pairs(model); to transformers' Trainer "
                "optimizers=(alr.PairOptimizer(model), None)."))
        super().__init__(params, {"momentum": momentum})        # cyclic schedulers ask the defaults for it

    # ---------------------------------------------------------------- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of pairs, {"pairs": [(U, V), ...], ...}, or of other parameters, {"params": [...], ...}.

        ValueError as the constructor; nothing is added then.
        """
        group = dict(param_group)
        both = "pairs" in group
        if both:
            listed = [tuple(pair) for pair in group.pop("pairs")]
            check_pairs(listed)
            group["params"] = [p for pair in listed for p in pair]
        defaults = self.pair_defaults if both else self.rest_defaults
        unknown = set(group) - set(defaults) - {"params", "initial_lr"}
        if unknown:
            raise ValueError(f"PairOptimizer: {sorted(unknown)[0]!r} is no setting of a group of "
                             f"{'pairs' if both else 'other parameters'}; there are {', '.join(defaults)}.")
        group = {**defaults, **group, "kind": "pairs" if both else "rest"}
        check_settings(group)
        super().add_param_group(group)
        group = self.param_groups[-1]
        if not both:
            return
        flat = group["params"]
        for U, V in zip(flat[::2], flat[1::2]):
            if not U.is_meta and U.requires_grad:           # of a frozen pair with its first step, should it be unfrozen
                self._start(U, V)

    @torch.no_grad()
    def _start(self, U: nn.Parameter, V: nn.Parameter) -> None:
        with exact(U.device):
            self.state[U], self.state[V] = self.rule.state(U, V)

    def __getstate__(self) -> dict:                         # torch's leaves out what it does not know
        return super().__getstate__() | {key: getattr(self, key) for key in ("rule", "pair_defaults", "rest_defaults", "moved")}

    def carry(self, group: dict, swap: Swap, s_U: dict, s_V: dict) -> tuple[dict, dict] | None:
        """The state of a pair whose factors change, in the rule's way (`state.Transport`); None where AdamW holds them."""
        if group["kind"] != "pairs":
            return None
        return self.rule.carry(swap, s_U, s_V) if s_U and s_V else ({}, {})

    def tangent(self, group: dict, U: nn.Parameter, V: nn.Parameter) -> Momentum | None:
        """The momentum of a pair's W as a tangent vector; None where the rule keeps none, or it has been reset."""
        s_U, s_V = self.state.get(U), self.state.get(V)
        if group["kind"] != "pairs" or not self.rule.keeps_tangent or not s_U or not s_V:
            return None
        scale = shape_scale(group["adjust_lr_fn"], U.shape[0], V.shape[1])
        return Momentum(*self.rule.tangent(s_U, s_V), float(group["lr"]) * scale)

    # ---------------------------------------------------------------- steps

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One step.  A pair without gradients is left as it is; ValueError for one with a single gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.grad is not None and p.grad.is_sparse:
                raise ValueError(f"PairOptimizer: the gradient of the parameter of shape {tuple(p.shape)} is sparse, and AdamW "
                                 "takes dense ones. Make its embedding with sparse=False, or give it to SparseAdam.")
        if self._follow() and self.moved:
            warnings.warn("PairOptimizer: the model was loaded at other ranks, and what was remembered of the factors there is "
                          "of the old ones: they start anew. Load the optimizer's state with the model's.", stacklevel=4)
        self.moved = True
        for group in self.param_groups:
            if group["kind"] == "pairs":
                self._step_pairs(group)
            else:
                self._step_rest(group)
        return loss

    def _follow(self) -> bool:
        """Hold what stands in the layers, where a state dict has replaced Parameters; was state dropped that does not fit?"""
        lost = False
        for flat in (group["params"] for group in self.param_groups):
            for i, p in enumerate(flat):
                new = standing(p)
                if new is not p:
                    flat[i], state = new, self.state.pop(p, {})
                    kept = fitting(state, new)
                    lost |= bool(state) and not kept
                    if kept:
                        self.state[new] = kept
        return lost

    def _step_pairs(self, group: dict) -> None:
        flat, live = group["params"], []
        for U, V in zip(flat[::2], flat[1::2]):
            if U.grad is None and V.grad is None or U.shape[1] == 0:        # of rank 0: nothing to move
                continue
            if U.grad is None or V.grad is None:
                raise ValueError(f"PairOptimizer: of the pair {tuple(U.shape)}, {tuple(V.shape)} only "
                                 f"{'U' if V.grad is None else 'V'} has a gradient. Freeze both factors or neither; with one "
                                 "of them fixed, train the other by AdamW.")
            if U not in self.state or V not in self.state:
                self._start(U, V)
            live.append(Pair(U, V, U.grad, V.grad, self.state[U], self.state[V]))
        settings = Settings(*(group[name] for name in Settings._fields))
        for device in {pair.U.device for pair in live}:
            with exact(device):
                self.rule.step([pair for pair in live if pair.U.device == device], settings)

    def _step_rest(self, group: dict) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        wide = [working(p.dtype) for p in params]       # squares of gradients underflow in float16, and stand still in bfloat16
        for p, dtype in zip(params, wide):
            state = self.state[p]
            if not state:
                fused = p.device.type in ("cuda", "cpu") and p.is_floating_point()
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if fused else "cpu")
                state["exp_avg"] = torch.zeros_like(p, dtype=dtype)
                state["exp_avg_sq"] = torch.zeros_like(p, dtype=dtype)
            elif state["exp_avg"].dtype != dtype:       # the model was widened on the way (model.double())
                state |= {key: state[key].to(dtype) for key in ("exp_avg", "exp_avg_sq")}
        states = [self.state[p] for p in params]
        kinds = {(p.device.type, p.is_floating_point()) for p in params}
        moved = [p.to(dtype) for p, dtype in zip(params, wide)]     # itself, where it is wide enough
        adamw(moved, [p.grad.to(dtype) for p, dtype in zip(params, wide)], [s["exp_avg"] for s in states],
              [s["exp_avg_sq"] for s in states], [], [s["step"] for s in states],
              fused=kinds <= {("cuda", True), ("cpu", True)}, amsgrad=False,
              beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
              eps=group["eps"], maximize=False)
        for p, x in zip(params, moved):
            if x is not p:
                p.copy_(x)

    def state_dict(self) -> dict:
        """As torch's, and the name of the rule."""
        return super().state_dict() | {"rule": type(self.rule).__name__}

    def _check_rule(self, state_dict: dict) -> None:
        """ValueError unless a state dict is of this rule: by its name, which older ones lack, and by what a pair remembers."""
        mine = type(self.rule).__name__
        if (name := state_dict.get("rule", mine)) != mine:
            raise ValueError(f"PairOptimizer: the state is of the rule {name}, and this optimizer steps by {self.rule}. Make "
                             f"the optimizer with rule={name}(...), or leave its state out.")
        wanted = tuple(set(s) for s in self.rule.state(torch.zeros(1, 1), torch.zeros(1, 1)))
        for group in state_dict["param_groups"]:
            places = group["params"] if group["kind"] == "pairs" else []
            for pair in zip(places[::2], places[1::2]):
                found = tuple(set(state_dict["state"].get(i, ())) for i in pair)
                if any(found) and found != wanted:                  # a pair without state begins with its next step
                    came, kept = (", ".join(sorted(a | b)) for a, b in (found, wanted))
                    raise ValueError(f"PairOptimizer: the state remembers {came} of a pair, and {self.rule} {kept}: it is of "
                                     "another rule. Make the optimizer with that rule, or leave its state out.")

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, but that AdamW's moments of float16 and bfloat16 parameters stay in float32.

        ValueError, before anything is loaded, for the state of another optimizer, of another rule, or of other kinds of
        groups.
        """
        kinds = [group.get("kind") for group in state_dict["param_groups"]]
        if kinds != (mine := [group["kind"] for group in self.param_groups]):
            raise ValueError(f"PairOptimizer: the state has groups of the kinds {kinds}, and this optimizer {mine}: it is of "
                             "another optimizer, or of other groups.")
        self._check_rule(state_dict)
        self._follow()
        super().load_state_dict(state_dict)
        self.moved = True
        places = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(places, [p for group in self.param_groups for p in group["params"]], strict=True):
            for key, x in state_dict["state"].get(i, {}).items():
                if isinstance(x, Tensor) and x.dim() and x.dtype != self.state[p][key].dtype:
                    self.state[p][key] = x.detach().to(p.device, copy=True)
                elif key == "step" and isinstance(x, Tensor) and p.device.type == "cuda":   # torch leaves it where it was saved
                    self.state[p][key] = x.detach().to(p.device, torch.float32, copy=True)


def refuse_sparse(model: nn.Module) -> None:
    """ValueError for an embedding whose gradients are sparse, which AdamW does not take."""
    for name, mod in model.named_modules():
        if getattr(mod, "sparse", False) is True and isinstance(mod, (nn.Embedding, nn.EmbeddingBag)):
            raise ValueError(f"PairOptimizer: {name!r} has sparse gradients, and AdamW, which steps all that is no pair, takes "
                             "dense ones. Make it with sparse=False, or give its weight to SparseAdam and the rest as "
                             'groups: PairOptimizer([{"pairs": alr.optim.pairs(model)}, {"params": [...]}]).')


def named(pair: Any) -> bool:
    """Is it an entry of named_parameters?"""
    return isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Tensor)


def check_pairs(listed: list[tuple]) -> None:
    """ValueError unless each is (U, V), the factors of one matrix, used once, both of them trained or neither."""
    seen: set[int] = set()
    for i, pair in enumerate(listed):
        shapes = ", ".join(str(tuple(p.shape)) if isinstance(p, Tensor) else type(p).__name__ for p in pair)
        matrices = len(pair) == 2 and all(isinstance(p, Tensor) and p.dim() == 2 for p in pair)
        if not matrices or pair[0].shape[1] != pair[1].shape[0]:
            raise ValueError(f"PairOptimizer: pair {i} is {shapes}, which are no factors of one matrix; wanted (m, r) and "
                             "(r, n).")
        U, V = pair
        if U.is_complex() or V.is_complex():
            raise ValueError(f"PairOptimizer: pair {i} ({shapes}) is complex, and the rules step real factors; give it to "
                             "torch.optim.AdamW.")
        if U.shape[1] > min(U.shape[0], V.shape[1]):
            raise ValueError(f"PairOptimizer: pair {i} is {shapes}, of a rank above both sides; is it (V, U)? Wanted (U, V).")
        if U.requires_grad != V.requires_grad:
            raise ValueError(f"PairOptimizer: of pair {i} ({shapes}) only {'U' if U.requires_grad else 'V'} is trained. Freeze "
                             "both factors or neither; with one of them fixed, train the other by AdamW.")
        if {id(U), id(V)} & seen:
            raise ValueError(f"PairOptimizer: pair {i} ({shapes}) is given twice.")
        seen |= {id(U), id(V)}


def check_settings(group: dict) -> None:
    """ValueError for a number that no step can be made with."""
    def number(x, low, high=math.inf, above=False):
        x = x.item() if isinstance(x, Tensor) and x.numel() == 1 else x
        return isinstance(x, numbers.Real) and not isinstance(x, bool) and math.isfinite(x) and \
            (low < x if above else low <= x) and x <= high
    wanted = {"lr": (number(group["lr"], 0), "0 or more"), "weight_decay": (number(group["weight_decay"], 0), "0 or more")}
    if group["kind"] == "pairs":
        wanted |= {"momentum": (number(group["momentum"], 0) and group["momentum"] < 1, "0 or more and below 1"),
                   "nesterov": (isinstance(group["nesterov"], bool), "True or False"),
                   "ns_steps": (isinstance(group["ns_steps"], int) and group["ns_steps"] >= 1, "a whole number of at least 1"),
                   "decay": (group["decay"] in DECAYS, f"one of {', '.join(DECAYS)}"),
                   "adjust_lr_fn": (group["adjust_lr_fn"] in SCALES, f"one of {', '.join(SCALES)}")}
    else:
        betas = group["betas"]
        two = isinstance(betas, Sequence) and len(betas) == 2
        wanted |= {"betas": (two and all(number(b, 0) and b < 1 for b in betas), "two numbers in [0, 1)"),
                   "eps": (number(group["eps"], 0), "0 or more")}
    for name, (right, words) in wanted.items():
        if not right:
            raise ValueError(f"PairOptimizer: {name} is {group[name]!r}; wanted {words}.")


def pairs(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """(U, V) of every LowRankLinear of the model, in module order; frozen ones too, which may be trained later."""
    return [(layer.U, layer.V) for layer in low_rank_layers(model).values()]
