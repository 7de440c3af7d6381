"""Laws of `alr.evidence.plot`: every figure is readable, says its units, and shows the numbers that it was given."""

import itertools
import random
import tomllib
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb

from alr import recipes
from alr.evidence import plot, style
from alr.evidence.markup import VERDICTS
from alr.evidence.records import runs
from alr.evidence.stats import mean

from synthetic import suite

SUITES = Path(__file__).resolve().parents[2] / "data" / "suites"
LOSSES = {"dense": [4.2, 4.25, 4.22], "alr": [4.37, 4.33, 4.39], "v10": [4.54, 4.61, 4.5], "uniform": [4.45]}


@pytest.fixture(scope="module")
def r(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "toy"
    suite(folder, {k: v for k, v in LOSSES.items() if k != "dense"}, per_epoch=20, log_every=1, blocks=2)
    suite(folder, {"dense": LOSSES["dense"]}, start=None)
    return runs(folder)


def claim(verdict, value=None, low=None, high=None, rule="<", threshold=0.0, unit="nats per token", **more):
    text = "A sentence that is rather long, as the sentences of claims are, and has to be broken into lines."
    return {"text": text, "value": value, "low": low, "high": high, "unit": unit, "n": 3, "verdict": verdict,
            "source": "", "chapter": "14", "format": "+.3f", "seeds": [0, 1, 2], "kind": "difference of means",
            "rule": rule, "threshold": threshold, "note": ""} | more


CLAIMS = {"a": claim("holds", -0.08, -0.12, -0.05), "b": claim("fails", 0.11, 0.07, 0.16),
          "f": claim("fails its bar, gain decided", -0.02, -0.03, -0.01, threshold=-0.05),
          "c": claim("open", 0.5, unit="seconds"),
          "d": claim("not recorded", rule="within", threshold=[-0.1, 0.3]),
          "e": claim("figure", 4.4, 4.3, 4.5, rule=None, threshold=None, kind="mean")}
FIGURES = {
    "losses": lambda r: plot.losses(r.curves, title="Validation loss"),
    "losses_seconds": lambda r: plot.losses(r.curves, x="seconds"),
    "rank_paths": lambda r: plot.rank_paths(r.of(run="v10.seed0").ranks, title="Ranks"),
    "rank_map": lambda r: plot.rank_map(r.of(run="v10.seed0").ranks, title="Ranks"),
    "rank_roles": lambda r: plot.rank_roles(r.ranks, title="Ranks by role"),
    "pareto": lambda r: plot.pareto(r.ends, title="Loss against size"),
    "pareto_flops": lambda r: plot.pareto(r.ends, "flops"),
    "pareto_seconds": lambda r: plot.pareto(r.ends, "seconds", "val_bpb"),
    "aligned": lambda r: plot.aligned(r.steps, r.resizes, before=5, after=15, title="Around a resize"),
    "spectrum": lambda r: plot.spectrum({"q": np.exp(-np.arange(30.0))}, {"stable rank": 1.2, "entropy": 2.5}, "W"),
    "forest": lambda r: plot.forest(CLAIMS, title="Claims"),
    "forest_fine": lambda r: plot.forest({"a": claim("open", -0.12, -0.125, 0.05), "b": claim("open", 0.0, -0.01, 0.075)}),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_readable(r, name):
    before, backend = dict(plt.rcParams), plt.get_backend()
    fig = FIGURES[name](r)
    assert {**plt.rcParams, "backend": backend} == {**before, "backend": backend}       # no trace outside ...
    assert not plt.get_fignums()                                                        # ... nothing shown twice
    FigureCanvasAgg(fig).draw()
    assert fig.get_facecolor()[:3] == (1, 1, 1)
    card, renderer = fig.bbox, fig.canvas.get_renderer()
    for ax in fig.axes:
        for axis in (ax.xaxis, ax.yaxis):
            label, shown = axis.get_label_text(), axis.get_visible() and axis.get_ticklabels()
            if shown and not (name.startswith("forest") and axis is ax.yaxis):   # there the sentences are the labels
                assert "(" in label and label.endswith(")"), f"{label!r} has no unit"
            boxes = [t.get_window_extent(renderer) for t in axis.get_ticklabels()
                     if t.get_text() and axis.get_view_interval().min() <= t.get_position()[axis is ax.yaxis]
                     <= axis.get_view_interval().max()]
            assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2)), "tick labels touch"
            assert all(b.height > 7 for b in boxes)
    texts = [t for t in fig.findobj(plt.Text) if t.get_text() and t.get_visible()]
    assert len(texts) > 4
    for ax in fig.axes:
        box = ax.get_tightbbox(renderer)
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= card.x1 + 1 and box.y1 <= card.y1 + 1, "something is cut"
    for legend in fig.legends:
        box = legend.get_window_extent(renderer)
        assert not any(box.overlaps(ax.get_window_extent(renderer)) for ax in fig.axes), "the legend hides data"
        assert box.x1 <= card.x1 and box.y1 <= card.y1


