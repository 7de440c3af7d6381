"""What a built book does not need: python book/lean.py _build/html

MathJax comes in eleven combinations, of which a page loads parts of one; the theme's file of icons holds two thousand, of
which the book shows some twenty; a figure's PNG has 16 million colours to choose from and uses some hundred.  Taking out
the rest makes the folder 24 MB smaller and a page 2 to 3 MB lighter, and nothing looks different.
"""

import re
import shutil
import sys
from pathlib import Path

from PIL import Image, ImageChops

from offline import Assets, pages

MATHJAX = ("startup.js", "core.js", "input/tex.js", "input/tex/extensions/", "output/chtml.js", "output/chtml/fonts/",
           "a11y/assistive-mml.js")             # what _config.yml's mathjax3_config loads, and what that loads in turn
SEEN = 32                                       # of 255: a shade that an eye takes for the same at a line's edge
HEAVIEST = 2_500_000                            # bytes that a page may load, itself included, nothing compressed

ICON = re.compile(r'("?)([a-z0-9-]+)\1:\[\d+,\d+,\[([^\]]*)\],"[0-9a-f]*",(?:"[^"]*"|\[[^\]]*\])\],?')
NAMED = re.compile(r"\bfa-([a-z0-9-]+)")


def icons_used(texts) -> set[str]:
    """Names of the Font Awesome icons that pages and scripts mention: fa-moon -> moon."""
    return {name for text in texts for name in NAMED.findall(text)}


def fewer_icons(script: str, used: set[str]) -> str:
    """The theme's fontawesome.js with the icons in `used` alone; an icon goes by its name or by any of its aliases.

    ValueError when the file does not look as expected: a book without icons is not built in silence.
    """
    names = set()

    def keep(match):
        mine = {match[2], *re.findall(r'"([a-z0-9-]+)"', match[3])}
        if not mine & used:
            return ""
        names.update(mine)
        return match[0]

    out = ICON.sub(keep, script)
    if not names:
        raise ValueError(f"fontawesome.js holds none of the icons {', '.join(sorted(used))}: its form has changed; "
                         "make lean.ICON fit it.")
    return out


def fewer_mathjax(folder: Path) -> None:
    """Leave the parts of MathJax that a page loads, and point the pages to its start."""
    for path in sorted(folder.rglob("*"), reverse=True):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(name == kept or kept.endswith("/") and name.startswith(kept) for kept in MATHJAX):
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def fewer_colours(path: Path) -> None:
    """A PNG in a palette of its main colours, a third of the size or less.  One with transparent parts stays as it is.

    64 colours, where no part of any pixel moves by more than SEEN; else 256.
    """
    with Image.open(path) as picture:
        if picture.mode == "P" or "A" in picture.mode and picture.getchannel("A").getextrema()[0] < 255:
            return
        full = picture.convert("RGB")
        for colours in (64, 256):
            small = full.quantize(colours, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
            moved = max(high for _, high in ImageChops.difference(small.convert("RGB"), full).getextrema())
            if moved <= SEEN:
                break
        small.save(path, dpi=picture.info.get("dpi", (96, 96)), optimize=True)


def loads(path: Path) -> list[Path]:
    """The files that a page loads by itself, the page first."""
    urls = {url.split("#")[0].split("?")[0] for url in Assets(path.read_text(encoding="utf8")).urls}
    return [path, *(path.parent / url for url in sorted(urls) if url and (path.parent / url).is_file())]


def weight(path: Path, mathjax: int = 0) -> int:
    """Bytes that a page makes a browser read, itself included; mathjax: those of MathJax's parts, where it starts."""
    files = loads(path)
    return sum(file.stat().st_size for file in files) + (mathjax if any("mathjax" in file.parts for file in files) else 0)


def mathjax_parts(folder: Path) -> int:
    """Bytes of the parts that MathJax's start fetches by script, the fonts of a usual page included."""
    names = ("core.js", "input/tex.js", "output/chtml.js", "output/chtml/fonts/tex.js", "a11y/assistive-mml.js")
    return sum((folder / "_static" / "mathjax" / name).stat().st_size for name in names)


def lean(folder: Path) -> None:
    """Take out of a built book what no page needs.  SystemExit names the pages that are still above HEAVIEST."""
    built = pages(folder)
    mathjax = folder / "_static" / "mathjax"
    if (mathjax / "tex-chtml.js").exists():
        for path in built:
            text = path.read_text(encoding="utf8")
            path.write_text(text.replace("mathjax/tex-chtml.js", "mathjax/startup.js"), encoding="utf8")
        fewer_mathjax(mathjax)
    icons = folder / "_static" / "scripts" / "fontawesome.js"
    texts = [path.read_text(encoding="utf8") for path in [*built, *(folder / "_static").glob("*.js"),
                                                          *icons.parent.glob("*.js")] if path != icons]
    icons.write_text(fewer_icons(icons.read_text(encoding="utf8"), icons_used(texts)), encoding="utf8")
    (icons.parent / "fontawesome.js.map").unlink(missing_ok=True)
    shutil.rmtree(folder / "_static" / "locales", ignore_errors=True)           # the theme's words in other languages
    for path in (folder / "_images").glob("*.png"):
        fewer_colours(path)
    parts = mathjax_parts(folder)
    heavy = {path.relative_to(folder).as_posix(): weight(path, parts) for path in built}
    heavy = [f"{name} ({size / 1e6:.1f} MB)" for name, size in heavy.items() if size > HEAVIEST]
    if heavy:
        raise SystemExit(f"Pages above {HEAVIEST / 1e6:.1f} MB, all that they load included: {', '.join(heavy)}. "
                         "Draw fewer or smaller figures there.")


if __name__ == "__main__":
    lean(Path(sys.argv[1]))
