"""What the old scripts did that they did not mean to do, and the change of the recipe that undoes it."""

from __future__ import annotations

from typing import NamedTuple


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
BY_NORM = ("v7.2", "v7.3")
ADAPTIVE = CLUSTERED + BY_NORM + ("v7.4", "v7.5", "v8", "v9", "v10")

FLAWS = {flaw.name: flaw for flaw in (
    Flaw("stale", "the optimizer goes on holding the old factors: a resized layer is never trained again",
         CLUSTERED + BY_NORM + ("v9",), "state=Transport()"),
    # v9 has the sum too, and does not look at it
    Flaw("summed gradients",
         "the optimizer's zero_grad() misses a resized layer: its gradients pile up, and decisions read the sum",
         CLUSTERED + BY_NORM, "state=Stale(zero=True)"),
    Flaw("inverted signal", "rows that agree need one direction and are given as many as there are rows",
         CLUSTERED, "estimate=NumberOfGroups(threshold=0.9)"),
    Flaw("first batch", "the first decision sees one batch and untrained weights", ("v3", "v4", "v5"), "offset=0"),
    Flaw("no memory", "the moving average starts anew from the rank each time, so small gaps wait for ever",
         ("v5.1", "v6", "v7.1"), "control=each({}.control, remember=True)"),
    Flaw("loss scale", "the gradient's norm, and so the rank, follows the scale of the loss",
         BY_NORM, "estimate=StableRank()"),
    # from 64, a steady wish for up to 19 more ends at 64 in v7.2 and v7.3; in v7.4 and v7.5 the snap grants up to 8 more in
    # full, and larger wishes end up to 5 short
    Flaw("truncation", "int() grants every wish to shrink and few to grow (with the snap of v7.4 and v7.5: all that are small)",
         BY_NORM + ("v7.4", "v7.5"), "control=each({}.control, truncate=False)"),
    Flaw("one-sided split", "all singular values go to U: the factors see gradients of unlike size",
         BY_NORM, "resize=SvdFull(eps=0.0)"),
    Flaw("formed W", "forward forms W, so low rank saves no work", ("v7.3",), "op=OwnBackward()"),
    # v7.4 drops it at every decision, whether or not a rank changes
    Flaw("reset", "a resize drops the optimizer's memory of every parameter",
         ("v7.4", "v7.5", "v8", "v10"), "state=Transport()"),
    Flaw("rounded growth", "a loss that gets worse asks for four ranks, and half of a tenth of four rounds to none",
         ("v9",), "control=each({}.control, ema=0.0)"),
    Flaw("power iteration", "five cold iterations miss the largest singular value: the stable rank comes out too high",
         ("v10",), "estimate=StableRank()"),
    # not where V keeps the singular vectors at length one, v7.2 and v7.3: there growth is alive, as LoRA's start is
    Flaw("dead growth", "new directions are null vectors of the SVD, near zero in both factors",
         tuple(v for v in ADAPTIVE if v not in BY_NORM), "resize=SvdCore()"),
    Flaw("dearer than dense", "ranks up to min(m, n), where the factors hold more numbers than W",
         ADAPTIVE, 'cap="break-even"'),
)}
