"""Where the axes meet a model and an optimizer: `Recipe`, a value, and `RankAdapter`, which keeps the books.

    factorize_(model, rank=64)                        # or recipe.prepare(model)
    adapter = RankAdapter(model, optimizer, recipe, total_steps=10_000)
    ...
    optimizer.step(); adapter.step(); model.zero_grad()
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Callable, NamedTuple, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from .control import ByLayer, Hold, Signal
from .factor import SvdCore, break_even, for_layer, relative_change
from .init import Spectral
from .linear import LowRankLinear, _refuse_wrapped, factorize_, low_rank_layers
from .state import Stale, Swap, Transport, replace_parameter
from .watch import MOMENTS

UNSEEN = 10                             # optimizer steps without adapter.step() before we say so (ours)


@dataclass(frozen=True)
class Recipe:
    """A way to train with adaptive rank: one value on each axis, and when to act.  Its repr evaluates back to it.

    every, warmup and stop are optimizer steps; `epoch` is the number of steps that the numbers were written for (the
    scripts count epochs), so that `paced` can move a recipe to another epoch length.
    """

    name: str
    rank: int | float | dict | None = 64        # at the start, at most (a layer's cap may be lower): a rank, as a float a
                                        # share of the dense layer's parameters, or {layer: rank}; None: dense
    init: Callable = Spectral()
    estimate: Callable | None = None    # layer -> float
    control: Any = Hold()
    resize: Callable = SvdCore()        # (U, V, k) -> (U', V')
    state: Any = Transport()
    gradient: Any = None                # what happens to gradients before the optimizer sees them (v1, v2)
    op: Callable | None = None          # the layer's own forward and backward (v6, v7.3)
    every: int = 200                    # steps between decisions; script v10: once per epoch of 200 steps
    offset: int = 0                     # decisions at offset, offset + every, ...; 1: on the first batch of an epoch (v3)
    warmup: int = 0                     # no decision up to and including this step
    stop: int | None = None             # no decision after this step
    epoch: int = 200
    cap: str = "break-even"             # no rank above mn/(m+n); "min": up to min(m, n), as in the scripts
    where: tuple[str, ...] = ("*",)     # layers, as shell patterns of names

    def paced(self, epoch: int) -> "Recipe":
        """The same recipe on a clock of `epoch` steps per epoch.  Axes that count steps are `paced` in their own way."""
        factor = epoch / self.epoch
        def scale(steps):
            return None if steps is None else round(steps * factor)
        axes = {axis: value.paced(factor) for axis in ("estimate", "control", "gradient")
                if hasattr(value := getattr(self, axis), "paced")}
        return replace(self, every=max(1, scale(self.every)), warmup=scale(self.warmup), stop=scale(self.stop),
                       epoch=epoch, **axes)

    def limit(self, layer: nn.Module) -> int:
        """The largest rank that this recipe gives a layer (nn.Linear or LowRankLinear)."""
        m, n = layer.out_features, layer.in_features
        return min(min(m, n), break_even(m, n)) if self.cap == "break-even" else min(m, n)

    def prepare(self, model: nn.Module, where: Callable[[str], bool] | None = None) -> nn.Module:
        """factorize_ the model's layers as the recipe starts, in place; returns the model.  Dense recipes change nothing."""
        if self.rank is None:
            return model
        def picked(name):
            return (where is None or where(name)) and any(fnmatchcase(name, p) for p in self.where)
        if isinstance(self.rank, dict):
            return factorize_(model, self.rank, None, self.init, self.op)
        return factorize_(model, lambda name, linear: min(self.rank, self.limit(linear)), picked, self.init, self.op)


class Resize(NamedTuple):
    """One rank change: when, which layer, from what to what, because of which estimate, at what cost."""

    step: int
    layer: str
    old: int
    new: int
    target: float                       # the estimate that the controller saw; of a spectrum its effective number
    error: float                        # ||W - W'||_F / ||W||_F


def single(target: float | Sequence[float]) -> float:
    """An estimate as one number; of worths w per direction (sum w)^2 / sum w^2, how many count."""
    if isinstance(target, (int, float)):
        return float(target)
    squares = sum(w * w for w in target)
    return sum(target) ** 2 / squares if squares > 0 else 1.0