def test_a_line_is_the_mean_and_a_band_its_interval(r):
    fig = plot.losses(r.curves)
    ax = fig.axes[0]
    line = next(x for x in ax.get_lines() if x.get_label() == "alr (3 seeds)")
    want = [mean(g) for _, g in r.of(arm="alr").curves.groupby("epoch")["val_loss"]]
    np.testing.assert_allclose(line.get_ydata(), [m.value for m in want])
    np.testing.assert_allclose(line.get_xdata(), [20, 40, 60])
    band = next(c for c in ax.collections if to_hex(c.get_facecolor()[0]) == line.get_color().lower())
    ys = band.get_paths()[0].vertices[:, 1]
    assert ys.min() == pytest.approx(want[-1].low) and ys.max() == pytest.approx(want[0].high)
    assert [x.get_label() for x in ax.get_lines() if x.get_label().startswith("uniform")] == ["uniform (1 seed)"]


def test_a_heat_map_shows_layers_by_epochs(r):
    run = r.of(run="v10.seed1")
    image = plot.rank_map(run.ranks).axes[0].collections[0].get_array()
    assert image.shape == (12, 3)
    for i, layer in enumerate(dict.fromkeys(run.ranks["layer"])):
        np.testing.assert_array_equal(image[i], run.ranks[run.ranks["layer"] == layer]["rank"])


def test_the_front_is_those_that_nobody_beats():
    rng = random.Random(0)
    for _ in range(50):
        points = [(rng.randint(0, 9), rng.randint(0, 9)) for _ in range(12)]
        best = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
        found = [points[i] for i in plot.front(points)]
        assert set(found) == best and found == sorted(found)
    assert plot.front([]) == []


def test_alignment_is_at_the_resize_and_stops_at_the_next(r):
    table = plot.align(r.steps, r.resizes, "grad_norm", before=5, after=100)
    one = table[(table["run"] == "alr.seed0") & (table["event"] == 20)].set_index("offset")["value"]
    assert list(one.index) == list(range(-5, 21))                       # the next resize is at step 40
    np.testing.assert_allclose(one.loc[:0], 0, atol=1e-12)                  # calm before ...
    np.testing.assert_allclose(one.loc[1:], [0.4 * 0.7 ** i for i in range(1, 21)], atol=1e-12)     # ... and a bump
    assert set(table["arm"]) == {"alr", "v10", "uniform"}               # dense has none
    with pytest.raises(ValueError, match="no resizes with step lines"):
        plot.aligned(r.of(arm="dense").steps, r.of(arm="dense").resizes)


def test_a_forest_says_every_verdict_and_value():
    fig = plot.forest(CLAIMS)
    words = [t.get_text() for ax in fig.axes for t in ax.texts]
    for c in CLAIMS.values():
        assert any(w.split("\n")[-1] == c["verdict"] for w in words)
    assert "−0.080 [−0.120, −0.050]\nholds" in words and len(fig.axes) == 3
    colours = {t.get_text().split("\n")[-1]: t.get_color() for ax in fig.axes for t in ax.texts}
    assert colours == {word: VERDICTS[word][0] for word in colours} and set(colours) == set(VERDICTS)
    for keys, label in ((False, lambda k: CLAIMS[k]["text"]), (True, lambda k: k)):
        rows = [t.get_text().replace("\n", " ") for ax in plot.forest(CLAIMS, keys=keys).axes for t in ax.get_yticklabels()]
        assert sorted(rows) == sorted(map(label, CLAIMS))


