"""Build the book from the notebooks that `notebooks.py run` has run: python book/build.py html | pdf [--profile cpu].

--stored takes the notebooks as they are committed, with the outputs that `refresh` has stored, and says how many of them
come from other code, data or pins than today's.

Everything a page needs is copied to _build/src first (staged), flat, as Jupyter Book likes it: the pages of book/, the
run notebooks in notebooks/, data/. The table of contents, and links, lose what is not there yet. Warnings are errors.
At last offline.py searches every page for what it would fetch from a network.
"""

import argparse
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import yaml

import touch
from lean import lean
from offline import complete
from stale import Checkout, changed

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "_build"
SRC = BUILD / "src"

THEBE = re.compile(r"\s*<script[^>]*>(?:const THEBE_JS_URL[^<]*)?</script>")


# ---------------------------------------------------------------- stage

def present(toc: dict, there) -> dict:
    """The table of contents without the files that are not there(file); a page that goes takes its sections along."""
    kept = {key: value for key, value in toc.items() if key not in ("chapters", "sections", "parts")}
    for key in ("chapters", "sections", "parts"):
        entries = [present(entry, there) for entry in toc.get(key, []) if "file" not in entry or there(entry["file"])]
        entries = [entry for entry in entries if "file" in entry or entry.get("chapters")]
        if entries:
            kept[key] = entries
    return kept


def pages(toc: dict) -> list[str]:
    """All pages of a table of contents, in reading order."""
    below = [entry for key in ("parts", "chapters", "sections") for entry in toc.get(key, [])]
    return [toc[key] for key in ("root", "file") if key in toc] + [page for entry in below for page in pages(entry)]


def unlink(text: str, page: str, absent: set[str]) -> str:
    """Markdown of a page with the links to absent pages as plain words; other broken links stay, and are warnings."""
    def gone(target):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        return path.removesuffix(".ipynb").removesuffix(".md") in absent

    text = re.sub(r"\[([^][]+)\]\(([^()\s#]+)(?:#[^()\s]*)?\)", lambda m: m[1] if gone(m[2]) else m[0], text)
    return re.sub(r"\{doc\}`(?:([^`<]+?)\s*<)?([^`<>]+)>?`", lambda m: m[1] or m[2] if gone(m[2]) else m[0], text)


def flat(text: str) -> str:
    """Markdown of a notebook with the paths of its pictures as they are once staged, where book/ lies open."""
    return text.replace("](../book/_static/", "](../_static/")


def childless(toc: dict) -> list[str]:
    """Pages of a table of contents that have no pages below them."""
    below = [entry for key in ("parts", "chapters", "sections") for entry in toc.get(key, [])]
    own = [toc["file"]] if "file" in toc and not toc.get("sections") else []
    return own + [page for entry in below for page in childless(entry)]


def repository() -> str | None:
    """Web address of the repository, for the buttons: $BOOK_REPOSITORY, else git's origin if it is on the web."""
    asked = os.environ.get("BOOK_REPOSITORY")
    if asked:
        return asked.removesuffix("/")
    try:
        git = subprocess.run(["git", "remote", "get-url", "origin"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:                                    # no git, as in an unpacked archive
        return None
    web = r"(?:https://|(?:ssh://)?git@)(github\.com|gitlab\.com)[:/](.+?)(?:\.git)?/?"
    match = re.fullmatch(web, git.stdout.strip())
    return f"https://{match[1]}/{match[2]}" if match else None


def address() -> str | None:
    """Where the book is published, $BOOK_URL, with a slash at its end.  SystemExit for what is no address on the web."""
    asked = os.environ.get("BOOK_URL", "").strip()
    if asked and not re.fullmatch(r"https?://[^\s\"<>]+", asked):
        raise SystemExit(f'BOOK_URL is "{asked}"; wanted the whole address of the published book, as in https://example.org/alr/.')
    return asked.rstrip("/") + "/" if asked else None


def announced(front: str, url: str) -> str:
    """The front page with its whole address, and that of the picture which a shared link shows: both have to be whole."""
    kind = '    "property=og:type": "book"\n'
    return front.replace(kind, f'{kind}    "property=og:url": "{url}"\n    "property=og:image": "{url}_static/readme.png"\n')


def configuration() -> dict:
    """book/_config.yml with the addresses of the repository and of the book; without the first, without its buttons."""
    config = yaml.safe_load((ROOT / "book" / "_config.yml").read_text(encoding="utf8"))
    url = repository()
    if url:
        config["repository"]["url"] = url
    else:
        del config["repository"], config["launch_buttons"], config["html"]["use_repository_button"]
    if address():
        config["html"]["baseurl"] = address()                    # each page names its own, for search engines
    return config


def tools(folder: str, names: list[str]) -> set[str]:
    """What of book/ is no part of the book: the programs on its first level, and caches everywhere."""
    top = Path(folder) == ROOT / "book"
    return {name for name in names if name == "__pycache__" or top and name.endswith((".py", ".sh"))}


def stage(run: Path) -> None:
    """Fill _build/src anew, with the notebooks of the folder `run`."""
    shutil.rmtree(SRC, ignore_errors=True)
    shutil.copytree(ROOT / "book", SRC, ignore=tools)
    if (ROOT / "data").is_dir():
        shutil.copytree(ROOT / "data", SRC / "data", ignore=shutil.ignore_patterns("cache"))
    touch.write(SRC / "data" / "touch")
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text(encoding="utf8"))
    planned = pages(toc)
    toc = present(toc, lambda page: any((ROOT / folder).exists() for folder in (f"book/{page}.md", f"{page}.ipynb")))
    absent = set(planned) - set(pages(toc))
    if absent:
        print(f"not there yet, left out: {', '.join(page for page in planned if page in absent)}")

    (SRC / "notebooks").mkdir()
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        if not (run / notebook.name).exists():
            raise SystemExit(f"{notebook.name} has not been run: python book/notebooks.py run, or make book, does it.")
        nb = nbformat.read(run / notebook.name, as_version=4)
        for cell in nb.cells:
            if cell.cell_type == "markdown":
                cell.source = flat(unlink(cell.source, f"notebooks/{notebook.stem}", absent))
            elif "injected-parameters" in cell.metadata.get("tags", []):
                cell.metadata.tags.append("remove-cell")         # papermill's own cell
        nbformat.write(nb, SRC / "notebooks" / notebook.name)
    empty = childless(toc)
    for path in SRC.glob("*.md"):
        text = unlink(path.read_text(encoding="utf8"), path.stem, absent)
        if path.stem in empty:                                   # a list of no pages would be a warning
            text = text.replace("```{tableofcontents}\n```\n", "")
        if path.stem == toc["root"] and address():
            text = announced(text, address())
        path.write_text(text, encoding="utf8")
    (SRC / "_toc.yml").write_text(yaml.safe_dump(toc, sort_keys=False), encoding="utf8")
    (SRC / "_config.yml").write_text(yaml.safe_dump(configuration(), sort_keys=False), encoding="utf8")


def jupyter_book(builder: str) -> Path:
    """Build the staged pages with a builder -> the folder with the result. Any warning ends it."""
    folder = BUILD / builder
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(SRC),
               "--path-output", str(ROOT), "--builder", builder, "-W", "--keep-going", "-n", "--all", "-q"]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)       # warnings come on stderr
    if result.returncode:
        raise SystemExit(f"{result.stdout}\nThe book was not built; warnings count as errors. Its sources: _build/src.")
    for path in folder.glob("**/*.html"):
        path.write_text(without_thebe(path.read_text(encoding="utf8")), encoding="utf8")
    return folder


