"""The permutation test of `alr.stats`: it finds columns that differ, and no others."""

import pytest

from alr.evidence import stats


def test_permutation_finds_columns_that_differ_and_no_others():
    differ = [[1.0, 2.0, 9.0], [1.5, 2.5, 8.0], [0.5, 2.2, 9.5], [1.1, 1.9, 8.8]]
    seen, p = stats.permutation(differ, draws=2000)
    assert seen == pytest.approx(stats.variance([1.025, 2.15, 8.825])) and p < 0.01
    assert stats.permutation([[1.0, 2.0, 9.0], [9.0, 1.0, 2.0], [2.0, 9.0, 1.0]], draws=500)[1] == 1.0
    # two columns, three rows, always the same order: 2 of the 8 orders are as extreme
    assert stats.permutation([[0.0, 1.0]] * 3, draws=20_000)[1] == pytest.approx(2 / 8, abs=0.01)
    with pytest.raises(ValueError, match="rows of one length"):
        stats.permutation([[1.0, 2.0], [1.0]])
