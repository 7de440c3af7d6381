"""Laws of the metrics that set one run against several others."""

import math

import pandas as pd
import pytest

from alr.evidence.metrics import over_best, over_median
from alr.evidence.records import COLUMNS, Runs
from alr.evidence.register import no_difference

LOSSES = {"mine": [(2.0, 2.1), (2.0, 2.2)], "a": [(1.9, 2.3), (1.9, 2.3)], "b": [(1.5, 2.0), (2.4, 2.0)],
          "c": [(3.0, 3.0), (3.0, 3.0)]}


def suite(losses=LOSSES) -> Runs:
    rows = [{"suite": "s", "run": f"{arm}.seed{seed}", "arm": arm, "seed": seed, "val_loss": val, "test_loss": test}
            for arm, pairs in losses.items() for seed, (val, test) in enumerate(pairs)]
    return Runs("s", **{name: pd.DataFrame(rows if name == "ends" else [], columns=None if name == "ends" else columns)
                        for name, columns in COLUMNS.items()})


def own(all_runs: Runs, seed: int) -> Runs:
    ends = all_runs.ends
    return Runs("s", **{name: getattr(all_runs, name) for name in COLUMNS if name != "ends"},
                ends=ends[(ends["arm"] == "mine") & (ends["seed"] == seed)])


def test_the_best_is_chosen_by_validation_over_all_seeds_and_compared_on_test():
    runs = suite()                                          # means by validation: a 1.90, b 1.95, c 3.00
    assert over_best(own(runs, 0), runs, ["a", "b", "c"]) == pytest.approx(2.1 - 2.3)
    assert over_best(own(runs, 1), runs, ["a", "b", "c"]) == pytest.approx(2.2 - 2.3)
    assert over_best(own(runs, 0), runs, ["b", "c"]) == pytest.approx(2.1 - 2.0)
    assert over_best(own(runs, 0), runs, ["b", "c"], metric="val_loss") == pytest.approx(2.0 - 1.5)


def test_the_median_is_that_of_the_same_seed():
    runs = suite()
    assert over_median(own(runs, 0), runs, ["a", "b", "c"]) == pytest.approx(2.1 - 2.3)
    assert over_median(own(runs, 1), runs, ["a", "b"]) == pytest.approx(2.2 - 2.15)


@pytest.mark.parametrize("metric", [over_best, over_median])
def test_a_seed_that_an_opponent_lacks_has_no_number_and_an_unknown_opponent_is_named(metric):
    runs = suite(LOSSES | {"a": LOSSES["a"][:1]})
    assert math.isnan(metric(own(runs, 1), runs, ["a"])) and not math.isnan(metric(own(runs, 0), runs, ["a", "b", "c"]))
    with pytest.raises(ValueError, match="^nobody: no runs"):
        metric(own(runs, 0), runs, ["a", "nobody"])


def test_a_claim_on_them_knows_what_no_difference_is():
    assert no_difference({"single": "mine", "metric": "over_best"}) == 0.0
    assert no_difference({"single": "mine", "metric": "val_loss"}) is None