class RankAdapter:
    """Watches the low-rank layers of a model and changes their ranks as a recipe says.

    Call `step()` after every optimizer.step() and before the gradients are zeroed; it returns the list of changes, which
    is almost always empty.  A changed layer has new Parameters, and the optimizer has been told in the recipe's way; who
    else holds them (DDP, EMA copies) is told by you, when the list is not empty.

    ValueError: no LowRankLinear in the model; a DDP-wrapped model; a controller that plans over the whole run, and no
    total_steps.  TypeError: an optimizer that the state policy refuses.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], recipe: Recipe,
                 total_steps: int | None = None):
        _refuse_wrapped(model, "RankAdapter")
        self.model, self.recipe, self.total_steps = model, recipe, total_steps
        self.optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        self.layers = low_rank_layers(model)
        if total_steps is None and getattr(recipe.control, "wants_length", False):
            raise ValueError(f"RankAdapter: {type(recipe.control).__name__} plans over the whole run; write "
                             f"RankAdapter(model, optimizer, recipe, total_steps=...).")
        if recipe.rank is not None and not self.layers:
            raise ValueError("RankAdapter: the model holds no LowRankLinear; call alr.factorize_(model, rank=...) or "
                             "recipe.prepare(model) before the optimizer is made.")
        if self.layers:
            recipe.state.check(self.optimizers)
            idle = getattr(recipe.control, "idle", lambda *_: "")(list(self.ranks.values()), self.shapes)
            if idle:
                warnings.warn(f"RankAdapter: {idle}", stacklevel=2)
        self.memory = recipe.control.init(list(self.ranks.values()))
        self.steps, self.losses, self.seconds = 0, [], 0.0
        self.stale: dict[str, list] = {}            # under Stale: layer -> shapes that the optimizer still holds
        self.grouped: dict[str, tuple] = {}         # by recipe.gradient: layer -> what it did last
        self.watched: set[tuple] = set()            # what hooks look at already, see watch
        self._seen, self._warned = 0, False
        for optimizer in self.optimizers[:1]:
            optimizer.register_step_post_hook(self._count)
        for axis in (recipe.gradient, recipe.estimate, recipe.resize):          # those that watch the model train
            if hasattr(axis, "attach"):
                axis.attach(self)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every layer now, by name."""
        return {name: layer.rank for name, layer in self.layers.items()}

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(m, n) of every layer, in the order of `ranks`."""
        return [(layer.out_features, layer.in_features) for layer in self.layers.values()]

    def _count(self, *_):
        # nobody should train for hours and learn at the end that no rank could move (PEFT issues 432, 1801)
        self._seen += 1
        idle = self.recipe.estimate is None and self.recipe.gradient is None
        if self._seen - self.steps >= UNSEEN and not self._warned and not idle:
            self._warned = True
            warnings.warn(f"RankAdapter: {self._seen} optimizer steps, {self.steps} calls of adapter.step(). "
                          "No rank can change without it: call it after every optimizer.step().", stacklevel=2)

    def step(self, loss: float | None = None) -> list[Resize]:
        """Count one optimizer step; when it is time, decide.  `loss`: a new validation loss, when there is one."""
        self.steps += 1
        if loss is not None:
            self.losses.append(float(loss))
        r = self.recipe
        due = (self.steps - r.offset) % r.every == 0 and r.warmup < self.steps <= (r.stop or self.steps)
        return self.adapt() if due and r.estimate is not None else []

    @torch.no_grad()
    def adapt(self) -> list[Resize]:
        """Decide now, whatever the clock says: estimate every layer, ask the controller, change what it wants changed."""
        start = time.perf_counter()
        r, ranks = self.recipe, list(self.ranks.values())
        targets = [(r.estimate.of(name) if isinstance(r.estimate, ByLayer) else r.estimate)(layer)
                   for name, layer in self.layers.items()]
        progress = self.steps / self.total_steps if self.total_steps else None
        signal = Signal([r.limit(layer) for layer in self.layers.values()], self.steps, tuple(self.losses), progress,
                        list(self.layers), self.shapes)
        wanted, self.memory = r.control.step(ranks, targets, self.memory, signal)
        events = self.resize({name: k for name, old, k in zip(self.layers, ranks, wanted) if k != old},
                             dict(zip(self.layers, targets)))
        self.seconds += time.perf_counter() - start
        return events

    @torch.no_grad()
    def resize(self, ranks: dict[str, int], targets: dict[str, float] | None = None) -> list[Resize]:
        """Give the named layers these ranks now; the optimizer is told in the same breath."""
        events, swaps = [], []
        for name, k in ranks.items():
            layer = self.layers[name]
            U, V = layer.U, layer.V                                             # (m, r), (r, n)
            U2, V2 = for_layer(self.recipe.resize, layer)(U.detach(), V.detach(), int(k))      # (m, k), (k, n)
            U2, V2 = U2.contiguous(), V2.contiguous()       # or a reloaded layer would round differently
            if not (U2.isfinite().all() and V2.isfinite().all()):
                raise FloatingPointError(f"RankAdapter: resizing {name} from {U.shape[1]} to {k} gave numbers that are "
                                         "not finite; its weights have probably diverged already.")
            events.append(Resize(self.steps, name, U.shape[1], U2.shape[1],
                                 single(targets[name]) if targets else float(k), relative_change(U, V, U2, V2)))
            layer.U, layer.V = nn.Parameter(U2, U.requires_grad), nn.Parameter(V2, V.requires_grad)
            swaps.append(Swap(U, V, layer.U, layer.V))
            if isinstance(self.recipe.state, Stale):
                self.stale.setdefault(name, [tuple(U.shape), tuple(V.shape)])
        self.recipe.state(self.optimizers, swaps)
        return events

    def state_dict(self) -> dict:
        """Plain numbers: what is needed, with the model's and the optimizer's own, to go on as if never stopped."""
        return {"steps": self.steps, "memory": self.memory, "losses": list(self.losses), "seconds": self.seconds,
                "stale": {name: [list(s) for s in shapes] for name, shapes in self.stale.items()},
                "seen": {name: {k: v.clone() for k in MOMENTS if (v := getattr(layer, k, None)) is not None}
                         for name, layer in self.layers.items()} if self.watched else {}}

    def load_state_dict(self, state: dict) -> None:
        """Load after the model and after the optimizer is made, before the optimizer's own state is loaded."""
        self.steps = self._seen = state["steps"]
        self.memory, self.losses, self.seconds = state["memory"], list(state["losses"]), state["seconds"]
        for name, moments in state.get("seen", {}).items():
            for key, moment in moments.items():
                setattr(self.layers[name], key, moment.to(self.layers[name].U.device))
        for name, shapes in state["stale"].items():
            layer = self.layers[name]                # frozen: the optimizer gets stand-ins for what it held
            for p, shape in zip((layer.U, layer.V), shapes):
                replace_parameter(self.optimizers, p, nn.Parameter(p.new_zeros(shape)))
            self.stale[name] = [tuple(s) for s in shapes]
