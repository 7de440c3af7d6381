"""Stale by content: what a notebook's output depends on moves its fingerprint, what it does not depend on leaves it alone."""

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "book"))


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "book" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stale = load("stale")

FILES = {
    "alr/__init__.py": '"""A library."""\nfrom .parts import grow\n',
    "alr/parts.py": '"""Parts."""\n\n\ndef grow(x):\n    """One more."""\n    return x + 1    # the next\n',
    "alr/lab/__init__.py": "from .run import train\n",
    "alr/lab/run.py": "def train(n):\n    from ..deep import depth\n    return depth(n)\n",
    "alr/deep.py": "def depth(n):\n    return 2 * n\n",
    "alr/integrations/__init__.py": "",
    "alr/integrations/trainer.py": "import alr\n",
    "alr/help.py": '"""Usage."""\nprint(__doc__)\n',
    "data/claims.json": "{}",
    "data/runs/method/a.jsonl": '{"loss": 1}\n',
    "data/cache/corpus.txt": "words",
    "constraints.txt": "# pins\ntorch==2.13.0\n",
}


@pytest.fixture
def root(tmp_path):
    """A checkout in small, with a chapter that trains and one that it only names."""
    for name, text in FILES.items():
        write(tmp_path, name, text)
    cells = [new_markdown_cell("# Training\n\nwords"), new_code_cell("from alr.lab import train"),
             new_code_cell("train(3)", execution_count=2, outputs=[new_output("stream", text="6\n")])]
    (tmp_path / "notebooks").mkdir()
    nbformat.write(new_notebook(cells=cells), tmp_path / "notebooks" / "01_train.ipynb")
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Other\n\nwords")]), tmp_path / "notebooks" / "02_other.ipynb")
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text, encoding="utf8")


def edit(root: Path, name: str, old: str, new: str) -> None:
    text = (root / name).read_text(encoding="utf8")
    assert old in text
    write(root, name, text.replace(old, new))


def inputs(root: Path, profile: str = "") -> dict:
    return stale.Checkout(root).inputs(root / "notebooks" / "01_train.ipynb", profile)


def moved(root: Path, before: dict) -> list[str]:
    return [name for name, value in inputs(root).items() if value != before[name]]


CHAPTER = "notebooks/01_train.ipynb"


@pytest.mark.parametrize("part, change", [
    ("cells", lambda root: edit(root, CHAPTER, "train(3)", "train(4)")),
    ("cells", lambda root: edit(root, CHAPTER, "train(3)", "train(3)  # shown on the page")),
    ("modules", lambda root: edit(root, "alr/lab/run.py", "depth(n)", "depth(n + 1)")),
    ("modules", lambda root: edit(root, "alr/deep.py", "2 * n", "3 * n")),                  # imported inside a function
    ("modules", lambda root: edit(root, "alr/parts.py", "x + 1", "x + 2")),                 # by a parent of what is imported
    ("modules", lambda root: edit(root, "alr/lab/__init__.py", "import train", "import train as train")),
    ("modules", lambda root: (root / "alr/deep.py").unlink()),
    ("data", lambda root: write(root, "data/claims.json", '{"a": 1}')),
    ("data", lambda root: edit(root, "data/runs/method/a.jsonl", "1", "2")),
    ("data", lambda root: write(root, "data/runs/method/b.jsonl", "{}")),
    ("data", lambda root: (root / "data/runs/method/a.jsonl").rename(root / "data/runs/method/c.jsonl")),
    ("data", lambda root: (root / "data/runs/method/a.jsonl").unlink()),
    ("titles", lambda root: edit(root, "notebooks/02_other.ipynb", "# Other", "# Another")),
    ("titles", lambda root: (root / "notebooks/02_other.ipynb").unlink()),
    ("pins", lambda root: edit(root, "constraints.txt", "2.13.0", "2.13.1")),
])
def test_what_an_output_depends_on_moves_its_fingerprint(root, part, change):
    before = inputs(root)
    change(root)
    assert moved(root, before) == [part]


def test_a_profile_has_a_fingerprint_of_its_own(root):
    assert {name for name, value in inputs(root).items() if value != inputs(root, "cpu")[name]} == {"profile"}


@pytest.mark.parametrize("change", [
    lambda root: edit(root, "alr/parts.py", "# the next", "# the one after"),
    lambda root: edit(root, "alr/parts.py", '"""One more."""', '"""Add one."""'),
    lambda root: edit(root, "alr/parts.py", '"""Parts."""\n\n\n', '"""All parts."""\n'),
    lambda root: edit(root, "alr/parts.py", "return x + 1", "return (\n        x + 1)"),
    lambda root: edit(root, "alr/__init__.py", '"""A library."""\n', ""),
    lambda root: edit(root, "alr/integrations/trainer.py", "import alr", "import alr\nprint(1)"),       # nobody imports it
    lambda root: write(root, "data/cache/corpus.txt", "other words"),
    lambda root: write(root, "data/runs/method/.running-b/log.jsonl", "{}"),                 # of a sweep that is at work
    lambda root: edit(root, "constraints.txt", "# pins", "# all pins"),
    lambda root: edit(root, "notebooks/02_other.ipynb", "words", "other words"),
    lambda root: edit(root, CHAPTER, '"execution_count": 2', '"execution_count": 5'),
    lambda root: edit(root, CHAPTER, '"6\\n"', '"7\\n"'),
])
def test_prose_and_what_does_not_run_leave_a_fingerprint_alone(root, change):
    before = inputs(root)
    change(root)
    assert moved(root, before) == []


