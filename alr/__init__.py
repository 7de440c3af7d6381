"""Adaptive low-rank training: every linear layer as W = U V, every layer finding its own rank while it trains.

    alr.factorize_(model, rank=64)
    optimizers = alr.pairs.optimizers(model)
    adapter = alr.RankAdapter(model, optimizers, alr.recipes.alr, total_steps=10_000)
    ...
    for optimizer in optimizers: optimizer.step()
    adapter.step(); model.zero_grad()
"""

import os

# A kernel that MPS lacks runs on the CPU for that call, and torch says so once; it must be set before torch is imported.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

from . import pairs, recipes  # noqa: E402
from .adapt import RankAdapter, Recipe, Resize
from .causal import assert_causal
from .linear import LowRankLinear, densify_, factorize_, low_rank_layers

__version__ = "0.1.0"
__all__ = ["LowRankLinear", "RankAdapter", "Recipe", "Resize", "assert_causal", "densify_", "factorize_",
           "low_rank_layers", "pairs", "recipes", "runs"]


def __getattr__(name):
    if name == "runs":                  # on first use: reading records needs pandas, training does not
        from .records import runs
        return runs
    raise AttributeError(f"module 'alr' has no attribute {name!r}")
