"""Adaptive low-rank training: every linear layer as W = U V, every layer finding its own rank while it trains.

    alr.factorize_(model, rank=1.0)
    optimizer = alr.PairOptimizer(model)
    adapter = alr.RankAdapter(model, optimizer, alr.recipes.alr, total_steps=10_000)
    ...
    optimizer.step(); adapter.step(); optimizer.zero_grad()
"""

import signal
import sys

if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].removeprefix("-m").startswith("alr.") \
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # `python -m alr.train` imports this first, for seconds: until it has begun, Ctrl-C ends it without a traceback.  Other
    # programs keep their Ctrl-C: nobody in them calls `lab.stop.listen`
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from . import integrations, recipes
from .adapt import RankAdapter, Recipe, Resize
from .causal import assert_causal
from .group import average_gradients
from .linear import LowRankLinear, densify_, factorize_, factorize_like_, low_rank_layers
from .optim import PairOptimizer
from .suggest import Suggestion, suggest_ranks

__version__ = "0.2.0"
__all__ = ["LowRankLinear", "PairOptimizer", "RankAdapter", "Recipe", "Resize", "Suggestion", "assert_causal",
           "average_gradients", "densify_", "factorize_", "factorize_like_", "integrations",
           "low_rank_layers", "recipes", "suggest_ranks"]
