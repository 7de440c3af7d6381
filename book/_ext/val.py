"""The role {val}`key`: a number of the book, looked up in data/claims.json instead of typed.

    The repaired method ends {val}`alr-vs-uniform` below a uniform rank.
    -> The repaired method ends 0.065 [0.041, 0.089] nats below a uniform rank.

Prints value, interval and unit, as a link to the claim's row on the page of claims; its tooltip, shown to mouse and keyboard
and read by screen readers, holds the claim, its verdict, the seeds and where the records lie. A key
that is not in the register is a warning, and the book is built with warnings as errors. A page that uses the role is
built again when the register changes. Without a data/claims.json every key is missing.

The role {by}`key` says a difference in words, for prose: "4.0 nats per token lower". The interval is in the tooltip. The role
{apart}`key` says where one thing ends beside another, whether or not that is sure: "0.020 [0.005, 0.035] above". The role
{num}`key` prints value and interval without the unit, where the sentence has said it.
"""

import json
from difflib import get_close_matches
from pathlib import Path

from docutils import nodes
from sphinx.util import logging
from sphinx.util.docutils import SphinxRole

from alr.evidence.claims import phrase
from alr.evidence.stats import Interval

CLAIMS = "data/claims.json"                # below the folder of the staged pages, as it is below the repository's
PAGE = "notebooks/claims"                  # the page that has a row with the id claim-KEY for every claim

logger = logging.getLogger(__name__)


def tooltip(claim: dict) -> str:
    """What stands behind the number: the claim, its verdict, runs and seeds, records."""
    seeds = ", ".join(map(str, claim.get("seeds") or []))
    runs = f"{claim['n']} run{'s' * (claim['n'] != 1)} per arm" + (f" (seeds {seeds})" if seeds else "")
    return f"{claim['text'].rstrip('.')}. Verdict: {claim['verdict']}. {runs}. Records: {claim['source']}"


def in_words(claim: dict) -> str:
    """A difference as prose says it: '4.0 nats per token lower'; two digits, the sign as a word.

    ValueError where the claim is no difference, or where its interval holds zero: then no word for its sign is true.
    """
    low, high = claim["low"], claim["high"]
    if not str(claim.get("kind")).startswith("difference"):
        raise ValueError(f"it is a {claim.get('kind')}, and only a difference is lower or higher; write {{val}}")
    if low is None or low <= 0 <= high:
        raise ValueError(f"its interval is [{low}, {high}], so neither lower nor higher is sure; write {{val}}")
    words = f"{abs(claim['value']):#.2g}".rstrip(".") + f" {claim['unit']}"
    return f"{words.strip()} {'lower' if claim['value'] < 0 else 'higher'}"


def beside(claim: dict) -> str:
    """A difference as a place: '0.020 [0.005, 0.035] above', '0.003 [-0.013, 0.019] below'; 'level [..] with' where it rounds
    to zero.  Below, the interval counts downwards, as its value does.

    ValueError where the claim is no difference, or has no interval.
    """
    if not str(claim.get("kind")).startswith("difference") or claim["low"] is None:
        raise ValueError(f"it is a {claim.get('kind')} with the interval [{claim['low']}, {claim['high']}]; write {{val}}")
    form, below = claim["format"].lstrip("+"), claim["value"] < 0
    ends = (-claim["high"], -claim["low"]) if below else (claim["low"], claim["high"])
    value, low, high = Interval(abs(claim["value"]), *ends, claim["n"]).words(form)
    if not float(value):
        _, low, high = Interval(0.0, claim["low"], claim["high"], claim["n"]).words(form)
        return f"level [{low}, {high}] with"
    return f"{value} [{low}, {high}] {'below' if below else 'above'}"


class ClaimLink(nodes.Inline, nodes.TextElement):
    """A number with attributes key and note; where it leads is known when a page is written."""


def visit(self, node):
    """An <a> to the claim's row; where the book has no page of claims, an <abbr> that the keyboard can reach."""
    builder, note = self.builder, node["note"]
    node["tag"] = "a" if PAGE in builder.env.found_docs else "abbr"
    where = {"tabindex": "0"}
    if node["tag"] == "a":                                          # a book on one page has its rows on that page
        page = "" if builder.name == "singlehtml" else builder.get_relative_uri(builder.current_docname, PAGE)
        where = {"href": f"{page}#claim-{node['key']}"}
    self.body.append(self.starttag(node, node["tag"], "", CLASS="val", title=note, **where))


def depart(self, node):
    self.body.append(f"</{node['tag']}>")


class Val(SphinxRole):
    """Looks the key up each time a page is read; the file is small."""

    def says(self, claim: dict) -> tuple[str, str]:
        """What is printed of a claim, and what its tooltip says."""
        return phrase(claim, unit=True), tooltip(claim)

    def run(self):
        path = Path(self.env.srcdir) / CLAIMS
        self.env.note_dependency(CLAIMS)
        claims = json.loads(path.read_text(encoding="utf8")) if path.exists() else {}
        key = self.text.strip()
        claim = claims.get(key)
        if claim is None:
            near = get_close_matches(key, claims, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else f"it has {len(claims)} claims."
            logger.warning("val: no claim %r in %s; %s", key, CLAIMS, hint, location=self.get_location())
            return [nodes.problematic(self.rawtext, self.rawtext)], []
        try:
            text, note = self.says(claim)
        except ValueError as error:
            logger.warning("val: claim %r cannot be said in words: %s.", key, error, location=self.get_location())
            return [nodes.problematic(self.rawtext, self.rawtext)], []
        return [ClaimLink(self.rawtext, text, key=key, note=note)], []


class By(Val):
    """A difference in words; value and interval go to the tooltip."""

    words = staticmethod(in_words)

    def says(self, claim: dict) -> tuple[str, str]:
        return self.words(claim), f"{phrase(claim, unit=True)}. {tooltip(claim)}"


class Num(By):
    """Value and interval; the unit is in the tooltip."""

    words = staticmethod(phrase)


class Apart(By):
    """A difference as a place; its unit is in the tooltip."""

    words = staticmethod(beside)


def setup(app):
    app.add_node(ClaimLink, html=(visit, depart))
    app.add_role("val", Val())
    app.add_role("by", By())
    app.add_role("apart", Apart())
    app.add_role("num", Num())
    return {"version": "2", "parallel_read_safe": True, "parallel_write_safe": True}
