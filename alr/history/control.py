"""The controllers of scripts v3 to v9, as they were.  Plain numbers: no torch in this file.

Each quirk has a flag or a number beside it that takes it away.  r rank now, t target (what the estimate suggests),
e smoothed target, v velocity, cap the largest rank of a layer.  Limits are the scripts' own, each where the script has it;
what a controller answers never lies above the cap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..axes import Control, Count, NonNegative, Share, Whole
from ..control import clamp


@dataclass(frozen=True)
class Jump(Control):
    """Scripts v3 to v5: r = t at once, however far."""

    min_rank: Whole = 16                # both: script v3
    max_rank: Count = 512

    def init(self, ranks):
        return []

    def step(self, ranks, targets, memory, signal):
        return [clamp(round(t), self.min_rank, min(self.max_rank, cap))
                for _, t, cap in zip(ranks, targets, signal.caps, strict=True)], memory


@dataclass(frozen=True)
class Ramp(Control):
    """Scripts v5.1, v6, v7.1: s = a r + (1 - a) t, then r += ramp (s - r), rounded; t in [min_rank, max_rank].

    The missing memory: s starts anew from the rank each time, so this is no moving average.  The whole rule is
    r += ramp (1 - a) (t - r), which rounds to no move while |t - r| < 0.5 / (ramp (1 - a)): a gap under 5 with a = 0.8
    and ramp 0.5, under 8.3 with 0.85 and 0.4, waits for ever.  The repair, remember=True: s = a s + (1 - a) t.
    """

    a: Share = 0.8                      # script v5.1: fc2
    ramp: Share = 0.5                   # script v5.1: fc2
    min_rank: Whole = 8                 # script v5.1: fc2
    max_rank: Count | None = 512        # script v5.1, whatever the layer's size; None: the cap (script v7.1)
    remember: bool = False
    warmup: Whole = 0                   # optimizer steps before these layers move: script v5.1 has fc1 wait longer

    def paced(self, factor: float) -> Ramp:
        return replace(self, warmup=round(self.warmup * factor))

    def init(self, ranks):
        return [float(r) for r in ranks] if self.remember else []

    def step(self, ranks, targets, memory, signal):
        if self.warmup and signal.step <= self.warmup:
            return list(ranks), memory
        new, smooth = [], []
        for r, t, s, cap in zip(ranks, targets, memory if self.remember else ranks, signal.caps, strict=True):
            high = self.max_rank or cap
            s = self.a * s + (1 - self.a) * clamp(t, self.min_rank, high)
            new.append(min(round(clamp(r + self.ramp * (s - r), self.min_rank, high)), cap))
            smooth.append(s)
        return new, smooth if self.remember else []


@dataclass(frozen=True)
class Velocity(Control):
    """Scripts v7.2 to v7.5: e = ema e + (1 - ema) t at every decision, and at every `every`-th
    v = momentum v + (1 - momentum) (e - r), r = int(r + rate v), in [min_rank, max_rank].

    t is not clamped before e.  The truncating int() rounds down, so any v below zero takes a rank away and no v below
    1 / rate adds one.  At v7.2's rate of 0.05 a layer that asks for ten more never gets one; a layer that asks for one
    less gets it at once, and more, while v recovers.  The repair, truncate=False, leaves a dead band of 0.5 / rate both
    ways.

    snap (scripts v7.4, v7.5): where |r - e| < 1 then, r = round(e), also outside of the limits.  It grants small wishes,
    up and down.

    r is the controller's own and may lie above the layer's cap, as v7.2's max_rank of 256 does in its layers of 128: the
    layer has all the rank it can have, and is factorised anew at every decision (`again`), as in the scripts.
    """

    ema: Share = 0.9                    # all six: script v7.2
    momentum: Share = 0.8
    rate: NonNegative = 0.05
    every: Count = 2
    min_rank: Whole = 8
    max_rank: Count | None = 256        # None: the cap (scripts v7.4, v7.5)
    truncate: bool = True
    snap: bool = False

    def init(self, ranks):
        return [[float(r), 0.0, int(r), 0] for r in ranks]          # e, v, r, decisions so far

    def step(self, ranks, targets, memory, signal):
        new, then = [], []
        for now, t, (e, v, r, count), cap in zip(ranks, targets, memory, signal.caps, strict=True):
            if now != min(r, cap):                                  # somebody else has changed the rank
                r = now
            e = self.ema * e + (1 - self.ema) * t
            count += 1
            if count % self.every == 0:
                v = self.momentum * v + (1 - self.momentum) * (e - r)
                wanted = max(self.min_rank, min(r + self.rate * v, self.max_rank or cap))
                r = int(wanted) if self.truncate else round(wanted)
                if self.snap and abs(r - e) < 1:
                    r = round(e)
            new.append(max(1, min(r, cap)))
            then.append([e, v, r, count])
        return new, then

    def again(self, memory, signal):
        return [r > cap for (_, _, r, _), cap in zip(memory, signal.caps, strict=True)]


@dataclass(frozen=True)
class Step(Control):
    """Script v8: towards t by at most max_step; no memory.  No layer starts below min_rank."""

    max_step: Count = 4                 # both: script v8
    min_rank: Whole = 8

    def first_rank(self, rank):
        return max(rank, self.min_rank)

    def init(self, ranks):
        return []

    def step(self, ranks, targets, memory, signal):
        return [clamp(r + clamp(round(t) - r, -self.max_step, self.max_step), self.min_rank, cap)
                for r, t, cap in zip(ranks, targets, signal.caps, strict=True)], memory


def loss_trend(losses: Sequence[float], window: int = 3, tolerance: float = 0.07) -> int:
    """+1 when the mean of the last `window` losses is more than `tolerance` above that of the `window` before, -1 when
    as much below, else 0; 0 as well while there are fewer than two windows.  Script v9.
    """
    if len(losses) < 2 * window:
        return 0
    before, now = sum(losses[-2 * window:-window]) / window, sum(losses[-window:]) / window
    return 1 if now > before * (1 + tolerance) else -1 if now < before * (1 - tolerance) else 0


@dataclass(frozen=True)
class LossAware(Control):
    """Script v9: t, or at least r + boost while the loss gets worse; e = ema e + (1 - ema) t; d = e - r, at most
    max_step either way; r = round(r + half d), in [min_rank, cap].  e is not clamped; no layer starts below min_rank.

    The growth that does not come: one worsening lifts e by (1 - ema) boost = 0.4, and half of that rounds to nothing.
    The repair, ema=0: the loss asks for four ranks and gets two.  `signal.losses` has to hold the validation losses.
    """

    ema: Share = 0.9                    # all seven: script v9
    half: Share = 0.5
    max_step: NonNegative = 4
    boost: Whole = 4
    window: Count = 3
    tolerance: NonNegative = 0.07
    min_rank: Whole = 8

    def first_rank(self, rank):
        return max(rank, self.min_rank)

    def init(self, ranks):
        return [float(r) for r in ranks]

    def step(self, ranks, targets, memory, signal):
        worse = loss_trend(signal.losses, self.window, self.tolerance) > 0
        new, smooth = [], []
        for r, t, e, cap in zip(ranks, targets, memory, signal.caps, strict=True):
            e = self.ema * e + (1 - self.ema) * (max(t, r + self.boost) if worse else t)
            d = clamp(e - r, -self.max_step, self.max_step)
            new.append(clamp(round(r + self.half * d), self.min_rank, cap))
            smooth.append(e)
        return new, smooth
