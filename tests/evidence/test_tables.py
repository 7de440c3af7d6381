"""Laws of `alr.evidence.tables`: a reader sees words, rounded numbers, short commits, and no clock."""

import re

import numpy as np
import pandas as pd
import pytest

from alr.evidence.tables import table

COMMIT = "4f4795ee54f925b78107d52a51535829654d00cb"
FRAME = pd.DataFrame({"val_loss": [4.56789, np.nan], "params_blocks": [138496, 12], "commit": [COMMIT, "unknown"],
                      "seconds_training": [3.8, 25.0], "gain": [-0.5, 0.25], "kept": [True, False]},
                     index=pd.Index(["v10", "a < b"], name="arm"))


def cells(html, name="td"):
    return [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(rf"<{name}[ >].*?</{name}>", html)]


def test_columns_have_words_and_values_are_rounded():
    html = table(FRAME, names={"gain": "gain (nats)"}, digits={"val_loss": 2})
    assert [h.split(">")[-1] for h in cells(html, "th")] == [
        "arm", "validation loss (nats)", "parameters in the blocks", "commit", "gain (nats)", "kept"]
    assert [c.split(">")[-1] for c in cells(html)] == [
        "v10", "4.57", "138,496", "4f4795e", "−0.500", "yes", "a &lt; b", "&ndash;", "12", "unknown", "0.250", "no"]


def test_a_clock_is_shown_only_where_it_is_asked_for():
    assert "25.0" not in table(FRAME, digits=1) and "25.0" in table(FRAME, digits=1, clock=True)
    for column in ("seconds", "seconds_adaptation", "time_sec", "tokens_per_s", "ms"):
        assert column.replace("_", " ") not in table(pd.DataFrame({column: [1.0], "steps": [3]}))
    assert "times moved" in table(pd.DataFrame({"times_moved": [1]}))


def test_an_index_that_only_counts_is_no_column():
    assert cells(table(pd.DataFrame({"n": [3]})), "th") == ["seeds"]
    two = FRAME.reset_index().set_index(["arm", "kept"])[["gain"]]
    assert cells(table(two), "th") == ["arm", "kept", "gain"]


def test_a_column_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="no column 'loss'; there are arm, val_loss"):
        table(FRAME, digits={"loss": 2})
