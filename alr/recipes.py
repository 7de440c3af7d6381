"""The versions of Adaptive Low-Rank Training, each a value: what differs between two of them is the text between the
parentheses.  Constants: scripts v1 to v10; "ours" where said.

    import alr
    model = alr.recipes.alr.prepare(model)
    adapter = alr.RankAdapter(model, optimizer, alr.recipes.alr)
"""

from __future__ import annotations

from dataclasses import replace

from .adapt import Recipe
from .control import Bidirectional, Hold
from .estimate import StableRank, StableRankPower
from .factor import SvdCore, SvdFull
from .init import Gaussian, Spectral
from .state import Reset, Transport

dense = Recipe("dense", rank=None)
uniform = Recipe("uniform", rank=32, init=Spectral(), cap="min")

v10 = Recipe("v10", rank=64, init=Gaussian(), estimate=StableRankPower(iters=5), control=Bidirectional(),
             resize=SvdFull(eps=1e-8), state=Reset(everything=True), every=200, epoch=200, cap="min")

alr = Recipe("alr", rank=64, init=Spectral(), estimate=StableRank(), control=Bidirectional(),
             resize=SvdCore(), state=Transport(), every=200, epoch=200, cap="break-even")

ALL = {r.name: r for r in (dense, uniform, v10, alr)}


def get(name: str) -> Recipe:
    """The recipe of that name.  ValueError with the list of names otherwise."""
    if name not in ALL:
        raise ValueError(f"recipe {name!r} is not known; there are {', '.join(ALL)}.")
    return ALL[name]


def parse(text: str) -> Recipe:
    """The recipe that an expression describes: a name, a log's repr, or a change such as
    `replace(v10, state=Transport())`.  repr(parse(repr(recipe))) == repr(recipe).

    ValueError, with what is known, for anything else.  No builtins are in reach.
    """
    from . import adapt, control, estimate, factor, init, state
    names = {k: v for module in (adapt, control, estimate, factor, init, state)
             for k, v in vars(module).items() if isinstance(v, type)}
    versions = {name.replace(".", "_"): recipe for name, recipe in ALL.items()}
    if text in ALL:
        return ALL[text]
    try:
        value = eval(text, {"__builtins__": {}}, names | versions | {"replace": replace})      # noqa: S307
    except Exception as error:
        raise ValueError(f"recipe {text!r} cannot be read ({error}); write a name ({', '.join(ALL)}) "
                         "or a change of one, such as replace(v10, state=Transport()).") from None
    if not isinstance(value, Recipe):
        raise ValueError(f"recipe {text!r} is {type(value).__name__}, not a Recipe.")
    return value
