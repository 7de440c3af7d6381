"""The frame of the project: pins that agree, notebooks as a reader expects them, tools of the book that work."""

import ast
import importlib.util
import io
import json
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import nbformat
import numpy as np
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
HOMES = r"/(?:home|Users|root|tmp|mnt|workspace|var/folders|private)/|[A-Z]:\\Users\\"
MACHINE = re.compile(rf"(?<![\w.:/-])(?:{HOMES})[^\s\"'<>)]*|{re.escape(str(ROOT))}|[^\s\"']*/site-packages/")
ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}")


sys.path.insert(0, str(ROOT / "book"))


def load(path: str):
    """A module of book/, which is no package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def build():
    return load("book/build.py")


@pytest.fixture(scope="module")
def offline():
    return load("book/offline.py")


@pytest.fixture(scope="module")
def lean():
    return load("book/lean.py")


@pytest.fixture(scope="module")
def notebooks():
    return load("book/notebooks.py")


@pytest.fixture(scope="module")
def val():
    return load("book/_ext/val.py")


# ---------------------------------------------------------------- pins

def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf8").splitlines()
    found = [re.fullmatch(r"([\w.-]+)==([\w.+!]+)", line) for line in lines if line and not line.startswith("#")]
    assert all(found), "constraints.txt holds nothing but comments and name==version"
    return {canonicalize_name(match[1]): Version(match[2]) for match in found}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]


def direct() -> list[Requirement]:
    extras = project()["optional-dependencies"].values()
    return [Requirement(line) for lines in [project()["dependencies"], *extras] for line in lines]


def test_every_direct_dependency_has_a_pin_within_its_range():
    for requirement in direct():
        pin = pins().get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} stands in pyproject.toml and has no pin in constraints.txt"
        assert pin in requirement.specifier, f"{requirement.name}=={pin} is outside of {requirement.specifier}"


def test_torch_is_the_platforms_own_build():
    assert str(pins()["torch"]) == "2.13.0", "a pin like 2.13.0+cpu cannot be installed from PyPI"


def test_no_pin_is_for_one_platform():
    assert not [name for name in pins() if name.startswith(("nvidia-", "cuda-", "triton"))]


def test_every_pin_is_what_is_installed():
    # JupyterLab's own packages are there after `make lab` only.
    there = {canonicalize_name(d.metadata["Name"]): Version(d.version) for d in metadata.distributions()}
    wrong = {name: (str(pin), str(there[name])) for name, pin in pins().items()
             if name in there and name not in ("setuptools", "wheel") and there[name].public != pin.public}
    assert not wrong, f"pinned, installed: {wrong}; `make env` installs the pins"
    for requirement in direct():
        if requirement.name != "jupyterlab":
            assert canonicalize_name(requirement.name) in there


def test_what_is_installed_needs_nothing_unpinned():
    """The closure of the direct dependencies, as installed here, is pinned but for what torch brings for a GPU."""
    todo, seen = [canonicalize_name(r.name) for r in direct() if r.name != "jupyterlab"], set()
    while todo:
        name = todo.pop()
        if name in seen or name.startswith(("nvidia-", "cuda-", "triton")):
            continue
        seen.add(name)
        needs = [Requirement(line) for line in metadata.requires(name) or []]
        todo += [canonicalize_name(r.name) for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert len(seen) > 80
    assert seen <= pins().keys(), f"not in constraints.txt: {sorted(seen - pins().keys())}"


def test_environment_yml_installs_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf8"))
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    pip = [line for entry in environment["dependencies"] if isinstance(entry, dict) for line in entry["pip"]]
    assert pip == ["-c constraints.txt", "-e .[train,book,test]"]
    assert '-c constraints.txt -e ".[train,book,test]"' in (ROOT / "book" / "env.sh").read_text(encoding="utf8")
    python = next(entry.split("=")[-1] for entry in conda if entry.startswith("python"))
    assert Requirement(f"python{project()['requires-python']}").specifier.contains(python)
    assert not pins().keys() & set(conda), "a package comes from conda or from the pins, not from both"


# ---------------------------------------------------------------- imports and extras

SERVES = {                              # declared, and used without an import: where its name has to stand
    "ipykernel": ("book/notebooks.py", '"Python 3 (ipykernel)"'), "jupyter-book": ("book/build.py", "jupyter_book.cli.main"),
    "sphinx-book-theme": ("book/_config.yml", "html_theme_options"),                # jupyter-book takes whichever is there
    "sphinx-mathjax-offline": ("book/_config.yml", "sphinx-mathjax-offline"), "nbval": ("book/notebooks.py", "--nbval-lax"),
    "pytest-benchmark": ("Makefile", "--benchmark-only"), "pytest-xdist": ("Makefile", "-n auto"),
    "ruff": ("Makefile", "-m ruff check"),
    "jupyterlab": ("Makefile", "-m jupyterlab")}
PLACES = [                              # where a file lies -> the extras that it may import from; the first that fits
    (r"alr/integrations/", {"", "integrations"}), (r"alr/(lab/|train\.py)", {"", "train"}),
    (r"alr/(evidence/|claims\.py|sweep\.py)", {"", "train", "book"}), (r"alr/", {""}),
    (r"(book|notebooks)/", {"", "train", "book", "integrations"}), (r"tests/", {"", "train", "book", "integrations", "test"})]


def declared() -> dict[str, set[str]]:
    """Extra -> the names of what it declares; the library's own needs under ""."""
    extras = {"": project()["dependencies"], **project()["optional-dependencies"]}
    return {extra: {canonicalize_name(Requirement(line).name) for line in lines} for extra, lines in extras.items()}


