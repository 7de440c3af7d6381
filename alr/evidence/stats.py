"""Intervals over a handful of seeds, by scipy.stats.

    mean([4.41, 4.43, 4.46])                        # Interval(value=4.4333, low=4.3708, high=4.4958, n=3)
    compare(ours, theirs, paired=True)              # of the mean difference ours - theirs

Three seeds are few, and a t interval says so: its half width is then 4.30 standard errors, not 1.96.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

METHODS = ("t", "bootstrap")
RESAMPLES = 10_000                      # bootstrap means (ours)


class Interval(NamedTuple):
    """A mean and where it may lie.  low and high are None where n < 2: one number has no interval."""

    value: float
    low: float | None
    high: float | None
    n: int

    @property
    def bar(self) -> list[list[float]] | None:
        """The two lengths of an error bar, as matplotlib's errorbar takes them; None where there is no interval."""
        return None if self.low is None else [[self.value - self.low], [self.high - self.value]]

    def words(self, form: str, scale: float = 1.0) -> list[str | None]:
        """value, low and high as text in a format such as ".3f", each times `scale`; a true minus sign, and none of a zero."""
        return [None if x is None else number(x * scale, form) for x in self[:3]]

    def text(self, form: str, unit: str = "") -> str:
        """The value with its interval and unit, '4.430 [4.401, 4.459] nats', in one format; without what it has not."""
        value, low, high = self.words(form)
        if self.low is not None and self.low == self.high:              # equal numbers have no spread, hence no interval
            return f"{value} {unit}".rstrip() + f" in each of {self.n} runs"
        return f"{value if low is None else f'{value} [{low}, {high}]'} {unit}".rstrip()


def number(x: float, form: str) -> str:
    """A number as text in a format such as ",.3f", with a true minus sign, and none before what rounds to zero."""
    text = format(x, form)
    if set("0123456789") & set(text) == {"0"}:
        text = format(abs(x), form)
    return text.replace("-", "\N{MINUS SIGN}")


def mean(x: Sequence[float], method: str = "t", level: float = 0.95) -> Interval:
    """The mean of x over seeds, with a t interval, or by method="bootstrap".

    The percentile bootstrap is too narrow for few seeds (it cannot leave the range of the values): t is the default.
    Its draws are seeded.  ValueError for an empty x or an unknown method.
    """
    x = np.asarray(x, dtype=float)                                  # (n,)
    if not len(x):
        raise ValueError("mean: no values, so no mean.")
    return _interval(_average(x), [x], method, level)


def compare(a: Sequence[float], b: Sequence[float], paired: bool, method: str = "t", level: float = 0.95) -> Interval:
    """mean(a) - mean(b), with its interval.

    paired: a[i] and b[i] share a seed, so the interval is that of their differences; runs on the same batches in one
    order lose much of their noise that way.  Otherwise Welch's (1947) t, whose variances need not be equal; n is then
    the smaller of the two counts.  ValueError for an empty arm, or when paired arms are of unequal length.
    """
    if paired:
        return mean([x - y for x, y in zip(a, b, strict=True)], method, level)
    a, b = (np.asarray(x, dtype=float) for x in (a, b))             # (n,), (m,)
    if not (len(a) and len(b)):
        raise ValueError("compare: an arm has no values, so there is no difference of means.")
    return _interval(_average(a) - _average(b), [a, b], method, level)


def permutation(table: Sequence[Sequence[float]], draws: int = 10_000) -> tuple[float, float]:
    """Do columns differ?  (variance of the column means, share of row-wise orders whose variance is at least as large).

    Rows are strata (a block of a run), columns are kinds (roles of layers): if kinds did not matter, the numbers of a
    row could stand in any order.  Where there are no more orders than `draws`, each is tried once and the share is
    exact; else `draws` seeded shuffles are, and the share is at least 1 / (draws + 1).
    ValueError for rows of unlike length or fewer than two columns.
    """
    if not len(table) or len(table[0]) < 2 or len({len(row) for row in table}) > 1:
        raise ValueError("permutation: wanted rows of one length, with two columns or more.")

    def spread(*columns, axis):
        return np.var(np.stack([column.mean(axis=axis) for column in columns]), axis=0, ddof=1)

    columns = np.asarray(table, dtype=float).T                      # (columns, rows)
    found = stats.permutation_test(list(columns), spread, permutation_type="samples", alternative="greater",
                                   n_resamples=draws, rng=np.random.default_rng(0))
    return float(found.statistic), float(found.pvalue)


