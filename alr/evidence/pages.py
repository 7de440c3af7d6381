"""What the evidence pages show, as HTML: the register of claims, the leaderboard, where numbers come from.  No torch.

    register()                                  # every claim of data/claims.json, by chapter
    leaderboard(runs("evolution"), dense="dense")
    provenance_footer("evolution", "leak")      # the last cell of a chapter: the records that it drew from

Each returns `Html`, which a notebook shows as it is.  The look stands in book/_static/alr.css, sorting in sort.js;
without them (JupyterLab) the tables are plain and complete.
"""

from __future__ import annotations

import html
import json
import math
from pathlib import Path
from typing import Mapping, Sequence

import pandas as pd

from . import records
from .claims import VERDICTS, condition, phrase, read
from .records import ROOT, Runs, natural, one_per_seed, runs
from .stats import Interval, compare, mean

NOTHING = "not recorded yet"


class Html(str):
    """Text that a notebook shows as HTML; a terminal is told its size."""

    def _repr_html_(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"<{self.count('<tr')} table rows as HTML>"


def _cell(content, tag: str = "td", **attributes) -> str:
    """One cell; attributes with underscores for hyphens (data_sort -> data-sort), None leaves one out."""
    given = "".join(f' {k.strip("_").replace("_", "-")}="{html.escape(str(v))}"' for k, v in attributes.items()
                    if v is not None)
    return f"<{tag}{given}>{content}</{tag}>"


def _table(heads: Sequence[str], rows: Sequence[str], kind: str = "") -> Html:
    head = "".join(_cell(h, "th", scope="col") for h in heads)
    return Html(f'<div class="alr-html"><table class="alr-table {kind}"><thead><tr>{head}</tr></thead>'
                f'<tbody>{"".join(rows)}</tbody></table></div>')


def recorded(name: str, root: str | Path | None = None) -> Runs | None:
    """The records of a suite, or None when there are none yet.  RecordError as `records.runs`."""
    folder = Path(root or records.RUNS) / name
    return runs(name, root) if any(folder.glob("*.jsonl")) else None


# ----------------------------------------------------------------------------------------------------- claims

def pill(verdict: str) -> str:
    """A verdict in colour and words."""
    colour, tint = VERDICTS[verdict]
    return f'<span class="alr-verdict" style="color:{colour};background:{tint}">{verdict}</span>'


def title(chapter: str) -> str:
    """A chapter as a link with its title; its file name where it is not written yet."""
    path = ROOT / "notebooks" / f"{chapter}.ipynb"
    if not path.exists():
        return html.escape(chapter)
    first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]).split("\n")[0]
    return f'<a href="{chapter}.html">{html.escape(first.lstrip("# "))}</a>'


def _claim_row(key: str, c: dict) -> str:
    note = f'<br><span class="alr-quiet">{html.escape(c["note"])}</span>' if c["note"] and c["n"] else ""
    value = "&ndash;"
    if c["value"] is not None:                  # value, interval and unit, each on a line
        number, _, interval = phrase(c).partition(" ")
        below = "<br>".join(filter(None, [interval, html.escape(c["unit"])]))
        value = f'{number}<br><span class="alr-quiet">{below}</span>'
    seeds = f"seeds {', '.join(map(str, c['seeds']))}" if c["seeds"] else None
    return "<tr>" + "".join([
        _cell(f'{html.escape(c["text"])}<br><code class="alr-key">{key}</code>{note}', id=f"claim-{key}"),
        _cell(html.escape(condition(c)) or "&ndash;", class_="alr-rule"),
        _cell(value, class_="alr-number", title=c["source"]),
        _cell(c["n"] or "&ndash;", class_="alr-number", title=seeds), _cell(pill(c["verdict"]))]) + "</tr>"


