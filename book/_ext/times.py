"""The directive {times}: how long every notebook took at a profile, of what `book/notebooks.py times` wrote.

    ```{times} cpu
    ```

One table: the notebook, the minutes of CPU time of its run from end to end, and below it the machine and the day.  A
profile without a run is a warning, and the book is built with warnings as errors.
"""

import json
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

FILE = "profiles.json"                      # in the folder of the staged pages

logger = logging.getLogger(__name__)


def table(runs: dict[str, dict]) -> list[str]:
    """Markdown of the table and of the sentence below it; runs: {notebook: {"seconds", "day", "processor"}}."""
    lines = ["| notebook | minutes of CPU time |", "|---|---:|"]
    lines += [f"| {{doc}}`notebooks/{name}` | {run['seconds'] / 60:.1f} |" for name, run in sorted(runs.items())]
    machines = " and ".join(sorted({run["processor"] for run in runs.values()}))
    days = sorted({run["day"] for run in runs.values()})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    total = round(sum(run["seconds"] for run in runs.values()) / 60)
    return [*lines, "", f"Together {total} minute{'s' * (total != 1)}, one thread each, on {machines}, {when}."]


class Times(SphinxDirective):
    required_arguments = 1

    def run(self):
        profile, path = self.arguments[0], Path(self.env.srcdir) / FILE
        runs = json.loads(path.read_text(encoding="utf8")).get(profile, {}) if path.exists() else {}
        if not runs:
            logger.warning("times: no run at profile %r in %s; python book/notebooks.py times --profile %s makes them",
                           profile, FILE, profile, location=self.get_location())
            return []
        self.env.note_dependency(FILE)
        box = nodes.container()
        self.state.nested_parse(StringList(table(runs), str(path)), self.content_offset, box)
        return box.children


def setup(app):
    app.add_directive("times", Times)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
