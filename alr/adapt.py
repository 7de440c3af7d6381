"""Where the axes meet a model and an optimizer: `Recipe`, a value, and `RankAdapter`, which keeps the books.

    factorize_(model, rank=64)                        # or recipe.prepare(model)
    adapter = RankAdapter(model, optimizer, recipe, total_steps=10_000)
    ...
    optimizer.step(); adapter.step(); model.zero_grad()
"""

from __future__ import annotations

import functools
import numbers
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from .axes import (
    Axis,
    Control,
    Count,
    Estimate,
    Factors,
    GradientRule,
    Init,
    Momentum,
    Op,
    Part,
    ResizeRule,
    Signal,
    StatePolicy,
    Whole,
    check,
)
from .control import Hold
from .factor import break_even, check_rank, mix_change, relative_change, uncast
from .group import Group
from .init import Spectral
from .linear import (
    LowRankLinear,
    Where,
    dense_weight,
    factorize_,
    holders,
    low_rank_layers,
    picks,
    refuse_wrapped,
    sharing,
    successor,
    unwrapped,
)
from .observe import PER, Observer, Seen, check_steps, grams, to_host
from .resize import SvdCore
from .state import Move, Plan, Swap, Transport, fitting, holder, place_of, places_of

UNSEEN = 10                             # optimizer steps without adapter.step() before we say so (ours)


@dataclass(frozen=True)
class Recipe:
    """A way to train with adaptive rank: one value on each axis, and when to act.  Its repr reads back (`recipes.parse`).

    every, offset, warmup and stop are optimizer steps; `epoch` is the number of steps that the numbers were written for
    (the scripts count epochs), so that `paced` can move a recipe to another epoch length.  rank as a dict: layers that it
    does not name, or that `where` leaves out, stay dense.
    ValueError for a field of another type or range, and for axes that do not fit each other.
    """

    name: str
    rank: Count | Part | dict[str, Count | Part] | None = 64   # at the start, at most (a layer's cap may be lower): a rank,
                                        # as a float a share of the dense layer's parameters, or {layer: rank}; None: dense
    init: Init = Spectral()
    estimate: Estimate | None = None    # (layer, seen) -> a number, or an importance per direction
    control: Control = Hold()
    resize: ResizeRule = SvdCore()      # (U, V, k, seen) -> U', V'
    state: StatePolicy = Transport()
    gradient: GradientRule | None = None        # what happens to gradients before the optimizer sees them (v1, v2)
    op: Op | None = None                # the layer's own forward and backward (v6, v7.3)
    every: Count = 200                  # steps between decisions; script v10: once per epoch of 200 steps
    offset: Whole = 0                   # decisions at offset, offset + every, ...; 1: on the first batch of an epoch (v3)
    warmup: Whole = 0                   # no decision up to and including this step
    stop: Whole | None = None           # no decision after this step
    epoch: Count = 200
    when: Literal["after", "before", "validated"] = "after"     # decide after the optimizer's step; between backward and it
                                        # (v3, v5 to v7.1); or, at an epoch's end, after it and the epoch's validation (v9)
    cap: Literal["break-even", "min"] = "break-even"    # no rank above mn/(m+n); "min": up to min(m, n), as in the scripts
    where: tuple[str, ...] = ("*",)     # layers, as shell patterns of names
    about: str = field(default="", repr=False, compare=False)   # one line for tables

    def __post_init__(self):
        check(self)
        if self.estimate is None and not isinstance(self.control, Hold):
            raise ValueError(f"Recipe {self.name!r}: control={self.control!r} would never be asked, since estimate is None; "
                             "give an estimate, or leave control out.")
        wants = self.control.wants
        if self.estimate is not None and wants not in (None, self.estimate.gives):
            raise ValueError(f"Recipe {self.name!r}: {type(self.control).__name__} reads a {wants} per layer, and "
                             f"{type(self.estimate).__name__} gives a {self.estimate.gives}. A number goes with Bidirectional "
                             "and the like, a spectrum with Budget and LossTarget.")
        if self.op is not None and self.observes:
            raise ValueError(f"Recipe {self.name!r}: op={self.op!r} hides the layer's inside, which "
                             f"{' and '.join(type(axis).__name__ for axis in self.observes)} observes; leave op out.")

    @property
    def observes(self) -> list[Estimate | ResizeRule]:
        """The axes that want to see the model train before a decision."""
        return [axis for axis in (self.estimate, self.resize) if axis is not None and axis.needs and self.estimate is not None]

    @property
    def window(self) -> int:
        """Over how many steps before a decision they look: never back beyond the decision before."""
        return min(max((axis.steps for axis in self.observes), default=0), self.every)

    def due(self, step: int) -> bool:
        """Is there a decision at the end of this step?"""
        late = self.stop is not None and step > self.stop
        return self.estimate is not None and (step - self.offset) % self.every == 0 and step > self.warmup and not late

    def next_due(self, step: int) -> int | None:
        """The first decision after this step; None when there is none any more."""
        if self.estimate is None:
            return None
        after = max(step, self.warmup) + 1
        first = after + (self.offset - after) % self.every
        return first if self.stop is None or first <= self.stop else None

    def paced(self, epoch: int) -> Recipe:
        """The same recipe on a clock of `epoch` steps per epoch.  Axes that count steps are `paced` in their own way.

        An offset of 0 or 1 stays, the last or the first batch of an epoch; so does a `Schedule`, whose steps are the run's.
        """
        factor = epoch / self.epoch
        def scale(steps):
            return None if steps is None else round(steps * factor)
        axes = {f.name: value.paced(factor) for f in fields(self) if isinstance(value := getattr(self, f.name), Axis)}
        return replace(self, every=max(1, scale(self.every)), warmup=scale(self.warmup), stop=scale(self.stop),
                       offset=self.offset if self.offset < 2 else max(1, scale(self.offset)), epoch=epoch, **axes)

    def limit(self, layer: nn.Module) -> int:
        """The largest rank that this recipe gives a layer (dense or LowRankLinear)."""
        m, n = (layer.out_features, layer.in_features) if isinstance(layer, LowRankLinear) else dense_weight(layer).shape
        return break_even(m, n) if self.cap == "break-even" else min(m, n)

    def prepare(self, model: nn.Module, where: Where = None) -> nn.Module:
        """factorize_ the model's layers as the recipe starts, in place; returns the model.  Dense recipes change nothing.

        Only layers that both `where` and the recipe's own pick.
        """
        if self.rank is None:
            return model
        def both(name):
            return picks(where, name) and picks(self.where, name)
        if isinstance(self.rank, dict):
            return factorize_(model, self.rank, both, self.init, self.op)
        def start(name, linear):
            if isinstance(self.rank, float):
                return self.rank
            return min(self.control.for_layer(name).first_rank(self.rank), self.limit(linear))
        return factorize_(model, start, both, self.init, self.op)