def register(claims: Mapping[str, dict] | None = None) -> Html:
    """The register by chapter: claim and key, the rule fixed beforehand, value and 95 % interval, runs, verdict.

    Claims come first, then the figures that the chapter's text quotes.  The source of a value is its tooltip.
    """
    claims, rows = read() if claims is None else claims, []
    for chapter in sorted({c["chapter"] for c in claims.values()}, key=natural):
        mine = {k: c for k, c in claims.items() if c["chapter"] == chapter}
        rows.append(f'<tr class="alr-chapter">{_cell(title(chapter), "th", colspan=5, scope="rowgroup")}</tr>')
        rows += [_claim_row(k, mine[k]) for k in sorted(mine, key=lambda k: mine[k]["rule"] is None)]
    return _table(["claim", "rule", "value [95 %]", "runs per arm", "verdict"], rows, "alr-claims")


def tally(claims: Mapping[str, dict] | None = None) -> Html:
    """How many claims got which verdict."""
    claims = read() if claims is None else claims
    count = {v: sum(c["verdict"] == v for c in claims.values() if c["rule"]) for v in VERDICTS}
    return Html('<div class="alr-html alr-tally">'
                + " &nbsp; ".join(f"{n}&nbsp;{pill(v)}" for v, n in count.items() if n) + "</div>")


# ------------------------------------------------------------------------------------------------ leaderboard

def _number(m: Interval, form: str, scale: float = 1.0, sign: bool = False) -> str:
    """A mean as a sortable cell, its interval small below; a dash where there is none."""
    if not math.isfinite(m.value):
        return _cell("&ndash;", data_sort="", class_="alr-number")
    value, low, high = (None if x is None else format(x * scale, ("+" if sign else "") + form).replace("-", "−")
                        for x in m[:3])
    small = "" if low is None or low == high else f'<br><span class="alr-quiet">[{low}, {high}]</span>'
    return _cell(value + small, data_sort=f"{m.value:.9g}", class_="alr-number")


def leaderboard(suite: Runs | None, dense: str = "dense", about: Mapping[str, str] | None = None,
                waiting: Sequence[str] = ()) -> Html:
    """A sortable table: one row per arm, best first; means over seeds, and 95 % intervals of the losses.

    "against" is the difference of validation losses, paired by seed: runs of a suite share batches and their order.
    blocks: parameters at the end, in thousands; TFLOP: counted over the run; s: seconds of training and adaptation.
    about: arm -> a few words.  waiting: arms without a record, named in rows of their own.
    """
    heads = f"arm|loss (nats)|against {dense}|bits per byte|blocks (k)|mean rank|TFLOP|s|seeds".split("|")
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
        words = f'<br><span class="alr-quiet">{html.escape(about[arm])}</span>' if about and arm in about else ""
        rows.append("<tr>" + "".join([
            _cell(f"<b>{html.escape(arm)}</b>{words}", data_sort=arm),
            _number(mean(group["val_loss"]), ".3f"), _number(gap, ".3f", sign=True),
            *(_number(Interval(mean(group[column]).value, None, None, 0), form, scale) for column, form, scale in (
                ("val_bpb", ".3f", 1), ("params_blocks", ".0f", 1e-3), ("rank_mean", ".1f", 1), ("flops", ".2f", 1e-12),
                ("seconds", ".0f", 1))),
            _cell(len(group), data_sort=len(group), class_="alr-number")]) + "</tr>")
    for arm in waiting:
        blank = "".join(_cell("&ndash;", data_sort="", class_="alr-number") for _ in heads[3:])
        rows.append(f'<tr>{_cell(f"<b>{html.escape(arm)}</b>", data_sort=arm)}'
                    f'{_cell(NOTHING, data_sort="", class_="alr-quiet")}{_cell("", data_sort="")}{blank}</tr>')
    return _table(heads, rows, "alr-sortable")


# ------------------------------------------------------------------------------------------------- provenance

def _all(table: pd.DataFrame, *columns: str) -> str:
    """The values of some columns, each combination once, natural order."""
    rows = table.reindex(columns=list(columns)).astype(object)
    found = {", ".join(f"{c.rsplit('.', 1)[-1]} {v}" if c.endswith(("threads", "precision")) else str(v)
                       for c, v in zip(columns, row) if pd.notna(v)) for row in rows.itertuples(index=False)}
    return html.escape("; ".join(sorted(found, key=natural))) or "unknown"