@pytest.mark.parametrize("cell", ["!python -m alr.help", "%run x.py", "import subprocess", "train?", "help(train)",
                                  "import inspect", "import importlib", "print(train.__doc__)"])
def test_a_cell_that_may_run_or_read_anything_depends_on_all_of_alr_as_text(root, cell):
    edit(root, CHAPTER, "train(3)", cell)
    before = inputs(root)
    edit(root, "alr/integrations/trainer.py", "import alr", "import alr  # prose")
    assert moved(root, before) == ["modules"]


def test_a_module_that_reads_docstrings_counts_with_them(root):
    edit(root, "alr/deep.py", "def depth", "from . import help\n\n\ndef depth")
    before = inputs(root)
    edit(root, "alr/help.py", "Usage", "How it is used")
    assert moved(root, before) == ["modules"]


def test_a_checkout_is_read_again_only_after_a_change(root):
    checkout = stale.Checkout(root)
    assert checkout.current() is checkout
    write(root, "data/runs/method/b.jsonl", "{}")
    assert checkout.current().data != checkout.data


# ---------------------------------------------------------------- this checkout

TRACE = """
import builtins, json, sys
edges, plain = set(), builtins.__import__
def traced(name, globals=None, locals=None, fromlist=(), level=0):
    module, importer = plain(name, globals, locals, fromlist, level), (globals or {}).get("__name__", "")
    if importer.startswith("alr") and module.__name__.startswith("alr"):
        parts = [f"{module.__name__}.{part}" for part in fromlist or ()]
        edges.update((importer, part) for part in [module.__name__, *parts] if part in sys.modules)
    return module
builtins.__import__ = traced
for name in sys.argv[1:]:
    plain(name)
print(json.dumps(sorted(edges)))
"""


