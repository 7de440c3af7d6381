"""Controllers that share one number of parameters among all layers.  Plain numbers: no torch in this file.

They want one importance per direction and layer (`estimate.Spectrum`), falling, and the layers' shapes: a direction of an
m x n layer costs m + n parameters.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

from .axes import Control, Count, Part, Positive, Share, Whole


def size(ranks: Sequence[int], shapes: Sequence[tuple[int, int]]) -> int:
    """Parameters of the factors: sum of r (m + n)."""
    return sum(r * (m + n) for r, (m, n) in zip(ranks, shapes, strict=True))


def allocate(importances: Sequence[Sequence[float]], shapes: Sequence[tuple[int, int]], parameters: float, least: int = 1,
             caps: Sequence[int] | None = None, multiple: int = 1, per_parameter: bool = True) -> list[int]:
    """Ranks that keep much importance for at most `parameters`: directions by importance per parameter, largest first.

    A greedy choice, as good as the best where all directions cost the same and near it where budgets are large against
    one direction.

    per_parameter=False: by importance alone, so that layers of like spectra get like ranks, whatever their shapes.

    importances falling within a layer, so the greedy choice never takes a direction before a better one of its layer.
    Every layer keeps `least` directions, whatever they cost; none has more than its importances, or its cap.
    multiple: ranks are whole multiples of it (of 8, for a GPU), or the layer's cap; blocks are chosen by their mean.
    """
    tops = [min(len(w), caps[i] if caps else len(w)) for i, w in enumerate(importances)]
    ranks = [min(top, -(-least // multiple) * multiple) for top in tops]
    left = parameters - size(ranks, shapes)
    blocks = []                                                     # (priority, layer, end, cost)
    for i, (w, (m, n)) in enumerate(zip(importances, shapes, strict=True)):
        importance = math.inf
        for start in range(ranks[i], tops[i], multiple):
            end = min(start + multiple, tops[i])
            cost = (end - start) * (m + n)
            importance = min(importance, sum(w[start:end]) / (end - start))     # never above the block before: a mean rounds
            blocks.append((importance / (m + n) if per_parameter else importance, i, end, cost))
    blocked = set()                                                 # a layer whose next block did not fit
    for _, i, end, cost in sorted(blocks, key=lambda b: (-b[0], b[1], b[2])):
        if i in blocked or cost > left:
            blocked.add(i)
            continue
        ranks[i], left = end, left - cost
    return ranks


@dataclass(frozen=True)
class Budget(Control):
    """Start wide, shrink along a cubic to `share` of the dense layers' parameters, shared by importance; then stop.

    At progress p of the run the budget is end + (start - end) (1 - x)^3, x = (p - begin) / (end - begin) in [0, 1]: most
    is cut early, when learning rates are high and mistakes are cheap (the schedule of Zhu & Gupta 2017; AdaLoRA's).
    Without `start` nothing ever grows.  It needs the length of the run (`RankAdapter(..., total_steps=...)`).

    start: at the first decision every narrower layer grows to this rank, its cap permitting, and the cubic starts there:
    then the rank that the model was built with hardly matters.  None: the cubic starts from the ranks as they come.
    Layers that are held (frozen) keep their rank, and what they cost is spent.  One that was trained but not seen before a
    decision keeps its rank too, and the others are shared out as if it were not there: the end is then larger than `share`.
    min_rank: every layer keeps so many directions.  0: a layer may be switched off, its whole cost gone but for the bias; since
    nothing grows here, it is off for good, unless `RankAdapter.resize` brings it back by hand.
    ValueError unless begin < end.
    """

    share: Part = 1 / 6                 # all ours, from the suite `method`
    begin: Share = 0.0
    end: Positive = 0.5                 # above 1: the run ends before the budget does
    min_rank: Whole = 4
    multiple: Count = 1
    per_parameter: bool = False         # True starves wide layers: one of their directions costs more
    start: Count | None = None
    needs_total_steps = True
    wants = "spectrum"

    def __post_init__(self):
        super().__post_init__()
        if not self.begin < self.end:
            raise ValueError(f"Budget: begin is {self.begin:g} and end is {self.end:g}; wanted begin < end.")

    def init(self, ranks):
        return None if self.start else [int(r) for r in ranks]      # where the cubic starts

    def warning(self, ranks, shapes):
        dense, now = sum(m * n for m, n in shapes), size(ranks, shapes)
        least = size([min(self.min_rank, m, n) for m, n in shapes], shapes)
        if not self.start and now <= self.share * dense:
            return (f"Budget: the layers hold {now / dense:.3g} of their dense parameters, no more than the budget of "
                    f"share={self.share:.3g}: no rank will ever move. Start wider: factorize_(model, rank=0.5).")
        if least > self.share * dense:
            return (f"Budget: min_rank={self.min_rank} in every layer takes {least / dense:.3g} of the dense parameters, more "
                    f"than share={self.share:.3g}, which will be missed. Take a smaller min_rank or a larger share.")
        return ""

    def room(self, memory, signal) -> float:
        """How many parameters all layers may hold now."""
        x = min(max((signal.progress - self.begin) / (self.end - self.begin), 0.0), 1.0)
        start = size(memory, signal.shapes)
        end = min(start, self.share * sum(m * n for m, n in signal.shapes))
        return start if x <= 0 else end + (start - end) * (1 - x) ** 3

    def finished(self, ranks, memory, signal):
        over = memory is not None and signal.progress is not None and signal.progress >= self.end
        return over and (size(ranks, signal.shapes) <= self.room(memory, signal)
                         or all(r <= self.min_rank for r in ranks))

    def step(self, ranks, targets, memory, signal):
        if memory is None:
            memory = [min(self.start, cap) for cap in signal.caps]
            if any(r < k for r, k in zip(ranks, memory, strict=True)):
                return [max(r, k) for r, k in zip(ranks, memory)], memory       # what is new has no importance yet
        if any(signal.unseen):
            return among_seen(self, ranks, targets, memory, signal)
        room = self.room(memory, signal)
        if size(ranks, signal.shapes) <= room:
            return list(ranks), memory
        return share_out(ranks, targets, signal, room, self.min_rank, ranks, self.multiple, self.per_parameter), memory


def among_seen(control, ranks, targets, memory, signal) -> tuple[list[int], object]:
    """`control.step` for the layers that were seen, as if there were no others; those keep their rank.

    What an unseen layer holds is in nobody's room, so that no other layer is cut for it.  A memory that is a list has one
    entry per layer, and stays.
    """
    at = [i for i, unseen in enumerate(signal.unseen) if not unseen]
    def of(values):
        return [values[i] for i in at] if len(values) else ()
    if not at:
        return list(ranks), memory
    listed = isinstance(memory, list)
    part = signal._replace(caps=of(signal.caps), names=of(signal.names), shapes=of(signal.shapes), held=of(signal.held),
                           unseen=())
    got, after = control.step(of(ranks), of(targets), of(memory) if listed else memory, part)
    wanted = list(ranks)
    for i, k in zip(at, got, strict=True):
        wanted[i] = k
    return wanted, memory if listed else after


def share_out(ranks, targets, signal, room, least, caps, multiple=1, per_parameter=True) -> list[int]:
    """`allocate` among the layers that are not held; what the held ones cost is spent."""
    held = signal.held or [False] * len(ranks)
    live = [i for i, h in enumerate(held) if not h]
    spent = sum(ranks[i] * sum(signal.shapes[i]) for i, h in enumerate(held) if h)
    got = allocate([targets[i] for i in live], [signal.shapes[i] for i in live], room - spent, least,
                   [caps[i] for i in live], multiple, per_parameter)
    wanted = list(ranks)
    for i, k in zip(live, got, strict=True):
        wanted[i] = k
    return wanted


@dataclass(frozen=True)
class Proportional(Control):
    """One cut: at the first decision from progress `at` on, every layer gets a rank in proportion to its estimate.

    The factor is the largest at which all layers together hold at most `share` of the dense layers' parameters; no layer
    grows by it, and every layer keeps `min_rank` directions.  Cuttlefish (Wang and others 2023) cuts so, by `ScaledStableRank`,
    but that its factor is 1, and the size what comes of it.  It needs the length of the run.
    """

    share: Part = 1 / 6                 # as Budget's
    at: Share = 0.3                     # of the run (ours; Cuttlefish: when the estimates have settled)
    min_rank: Count = 4
    needs_total_steps = True

    def init(self, ranks):
        return False                                                # has it cut?

    def finished(self, ranks, memory, signal):
        return memory

    def step(self, ranks, targets, memory, signal):
        if memory or signal.progress < self.at:
            return list(ranks), memory
        if any(signal.unseen):
            return among_seen(self, ranks, targets, memory, signal)
        held = signal.held or [False] * len(ranks)
        room = self.share * sum(m * n for m, n in signal.shapes)
        def at_factor(factor):
            return [r if h else min(max(int(factor * t), self.min_rank), r)
                    for r, t, h in zip(ranks, targets, held, strict=True)]
        # the ranks change only where factor * target is whole: the largest such factor that fits
        steps = sorted({f for r, t in zip(ranks, targets) for k in range(1, r + 1) if t > 0 and math.isfinite(f := k / t)})
        fit = bisect.bisect_right(steps, room, key=lambda f: size(at_factor(f * (1 + 1e-12)), signal.shapes))
        return at_factor(steps[fit - 1] * (1 + 1e-12) if fit else 0.0), True


@dataclass(frozen=True)
class LossTarget(Control):
    """As small as a loss allows: smaller by a factor while the validation loss is at or below `loss`, larger above it.

    When a layer grows, its new directions count as its least one now: growth goes where the tail is worth most.
    min_rank 0: a layer may be switched off; it comes back after all others have grown, since nothing is known of it.
    Moves once per new validation loss; without any it waits.
    """

    loss: Positive                      # nats per token
    factor: Part = 0.9                  # of the parameters, per move (ours)
    min_rank: Whole = 4
    wants = "spectrum"

    def init(self, ranks):
        return 0                                                    # validation losses seen

    def step(self, ranks, targets, memory, signal):
        if len(signal.losses) <= memory or not math.isfinite(signal.losses[-1]):
            return list(ranks), len(signal.losses)
        if any(signal.unseen):
            return among_seen(self, ranks, targets, memory, signal)
        now = size(ranks, signal.shapes)
        room = now * self.factor if signal.losses[-1] <= self.loss else now / self.factor
        longer = [list(w) + [w[-1] if len(w) else 0.0] * (cap - len(w)) for w, cap in zip(targets, signal.caps, strict=True)]
        return share_out(ranks, longer, signal, room, self.min_rank, signal.caps), len(signal.losses)
