"""Laws of the evidence pages: they show what the records say, and no result on them is typed by hand."""

import html
import json
import re
from collections import Counter
from html.parser import HTMLParser

import pytest
import yaml

from alr.evidence import archive, claims, pages
from alr.evidence import suite as suites
from alr.evidence.claims import compute, condition, dumps, phrase
from alr.evidence.metrics import METRICS
from alr.evidence.paths import CLAIMS_JSON, RETIRED, ROOT, RUNS, SUITES
from alr.evidence.records import natural, runs, thin, verify_digest
from alr.evidence.register import load, named
from alr.evidence.stats import Interval
from alr.evidence.sweep import recorded
from alr.evidence.verdict import Finding, Verdict
from alr.lab.log import digest

from synthetic import log, suite

LOSSES = {"dense": [4.00, 4.02, 4.04], "alr": [4.10, 4.12, 4.14], "v10": [4.3, 4.2, 4.4]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    suite(folder / "toy", LOSSES)
    return folder


# ------------------------------------------------------------------------------------------------------ the tables

def rows(page):
    return re.findall(r"<tr.*?</tr>", page)[1:]


def test_a_page_shows_html_and_prints_its_size(root):
    page = pages.leaderboard(runs("toy", root))
    assert page._repr_html_() == page and repr(page) == "<4 table rows as HTML>"
    assert page.count("<table") == page.count("</table>") == 1


def test_the_leaderboard_is_in_order_of_loss_and_pairs_by_seed(root):
    page = pages.leaderboard(runs("toy", root), dense="dense", about={"alr": "a & b"}, waiting=["v11"])
    assert [re.search(r"<b>(.*?)</b>", row)[1] for row in rows(page)] == ["dense", "alr", "v10", "v11"]
    dense, alr, v10, v11 = rows(page)
    assert '<td data-sort="4.02"' in dense and "4.020" in dense and "a &amp; b" in alr
    # paired: the difference is 0.1 at every seed, so its interval is a point although losses vary
    assert '<td data-sort="0.1" class="alr-number">+0.100</td>' in alr and "+0.280<br>" in v10
    assert pages.NOTHING in v11 and pages.NOTHING not in dense + alr + v10


def test_pages_say_what_is_not_recorded(root):
    assert pages.recorded("nothing", root) is None and pages.recorded("toy", root).suite == "toy"
    page = pages.leaderboard(None, waiting=["v1", "v2"])
    assert page.count(pages.NOTHING) == 2
    for page in (pages.provenance_footer("nothing", root=root), pages.suites({"nothing": 3}, root),
                 pages.corpora(["nothing"], root)):
        assert page.count(pages.NOTHING) == 1 and len(rows(page)) == 1
    assert "0 of 3" in pages.suites({"nothing": 3}, root)


def test_the_footer_names_commit_device_seeds_torch_and_fingerprint(root):
    class Live:
        log = [{"kind": "run", "name": "v10", "seed": 7, "torch": "2.14", "python": "3.12", "device": "cpu",
                "processor": "a chip", "threads": 2, "corpus": {"name": "pydoc", "fingerprint": "beef"}}]

    page = pages.provenance_footer("toy", runs("toy", root).of(arm=["alr", "v10"], seed=0), Live(), Live(), root=root)
    whole, part, live = rows(page)
    for words in ("alr; dense; v10: 9 runs, seeds 0, 1, 2", "0123456", "cpu, a CPU, threads 1", "torch 2.13.0",
                  "toy, f00d"):
        assert words in whole
    assert "alr; v10: 2 runs, seed 0<" in part
    for words in ("live, on this page", "v10: 2 runs, seed 7<", "of this page", "a chip", "torch 2.14", "pydoc, beef"):
        assert words in live


def test_the_times_of_a_suite_are_those_of_its_records(root):
    assert [pages.clock(x) for x in (7.4, 119, 121, 5399, 5400)] == ["7 s", "119 s", "2 min", "90 min", "1.5 h"]
    row, = rows(pages.suites({"toy": 12}, root))
    # every run: 3 epochs of 10 s, 1 s of adaptation, 5 s of evaluation
    assert "9 of 12" in row and ">36 s<" in row and f">{pages.clock(9 * 36)}<" in row and "2026-01-01" in row


def test_the_register_has_a_row_a_claim_with_rule_value_and_verdict(root):
    claim = {"text": "alr < v10.", "suite": "toy", "metric": "val_loss", "arms": ["alr", "v10"], "paired": True,
             "rule": "<", "threshold": 0.5, "chapter": "99_none", "unit": "nats"}
    figure = {k: claim[k] for k in ("suite", "metric", "unit", "chapter")} | {"text": "A figure.", "single": "alr"}
    found = compute({"figure": figure, "key": claim, "lost": claim | {"suite": "nothing"}}, root)
    page = pages.claims_table(found)
    chapter, first, lost, last = rows(page)
    assert "99_none" in chapter and "alr &lt; v10." in first and "&lt; 0.5" in first and ">holds</span>" in first
    assert "−0.180<br>" in first and "nats" in first and 'title="seeds 0, 1, 2"' in first
    assert ">not recorded</span>" in lost and "A figure." in last and ">figure</span>" in last
    words = re.sub("<[^>]*>", "", pages.tally(found))
    assert words == "1&nbsp;holds &nbsp; 1&nbsp;not recorded"


def test_a_verdict_says_what_stands_beside_it():
    """Records of earlier code, and the corrections under which it holds: as many as the counts say."""
    register, found = load(), claims.read()
    marks = pages.marks(found, register)
    old = {(one.suite, arm) for one in archive.load() for arm in one.arms}
    earlier = {k for k, words in marks.items() if "earlier code" in words}
    assert earlier == {k for k, c in register.items() for name in named(c)
                       if any((name, arm) in old for arm in c.get("arms") or [c["single"]])} and len(earlier) > 10
    left, words = pages.together(found), [word for mark in marks.values() for word in mark]
    assert words.count("holds by Holm") == left["Holm"]
    assert words.count("holds by Holm") + words.count("holds by Benjamini-Hochberg") == left["Benjamini-Hochberg"]
    assert pages.claims_table(found, marks).count("earlier code") == len(earlier)


def test_what_is_left_of_many_claims():
    claims = {str(i): {"p": p} for i, p in enumerate([0.04, 0.01, 0.03, 0.005, None])}
    assert pages.together(claims) == {"tested": 4, "hold": 4, "Holm": 2, "Benjamini-Hochberg": 4}
    assert pages.together({"a": {"p": None}}) == {"tested": 0, "hold": 0, "Holm": 0, "Benjamini-Hochberg": 0}


EVIL = """<img src=x onerror=alert(1)>&lt;b&gt;"'></td><script>alert(1)</script>"""
OURS = {"a", "b", "br", "code", "div", "em", "li", "p", "span", "table", "tbody", "td", "th", "thead", "tr", "ul"}


class Reader(HTMLParser):
    """Elements, their attributes, and the words of a page as a browser would see them."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.attributes, self.words, self.open = set(), set(), "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.open += [tag] * (tag != "br")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, "elements are not nested as they were opened"

    def handle_data(self, data):
        self.words += data


def spoil(value, keep):
    """Every text in a value, but under the keys in `keep`, becomes EVIL."""
    if isinstance(value, dict):
        return {k: v if k in keep else spoil(v, keep) for k, v in value.items()}
    if isinstance(value, list):
        return [spoil(v, keep) for v in value]
    return EVIL if isinstance(value, str) else value


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    """A suite whose records say EVIL wherever a record can hold text."""
    folder = tmp_path_factory.mktemp("evil")
    (folder / "toy").mkdir()
    for i, loss in enumerate((4.0, 4.1)):
        run, *middle, end = [json.loads(line) for line in log(f"arm {i}", 0, loss, epochs=2, blocks=1)]
        run = spoil(run, {"kind", "started"}) | {"name": f"{EVIL}{i}", "seed": EVIL}
        run["corpus"] |= {"level": EVIL, "vocab": EVIL}
        text = [json.dumps(line) for line in (run, *middle)]
        text.append(json.dumps(end | {"digest": digest(text)}))
        (folder / "toy" / f"{i}.jsonl").write_text("\n".join(thin(text)), encoding="utf-8")
    return folder


def test_whatever_a_record_a_register_or_a_suite_says_is_shown_as_text(evil):
    claim = {"text": EVIL, "value": 1.0, "low": 0.0, "high": 2.0, "unit": EVIL, "n": 2, "verdict": EVIL, "source": EVIL,
             "chapter": EVIL, "format": "<>9.3f", "seeds": [EVIL], "kind": "mean", "rule": "<", "threshold": 0, "note": EVIL}
    there = runs("toy", evil)
    shown = [pages.claims_table({EVIL: claim}), pages.claims_table({EVIL: claim | {"value": None}}),
             pages.tally({EVIL: claim | {"verdict": "holds"}}),
             pages.leaderboard(there, dense=f"{EVIL}0", about={f"{EVIL}1": EVIL}, waiting=[EVIL]),
             pages.provenance_footer(there, EVIL, root=evil), pages.suites({"toy": EVIL, EVIL: 1}, evil),
             pages.corpora(["toy"], evil), pages.bullets({EVIL: EVIL}),
             Verdict(EVIL, [Finding(EVIL, Interval(1.0, 0.0, 2.0, 3), "<", 5, EVIL)], EVIL, EVIL)._repr_html_()]
    for page in shown:
        found = Reader(page)
        assert found.elements <= OURS and not found.attributes & {"onerror", "src"} and found.open == []
        assert EVIL in found.words or page is shown[2]


# ------------------------------------------------------------------------------- register, records and book agree

def test_register_records_and_claims_json_agree():
    """Every claim again, from the records as committed: to the byte."""
    assert dumps(compute(load())) == CLAIMS_JSON.read_text(encoding="utf-8"), "make claims, then look what changed"


def test_the_book_has_one_word_for_each_verdict():
    notebooks = [json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "notebooks").glob("*.ipynb")]
    texts = ["".join(cell["source"]) for notebook in notebooks for cell in notebook["cells"]]
    pages_ = [*(ROOT / "book").glob("*.md"), ROOT / "README.md", CLAIMS_JSON]
    texts += [path.read_text(encoding="utf-8") for path in pages_]
    assert not [text[:80] for text in texts if re.search(r"\bundecided\b|\bnot supported\b", text, re.IGNORECASE)]


def test_claims_that_were_taken_out_are_computed_from_their_own_records():
    register = load(RETIRED / "claims.toml")
    found = compute(register, RETIRED / "runs")
    assert Counter(c["verdict"] for c in found.values()) == {"fails": 6, "open": 2, "figure": 1}
    assert {c["n"] for c in found.values()} == {3} and not register.keys() & load().keys()


def test_every_claim_names_arms_metric_and_chapter_that_exist():
    planned = {path.stem: suites.load(path) for path in SUITES.glob("*.toml")}
    ends = {"val_loss", "test_loss", "val_bpb", "train_loss", "rank_mean", "params_blocks", "params_total", "flops", "seconds"}
    contents = (ROOT / "book" / "_toc.yml").read_text(encoding="utf-8")
    assert len(load()) >= 15
    for key, claim in load().items():
        assert set(named(claim)) <= set(planned), f"{key}: {claim['suite']} is not in data/suites"
        arms = {arm.name for name in named(claim) for arm in planned[name].arms}
        assert set(claim.get("arms") or [claim["single"]]) <= arms, f"{key}: the suite has {', '.join(sorted(arms))}"
        assert claim["metric"] in METRICS or claim["metric"] in ends, f"{key}: metric {claim['metric']!r}"
        assert f"notebooks/{claim['chapter']}\n" in contents, f"{key}: {claim['chapter']} is not in book/_toc.yml"


def shown(name):
    """The HTML that a notebook shows, as committed."""
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return " ".join("".join(o.get("data", {}).get("text/html", "")) for c in cells for o in c.get("outputs", []))


def test_the_page_of_claims_shows_what_claims_json_says():
    rows = {key: row for row, key in re.findall(r'(<tr><td id="claim-([^"]+)".*?</tr>)', shown("claims"))}
    found = claims.read()
    retired = load(RETIRED / "claims.toml").keys()      # a table of their own at the end of the page
    assert sorted(rows.keys() - retired) == sorted(found), "make refresh ONLY=claims"
    for key, claim in found.items():
        value = "" if claim["value"] is None else f">{phrase(claim).partition(' ')[0]}<br>"
        for words in (html.escape(claim["text"]), f">{claim['verdict']}</span>", html.escape(condition(claim)), value):
            assert words in rows[key], f"{key} without {words!r}: make refresh ONLY=claims"


def test_the_leaderboard_shows_the_records():
    arms = re.findall(r'<tr><td data-sort="([^"]+)".*?</td><td data-sort="([^"]*)"', shown("leaderboard"))
    suite_ = pages.recorded("evolution")
    there = suite_.ends.groupby("arm")["val_loss"].mean().to_dict() if suite_ else {}
    assert {arm for arm, loss in arms if loss} == set(there), "make refresh ONLY=leaderboard"
    assert {arm for arm, _ in arms} == {a.name for a in suites.load(SUITES / "evolution.toml").arms}
    for arm, loss in arms:
        assert not loss or float(loss) == pytest.approx(there[arm], abs=1e-6), f"{arm}: make refresh ONLY=leaderboard"


def test_every_val_in_the_book_is_in_the_register():
    pages = [*ROOT.glob("book/**/*.md"), *ROOT.glob("notebooks/*.ipynb")]
    texts = [page.read_text(encoding="utf-8") for page in pages]
    keys = {key for text in texts for key in re.findall(r"(?<!`` )\{(?:val|by|apart)\}`([^`<>]+)`", text)}
    assert keys <= set(load())


def records():
    """Every committed record."""
    return sorted((p for p in RUNS.glob("*/**/*.jsonl") if ".running-" not in str(p)), key=lambda p: natural(p.name))


def test_every_committed_record_is_what_was_written():
    if not records():
        pytest.skip("no suite is recorded yet")
    for path in records():
        assert verify_digest(path)
    for folder in {p.parent for p in records()}:
        assert len(runs(folder).ends) == len(runs(folder).provenance) > 0


def test_every_committed_record_is_of_a_run_that_a_suite_still_plans():
    """A record that no suite file asks for, or of another configuration, supports nothing that can be made again: it is gone,
    or stands in the archive with the reason."""
    if not records():
        pytest.skip("no suite is recorded yet")
    wanted = {}
    for path in SUITES.glob("*.toml"):
        s = suites.load(path)
        for job in s.tuning_jobs() + s.jobs(suites.DATA):
            if job.path(suites.DATA).exists():
                wanted[job.path(suites.DATA)] = recorded(job, s.recipe(job, suites.DATA), suites.DATA, s.trial)
    assert {str(p.relative_to(RUNS)) for p in records()} == {str(p.relative_to(RUNS)) for p in wanted}
    changed = {(p.parent.name if p.parent.name != "tune" else p.parent.parent.name, p.stem.split(".seed")[0])
               for p, same in wanted.items() if not same}
    archived = {(one.suite, arm) for one in archive.load() for arm in one.arms}
    assert changed <= archived, "record them anew, or say in data/archive.toml what changed"
    for suite_, arm in archived:
        assert any(p.name.startswith(f"{arm}.seed") for p in (RUNS / suite_).glob("*.jsonl")), f"{suite_}, {arm}: no record"


# ----------------------------------------------------------------------------------------- no figure is typed by hand

NUMBER = r"(?<![\w.,])[-−+]?\d[\d,]*(?:\.\d+)?"
MEASURED = re.compile(NUMBER + r"[\s~]*(?:nats?\b|bits?\b|%|per ?cent|ppl\b|perplexity|tokens per second|"
                      r"(?:times|[x×])\s(?:as|faster|slower|smaller|larger|better|worse|cheaper|lower|higher))", re.I)
ABOUT_RESULTS = re.compile(r"\b(?:loss(?:es)?|perplexity|perplexities|accuracy|cosine)\b", re.IGNORECASE)
DECIMAL = re.compile(r"(?<![\w.,])[-−+]?\d[\d,]*\.\d+(?![\w.]*\d)")


CODE = r"^ *(`{3,}|~{3,})(?:\w+|\{(?:code|code-block|math|bibliography)\})?[^\n{]*\n.*?^ *\1 *$"
ENDS = (r"\n\s*\n|\n(?=\s*(?:[-*|#]|\d+\.)\s?)|"            # a paragraph, a list item, a row of a table
        r"(?<=[.!?:])[*_)\"]*\s+(?=[A-Z*(\[])")


def prose(text):
    """The sentences of a markdown text, without code, formulas, roles and addresses; {cite} and links become CITED."""
    text = re.sub(CODE, "\n\n", re.sub(r"<!--.*?-->", " ", text, flags=re.S), flags=re.S | re.M)
    text = re.sub(r"^ *(?:`{3,}|:{3,}).*$", "\n", text, flags=re.M)              # other directives hold prose
    text = re.sub(r"\$\$.*?\$\$", " ", text, flags=re.S)
    text = re.sub(r"\{cite[\w:]*\}`[^`]*`|\]\(https?://[^)]*\)", " CITED ", text)
    text = re.sub(r"\{[\w:-]+\}`[^`]*`|(`+)(?!`).*?(?<!`)\1(?!`)", " ", text, flags=re.S)
    text = re.sub(r"\$(?:\\approx|\\sim)?\s*([-−+]?[\d.,]+)\s*(?:\\,)?\s*(\\?%)?\$", r"\1 \2 ", text)
    text = re.sub(r"\$[^$\n]+\$|\]\([^)]*\)|https?://\S+", " ", text.replace("\\%", "%"))
    return [" ".join(sentence.split()) for sentence in re.split(ENDS, text)]


def typed(text):
    """The sentences with a result that was typed: a measured number, or a decimal beside a word for results, and no
    {cite} or link that says whose it is.  The level of an interval is none."""
    found = []
    for sentence in prose(text):
        rest = re.sub(r"\b95 ?%", " ", sentence)
        if "CITED" not in rest and (MEASURED.search(rest) or (ABOUT_RESULTS.search(rest) and DECIMAL.search(rest))):
            found.append(sentence)
    return found


@pytest.mark.parametrize("text", [
    "It ends at 4.37 nats.", "It ends 3 % lower.", "The loss falls from 5.9 to 1.155.", "It is 2.5 times faster.",
    "A perplexity of 3.17 is low.", "It gains $4.37$ nats.", "About $\\approx 12\\,\\%$ of it.", "Lower by\n0.02 nats.",
    "Published {cite}`v10report`. It ends at 4.37 nats.", "It ends at 4.37 nats, see [here](claims.md).",
    "- a list item: 0.43 nats", "| arm | 4.54 nats |",
    "```{admonition} Verdict\nIt ends at 4.37 nats.\n```", "```python\nx = 1\n```\nIt ends at 4.37 nats."])
def test_a_typed_result_is_refused(text):
    assert typed(text)


@pytest.mark.parametrize("text", [
    "It ends at {val}`leak_v10_with`.", "It ends at 1.155 nats {cite}`v10report`.", "A 95 % interval of the loss.",
    "```python\nloss = 4.37  # nats\n```", "Twelve layers of width 512, v7.1 to v7.5, epoch 30.", "`loss < 4.37 nats`",
    "$$ e \\leftarrow 0.8 e + 0.2 t $$ moves the loss.", "The loss follows $e \\leftarrow 0.8 e$ here.",
    "| epoch | loss |\n| 30 | 1.155 {cite}`v10report` |", "Stable rank times 1.5 is the target.",
    "The loss rose. Its constant is 0.9 by default.", "They saw 5.0 nats ([issue 1](https://example.org/1))."])
def test_an_honest_sentence_passes(text):
    assert typed(text) == []


def result_pages():
    """The pages of the parts Forensics and Evidence, by the table of contents."""
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text(encoding="utf-8"))
    parts = [c for c in toc["chapters"] if c["file"] in ("forensics", "evidence")]
    names = [entry["file"] for part in parts for entry in [part, *part["sections"]]]
    return [path for name in names for path in (ROOT / "book" / f"{name}.md", ROOT / f"{name}.ipynb") if path.exists()]


def test_the_result_pages_are_found():
    names = {path.stem for path in result_pages()}
    assert {"forensics", "evidence", "claims", "leaderboard", "reproduce"} <= names


@pytest.mark.parametrize("path", result_pages(), ids=lambda path: path.stem)
def test_no_result_is_typed_by_hand(path):
    """Numbers on a result page come from a cell or from {val}; those that somebody published carry a source."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        captions = ["".join(c["metadata"].get("mystnb", {}).get("figure", {}).get("caption", "")) for c in cells]
        text = "\n\n".join(["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"] + captions)
    assert typed(text) == [], "typed results; look them up with {val}, print them in a cell, or cite who published them"
