"""Draw the pictures that pages of Markdown show, from code and from data of the repository: python book/figures.py.

They are committed, so that the README and the notebooks show them before anything is built. Each SVG holds a digest of what
it was drawn from; tests/book/test_figures.py fails when that has changed since.
"""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from alr import recipes
from alr.evidence import diagrams
from alr.evidence.paths import DATA, ROOT
from alr.evidence.style import STYLE

FOLDER = ROOT / "book" / "_static" / "drawn"
V8 = DATA / "published" / "v8_block0.csv"               # from the log that came with the script v8
BOTH = {"v10": recipes.v10, "the budget recipe": recipes.alr}

PICTURES: dict[str, Callable[[], Figure]] = {
    "own-null": lambda: diagrams.own_null(pd.read_csv(V8)),
    "own-null-narrow": lambda: diagrams.own_null(pd.read_csv(V8), narrow=True),
    "cut": diagrams.cut,
    "forgotten": diagrams.forgotten,
    "loop": lambda: diagrams.loop(BOTH),
    "mask": diagrams.mask,
}


def source() -> str:
    """A digest of what the pictures are drawn from: the code, the data, the recipes."""
    parts = [Path(diagrams.__file__).read_bytes(), V8.read_bytes(), "\n".join(map(repr, BOTH.values())).encode()]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def write(folder: Path = FOLDER) -> list[Path]:
    """All pictures as SVG, letters as outlines, without a date -> their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.svg" for name in PICTURES]
    for path, draw in zip(paths, PICTURES.values()):
        with plt.rc_context(STYLE):
            draw().savefig(path, metadata={"Date": None, "Creator": None, "Source": source()})
    return paths


if __name__ == "__main__":
    sys.stdout.writelines(f"{path.relative_to(ROOT)}\n" for path in write())