def _commit(p: pd.DataFrame) -> str:
    """The commits of some runs, short, with the hash over the package where git knew none or knew of changes."""
    def one(row):
        commit, dirty = row.get("commit"), row.get("dirty")
        source = f" (package {str(row.get('source'))[:7]})"
        if not isinstance(commit, str):
            return "unknown" + source
        return commit[:7] + (" with local changes" + source if dirty is True or str(dirty) == "True" else "")
    return html.escape(", ".join(sorted({one(row) for _, row in p.iterrows()})))


def provenance_footer(*used: Runs | str | object, root: str | Path | None = None) -> Html:
    """Where a page's numbers come from: for the last cell of a chapter.

    used: Runs (perhaps cut by `of`), names of suites, or live runs (what alr.train.train returns: anything with a
    `log`), which share a row.  A suite without records says so.  Commit, device, processor, seeds, torch and corpus
    fingerprint are read from the `run` lines; a live run's code is the checkout that the page came from.
    """
    live = {f"live {i}": item.log for i, item in enumerate(used) if hasattr(item, "log")}
    named = [(item, recorded(item, root)) if isinstance(item, str) else (item.suite, item)
             for item in used if not hasattr(item, "log")]
    rows = []
    for name, suite in [*named, *([("", records.tables(live, ""))] if live else [])]:
        where = f"<b>{html.escape(name)}</b>" if name else "live, on this page"
        if suite is None or suite.provenance.empty:
            rows.append(f'<tr>{_cell(where)}{_cell(NOTHING, colspan=5, class_="alr-quiet")}</tr>')
            continue
        p = suite.provenance
        seeds = ", ".join(map(str, sorted(p["seed"].unique())))
        what = f'{html.escape(", ".join(suite.arms))}: {len(p)} run{"s" * (len(p) > 1)}, seed{"s" * ("," in seeds)} '
        what += seeds
        rows.append("<tr>" + "".join(map(_cell, [
            where, what, _commit(p) if name else "of this page", _all(p, "device", "processor", "threads"),
            f'torch {_all(p, "torch")}<br>Python {_all(p, "python")}', _all(p, "corpus.name", "corpus.fingerprint")]))
            + "</tr>")
    heads = ["records", "runs", "commit", "device", "software", "corpus, fingerprint"]
    return Html(f'<div class="alr-provenance"><p><b>Where the numbers come from</b></p>{_table(heads, rows)}</div>')


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
        command = f"<code>make runs SUITE={html.escape(name)}</code>"
        if suite is None:
            rows.append(f"<tr>{_cell(command)}{_cell(f'0 of {wanted}', class_='alr-number')}"
                        f"{_cell(NOTHING, colspan=4, class_='alr-quiet')}</tr>")
            continue
        p, each = suite.provenance, suite.ends[["seconds", "seconds_evaluation"]].sum(axis=1)
        started = pd.to_datetime(p["started"], utc=True)
        spread = f'<br><span class="alr-quiet">{clock(each.min())} to {clock(each.max())}</span>'
        when = " to ".join(sorted({f"{day:%Y-%m-%d}" for day in (started.min(), started.max())}))
        rows.append("<tr>" + "".join([
            _cell(command), _cell(f"{len(each)} of {wanted}", class_="alr-number"),
            _cell(clock(each.median()) + spread, class_="alr-number"), _cell(clock(each.sum()), class_="alr-number"),
            _cell(_all(p, "device", "processor", "threads")),
            _cell(f"{when}<br>commit {_commit(p)}<br>torch {_all(p, 'torch')}")]) + "</tr>")
    heads = ["command", "runs", "one run: median, range", "all, one after the other", "on", "when, code"]
    return _table(heads, rows)


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
        counts = [" / ".join("?" if pd.isna(x) else f"{int(x):,}" for x in part) for part in (sizes[:3], sizes[3:])]
        rows.append("<tr>" + "".join(map(_cell, [
            f"<b>{html.escape(str(corpus))}</b>, {vocab:,} {html.escape(str(level))}s", f"<code>{fingerprint}</code>",
            *counts, ", ".join(suites_)])) + "</tr>")
    heads = ["text", "fingerprint", "tokens: train / valid / test", "bytes: train / valid / test", "suites"]
    return _table(heads, rows or [f'<tr>{_cell(NOTHING, colspan=5, class_="alr-quiet")}</tr>'])
