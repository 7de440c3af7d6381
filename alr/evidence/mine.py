"""One's own runs against the book's: `python -m alr.claims --mine a.jsonl b.jsonl --suite equal_shakespeare`.  No torch.

The rule is the book's own: runs are paired by seed, hence by batches, and a difference is decided when its 95 % interval
lies on one side of zero.  What is not comparable is refused: another text, other tokens, another validation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from .records import RecordError, Runs, merge, read, runs, tables
from .stats import compare

LIKE = {        # what must be equal for two losses to be compared, as columns of `provenance`
    "corpus.fingerprint": "text", "config.steps_per_epoch": "steps per epoch", "config.epochs": "epochs",
    "config.batch_size": "sequences per step", "config.block_size": "tokens per sequence",
    "config.eval_tokens": "validation tokens", "config.end_tokens": "tokens of the final losses"}


def logs(paths: Sequence[str | Path]) -> Runs:
    """Finished logs of alr.train as the runs of one arm called "mine".

    FileNotFoundError; RecordError for a log that was cut off or edited, and for two of one seed.
    """
    made = []
    for i, path in enumerate(paths):
        lines = read(path)
        if lines[-1]["kind"] != "end":
            raise RecordError(f"{path}: no `end` line, so the run did not finish; resume it first.")
        made.append(tables({f"{i}: {path}": [{**lines[0], "name": "mine"}, *lines[1:]]}, "mine"))
    mine = merge(*made)
    seeds = mine.ends["seed"].tolist()
    if len(set(seeds)) < len(seeds):
        raise RecordError(f"--mine: seeds {seeds}; wanted one run for each seed.")
    return mine


def differences(mine: Runs, suite: Runs) -> list[str]:
    """Why the runs cannot be compared with the suite's: one line per setting that differs; [] where they can."""
    out = []
    for column, words in LIKE.items():
        ours, theirs = (_values(r.provenance, column) for r in (mine, suite))
        if not ours <= theirs:
            out.append(f"{words}: yours {_said(ours)}, the suite's {_said(theirs)}")
    return out


def _values(provenance: pd.DataFrame, column: str) -> set:
    if column not in provenance:
        return {None}
    return {None if pd.isna(x) else x for x in provenance[column]}


def _said(values: set) -> str:
    return ", ".join(sorted("all" if x is None else f"{x:g}" if isinstance(x, float) else str(x) for x in values))


def score(mine: Runs, suite: Runs, metric: str = "val_loss") -> pd.DataFrame:
    """Each arm of a suite against one's own runs, by the seeds that both have; the nearest in size first.

    Columns: blocks (its block parameters as a share of mine), difference (mine minus the arm's mean), low, high, n, verdict:
    "better", "worse", "open", or "one seed".  ValueError where the runs are not comparable, or share no seed.
    """
    if unlike := differences(mine, suite):
        raise ValueError(f"--mine: these runs cannot be compared with {suite.suite}: {'; '.join(unlike)}. The command line "
                         "of a comparable run is in the first line of any of its records.")
    known = [name for name in suite.ends if name in mine.ends and pd.api.types.is_float_dtype(suite.ends[name])]
    if metric not in known:
        raise ValueError(f"--metric {metric!r} is no number that your runs and {suite.suite}'s end with; there are "
                         f"{', '.join(known)}.")
    own, rows = mine.ends.set_index("seed"), []
    for arm, ends in suite.ends.groupby("arm"):
        ends = ends.set_index("seed")
        both = own.index.intersection(ends.index)
        if both.empty or ends.loc[both, metric].isna().any() or own.loc[both, metric].isna().any():
            continue
        m = compare(own.loc[both, metric].tolist(), ends.loc[both, metric].tolist(), paired=True)
        verdict = "one seed" if m.low is None else "better" if m.high < 0 else "worse" if m.low > 0 else "open"
        rows.append({"arm": arm, "blocks": ends["params_blocks"].mean() / own["params_blocks"].mean(), "difference": m.value,
                     "low": m.low, "high": m.high, "n": m.n, "verdict": verdict})
    if not rows:
        raise ValueError(f"--mine: no arm of {suite.suite} has {metric} at your seeds, {sorted(own.index)}; it has seeds "
                         f"{sorted(set(suite.ends['seed']))}.")
    table = pd.DataFrame(rows).set_index("arm")
    return table.loc[(table["blocks"] - 1).abs().sort_values(kind="stable").index]


def report(paths: Sequence[str | Path], name: str, root: str | Path | None = None, metric: str = "val_loss") -> str:
    """The table of `score`, as text."""
    mine, suite = logs(paths), runs(name, root)
    table = score(mine, suite, metric).round({"blocks": 2, "difference": 4, "low": 4, "high": 4})
    where = f"{len(mine.ends)} run{'s' * (len(mine.ends) > 1)} of yours against {name}, {metric} in nats per token"
    return f"{where}; blocks: its block parameters as a share of yours; negative: yours is lower\n{table.to_string()}"
