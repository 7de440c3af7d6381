"""Values on the axes from text, by walking its syntax tree: nothing in the text is ever run.

What can be written: numbers, texts, True, False, None, tuples, lists, dicts, a minus, one number divided by another; names
of recipes; calls of the values in `axes.VALUES`, of Recipe, and of replace and each; a field of a value (`v10.control`).
"""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from .. import sensitivity, truncation  # noqa: F401  # their values are part of the vocabulary, as those of the history below
from ..adapt import Recipe
from ..axes import VALUES, each
from ..history import control, estimate, grouping, op, resize  # noqa: F401  # their values are part of the vocabulary

LONGEST = 20_000                        # characters of a text; the longest recipe of the records has 3,000
DEEPEST = 40                            # brackets within brackets


def read(text: str, names: Mapping[str, Any]) -> Any:
    """The value that the text describes; `names` are those that it may use for values that are there already.

    ValueError, saying what cannot be read, for all else: what is unknown, too long or too deep, or refused by the value
    that is being made.
    """
    if len(text) > LONGEST:
        raise ValueError(f"it has {len(text)} characters; at most {LONGEST} are read.")
    if _depth(text) > DEEPEST:
        raise ValueError(f"brackets stand {_depth(text)} deep; at most {DEEPEST} are read.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                         # "invalid decimal literal" and the like
            tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"it is no expression ({getattr(error, 'msg', None) or error}).") from None
    try:
        return _value(tree.body, names)
    except RecursionError:
        raise ValueError("it is too deep.") from None


def _depth(text: str) -> int:
    deep = most = 0
    for c in text:
        deep += (c in "([{") - (c in ")]}")
        most = max(most, deep)
    return most


def _value(node: ast.AST, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None):
            if isinstance(node.value, float) and not math.isfinite(node.value):
                raise ValueError("a number in it is not finite.")
            return node.value
        case ast.Tuple(elts=parts):
            return tuple(_value(part, names) for part in parts)
        case ast.List(elts=parts):
            return [_value(part, names) for part in parts]
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {_plain(_value(key, names)): _value(value, names) for key, value in zip(keys, values)}
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            number = _number(operand, names)
            return -number if isinstance(node.op, ast.USub) else number
        case ast.BinOp(op=ast.Div(), left=left, right=right):
            above, below = _number(left, names), _number(right, names)
            try:
                return above / below
            except (ArithmeticError, ValueError):
                raise ValueError(f"{above!r} / {below!r} is no number.") from None
        case ast.Name(id=name):
            if name in names:
                return names[name]
            raise ValueError(f"{name!r} is not known; there are {', '.join(names)}.")
        case ast.Attribute(value=owner, attr=name):
            value = _value(owner, names)
            if is_dataclass(value) and name in {f.name for f in fields(value)}:
                return getattr(value, name)
            raise ValueError(f"{type(value).__name__} has no field {name!r}.")
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            if any(isinstance(arg, ast.Starred) for arg in args) or any(word.arg is None for word in keywords):
                raise ValueError(f"{name}(...) is given * or **, which is not read.")
            return _made(name, [_value(arg, names) for arg in args], {w.arg: _value(w.value, names) for w in keywords})
    raise ValueError(f"{ast.unparse(node)[:60]!r} ({type(node).__name__}) is not read.")


def _plain(key: Any) -> Any:
    if not isinstance(key, (str, int, float)):
        raise ValueError(f"{key!r} is no key of a dict.")
    return key


def _number(node: ast.AST, names: Mapping[str, Any]) -> int | float:
    value = _value(node, names)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is no number.")
    return value


def _made(name: str, args: list, words: dict) -> Any:
    known = {word: kind for word, kind in VALUES.items() if is_dataclass(kind)}    # no base classes
    known |= {"Recipe": Recipe, "replace": _replaced, "each": _each}
    if name not in known:
        raise ValueError(f"{name}(...) is not known; there are {', '.join(sorted(known))}.")
    try:
        return known[name](*args, **words)
    except TypeError as error:
        raise ValueError(f"{name}(...) cannot be made: {str(error).replace('__init__() ', '')}.") from None


def _replaced(value: Any, **changes) -> Any:
    if not is_dataclass(value):
        raise ValueError(f"replace is given {value!r}, which has no fields.")
    return replace(value, **changes)


def _each(value: Any, **changes) -> Any:
    if not is_dataclass(value):
        raise ValueError(f"each is given {value!r}, which has no fields.")
    return each(value, **changes)