def half_width(sd: float, n: int, level: float = 0.95) -> float:
    """Half of the width that a t interval of n values with standard deviation sd has: quantile times sd / sqrt(n)."""
    return float(stats.t.ppf((1 + level) / 2, n - 1)) * sd / math.sqrt(n)


def p_value(a: Sequence[float], b: Sequence[float] | None, low: float, high: float) -> float | None:
    """1 minus the level of the widest t interval of mean(a), or of mean(a) - mean(b), that stays within (low, high).

    Below 0.05 exactly where the 95 % interval obeys the rule; 1 where the value itself breaks it.  With two finite ends
    these are two one-sided tests (Schuirmann 1987), with one it is a t test against that end, two-sided.  b given: Welch's
    test.  None where a test has nothing to go by: fewer than two values, or no spread.
    """
    sides = [np.asarray(x, dtype=float) for x in (a, b) if x is not None]
    if min(map(len, sides)) < 2 or not all(np.isfinite(x).all() for x in sides) or not sum(x.var() for x in sides):
        return None

    def beyond(end, alternative):
        if not math.isfinite(end):
            return 0.0
        if b is None:
            return float(stats.ttest_1samp(sides[0], end, alternative=alternative).pvalue)
        return float(stats.ttest_ind(sides[0] - end, sides[1], equal_var=False, alternative=alternative).pvalue)

    return min(1.0, 2 * max(beyond(low, "greater"), beyond(high, "less")))


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's (1979) adjusted p-values, in the order given: that any below 0.05 is wrong happens once in twenty.  -> (n,)"""
    p = np.asarray(p, dtype=float)                                  # (n,)
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(1.0, steps)[np.argsort(order, kind="stable")]


def benjamini_hochberg(p: Sequence[float]) -> np.ndarray:
    """Benjamini and Hochberg's (1995) adjusted p-values: of those below 0.05 one in twenty may be wrong.  -> (n,)"""
    return stats.false_discovery_control(p, method="bh")


def _average(x: np.ndarray) -> float:
    return math.fsum(x) / len(x)                                    # rounded once: the same on every machine


def _interval(value: float, sides: list[np.ndarray], method: str, level: float) -> Interval:
    """The interval of a mean (one side) or of a difference of means (two)."""
    n = min(map(len, sides))
    if method not in METHODS:
        raise ValueError(f"interval {method!r} is not known; there are {' and '.join(map(repr, METHODS))}.")
    if n < 2:
        return Interval(value, None, None, n)
    if method == "bootstrap":
        def draw(*parts, axis):
            means = [part.mean(axis=axis) for part in parts]
            return means[0] - means[1] if len(means) == 2 else means[0]
        found = stats.bootstrap(sides, draw, n_resamples=RESAMPLES, confidence_level=level, method="percentile",
                                rng=np.random.default_rng(0)).confidence_interval
        return Interval(value, float(found.low), float(found.high), n)
    if not math.isfinite(value):                                    # a run diverged: nothing is known
        return Interval(value, math.nan, math.nan, n)
    shares = [x.var(ddof=1) / len(x) for x in sides]                # of the variance of the value
    if sum(shares) == 0:                                            # every seed says the same: an interval of one point
        return Interval(value, value, value, n)
    df = sum(shares) ** 2 / sum(s ** 2 / (len(x) - 1) for s, x in zip(shares, sides, strict=True))  # Welch; one side: n - 1
    half = float(stats.t.ppf((1 + level) / 2, df)) * math.sqrt(sum(shares))
    return Interval(value, value - half, value + half, n)