def sources() -> dict[str, list[str]]:
    """Every place with Python of this project -> its pieces of code: files, and the cells of notebooks."""
    files = [*ROOT.glob("alr/**/*.py"), *ROOT.glob("book/**/*.py"), *ROOT.glob("tests/**/*.py")]
    found = {path.relative_to(ROOT).as_posix(): [path.read_text(encoding="utf8")] for path in files}
    for path in NOTEBOOKS:
        cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        found[path.relative_to(ROOT).as_posix()] = [re.sub(r"^[%!].*$", "", cell, flags=re.MULTILINE) for cell in cells]
    return found


def third_party(code: str) -> set[str]:
    """Top-level names of the modules that a piece of code imports and that come from elsewhere."""
    nodes = list(ast.walk(ast.parse(code)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    names |= {node.args[0].value for node in nodes if isinstance(node, ast.Call) and node.args      # pytest.importorskip("x")
              and isinstance(node.func, ast.Attribute) and node.func.attr in ("importorskip", "import_module")
              and isinstance(node.args[0], ast.Constant)}
    ours = {"alr", *(path.stem for path in [*ROOT.glob("book/**/*.py"), *ROOT.glob("tests/*.py")])}
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - ours


def distributions() -> dict[str, set[str]]:
    """Module -> the distributions that bring it, as installed here."""
    return {module: set(map(canonicalize_name, names)) for module, names in metadata.packages_distributions().items()}


def test_what_is_imported_is_declared_for_its_place_and_what_is_declared_is_used():
    known, brought_by, used = declared(), distributions(), {extra: set() for extra in declared()}
    for place, pieces in sources().items():
        allowed = next(extras for pattern, extras in PLACES if re.match(pattern, place))
        for module in set().union(*map(third_party, pieces)):
            names = brought_by.get(module, {canonicalize_name(module)})
            extras = {extra for extra in allowed if names & known[extra]}
            assert extras, (f"{place} imports {module} ({', '.join(names)}), which pyproject.toml declares in none of "
                            f"{', '.join(sorted(extra or 'dependencies' for extra in allowed))}")
            for extra in extras:
                used[extra] |= names
    for name, (file, words) in SERVES.items():
        assert words in (ROOT / file).read_text(encoding="utf8"), f"{file} uses {name} no longer"
    idle = {extra: sorted(names - used[extra] - set(SERVES)) for extra, names in known.items()}
    assert not any(idle.values()), f"declared and imported nowhere: {idle}"


def test_the_environment_has_what_the_integrations_are_for():
    """`make env` installs train, book and test; the callbacks are tested against the real libraries."""
    known = declared()
    assert known["integrations"] <= known["train"] | known["book"] | known["test"]


# ---------------------------------------------------------------- notebooks

def problems(nb) -> list[str]:
    """What is wrong with a committed notebook."""
    found = []
    code = [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]
    parameters = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    if len(parameters) != 1:
        found.append(f"{len(parameters)} cells are tagged `parameters`; one is wanted")
    else:
        missing = {"profile", "corpus", "seed"} - set(re.findall(r"^(\w+)\s*=", parameters[0].source, re.MULTILINE))
        found += [f"the parameters cell does not set {name}" for name in sorted(missing)]
    if not (nb.cells and nb.cells[0].cell_type == "markdown" and nb.cells[0].source.startswith("# ")):
        found.append("the first cell is not a title")
    counts = [cell.execution_count for cell in code]
    if counts != list(range(1, len(code) + 1)):
        found.append(f"cells were not run once each, from top to bottom: {counts}; `make refresh` runs them")
    for i, cell in enumerate(nb.cells):
        texts = [cell.source]
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                found.append(f"cell {i} ends in {output.ename}: {output.evalue}")
            data = output.get("data", {})
            printed = [output.get("text", ""), data.get("text/plain", ""), data.get("text/html", "")]
            texts += printed
            found += [f"cell {i} prints an object's address{hit[0]}" for t in printed for hit in ADDRESS.finditer(t)]
            if "image/png" in data and not cell.metadata.get("mystnb", {}).get("image", {}).get("alt"):
                found.append(f"cell {i} shows a picture without a text for those who do not see it (mystnb: image: alt)")
        found += [f"cell {i} names a path of one machine: {hit[0]}" for t in texts for hit in MACHINE.finditer(t)]
    notes = [key for cell in nb.cells for key in ("papermill", "execution") if key in cell.metadata]
    if notes or "papermill" in nb.metadata:
        found.append("the metadata hold times or paths of one run; `make refresh` takes them out")
    return found


def good() -> nbformat.NotebookNode:
    parameters = new_code_cell('profile = "quick"\ncorpus = "pydoc"\nseed = 0', execution_count=1)
    parameters.metadata["tags"] = ["parameters"]
    printed = new_code_cell("print(seed)", execution_count=2, outputs=[new_output("stream", text="0\n")])
    return new_notebook(cells=[new_markdown_cell("# A title"), parameters, printed])


def test_a_good_notebook_has_no_problems():
    assert problems(good()) == []


def prints(nb, text):
    nb.cells[2].outputs.append(new_output("execute_result", {"text/plain": text}))


@pytest.mark.parametrize("spoil, word", [
    (lambda nb: nb.cells[1].metadata.pop("tags"), "parameters"),
    (lambda nb: nb.cells[1].update(source='profile = "quick"\nseed = 0'), "corpus"),
    (lambda nb: nb.cells.pop(0), "title"),
    (lambda nb: nb.cells[2].update(execution_count=None), "not run"),
    (lambda nb: nb.cells[2].update(execution_count=7), "not run"),
    (lambda nb: nb.cells[2].outputs.append(new_output("error", ename="KeyError", evalue="")), "KeyError"),
    (lambda nb: nb.cells[2].outputs.append(new_output("stream", text="saved to /home/ann/a.jsonl\n")), "/home/ann"),
    (lambda nb: prints(nb, "venv/lib/python3.11/site-packages/tqdm/auto.py:21: TqdmWarning"), "site-packages"),
    (lambda nb: nb.cells[2].update(source='open("/tmp/x")'), "/tmp/x"),
    (lambda nb: prints(nb, "<Line2D at 0x7f3a12345678>"), "address"),
    (lambda nb: nb.metadata.update(papermill={"duration": 3}), "metadata"),
    (lambda nb: nb.cells[2].outputs.append(new_output("display_data", {"image/png": "iVBORw0="})), "picture without a text"),
])
def test_a_spoilt_notebook_is_noticed(spoil, word):
    nb = good()
    spoil(nb)
    assert any(word in problem for problem in problems(nb)), problems(nb)


def test_the_first_chapters_are_there():
    assert {"00_tour", "10_v10"} <= {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path):
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    assert problems(nb) == []


def test_cleaning_is_complete_and_changes_nothing_twice(notebooks):
    nb = good()
    nb.metadata.update(papermill={"duration": 1.5}, language_info={"name": "python", "version": "3.11.7"})
    nb.cells[2].metadata.update(papermill={"start_time": "now"}, execution={"iopub.status.busy": "now"}, tags=[])
    nb.cells[2].outputs = [new_output("stream", text="a\n"), new_output("stream", text="b\n"),
                           new_output("stream", name="stderr", text="c\n"), new_output("stream", text="d\n")]
    once = notebooks.clean(nb).copy()
    assert [output.text for output in once.cells[2].outputs] == ["a\nb\n", "c\n", "d\n"]
    assert once.cells[2].metadata == {} and once.cells[1].metadata == {"tags": ["parameters"]}
    assert problems(once) == []
    assert nbformat.writes(notebooks.clean(once)) == nbformat.writes(once)


# ---------------------------------------------------------------- the book

def toc() -> dict:
    return yaml.safe_load((ROOT / "book" / "_toc.yml").read_text(encoding="utf8"))


def test_every_page_is_in_the_table_of_contents(build):
    there = [path.stem for path in (ROOT / "book").glob("*.md")] + [f"notebooks/{path.stem}" for path in NOTEBOOKS]
    planned = build.pages(toc())
    assert "intro" in there and "references" in there
    assert not set(there) - set(planned), "pages that no reader would find; add them to book/_toc.yml"
    assert len(planned) == len(set(planned))


def test_the_table_of_contents_loses_what_is_not_there(build):
    kept = build.present(toc(), lambda page: page in ("intro", "evolution", "notebooks/09_v9", "notebooks/16_alr"))
    assert build.pages(kept) == ["intro", "evolution", "notebooks/09_v9"]        # 16_alr is below a page that is gone
    assert build.present(toc(), lambda page: True) == toc()
    assert build.childless(kept) == ["notebooks/09_v9"]


def test_links_to_chapters_that_are_not_there_become_words(build):
    absent = {"notebooks/16_alr", "claims"}
    text = "See [the method](16_alr.ipynb#top), [claims](../claims.md), {doc}`the method <16_alr>` and {doc}`16_alr`."
    assert build.unlink(text, "notebooks/10_v10", absent) == "See the method, claims, the method and 16_alr."
    kept = "[v9](09_v9.ipynb), [a](https://example.org/16_alr), {doc}`09_v9`, ![figure](16_alr.png), [x](16_arl.ipynb)"
    assert build.unlink(kept, "notebooks/10_v10", absent) == kept


@pytest.mark.parametrize("line", [
    '<script src="https://cdn.example.org/a.js"></script>',
    '<script src="//cdn.example.org/a.js"></script>',
    '<script>import("https://cdn.example.org/a.mjs")</script>',
    '<script>const URL = "https://cdn.example.org/lib/index.js"</script>',
    '<link rel="preload stylesheet" href="HTTPS://cdn.example.org/a.css">',
    '<img src="http://example.org/a.png" alt="">',
    '<img srcset="a.png 1x, https://example.org/a.png 2x" alt="">',
    '<iframe src="https://example.org/"></iframe>',
    '<style>@import "https://example.org/a.css";</style>',
    '<p style="background: url(https://example.org/a.png)">x</p>',
])
def test_a_page_that_needs_a_network_is_noticed(offline, line):
    assert offline.fetched_from_afar(f"<html><body>{line}</body></html>")


@pytest.mark.parametrize("line", [
    '<a href="https://example.org/">a link that a reader may click</a>',
    '<link rel="canonical" href="https://example.org/book/">',
    '<script src="_static/a.js?v=1"></script><script>const note = "see https://example.org/";</script>',
    '<img src="data:image/png;base64,AAAA" alt="">',
    '<pre>&lt;script src="https://cdn.example.org/a.js"&gt;</pre>',
])
def test_a_page_with_links_only_is_complete(offline, line):
    assert offline.fetched_from_afar(f"<html><body>{line}</body></html>") == []


def test_a_local_file_that_is_not_there_is_noticed(offline, tmp_path):
    (tmp_path / "a.js").touch()
    page = '<script src="a.js?v=1"></script><img src="b.png#x" alt="">'
    assert offline.missing(page, tmp_path) == ["b.png#x"]


def test_the_scripts_that_name_a_server_are_taken_out(build):
    keep = '<script>let hint = 1;</script><script src="_static/a.js"></script>'
    thebe = '\n<script>const THEBE_JS_URL = "https://unpkg.com/thebe@0.8.2/lib/index.js"</script>'
    thebe += '\n<script async="async" src="_static/sphinx-thebe.js?v=1"></script>'
    assert build.without_thebe(keep + thebe) == keep


def test_programs_of_the_book_are_not_staged(build):
    names = ["build.py", "env.sh", "intro.md", "__pycache__"]
    assert build.tools(ROOT / "book", names) == {"build.py", "env.sh", "__pycache__"}
    assert build.tools(ROOT / "book" / "_ext", ["val.py", "__pycache__"]) == {"__pycache__"}


# ---------------------------------------------------------------- the weight of a page

ICONS = 'var p={moon:[384,512,[127769,9214],"f186","M223"],"magnifying-glass":[512,512,[128269,"search"],"f002",["a","b"]],' \
        '"star-of-life":[1,1,[],"f621","M0"]};var q={0:[320,512,[],"30","M0"]};done()'


def test_icons_that_no_page_shows_leave(lean):
    used = lean.icons_used(['<i class="fa-solid fa-moon"></i>', "x='fas fa-search'"])
    assert {"moon", "search"} <= used
    assert lean.fewer_icons(ICONS, used) == (
        'var p={moon:[384,512,[127769,9214],"f186","M223"],"magnifying-glass":[512,512,[128269,"search"],"f002",["a","b"]],};'
        'var q={};done()')
    assert lean.fewer_icons(ICONS, {"star-of-life", "0"}).count("M0") == 2
    with pytest.raises(ValueError, match="its form has changed"):
        lean.fewer_icons("icons = new Map()", used)


def test_parts_of_mathjax_that_no_page_loads_leave(lean, tmp_path):
    asked = yaml.safe_load((ROOT / "book" / "_config.yml").read_text(encoding="utf8"))["sphinx"]["config"]["mathjax3_config"]
    kept = {f"{part}.js" for part in asked["loader"]["load"]} | {"startup.js", "output/chtml/fonts/woff-v2/Main.woff"}
    for name in [*kept, "tex-svg.js", "sre/mathmaps/de.js", "output/svg/fonts/tex.js", "input/tex-full.js"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    lean.fewer_mathjax(tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} == kept
    assert not (tmp_path / "sre").exists()


def test_fewer_colours_change_no_pixel_that_one_sees(lean, tmp_path):
    rng = np.random.default_rng(0)
    picture = np.full((60, 80, 3), 255, np.uint8)
    picture[10:50, 10:70] = rng.integers(0, 4, (40, 60, 1)) * np.array([[[60, 20, 5]]])
    Image.fromarray(picture).save(tmp_path / "a.png", dpi=(120, 120))
    lean.fewer_colours(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as small:
        assert small.mode == "P" and round(small.info["dpi"][0]) == 120
        assert np.abs(np.asarray(small.convert("RGB")).astype(int) - picture).max() <= 4
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    clear.save(tmp_path / "b.png")
    before = (tmp_path / "b.png").read_bytes()
    lean.fewer_colours(tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes() == before


def test_a_page_weighs_what_it_loads(lean, tmp_path):
    (tmp_path / "mathjax").mkdir()
    (tmp_path / "mathjax" / "startup.js").write_text("x" * 100)
    (tmp_path / "a.png").write_bytes(b"y" * 1000)
    page = tmp_path / "a.html"
    page.write_text('<img src="a.png?v=1" alt=""><img src="a.png" alt=""><script src="mathjax/startup.js"></script>')
    assert lean.weight(page, mathjax=5000) == page.stat().st_size + 1000 + 100 + 5000
    page.write_text('<a href="a.png">a link weighs nothing</a>')
    assert lean.weight(page, mathjax=5000) == page.stat().st_size


def test_links_of_a_book_on_one_page_stay_inside(build):
    page = '<span id="document-notebooks/01_v1"></span><td id="claim-gain"></td>'
    links = [('<a href="01_v1.html">v1</a>', '<a href="#document-notebooks/01_v1">v1</a>'),
             ('<a href="../notebooks/01_v1.html#claim-gain">x</a>', '<a href="#claim-gain">x</a>'),
             ('<a href="99_gone.html">gone</a>', "<a >gone</a>"),
             ('<a href="https://example.org/a.html">web</a>', '<a href="https://example.org/a.html">web</a>'),
             ('<a href="#claim-gain">same</a>', '<a href="#claim-gain">same</a>')]
    for before, after in links:
        assert build.inside(page + before) == page + after


CLAIM = {"text": "It helps.", "value": -0.0651, "low": -0.0893, "high": -0.041, "unit": "nats", "n": 3,
         "seeds": [0, 1, 2], "verdict": "holds", "source": "data/runs/x", "chapter": "16_alr", "format": ".3f"}


def test_val_prints_value_interval_and_unit(val):
    assert val.phrase(CLAIM, unit=True) == "−0.065 [−0.089, −0.041] nats"
    assert val.phrase(CLAIM | {"format": ".1f", "unit": ""}, unit=True) == "−0.1 [−0.1, 0.0]"
    assert val.phrase(CLAIM | {"low": None, "high": None}, unit=True) == "−0.065 nats"
    assert val.phrase(CLAIM | {"value": None, "verdict": "not recorded"}) == "not recorded"
    for word in ("It helps", "holds", "3 runs", "0, 1, 2", "data/runs/x"):
        assert word in val.tooltip(CLAIM)


def sphinx(folder: Path, text: str, builder: str = "html", page: str = "index"):
    """Build a page of this text with the book's own extensions -> (the HTML of it or of another page, the warnings)."""
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace
    conf = f"import sys; sys.path.insert(0, {str(ROOT / 'book' / '_ext')!r})\n"
    conf += "extensions = ['val', 'touching', 'times', 'exercises', 'sphinx_design', 'myst_parser']\n"
    folder.joinpath("conf.py").write_text(conf + "html_theme = 'basic'\n")
    folder.joinpath("index.md").write_text(f"# Page\n\n{text}\n")
    warnings = io.StringIO()
    with docutils_namespace():                                                  # nothing is registered twice
        Sphinx(folder, folder, folder / "out", folder / "doctrees", builder, status=None, warning=warnings).build()
    return (folder / "out" / f"{page}.html").read_text(encoding="utf8"), warnings.getvalue()


EXERCISES = """## Exercises

1. One?

```{dropdown} Solution
Yes.
```

2. Two?

   1. a part

```{dropdown} Solution
No.
```

## After

1. no exercise

```{dropdown} Solution
of nothing
```
"""


@pytest.mark.parametrize("name, numbers", [("03_v3", ["3.1", "3.2"]), ("index", ["1", "2"])])
def test_exercises_and_solutions_have_numbers(tmp_path, name, numbers):
    (tmp_path / f"{name}.md").write_text(f"# Page\n\n{EXERCISES}")
    page, warnings = sphinx(tmp_path, "```{toctree}\n03_v3\n```" if name != "index" else EXERCISES, page=name)
    words = re.sub(r"<[^>]+>", "", page)
    assert warnings == "" and re.findall(r"Exercise (\S+)\. (?:One|Two)", words) == numbers
    assert re.findall(r"Solution\s*([\d.]+)", words) == numbers and 'id="exercise-2"' in page and "exercise-3" not in page


def test_a_button_leads_to_a_notebook_that_runs_there(build, monkeypatch):
    """Binder installs environment.yml by itself; Colab installs nothing, and no chapter does it for itself."""
    monkeypatch.setenv("BOOK_REPOSITORY", "https://github.com/x/y")
    buttons = build.configuration()["launch_buttons"]
    assert buttons["binderhub_url"] and (ROOT / "environment.yml").exists()
    assert "colab_url" not in buttons and not buttons["thebe"]


def test_a_published_book_says_where_it_lies(build, monkeypatch):
    monkeypatch.setenv("BOOK_URL", "https://example.org/alr")
    assert build.configuration()["html"]["baseurl"] == "https://example.org/alr/"
    front = build.announced((ROOT / "book" / "intro.md").read_text(encoding="utf8"), build.address())
    found = yaml.safe_load(front.split("---")[1])["myst"]["html_meta"]
    assert found["property=og:url"] == "https://example.org/alr/"
    picture = found["property=og:image"].removeprefix(found["property=og:url"])
    assert (ROOT / "book" / picture).exists()
    monkeypatch.setenv("BOOK_URL", "example.org")
    with pytest.raises(SystemExit, match="whole address"):
        build.address()
    monkeypatch.delenv("BOOK_URL")
    assert build.address() is None and "baseurl" not in build.configuration()["html"]


def test_val_in_a_page(tmp_path):
    (tmp_path / "data").mkdir()
    register = tmp_path / "data" / "claims.json"
    register.write_text(json.dumps({"gain": CLAIM}))
    page, warnings = sphinx(tmp_path, "Better by {val}`gain`.")
    assert "−0.065 [−0.089, −0.041] nats</abbr>" in page and "Verdict: holds" in page and warnings == ""
    assert 'tabindex="0"' in page, "without a page of claims, the keyboard reaches the tooltip all the same"

    register.write_text(json.dumps({"gain": CLAIM | {"value": -0.5}}))           # the page itself is unchanged
    page, warnings = sphinx(tmp_path, "Better by {val}`gain`.")
    assert "−0.500" in page, "a page has to be built again when the register changes"


@pytest.mark.parametrize("builder, target", [("html", "notebooks/claims.html#claim-gain"), ("singlehtml", "#claim-gain")])
def test_a_number_is_a_link_to_its_claim(tmp_path, builder, target):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "claims.json").write_text(json.dumps({"gain": CLAIM}))
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "claims.md").write_text("# Claims\n\nHere as well: {val}`gain`.\n")
    page, warnings = sphinx(tmp_path, "Better by {val}`gain`.\n\n```{toctree}\nnotebooks/claims\n```", builder)
    link = re.search(r'<a class="val" href="([^"]*)" title="([^"]*)">([^<]*)</a>', page)
    assert warnings == "" and link[1] == target and link[3] == "−0.065 [−0.089, −0.041] nats" and "Verdict: holds" in link[2]
    if builder == "html":
        assert 'href="#claim-gain"' in (tmp_path / "out" / "notebooks" / "claims.html").read_text(encoding="utf8")


def test_a_picture_to_touch_brings_its_numbers_and_a_still_one(tmp_path):
    folder = tmp_path / "data" / "touch"
    folder.mkdir(parents=True)
    folder.joinpath("ranks.json").write_text('{"a": "</script>", "b": [1, 2]}')
    Image.new("RGB", (3, 3)).save(folder / "ranks.png")
    page, warnings = sphinx(tmp_path, "```{touch} ranks\nWhat is *seen* here.\n```\n\n```{touch} rank\nNothing.\n```")
    numbers = re.search(r'<script type="application/json" data-kind="ranks">(.*?)</script>', page)[1]
    assert json.loads(numbers) == {"a": "</script>", "b": [1, 2]}
    assert re.search(r'<img alt="What is \*?seen\*? here."[^>]*ranks.png', page) and "<em>seen</em>" in page
    assert "no picture 'rank'" in warnings and "there are ranks" in warnings


def test_the_times_of_a_profile_are_those_that_were_measured(tmp_path):
    run = {"day": "2026-11-26", "processor": "Some CPU"}
    (tmp_path / "profiles.json").write_text(json.dumps({"cpu": {"b": run | {"seconds": 150}, "a": run | {"seconds": 30}}}))
    (tmp_path / "notebooks").mkdir()
    for name in "ab":
        (tmp_path / "notebooks" / f"{name}.md").write_text(f"# Chapter {name}\n")
    toc = "\n\n```{toctree}\nnotebooks/a\nnotebooks/b\n```"
    page, warnings = sphinx(tmp_path, "```{times} cpu\n```\n\n```{times} full\n```" + toc)
    words = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    assert "Chapter a 0.5 Chapter b 2.5 Together 3 minutes, one thread each, on Some CPU, 2026-11-26." in words
    assert "no run at profile 'full'" in warnings and warnings.count("no run") == 1


@pytest.mark.parametrize("register", [None, "{}", json.dumps({"gains": CLAIM})])
def test_val_of_a_missing_key_is_a_warning(tmp_path, register):
    if register is not None:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "claims.json").write_text(register)
    _, warnings = sphinx(tmp_path, "Better by {val}`gain`.")
    assert "no claim 'gain'" in warnings
    assert ("did you mean gains" in warnings) == (register is not None and "gains" in register)
