"""Laws of `alr.evidence.tables`: a reader sees words, rounded numbers, short commits, and no clock."""

import re

import numpy as np
import pandas as pd
import pytest

from alr.evidence.tables import framed, show_frames, table

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


def test_a_frame_of_a_notebook_keeps_every_column_and_its_own_decimals():
    frame = pd.DataFrame({"loss": [4.5, 4.625], "share": [0.5, 0.25], "ms": [3.0, 12.0], "what": ["a", None],
                          "seen": [pd.NA, 3]},
                         index=["v8", "v9"]).rename_axis(columns="arm")
    html = framed(frame)
    assert cells(html, "th") == ["arm", "loss", "share", "ms", "what", "seen"]
    assert cells(html)[:5] == ["v8", "4.500", "0.50", "3", "a"] and cells(html)[-2:] == ["&ndash;", "3"]
    sizes = pd.DataFrame({"params_blocks": [297216.3333], "params_blocks_low": [297000.5], "ms": [1234.56]})
    assert cells(framed(sizes)) == ["297,216", "297,000", "1,234.6"]
    assert cells(framed(sizes), "th") == ["parameters in the blocks", "95 %: from", "ms"]
    wide = pd.DataFrame([[1, 2]], index=["x"], columns=pd.MultiIndex.from_tuples([("cut", 8), ("cut", 16)]))
    assert cells(framed(wide), "th") == ["cut, 8", "cut, 16"]
    assert frame.columns.name == "arm" and wide.columns.nlevels == 2, "the frame itself is left alone"


def test_frames_are_shown_so_in_ipython_and_nowhere_else(monkeypatch):
    from IPython.core.interactiveshell import InteractiveShell
    show_frames()                                               # no IPython runs here: nothing happens
    shell = InteractiveShell()
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    show_frames()
    data, _ = shell.display_formatter.format(pd.DataFrame({"a": [1]}))
    assert "alr-table" in data["text/html"] and "alr-table" not in data["text/plain"]