def test_words_can_be_read_and_lines_be_seen():
    assert style.contrast("black", "white") == pytest.approx(21) and style.contrast("#777", "#777") == pytest.approx(1)
    for colour, tint in VERDICTS.values():
        assert style.contrast(colour, tint) >= 4.5 and style.contrast(colour, "white") >= 4.5
    assert style.contrast(style.INK, "white") > 12
    for colour in {look["color"] for look in style.LOOKS.values()}:
        assert style.contrast(colour, "white") >= 3, f"{colour} is too pale for a line on white"
        assert style.contrast(style.ink(colour), "white") >= 4.5
    assert style.ink(style.INK) == style.INK and to_hex(to_rgb(style.ink(style.BLUE))) == style.BLUE.lower()


@pytest.mark.parametrize("name", FIGURES)
def test_no_letter_is_smaller_than_8_px_in_the_page(r, name):
    """The column of a page is 784 px wide, and a wider figure is shrunk to it."""
    fig = FIGURES[name](r)
    shrunk = min(1.0, 784 / (fig.get_figwidth() * style.STYLE["figure.dpi"]))
    for text in fig.findobj(plt.Text):
        if text.get_text() and text.get_visible():
            pixels = text.get_fontsize() / 72 * style.STYLE["figure.dpi"] * shrunk
            assert pixels >= 8, f"{text.get_text()!r} is {pixels:.1f} px"


ARMS = {path.stem: [arm["name"] for arm in tomllib.loads(path.read_text())["arms"]] for path in SUITES.glob("*.toml")}
DRAWN = ["v2, one threshold", "v3, told", "v5.1, trained on", "v7", "v7.2, cleared", "v9, ema=0", "fixed rank 16 without mask",
         "energy share, 90 %", "Fisher importance", "reset", "transport", "baseline", *recipes.ALL]


@pytest.mark.parametrize("suite", [*sorted(ARMS.keys() - {"equal_rates"}), "in chapters"])     # its arms are never drawn
def test_every_arm_has_a_look_of_its_own(suite):
    names = ARMS.get(suite, DRAWN)
    found = style.looks(names)
    assert set(found) == set(names)
    assert len({tuple(map(str, look.values())) for look in found.values()}) == len(found), "two arms look the same"


def test_a_look_depends_on_the_name_alone():
    alone = {name: style.looks([name])[name] for arms in [*ARMS.values(), DRAWN] for name in arms}
    for arms in ARMS.values():
        assert style.looks(arms[::-1]) == {name: alone[name] for name in arms}
    for family in ("dense", "alr", "v10", "uniform"):
        base = style.looks([family])[family]
        for rest in (", a new thing", " 2 x 74", " 2 x 74, Muon 0.02"):
            look = style.looks([family + rest])[family + rest]
            assert look["color"] == base["color"] and look["linestyle"] != base["linestyle"] != look["marker"]
    assert style.looks(["v1"])["v1"]["color"] != style.looks(["v10"])["v10"]["color"]
    layers = style.looks(["blocks.0.attn.q", "blocks.1.attn.q", "blocks.1.mlp.up"])
    assert [look["color"] for look in layers.values()] == [style.BLUE, style.BLUE, style.GREEN]
    assert layers["blocks.0.attn.q"]["linestyle"] != layers["blocks.1.attn.q"]["linestyle"]
    assert list(style.looks(["v10", "v9", "v1"])) == ["v1", "v9", "v10"]


@pytest.mark.parametrize("name", ["mine", "v11", "alrs", "dense2", ""])
def test_an_unknown_name_has_no_look(name):
    with pytest.raises(ValueError, match=f"{name!r} has no look. Append it to a row of style.KNOWN"):
        style.looks(["dense", name])


def test_names_stand_apart_in_their_order_and_near_their_lines():
    rng = random.Random(1)
    for _ in range(200):
        n, gap = rng.randint(1, 12), 0.05
        wanted = [rng.random() for _ in range(n)]
        found = plot._apart(wanted, gap, 0.0, 1.0)
        order = sorted(range(n), key=lambda i: wanted[i])
        assert all(found[b] - found[a] >= gap - 1e-9 for a, b in itertools.pairwise(order))
        assert min(found) >= -1e-9 and max(found) <= 1 + 1e-9
        if all(wanted[b] - wanted[a] >= gap for a, b in itertools.pairwise(order)):
            assert found == pytest.approx(wanted)
    assert plot._apart([0.5, 0.5, 0.5], 0.1, 0.0, 1.0) == pytest.approx([0.4, 0.5, 0.6])
    assert plot._apart([], 0.1, 0.0, 1.0) == []


