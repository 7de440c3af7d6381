"""Laws of `alr.evidence.stats`: intervals hold what they promise, and the permutation test finds columns that differ."""

import math
import random

import numpy as np
import pytest
from scipy.stats import ttest_1samp, ttest_ind

from alr.evidence import stats
from alr.evidence.stats import Interval


def test_intervals_of_known_samples():
    m = stats.mean([1.0, 2.0, 3.0])
    assert m == (2.0, pytest.approx(2 - 4.3026527 / math.sqrt(3)), pytest.approx(2 + 4.3026527 / math.sqrt(3)), 3)
    assert stats.mean([2.5]) == (2.5, None, None, 1) and stats.mean([7.0, 7.0]) == (7.0, 7.0, 7.0, 2)
    # pairs that differ by exactly 1 have no spread, however much the seeds do
    a, b = [1.0, 5.0, 9.0], [2.0, 6.0, 10.0]
    assert stats.compare(a, b, paired=True) == (-1.0, -1.0, -1.0, 3)
    half = 2.7764451 * math.sqrt(32 / 3)                                        # equal variances 16, n = 3: df = 4
    assert stats.compare(a, b, paired=False) == (-1.0, pytest.approx(-1 - half), pytest.approx(-1 + half), 3)
    assert stats.compare([1.0, 2.0], [3.0], paired=False) == (-1.5, None, None, 1)


def test_equal_runs_are_no_interval_in_words():
    assert stats.mean([0.0, 0.0, 0.0]).text(".2f") == "0.00 in each of 3 runs"
    assert stats.mean([0.0, 0.0, 0.0]).text(".2f", "nats") == "0.00 nats in each of 3 runs"
    assert stats.mean([1.0]).text(".1f", "nats") == "1.0 nats" and stats.mean([1.0, 3.0]).text(".0f", "nats").endswith("] nats")
    assert stats.mean([1.0]).text(".1f") == "1.0" and stats.mean([1.0, 2.0]).text(".0f") == "2 [−5, 8]"


def test_what_has_no_interval_is_refused():
    with pytest.raises(ValueError):
        stats.compare([1.0, 2.0], [3.0], paired=True)
    for nothing in (lambda: stats.mean([]), lambda: stats.compare([], [1.0], paired=False)):
        with pytest.raises(ValueError, match="no values"):
            nothing()
    with pytest.raises(ValueError, match="'t' and 'bootstrap'"):
        stats.mean([1.0, 2.0], "students")


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_intervals_are_those_of_scipys_tests(level):
    rng = np.random.default_rng(0)
    for n, m in ((2, 2), (3, 5), (30, 4)):
        a, b = rng.normal(4, 1, n), rng.normal(3, 0.2, m)
        one, two = ttest_1samp(a, 0), ttest_ind(a, b, equal_var=False)
        assert stats.mean(a, level=level)[1:3] == pytest.approx(tuple(one.confidence_interval(level)))
        assert stats.compare(a, b, False, level=level)[1:3] == pytest.approx(tuple(two.confidence_interval(level)))


def test_a_half_width_is_that_of_the_interval():
    x = [1.0, 2.0, 4.0]
    m = stats.mean(x)
    assert stats.half_width(np.std(x, ddof=1), 3) == pytest.approx(m.high - m.value)


@pytest.mark.parametrize("b", [None, [1.1, 0.9, 1.2, 0.7]])
def test_p_is_below_5_percent_exactly_where_the_interval_obeys(b):
    a = [2.0, 2.3, 1.9, 2.1, 2.2]
    found = stats.mean(a) if b is None else stats.compare(a, b, paired=False)
    for by in (-1e-6, 1e-6):                                                    # a bar just inside, just outside
        assert (stats.p_value(a, b, found.low + by, math.inf) < 0.05) == (by < 0)
        assert (stats.p_value(a, b, -math.inf, found.high + by) < 0.05) == (by > 0)
        assert (stats.p_value(a, b, found.value - 9, found.high + by) < 0.05) == (by > 0)
    assert stats.p_value(a, b, found.value + 0.01, math.inf) == 1.0             # the value itself breaks the rule
    assert stats.p_value(a, b, found.low + 0.1, found.high + 9) > 0.05          # one end of two is enough


def test_p_of_nothing_to_go_by_is_none():
    assert stats.p_value([1.0], None, 0, 9) is None and stats.p_value([1.0, 1.0], None, 0, 9) is None
    assert stats.p_value([1.0, math.nan], None, 0, 9) is None


