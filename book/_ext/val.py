"""The role {val}`key`: a number of the book, looked up in data/claims.json instead of typed.

    The repaired method ends {val}`alr-vs-uniform` below a uniform rank.
    -> The repaired method ends 0.065 [0.041, 0.089] nats below a uniform rank.

Prints value, interval and unit; the tooltip holds the claim, its verdict, the seeds and where the records lie. A key
that is not in the register is a warning, and the book is built with warnings as errors. A page that uses the role is
built again when the register changes. Without a data/claims.json every key is missing.
"""

import json
from difflib import get_close_matches
from pathlib import Path

from docutils import nodes
from sphinx.util import logging
from sphinx.util.docutils import SphinxRole

from alr.evidence.claims import phrase

CLAIMS = "data/claims.json"                # below the folder of the staged pages, as it is below the repository's

logger = logging.getLogger(__name__)


def tooltip(claim: dict) -> str:
    """What stands behind the number: the claim, its verdict, runs and seeds, records."""
    seeds = ", ".join(map(str, claim.get("seeds") or []))
    runs = f"{claim['n']} run{'s' * (claim['n'] != 1)} per arm" + (f" (seeds {seeds})" if seeds else "")
    return f"{claim['text'].rstrip('.')}. Verdict: {claim['verdict']}. {runs}. Records: {claim['source']}"


class Val(SphinxRole):
    """Looks the key up each time a page is read; the file is small."""

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
        node = nodes.abbreviation(self.rawtext, phrase(claim, unit=True), explanation=tooltip(claim), classes=["val"])
        return [node], []


def setup(app):
    app.add_role("val", Val())
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
