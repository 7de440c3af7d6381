"""The versions of Adaptive Low-Rank Training, each a value: what differs between two of them is the text between the
parentheses.  Constants: scripts v1 to v10; "ours" where said.  Steps are the script's own (`epoch` of them in one of
its epochs); `paced` moves a recipe to another clock.

    import alr
    model = alr.recipes.alr.prepare(model)
    adapter = alr.RankAdapter(model, optimizer, alr.recipes.alr)
"""

from __future__ import annotations

from dataclasses import fields, replace
from importlib import import_module
from typing import NamedTuple

from .adapt import Recipe
from .backward import FormsW, OwnBackward
from .budget import Budget
from .control import Bidirectional, ByLayer, each
from .control_history import Jump, LossAware, Ramp, Step, Velocity
from .estimate import SpectralShare, StableRank, StableRankPower
from .estimate_gradient import GradientNorm, LargestGroup, NumberOfGroups
from .factor import SvdCore, SvdFull
from .fisher import FisherCut, FisherSpectrum
from .grouping import Grouping
from .init import Gaussian, Normal, Spectral
from .randomized import SvdRandom
from .state import Reset, Stale, Transport

dense = Recipe("dense", rank=None)
uniform = Recipe("uniform", rank=32, init=Spectral(), cap="min")

# v1 to v6: an MLP of two hidden layers on Fashion-MNIST, 60,000 pictures in batches of 128: 469 steps per epoch
v1 = Recipe("v1", rank=None, gradient=Grouping(mode="grouped", threshold=0.9, order="random", every=1), epoch=469)
v2 = replace(v1, name="v2", gradient=Grouping(mode="grouped", threshold=0.9, order="norm", every=10,
                                              stages=((0.3, 0.75), (0.7, 0.9))))
v3 = Recipe("v3", rank=64, init=Normal(std=0.02), estimate=LargestGroup(threshold=0.9), control=Jump(min_rank=16),
            resize=SvdFull(eps=0.0), state=Stale(), every=469, offset=1, epoch=469, cap="min",
            where=("fc2", "blocks.*"))                              # in a GPT: all of its blocks (ours), here and below
v4 = replace(v3, name="v4", resize=SvdRandom(oversample=8, power=1))
v5 = replace(v3, name="v5", control=Jump(min_rank=8), where=("fc1", "fc2", "blocks.*"))
v5_1 = replace(v5, name="v5.1", warmup=469,
               estimate=ByLayer((("fc1", LargestGroup(threshold=0.92)), ("*", LargestGroup(threshold=0.9)))),
               control=ByLayer((("fc1", Ramp(a=0.85, ramp=0.4, warmup=5 * 469)), ("*", Ramp(a=0.8, ramp=0.5)))))
v6 = replace(v5_1, name="v6", op=OwnBackward())

# v7: a transformer on 600 characters; 200 steps per epoch, but one in v7.2 and v7.3.  Initial ranks of v5 to v7.5 and
# inits of v7.4, v7.5 are not recorded: as before
v7 = Recipe("v7", rank=None, epoch=200)
v7_1 = replace(v6, name="v7.1", estimate=LargestGroup(threshold=0.9), control=Ramp(a=0.8, ramp=0.5),
               every=200, warmup=3 * 200, epoch=200)
v7_2 = replace(v7_1, name="v7.2", estimate=GradientNorm(), control=Velocity(rate=0.05),
               resize=SvdFull(eps=0.0, split="left"), op=None, every=2, offset=0, warmup=0, epoch=1)
v7_3 = replace(v7_2, name="v7.3", op=FormsW())
v7_4 = replace(v7_2, name="v7.4", estimate=NumberOfGroups(threshold=0.85), control=Velocity(rate=0.2),
               resize=SvdFull(eps=0.0), state=Reset(everything=True), every=200, epoch=200)
v7_5 = replace(v7_4, name="v7.5", estimate=SpectralShare(share=0.9, power=1), every=3 * 200, warmup=4 * 200)

# v8's steps per epoch are not recorded: as v9's.  Its init neither: its log has an energy of 63 to 74 per layer at its
# first update, at rank 64; Gaussian() gives 64, Normal(0.02) in these layers 0.2 to 0.7
v8 = replace(v7_5, name="v8", init=Gaussian(), estimate=SpectralShare(share=0.95), control=Step(max_step=4),
             every=3 * 50, warmup=4 * 50, epoch=50)
