"""What the evidence pages show, as HTML: the register of claims, the leaderboard, where numbers come from.  No torch.

    claims_table()                              # every claim of data/claims.json, by chapter
    leaderboard(runs("evolution"), dense="dense")
    provenance_footer("evolution", "leak")      # the last cell of a chapter: the records that it drew from

Each returns `Html`, which a notebook shows as it is; what a record, a register or a suite says is escaped in it.
The look stands in book/_static/alr.css, sorting in sort.js; without them (JupyterLab) the tables are plain and complete.
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from . import archive, records
from .claims import condition, phrase, read
from .markup import BR, DASH, GAP, VERDICTS, Html, join, pill, tag
from .paths import NOTEBOOKS, RUNS
from .records import Runs, natural, one_per_seed, runs
from .register import named
from .stats import Interval, benjamini_hochberg, compare, holm, mean

NOTHING = "not recorded yet"


def _cell(*content: object, **attributes: object) -> Html:
    return tag("td", *content, **attributes)


def _number_cell(*content: object, **attributes: object) -> Html:
    return tag("td", *content, **attributes, class_="alr-number")


def _quiet(*content: object) -> Html:
    return tag("span", *content, class_="alr-quiet")


def _row(*cells: Html, **attributes: object) -> Html:
    return tag("tr", *cells, **attributes)


def _table(heads: Sequence[str], rows: Sequence[Html], kind: str = "") -> Html:
    head = tag("thead", _row(*(tag("th", h, scope="col") for h in heads)))
    return tag("div", tag("table", head, tag("tbody", *rows), class_=f"alr-table {kind}"), class_="alr-html")


def bullets(items: Mapping[str, str]) -> Html:
    """A list of name: words."""
    return tag("ul", *(tag("li", tag("b", name), ": ", words) for name, words in items.items()), class_="alr-html")


def caption(words: str) -> Html:
    """What a figure shows, below it, where one cell draws several; a cell with one figure has its caption in its metadata."""
    return tag("p", words, class_="alr-caption")


def recorded(name: str, root: str | Path | None = None) -> Runs | None:
    """The records of a suite, or None when there are none yet.  RecordError as `records.runs`."""
    folder = Path(root or RUNS) / name
    return runs(name, root) if any(folder.glob("*.jsonl")) else None


# ----------------------------------------------------------------------------------------------------- claims

def title(chapter: str) -> Html | str:
    """A chapter as a link with its title; its file name where it is not written yet."""
    path = NOTEBOOKS / f"{chapter}.ipynb"
    if not path.exists():
        return chapter
    first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]).split("\n")[0]
    return tag("a", first.lstrip("# "), href=f"{chapter}.html")


def _claim_row(key: str, c: dict, marks: Sequence[str] = ()) -> Html:
    note = [BR, _quiet(c["note"])] if c["note"] and c["n"] else []
    value = [DASH]
    if c["value"] is not None:                  # value, interval and unit, each on a line
        number, _, interval = phrase(c).partition(" ")
        value = [number, BR, _quiet(join(filter(None, [interval, c["unit"]]), BR))]
    seeds = f"seeds {', '.join(map(str, c['seeds']))}" if c["seeds"] else None
    return _row(
        _cell(c["text"], BR, tag("code", key, class_="alr-key"), *note, id=f"claim-{key}"),
        _cell(condition(c) or DASH, class_="alr-rule"),
        _number_cell(*value, title=c["source"]),
        _number_cell(c["n"] or DASH, title=seeds),
        _cell(pill(c["verdict"]), *(x for mark in marks for x in (BR, _quiet(mark)))))


def marks(claims: Mapping[str, dict], register: Mapping[str, dict]) -> dict[str, list[str]]:
    """What a reader of a verdict has to know beside it, by key: that its records are of earlier code (data/archive.toml), that
    it holds among all others by a correction."""
    old = {name: set(archive.arms(name)) for c in register.values() for name in named(c)}
    found = {k: ["earlier code"] for k, c in register.items()
             if any(old[name] & set(c.get("arms") or [c["single"]]) for name in named(c))}
    tested = [k for k, c in claims.items() if c.get("p") is not None]
    for name, correct in (("holds by Holm", holm), ("holds by Benjamini-Hochberg", benjamini_hochberg)):
        for k, p in zip(tested, correct([claims[k]["p"] for k in tested]) if tested else []):
            if p < 0.05 and "holds by Holm" not in found.get(k, []):
                found.setdefault(k, []).append(name)
    return found


def claims_table(claims: Mapping[str, dict] | None = None, beside: Mapping[str, Sequence[str]] | None = None) -> Html:
    """What claims.json says, by chapter: claim and key, the rule fixed beforehand, value and 95 % interval, runs, verdict.

    Claims come first, then the figures that the chapter's text quotes.  The source of a value is its tooltip.
    beside: `marks`, small below the verdicts.
    """
    claims, rows = read() if claims is None else claims, []
    for chapter in sorted({c["chapter"] for c in claims.values()}, key=natural):
        mine = {k: c for k, c in claims.items() if c["chapter"] == chapter}
        rows.append(_row(tag("th", title(chapter), colspan=5, scope="rowgroup"), class_="alr-chapter"))
        rows += [_claim_row(k, mine[k], (beside or {}).get(k, ())) for k in sorted(mine, key=lambda k: mine[k]["rule"] is None)]
    return _table(["claim", "rule", "value [95 %]", "runs per arm", "verdict"], rows, "alr-claims")


def tally(claims: Mapping[str, dict] | None = None) -> Html:
    """How many claims got which verdict."""
    claims = read() if claims is None else claims
    count = {v: sum(c["verdict"] == v for c in claims.values() if c["rule"]) for v in VERDICTS}
    words = [join([n, GAP, pill(v)]) for v, n in count.items() if n]
    return tag("div", join(words, Html(" &nbsp; ")), class_="alr-html alr-tally")


def together(claims: Mapping[str, dict] | None = None, level: float = 0.05) -> dict[str, int]:
    """What is left of the claims that hold when all are asked at once: counts, by name.

    tested: claims with a rule and a t test (`stats.p_value`).  hold: those of them that hold one by one, at `level`.
    Holm: those that hold when not even one of all may do so by chance, but with a chance of `level`.
    Benjamini-Hochberg: those that hold when a share of `level` of them is expected to do so by chance.
    """
    claims = read() if claims is None else claims
    p = [c["p"] for c in claims.values() if c.get("p") is not None]
    if not p:
        return {"tested": 0, "hold": 0, "Holm": 0, "Benjamini-Hochberg": 0}
    return {"tested": len(p), "hold": sum(x < level for x in p), "Holm": int((holm(p) < level).sum()),
            "Benjamini-Hochberg": int((benjamini_hochberg(p) < level).sum())}


# ------------------------------------------------------------------------------------------------ leaderboard

def _number(m: Interval, form: str, scale: float = 1.0, sign: bool = False) -> Html:
    """A mean as a sortable cell, its interval small below; a dash where there is none."""
    if not math.isfinite(m.value):
        return _waiting(DASH)
    value, low, high = m.words(("+" if sign else "") + form, scale)
    small = [] if low is None or low == high else [BR, _quiet(f"[{low}, {high}]")]
    return _number_cell(value, *small, data_sort=f"{m.value:.9g}")


def _waiting(content: object) -> Html:
    return _number_cell(content, data_sort="")


def leaderboard(suite: Runs | None, dense: str = "dense", about: Mapping[str, str] | None = None,
                waiting: Sequence[str] = ()) -> Html:
    """A sortable table: one row per arm, best first; means over seeds, and 95 % intervals of the losses.

    "against" is the difference of validation losses, paired by seed: runs of a suite share batches and their order.
    blocks: parameters at the end, in thousands; TFLOP: counted over the run; s: seconds of training and adaptation.
    about: arm -> a few words.  waiting: arms without a record, named in rows of their own.
    """
    heads = ["arm", "loss (nats)", f"against {dense}", *"bits per byte|blocks (k)|mean rank|TFLOP|s|seeds".split("|")]
    rows, arms = [], []
    if suite is not None:
        ends = one_per_seed(suite.ends)
        arms = [(mean(group["val_loss"]).value, arm, group.set_index("seed")) for arm, group in ends.groupby("arm")]
    by_name = {arm: group for _, arm, group in arms}
    for _, arm, group in sorted(arms, key=lambda a: a[:2]):
        gap = Interval(math.nan, None, None, 0)
        both = group.index.intersection(by_name[dense].index) if dense in by_name and dense != arm else []
        if len(both):
            gap = compare(*([*g.loc[both, "val_loss"]] for g in (group, by_name[dense])), paired=True)
        words = [BR, _quiet(about[arm])] if about and arm in about else []
        rows.append(_row(
            _cell(tag("b", arm), *words, data_sort=arm),
            _number(mean(group["val_loss"]), ".3f"), _number(gap, ".3f", sign=True),
            *(_number(Interval(mean(group[column]).value, None, None, 0), form, scale) for column, form, scale in (
                ("val_bpb", ".3f", 1), ("params_blocks", ".0f", 1e-3), ("rank_mean", ".1f", 1), ("flops", ".2f", 1e-12),
                ("seconds", ".0f", 1))),
            _number_cell(len(group), data_sort=len(group))))
    for arm in waiting:
        rows.append(_row(_cell(tag("b", arm), data_sort=arm), _cell(NOTHING, data_sort="", class_="alr-quiet"),
                         _cell(data_sort=""), *(_waiting(DASH) for _ in heads[3:])))
    return _table(heads, rows, "alr-sortable")


# ------------------------------------------------------------------------------------------------- provenance

def _all(table: pd.DataFrame, *columns: str) -> str:
    """The values of some columns, each combination once, natural order."""
    rows = table.reindex(columns=list(columns)).astype(object)
    found = {", ".join(f"{c.rsplit('.', 1)[-1]} {v}" if c.endswith(("threads", "precision")) else str(v)
                       for c, v in zip(columns, row, strict=True) if pd.notna(v)) for row in rows.itertuples(index=False)}
    return "; ".join(sorted(found, key=natural)) or "unknown"


def _commit(p: pd.DataFrame) -> str:
    """The commits of some runs, short, with the hash over the package where git knew none or knew of changes."""
    def one(row):
        commit, dirty = row.get("commit"), row.get("dirty")
        source = f" (package {str(row.get('source'))[:7]})"
        if not isinstance(commit, str):
            return "unknown" + source
        return commit[:7] + (" with local changes" + source if dirty is True or str(dirty) == "True" else "")
    return ", ".join(sorted({one(row) for _, row in p.iterrows()}))


def provenance_footer(*used: Runs | str | object, root: str | Path | None = None) -> Html:
    """Where a page's numbers come from: for the last cell of a chapter.

    used: Runs (perhaps cut by `of`), names of suites, or live runs (what alr.lab.train returns: anything with a
    `log`), which share a row.  A suite without records says so.  Commit, device, processor, seeds, torch and corpus
    fingerprint are read from the `run` lines; a live run's code is the checkout that the page came from.
    """
    live = {f"live {i}": item.log for i, item in enumerate(used) if hasattr(item, "log")}
    named = [(item, recorded(item, root)) if isinstance(item, str) else (item.suite, item)
             for item in used if not hasattr(item, "log")]
    rows = []
    for name, suite in [*named, *([("", records.tables(live, ""))] if live else [])]:
        where = tag("b", name) if name else "live, on this page"
        if suite is None or suite.provenance.empty:
            rows.append(_row(_cell(where), _cell(NOTHING, colspan=5, class_="alr-quiet")))
            continue
        p = suite.provenance
        seeds = ", ".join(map(str, sorted(p["seed"].unique())))
        what = f'{"; ".join(suite.arms)}: {len(p)} run{"s" * (len(p) > 1)}, seed{"s" * ("," in seeds)} {seeds}'
        software = join([f"torch {_all(p, 'torch')}", f"Python {_all(p, 'python')}"], BR)
        rows.append(_row(*map(_cell, [
            where, what, _commit(p) if name else "of this page", _all(p, "device", "processor", "threads"),
            software, _all(p, "corpus.name", "corpus.fingerprint")])))
    heads = ["records", "runs", "commit", "device", "software", "corpus, fingerprint"]
    return tag("div", tag("p", tag("b", "Where the numbers come from")), _table(heads, rows), class_="alr-provenance")


def clock(seconds: float) -> str:
    """Seconds for a reader: 95 -> '95 s', 4000 -> '1.1 h'."""
    size, unit = (1, "s") if seconds < 120 else (60, "min") if seconds < 5400 else (3600, "h")
    return f"{seconds / size:.{int(size == 3600)}f} {unit}"


def suites(planned: Mapping[str, int], root: str | Path | None = None) -> Html:
    """How every suite was recorded: the command, runs there of runs planned, how long they took, on what.

    planned: suite -> number of runs.  A run's time is its `end` line's: training, evaluation and adaptation.
    """
    rows = []
    for name, wanted in planned.items():
        suite = recorded(name, root)
        command = tag("code", f"make runs SUITE={name}")
        if suite is None:
            rows.append(_row(_cell(command), _number_cell(f"0 of {wanted}"), _cell(NOTHING, colspan=4, class_="alr-quiet")))
            continue
        p, each = suite.provenance, suite.ends[["seconds", "seconds_evaluation"]].sum(axis=1)
        started = pd.to_datetime(p["started"], utc=True)
        when = " to ".join(sorted({f"{day:%Y-%m-%d}" for day in (started.min(), started.max())}))
        rows.append(_row(
            _cell(command), _number_cell(f"{len(each)} of {wanted}"),
            _number_cell(clock(each.median()), BR, _quiet(f"{clock(each.min())} to {clock(each.max())}")),
            _number_cell(clock(each.sum())),
            _cell(_all(p, "device", "processor", "threads")),
            _cell(join([when, f"commit {_commit(p)}", f"torch {_all(p, 'torch')}"], BR))))
    heads = ["command", "runs", "one run: median, range", "all, one after the other", "on", "when, code"]
    return _table(heads, rows)


def _count(x: object) -> str:
    """A count of a record: 12,345; ? where it has none."""
    return "?" if pd.isna(x) else f"{int(x):,}" if isinstance(x, numbers.Real) else str(x)


def corpora(names: Sequence[str], root: str | Path | None = None) -> Html:
    """The texts behind the records of some suites: fingerprint, vocabulary, tokens and bytes of each split."""
    used: dict[tuple, list[str]] = {}
    for name in names:
        suite = recorded(name, root)
        if suite is not None:
            columns = [f"corpus.{c}" for c in ("name", "level", "vocab", "fingerprint")]
            columns += [f"corpus.{c}.{split}" for c in ("tokens", "bytes") for split in ("train", "valid", "test")]
            for row in suite.provenance.reindex(columns=columns).drop_duplicates().itertuples(index=False):
                used.setdefault(tuple(row), []).append(name)
    rows = []
    for (corpus, level, vocab, fingerprint, *sizes), suites_ in used.items():
        counts = [" / ".join(map(_count, part)) for part in (sizes[:3], sizes[3:])]
        rows.append(_row(
            _cell(tag("b", corpus), f", {_count(vocab)} {level}s"), _cell(tag("code", fingerprint)),
            *map(_cell, counts), _cell(", ".join(suites_))))
    heads = ["text", "fingerprint", "tokens: train / valid / test", "bytes: train / valid / test", "suites"]
    return _table(heads, rows or [_row(_cell(NOTHING, colspan=5, class_="alr-quiet"))])
