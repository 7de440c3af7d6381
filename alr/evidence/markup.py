"""HTML from text that is not ours: whatever is no `Html` yet is escaped.

    tag("td", tag("b", "a < b"), class_="alr-quiet")      # <td class="alr-quiet"><b>a &lt; b</b></td>
"""

from __future__ import annotations

import html
from collections.abc import Iterable

VERDICTS = {                            # word -> (colour, tint): Okabe and Ito's; never colour without the word
    "holds": ("#00734f", "#d5efe5"), "fails its bar, gain decided": ("#7a5600", "#fbf0cf"), "fails": ("#a63f00", "#fbe3d3"),
    "open": ("#005a8f", "#d6eaf6"),
    "figure": ("#444444", "#ececec"), "not recorded": ("#666666", "#f5f5f5"),
}


class Html(str):
    """Text that is HTML already; a notebook shows it as it is, a terminal is told its size."""

    def _repr_html_(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"<{self.count('<tr')} table rows as HTML>"


BR, DASH, GAP = Html("<br>"), Html("&ndash;"), Html("&nbsp;")


def safe(content: object) -> Html:
    """Html as it is, anything else as text with &, <, > and quotes escaped."""
    return content if isinstance(content, Html) else Html(html.escape(str(content)))


def join(parts: Iterable[object], between: str = "") -> Html:
    """The parts, each made safe, with `between` between them."""
    return Html(safe(between).join(map(safe, parts)))


def tag(name: str, *content: object, **attributes: object) -> Html:
    """One element.  class_ becomes class, data_sort becomes data-sort; an attribute that is None is left out."""
    given = "".join(f' {k.strip("_").replace("_", "-")}="{html.escape(str(v))}"' for k, v in attributes.items()
                    if v is not None)
    return Html(f"<{name}{given}>{join(content)}</{name}>")


def pill(verdict: str) -> Html:
    """A verdict in colour and words; a word that is no verdict stays grey."""
    colour, tint = VERDICTS.get(verdict, VERDICTS["not recorded"])
    return tag("span", verdict, class_="alr-verdict", style=f"color:{colour};background:{tint}")
