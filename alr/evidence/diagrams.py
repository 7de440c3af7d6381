"""Drawn pictures of ideas: what a cut does, what an optimizer holds, what a mask hides.  No torch, and no record of a run.

    diagrams.cut(), diagrams.loop({"v10": recipes.v10, "the budget recipe": recipes.alr})

Each returns a matplotlib figure in the style of `style`, so that a notebook shows it like every other figure.
`book/figures.py` writes those that a page of Markdown shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import MaxNLocator

from .style import BLUE, GREY, INK, VERMILION, drawn

PALE = {BLUE: "#dceaf4", VERMILION: "#f9e2d6", GREY: "#eeeeee"}     # fills under dark ink: contrast above 12 : 1
WORDS = ("the", "cat", "sat", "down", "early")


def _canvas(width: float, height: float, right: float, top: float) -> tuple[Figure, Axes]:
    """An empty page: no axes, x from 0 to `right`, y from 0 to `top`, both in one unit."""
    fig, ax = plt.subplots(figsize=(width, height))
    ax.set(xlim=(0, right), ylim=(0, top), aspect="equal")
    ax.axis("off")
    return fig, ax


def _box(ax: Axes, x: float, y: float, width: float, height: float, text: str, colour: str = GREY, **kwargs) -> None:
    """A box with its lower left corner at (x, y) and words in the middle."""
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", facecolor=PALE[colour],
                                edgecolor=colour, linewidth=1.4))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", **{"fontsize": 10, **kwargs})


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK, dash: str = "-",
           bend: float = 0.0) -> None:
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linestyle": dash, "linewidth": 1.5,
                                            "shrinkA": 2, "shrinkB": 2, "connectionstyle": f"arc3,rad={bend}"})


# ----------------------------------------------------------------------------------------------------- matrices

def example(m: int = 8, n: int = 10, r: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two factors for drawing, U (m, r) and V (r, n): W = U V has the singular values 4, 2, 1, 1/2, ...

    The square root of each value is in either factor, column i of U and row i of V being direction i.
    """
    draw = np.random.default_rng(seed)
    P, Q = (np.linalg.qr(draw.standard_normal((length, r)))[0] for length in (m, n))        # (m, r), (n, r)
    root = np.sqrt(4.0 * 0.5 ** np.arange(r))                                               # (r,)
    return P * root, (Q * root).T


def _matrix(ax: Axes, X: np.ndarray, x: float, y: float, limit: float, name: str, lost: int = 0, along: str = "") -> None:
    """A matrix as coloured cells, top left corner at (x, y), its name above; the last `lost` columns or rows crossed out."""
    rows, columns = X.shape
    ax.imshow(X, cmap="RdBu_r", vmin=-limit, vmax=limit, extent=(x, x + columns, y - rows, y), interpolation="nearest")
    ax.add_patch(Rectangle((x, y - rows), columns, rows, fill=False, edgecolor=INK, linewidth=1.2))
    ax.text(x + columns / 2, y + 0.5, name, ha="center", va="bottom")
    if lost:
        width, height = (lost, rows) if along == "columns" else (columns, lost)
        left, low = (x + columns - lost, y - rows) if along == "columns" else (x, y - rows)
        ax.add_patch(Rectangle((left, low), width, height, facecolor="none", edgecolor=INK, hatch="///", linewidth=1.2))


