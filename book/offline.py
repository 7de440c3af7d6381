"""Is a built book complete without a network?  python book/offline.py _build/html

A page may link anywhere; it must not load anything from a server by itself: no script, style, font, picture or frame.
And what it loads from beside itself has to be there.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

# attributes of a tag that make a browser fetch something by itself; a link that a reader clicks is not among them
FETCHED = {
    "script": ["src"], "img": ["src", "srcset"], "source": ["src", "srcset"], "iframe": ["src"], "embed": ["src"],
    "video": ["src", "poster"], "audio": ["src"], "object": ["data"], "input": ["src"],
    "image": ["href", "xlink:href"], "use": ["href", "xlink:href"],
}
LINKS = {"stylesheet", "preload", "modulepreload", "prefetch", "preconnect", "dns-prefetch", "icon", "manifest"}
AFAR = r"(?:https?:)?//"
REMOTE = re.compile(rf"\s*{AFAR}", re.IGNORECASE)
REMOTE_CSS = re.compile(rf"(?:url\(\s*['\"]?|@import\s+['\"])\s*{AFAR}[^'\")\s]+", re.IGNORECASE)
REMOTE_JS = re.compile(rf"['\"`]\s*{AFAR}[^'\"`\s]+\.(?:m?js|css|wasm|woff2?)\b[^'\"`]*", re.IGNORECASE)


class Assets(HTMLParser):
    """Collects what a browser would fetch for a page by itself: .urls, and the text of its styles and scripts."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.urls, self.css, self.js, self.inside = [], [], [], None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attrs = {name: value or "" for name, value in attrs}
        self.inside = tag if tag in ("style", "script") else None
        self.css.append(attrs.get("style", ""))
        if tag == "link" and LINKS & set(attrs.get("rel", "").lower().split()):
            self.urls.append(attrs.get("href", ""))
        for name in FETCHED.get(tag, []):
            if name in attrs:
                many = attrs[name].split(",") if name == "srcset" else [attrs[name]]
                self.urls += [part.split()[0] for part in many if part.split()]

    def handle_data(self, data):
        if self.inside:
            (self.css if self.inside == "style" else self.js).append(data)

    def handle_endtag(self, tag):
        self.inside = None


def fetched_from_afar(page: str) -> list[str]:
    """Addresses that a page (its HTML) would fetch from a network."""
    assets = Assets(page)
    return ([url for url in assets.urls if REMOTE.match(url)]
            + [match[0] for text in assets.css for match in REMOTE_CSS.finditer(text)]
            + [match[0] for text in assets.js for match in REMOTE_JS.finditer(text)])


def missing(page: str, folder: Path) -> list[str]:
    """Local files that a page below `folder` would load and that are not there."""
    local = [url for url in Assets(page).urls if url and not REMOTE.match(url) and not url.startswith(("data:", "#"))]
    return [url for url in local if not (folder / url.split("#")[0].split("?")[0]).exists()]


def pages(folder: Path) -> list[Path]:
    """The HTML pages of a built book, in the order of their names; without the theme's templates."""
    return sorted(set(folder.rglob("*.html")) - set(folder.rglob("_static/**/*.html")))


def complete(folder: Path) -> None:
    """Stop unless every page in a built book needs nothing but the files beside it."""
    complaints = []
    for path in pages(folder):
        page = path.read_text(encoding="utf8")
        complaints += [f"{path.relative_to(folder)} fetches {url}" for url in fetched_from_afar(page)]
        complaints += [f"{path.relative_to(folder)} misses {url}" for url in missing(page, path.parent)]
    for path in sorted(folder.rglob("*.css")):
        style = path.read_text(encoding="utf8")
        complaints += [f"{path.relative_to(folder)} fetches {match[0]}" for match in REMOTE_CSS.finditer(style)]
    if complaints:
        raise SystemExit("The book is not complete without a network:\n" + "\n".join(complaints))


if __name__ == "__main__":
    complete(Path(sys.argv[1]))
