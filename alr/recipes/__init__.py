"""Recipes by name, and the reading of recipes written down.

    import alr
    model = alr.recipes.alr.prepare(model)
    adapter = alr.RankAdapter(model, optimizer, alr.recipes.alr, total_steps=10_000)
"""

from __future__ import annotations

from dataclasses import fields

from ..adapt import Recipe
from . import ours, versions
from .flaws import FLAWS, Flaw
from .ours import alr, dense, repaired, uniform
from .read import read
from .versions import v1, v2, v3, v4, v5, v5_1, v6, v7, v7_1, v7_2, v7_3, v7_4, v7_5, v8, v9, v10

__all__ = ["ALL", "FLAWS", "Flaw", "alr", "dense", "difference", "get", "parse", "repaired", "table", "uniform",
           "v1", "v10", "v2", "v3", "v4", "v5", "v5_1", "v6", "v7", "v7_1", "v7_2", "v7_3", "v7_4", "v7_5", "v8", "v9"]

# every Recipe that stands in one of the two modules, baselines first and ours last
_order = [*dict.fromkeys([ours.dense, ours.uniform, *(r for r in vars(versions).values() if isinstance(r, Recipe)),
                          *(r for r in vars(ours).values() if isinstance(r, Recipe))])]
ALL = {recipe.name: recipe for recipe in _order}


def get(name: str) -> Recipe:
    """The recipe of that name.  ValueError with the list of names otherwise."""
    if name not in ALL:
        raise ValueError(f"recipe {name!r} is not known; there are {', '.join(ALL)}.")
    return ALL[name]


def difference(a: Recipe, b: Recipe) -> dict[str, tuple[str, str]]:
    """The fields in which two recipes differ, name and about aside: {field: (a's repr, b's repr)}."""
    pairs = {f.name: (repr(getattr(a, f.name)), repr(getattr(b, f.name))) for f in fields(Recipe)
             if f.name not in ("name", "about")}
    return {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}


def table() -> list[dict[str, str]]:
    """One row of text per recipe, read off the recipes; an axis that a recipe does not use is empty."""
    def row(r):
        axes = {a: getattr(r, a) for a in ("estimate", "control", "resize", "state", "gradient", "op")}
        if r.estimate is None:                                      # no rank ever moves
            axes |= dict.fromkeys(("control", "resize", "state"))
        clock = f"{r.every / r.epoch:g} epoch" + ("s" if r.every > r.epoch else "") if r.estimate else ""
        return {"name": r.name, **{a: "" if v is None else repr(v) for a, v in axes.items()},
                "every": clock, "about": r.about}
    return [row(r) for r in ALL.values()]


def parse(text: str) -> Recipe:
    """The recipe that a text describes: a name, a log's repr, or a change such as `replace(v10, state=Transport())`.

    repr(parse(repr(recipe))) == repr(recipe).  The text is read by its syntax tree and never evaluated (`read`), so that it
    may come from a file.  ValueError, with what is known, for anything else.
    """
    if not isinstance(text, str):
        raise ValueError(f"recipe {text!r} is {type(text).__name__}, not a text; write a name ({', '.join(ALL)}).")
    if text in ALL:
        return ALL[text]
    shown = repr(text if len(text) < 200 else text[:197] + "...")
    try:
        value = read(text, {name.replace(".", "_"): recipe for name, recipe in ALL.items()})
    except ValueError as error:
        raise ValueError(f"recipe {shown} cannot be read: {error} Write a name ({', '.join(ALL)}) or a change of one, such "
                         "as replace(v10, state=Transport()).") from None
    if not isinstance(value, Recipe):
        raise ValueError(f"recipe {shown} is a {type(value).__name__}, not a Recipe.")
    return value
