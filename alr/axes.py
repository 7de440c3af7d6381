"""The contracts: what may stand on each axis of a recipe, what it is given, and what it may ask for.  Written once, here.

A value on an axis is a frozen dataclass derived from one of the classes below.  It checks the types and ranges that its
fields declare, its repr reads back (`recipes.parse`), and whatever it does not define has a default here, so that nobody
has to ask whether it is there.

    @dataclass(frozen=True)
    class HalfRank(Estimate):
        share: Share = 0.5
        def __call__(self, layer, seen):
            return self.share * layer.rank

Dims: m out_features, n in_features, r rank now, k rank wanted.  U (m, r), V (r, n), W = U V (m, n).
No torch in this file.
"""

from __future__ import annotations

import math
import numbers
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from .observe import Seen
    from .state import Plan, Swap


# ------------------------------------------------------------------------------------------------ types of settings

@dataclass(frozen=True)
class Between:
    """The range of a number: low <= x <= high, or low < x where `above`."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def __contains__(self, x) -> bool:
        return (self.low < x if self.above else self.low <= x) and x <= self.high

    def __str__(self) -> str:
        if self.high < math.inf:
            return f"between {self.low:g} and {self.high:g}" + (f", {self.low:g} left out" if self.above else "")
        return f"above {self.low:g}" if self.above else f"of at least {self.low:g}"


Count = Annotated[int, Between(1)]
Whole = Annotated[int, Between(0)]
Share = Annotated[float, Between(0, 1)]
Part = Annotated[float, Between(0, 1, above=True)]
Positive = Annotated[float, Between(0, above=True)]
NonNegative = Annotated[float, Between(0)]


def fits(x: Any, hint: Any) -> bool:
    """Is x a value of this type?  A bool is no number, an int is a float, a float must be finite."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Annotated:
        return fits(x, args[0]) and all(x in bound for bound in args[1:])
    if origin in (Union, types.UnionType):
        return any(fits(x, one) for one in args)
    if origin is Literal:
        return any(type(x) is type(one) and x == one for one in args)
    if origin is tuple:
        if not isinstance(x, tuple):
            return False
        if args[-1] is Ellipsis:
            return all(fits(one, args[0]) for one in x)
        return len(x) == len(args) and all(fits(one, arg) for one, arg in zip(x, args))
    if origin is dict:
        return isinstance(x, dict) and all(fits(k, args[0]) and fits(v, args[1]) for k, v in x.items())
    if hint in (None, type(None)):
        return x is None
    if hint is bool:
        return isinstance(x, bool)
    if hint is int:
        return isinstance(x, numbers.Integral) and not isinstance(x, bool)
    if hint is float:
        try:
            return isinstance(x, numbers.Real) and not isinstance(x, bool) and math.isfinite(x)
        except OverflowError:                           # a whole number that no float can hold
            return False
    if hint is Callable or origin is not None:
        return callable(x)
    return isinstance(x, hint)


