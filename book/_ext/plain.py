"""Docstrings in plain sentences, as the library writes them, made ready for Sphinx: `name` becomes code, signs stay signs."""

import re

SIGNS = re.compile(r"([\\*_|])")


def words(line: str) -> str:
    """A line of prose: what stands between backticks becomes code, all other signs lose their meaning in markup."""
    parts = line.split("`")
    if len(parts) % 2 == 0:                             # a backtick without a partner
        return SIGNS.sub(r"\\\1", line.replace("`", "'"))
    return "".join(f"``{part}``" if i % 2 else SIGNS.sub(r"\\\1", part) for i, part in enumerate(parts))


def ready(lines: list[str]) -> list[str]:
    """The lines of a docstring: examples as they are, indented blocks as they are typed, all else as prose."""
    out, block, margin = [], "", 0
    for line in lines:
        indented = line[:1] == " " and line.strip()
        if indented and not block and (not out or not out[-1].strip()):
            block = "example" if line.strip().startswith(">>>") else "typed"
            margin = len(line) - len(line.lstrip())
            if block == "typed":
                out += ["::", ""]
        elif line.strip() and not indented:
            block = ""
        if block == "example":
            out.append(line[margin:].rstrip())
        else:
            out.append(line if block else words(line.strip() if not out or out[-1].strip() else line))
    return out


def setup(app):
    def replace(app, what, name, obj, options, lines):
        lines[:] = ready(lines)
    app.connect("autodoc-process-docstring", replace)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