# v9 decides after the epoch's validation, from the fourth on (its log): on the first step that knows the loss
v9 = replace(v8, name="v9", estimate=SpectralShare(share=0.98), control=LossAware(), state=Stale(),
             every=2 * 50, offset=1, warmup=3 * 50)

v10 = Recipe("v10", rank=64, init=Gaussian(), estimate=StableRankPower(iters=5), control=Bidirectional(),
             resize=SvdFull(eps=1e-8), state=Reset(everything=True), every=200, epoch=200, cap="min")

# v10 with every flaw below undone, and nothing new
repaired = Recipe("repaired", rank=64, init=Spectral(), estimate=StableRank(), control=Bidirectional(),
                  resize=SvdCore(), state=Transport(), every=200, epoch=200, cap="break-even")

# ours: start wide, shrink to a sixth of the dense size over four fifths of training, worth and cut in the metric of the
# loss; made for optimizer="pairs".  Before: estimate=Spectrum(), control=Budget(), resize=SvdCore()
alr = Recipe("alr", rank=64, init=Spectral(), estimate=FisherSpectrum(),
             control=Budget(share=1 / 6, end=0.8, per_parameter=True), resize=FisherCut(), state=Transport(),
             every=50, epoch=200, cap="break-even")

ALL = {r.name: r for r in (dense, uniform, v1, v2, v3, v4, v5, v5_1, v6, v7, v7_1, v7_2, v7_3, v7_4, v7_5, v8, v9, v10,
                           repaired, alr)}

ABOUT = {
    "dense": "plain layers, nothing adapted",
    "uniform": "every layer at one rank, held",
    "v1": "rows of a gradient that agree are averaged, every step",
    "v2": "the same, strongest rows leading, every tenth step",
    "v3": "first adaptive rank: the size of the largest group of agreeing rows",
    "v4": "v3 with a randomised SVD",
    "v5": "v3 on several layers",
    "v5.1": "a warm-up, and smoothed moves",
    "v6": "v5.1 with a backward pass of its own",
    "v7": "a dense transformer, to compare with",
    "v7.1": "v6 in every projection of a transformer",
    "v7.2": "rank from the gradient's norm, with velocity",
    "v7.3": "v7.2 with a forward that forms W",
    "v7.4": "the signal turned round: the number of groups",
    "v7.5": "ranks that hold 90 % of the nuclear norm",
    "v8": "ranks that hold 95 % of the energy, four at a time",
    "v9": "98 % of the energy, and growth while the loss gets worse",
    "v10": "1.5 times the stable rank, smoothed, with a dead band",
    "repaired": "v10 repaired: exact estimate, QR-core resize, moments carried over, no rank above break-even",
    "alr": "starts wide and shrinks to a budget that all layers share by what the loss would lose",
}


class Flaw(NamedTuple):
    """Something an old script does that it did not mean to do, and the change of the recipe that undoes it."""

    name: str
    says: str
    of: tuple[str, ...]                 # the versions that have it
    change: str                         # what `replace` is given; {} stands for the version

    def repair(self, version: str) -> str:
        """The repaired recipe, as text for `parse`."""
        own = version.replace(".", "_")
        return f"replace({own}, {self.change.replace('{}', own)})"


CLUSTERED = ("v3", "v4", "v5", "v5.1", "v6", "v7.1")
ADAPTIVE = CLUSTERED + ("v7.2", "v7.3", "v7.4", "v7.5", "v8", "v9", "v10")