def spoken(hint: Any) -> str:
    """The type in words, for an error."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{spoken(args[0])} {args[1]}"
    if origin in (Union, types.UnionType):
        return " or ".join(spoken(one) for one in args)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin is tuple:
        return "a tuple of " + (spoken(args[0]) if args[-1] is Ellipsis else f"({', '.join(map(spoken, args))})")
    if origin is dict:
        return f"a dict of {spoken(args[0])} to {spoken(args[1])}"
    names = {int: "a whole number", float: "a finite number", str: "a text", bool: "True or False", type(None): "None",
             None: "None", dict: "a dict"}
    return names.get(hint) or ("a function" if hint is Callable else f"a value of {getattr(hint, '__name__', hint)}")


@cache
def hints(kind: type) -> dict[str, Any]:
    """The declared type of every field of a dataclass."""
    found = get_type_hints(kind, include_extras=True)
    return {f.name: found[f.name] for f in fields(kind)}


def plain(x: Any) -> Any:
    """x with Python's numbers and texts in place of others, numpy's say, in its tuples, lists and dicts too."""
    if type(x) in (tuple, list):
        return type(x)(map(plain, x))
    if type(x) is dict:
        return {plain(key): plain(one) for key, one in x.items()}
    if isinstance(x, str):
        return str.__str__(x)
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        return x
    return int(x) if isinstance(x, numbers.Integral) else float(x)


def check(value: Any) -> None:
    """ValueError, naming the field, unless every field of a dataclass holds what it declares.

    Numbers and texts of other kinds (numpy's) become Python's own, so that the repr reads back.
    """
    for name, hint in hints(type(value)).items():
        x = getattr(value, name)
        if not fits(x, hint):
            came = repr(x) if len(repr(x)) < 80 else repr(x)[:77] + "..."
            raise ValueError(f"{type(value).__name__}: {name} is {came}; wanted {spoken(hint)}.")
        if hint is not dict:                            # of which nothing is declared: its owner's alone
            object.__setattr__(value, name, plain(x))


# ------------------------------------------------------------------------------------------------ values on axes

VALUES: dict[str, type] = {}            # every kind of value by name: the vocabulary of `recipes.parse`


class Axis:
    """What all axes share."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.__module__ != __name__:
            VALUES[cls.__name__] = cls

    def __post_init__(self):
        check(self)

    def paced(self, factor: float) -> Axis:
        """The same value on a clock with `factor` times as many steps per epoch; what waits for a step of the run is scaled.

        How many steps are looked at (`Observing.steps`) stays, and so does a `control.Schedule`.
        """
        return self

    def for_layer(self, name: str) -> Axis:
        """The value as the layer of that name has it: itself, unless layers differ (`ByLayer`)."""
        return self


class Init(Axis):
    """Where do the factors start?"""

    def __call__(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """A dense weight (m, n) becomes U (m, rank), V (rank, n), in its dtype and on its device."""
        raise NotImplementedError


class Op(Axis):
    """What does a layer's forward compute, and how does it go back?"""

    def __call__(self, x: Tensor, U: Tensor, V: Tensor, bias: Tensor | None) -> Tensor:
        """(..., n) -> (..., m)."""
        raise NotImplementedError


class Observing(Axis):
    """An axis that may want to see how the model trains before it is asked.

    needs: what to keep of each layer, names of fields of `observe.Seen`: "input_moment", "grad_moment", "importance",
    "weight_gradient".  steps: over how many optimizer steps before a decision.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    steps: ClassVar[int] = 1


class Estimate(Observing):
    """How much rank does a layer use, or what is each of its directions worth?"""

    gives: ClassVar[str] = "number"     # "number": one float; "spectrum": one importance per direction, falling
    gradients: ClassVar[bool] = False   # does it read the factors' .grad, as the last backward has left it?

    def __call__(self, layer: nn.Module, seen: Seen | None) -> float | tuple[float, ...]:
        """The answer for one layer; `seen` holds what was observed, None when nothing was asked for."""
        raise NotImplementedError


class Signal(NamedTuple):
    """What a controller may look at beside its targets; sequences are in the order of the layers."""

    caps: Sequence[int]                 # the largest rank of each layer: min(m, n), or break-even
    step: int = 0                       # optimizer steps so far
    losses: Sequence[float] = ()        # validation losses so far, oldest first
    progress: float | None = None       # step / total steps, where the total is known
    names: Sequence[str] = ()           # of the layers, for `ByLayer`
    shapes: Sequence[tuple[int, int]] = ()          # (m, n) of the layers, for what a direction costs
    held: Sequence[bool] = ()           # layers whose rank cannot change now (frozen, or not observed); () for none
    unseen: Sequence[bool] = ()         # those of the held that were trained, but not in the window: nobody pays for them


class Control(Axis):
    """Which ranks next?  All layers at once, in plain numbers."""

    needs_total_steps: ClassVar[bool] = False       # does it plan over the whole run?
    wants: ClassVar[str | None] = "number"          # which targets it reads: an estimate's `gives`; None: any

    def first_rank(self, rank: int) -> int:
        """The rank that a layer is made with where the recipe says `rank`: more, if no layer may start that low."""
        return rank

    def init(self, ranks: Sequence[int]) -> Any:
        """What it remembers at the start: plain numbers, so that it goes into a checkpoint."""
        return []

    def step(self, ranks: Sequence[int], targets: Sequence, memory: Any, signal: Signal) -> tuple[list[int], Any]:
        """(the ranks wanted next, what to remember)."""
        raise NotImplementedError

    def parts(self, names: Sequence[str]) -> list[tuple[Control, list[int]]]:
        """Who answers for which layers, by their place in `names`: itself for all of them, unless layers differ (`ByLayer`)."""
        return [(self, list(range(len(names))))]

    def again(self, memory: Any, signal: Signal) -> Sequence[bool]:
        """Which layers are to be factorised anew although their rank stays, after a step; () for none."""
        return ()

    def finished(self, ranks: Sequence[int], memory: Any, signal: Signal) -> bool:
        """Can no rank move any more, whatever is estimated?  Then nothing is observed or estimated."""
        return False

    def warning(self, ranks: Sequence[int], shapes: Sequence[tuple[int, int]]) -> str:
        """What is wrong with starting from these ranks, and what to do; "" when nothing is."""
        return ""


class Factors(NamedTuple):
    """New factors U' (m, k), V' (k, n).

    mix: where the new directions are combinations of the old ones, U' = U A and V' = B V, the matrices A (r, k) and
    B (k, r), float64 on the CPU; with them the error and the moments' new basis cost nothing more.  None elsewhere.
    """

    U: Tensor
    V: Tensor
    mix: tuple[Tensor, Tensor] | None = None


class Momentum(NamedTuple):
    """An optimizer's momentum of W as a tangent vector, M = X F_V + F_U Y, as `tangent.Tangent` keeps it.

    F_U and F_V, the frames, span the columns and rows of W as it was when the momentum was last seen.
    """

    X: Tensor                           # (m, r)
    F_U: Tensor                         # (m, r)
    Y: Tensor                           # (r, n)
    F_V: Tensor                         # (r, n)
    lr: float                           # the spectral norm of the next step of W


class ResizeRule(Observing):
    """How does a layer change to another rank?"""

    momentum: ClassVar[bool] = False    # does it read the optimizer's tangent momentum, as `Seen.momentum`?

    def __call__(self, U: Tensor, V: Tensor, k: int, seen: Seen | None = None) -> Factors | tuple[Tensor, Tensor]:
        """U (m, r), V (r, n) -> U' (m, k), V' (k, n).  Changes nothing in place."""
        raise NotImplementedError


class StatePolicy(Axis):
    """What does the optimizer remember of a layer whose rank has changed?"""

    tells: ClassVar[bool] = True        # does the optimizer learn of the new Parameters at all?
    zero: ClassVar[bool] = False        # where it does not: are their gradients cleared all the same, step by step?
    always: ClassVar[bool] = False      # is it asked at every decision, also where no rank changes?

    def check(self, optimizers: Sequence[Optimizer]) -> None:
        """TypeError for an optimizer whose state it does not understand."""

    def plan(self, optimizers: Sequence[Optimizer], swaps: Sequence[Swap]) -> Plan:
        """The new state of every changed factor, computed and not yet written: what can fail, fails here."""
        raise NotImplementedError


class GradientRule(Axis):
    """What happens to gradients before the optimizer sees them?"""

    def attach(self, adapter) -> Sequence:
        """Hook into the adapter's optimizers; returns the handles, whose remove() the adapter calls when it is closed.

        Called when the adapter is made, and once more for each copy of it.
        """
        raise NotImplementedError


def each(value: Any, **changes) -> Any:
    """The value with these fields replaced; in a `ByLayer`, those of every value."""
    rules = getattr(value, "rules", None)
    if isinstance(rules, tuple):
        return replace(value, rules=tuple((pattern, each(v, **changes)) for pattern, v in rules))
    return replace(value, **changes)
