"""The directive {touch}: a picture that a reader can move, of what book/touch.py wrote for it.

    ```{touch} ranks
    The ranks of all layers of one run, epoch by epoch.
    ```

The words become the caption and the still picture's alternative text.  The page holds the still picture, for readers
without scripts and for print, and the numbers as JSON, since a page from a file may not fetch any.  _static/touch.js does
the rest.  A picture that has not been written is a warning, and the book is built with warnings as errors.
"""

from pathlib import Path

from docutils import nodes
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

FOLDER = "data/touch"                      # below the folder of the staged pages; build.py writes it
BOARD = "notebooks/leaderboard"            # the page whose table is drawn, in the arms' own colours

logger = logging.getLogger(__name__)


def data(kind: str, text: str) -> nodes.raw:
    """JSON for a script, harmless inside a page: a `<` in it cannot end the element."""
    safe = text.replace("<", "\\u003c")
    return nodes.raw("", f'<script type="application/json" {kind}>{safe}</script>', format="html")


class Touch(SphinxDirective):
    required_arguments = 1
    has_content = True

    def run(self):
        name, folder = self.arguments[0], Path(self.env.srcdir) / FOLDER
        if not self.content:
            raise self.error("touch: say in words what the picture shows; they are its caption.")
        if not (folder / f"{name}.json").exists():
            there = ", ".join(sorted(path.stem for path in folder.glob("*.png"))) or "none"
            logger.warning("touch: no picture %r in %s; there are %s", name, FOLDER, there, location=self.get_location())
            return []
        self.env.note_dependency(f"{FOLDER}/{name}.json")
        words = " ".join(self.content)
        caption = nodes.caption()
        caption += self.parse_inline(words)[0]
        figure = nodes.figure("", nodes.image(uri=f"/{FOLDER}/{name}.png", alt=words), caption, classes=["alr-still"])
        box = nodes.container(classes=["alr-touch"])
        box += [figure, data(f'data-kind="{name}"', (folder / f"{name}.json").read_text(encoding="utf8"))]
        return [box]


def looks(app, doctree, docname):
    """The colours of the arms, for the page with the leaderboard."""
    path = Path(app.srcdir) / FOLDER / "looks.json"
    if docname == BOARD and path.exists():
        doctree += data('id="alr-looks"', path.read_text(encoding="utf8"))


def setup(app):
    app.add_directive("touch", Touch)
    app.connect("doctree-resolved", looks)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
