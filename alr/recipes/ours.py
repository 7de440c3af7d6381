"""Our own recipes, and the baselines."""

from __future__ import annotations

from ..adapt import Recipe
from ..budget import Budget
from ..control import Bidirectional
from ..estimate import StableRank
from ..fisher import FisherCut, FisherSpectrum
from ..init import Spectral
from ..resize import SvdCore
from ..state import Transport

dense = Recipe("dense", rank=None,
               about="plain layers, nothing adapted")
uniform = Recipe("uniform", rank=32, init=Spectral(), cap="min",
                 about="every layer at one rank, held")

# v10 with every flaw of `flaws.FLAWS` undone, and a spectral start (the scripts start small and Gaussian)
repaired = Recipe("repaired", rank=64, init=Spectral(), estimate=StableRank(), control=Bidirectional(),
                  resize=SvdCore(), state=Transport(), every=200, epoch=200, cap="break-even",
                  about="v10 repaired: exact estimate, QR-core resize, moments carried over, no rank above break-even, "
                        "spectral start")

# ours: start with as many numbers as dense, shrink to a sixth over four fifths of training, importance and cut in the metric of
# the loss; made for alr.PairOptimizer.  Start and end: suite equal_schedule.  Before: rank=64
alr = Recipe("alr", rank=1.0, init=Spectral(), estimate=FisherSpectrum(),
             control=Budget(share=1 / 6, end=0.8, per_parameter=True), resize=FisherCut(), state=Transport(),
             every=50, epoch=200, cap="break-even",
             about="starts wide and shrinks to a budget that all layers share by what the loss would lose")