FLAWS = {flaw.name: flaw for flaw in (
    Flaw("stale", "the optimizer goes on holding the old factors: a resized layer is never trained again",
         CLUSTERED + ("v7.2", "v7.3", "v9"), "state=Transport()"),
    Flaw("inverted signal", "rows that agree need one direction and are given as many as there are rows",
         CLUSTERED, "estimate=NumberOfGroups(threshold=0.9)"),
    Flaw("first batch", "the first decision sees one batch and untrained weights", ("v3", "v4", "v5"), "offset=0"),
    Flaw("no memory", "the moving average starts anew from the rank each time, so small gaps wait for ever",
         ("v5.1", "v6", "v7.1"), "control=each({}.control, remember=True)"),
    Flaw("loss scale", "the gradient's norm, and so the rank, follows the scale of the loss",
         ("v7.2", "v7.3"), "estimate=StableRank()"),
    Flaw("truncation", "int() grants every wish to shrink and few to grow",
         ("v7.2", "v7.3", "v7.4", "v7.5"), "control=each({}.control, truncate=False)"),
    Flaw("one-sided split", "all singular values go to U: the factors see gradients of unlike size",
         ("v7.2", "v7.3"), "resize=SvdFull(eps=0.0)"),
    Flaw("formed W", "forward forms W, so low rank saves no work", ("v7.3",), "op=OwnBackward()"),
    Flaw("reset", "a resize drops the optimizer's memory of every parameter",
         ("v7.4", "v7.5", "v8", "v10"), "state=Transport()"),
    Flaw("rounded growth", "a loss that gets worse asks for four ranks, and half of a tenth of four rounds to none",
         ("v9",), "control=each({}.control, ema=0.0)"),
    Flaw("power iteration", "five cold iterations miss the largest singular value: the stable rank comes out too high",
         ("v10",), "estimate=StableRank()"),
    Flaw("dead growth", "new directions are null vectors of the SVD, near zero in both factors",
         ADAPTIVE, "resize=SvdCore()"),
    Flaw("dearer than dense", "ranks up to min(m, n), where the factors hold more numbers than W",
         ADAPTIVE, 'cap="break-even"'),
)}


def get(name: str) -> Recipe:
    """The recipe of that name.  ValueError with the list of names otherwise."""
    if name not in ALL:
        raise ValueError(f"recipe {name!r} is not known; there are {', '.join(ALL)}.")
    return ALL[name]


def difference(a: Recipe, b: Recipe) -> dict[str, tuple[str, str]]:
    """The fields in which two recipes differ, name aside: {field: (a's repr, b's repr)}."""
    pairs = {f.name: (repr(getattr(a, f.name)), repr(getattr(b, f.name))) for f in fields(Recipe) if f.name != "name"}
    return {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}


def table() -> list[dict[str, str]]:
    """One row of text per recipe, read off the recipes; an axis that a recipe does not use is empty."""
    def row(r):
        axes = {a: getattr(r, a) for a in ("estimate", "control", "resize", "state", "gradient", "op")}
        if r.estimate is None:                                      # no rank ever moves
            axes |= dict.fromkeys(("control", "resize", "state"))
        clock = f"{r.every / r.epoch:g} epoch" + ("s" if r.every > r.epoch else "") if r.estimate else ""
        return {"name": r.name, **{a: "" if v is None else repr(v) for a, v in axes.items()},
                "every": clock, "about": ABOUT[r.name]}
    return [row(r) for r in ALL.values()]


MODULES = ("adapt", "backward", "budget", "control", "control_history", "estimate", "estimate_gradient", "factor",
           "fisher", "grouping", "init", "randomized", "state", "watch")      # whose values a recipe may hold


def parse(text: str) -> Recipe:
    """The recipe that an expression describes: a name, a log's repr, or a change such as
    `replace(v10, state=Transport())`.  repr(parse(repr(recipe))) == repr(recipe).

    ValueError, with what is known, for anything else.  No builtins are in reach.
    """
    modules = [import_module(f".{name}", __package__) for name in MODULES]
    names = {k: v for module in modules for k, v in vars(module).items() if isinstance(v, type)}
    names |= {name.replace(".", "_"): recipe for name, recipe in ALL.items()} | {"replace": replace, "each": each}
    if text in ALL:
        return ALL[text]
    try:
        value = eval(text, {"__builtins__": {}}, names)             # noqa: S307
    except Exception as error:
        raise ValueError(f"recipe {text!r} cannot be read ({error}); write a name ({', '.join(ALL)}) "
                         "or a change of one, such as replace(v10, state=Transport()).") from None
    if not isinstance(value, Recipe):
        raise ValueError(f"recipe {text!r} is {type(value).__name__}, not a Recipe.")
    return value
