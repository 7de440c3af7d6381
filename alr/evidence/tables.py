"""One look for tables of numbers: columns in words, rounded values, short commits.  pandas in, HTML out; no torch.

    table(records.leaderboard(runs.ends), digits={"val_loss": 3})
    show_frames()                       # in a notebook: from here on every DataFrame that a cell ends with looks like that

The pages' styles and scripts do the rest: a wide table scrolls, on a phone each row is a card.
"""

from __future__ import annotations

import numbers
import re
from collections.abc import Mapping

import pandas as pd

from .markup import DASH, Html, tag
from .stats import number

WORDS = {                               # columns of the records -> what a reader calls them
    "val_loss": "validation loss (nats)", "test_loss": "test loss (nats)",
    "train_loss": "training loss (nats)", "val_bpb": "bits per byte", "val_ppl": "perplexity", "n": "seeds",
    "params_blocks": "parameters in the blocks", "params_total": "parameters", "params_embedding": "in the embedding",
    "params_head": "in the head", "rank_mean": "mean rank", "rank_avg": "mean rank", "rank_min": "least rank",
    "rank_max": "largest rank", "flops": "FLOPs", "corpus.name": "text", "corpus.fingerprint": "its fingerprint",
    "grad_norm": "gradient norm", "lr": "learning rate",
}
CLOCK = re.compile(r"(^|_)(seconds|time|ms)(_|$)|tokens_per_s")        # what a clock on the wall measured
COMMIT = re.compile(r"[0-9a-f]{40}")


def _word(column: object, names: Mapping[str, str]) -> str:
    name = str(column)
    ends = {"_low": "95 %: from", "_high": "to"}                # the two ends of the interval beside it
    return names.get(name) or WORDS.get(name) or next((w for e, w in ends.items() if name.endswith(e)), name.replace("_", " "))


def _cell(value: object, digits: int) -> Html:
    """A value as a reader wants it: a dash for nothing, yes and no, thousands apart, seven digits of a commit."""
    if value is None or value is pd.NA or (isinstance(value, float) and pd.isna(value)):
        return tag("td", DASH)
    if isinstance(value, bool) or type(value).__name__ == "bool_":
        return tag("td", "yes" if value else "no")
    if isinstance(value, numbers.Integral):
        return tag("td", number(int(value), ","), class_="alr-number")
    if isinstance(value, numbers.Real):
        return tag("td", number(float(value), f",.{digits}f"), class_="alr-number")
    if isinstance(value, Html):
        return tag("td", value)
    return tag("td", COMMIT.sub(lambda hit: hit[0][:7], str(value)))


def table(frame: pd.DataFrame, names: Mapping[str, str] | None = None, digits: int | Mapping[str, int] = 3,
          clock: bool = False) -> Html:
    """A frame as one table: its index first (unless it only counts rows), then its columns, named, rounded, shortened.

    names: column -> words, where WORDS has none or others.  digits: decimals of floats, for all or by column (3 for those
    left out).  clock: keep columns of wall-clock time; a page that runs anew has other ones each time, so it leaves them
    out.  ValueError for names or digits of columns that are not there.
    """
    names, by = dict(names or {}), digits if isinstance(digits, Mapping) else {}
    usual = digits if isinstance(digits, int) else 3
    counts = isinstance(frame.index, pd.RangeIndex) and frame.index.name is None
    frame = frame if counts else frame.reset_index(names=[n or "" for n in frame.index.names])
    unknown = sorted({*names, *by} - set(map(str, frame.columns)))
    if unknown:
        raise ValueError(f"table: no column {', '.join(map(repr, unknown))}; there are {', '.join(map(str, frame.columns))}.")
    columns = [c for c in frame.columns if clock or not CLOCK.search(str(c))]
    head = tag("tr", *(tag("th", _word(c, names), scope="col") if str(c) else tag("td") for c in columns))
    rows = [tag("tr", *(_cell(value, by.get(str(c), usual)) for c, value in zip(columns, row, strict=True)))
            for row in frame[columns].astype(object).itertuples(index=False)]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *rows), class_="alr-table"), class_="alr-html")


def decimals(column: pd.Series, most: int = 3) -> int:
    """How many decimals a column is shown with: what it was rounded to, `most` at most, one above 1,000, none above 10,000."""
    found = [float(x) for x in column if isinstance(x, numbers.Real) and pd.notna(x)]
    largest = max((abs(x) for x in found), default=0.0)
    most = min(most, 0 if largest >= 1e4 else 1 if largest >= 1e3 else most)
    return next((d for d in range(most) if all(round(x, d) == round(x, most) for x in found)), most)


def framed(frame: pd.DataFrame) -> Html:
    """A frame as a cell of a notebook shows it: every column, as many decimals as it was rounded to.

    Columns of several levels become one ("spectrum, 8"); the name of the columns stands above an index without a name.
    """
    flat = frame.copy()
    flat.columns = [", ".join(map(str, c)) if isinstance(c, tuple) else str(c) for c in frame.columns]
    if flat.index.nlevels == 1 and flat.index.name is None and frame.columns.nlevels == 1 and frame.columns.name:
        flat.index = flat.index.rename(str(frame.columns.name))
    return table(flat, digits={c: decimals(flat[c]) for c in flat.columns if flat.columns.tolist().count(c) == 1}, clock=True)


def show_frames() -> None:
    """Let IPython show every DataFrame as `framed` does.  Outside of IPython nothing happens: there is nothing to show."""
    try:
        from IPython import get_ipython
    except ImportError:
        return
    shell = get_ipython()
    if shell is not None:
        shell.display_formatter.formatters["text/html"].for_type(pd.DataFrame, lambda frame: str(framed(frame)))
