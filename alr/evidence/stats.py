"""Intervals over a handful of seeds.  Standard library only, and every sum is exact (`math.fsum`): another machine gets
the same digits.

    mean([4.41, 4.43, 4.46])                        # Interval(value=4.4333, low=4.3708, high=4.4958, n=3)
    compare(ours, theirs, paired=True)              # of the mean difference ours - theirs

Three seeds are few, and a t interval says so: its half width is then 4.30 standard errors, not 1.96.
"""

from __future__ import annotations

import math
import random
from functools import lru_cache
from typing import NamedTuple, Sequence

METHODS = ("t", "bootstrap")
RESAMPLES = 10_000                      # bootstrap means (ours)
SMALL = 1e-300                          # stands for a zero in the continued fraction (Numerical Recipes, sec. 6.4)


class Interval(NamedTuple):
    """A mean and where it may lie.  low and high are None where n < 2: one number has no interval."""

    value: float
    low: float | None
    high: float | None
    n: int


# --------------------------------------------------------------------------------------------------- Student's t

def beta_share(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (Lentz; DLMF 8.17.22)."""
    if not 0 < x < 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):                                   # the fraction converges fast only below
        return 1 - beta_share(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    d = 1 / (1 - (a + b) * x / (a + 1) or SMALL)
    c, fraction = 1.0, d
    for k in range(1, 1000):
        for term in (k * (b - k) * x / ((a + 2 * k - 1) * (a + 2 * k)),
                     -(a + k) * (a + b + k) * x / ((a + 2 * k) * (a + 2 * k + 1))):
            d, c = 1 / (1 + term * d or SMALL), 1 + term / c or SMALL
            fraction *= d * c
        if abs(d * c - 1) < 1e-15:
            return front * fraction
    raise ArithmeticError(f"beta_share: no convergence at x = {x}, a = {a}, b = {b}.")


def t_cdf(t: float, df: float) -> float:
    """P(T <= t) for Student's t with df degrees of freedom, which need not be whole."""
    tail = 0.5 * beta_share(df / (df + t * t), df / 2, 0.5)         # P(T > |t|)
    return 1 - tail if t > 0 else tail


@lru_cache
def t_quantile(p: float, df: float) -> float:
    """The t with t_cdf(t, df) = p, by bisection, to 12 digits.  ValueError unless 0 < p < 1 and df > 0."""
    if not (0 < p < 1 and df > 0):
        raise ValueError(f"t_quantile: p = {p}, df = {df}; wanted 0 < p < 1 and df > 0.")
    if p < 0.5:
        return -t_quantile(1 - p, df)
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p:
        high *= 2
    while high - low > 1e-14 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return float(f"{high:.12g}")                                    # lgamma's last digit differs between machines


# ----------------------------------------------------------------------------------------------------- intervals

def average(x: Sequence[float]) -> float:
    """The mean of x, rounded once."""
    return math.fsum(x) / len(x)


def variance(x: Sequence[float]) -> float:
    """The sample variance of x, with n - 1."""
    centre = average(x)
    return math.fsum((v - centre) ** 2 for v in x) / (len(x) - 1)


def around(value: float, error: float, df: float, n: int, level: float) -> Interval:
    """value -+ t * error."""
    half = t_quantile((1 + level) / 2, df) * error if error > 0 else 0.0
    return Interval(value, value - half, value + half, n)


def resampled(draw, value: float, n: int, level: float) -> Interval:
    """Percentile bootstrap: the middle `level` of RESAMPLES draws.  Seeded, so that it is the same everywhere."""
    rng = random.Random(0)
    means = sorted(draw(rng) for _ in range(RESAMPLES))
    cut = round((1 - level) / 2 * RESAMPLES)
    return Interval(value, means[cut], means[-1 - cut], n)


def mean(x: Sequence[float], method: str = "t", level: float = 0.95) -> Interval:
    """The mean of x over seeds, with a t interval, or by method="bootstrap".

    The percentile bootstrap is too narrow for few seeds (it cannot leave the range of the values): t is the default.
    ValueError for an empty x or an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"interval {method!r} is not known; there are 't' and 'bootstrap'.")
    x, n = list(x), len(x)
    if n == 0:
        raise ValueError("mean: no values, so no mean.")
    value = average(x)
    if n < 2:
        return Interval(value, None, None, n)
    if method == "bootstrap":
        return resampled(lambda rng: average(rng.choices(x, k=n)), value, n, level)
    return around(value, math.sqrt(variance(x) / n), n - 1, n, level)


def permutation(table: Sequence[Sequence[float]], draws: int = 10_000) -> tuple[float, float]:
    """Do columns differ?  (variance of the column means, share of row-wise shuffles whose variance is at least as large).

    Rows are strata (a block of a run), columns are kinds (roles of layers): if kinds did not matter, the numbers of a
    row could stand in any order.  Seeded, so that it is the same everywhere; the share is at least 1 / (draws + 1).
    ValueError for rows of unlike length or fewer than two columns.
    """
    rows = [list(row) for row in table]
    if not rows or len(rows[0]) < 2 or len({len(row) for row in rows}) > 1:
        raise ValueError("permutation: wanted rows of one length, with two columns or more.")
    def spread():
        return variance([average(column) for column in zip(*rows)])
    seen, rng, hits = spread(), random.Random(0), 1
    for _ in range(draws):
        for row in rows:
            rng.shuffle(row)
        hits += spread() >= seen * (1 - 1e-12)
    return seen, hits / (draws + 1)


def compare(a: Sequence[float], b: Sequence[float], paired: bool, method: str = "t", level: float = 0.95) -> Interval:
    """mean(a) - mean(b), with its interval.

    paired: a[i] and b[i] share a seed, so the interval is that of their differences; runs on the same batches in one
    order lose much of their noise that way.  Otherwise Welch's (1947) t, whose variances need not be equal; n is then
    the smaller of the two counts.  ValueError when paired arms are of unequal length.
    """
    if paired:
        return mean([x - y for x, y in zip(a, b, strict=True)], method, level)
    value, n = mean(a, method, level).value - mean(b, method, level).value, min(len(a), len(b))
    if n < 2:
        return Interval(value, None, None, n)
    if method == "bootstrap":
        def draw(rng):
            return average(rng.choices(a, k=len(a))) - average(rng.choices(b, k=len(b)))
        return resampled(draw, value, n, level)
    va, vb = variance(a) / len(a), variance(b) / len(b)
    df = (va + vb) ** 2 / (va ** 2 / (len(a) - 1) + vb ** 2 / (len(b) - 1)) if va + vb > 0 else 1.0
    return around(value, math.sqrt(va + vb), df, n, level)