def test_holm_and_benjamini_hochberg_by_hand():
    p = [0.04, 0.01, 0.03, 0.005]
    # Holm, ascending: 4 x .005, 3 x .01, 2 x .03, 1 x .04 -> .02 .03 .06 .06 (never falling)
    assert stats.holm(p) == pytest.approx([0.06, 0.03, 0.06, 0.02])
    # Benjamini-Hochberg, descending: 4/4 x .04, 4/3 x .03, 4/2 x .01, 4/1 x .005 -> .04 .04 .02 .02
    assert stats.benjamini_hochberg(p) == pytest.approx([0.04, 0.02, 0.04, 0.02])
    assert stats.holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])


def test_95_percent_is_95_percent():
    rng = random.Random(0)
    for n in (2, 3, 5):
        inside = 0
        for _ in range(4000):
            m = stats.mean([rng.gauss(1, 2) for _ in range(n)])
            inside += m.low <= 1 <= m.high
        assert 0.94 < inside / 4000 < 0.96                                      # three standard errors are 0.0103


def test_a_diverged_run_has_no_interval_and_no_warning(recwarn):
    for x in ([math.nan, 1.0], [math.inf, 1.0]):
        for m in (stats.mean(x), stats.compare(x, [1.0, 2.0], paired=False)):
            assert not math.isfinite(m.value) and math.isnan(m.low) and math.isnan(m.high) and m.n == 2
    assert not recwarn.list


def test_the_bootstrap_is_the_same_twice_and_near_t_for_many_values():
    x = [math.sin(i) for i in range(60)]
    boot, t = stats.mean(x, "bootstrap"), stats.mean(x)
    assert boot == stats.mean(x, "bootstrap") and boot.value == t.value
    assert (boot.low, boot.high) == (pytest.approx(t.low, abs=0.02), pytest.approx(t.high, abs=0.02))
    apart = stats.compare(x, [v + 3 for v in x], paired=False, method="bootstrap")
    assert apart.low < -3 < apart.high and apart.high < -2.5


def test_permutation_finds_columns_that_differ_and_no_others():
    differ = [[1.0, 2.0, 9.0], [1.5, 2.5, 8.0], [0.5, 2.2, 9.5], [1.1, 1.9, 8.8]]
    seen, p = stats.permutation(differ, draws=2000)
    assert seen == pytest.approx(np.var([1.025, 2.15, 8.825], ddof=1)) and p < 0.01
    assert stats.permutation([[1.0, 2.0, 9.0], [9.0, 1.0, 2.0], [2.0, 9.0, 1.0]], draws=500)[1] == 1.0
    assert stats.permutation([[0.0, 1.0]] * 3)[1] == 2 / 8      # of the 8 orders, 2 are as extreme: exact where all are tried
    assert stats.permutation([[0.0, 1.0]] * 20, draws=5000)[1] == 1 / 5001          # never 0, however many orders there are
    with pytest.raises(ValueError, match="rows of one length"):
        stats.permutation([[1.0, 2.0], [1.0]])


def test_shuffled_noise_gives_every_share_alike():
    rng = np.random.default_rng(0)
    shares = [stats.permutation(rng.normal(size=(4, 5)), draws=200)[1] for _ in range(200)]
    assert 0.4 < np.mean(shares) < 0.6 and np.mean(np.array(shares) <= 0.05) < 0.1


def test_an_interval_is_said_in_one_format_and_with_a_true_minus():
    m = Interval(-0.0651, -0.0893, 0.041, 3)
    assert m.text(".3f") == "−0.065 [−0.089, 0.041]" and m.words("+.1f", 100) == ["−6.5", "−8.9", "+4.1"]
    assert Interval(2.0, None, None, 1).text(".1f") == "2.0"


def test_the_lengths_of_an_error_bar_lead_to_the_ends():
    m = stats.mean([1.0, 2.0, 4.0])
    (below,), (above,) = m.bar
    assert (m.value - below, m.value + above) == pytest.approx((m.low, m.high)) and stats.mean([1.0]).bar is None


@pytest.mark.parametrize("form, words", [(".3f", ["0.000", "\N{MINUS SIGN}0.001", "0.000"]),
                                         ("+.3f", ["+0.000", "\N{MINUS SIGN}0.001", "+0.000"]),
                                         (",.0f", ["0", "0", "0"]),
                                         (".2g", ["\N{MINUS SIGN}0.0004", "\N{MINUS SIGN}0.001", "0.0004"])])
def test_what_rounds_to_zero_has_no_minus(form, words):
    assert stats.Interval(-0.0004, -0.001, 0.0004, 3).words(form) == words
