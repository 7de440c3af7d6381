"""The built book in a real browser, without a network: every page at two widths, in light and dark, by mouse and keyboard.

Needs _build/html (make book) and a Chromium or Chrome ($CHROME, or on the PATH); skipped with a reason where one is missing.
With axe-core (`npm install axe-core`, or $AXE names its axe.min.js) it also looks for what keeps readers out.
"""

import os
import sys
from pathlib import Path

import pytest

from chromium import Chromium, find

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(os.environ.get("ALR_SITE", ROOT / "_build" / "html"))
AXE = next((path for path in (Path(os.environ.get("AXE", "")), ROOT / "node_modules" / "axe-core" / "axe.min.js")
            if path.suffix == ".js" and path.is_file()), None)
sys.path.insert(0, str(ROOT / "book"))

from lean import HEAVIEST, mathjax_parts, weight  # noqa: E402
from offline import pages  # noqa: E402

BUILT = [path for path in pages(SITE) if path.name != "genindex.html"] if (SITE / "_static").is_dir() else []
CODE = [*(ROOT / "book").rglob("*.py"), *(ROOT / "book" / "_static").glob("*.js"), *(ROOT / "book" / "_static").glob("*.css"),
        *(ROOT / "book").glob("*.md"), *(ROOT / "book").glob("*.yml")]


def why_not() -> str:
    """Why the built book cannot be looked at; empty when it can."""
    if not BUILT:
        return "no built book in _build/html: make book"
    if "ALR_SITE" not in os.environ and (SITE / "index.html").stat().st_mtime < max(path.stat().st_mtime for path in CODE):
        return "the built book is older than book/: make book"
    return "" if find() else "no Chromium or Chrome: apt install chromium, or CHROME=/path/to/chrome"


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")


@pytest.fixture(scope="module")
def browser():
    with Chromium(find()) as running:
        yield running


@pytest.fixture
def open_page(browser):
    """A function: the name of a page -> the page, open; closed after the test."""
    opened = []

    def open_(name, **options):
        opened.append(browser.open((SITE / f"{name}.html").as_uri(), **options))
        return opened[-1]
    yield open_
    for page in opened:
        page.close()


def holding(kind: str) -> str:
    """The first page that holds an element of a kind, without .html."""
    for path in BUILT:
        if kind in path.read_text(encoding="utf8"):
            return path.relative_to(SITE).with_suffix("").as_posix()
    pytest.fail(f"no page of the book holds {kind}")


NAMES = [path.relative_to(SITE).with_suffix("").as_posix() for path in BUILT]
WIDE = "[...document.querySelectorAll('.bd-article *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1 " \
       "&& !e.closest('pre, .alr-html, .text_html, .cell_output, mjx-container, div.math, dialog')).slice(0, 3)" \
       ".map(e => e.outerHTML.slice(0, 120))"
BROKEN = "[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"
NAMELESS = "[...document.querySelectorAll('.bd-content img')].filter(i => !i.alt.trim() || /\\.png$/.test(i.alt))" \
           ".map(i => i.src.split('/').pop())"


def test_no_page_is_heavy():
    sizes = {path.name: weight(path, mathjax_parts(SITE)) for path in BUILT}
    assert max(sizes.values()) <= HEAVIEST, sizes
    assert sum(path.stat().st_size for path in (SITE / "_static" / "mathjax").rglob("*") if path.is_file()) < 4e6


@pytest.mark.parametrize("name", NAMES)
def test_a_page(open_page, name):
    page = open_page(name)
    page.run("document.querySelectorAll('img').forEach(i => { i.loading = 'eager' })")
    page.until("[...document.images].every(i => i.complete)")
    assert page.asked == [], "it wants something from a network"
    assert [p for p in page.problems if "theme mode" not in p] == [], "errors in the console"
    assert page.run(BROKEN) == [] and page.run(NAMELESS) == []
    formulas = "[document.querySelectorAll('.math').length, document.querySelectorAll('mjx-container').length]"
    raw, drawn = page.run(formulas)
    assert drawn >= raw and page.run("document.querySelectorAll('mjx-merror').length") == 0, "mathematics is not set"
    for width in (1400, 390):
        page.size(width)
        over = page.run("document.documentElement.scrollWidth") - width
        assert over <= 0, f"{over} px too wide at {width}: {page.run(WIDE)}"


def test_search_finds_how_to_install(open_page):
    page = open_page("search")
    page.call("Page.navigate", url=(SITE / "search.html").as_uri() + "?q=install")
    assert page.until("document.querySelectorAll('#search-results li').length") >= 1


def test_dark_mode_switches(open_page):
    page = open_page("intro", dark=True)
    assert page.run("document.documentElement.dataset.theme") == "dark", "it follows the system"
    page.run("document.querySelector('.theme-switch-button').click()")
    modes = [page.run("document.documentElement.dataset.mode")]
    for _ in range(2):
        page.run("document.querySelector('.theme-switch-button').click()")
        modes.append(page.run("document.documentElement.dataset.mode"))
    assert set(modes) == {"auto", "dark", "light"}


def test_a_number_leads_to_its_claim(open_page):
    page = open_page(holding('class="val" href='))
    page.run("document.querySelector('a.val').focus()")
    assert page.run("document.querySelector('a.val').title.includes('Verdict')")
    page.loaded = False
    page.press("Enter")
    page.until_loaded()
    assert page.run("location.hash.startsWith('#claim-') && document.getElementById(location.hash.slice(1)) !== null")


