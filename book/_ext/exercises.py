"""Exercises and their solutions get numbers: below a heading "Exercises", item 2 of a chapter's list becomes "Exercise 3.2".

The first number is that of the chapter's file (03_v3 -> 3); a page without one counts from 1.  A folded box "Solution"
belongs to the exercise before it.  Links find an exercise at #exercise-2.  Notebooks stay plain: in JupyterLab the list
reads as it is typed.
"""

import re

from docutils import nodes

HEADING, SOLUTION = "Exercises", "Solution"


def chapter(docname: str) -> str:
    """'notebooks/03_v3' -> '3.', 'notebooks/map' -> ''."""
    found = re.match(r"(\d+)_", docname.rsplit("/", 1)[-1])
    return f"{int(found[1])}." if found else ""


def number(doctree: nodes.document, docname: str) -> int:
    """Put numbers on the exercises and solutions of one page, in place -> how many exercises there are."""
    count = 0
    for section in doctree.findall(nodes.section):
        if section[0].astext().strip() != HEADING:
            continue
        for part in section.children[1:]:
            if isinstance(part, nodes.enumerated_list):
                part["classes"].append("alr-exercises")
                for item in part.children:
                    count += 1
                    item["ids"].append(f"exercise-{count}")
                    first = item.next_node(nodes.paragraph)
                    first.insert(0, nodes.strong("", f"Exercise {chapter(docname)}{count}"))
                    first.insert(1, nodes.Text(". "))
            elif part.get("design_component") == "dropdown" and part[0].astext() == SOLUTION:
                part[0].children = [nodes.Text(f"{SOLUTION} {chapter(docname)}{count}")]
    return count


def setup(app):
    app.connect("doctree-read", lambda app, doctree: number(doctree, app.env.docname))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
