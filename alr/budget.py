"""Controllers that share one number of parameters among all layers.  Plain numbers: no torch in this file.

They want one worth per direction and layer (`estimate.Spectrum`), falling, and the layers' shapes: a direction of an
m x n layer costs m + n parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence


def size(ranks: Sequence[int], shapes: Sequence[tuple[int, int]]) -> int:
    """Parameters of the factors: sum of r (m + n)."""
    return sum(r * (m + n) for r, (m, n) in zip(ranks, shapes, strict=True))


def allocate(worths: Sequence[Sequence[float]], shapes: Sequence[tuple[int, int]], parameters: float, least: int = 1,
             caps: Sequence[int] | None = None, multiple: int = 1, per_parameter: bool = True) -> list[int]:
    """Ranks that keep the most worth for at most `parameters`: directions by worth per parameter, dearest last.

    per_parameter=False: by worth alone, so that layers of like spectra get like ranks, whatever their shapes.

    worths falling within a layer, so the greedy choice never takes a direction before a better one of its layer.
    Every layer keeps `least` directions, whatever they cost; none has more than its worths, or its cap.
    multiple: ranks are whole multiples of it (of 8, for a GPU), or the layer's cap; blocks are chosen by their mean.
    """
    tops = [min(len(w), caps[i] if caps else len(w)) for i, w in enumerate(worths)]
    ranks = [min(top, -(-least // multiple) * multiple) for top in tops]
    left = parameters - size(ranks, shapes)
    blocks = []                                                     # (priority, layer, end, cost)
    for i, (w, (m, n)) in enumerate(zip(worths, shapes, strict=True)):
        for start in range(ranks[i], tops[i], multiple):
            end = min(start + multiple, tops[i])
            worth, cost = sum(w[start:end]) / (end - start), (end - start) * (m + n)
            blocks.append((worth / (m + n) if per_parameter else worth, i, end, cost))
    blocked = set()                                                 # a layer whose next block did not fit
    for _, i, end, cost in sorted(blocks, key=lambda b: (-b[0], b[1], b[2])):
        if i in blocked or cost > left:
            blocked.add(i)
            continue
        ranks[i], left = end, left - cost
    return ranks


@dataclass(frozen=True)
class Budget:
    """Start wide, shrink along a cubic to `share` of the dense layers' parameters, shared by worth; then stop.

    At progress p of the run the budget is end + (start - end) (1 - x)^3, x = (p - begin) / (end - begin) in [0, 1]: most
    is cut early, when learning rates are high and mistakes are cheap (the schedule of Zhu & Gupta 2017; AdaLoRA's).
    From a start below the final budget nothing moves, and `RankAdapter` warns of it.  Without `start` nothing ever grows.
    It needs the length of the run (`RankAdapter(..., total_steps=...)`), and a ValueError says so.

    start: at the first decision every narrower layer grows to this rank, its cap permitting, and the cubic starts there:
    then the rank that the model was built with hardly matters.  None: the cubic starts from the ranks as they come.
    """

    share: float = 1 / 6                # all ours, from the suite `method`
    begin: float = 0.0
    end: float = 0.5
    min_rank: int = 4
    multiple: int = 1
    per_parameter: bool = False         # True starves wide layers: one of their directions costs more
    start: int | None = None
    wants_length = True                 # RankAdapter refuses it without total_steps

    def init(self, ranks):
        return None if self.start else [int(r) for r in ranks]      # where the cubic starts

    def idle(self, ranks, shapes):
        """Will no rank ever move, since the model starts at or below its final budget?  What to do then, else ""."""
        dense = sum(m * n for m, n in shapes)
        if self.start or size(ranks, shapes) > self.share * dense:
            return ""
        return (f"Budget: the layers hold {size(ranks, shapes) / dense:.3g} of their dense parameters, no more than the "
                f"budget of share={self.share:.3g}: no rank will ever move. Start wider: factorize_(model, rank=0.5).")

    def step(self, ranks, targets, memory, signal):
        if memory is None:
            memory = [min(self.start, cap) for cap in signal.caps]
            if any(r < k for r, k in zip(ranks, memory, strict=True)):
                return [max(r, k) for r, k in zip(ranks, memory)], memory       # what is new has no worth yet
        x = min(max((signal.progress - self.begin) / (self.end - self.begin), 0.0), 1.0)
        start = size(memory, signal.shapes)
        end = min(start, self.share * sum(m * n for m, n in signal.shapes))
        room = end + (start - end) * (1 - x) ** 3
        if x <= 0 or size(ranks, signal.shapes) <= room:
            return list(ranks), memory
        return allocate(targets, signal.shapes, room, self.min_rank, ranks, self.multiple,
                        self.per_parameter), memory


@dataclass(frozen=True)
class LossTarget:
    """As small as a loss allows: smaller by a factor while the validation loss is at or below `loss`, larger above it.

    When a layer grows, its new directions count as its least one now: growth goes where the tail is worth most.
    Moves once per new validation loss; without any it waits.
    """

    loss: float                         # nats per token
    factor: float = 0.9                 # of the parameters, per move (ours)
    min_rank: int = 4

    def init(self, ranks):
        return 0                                                    # validation losses seen

    def step(self, ranks, targets, memory, signal):
        if len(signal.losses) <= memory:
            return list(ranks), memory
        now = size(ranks, signal.shapes)
        room = now * self.factor if signal.losses[-1] <= self.loss else now / self.factor
        worths = [list(w) + [w[-1]] * (cap - len(w)) for w, cap in zip(targets, signal.caps, strict=True)]
        return allocate(worths, signal.shapes, room, self.min_rank, signal.caps), len(signal.losses)
