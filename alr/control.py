"""Which ranks next?  Plain numbers: no torch in this file.

A controller is a frozen value with two methods over all layers at once,

    memory = control.init(ranks)                                   # plain numbers, so it goes into a checkpoint
    ranks, memory = control.step(ranks, targets, memory, signal)

What else it may define stands in `axes.Control`.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from .axes import Axis, Control, Count, Estimate, NonNegative, Share, Whole
from .axes import Signal as Signal  # what a controller is called with, to be had from here too


def clamp(x, low, high):
    """x in [low, high]; high wins when they cross (a layer smaller than min_rank)."""
    return min(max(x, low), high)


@dataclass(frozen=True)
class Hold(Control):
    """Never moves: dense and uniform-rank baselines."""

    wants = None

    def step(self, ranks, targets, memory, signal):
        return list(ranks), memory

    def finished(self, ranks, memory, signal):
        return True


@dataclass(frozen=True)
class Schedule(Control):
    """The same ranks at the same steps whatever is estimated, so that two runs differ in something else alone.

    path: (step, rank) pairs, steps rising; every layer has the rank of the last step that has come, its cap permitting.
    A rank is one number for all layers, or {layer: rank}, in which a layer that is left out stays as it is.  Rank 0 switches
    a layer off; a later rank brings it back.  The steps are those of the run itself: `Recipe.paced` leaves them alone.
    """

    path: tuple[tuple[Whole, Whole | dict[str, Whole]], ...]
    wants = None

    def step(self, ranks, targets, memory, signal):
        due = [rank for step, rank in self.path if step <= signal.step]
        if not due:
            return list(ranks), memory
        wanted = [due[-1].get(name, r) for name, r in zip(signal.names, ranks, strict=True)] \
            if isinstance(due[-1], dict) else [due[-1]] * len(ranks)
        return [min(k, cap) for k, cap in zip(wanted, signal.caps, strict=True)], memory


@dataclass(frozen=True)
class Stairs(Control):
    """Every layer goes to one rank, in so many equal changes spread evenly over training (the dose experiment of
    notebook 12_optimizer_reset).

    Change i of `changes` is due when i / (changes + 1) of the steps are done, and happens at the next decision.  A layer
    that starts at rank r has then the rank r + (rank - r) i / changes, rounded, its cap permitting: from 64 to 28 in 36
    changes is one direction at a time, in one change all 36 at half-time.
    """

    rank: Count
    changes: Count = 1
    wants = None
    needs_total_steps = True

    def init(self, ranks):
        return list(ranks)

    def step(self, ranks, targets, memory, signal):
        due = min(self.changes, int(signal.progress * (self.changes + 1) + 1e-9))       # 1e-9: 20 / 740 * 37 is one
        wanted = [round(first + (self.rank - first) * due / self.changes) for first in memory]
        return [min(k, cap) for k, cap in zip(wanted, signal.caps, strict=True)], memory

    def finished(self, ranks, memory, signal):
        return list(ranks) == [min(self.rank, cap) for cap in signal.caps]


@dataclass(frozen=True)
class Bidirectional(Control):
    """Script v10: a safety factor, an exponential moving average, a dead band, a step limit; each layer on its own.

    target = safety * estimate, clamped to [min_rank, cap];  e = ema * e + (1 - ema) * target, starting at the rank;
    no move while |e - r| < threshold, else r += round(e - r), at most max_step either way.  A target equal to the rank
    is a fixed point.  (`round` is Python's, to even at halves, as in the script.)
    """

    safety: NonNegative = 1.5           # all five: script v10
    ema: Share = 0.8
    threshold: NonNegative = 2.0
    max_step: Count = 4
    min_rank: Count = 8

    def first_rank(self, rank):
        return max(rank, self.min_rank)                             # script v10: init_rank 4 starts at 8

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
class ByLayer(Control, Estimate):
    """Other numbers for other layers (script v5.1): the first rule (shell pattern, value) that fits a layer's name.

    On a recipe's `estimate` axis the values are estimates, on its `control` axis controllers.
    """

    rules: tuple[tuple[str, Axis], ...]

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(need for _, value in self.rules for need in getattr(value, "needs", ()))

    @property
    def gradients(self) -> bool:
        return any(getattr(value, "gradients", False) for _, value in self.rules)

    @property
    def steps(self) -> int:
        return max((getattr(value, "steps", 1) for _, value in self.rules), default=1)

    @property
    def gives(self) -> str:
        return self._common("gives")

    @property
    def wants(self) -> str | None:
        return self._common("wants")

    @property
    def needs_total_steps(self) -> bool:
        return any(getattr(value, "needs_total_steps", False) for _, value in self.rules)

    def _common(self, word: str) -> str | None:
        found = {getattr(value, word) for _, value in self.rules if getattr(value, word, None) is not None}
        if len(found) > 1:
            raise ValueError(f"ByLayer: its rules differ in what they {word[:-1]}: {', '.join(sorted(found))}.")
        return next(iter(found), None)

    def for_layer(self, name: str) -> Axis:
        """The value for the layer of that name.  ValueError when no rule fits."""
        return self.rules[self._rule(name)][1].for_layer(name)

    def paced(self, factor: float) -> ByLayer:
        return ByLayer(tuple((pattern, value.paced(factor)) for pattern, value in self.rules))

    def _rule(self, name):
        for i, (pattern, _) in enumerate(self.rules):
            if fnmatchcase(name, pattern):
                return i
        raise ValueError(f"ByLayer: no rule for layer {name!r} among {', '.join(p for p, _ in self.rules)}; "
                         "end with ('*', ...).")

    def init(self, ranks):
        return {}                                                   # names are not known yet: see step

    def _split(self, names):
        """(pattern, controller, places of its layers in `names`) of every rule that is the first to fit one."""
        chosen = [self._rule(name) for name in names]
        return [(*self.rules[i], [j for j, c in enumerate(chosen) if c == i]) for i in sorted(set(chosen))]

    def _asked(self, ranks, memory, signal):
        """(pattern, controller, places, and of these layers alone: ranks, memory, signal) of every such rule."""
        if len(signal.names) != len(ranks):
            raise ValueError(f"ByLayer: {len(ranks)} ranks and {len(signal.names)} names; give Signal(names=...).")
        for pattern, control, mine in self._split(signal.names):
            own = [ranks[j] for j in mine]
            of_mine = {key: [seq[j] for j in mine] for key in ("caps", "names", "shapes", "held", "unseen")
                       if (seq := getattr(signal, key))}
            then = memory[pattern] if pattern in memory else control.init(own)
            yield pattern, control, mine, own, then, signal._replace(**of_mine)

    def step(self, ranks, targets, memory, signal):
        new, memories = list(ranks), {}
        for pattern, control, mine, own, then, part in self._asked(ranks, memory, signal):
            got, memories[pattern] = control.step(own, [targets[j] for j in mine], then, part)
            for j, r in zip(mine, got, strict=True):
                new[j] = r
        return new, memories

    def finished(self, ranks, memory, signal):
        return all(control.finished(own, then, part) for _, control, _, own, then, part in self._asked(ranks, memory, signal))

    def parts(self, names):
        return [(one, [mine[j] for j in places]) for _, control, mine in self._split(names)
                for one, places in control.parts([names[j] for j in mine])]

    def again(self, memory, signal):
        out = [False] * len(signal.names)
        for _, control, mine, _, then, part in self._asked(out, memory, signal):
            for j, anew in zip(mine, control.again(then, part)):
                out[j] = anew
        return out