@pytest.mark.parametrize("how", ["mouse", "keyboard"])
def test_a_figure_opens_large(open_page, how):
    page = open_page("notebooks/10_v10")
    page.run("document.querySelector('.alr-enlarge').focus()")
    page.press("Enter") if how == "keyboard" else page.click(".alr-enlarge")
    page.until("document.querySelector('dialog.alr-large').open")
    assert page.run("document.querySelector('dialog.alr-large img').src === document.querySelector('.alr-enlarge img').src")
    page.press("Escape")
    page.until("!document.querySelector('dialog.alr-large').open")
    assert page.run("document.activeElement.className") == "alr-enlarge", "the focus comes back"


@pytest.mark.parametrize("kind", ["ranks", "spectrum", "controller"])
def test_a_picture_answers_to_the_keyboard_and_the_mouse(open_page, kind):
    page = open_page(holding(f'data-kind="{kind}"'), width=390)
    box = f".alr-touch:has([data-kind={kind}])"
    said = f"document.querySelector('{box} .alr-said').textContent"
    before = page.run(said)
    assert before and page.run(f"document.querySelector('{box} svg').children.length") > 10
    page.run(f"document.querySelector('{box} input[type=range]').focus()")
    for _ in range(3):
        page.press("ArrowRight")
    after = page.run(said)
    assert after != before, "an arrow key moves it"
    page.press("Home")
    page.click(f"{box} input[type=range]")                       # the middle of the slider
    assert page.run(said) not in (before, after) or page.run(f"document.querySelector('{box} input').value") != "0"
    assert page.run(f"[...document.querySelectorAll('{box} input')].every(i => i.labels.length === 1)"), "named for all"


def test_the_player_plays(open_page):
    page = open_page(holding('data-kind="ranks"'))
    page.click(".alr-button")
    page.until("Number(document.querySelector('.alr-touch input[type=range]').value) >= 2")
    page.click(".alr-button")
    assert page.run("document.querySelector('.alr-button').textContent") == "Play"


def test_without_scripts_the_pictures_stand_still(open_page):
    name = "touch"
    page = open_page(name, scripts=False)
    page.call("Emulation.setScriptExecutionDisabled", value=False)
    stills = "[...document.querySelectorAll('.alr-still img')].filter(i => i.getBoundingClientRect().height > 100).length"
    assert page.run(stills) == 3 and page.run("document.querySelectorAll('.alr-mount').length") == 0


def test_the_leaderboard_lights_up_and_switches(open_page):
    page = open_page("notebooks/leaderboard")
    rows, dots = (page.run(f"document.querySelectorAll('{s}').length") for s in (".alr-sortable tbody tr", ".alr-board circle"))
    assert 2 <= dots <= rows
    page.run("document.querySelector('.alr-keys button').focus()")
    assert page.run("document.querySelectorAll('.alr-sortable tr.alr-lit').length") == 1
    assert page.run("document.querySelector('.alr-board circle[r=\"10\"]') !== null")
    page.press("Enter")
    assert page.run("document.querySelector('.alr-keys button').getAttribute('aria-pressed')") == "false"
    assert page.run("[...document.querySelectorAll('.alr-board circle')].filter(c => c.style.display === 'none').length") == 1
    page.click(".alr-sortable th:nth-child(2) button")
    assert page.run("document.querySelector('.alr-sortable th:nth-child(2)').getAttribute('aria-sort')") is not None


def test_claims_can_be_filtered(open_page):
    page = open_page("notebooks/claims", width=390)
    table = "document.querySelector('.alr-claims')"         # the first; retired claims have one of their own, with its filter
    seen = f"[...{table}.querySelectorAll('tbody tr:not(.alr-chapter)')].filter(r => !r.hidden)"
    every = page.run(f"{seen}.length")
    verdict = page.run("(() => { const s = document.querySelector('.alr-filter select'); s.selectedIndex = 1;"
                       " s.dispatchEvent(new Event('change')); return s.value; })()")
    assert 0 < page.run(f"{seen}.length") < every
    assert page.run(f"{seen}.every(r => r.querySelector('.alr-verdict').textContent.trim() === '{verdict}')")
    assert page.run("getComputedStyle(document.querySelector('.alr-claims td')).display") == "block", "cards on a phone"
    assert page.run("document.querySelector('.alr-claims td[data-label]') !== null")


@pytest.mark.skipif(AXE is None, reason="no axe-core: npm install axe-core, or AXE=/path/to/axe.min.js")
@pytest.mark.parametrize("dark, width", [(False, 1400), (True, 390)])
@pytest.mark.parametrize("name", NAMES)
def test_axe_finds_nothing_of_ours(open_page, name, dark, width):
    """Inside the article; the frame around it is the theme's, and so are the folds' summaries."""
    page = open_page(name, width=width, dark=dark)
    if page.run("document.querySelector('.bd-article') === null"):
        pytest.skip("a page that only leads to another")
    page.run(AXE.read_text(encoding="utf8") + ";1")
    # pandas leaves the corner between index and columns empty; the roles of a bibliography are docutils'
    off = ("empty-table-header", "summary-name", "region", "aria-allowed-role", "aria-deprecated-role",
           "aria-required-children")
    rules = "{rules: {" + ", ".join(f"'{rule}': {{enabled: false}}" for rule in off) + "}}"
    found = page.run(f"axe.run(document.querySelector('.bd-article'), {rules}).then(r => r.violations.map(v => [v.id,"
                     " v.nodes.length, v.nodes[0].html.slice(0, 160), v.nodes[0].failureSummary.slice(0, 300)]))")
    assert found == []
