"""`alr` in other people's training: Hugging Face's Trainer, Lightning, averaged models.

    from alr.integrations.transformers import AdaptRanks, load_     # needs transformers
    from alr.integrations.lightning import AdaptRanks               # needs lightning, or pytorch_lightning
    alr.integrations.follow_ranks_(average, model)                  # needs nothing

accelerate needs nothing of this: `RankAdapter` takes its optimizers as they are.
"""

from .averages import follow_ranks_

__all__ = ["follow_ranks_"]
