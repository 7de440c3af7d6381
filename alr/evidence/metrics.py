"""Numbers of one run that no `end` line holds, by name: what a claim may call its metric.  No torch.

Each takes one run and its whole suite (both `records.Runs`), and named arguments from the register's `with`.
"""

from __future__ import annotations

import math

import pandas as pd

from .records import Runs


def steps_to_loss(run: Runs, suite: Runs, level: float | str) -> float:
    """Steps until an epoch ends at a validation loss of `level` or below; infinite when none does.

    level may be the name of an arm: then it is that arm's loss at its last epoch, at the same seed.
    """
    return _reached(run, suite, level, "step")


def seconds_to_loss(run: Runs, suite: Runs, level: float | str) -> float:
    """As steps_to_loss, in seconds: the epochs' time_sec, summed."""
    return _reached(run, suite, level, "seconds")


def _reached(run, suite, level, column):
    if isinstance(level, str):
        seed = run.curves["seed"].iloc[0]
        model = suite.of(arm=level, seed=seed).curves
        if model["run"].nunique() != 1:
            raise ValueError(f"level = {level!r}: that arm has {model['run'].nunique()} runs at seed {seed}; wanted 1.")
        level = model["val_loss"].iloc[-1]
    hits = run.curves.loc[run.curves["val_loss"] <= level, column]
    return float(hits.iloc[0]) if len(hits) else math.inf


def best_val_loss(run: Runs, suite: Runs) -> float:
    """The lowest validation loss of any epoch."""
    return float(run.curves["val_loss"].min())


def val_loss_at(run: Runs, suite: Runs, epoch: int) -> float:
    """The validation loss at the end of that epoch; NaN when the run is shorter."""
    return float(run.curves.set_index("epoch")["val_loss"].get(epoch, math.nan))


def role_rank(run: Runs, suite: Runs, role: str) -> float:
    """The mean final rank of the layers of that role: q, k, v, o, up or down; NaN when the run has none."""
    last = run.ranks[run.ranks["epoch"] == run.ranks["epoch"].max()]
    return float(last.loc[last["role"] == role, "rank"].mean())


def mean_rank_at(run: Runs, suite: Runs, epoch: int) -> float:
    """The mean rank over all layers at the end of that epoch; NaN when the run is shorter or dense."""
    return float(run.ranks.loc[run.ranks["epoch"] == epoch, "rank"].mean())


def role_gap(run: Runs, suite: Runs, role: str, other: str) -> float:
    """How much more final rank the layers of one role have than those of another, on average."""
    return role_rank(run, suite, role) - role_rank(run, suite, other)


def shrink_after_drop(run: Runs, suite: Runs) -> float:
    """By how much the mean rank still falls after the epoch in which the validation loss fell most.

    Falls are from epoch end to epoch end, so the first epoch has none.  NaN for a run of one epoch, or a dense one.
    """
    curve = run.curves.sort_values("epoch")
    falls = -curve["val_loss"].diff()
    if falls.isna().all() or curve["rank_avg"].isna().any():
        return math.nan
    return float(curve.loc[falls.idxmax(), "rank_avg"] - curve["rank_avg"].iloc[-1])


def lowest_of_suite(run: Runs, suite: Runs) -> float:
    """The lowest validation loss of any epoch of any arm of the suite, at this run's seed."""
    return float(suite.of(seed=run.curves["seed"].iloc[0]).curves["val_loss"].min())


def growth_moves(run: Runs, suite: Runs) -> float:
    """How many resizes made a layer larger."""
    return float((run.resizes["new"] > run.resizes["old"]).sum())


def adaptation_share(run: Runs, suite: Runs) -> float:
    """Seconds spent on deciding and changing ranks, for each second of training steps."""
    end = run.ends.iloc[0]
    return float(end["seconds_adaptation"] / end["seconds_training"])


def over_best(run: Runs, suite: Runs, others: list[str], metric: str = "test_loss") -> float:
    """This run's number minus that of the best of other arms at the same seed.

    The best is the arm with the lowest mean validation loss over all of its seeds, so the test split chooses nothing.  NaN
    at a seed that the others do not have.
    """
    ends = suite.ends[suite.ends["arm"].isin(others)]
    means = ends.groupby("arm")["val_loss"].mean()
    return _own(run, metric) - _of(ends, others, means.idxmin() if len(means) else "", _seed(run), metric)


def over_median(run: Runs, suite: Runs, others: list[str], metric: str = "test_loss") -> float:
    """This run's number minus the median of other arms at the same seed: what a shape costs that nobody has searched for."""
    ends, seed = suite.ends[suite.ends["arm"].isin(others)], _seed(run)
    return _own(run, metric) - float(pd.Series([_of(ends, others, arm, seed, metric) for arm in others]).median(skipna=False))


def across(run: Runs, suite: Runs, predictor: str) -> float:
    """Does a prediction order the layers of a run as their cuts do?  Spearman's correlation with the rise of the loss, over
    layers cut to one rank, averaged over the ranks.  "Fisher importance" predicts the Fisher cut, all others the SVD's."""
    damage = "damage_fisher" if predictor == "Fisher importance" else "damage"
    return float(pd.Series([cut[[predictor, damage]].corr(method="spearman").iloc[0, 1]
                            for _, cut in run.cuts.groupby("k")]).mean())


def across_lead(run: Runs, suite: Runs, predictor: str, other: str) -> float:
    """By how much one prediction orders the layers better than another (`across`)."""
    return across(run, suite, predictor) - across(run, suite, other)


def fisher_damage(run: Runs, suite: Runs, least: float = 1e-4) -> float:
    """The rise of the loss after a Fisher cut over that after the SVD's, the median of cuts whose SVD does `least` or more."""
    cuts = run.cuts[run.cuts["damage"] > least]
    return float((cuts["damage_fisher"] / cuts["damage"]).median())


def _seed(run: Runs) -> int:
    return int(run.ends["seed"].iloc[0])


def _own(run: Runs, metric: str) -> float:
    return float(run.ends[metric].iloc[0])


def _of(ends: pd.DataFrame, others: list[str], arm: str, seed: int, metric: str) -> float:
    """NaN where the arm has no run at this seed; ValueError, naming them, for arms that have none at all."""
    if missing := sorted(set(others) - set(ends["arm"])):
        raise ValueError(f"{', '.join(missing)}: no runs, and wanted are some of each of {others}.")
    found = ends.loc[(ends["arm"] == arm) & (ends["seed"] == seed), metric]
    return float(found.iloc[0]) if len(found) else math.nan


METRICS = {f.__name__: f for f in (steps_to_loss, seconds_to_loss, best_val_loss, val_loss_at, role_rank, role_gap,
                                   mean_rank_at, shrink_after_drop, lowest_of_suite, growth_moves,
                                   adaptation_share, over_best, over_median, across, across_lead, fisher_damage)}
