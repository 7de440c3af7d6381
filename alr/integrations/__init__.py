"""`alr` in other people's training: Hugging Face's Trainer, Lightning, averaged models.

    from alr.integrations.transformers import AdaptRanks, load_     # needs transformers
    from alr.integrations.lightning import AdaptRanks               # needs lightning, or pytorch_lightning
    alr.integrations.follow_ranks_(average, model)                  # needs nothing

accelerate needs nothing of this: `RankAdapter` takes its optimizers as they are.

    >>> import copy, alr
    >>> model = alr.factorize_(torch.nn.Sequential(torch.nn.Linear(8, 8)), rank=4)
    >>> average = copy.deepcopy(model)
    >>> changes = alr.RankAdapter(model, alr.PairOptimizer(model), alr.recipes.uniform).resize({"0": 2})
    >>> follow_ranks_(average, model, changes)[0].rank
    2
"""

from .averages import follow_ranks_

__all__ = ["follow_ranks_"]
