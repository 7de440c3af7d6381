"""Which ranks next?  Plain numbers: no torch in this file.

A controller is a frozen value with two methods over all layers at once,

    memory = control.init(ranks)                                   # plain numbers, so it goes into a checkpoint
    ranks, memory = control.step(ranks, targets, memory, signal)

`ranks` and `targets` are sequences in the order of the layers; `signal` carries what else is known.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, Sequence


class Signal(NamedTuple):
    """What a controller may look at beside its targets."""

    caps: Sequence[int]                 # the largest rank of each layer: min(m, n), or break-even
    step: int = 0                       # optimizer steps so far
    losses: Sequence[float] = ()        # validation losses so far, oldest first
    progress: float | None = None       # step / total steps, where the total is known
    names: Sequence[str] = ()           # of the layers, for `ByLayer`
    shapes: Sequence[tuple[int, int]] = ()          # (m, n) of the layers, for what a direction costs


def clamp(x, low, high):
    """x in [low, high]; high wins when they cross (a layer smaller than min_rank)."""
    return min(max(x, low), high)


@dataclass(frozen=True)
class Hold:
    """Never moves: dense and uniform-rank baselines."""

    def init(self, ranks):
        return []

    def step(self, ranks, targets, memory, signal):
        return list(ranks), memory


@dataclass(frozen=True)
class Schedule:
    """The same ranks at the same steps whatever is estimated, so that two runs differ in something else alone.

    path: (step, rank) pairs, steps rising; every layer has the rank of the last step that has come, its cap permitting.
    A rank is one number for all layers, or {layer: rank}, in which a layer that is left out stays as it is.
    """

    path: tuple[tuple[int, int | dict], ...]

    def init(self, ranks):
        return []

    def step(self, ranks, targets, memory, signal):
        due = [rank for step, rank in self.path if step <= signal.step]
        if not due:
            return list(ranks), memory
        wanted = [due[-1].get(name, r) for name, r in zip(signal.names, ranks, strict=True)] \
            if isinstance(due[-1], dict) else [due[-1]] * len(ranks)
        return [min(k, cap) for k, cap in zip(wanted, signal.caps, strict=True)], memory


@dataclass(frozen=True)
class Bidirectional:
    """Script v10: a safety factor, an exponential moving average, a dead band, a step limit; each layer on its own.

    target = safety * estimate, clamped to [min_rank, cap];  e = ema * e + (1 - ema) * target, starting at the rank;
    no move while |e - r| < threshold, else r += round(e - r), at most max_step either way.  A target equal to the rank
    is a fixed point.  (`round` is Python's, to even at halves, as in the script.)
    """

    safety: float = 1.5                 # all five: script v10
    ema: float = 0.8
    threshold: float = 2.0
    max_step: int = 4
    min_rank: int = 8

    def init(self, ranks):
        return [float(r) for r in ranks]

    def step(self, ranks, targets, memory, signal):
        new, smooth = [], []
        for r, target, e, cap in zip(ranks, targets, memory, signal.caps, strict=True):
            wanted = clamp(self.safety * target, self.min_rank, cap)
            e = self.ema * e + (1 - self.ema) * wanted
            if abs(e - r) >= self.threshold:
                r = clamp(r + clamp(round(e - r), -self.max_step, self.max_step), self.min_rank, cap)
            new.append(r)
            smooth.append(e)
        return new, smooth


@dataclass(frozen=True)
class ByLayer:
    """Other numbers for other layers (script v5.1): the first rule (shell pattern, value) that fits a layer's name.

    On a recipe's `estimate` axis the values are estimates, on its `control` axis controllers.
    """

    rules: tuple[tuple[str, Any], ...]

    def of(self, name: str) -> Any:
        """The value for the layer of that name.  ValueError when no rule fits."""
        return self.rules[self._rule(name)][1]

    def paced(self, factor: float) -> "ByLayer":
        return ByLayer(tuple((p, v.paced(factor) if hasattr(v, "paced") else v) for p, v in self.rules))

    def _rule(self, name):
        for i, (pattern, _) in enumerate(self.rules):
            if fnmatchcase(name, pattern):
                return i
        raise ValueError(f"ByLayer: no rule for layer {name!r} among {', '.join(p for p, _ in self.rules)}; "
                         "end with ('*', ...).")

    def init(self, ranks):
        return {}                                                   # names are not known yet: see step

    def step(self, ranks, targets, memory, signal):
        if len(signal.names) != len(ranks):
            raise ValueError(f"ByLayer: {len(ranks)} ranks and {len(signal.names)} names; give Signal(names=...).")
        chosen = [self._rule(name) for name in signal.names]
        new, memories = list(ranks), {}
        for i in sorted(set(chosen)):
            mine = [j for j, c in enumerate(chosen) if c == i]
            pattern, control = self.rules[i]
            part = [[seq[j] for j in mine] for seq in (ranks, targets, signal.caps, signal.names)]
            shapes = [signal.shapes[j] for j in mine] if signal.shapes else ()
            then = memory[pattern] if pattern in memory else control.init(part[0])
            got, memories[pattern] = control.step(part[0], part[1], then, signal._replace(
                caps=part[2], names=part[3], shapes=shapes))
            for j, r in zip(mine, got, strict=True):
                new[j] = r
        return new, memories


def each(value: Any, **changes) -> Any:
    """The value with these fields replaced; in a `ByLayer`, those of every value."""
    if isinstance(value, ByLayer):
        return ByLayer(tuple((pattern, each(v, **changes)) for pattern, v in value.rules))
    return replace(value, **changes)
