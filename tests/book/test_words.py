"""The roles {by} and {apart}: a difference said in words, and refused where no word for its sign is true."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLAIM = {"text": "It helps.", "value": -0.0651, "low": -0.0893, "high": -0.041, "unit": "nats", "n": 3, "seeds": [0, 1, 2],
         "verdict": "holds", "source": "data/runs/x", "chapter": "16_alr", "format": ".3f", "kind": "difference of means"}


@pytest.fixture(scope="module")
def val():
    spec = importlib.util.spec_from_file_location("val", ROOT / "book" / "_ext" / "val.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("change, words", [
    ({}, "0.065 nats lower"), ({"value": 9.0, "low": 7.5, "high": 10.5, "unit": "directions"}, "9.0 directions higher"),
    ({"value": -3.98825, "low": -4.0, "high": -3.97}, "4.0 nats lower"),
    ({"value": 12.4, "low": 10, "high": 14}, "12 nats higher"),
    ({"unit": ""}, "0.065 lower")])
def test_a_difference_is_said_with_its_sign_as_a_word(val, change, words):
    assert val.in_words(CLAIM | change) == words


@pytest.mark.parametrize("change, reason", [
    ({"high": 0.001}, "neither lower nor higher"), ({"low": None, "high": None}, "neither lower nor higher"),
    ({"kind": "ratio of means"}, "ratio of means")])
def test_what_is_no_sure_difference_is_refused(val, change, reason):
    with pytest.raises(ValueError, match=reason):
        val.in_words(CLAIM | change)


@pytest.mark.parametrize("change, words", [
    ({}, "0.065 [0.041, 0.089] below"), ({"high": 0.02}, "0.065 [−0.020, 0.089] below"),
    ({"value": 0.02, "low": 0.005, "high": 0.035, "format": "+.3f"}, "0.020 [0.005, 0.035] above"),
    ({"value": -0.0004, "high": 0.02}, "level [−0.089, 0.020] with")])
def test_where_one_thing_ends_beside_another_is_said_whether_or_not_it_is_sure(val, change, words):
    assert val.beside(CLAIM | change) == words


@pytest.mark.parametrize("change", [{"low": None, "high": None}, {"kind": "mean"}, {"kind": "ratio of means"}])
def test_what_has_no_place_beside_another_is_refused(val, change):
    with pytest.raises(ValueError, match="write {val}"):
        val.beside(CLAIM | change)


def page(folder: Path, claim: dict) -> tuple[str, str]:
    """Build one page with the role, in a process of its own -> (its HTML, the warnings)."""
    (folder / "data").mkdir()
    (folder / "data" / "claims.json").write_text(json.dumps({"gain": claim}))
    conf = f"import sys; sys.path.insert(0, {str(ROOT / 'book' / '_ext')!r})\nextensions = ['val', 'myst_parser']\n"
    (folder / "conf.py").write_text(conf + "html_theme = 'basic'\n")
    (folder / "index.md").write_text("# Page\n\nIt ends {by}`gain`.\n")
    built = subprocess.run([sys.executable, "-m", "sphinx", "-q", ".", "out"], cwd=folder, capture_output=True, text=True)
    return (folder / "out" / "index.html").read_text(encoding="utf8"), built.stderr


def test_a_page_prints_the_words_and_its_tooltip_has_the_interval(tmp_path):
    text, warnings = page(tmp_path, CLAIM)
    assert ">0.065 nats lower<" in text and "[−0.089, −0.041]" in text and warnings == ""


def test_a_difference_that_is_not_sure_is_a_warning_on_a_page(tmp_path):
    _, warnings = page(tmp_path, CLAIM | {"high": 0.02})
    assert "claim 'gain' cannot be said in words" in warnings