def without_thebe(page: str) -> str:
    """A page without the scripts of sphinx-thebe, which Jupyter Book always loads and which name a server."""
    return THEBE.sub(lambda match: "" if "thebe" in match[0].lower() else match[0], page)


def inside(page: str) -> str:
    """A book on one page, its links to its own pages turned inwards; one to a page that it does not hold loses its target.

    Notebooks print such links as HTML, which Sphinx does not resolve; printed, they would be paths of this machine.
    """
    there = set(re.findall(r'id="([^"]+)"', page))

    def turned(match):
        name, anchor = match[1].split("/")[-1], match[2]
        targets = [anchor] if anchor else [f"document-{name}", f"document-notebooks/{name}"]
        found = next((target for target in targets if target in there), None)
        return f'href="#{found}"' if found else ""

    return re.sub(r'href="(?!\w+:)([^"#]+)\.html(?:#([^"]*))?"', turned, page)


# ---------------------------------------------------------------- the two results

def html(run: Path) -> None:
    """_build/html, and say which file to open."""
    stage(run)
    folder = jupyter_book("html")
    lean(folder)
    complete(folder)
    print(f"\nThe book is built. Open this file in a browser:\n\n    {folder / 'index.html'}\n")


def browser() -> str:
    """A Chromium or Chrome to print with: $CHROME, or the first one found."""
    names = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge",
             "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
             "/Applications/Chromium.app/Contents/MacOS/Chromium"]
    for name in [os.environ.get("CHROME", ""), *names]:
        found = shutil.which(name) if name else None
        if found:
            return found
    raise SystemExit("No Chromium or Chrome to print with. Install one (Debian, Ubuntu: sudo apt install chromium)\n"
                     "or name yours: make pdf CHROME=/path/to/chrome. The HTML book needs none: make book")


def pdf(run: Path) -> None:
    """All pages as one, printed to _build/alr.pdf by a headless browser; no LaTeX."""
    chrome = browser()
    stage(run)
    page = jupyter_book("singlehtml") / "index.html"
    page.write_text(inside(page.read_text(encoding="utf8")), encoding="utf8")
    target = BUILD / "alr.pdf"
    target.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as profile_folder:
        command = [chrome, "--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                   "--disable-component-update", "--disable-sync", f"--user-data-dir={profile_folder}",
                   "--no-pdf-header-footer", "--generate-pdf-document-outline", "--virtual-time-budget=60000",
                   f"--print-to-pdf={target}", page.as_uri()]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.insert(1, "--no-sandbox")                    # Chromium refuses to start as root with its sandbox
        result = subprocess.run(command, capture_output=True, text=True)
    if not target.exists():
        raise SystemExit(f"{chrome} printed no PDF; it said:\n{result.stderr}")
    print(f"\nThe book as a PDF:\n\n    {target}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builder", choices=["html", "pdf"])
    parser.add_argument("--profile", default="", help="build from _build/run/PROFILE")
    parser.add_argument("--stored", action="store_true", help="build from notebooks/ as committed, without running them")
    args = parser.parse_args()
    run = ROOT / "notebooks" if args.stored else BUILD / "run" / (args.profile or "committed")
    if args.stored:
        checkout, notebooks = Checkout(ROOT), list(run.glob("*.ipynb"))
        stale = [notebook for notebook in notebooks if changed(notebook, checkout.inputs(notebook))]
        if stale:
            print(f"{len(stale)} of {len(notebooks)} chapters have stored outputs of other code, data or pins than today's; "
                  "make stale names them", flush=True)
    {"html": html, "pdf": pdf}[args.builder](run)


if __name__ == "__main__":
    main()