class Resize(NamedTuple):
    """One rank change: when, which layer, from what to what, because of which estimate, at what cost.

    old == new where a controller has a layer factorised anew at the rank that it has (`Control.again`; script v7.2).
    """

    step: int
    layer: str
    old: int
    new: int
    target: float                       # the estimate that the controller saw; of a spectrum its effective number; by hand,
                                        # where nothing was estimated, the new rank
    error: float                        # ||W - W'||_F / ||W||_F


def effective_number(target: float | Sequence[float]) -> float:
    """An estimate as one number; of importances w per direction (sum w)^2 / sum w^2, how many count."""
    if isinstance(target, (int, float)):
        return float(target)
    top = max(target, default=0.0)
    if not top > 0:
        return 1.0 if len(target) else 0.0          # of a layer that is off
    shares = [w / top for w in target]              # whatever scale the loss has
    return sum(shares) ** 2 / sum(w * w for w in shares)


def full_precision(method: Callable) -> Callable:
    """The method with autocast off, wherever its caller stands: factors are no activations."""
    @functools.wraps(method)
    def uncasted(self, *args, **kwargs):
        with uncast(self._device):
            return method(self, *args, **kwargs)
    return uncasted


class RankAdapter:
    """Watches the low-rank layers of a model and changes their ranks as a recipe says.

    Call `step()` after every optimizer.step() and before the gradients are zeroed; it returns the list of changes, which
    is almost always empty.  A changed layer has new Parameters; the optimizer has been told in the recipe's way, and their
    attributes and gradient hooks have moved along.  Who else holds them (an EMA copy) is told by you, when the list is not
    empty (`alr.integrations.follow_ranks_`).

    optimizer: one or several, wrapped by accelerate or Lightning or not.  total_steps: optimizer steps of the whole run, for
    controllers that plan over it.  group: the processes that train together; torch's default group if one is open.
    per: what a term of the loss belongs to, see `observe.Observer`.  Say per="example" for a pooled classifier whose head is
    not low-rank: "auto" tells pooling by a head that sees one row where the trunk sees several.

    A layer that is frozen keeps its factors, and its parameters count as spent.  One that has been trained, but was not used
    in the steps before a decision that are looked at, keeps its rank too, and no other layer is cut for it.

    ValueError: no LowRankLinear in the model; a wrapped or sharded model; a trained factor that no optimizer holds; a factor
    that another module holds too; a controller that plans over the whole run, and no total_steps.
    TypeError: what is no recipe or no optimizer; an optimizer that the state policy refuses.

        >>> from alr import PairOptimizer, recipes
        >>> model = factorize_(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), rank=0.9)
        >>> optimizer = PairOptimizer(model)
        >>> adapter = RankAdapter(model, optimizer, recipes.alr, total_steps=400)
        >>> adapter.ranks
        {'0': 28, '2': 6}
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], recipe: Recipe,
                 total_steps: int | None = None, group: Any = None, per: Literal["auto", "row", "example"] = "auto"):
        if not isinstance(recipe, Recipe):
            raise TypeError(f"RankAdapter: recipe is {recipe!r}; wanted a Recipe, such as alr.recipes.alr, or "
                            "alr.recipes.parse(text).")
        model = unwrapped(model)
        refuse_wrapped(model, "RankAdapter")
        if per not in PER:
            raise ValueError(f"RankAdapter: per is {per!r}; wanted one of {', '.join(PER)}.")
        self.model, self.recipe, self.per = model, recipe, per
        self.optimizers = [bare(o) for o in ([optimizer] if isinstance(optimizer, Optimizer) else listed(optimizer))]
        self.group = group if isinstance(group, Group) else Group(group)
        self.layers = {name: layer for name, layer in low_rank_layers(model).items() if picks(recipe.where, name)}
        if recipe.rank is not None and not self.layers:
            raise ValueError("RankAdapter: the model holds no LowRankLinear" + (f" that where={recipe.where} picks"
                             if low_rank_layers(model) else "") + "; call alr.factorize_(model, rank=...) or "
                             "recipe.prepare(model) before the optimizer is made.")
        self.total_steps = self._check_plan(total_steps)
        self.steps, self.losses, self.seconds = 0, [], 0.0
        self.stale: dict[str, list] = {}            # under Stale: layer -> shapes that the optimizer still holds
        self.grouped: dict[str, tuple] = {}         # by recipe.gradient: layer -> what it did last
        self.observer: Observer | None = None       # while a window is open
        self._dropped: int | None = None            # the step of the decision whose window was dropped last
        self._closed = False
        self._check_own()
        self._known = {name: (layer.U, layer.V) for name, layer in self.layers.items()}
        self._rest = self._others()
        if self.layers:
            if recipe.estimate is not None:         # else no rank moves but by hand: `resize` asks then
                recipe.state.check(self.optimizers)
            self.check_held()
            self._check_momentum()
            ranks, shapes = list(self.ranks.values()), self.shapes
            for control, mine in recipe.control.parts(list(self.layers)):
                if warning := control.warning([ranks[i] for i in mine], [shapes[i] for i in mine]):
                    warnings.warn(f"RankAdapter: {warning}", stacklevel=2)
        self.memory = recipe.control.init(list(self.ranks.values()))
        self._check_alike()
        # Time is kept twice.  `steps` counts the calls of step() that count, and the recipe goes by it.  What the optimizers
        # do is heard from their hooks, so that a call too many, too few or at the wrong place is noticed.
        self._taken = 0                             # optimizer steps so far, for the warning of a forgotten call
        self._counts = [0] * len(self.optimizers)   # steps of each optimizer since the last call of `step`
        self._mark = None                           # the gradient that the last optimizer step used: was there another since?
        self._unheard, self._version = 0, None      # calls since then at which weights had moved, and how often they have
        self._untrained = set(self.layers)          # layers that no optimizer step has found with a gradient so far
        self._warned = set()                        # what has been said already
        self._check_alone()
        self._listen()
        self._arm()

    def _check_plan(self, total: int | None) -> int | None:
        r = self.recipe
        if total is not None and (isinstance(total, bool) or not isinstance(total, numbers.Integral) or total < 1):
            raise ValueError(f"RankAdapter: total_steps is {total!r}; wanted the number of optimizer steps, at least 1.")
        if total is None and r.control.needs_total_steps:
            raise ValueError(f"RankAdapter: {type(r.control).__name__} plans over the whole run; write "
                             f"RankAdapter(model, optimizer, recipe, total_steps=...).")
        first = r.next_due(0)
        if total is not None and r.estimate is not None and (first is None or first > total):
            warnings.warn("RankAdapter: the first decision would come " + (f"at step {first}" if first else "never") +
                          f", and the run has {total}: no rank will ever move. Decide more often: "
                          f"dataclasses.replace(recipe, every={max(1, total // 20)}).", stacklevel=3)
        return None if total is None else int(total)

    # ---------------------------------------------------------------- what is there

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every layer now, by name."""
        return {name: layer.rank for name, layer in self.layers.items()}

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(m, n) of every layer, in the order of `ranks`."""
        return [(layer.out_features, layer.in_features) for layer in self.layers.values()]

    @property
    def frozen(self) -> set[str]:
        """Layers of which not both factors are trained; their rank stays."""
        return {name for name, layer in self.layers.items() if not (layer.U.requires_grad and layer.V.requires_grad)}

    def _check_own(self) -> None:
        for name, layer in self.layers.items():
            if "U" not in layer._parameters or "V" not in layer._parameters:
                raise ValueError(f"RankAdapter: the factors of {name!r} are computed (parametrised or pruned), not Parameters "
                                 "of their own, so their rank cannot change; undo that first.")
        held = holders(self.model)
        for name, layer in self.layers.items():
            for key in "UV":
                if others := sharing(held, layer, key):
                    raise ValueError(f"RankAdapter: {name!r} shares its {key} with {others[0]!r}, so its rank cannot change "
                                     f"alone. Give it a factor of its own before the optimizer is made: layer.{key} = "
                                     f"nn.Parameter(layer.{key}.detach().clone()).")

    @torch.no_grad()
    def _check_alike(self) -> None:
        """ValueError, on all processes, unless they hold the same weights: nobody has spread rank 0's, as DDP would have."""
        if self.group.size == 1:
            return
        params = dict(self.model.named_parameters())
        first = self.group.say({name: tuple(p.shape) for name, p in params.items()}, self._device)
        unlike = [name for name, p in params.items() if first.get(name) != tuple(p.shape)] + sorted(set(first) - set(params))
        bad = torch.tensor([float(bool(unlike))], device=self._device)
        self.group.sum([bad])                               # all processes ask the same of each other
        if not bad.item() and params:
            mine = torch.stack([p.double().sum().to(self._device) for p in params.values()])
            size = torch.stack([p.double().abs().sum().to(self._device) for p in params.values()])
            theirs = mine.clone()
            self.group.broadcast([theirs])
            unlike = [name for name, far in zip(params, ((mine - theirs).abs() > 1e-9 * size).tolist()) if far]
            bad.fill_(float(bool(unlike)))
            self.group.sum([bad])
        if bad.item():
            raise ValueError("RankAdapter: the processes do not hold the same model"
                             + (f" ({unlike[0]!r} differs from rank 0's)" if unlike else "")
                             + ". Make it from the same seed on all of them (torch.manual_seed), or load one "
                             "state dict everywhere.")

    def check_held(self) -> None:
        """ValueError unless every trained factor is held by an optimizer, and every layer still stands in the model."""
        there = {id(mod) for mod in self.model.modules()}
        gone = [name for name, layer in self.layers.items() if id(layer) not in there]
        if gone:
            raise ValueError(f"RankAdapter: {gone[0]!r} is no longer in the model (densified, or replaced): changing its rank "
                             "would change nothing. Make a new RankAdapter for the model as it is.")
        self._check_own()
        held = {id(p) for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]}
        frozen = self.frozen
        loose = [name for name, layer in self.layers.items() if name not in frozen and name not in self.stale
                 and not {id(layer.U), id(layer.V)} <= held]
        if loose:
            raise ValueError(f"RankAdapter: no optimizer holds the factors of {loose[0]!r}"
                             + (f" and of {len(loose) - 1} more layers" if loose[1:] else "") +
                             ", so they would never be trained. Make the optimizer after factorize_ and load_state_dict, of "
                             "this model's own parameters.")

    def _check_momentum(self) -> None:
        """TypeError, where the resize reads tangent momentum, for a layer whose optimizer keeps none."""
        if not self.recipe.resize.momentum:
            return
        frozen = self.frozen
        for name, layer in self.layers.items():
            optimizer = holder(self.optimizers, layer.U)
            if name not in frozen and not keeps_tangent(optimizer):
                rule = f" with rule={optimizer.rule!r}" if hasattr(optimizer, "rule") else ""
                raise TypeError(f"RankAdapter: {self.recipe.resize!r} reads the momentum of W as a tangent vector, and "
                                f"{name!r} is stepped by {type(optimizer).__name__}{rule}, which keeps none. Write "
                                "alr.PairOptimizer(model), whose rule is Tangent(), or a recipe with resize=FisherCut().")

    def _momentum(self, layer: LowRankLinear) -> Momentum | None:
        found = place_of(self.optimizers, layer.U)
        return found[0].tangent(found[1], layer.U, layer.V) if found and keeps_tangent(found[0]) else None

    # ---------------------------------------------------------------- the clock

    def _listen(self) -> None:
        gradient = self.recipe.gradient
        self._handles = [] if gradient is None else list(gradient.attach(self))
        self._handles += [optimizer.register_step_post_hook(self._stepped) for optimizer in self.optimizers]

    def _check_alone(self) -> None:
        """Say so, where an older adapter hears the same optimizers and watches the same layers; it then keeps quiet."""
        mine = {id(layer) for layer in self.layers.values()}
        hooks = [hook for optimizer in self.optimizers for hook in optimizer._optimizer_step_post_hooks.values()]
        for other in {id(x): x for hook in hooks if isinstance(x := getattr(hook, "__self__", None), RankAdapter)}.values():
            if shared := [name for name, layer in other.layers.items() if id(layer) in mine]:
                other._warned.add("forgotten")
                self._warn("alone", f"another RankAdapter hears the same optimizer and changes the ranks of the same layers "
                                    f"({shared[0]!r} is the first); was a cell run twice? Call close() of the older one.")

    def close(self) -> None:
        """Leave model and optimizers as they would be without the adapter."""
        self._closed = True
        for handle in self._handles:
            handle.remove()
        if self.observer is not None:
            self.observer.remove()
            self.observer = None

    def _stepped(self, optimizer: Optimizer, *_) -> None:
        before = self._since
        self._counts[next(i for i, o in enumerate(self.optimizers) if o is optimizer)] += 1
        self._taken += self._since - before
        self._mark = self._gradient()
        if self._untrained:
            self._untrained -= {name for name in self._untrained if self.layers[name].U.grad is not None}
        idle = self.recipe.estimate is None and self.recipe.gradient is None
        # nobody should train for hours and learn at the end that no rank could move (PEFT issues 432, 1801)
        if self._since >= UNSEEN and not idle:
            self._warn("forgotten", f"{self._taken} optimizer steps, {self.steps} calls of adapter.step(). No rank can change "
                                    "without it: call it after every optimizer.step().")

    @property
    def _since(self) -> int:
        """Optimizer steps since the last call of `step`: several optimizers take one together."""
        return max(self._counts, default=0)

    def _gradient(self) -> tuple | None:
        """A token of the gradient now in the first trained factor: another backward gives another token."""
        grad = next((layer.U.grad for layer in self.layers.values() if layer.U.requires_grad and layer.rank), None)
        return None if grad is None else (id(grad), grad._version)

    def _warn(self, key: str, text: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(f"RankAdapter: {text}", stacklevel=4)

    @full_precision
    def step(self, loss: float | None = None) -> list[Resize]:
        """Count one optimizer step; when it is time, decide.  `loss`: a new validation loss, when there is one.

        A call between two optimizer steps (after a micro-batch, or where a GradScaler has skipped the step) is no step.
        FloatingPointError, naming the layer, where weights have diverged; nothing is changed then.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("RankAdapter: step() in inference mode would make factors that cannot be trained; call it "
                               "outside of torch.inference_mode().")
        if loss is not None:
            self.losses.append(float(loss))
        after = self.recipe.when != "before"
        if after and self._since == 0 and self.optimizers:
            if self.observer is not None:
                self.observer.settle()
            self._check_heard()
            return []
        if after and self._since == 1 and self._mark is not None and self._gradient() not in (None, self._mark):
            self._out_of_order()
        self._counts, self._unheard, self._version = [0] * len(self.optimizers), 0, None
        self._adopt()
        self.steps += 1
        if self.observer is not None:
            self.observer.commit()
        events = self.adapt() if self.recipe.due(self.steps) and not self._blind() else []
        if self.recipe.state.zero:
            for name in self.stale:
                self.layers[name].U.grad = self.layers[name].V.grad = None
        self._arm()
        return events

    def _blind(self) -> bool:
        """Is there nothing to decide by, since the window before this decision was dropped?"""
        dropped = self._dropped == self.steps and self.observer is None and bool(self.recipe.observes)
        return dropped and not self._finished(self.steps)

    def _check_heard(self) -> None:
        """Say so where weights move from call to call, and no optimizer of ours steps: somebody else trains the model."""
        version = sum(p._version for layer in self.layers.values() for p in (layer.U, layer.V) if p.requires_grad)
        self._unheard += self._version not in (None, version)
        self._version = version
        if self._unheard >= UNSEEN and (self.recipe.estimate or self.recipe.gradient):
            kinds = ", ".join(sorted({type(optimizer).__name__ for optimizer in self.optimizers}))
            self._warn("unheard", f"the weights have moved between {self._unheard} calls of adapter.step(), and none of this "
                                  f"adapter's optimizers ({kinds}) has stepped: these calls count nothing, and no rank can "
                                  "change. Make the adapter with the optimizer whose .step() is called; for SAM that is its "
                                  "base_optimizer.")

    def _out_of_order(self) -> None:
        grad = next(layer.U.grad for layer in self.layers.values() if layer.U.requires_grad and layer.rank)
        if "order" not in self._warned and grad.any():
            self._warn("order", "a backward pass came between optimizer.step() and adapter.step(). Call adapter.step() right "
                                "after optimizer.step(), or a changed layer loses the gradient of that step.")

    def _arm(self) -> None:
        """Open a window, if the next decision is near and somebody wants to see what comes before it."""
        r = self.recipe
        if self.observer is not None or not r.observes or not self.layers or self._closed:
            return
        due = r.next_due(self.steps)
        if due is None or due - self.steps > r.window or self._finished(due):
            return
        self.observe(due - self.steps)

    def observe(self, steps: int | None = None) -> None:
        """Open a window of so many optimizer steps (the recipe's, if not said), for an `adapt()` by hand.

        A recipe that observes nothing needs none.  Where one is open already, it stays, unless a number is given: ValueError
        then, and for a number below 1.
        """
        if steps is not None:
            steps = check_steps(steps, "RankAdapter.observe")
            if self.observer is not None:
                raise ValueError(f"RankAdapter.observe: a window of {steps} steps was asked for, and one of "
                                 f"{self.observer.steps} is open, {self.observer.done} of them done. Leave the number out to "
                                 "go on with it, or decide first: adapter.adapt().")
        needs = {need for axis in self.recipe.observes for need in axis.needs}
        if needs and self.observer is None:
            self._adopt()
            left_out = self.frozen | self.stale.keys()
            live = {name: layer for name, layer in self.layers.items() if name not in left_out}
            self.observer = Observer(live, needs, steps or self.recipe.window, self.per, self.group)

    def _drop_window(self, layer: str, why: str, depth: int = 5) -> None:
        """What an open window has seen is of factors that are gone."""
        if self.observer is None:
            return
        self.observer.remove()
        self.observer, self._dropped = None, self.recipe.next_due(self.steps)
        due = "a decision" if self._dropped is None else f"the decision of step {self._dropped}"
        warnings.warn(f"RankAdapter: {why.format(repr(layer))} after step {self.steps}, in the steps before {due}; what was "
                      "seen so far is dropped. A decision by the clock goes by the steps that are left, and is left out where "
                      "none is; one by hand wants another adapter.observe().", stacklevel=depth)

    def _signal(self, step: int) -> Signal:
        return Signal([self.recipe.limit(layer) for layer in self.layers.values()], step, tuple(self.losses),
                      step / self.total_steps if self.total_steps else None, list(self.layers), self.shapes)

    def _finished(self, step: int) -> bool:
        """Can no rank move at that step, whatever is estimated?"""
        return self.recipe.control.finished(list(self.ranks.values()), self.memory, self._signal(step))

    # ---------------------------------------------------------------- decisions

    @torch.no_grad()
    @full_precision
    def adapt(self) -> list[Resize]:
        """Decide now, whatever the clock says: estimate every layer, ask the controller, change what it wants changed.

        All or nothing: what can fail fails before the first factor, moment or memory is changed.
        """
        start = time.perf_counter()
        self._adopt()
        self.check_held()
        ranks, signal = list(self.ranks.values()), self._signal(self.steps)
        if self.observer is None and self.recipe.observes:
            if self._finished(self.steps):
                return []
            raise RuntimeError("RankAdapter: adapt() has nothing to go by: "
                               f"{' and '.join(type(axis).__name__ for axis in self.recipe.observes)} observes the model while "
                               "it trains. Call adapter.observe() some steps before, or leave decisions to step().")
        observer, self.observer = self.observer, None
        seen, said, problem = {}, None, None
        try:
            seen = observer.close() if observer is not None else {}
            if self.group.rank == 0:
                said = self._decide(ranks, signal, seen)
        except Exception as error:
            problem = error
        if observer is not None:
            observer.remove()
        self.group.agree(problem, self._device)
        said = self.group.say(said, self._device)
        if said is None:                                    # nothing was seen
            return []
        wanted, memory, targets = said
        again, frozen = self.recipe.control.again(memory, signal) or [False] * len(ranks), self.frozen
        changed = {name: k for name, old, k, anew in zip(self.layers, ranks, wanted, again, strict=True)
                   if k != old or anew and name not in frozen}
        events = self._resize(changed, targets, seen)
        if not changed and self.recipe.state.always:
            self.recipe.state.plan(self.optimizers, ()).apply()
        self.memory = memory
        self.seconds += time.perf_counter() - start
        self._arm()                                         # for the next decision, where this one came by hand
        return events

    def _decide(self, ranks: list[int], signal: Signal, seen: dict[str, Seen]):
        """(wanted ranks, memory, targets); None where no step of the window counted."""
        r = self.recipe
        self._check_finite()
        steps = [one.steps for name, one in seen.items() if self.layers[name].rank]
        if steps and not any(steps):
            self._warn("blank", f"of the steps before the decision at step {self.steps} none counted, so no rank is decided "
                       "now: what went back through the layers was not finite (a GradScaler skips such steps), or nothing "
                       "went through their forward at all. Does somebody read .weight?")
            return None
        frozen = self.frozen
        live = [layer for name, layer in self.layers.items() if name not in frozen]
        if r.estimate.gradients and live and all(layer.U.grad is None and layer.V.grad is None for layer in live):
            raise ValueError(f"RankAdapter: {r.estimate!r} reads gradients, and no layer has one. Call adapter.step() after "
                             "backward and optimizer.step(), before the gradients are zeroed.")
        unseen = set(self.layers) - set(seen) if r.observes and not self._finished(self.steps) else set()
        away = self._out_of_sight(seen) | unseen - frozen - self.stale.keys()
        held = frozen | away | unseen
        targets = {name: at_rest(r.estimate, layer) if name in held or layer.rank == 0 else
                   r.estimate.for_layer(name)(layer, seen.get(name)) for name, layer in self.layers.items()}
        signal = signal._replace(held=[name in held for name in self.layers], unseen=[name in away for name in self.layers])
        wanted, memory = r.control.step(ranks, list(targets.values()), self.memory, signal)
        wanted = [old if name in held else int(k) for name, old, k in zip(self.layers, ranks, wanted, strict=True)]
        return wanted, memory, {name: effective_number(t) for name, t in targets.items()}

    def _out_of_sight(self, seen: dict[str, Seen]) -> set[str]:
        """Layers that have been trained, but through whose forward nothing went in the window: nothing is known of them.

        They are held.  One that has never been trained is worth what its estimate says: nothing.
        """
        looks = bool(self.recipe.estimate.needs)
        found = {name for name, one in seen.items() if one.rows == 0 and self.layers[name].rank
                 and (looks or one.importance is not None)}
        if looks:
            self._say_unseen("unused", found & self._untrained, "has not been trained so far, so it counts for nothing and is "
                             "cut first. If it is trained later, let decisions begin later (warmup=...), or freeze it until "
                             "then (requires_grad_(False)).")
        found -= self._untrained
        steps = max((seen[name].steps for name in found), default=0)
        axes = " and ".join(dict.fromkeys(type(axis).__name__ for axis in self.recipe.observes))
        self._say_unseen("unseen", found, f"has been trained, but its forward was not called in the {steps} steps that were "
                         "seen before a decision, so nothing is known of its directions: its rank stays, at no other layer's "
                         f"cost. If it is used now and then, look longer, with steps=... of {axes}, or choose another `every`. "
                         "Does somebody read .weight?")
        return found

    def _say_unseen(self, key: str, names: set[str], text: str) -> None:
        """One warning for all layers of which this has not been said."""
        new = [name for name in self.layers if name in names and f"{key} {name}" not in self._warned]
        self._warned |= {f"{key} {name}" for name in new}
        if new:
            more = f" (and {len(new) - 1} more layers, each)" if new[1:] else ""
            warnings.warn(f"RankAdapter: {new[0]!r}{more} {text}", stacklevel=5)

    def _check_finite(self) -> None:
        if self.layers:
            good = torch.stack([(layer.U.isfinite().all() & layer.V.isfinite().all()).to(self._device)
                                for layer in self.layers.values()]).tolist()
            bad = [name for name, fine in zip(self.layers, good) if not fine]
            if bad:
                raise FloatingPointError(f"RankAdapter: the weights of {bad[0]!r} are not finite: the model has diverged. No "
                                         "rank was changed.")

    @property
    def _device(self) -> torch.device:
        return next((layer.U.device for layer in self.layers.values()), torch.device("cpu"))

    @torch.no_grad()
    @full_precision
    def resize(self, ranks: dict[str, int]) -> list[Resize]:
        """Give the named layers these ranks now; the optimizer is told in the same breath.  All or nothing.

        ValueError for a layer that is not there, or a rank that it cannot have.
        """
        if not isinstance(ranks, dict):
            raise ValueError(f"RankAdapter.resize: ranks is {ranks!r}; wanted {{layer name: rank}}.")
        self._adopt()
        unknown = [name for name in ranks if name not in self.layers]
        if unknown:
            raise ValueError(f"RankAdapter: {unknown[0]!r} is no layer of this adapter; there are "
                             f"{len(self.layers)}, the first is {next(iter(self.layers), None)!r}.")
        self.check_held()
        self.recipe.state.check(self.optimizers)
        events = self._resize({name: check_rank(k, self.layers[name].out_features, self.layers[name].in_features,
                                                "RankAdapter.resize", name, least=0) for name, k in ranks.items()}, {}, {})
        self._arm()                                         # what is left of a window that this has dropped
        return events

    def _resize(self, ranks: dict[str, int], targets: dict[str, float], seen: dict[str, Seen]) -> list[Resize]:
        if not ranks:
            return []
        self._check_off([name for name, k in ranks.items() if k == 0])
        made, problem = {}, None
        if self.group.rank == 0:
            try:
                made = {name: self._factors(name, k, seen.get(name)) for name, k in ranks.items()}
            except Exception as error:
                problem = error
        self.group.agree(problem, self._device)
        if self.group.size > 1:
            made = self._shared(ranks, made)
        known = self._grams([name for name, new in made.items() if new.mix], seen)
        events, swaps = [], []
        for name, (U2, V2, mix) in made.items():
            layer = self.layers[name]
            U, V = layer.U, layer.V                                             # (m, r), (r, n)
            error = mix_change(*known[name], *mix) if mix else relative_change(U, V, U2, V2)
            events.append(Resize(self.steps, name, U.shape[1], U2.shape[1], targets.get(name, float(U2.shape[1])), error))
            swaps.append(Swap(U, V, successor(U, U2), successor(V, V2), mix))
        frozen = self.frozen
        told = [swap for name, swap in zip(made, swaps) if name not in self.stale and
                (name not in frozen or holder(self.optimizers, swap.U) is not None)]
        plan = self._plan(told)
        self._drop_window(next(iter(made)), "the rank of {} was changed by hand", depth=6)
        for name, swap in zip(made, swaps):                                     # from here on nothing can fail
            layer = self.layers[name]
            layer.U, layer.V = swap.U2, swap.V2
            self._known[name] = (swap.U2, swap.V2)
            if not self.recipe.state.tells:
                self.stale.setdefault(name, [tuple(swap.U.shape), tuple(swap.V.shape)])
        plan.apply()
        return events

    def _check_off(self, names: list[str]) -> None:
        """ValueError for layers that go to rank 0 under an optimizer whose steps divide by the rank."""
        for name in names:
            holders = {type(optimizer) for optimizer, *_ in places_of(self.optimizers, self.layers[name].U)}
            if getattr(torch.optim, "Muon", None) in holders:
                raise ValueError(f"RankAdapter: rank 0 asked of {name!r}, which torch.optim.Muon steps; it cannot step empty "
                                 "factors. Take alr.PairOptimizer(model), or a controller with min_rank=1 or more.")

    def _grams(self, names: list[str], seen: dict[str, Seen]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """U^T U and V V^T of these layers, in float64 on the CPU; what is not known yet comes in one copy."""
        out = {name: seen[name].grams for name in names if name in seen and seen[name].grams is not None}
        missing = [name for name in names if name not in out]
        both = iter(to_host([G for name in missing for G in grams(self.layers[name])]))
        return out | {name: (next(both), next(both)) for name in missing}

    def _factors(self, name: str, k: int, seen: Seen | None) -> Factors:
        layer = self.layers[name]
        U, V = layer.U.detach(), layer.V.detach()                               # (m, r), (r, n)
        if self.recipe.resize.momentum:
            seen = (seen or Seen(0, 0.0))._replace(momentum=self._momentum(layer))
        try:
            new = Factors(*self.recipe.resize.for_layer(name)(U, V, k, seen))
        except (FloatingPointError, torch.linalg.LinAlgError) as error:
            raise FloatingPointError(f"RankAdapter: {name!r} cannot go from rank {U.shape[1]} to {k}: {error}") from error
        except ValueError as error:
            raise ValueError(f"RankAdapter: {name!r}: {error}") from error
        if not (new.U.isfinite().all() and new.V.isfinite().all()):
            raise FloatingPointError(f"RankAdapter: resizing {name!r} from {U.shape[1]} to {k} gave numbers that are "
                                     "not finite; its weights have probably diverged already.")
        return new._replace(U=new.U.contiguous(), V=new.V.contiguous())         # or a reloaded layer would round differently

    def _shared(self, ranks: dict[str, int], made: dict[str, Factors]) -> dict[str, Factors]:
        """Rank 0's new factors, on all processes."""
        if self.group.rank > 0:
            made = {name: Factors(self.layers[name].U.new_empty(self.layers[name].out_features, k),
                                  self.layers[name].V.new_empty(k, self.layers[name].in_features)) for name, k in ranks.items()}
        self.group.broadcast([x for new in made.values() for x in new[:2]])
        mixes = self.group.say({name: new.mix for name, new in made.items()} if self.group.rank == 0 else None, self._device)
        return {name: new._replace(mix=mixes[name]) for name, new in made.items()}

    def _plan(self, swaps: list[Swap]) -> Plan:
        """What the optimizers are to be told; of several processes, rank 0's moments on all."""
        plan = self.recipe.state.plan(self.optimizers, swaps)
        self.group.broadcast([x for move in plan.moves for key, x in sorted(move.state.items())
                              if isinstance(x, torch.Tensor) and x.dim()])
        return plan

    # ---------------------------------------------------------------- to stop and to go on

    def _adopt(self) -> None:
        """Factors that were replaced behind our back (a state dict of other ranks was loaded): the optimizers get the new ones.

        Where the optimizer's state was loaded too, it is of the new shapes and stays; other state is dropped.  So is what an
        open window has seen of the old factors.  A state dict that was loaded with assign=True has replaced all other
        Parameters as well, which the optimizers get too.  ValueError for factors that no optimizer holds or can be given.
        """
        replaced = self._replaced()
        adopt(self.optimizers, self._known, self.layers)
        if replaced:
            now = self._others()
            for name, old in self._rest.items():
                follow(self.optimizers, old, now.get(name, old))
            self._rest = now
            self._drop_window(replaced[0], "the factors of {} were replaced (by a state dict, say)")
        for name, layer in self.layers.items():
            self._known[name] = (layer.U, layer.V)
        if any({"U", "V"} <= set(self.layers[name]._parameters) for name in replaced):
            self.check_held()

    def _others(self) -> dict[str, nn.Parameter]:
        """The Parameters of the model that are no factors of its layers, by name."""
        factors = {id(p) for layer in self.layers.values() for p in (layer.U, layer.V)}
        return {name: p for name, p in self.model.named_parameters() if id(p) not in factors}

    def _replaced(self) -> list[str]:
        return [name for name, layer in self.layers.items()
                if self._known[name][0] is not layer.U or self._known[name][1] is not layer.V]

    def state_dict(self) -> dict:
        """What is needed, with the model's and the optimizer's own, to go on as if never stopped.

        Plain numbers; while a window is open the tensors of what was seen so far, and under `Stale` the summed gradients of
        the frozen factors.
        """
        return {"recipe": repr(self.recipe), "layers": {name: list(shape) for name, shape in zip(self.layers, self.shapes)},
                "ranks": self.ranks,
                "total_steps": self.total_steps, "steps": self.steps, "since": self._since, "memory": self.memory,
                "losses": list(self.losses), "seconds": self.seconds,
                "stale": {name: [list(s) for s in shapes] for name, shapes in self.stale.items()},
                "sums": {name: [None if p.grad is None else p.grad.clone() for p in (self.layers[name].U, self.layers[name].V)]
                         for name in self.stale},
                "untrained": sorted(self._untrained),
                "seen": None if self.observer is None or self._replaced() else self.observer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Go on where another adapter stopped.  Load the model first; then optimizer and adapter, in either order.

        ValueError for a state of other layers, of other ranks (the model is not loaded yet), or of another recipe.  Factors
        that loading the model has replaced are put into the optimizers; what no optimizer holds then is refused, as at the
        start.
        """
        if missing := set(self.state_dict()) - {"untrained"} - set(state if isinstance(state, dict) else ()):
            raise ValueError(f"RankAdapter: {sorted(missing)[0]!r} is not in the state; wanted what adapter.state_dict() gave.")
        shapes = {name: list(shape) for name, shape in zip(self.layers, self.shapes)}
        if state["layers"] != shapes:
            other = sorted(set(state["layers"]) ^ set(shapes))
            other = other or [name for name in shapes if state["layers"][name] != shapes[name]]
            there = state["layers"].get(other[0], "absent")
            raise ValueError(f"RankAdapter: the state is of other layers; {other[0]!r} is {there} "
                             f"there and {shapes.get(other[0], 'absent')} here.")
        if unlike := [name for name, rank in self.ranks.items() if state["ranks"][name] != rank]:
            raise ValueError(f"RankAdapter: {unlike[0]!r} has rank {state['ranks'][unlike[0]]} in the state and "
                             f"{self.ranks[unlike[0]]} in the model. Load the model's state dict first.")
        if state["recipe"] != repr(self.recipe):
            raise ValueError(f"RankAdapter: the state is of recipe {state['recipe']}, and this adapter has {self.recipe!r}.")
        if state["total_steps"] != self.total_steps:
            warnings.warn(f"RankAdapter: the state is of a run of {state['total_steps']} steps, and this one has "
                          f"{self.total_steps}: a schedule over the whole run goes on as if it had always been so long.",
                          stacklevel=2)
        self.steps = self._taken = state["steps"]
        self._counts, self._mark = [state["since"]] * len(self.optimizers), None
        self.memory, self.losses, self.seconds = state["memory"], list(state["losses"]), state["seconds"]
        self._untrained = set(state.get("untrained", ()))       # older states do not say: then all count as trained
        if self.observer is not None:
            self.observer.remove()
            self.observer = None
        self._adopt()
        for name, kept in state["stale"].items():
            layer = self.layers[name]                # frozen: the optimizer gets stand-ins for what it held
            for p, shape in zip((layer.U, layer.V), kept):
                stand_in = nn.Parameter(p.new_zeros(shape))
                Plan(tuple(Move(*place, p, stand_in, place[0].state.get(p, {}))
                           for place in places_of(self.optimizers, p))).apply()
            self.stale[name] = [tuple(s) for s in kept]
            for p, total in zip((layer.U, layer.V), state["sums"][name]):
                p.grad = None if total is None else total.to(p).clone()
        self.check_held()
        if state["seen"] is not None:
            left = (self.recipe.next_due(self.steps) or self.steps) - self.steps
            self.observe(state["seen"].get("steps", max(1, left + state["seen"]["done"])))      # older ones do not say
            self.observer.load_state_dict(state["seen"])
        self._arm()

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_handles"}

    def __setstate__(self, state: dict) -> None:            # a copy listens to its own optimizers
        self.__dict__.update(state)
        self._handles = []
        if not self._closed:
            self._listen()


def keeps_tangent(optimizer: Optimizer | None) -> bool:
    """Does the optimizer keep a tangent momentum of its pairs (`PairOptimizer.tangent`)?"""
    return getattr(getattr(optimizer, "rule", None), "keeps_tangent", False)


def at_rest(estimate: Estimate, layer: LowRankLinear) -> float | tuple[float, ...]:
    """What stands for the estimate of a layer whose rank cannot change."""
    return (0.0,) * layer.rank if estimate.gives == "spectrum" else float(layer.rank)


def adopt(optimizers: Sequence[Optimizer], known: dict[str, tuple[nn.Parameter, nn.Parameter]],
          layers: dict[str, LowRankLinear]) -> None:
    """Optimizers that hold the factors `known`, (U, V) by layer, get those that the layers have now: see `_adopt`."""
    for name, pair in known.items():
        for old, new in zip(pair, (layers[name].U, layers[name].V)):
            follow(optimizers, old, new)


def follow(optimizers: Sequence[Optimizer], old: nn.Parameter, new: nn.Parameter) -> None:
    """Every optimizer that holds `old` gets `new` in its place, with its state where that fits."""
    while old is not new and old is not None:
        Plan(tuple(Move(*place, old, new, fitting(place[0].state.get(old, {}), new))
                   for place in places_of(optimizers, old) if holder([place[0]], new) is None)).apply()
        old = getattr(old, "stands_now", None)              # loaded more than once: some may hold what came between


def bare(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside the wrappers of accelerate and Lightning."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def listed(optimizers: Any) -> Iterator[Optimizer]:
    """The optimizers of a list.  TypeError for anything else."""
    try:
        found = list(optimizers)
    except TypeError:
        found = [optimizers]
    for one in found:
        if not isinstance(one, Optimizer):
            raise TypeError(f"RankAdapter: optimizer is {optimizers!r}; wanted a torch Optimizer, or a list of them.")
    return iter(found)
