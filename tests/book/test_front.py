"""The first pages: short, true, and their code runs."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import yaml

from alr import recipes

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"


def text(page: str) -> str:
    return (BOOK / f"{page}.md").read_text(encoding="utf8")


def code(page: str, language: str) -> list[str]:
    """The fenced blocks of one language on a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", text(page), re.DOTALL | re.MULTILINE)


# ---------------------------------------------------------------- the front page

def test_the_front_page_has_fewer_than_250_words_before_the_contents():
    body = text("intro").split("---\n", 2)[2].split("## Contents")[0]
    shown = re.sub(r"^(?::\w[\w-]*:.*|%.*|[`:]{3,}.*)$", "", body, flags=re.MULTILINE)      # options, comments, fences
    assert 100 < len(shown.split()) < 250


def test_the_picture_comes_before_the_story():
    body = text("intro").split("---\n", 2)[2]
    assert body.index("own-null.svg") < body.index("Ten versions")


SIGNS = {"leak_gap": -1, "null_start_decides_later": 1, "repair_transport": -1, "repaired_beats_v10": -1,
         "alr_beats_uniform_shakespeare": -1, "equal_best_words": 1}            # what the sentences on the front page say


def test_the_findings_of_the_front_page_are_those_of_the_register():
    claims = json.loads((ROOT / "data" / "claims.json").read_text(encoding="utf8"))
    assert set(re.findall(r"\{by\}`(\w+)`", text("intro"))) == set(SIGNS)
    for key, sign in SIGNS.items():
        assert min(sign * claims[key]["low"], sign * claims[key]["high"]) > 0, f"{key} no longer has that sign for sure"
    assert claims["leak_needs_no_low_rank"]["high"] < 0                                     # "so does a dense model"
    assert claims["alr_beats_uniform"]["low"] < 0 < claims["alr_beats_uniform"]["high"]     # "in words, no difference shows"


def test_no_page_says_that_the_repair_adds_nothing_new():
    for path in [*BOOK.glob("*.md"), ROOT / "README.md"]:
        assert "nothing new" not in path.read_text(encoding="utf8"), path.name


# ---------------------------------------------------------------- start

def test_the_six_lines_run_and_change_ranks():
    (program,), printed = code("start", "python"), io.StringIO()
    assert [int(n) for n in re.findall(r"# (\d)\.", program)] == [1, 2, 3, 4, 5, 6]
    names: dict = {}
    with contextlib.redirect_stdout(printed):
        exec(compile(program, "book/start.md", "exec"), names)
    assert "Resize(" in printed.getvalue() and not names["alr"].low_rank_layers(names["model"])


def test_bibtex_and_citation_file_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf8"))
    (entry,) = code("start", "bibtex")
    fields = dict(re.findall(r"^  (\w+)\s*= \{(.*?)\},?$", entry, re.MULTILINE))
    assert fields["title"] == citation["title"] and fields["version"] == f"{{{citation['version']}}}".strip("{}")
    assert fields["author"] == f"{{{citation['authors'][0]['name']}}}" and fields["license"] == citation["license"]
    assert fields["year"] == str(citation["date-released"])[:4]


@pytest.mark.parametrize("word", ["install", "cite", "licence", "WikiText-2", "make env"])
def test_start_is_found_by_what_a_reader_looks_for(word):
    assert word in text("start")


# ---------------------------------------------------------------- the archive

AXES = ("estimate", "control", "resize", "state", "init")
LINE = ("v1", "v2", "v3", "v4", "v5", "v5_1", "v6", "v7", "v7_1", "v7_2", "v7_3", "v7_4", "v7_5", "v8", "v9", "v10")


def test_more_than_half_of_the_steps_change_at_most_three_answers():
    """The archive's first sentence."""
    steps = [recipes.difference(getattr(recipes, a), getattr(recipes, b)) for a, b in zip(LINE, LINE[1:])]
    moved = [sum(axis in step for axis in AXES) + ("gradient" in step or "op" in step) for step in steps]
    assert sum(n <= 3 for n in moved) > len(moved) / 2
    assert "at most three of the answers" in text("evolution")


def test_the_row_of_the_budget_recipe_is_the_recipe():
    row = next(line for line in text("related").splitlines() if line.startswith("| the {term}`budget recipe`"))
    assert recipes.alr.every == 50 and "every 50 steps" in row
    assert recipes.alr.control.end == 0.8 and "four fifths" in row


def test_what_practice_says_of_narrow_starts_is_in_the_register():
    claims = json.loads((ROOT / "data" / "claims.json").read_text(encoding="utf8"))
    near, far = (claims[f"alr_same_loss_matched_from_{rank}"] for rank in (16, 4))
    assert "a start at 16 came close to a wide one, and a start at 4 did not" in " ".join(text("practice").split())
    assert near["low"] < 0 < near["high"] and far["low"] > 0


# ---------------------------------------------------------------- sources

def test_every_source_is_cited_somewhere_and_every_citation_has_a_source():
    pages = [path.read_text(encoding="utf8") for path in [*BOOK.glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]]
    cited = {key.strip() for page in pages for keys in re.findall(r"\{cite\}`([^`]+)`", page) for key in keys.split(",")}
    known = set(re.findall(r"^@\w+\{(\w+),", (BOOK / "references.bib").read_text(encoding="utf8"), re.MULTILINE))
    assert cited == known, f"without a source: {sorted(cited - known)}; never cited: {sorted(known - cited)}"
