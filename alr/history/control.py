"""The controllers of scripts v3 to v9, as they were.  Plain numbers: no torch in this file.

Each quirk has a flag or a number beside it that takes it away.  r rank now, t target (what the estimate suggests),
e smoothed target, v velocity.  All of them clamp to [min_rank, cap]; on the scripts' layers that is their [min, 512].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Sequence

from ..axes import Control, Count, NonNegative, Share, Whole
from ..control import clamp


@dataclass(frozen=True)
class Jump(Control):
    """Scripts v3 to v5: r = t at once, however far."""

    min_rank: int = 16                  # both: script v3
    max_rank: int = 512

    def init(self, ranks):
        return []

    def step(self, ranks, targets, memory, signal):
        return [clamp(round(t), self.min_rank, min(self.max_rank, cap))
                for _, t, cap in zip(ranks, targets, signal.caps, strict=True)], memory


@dataclass(frozen=True)
class Ramp(Control):
    """Scripts v5.1, v6, v7.1: s = a r + (1 - a) t, then r += ramp (s - r), rounded.

    The missing memory: s starts anew from the rank each time, so this is no moving average.  The whole rule is
    r += ramp (1 - a) (t - r), which rounds to no move while |t - r| < 0.5 / (ramp (1 - a)): a gap under 5 with a = 0.8
    and ramp 0.5, under 8.3 with 0.85 and 0.4, waits for ever.  The repair, remember=True: s = a s + (1 - a) t.
    """

    a: float = 0.8                      # script v5.1: fc2
    ramp: float = 0.5                   # script v5.1: fc2
    min_rank: int = 8                   # script v5
    max_rank: int = 512                 # script v3
    remember: bool = False
    warmup: int = 0                     # optimizer steps before these layers move: script v5.1 has fc1 wait longer

    def paced(self, factor: float) -> "Ramp":
        return replace(self, warmup=round(self.warmup * factor))

    def init(self, ranks):
        return [float(r) for r in ranks] if self.remember else []

    def step(self, ranks, targets, memory, signal):
        if signal.step <= self.warmup:
            return list(ranks), memory
        new, smooth = [], []
        for r, t, s, cap in zip(ranks, targets, memory if self.remember else ranks, signal.caps, strict=True):
            high = min(self.max_rank, cap)
            s = self.a * s + (1 - self.a) * clamp(t, self.min_rank, high)
            new.append(clamp(round(r + self.ramp * (s - r)), self.min_rank, high))
            smooth.append(s)
        return new, smooth if self.remember else []


@dataclass(frozen=True)
class Velocity(Control):
    """Scripts v7.2 to v7.5: e = ema e + (1 - ema) t;  v = momentum v + (1 - momentum) (e - r);  r = int(r + rate v).

    The truncating int(): it rounds down, so any v below zero takes a rank away and no v below 1 / rate adds one.  At
    v7.2's rate of 0.05 a layer that asks for ten more never gets one; a layer that asks for one less gets it at once,
    and more, while v recovers.  The repair, truncate=False, leaves a dead band of 0.5 / rate both ways.

    Whether the scripts weigh the new gap by (1 - momentum) is not recorded; we do, so that `rate` is the share of a
    steady gap that one update closes.
    """

    ema: float = 0.9                    # all four: script v7.2
    momentum: float = 0.8
    rate: float = 0.05
    min_rank: int = 8
    truncate: bool = True

    def init(self, ranks):
        return [[float(r), 0.0] for r in ranks]

    def step(self, ranks, targets, memory, signal):
        new, then = [], []
        for r, t, (e, v), cap in zip(ranks, targets, memory, signal.caps, strict=True):
            e = self.ema * e + (1 - self.ema) * clamp(t, self.min_rank, cap)
            v = self.momentum * v + (1 - self.momentum) * (e - r)
            wanted = r + self.rate * v
            new.append(clamp(int(wanted) if self.truncate else round(wanted), self.min_rank, cap))
            then.append([e, v])
        return new, then


@dataclass(frozen=True)
class Step(Control):
    """Script v8: towards t by at most max_step; no memory."""

    max_step: int = 4                   # both: script v8
    min_rank: int = 8

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
    before, now = math.fsum(losses[-2 * window:-window]), math.fsum(losses[-window:])
    return 1 if now > before * (1 + tolerance) else -1 if now < before * (1 - tolerance) else 0


@dataclass(frozen=True)
class LossAware(Control):
    """Script v9: t, or at least r + boost while the loss gets worse; e = ema e + (1 - ema) t; d = e - r, at most
    max_step either way; r = round(r + half d).

    The growth that does not come: one worsening lifts e by (1 - ema) boost = 0.4, and half of that rounds to nothing.
    The repair, ema=0: the loss asks for four ranks and gets two.  `signal.losses` has to hold the validation losses.
    """

    ema: float = 0.9                    # all seven: script v9
    half: float = 0.5
    max_step: int = 4
    boost: int = 4
    window: int = 3
    tolerance: float = 0.07
    min_rank: int = 8

    def init(self, ranks):
        return [float(r) for r in ranks]

    def step(self, ranks, targets, memory, signal):
        worse = loss_trend(signal.losses, self.window, self.tolerance) > 0
        new, smooth = [], []
        for r, t, e, cap in zip(ranks, targets, memory, signal.caps, strict=True):
            t = clamp(max(t, r + self.boost) if worse else t, self.min_rank, cap)
            e = self.ema * e + (1 - self.ema) * t
            d = clamp(e - r, -self.max_step, self.max_step)
            new.append(clamp(round(r + self.half * d), self.min_rank, cap))
            smooth.append(e)
        return new, smooth
