"""What a notebook's output depends on, as fingerprints: what is stale is found by content, since a clone has no useful times.

    Checkout(ROOT).inputs(notebook)    # {'cells': '6f0c…', 'modules': …, 'data': …, 'titles': …, 'pins': …, 'profile': …}

cells     The sources of the code cells, without their outputs.
modules   What the cells import of alr/, and what that imports in turn, as syntax trees: comments, docstrings and line breaks
          stale nothing. The parents of an imported module run too, so they count. A module that reads docstrings counts as
          text. Cells that start other programs, import by name or look at sources depend on the text of all of alr/.
data      Every file of data/ but the cache and hidden ones: records, suites, claims. One fingerprint for all chapters,
          because which suite a chapter reads cannot be seen without running it.
titles    The first line of each notebook, which the page of claims quotes.
pins      The lines of constraints.txt, without comments.
profile   The sizes; 'committed' is the notebooks' own default.

The machine, its Python and $ALR_DATA are not among them: outputs are taken as the machine that refreshed has made them.
Every Python from 3.11 on gives the same fingerprints. Standard library only.
"""

import ast
import hashlib
import json
import re
from pathlib import Path

MAGIC = re.compile(r"^[ \t]*[%!?].*$", re.MULTILINE)
READS_PROSE = re.compile(r"\b(__doc__|inspect|getsource)\b")
ANYTHING = re.compile(r"^[ \t]*[%!?]|\?[ \t]*$"
                      r"|\b(__doc__|__import__|importlib|inspect|runpy|subprocess|multiprocessing|help)\b", re.MULTILINE)


def digest(*parts: object) -> str:
    """Sixteen hexadecimal digits over any values that JSON can write."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()[:16]


def tree(node: object) -> object:
    """A syntax tree as nested lists, without positions and docstrings.

    Fields that are empty are left out: newer Pythons have more of them, and ast.dump differs between versions.
    """
    if isinstance(node, list):
        return [tree(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        first = node.body[0] if node.body else None
        prose = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
        fields["body"] = node.body[1:] if prose else node.body
    return [type(node).__name__, *([name, tree(value)] for name, value in fields.items() if value not in (None, []))]


def imported(node: ast.AST, package: str = "") -> set[str]:
    """Full names that a syntax tree imports anywhere; of `from a import b` both a and a.b, since b may be a module."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            found |= {alias.name for alias in part.names}
        elif isinstance(part, ast.ImportFrom):
            above = package.split(".")[:len(package.split(".")) - part.level + 1] if part.level else []
            base = ".".join([*above, *([part.module] if part.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in part.names)}
    return found


def files(root: Path) -> dict[str, Path]:
    """All files of alr/ and data/ that count, and the pins, by their path below root."""
    paths = [*(root / "alr").rglob("*.py"), *(path for path in (root / "data").rglob("*") if path.is_file()),
             root / "constraints.txt"]
    found = {path.relative_to(root).as_posix(): path for path in sorted(paths)}
    return {name: path for name, path in found.items() if not name.startswith("data/cache/") and "/." not in name}


def times(root: Path) -> dict[str, tuple[int, int]]:
    """Time of change and size of each of `files`."""
    found = {name: path.stat() for name, path in files(root).items()}
    return {name: (status.st_mtime_ns, status.st_size) for name, status in found.items()}


class Checkout:
    """A checkout as it is at this moment: everything is read once, when it is made (about a second)."""

    def __init__(self, root: Path):
        self.root, self.times, self.text, self.syntax, self.imports = root, times(root), {}, {}, {}
        for path in (path for name, path in files(root).items() if name.startswith("alr/")):
            *parents, last = path.relative_to(root).with_suffix("").parts
            package = ".".join(parents)
            name = package if last == "__init__" else f"{package}.{last}"
            text = path.read_text(encoding="utf8")
            parsed = ast.parse(text)
            self.text[name] = digest(text)
            self.syntax[name] = digest(text if READS_PROSE.search(text) else tree(parsed))
            self.imports[name] = imported(parsed, package)
        self.data = digest({name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files(root).items()
                            if name.startswith("data/")})
        self.titles = digest({path.stem: title(path) for path in sorted((root / "notebooks").glob("*.ipynb"))})
        lines = (root / "constraints.txt").read_text(encoding="utf8").splitlines()
        self.pins = digest([line.strip() for line in lines if line.strip() and not line.startswith("#")])

    def current(self) -> "Checkout":
        """This one, or a new one where a file of alr/, of data/, or the pins have been written since."""
        return self if times(self.root) == self.times else Checkout(self.root)

    def closure(self, names: set[str]) -> set[str]:
        """The modules of alr/ that run when these names are imported, parents included."""
        todo, found = list(names), set()
        while todo:
            parts = todo.pop().split(".")
            for name in (".".join(parts[:i]) for i in range(1, len(parts) + 1)):
                if name in self.syntax and name not in found:
                    found.add(name)
                    todo += self.imports[name]
        return found

    def inputs(self, notebook: Path, profile: str = "") -> dict[str, str]:
        """The fingerprints of all that a notebook's output depends on, by what they are of."""
        cells = [source(cell) for cell in read(notebook)["cells"] if cell["cell_type"] == "code"]
        if any(ANYTHING.search(cell) for cell in cells):
            modules = self.text
        else:
            names = set().union(*(imported(ast.parse(MAGIC.sub("", cell))) for cell in cells))
            modules = {name: self.syntax[name] for name in self.closure(names)}
        return {"cells": digest(cells), "modules": digest(sorted(modules.items())), "data": self.data, "titles": self.titles,
                "pins": self.pins, "profile": profile or "committed"}


def read(notebook: Path) -> dict:
    """A notebook as JSON; one without cells where there is none, or none that can be read."""
    try:
        return {"cells": [], "metadata": {}} | json.loads(notebook.read_text(encoding="utf8"))
    except (OSError, ValueError):
        return {"cells": [], "metadata": {}}


def source(cell: dict) -> str:
    return "".join(cell["source"])


def title(notebook: Path) -> str:
    cells = read(notebook)["cells"]
    return source(cells[0]).split("\n")[0] if cells else ""


def stamp(notebook: Path) -> dict:
    """What was written into a notebook's metadata when it ran: its `inputs`, and the CPU `seconds` that it took."""
    return read(notebook)["metadata"].get("alr", {})


def changed(notebook: Path, inputs: dict[str, str]) -> list[str]:
    """Which inputs are others than those that a notebook's outputs were made from; all of them if it does not say."""
    stored = stamp(notebook).get("inputs", {})
    return [name for name, value in inputs.items() if stored.get(name) != value]