@drawn
def cut(keep: int = 2) -> Figure:
    """A layer W = U V with four directions above, cut to `keep` of them below; what the cut takes from W beside it.

    ValueError unless 1 <= keep <= 3.
    """
    if not 1 <= keep <= 3:
        raise ValueError(f"cut: keep is {keep}; the drawn layer has 4 directions, wanted 1, 2 or 3 of them.")
    U, V = example()                                                # (8, 4), (4, 10)
    W, W2 = U @ V, U[:, :keep] @ V[:keep]                           # (8, 10)
    limit, lost = np.abs(W).max(), U.shape[1] - keep
    moved = np.linalg.norm(W - W2) / np.linalg.norm(W)
    fig, ax = _canvas(7.6, 5.0, 41, 25)
    ax.autoscale(False)
    for top, (left, right, whole), names, hatched in (
            (23.0, (U, V, W), ("U, 8 × 4", "V, 4 × 10", "W = U V"), lost),
            (10.5, (U[:, :keep], V[:keep], W2), (f"U′, 8 × {keep}", f"V′, {keep} × 10", "W′ = U′ V′"), 0)):
        _matrix(ax, left, 1, top, limit, names[0], hatched, "columns")
        _matrix(ax, right, 8, top, limit, names[1], hatched, "rows")
        ax.text(19.5, top - 4, "=", ha="center", va="center", fontsize=14)
        _matrix(ax, whole, 21, top, limit, names[2])
        ax.text(32.2, top - 4, f"{left.size + right.size} numbers\ninstead of {whole.size}", va="center")
    ax.text(8, 16.5, f"crossed out: the {lost} directions\nwith the smallest singular values", va="top", fontsize=9)
    ax.text(8, 6.6, f"W moves by {moved:.0%} of its size,\nthe least that a cut to {keep} can do", va="top", fontsize=9)
    return fig


# ------------------------------------------------------------------------------------------------ the optimizer

@drawn
def forgotten() -> Figure:
    """Who holds what after a resize: an optimizer that was not told, beside one that was."""
    fig, axes = plt.subplots(1, 2, figsize=(7.6, 4.2))
    for ax, told in zip(axes, (False, True)):
        ax.set(xlim=(0, 10), ylim=(0, 9.4), aspect="equal")
        ax.axis("off")
        ax.set_title("the optimizer is told" if told else "the optimizer is not told", fontsize=11)
        _box(ax, 0.2, 6.6, 3.6, 1.8, "model", BLUE)
        _box(ax, 6.2, 6.6, 3.6, 1.8, "optimizer", VERMILION)
        _box(ax, 0.2, 2.4, 3.6, 2.0, "new U\n12 columns", BLUE)
        _box(ax, 6.2, 2.4, 3.6, 2.0, "old U\n16 columns" if not told else "(old U is gone)", GREY if told else VERMILION)
        _arrow(ax, (2.0, 6.6), (2.0, 4.4))
        if told:
            _arrow(ax, (8.0, 6.6), (3.8, 4.0), VERMILION)
            words = "steps reach the new factor;\nits moments went through the same change"
        else:
            _arrow(ax, (8.0, 6.6), (8.0, 4.4), VERMILION)
            words = "steps change a matrix that no layer uses;\nthe new factor never moves again"
        ax.text(2.2, 5.5, "computes with", va="center", fontsize=9)
        ax.text(6.4 if told else 7.8, 5.9 if told else 5.5, "steps", va="center", ha="right", fontsize=9, color=INK)
        ax.text(5, 1.2, words, ha="center", va="center", fontsize=9)
    return fig


# ----------------------------------------------------------------------------------------------------- the loop

QUESTIONS = {"estimate": "How much rank\ndoes each layer use?", "control": "Which rank next?",
             "resize": "How do U and V get it?", "state": "What does the optimizer\nremember of them?"}


def value_of(recipe: object, axis: str) -> str:
    """The name of what stands on an axis of a recipe: 'SvdCore'.  ValueError where the axis is empty."""
    value = getattr(recipe, axis)
    if value is None:
        raise ValueError(f"loop: {axis} of {recipe.name!r} is empty; draw a recipe that adapts.")
    return type(value).__name__


@drawn
def loop(recipes: Mapping[str, object]) -> Figure:
    """The four steps of a decision as a ring of boxes, with what each recipe (name in prose -> Recipe) puts there."""
    fig, ax = _canvas(7.6, 5.2, 15.2, 10.4)
    width, height = 6.2, 3.6
    places = {"estimate": (0.3, 6.4), "control": (8.7, 6.4), "resize": (8.7, 0.4), "state": (0.3, 0.4)}
    for number, (axis, (x, y)) in enumerate(places.items(), start=1):
        _box(ax, x, y, width, height, "")
        ax.text(x + 0.25, y + height - 0.2, f"{number}. {axis}", va="top", weight="bold", fontsize=11)
        ax.text(x + 0.25, y + height - 0.85, QUESTIONS[axis], va="top", fontsize=9)
        for i, (name, recipe) in enumerate(recipes.items()):
            ax.text(x + 0.25, y + 0.85 - 0.6 * i, f"{name}: {value_of(recipe, axis)}", va="center", fontsize=9)
    _arrow(ax, (6.5, 8.2), (8.7, 8.2))
    _arrow(ax, (11.8, 6.4), (11.8, 4.0))
    _arrow(ax, (8.7, 2.2), (6.5, 2.2))
    _arrow(ax, (3.4, 4.0), (3.4, 6.4))
    ax.text(3.2, 5.2, "steps of training", ha="right", va="center", fontsize=9)
    ax.text(7.6, 8.45, "a number\nper layer", ha="center", va="bottom", fontsize=9)
    ax.text(12.0, 5.2, "a rank per layer", va="center", fontsize=9)
    ax.text(7.6, 2.45, "new\nfactors", ha="center", va="bottom", fontsize=9)
    return fig


# ----------------------------------------------------------------------------------------------------- the mask

@drawn
def mask(words: Sequence[str] = WORDS) -> Figure:
    """Which words a position sees while it predicts the next one, without a mask and with one.

    Row t is the position of word t, whose task is word t + 1; that word's cell is outlined.
    """
    t = len(words)
    fig, axes = plt.subplots(1, 2, figsize=(7.6, 3.9), sharey=True)
    for ax, title, sees in ((axes[0], "without a mask", np.ones((t, t))), (axes[1], "with a causal mask", np.tri(t))):
        for row in range(t):
            for column in range(t):
                answer = column == row + 1
                ax.add_patch(Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, linewidth=2.2 if answer else 0.6,
                                       facecolor=BLUE if sees[row, column] else "white", alpha=0.75 if sees[row, column] else 1,
                                       edgecolor=VERMILION if answer else "#bbbbbb"))
                if answer and sees[row, column]:
                    ax.text(column, row, "answer", ha="center", va="center", color="white", fontsize=8, weight="bold")
        ax.set(xlim=(-0.6, t - 0.4), ylim=(t - 0.4, -0.6), aspect="equal", title=title, xlabel="the word that is looked at")
        ax.set_xticks(range(t), words)
        ax.set_yticks(range(t), [f"{word} → {after}" for word, after in zip(words, [*words[1:], "?"])])
        ax.grid(visible=False)
        for spine in ax.spines.values():
            spine.set_visible(False)
        ax.tick_params(length=0)
    axes[0].set_ylabel("position → the word it has to predict")
    return fig


# ---------------------------------------------------------------------------------- a log that refutes itself

@drawn
def own_null(log: pd.DataFrame, narrow: bool = False) -> Figure:
    """Two layers of v8's published log: leading singular values, and ranks.  log: data/published/v8_block0.csv.

    narrow: one below the other, for a phone.

    attn_q is trained; attn_o has factors, and the script's forward pass never calls it.
    """
    fig, (left, right) = plt.subplots(2, 1, figsize=(3.8, 5.6)) if narrow else plt.subplots(1, 2, figsize=(7.6, 3.2))
    for name, colour, dash, size, words in (("attn_q", BLUE, "-", 7, "trained"),
                                            ("attn_o", VERMILION, "--", 3.5, "never used by the model")):
        rows, words = log[log["layer"] == name].set_index("epoch"), f"{name}: {words}"
        left.plot(rows.index, rows[["first", "second", "third"]], color=colour, linestyle=dash, marker="o", markersize=3)
        left.annotate(words, (6, rows["first"].max()), xytext=(0, 7), textcoords="offset points")
        right.plot(rows.index, rows["rank"], color=colour, linestyle=dash, marker="o", markersize=size, label=words)
    left.set(xlabel="training (epochs)", ylabel="leading singular values", ylim=(1.75, 2.5),
             title="What training does to the two layers")
    right.set(xlabel="training (epochs)", ylabel="rank (directions)", ylim=(0, 66), title="The ranks that they are given")
    right.legend(loc="lower left")
    for ax in (left, right):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return fig