def test_every_import_inside_the_library_is_seen_in_its_syntax():
    """What Python really imports, module by module, beside what the fingerprints think that it imports."""
    checkout = stale.Checkout(ROOT)
    names = [name for name in checkout.syntax if not name.startswith("alr.integrations.")]      # transformers takes long
    done = subprocess.run([sys.executable, "-c", TRACE, *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    edges = json.loads(done.stdout)
    assert len(edges) > 200
    unseen = [(a, b) for a, b in edges if b in checkout.syntax and b not in checkout.closure({a})]
    assert not unseen, f"imported in a way that book/stale.py does not see: {unseen}"


def test_the_library_imports_nothing_of_its_own_by_name():
    for path in (ROOT / "alr").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            words = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert words not in ("__import__", "runpy.run_module", "runpy.run_path", "exec", "eval"), f"{path}: {words}"
            if words.endswith("import_module"):
                assert path.parent.name == "integrations", f"{path} imports by name: book/stale.py would not see it"


def test_a_chapter_depends_on_what_it_trains_with_and_not_on_the_recorder():
    checkout = stale.Checkout(ROOT)
    found = checkout.closure({"alr.lab", "alr.lab.train"})
    assert {"alr", "alr.adapt", "alr.recipes", "alr.lab.loop"} <= found and "alr.evidence.sweep" not in found


@pytest.mark.parametrize("python", ["python3.12", "python3.13", "python3.14"])
def test_every_python_gives_the_same_fingerprints(python):
    """A reader with a newer Python must not find every chapter stale."""
    program = ("import sys, json; sys.path.insert(0, 'book'); import stale; from pathlib import Path; "
               "print(json.dumps(stale.Checkout(Path('.')).syntax))")
    if not shutil.which(python) or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"{python} is not here")
    theirs = subprocess.run([python, "-B", "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert json.loads(theirs) == stale.Checkout(ROOT).syntax


# ---------------------------------------------------------------- what the commands make of it

@pytest.fixture
def notebooks(root, monkeypatch):
    """book/notebooks.py in the small checkout; papermill is not asked, its place is taken by the print of a number."""
    module = load("notebooks")
    monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(module, "NOTEBOOKS", root / "notebooks")
    monkeypatch.setattr(module, "BUILD", root / "_build")
    module.ran = []

    def process(command):
        task = json.loads(command[-1])
        module.ran.append(Path(task["notebook"]).stem)
        nb = nbformat.read(task["notebook"], as_version=4)
        nb.metadata["papermill"] = {"duration": 1.0}
        for i, cell in enumerate(cell for cell in nb.cells if cell.cell_type == "code"):
            cell.outputs, cell.execution_count = [new_output("stream", text=f"{len(module.ran)}\n")], i + 1
        Path(task["output"]).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, task["output"])
        return True, "", 7.2

    monkeypatch.setattr(module, "process", process)
    return module


def test_only_stale_chapters_run_and_the_others_are_as_committed(notebooks, root, capsys):
    chapters = notebooks.find([])
    notebooks.refresh(chapters)
    stored = {path: path.read_bytes() for path in chapters}
    notebooks.ran.clear()
    notebooks.run(chapters, "")
    assert notebooks.ran == [] and "2 of 2 chapters are as committed; make book ARGS=--all" in capsys.readouterr().out
    edit(root, "notebooks/01_train.ipynb", "train(3)", "train(4)")
    notebooks.run(chapters, "")
    notebooks.run(chapters, "")                                     # the second call has nothing left to do
    assert notebooks.ran == ["01_train"]
    notebooks.run(chapters, "", everything=True)
    assert sorted(notebooks.ran) == ["01_train", "02_other"]
    notebooks.run(chapters, "", everything=True)                    # goes on where the first was cut off
    notebooks.run(chapters, "cpu")
    assert len(notebooks.ran) == 4
    edit(root, "notebooks/01_train.ipynb", "train(4)", "train(3)")
    assert {path: path.read_bytes() for path in chapters} == stored


def test_what_is_stale_and_the_tour_are_checked_and_with_all_every_one(notebooks, root, monkeypatch, capsys):
    chapters, checked = notebooks.find([]), []
    notebooks.refresh(chapters)
    monkeypatch.setattr(notebooks, "TOUR", "02_other")
    monkeypatch.setattr(notebooks, "process", lambda command: (checked.append(Path(command[-1]).stem), True, "", 1.0)[1:])
    notebooks.check(chapters)
    assert checked == ["02_other"] and "1 of 2 chapters are as committed; make test ARGS=--all" in capsys.readouterr().out
    notebooks.check(chapters, everything=True)                      # what has passed is not repeated
    assert checked == ["02_other", "01_train"]
    edit(root, "notebooks/01_train.ipynb", "train(3)", "train(4)")
    notebooks.check(chapters)
    assert checked == ["02_other", "01_train", "01_train"]


def test_new_words_reach_the_page_without_a_run(notebooks, root):
    chapters = notebooks.find(["01_train"])
    notebooks.run(chapters, "")
    edit(root, "notebooks/01_train.ipynb", '"words"', '"other words"')
    notebooks.run(chapters, "")
    nb = nbformat.read(root / "_build/run/committed/01_train.ipynb", as_version=4)
    assert notebooks.ran == ["01_train"] and nb.cells[0].source == "# Training\n\nother words"
    assert nb.cells[2].outputs[0].text == "1\n" and nb.cells[2].execution_count == 2


def test_refresh_stamps_and_twice_gives_no_diff(notebooks, root, capsys):
    chapters = notebooks.find(["01_train"])
    assert notebooks.stale(chapters) == chapters and "01_train (says no inputs)" in capsys.readouterr().out
    notebooks.refresh(chapters)
    assert notebooks.stale(chapters) == [] and stale.stamp(chapters[0])["seconds"] == 7
    once = chapters[0].read_text(encoding="utf8")
    notebooks.ran.clear()
    notebooks.refresh(chapters)
    assert chapters[0].read_text(encoding="utf8") == once
    edit(root, "alr/deep.py", "2 * n", "3 * n")
    assert notebooks.stale(chapters) == chapters and "01_train (modules)" in capsys.readouterr().out


def test_an_output_whose_inputs_changed_while_it_ran_stays_stale(notebooks, root, monkeypatch, capsys):
    usual = notebooks.process

    def meanwhile(command):
        edit(root, "alr/deep.py", "2 * n", "3 * n")
        return usual(command)

    monkeypatch.setattr(notebooks, "process", meanwhile)
    notebooks.refresh(notebooks.find(["01_train"]))
    assert "changed while it ran" in capsys.readouterr().out
    edit(root, "alr/deep.py", "3 * n", "2 * n")
    assert notebooks.stale(notebooks.find(["01_train"]))


def test_seconds_stay_until_they_are_wrong_by_more_than_half(notebooks):
    assert notebooks.steady(7, None) == 7 and notebooks.steady(12, 10) == 10 and notebooks.steady(7, 10) == 10
    assert notebooks.steady(20, 10) == 20 and notebooks.steady(5, 10) == 5


def test_what_is_left_follows_the_pace_of_what_is_done(notebooks):
    expected = {"a": 40.0, "b": 20.0, "c": 20.0}
    assert notebooks.to_go(expected, {}, {}, 2, now=0) == 40                         # the heaviest decides
    assert notebooks.to_go(expected, {"b": 0.0}, {"b": 40.0}, 2, now=40) == 80       # a machine half as fast
    assert notebooks.to_go(expected, {"a": 0.0, "b": 0.0}, {"b": 20.0}, 2, now=20) == 20
    assert notebooks.to_go({}, {}, {}, 2, now=0) == 0


def test_a_bar_fits_its_terminal(notebooks):
    assert notebooks.bar(5, 20, "about 3 min to go, running a, b", 100) == \
        "[#####...............] 5 of 20, about 3 min to go, running a, b"
    assert len(notebooks.bar(5, 20, "x" * 200, 80)) == 79