def crowded(seed):
    """Twelve points, some of them nearly on top of each other, with names of any length."""
    rng = random.Random(seed)
    fig, ax = plt.subplots(figsize=(7.6, 4.4), layout="constrained")
    corners = [(rng.random(), rng.random()) for _ in range(4)]
    look = {"color": "#0072B2"}
    points = {f"arm {i}{' with a name' * rng.randint(0, 1)}": (x + rng.gauss(0, 0.02), y + rng.gauss(0, 0.02), look)
              for i, (x, y) in enumerate(corners * 3)}
    ax.plot([x for x, _, _ in points.values()], [y for _, y, _ in points.values()], "o", markersize=7)
    plt.close(fig)
    return fig, ax, points


@pytest.mark.parametrize("seed", range(6))
def test_names_stand_apart_beside_their_points(seed):
    fig, ax, points = crowded(seed)
    plot.name_points(ax, points)
    FigureCanvasAgg(fig).draw()
    renderer, frame = fig.canvas.get_renderer(), ax.get_window_extent()
    boxes = {text.get_text(): text.get_window_extent(renderer) for text in ax.texts}
    assert boxes.keys() == points.keys()
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes.values(), 2))
    assert all(frame.x0 <= b.x0 and b.x1 <= frame.x1 and frame.y0 <= b.y0 and b.y1 <= frame.y1 for b in boxes.values())
    for x, y, _ in points.values():
        at = ax.transData.transform((x, y))
        assert not any(box.contains(*at) for box in boxes.values()), "a name covers a mark"
    for name, (x, y, _) in points.items():
        at, box = ax.transData.transform((x, y)), boxes[name]
        assert np.hypot(*(at - np.clip(at, box.min, box.max))) < 130, "it stands by its own"


def test_a_front_is_a_stair_through_its_points(r):
    ax = plot.pareto(r.ends).axes[0]
    stair = next(line for line in ax.get_lines() if line.get_label() == "front")
    x, y = stair.get_xdata(), stair.get_ydata()
    means = r.ends.groupby("arm")[["params_blocks", "val_loss"]].mean().to_numpy()                # (arms, 2)
    for best in means[plot.front([tuple(m) for m in means])]:
        assert np.isclose([x, y], best[:, None], rtol=1e-12).all(axis=0).any(), "it passes through the point"
    assert ((np.diff(x) == 0) | (np.diff(y) == 0)).all(), "level or upright"
    assert (np.diff(x) >= 0).all() and (np.diff(y) <= 0).all()


@pytest.mark.parametrize("draw", [lambda r: plot.losses(r.curves), lambda r: plot.rank_paths(r.of(run="v10.seed0").ranks)])
def test_names_stand_beside_what_they_name(r, draw):
    fig = draw(r)
    FigureCanvasAgg(fig).draw()
    ax, renderer = fig.axes[0], fig.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in ax.texts]
    assert not fig.legends and len(ax.texts) >= 4
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(box.x0 > ax.get_window_extent(renderer).x1 and box.x1 <= fig.bbox.x1 for box in boxes)
    heights = {text.get_text().split(" (")[0]: text.get_position()[1] for text in ax.texts}
    lines = {line.get_label().split(" (")[0]: line.get_ydata()[-1] for line in ax.get_lines() if line.get_label() in heights}
    assert sorted(lines, key=lines.get) == [name for name in sorted(heights, key=heights.get) if name in lines]


@pytest.mark.parametrize("draw, words", [
    (lambda r: plot.losses(r.curves[:0]), "no curves to draw"), (lambda r: plot.losses(r.curves, y="nats"), "no unit"),
    (lambda r: plot.losses(r.curves, x="arm"), "no unit is known for 'arm'"),
    (lambda r: plot.rank_map(r.ranks), "pick one"), (lambda r: plot.rank_paths(r.of(arm="dense").ranks), "no ranks"),
    (lambda r: plot.pareto(r.ends[:0]), "no finished runs"),
    (lambda r: plot.pareto(r.ends, "rank_mean"), "missing for dense"),
    (lambda r: plot.spectrum({"W": [0.0, 0.0]}, {}), "no value above 0"), (lambda r: plot.forest({}), "no claims")])
def test_what_cannot_be_drawn_is_refused(r, draw, words):
    with pytest.raises((ValueError, KeyError), match=words):
        draw(r)
    assert not plt.get_fignums()
