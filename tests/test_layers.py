"""The house: who may import whom, and what `import alr` costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {                          # wing -> the wings that it may import from, besides itself; "": the files of alr/
    "": set(),
    "history": {""},
    "recipes": {"", "history"},
    "integrations": {""},
    "front": {"", "recipes", "integrations"},       # alr/__init__.py
    "lab": {"", "history", "recipes", "front"},
    "evidence": {"", "history", "recipes", "front", "lab"},
    "entries": {"lab", "evidence"},     # python -m alr.train, alr.sweep, alr.claims
    "book": {"", "history", "recipes", "front", "integrations", "lab", "evidence"},
}
FRONT, ENTRIES = ("alr",), (("alr", "train"), ("alr", "sweep"), ("alr", "claims"))
FILES = sorted([*ROOT.glob("alr/**/*.py"), *ROOT.glob("book/**/*.py")])


def wing(module: tuple[str, ...]) -> str:
    """The wing of a module by its dotted name, as a tuple."""
    if module[0] != "alr":
        return "book"
    if module == FRONT or module in ENTRIES:
        return "front" if module == FRONT else "entries"
    return module[1] if (ROOT / "alr" / module[1]).is_dir() else ""


def name(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported(path: Path) -> set[tuple[str, ...]]:
    """The modules of alr that a file imports anywhere in it: in functions and for type checkers too."""
    found, here = set(), name(path) if path.name == "__init__.py" else name(path)[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = here[:len(here) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:                # `from .. import recipes` names a module, `from ..adapt import Recipe` not
                path_of = ROOT.joinpath(*base, alias.name)
                found.add((*base, alias.name) if path_of.is_dir() or path_of.with_suffix(".py").exists() else base)
    return {module for module in found if module[:1] == ("alr",)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(path.relative_to(ROOT).parts))
def test_imports_go_in_one_direction(path):
    mine = wing(name(path))
    others = {module: wing(module) for module in imported(path)}
    against = [".".join(module) for module, theirs in others.items() if theirs != mine and theirs not in MAY_IMPORT[mine]]
    assert not against, f"a file of the wing {mine or 'alr'} imports {', '.join(against)}"


def test_the_wings_have_an_order():
    """MAY_IMPORT has no circle, knows every folder of alr/, and the reader of imports sees what is there."""
    ranks, left = {}, dict(MAY_IMPORT)
    while left:
        free = [w for w, needs in left.items() if needs <= set(ranks)]
        assert free, f"a circle among {', '.join(left)}"
        ranks |= {w: len(ranks) for w in free}
        left = {w: needs for w, needs in left.items() if w not in free}
    assert {p.parent.name for p in ROOT.glob("alr/*/__init__.py")} <= set(MAY_IMPORT)
    seen = imported(ROOT / "alr" / "evidence" / "suite.py")
    assert {("alr", "recipes"), ("alr", "adapt"), ("alr", "lab", "config"), ("alr", "evidence", "records")} <= seen


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "evidence" and p.stem not in ("suite", "sweep")],
                         ids=lambda path: path.stem)
def test_records_are_read_without_code_that_trains(path):
    """A record outlives the code that made it: what reads, judges and draws it needs the log's digest and nothing else."""
    outside = {module for module in imported(path) if wing(module) != "evidence"}
    assert outside <= {("alr", "lab", "log")}
    assert "torch" not in {word for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                           for word in ([a.name.split(".")[0] for a in node.names] if isinstance(node, ast.Import) else
                                        [(node.module or "").split(".")[0]] if isinstance(node, ast.ImportFrom) else [])}


def test_import_alr_brings_torch_and_numpy_only():
    code = ("import sys, torch, numpy; before = {m.split('.')[0] for m in sys.modules}; import alr; "
            "print(*{m.split('.')[0] for m in sys.modules} - before - sys.stdlib_module_names - {'alr'}, sep='\\n')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == []
