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
