"""Pictures of Markdown pages: drawn from what is in the repository now, and the same numbers as in their chapter."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "book" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_pictures_are_drawn_from_the_present_code_and_data(figures):
    assert {path.stem for path in figures.FOLDER.glob("*.svg")} == set(figures.PICTURES)
    for path in figures.FOLDER.glob("*.svg"):
        text = path.read_text(encoding="utf8")
        assert f"<dc:source>{figures.source()}</dc:source>" in text, f"{path.name} is stale: python book/figures.py"
        assert len(text) < 150_000 and "<dc:date>" not in text


def test_drawing_twice_gives_the_same_file(figures, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "PICTURES", {"mask": figures.PICTURES["mask"]})
    first, second = (figures.write(tmp_path / name)[0].read_bytes() for name in "ab")
    assert first == second


def test_the_picture_of_v8_and_its_chapter_quote_the_same_log(figures):
    cells = nbformat.read(ROOT / "notebooks" / "08_v8.ipynb", as_version=4).cells
    source = next(cell.source for cell in cells if cell.source.startswith("OWN_NULL = "))
    quoted = next(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Dict))
    columns = {key.value: value for key, value in zip(quoted.keys, quoted.values)}
    log = pd.read_csv(figures.V8).set_index("layer")
    for layer in ("attn_q", "attn_o"):
        assert list(log.loc[layer, "rank"]) == ast.literal_eval(columns[f"{layer}, rank"])
        assert list(log.loc[layer, "target"]) == ast.literal_eval(columns[f"{layer}, target"])
        values = [", ".join(f"{x:.4f}" for x in row) for row in log.loc[layer, ["first", "second", "third"]].to_numpy()]
        text = eval(compile(ast.Expression(columns[f"{layer}, first three"]), "cell", "eval"), {})      # a list, or [...] * 9
        assert values == text


@pytest.mark.parametrize("page", sorted([*(ROOT / "book").glob("*.md"), ROOT / "README.md"]), ids=lambda page: page.name)
def test_every_picture_of_a_page_is_there(page):
    text = page.read_text(encoding="utf8")
    named = re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text) + re.findall(r"\{(?:figure|image)\} (\S+)", text)
    for target in named:
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_pictures_of_notebooks_are_there_before_and_after_staging(figures):
    spec = importlib.util.spec_from_file_location("build", ROOT / "book" / "build.py")
    build = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "book"))
    spec.loader.exec_module(build)
    named = set()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            for target in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", cell.source if cell.cell_type == "markdown" else ""):
                assert (path.parent / target).exists(), f"{path.name}: {target}"
                staged = build.flat(f"![a]({target})")[5:-1]
                assert (ROOT / "book" / staged.removeprefix("../")).exists(), f"{path.name}: {target} is lost when it is staged"
                named.add(Path(target).stem)
    assert {"loop", "forgotten"} <= named <= set(figures.PICTURES)
