"""Figures from records: tables of `alr.evidence.records` in, matplotlib figures out.  No torch: they can be redrawn long after.

    r = runs("evolution")
    losses(r.curves), pareto(r.ends), rank_map(r.of(arm="v10", seed=0).ranks), forest(claims.read())

A figure is a white card with dark ink, the same in light and dark pages (`style`); an arm or a role has the same colour, dash
and marker in all of them, names stand at the ends of lines and beside points, and every axis names its unit.  Bands and bars
are 95 % t intervals over seeds (`stats`); one seed has none.
Seaborn draws heat maps, points and lines with intervals; what it has no chart for is drawn by matplotlib.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from .claims import phrase
from .markup import VERDICTS
from .register import OPEN, bounds
from .stats import Interval, mean
from .style import BLUE, DASHES, GREEN, GREY, INK, ORANGE, PURPLE, SKY, VERMILION, drawn, ink, looks, unit


def _some(table: pd.DataFrame, what: str) -> pd.DataFrame:
    if table.empty:
        raise ValueError(f"plot: no {what} to draw; the table is empty.")
    return table


def _legend(fig, handles=None):
    """Beside the axes, never over the data."""
    handles = handles or fig.axes[0].get_legend_handles_labels()[0]
    fig.legend(handles=handles, loc="outside right upper")


def _apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places as near to the wanted ones as can be, in their order, `gap` apart and within [low, high] if they fit there.

    Places that would touch form a group around its mean, which is the least-squares answer.  O(n^2) at worst.
    """
    order, groups = sorted(range(len(wanted)), key=lambda i: wanted[i]), []
    for i in order:
        groups.append([wanted[i], [i]])                         # [middle, members]
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (len(groups[-1][1]) + len(groups[-2][1])) / 2:
            middle, members = groups.pop()
            before = groups[-1]
            n, m = len(before[1]), len(members)
            groups[-1] = [(before[0] * n + middle * m) / (n + m), before[1] + members]
        half = gap * (len(groups[-1][1]) - 1) / 2
        groups[-1][0] = max(min(groups[-1][0], high - half), low + half)
    out = [0.0] * len(wanted)
    for middle, members in groups:
        for k, i in enumerate(members):
            out[i] = middle + gap * (k - (len(members) - 1) / 2)
    for a, b in itertools.pairwise(order):                      # a group that was pushed from an edge pushes its neighbours
        out[b] = max(out[b], out[a] + gap)
    over = out[order[-1]] - high if order else 0.0
    return [at - over for at in out] if over > 0 else out


def name_ends(ax, ends: Mapping[str, tuple[float, float, dict]], size: float = 9) -> None:
    """Names to the right of the axes, each at the height of its line's end or its point, with a thin line to it.

    ends: name -> (x, y, look), in data; limits and scales of the axes have to be set already.  size: points.
    """
    places = [ax.transAxes.inverted().transform(ax.transData.transform((x, y))) for x, y, _ in ends.values()]
    tall = 72 * ax.figure.get_figheight() * 0.75                # the axes' height in points, before the layout is known
    heights = _apart([float(y) for _, y in places], 1.25 * size / tall, 0.0, 1.0)
    for (name, (_, _, look)), (x, y), height in zip(ends.items(), places, heights):
        ax.plot([x, 1.02, 1.04], [y, height, height], transform=ax.transAxes, color=look["color"], linewidth=0.7, alpha=0.6,
                clip_on=False, zorder=1, label="_to its name")
        ax.text(1.05, height, name, transform=ax.transAxes, color=ink(look["color"]), fontsize=size, va="center")


def _beside(here: tuple[float, float], radius: float, wide: float, tall: float) -> Iterator[tuple[int, Bbox]]:
    """(how far, place) for a name of that size around a round mark, nearest first; right and left before above and below."""
    x, y = here
    for ring in range(1, 15):
        for angle in (0, 180, 45, 135, -45, -135, 90, -90):
            right, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            reach = radius + 0.45 * tall * (2 * ring - 1)
            left = x + reach * right + (0.0 if right > 0.1 else -wide if right < -0.1 else -wide / 2)
            yield ring, Bbox.from_bounds(left, y + reach * up - tall / 2, wide, tall)


def _cost(place: Bbox, here, points, frame: Bbox, taken: Sequence[Bbox], thin: Sequence[Bbox]) -> float:
    """What is wrong with a place for the name of the point `here`, in rings of distance; to be cut off is the worst."""
    def far(point):
        return math.dist(point, np.clip(point, place.min, place.max))
    inside = frame.x0 <= place.x0 and place.x1 <= frame.x1 and frame.y0 <= place.y0 and place.y1 <= frame.y1
    return (1000 * (not inside) + 100 * sum(place.overlaps(other) for other in taken)
            + 4 * sum(far(point) < far(here) - 1 for point in points) + 2 * sum(place.overlaps(line) for line in thin))


def name_points(ax, points: Mapping[str, tuple[float, float, dict]], lines: Sequence = (), size: float = 9) -> None:
    """Names beside their marks, inside the axes, over no mark and no other name where there is room, else over the least.

    points: name -> (x, y, look), in data; limits and scales of the axes have to be set already.  lines: ((x, y), (x, y)),
    level or upright, in data, which a name had better not cover.  A name that had to go further has a thin line to its
    mark.  The most crowded ones choose first.  size: points.
    """
    fig = ax.figure
    fig.draw_without_rendering()                                    # from here on the layout is known
    dot, frame = fig.dpi / 72, ax.get_window_extent()
    at = {name: ax.transData.transform((x, y)) for name, (x, y, _) in points.items()}
    marks = [Bbox.from_bounds(x - 4 * dot, y - 4 * dot, 8 * dot, 8 * dot) for x, y in at.values()]
    thin = [Bbox(np.sort(ax.transData.transform(ends), axis=0) + [[-1, -1], [1, 1]]) for ends in lines]
    near = {name: sum(math.dist(here, there) < 60 * dot for there in at.values()) for name, here in at.items()}
    taken = []
    for name in sorted(points, key=lambda name: -near[name]):
        here, look = at[name], points[name][2]
        text = ax.text(0, 0, name, color=ink(look["color"]), fontsize=size, va="center",
                       path_effects=[withStroke(linewidth=2, foreground="white")])
        box = text.get_window_extent()
        costs = {place: ring + _cost(place, here, at.values(), frame, [*taken, *marks], thin)
                 for ring, place in _beside(here, 5 * dot, box.width, 1.1 * box.height)}
        place = min(costs, key=costs.get)
        taken.append(place)
        x, y = ax.transAxes.inverted().transform((place.x0, (place.y0 + place.y1) / 2))
        text.set(position=(x, y), transform=ax.transAxes)
        nearest = np.clip(here, place.min, place.max)
        if math.dist(here, nearest) > 16 * dot:
            ends = ax.transAxes.inverted().transform([here, nearest])
            ax.plot(*ends.T, transform=ax.transAxes, color=look["color"], linewidth=0.7, alpha=0.6, zorder=1,
                    label="_to its name")


def _interval(values) -> tuple[float, float]:
    """The ends of a 95 % t interval over seeds, for seaborn's errorbar; NaN for one seed, which has none."""
    m = mean(values)
    return (np.nan, np.nan) if m.low is None else (m.low, m.high)


def _band(ax, table, x, y, look, label):
    """A line through the means of y at each x, with the interval as its band."""
    sns.lineplot(table, x=x, y=y, ax=ax, color=look["color"], linestyle=look["linestyle"], label=label, legend=False,
                 errorbar=_interval, err_kws={"alpha": 0.15, "linewidth": 0})


# --------------------------------------------------------------------------------------------------- curves

def _seeds(n: int) -> str:
    return f"{n} seed{'s' if n > 1 else ''}"


@drawn
def losses(curves: pd.DataFrame, y: str = "val_loss", x: str = "step", title: str = "") -> Figure:
    """A line per arm: the mean over seeds with its interval, every seed as a thin line.  x: step, epoch or seconds.

    The vertical axis spans the runs; of two seeds, an interval may well reach beyond it.
    """
    labels = {"xlabel": unit(x), "ylabel": unit(y)}
    fig, ax = plt.subplots(figsize=(7.6, 4))
    seeds, ends = _some(curves, "curves").groupby("arm")["run"].nunique(), {}
    for arm, look in looks(curves["arm"]).items():
        runs = curves[curves["arm"] == arm]
        sns.lineplot(runs, x=x, y=y, units="run", estimator=None, ax=ax, color=look["color"], legend=False,
                     linewidth=0.6, alpha=0.45)
        middle = runs.assign(**{x: runs.groupby("epoch")[x].transform("mean")})     # seconds differ from seed to seed
        _band(ax, middle, x, y, look, f"{arm} ({_seeds(seeds[arm])})")
        last = middle[middle["epoch"] == middle["epoch"].max()]
        name = arm if seeds.nunique() == 1 else f"{arm} ({_seeds(seeds[arm])})"
        ends[name] = (last[x].mean(), last[y].mean(), look)
    low, high = curves[y].min(), curves[y].max()
    ax.set_ylim(low - 0.06 * (high - low or 1), high + 0.06 * (high - low or 1))
    ax.set(**labels, title=title)
    if seeds.nunique() == 1:
        ax.set_title(f"{_seeds(seeds.iloc[0])} each", loc="right", fontsize=9)
    name_ends(ax, ends)
    return fig


def align(steps: pd.DataFrame, resizes: pd.DataFrame, column: str = "loss", before: int = 20,
          after: int = 60) -> pd.DataFrame:
    """A column of the step lines around every step at which a rank changed, less its mean over the `before` steps.

    Returns arm, run, event, offset, value; offset 0 is the last step with the old ranks.  An event without a step line
    before it is left out, and so is what lies beyond the next event.
    """
    parts = [pd.DataFrame(columns=["arm", "run", "event", "offset", "value"])]
    for run, lines in steps.groupby("run", sort=False):
        events = sorted(resizes.loc[resizes["run"] == run, "step"].unique())
        for event, following in itertools.pairwise([*events, np.inf]):
            near = lines[lines["step"].between(event - before, min(event + after, following))]
            past = near.loc[near["step"] <= event, column]
            if len(past):
                parts.append(pd.DataFrame({"arm": near["arm"], "run": run, "event": event,
                                           "offset": near["step"] - event, "value": near[column] - past.mean()}))
    return pd.concat(parts[1:] or parts, ignore_index=True)


@drawn
def aligned(steps: pd.DataFrame, resizes: pd.DataFrame, columns: Sequence[str] = ("loss", "grad_norm"),
            before: int = 20, after: int = 60, title: str = "") -> Figure:
    """What a resize does: columns of the step lines around it, as the change from just before.

    Events are averaged within a run first; line and band are then mean and interval over runs.
    """
    fig, axes = plt.subplots(1, len(columns), figsize=(4.2 * len(columns) + 1.4, 3.6), squeeze=False)
    for ax, column in zip(axes[0], columns):
        table = _some(align(steps, resizes, column, before, after), "resizes with step lines around them")
        for arm, look in looks(table["arm"]).items():
            per_run = table[table["arm"] == arm].groupby(["offset", "run"], as_index=False)["value"].mean()
            _band(ax, per_run, "offset", "value", look, arm)
        ax.axvline(0, color=GREY, linewidth=1, linestyle=":")
        ax.axhline(0, color=GREY, linewidth=1)
        ax.set(xlabel="since the resize (optimizer steps)", ylabel="change of " + unit(column))
    fig.suptitle(title, x=0.01, ha="left", fontsize=11)
    _legend(fig)
    return fig


# ---------------------------------------------------------------------------------------------------- ranks

def _one_run(ranks: pd.DataFrame) -> pd.DataFrame:
    if _some(ranks, "ranks")["run"].nunique() != 1:
        raise ValueError(f"plot: ranks of {ranks['run'].nunique()} runs; pick one: runs.of(arm='v10', seed=0).ranks.")
    return ranks


@drawn
def rank_paths(ranks: pd.DataFrame, title: str = "") -> Figure:
    """The rank of every layer of one run over its epochs, coloured by role; the mean of each role is the thick line."""
    fig, ax = plt.subplots(figsize=(7.6, 4))
    look, ends = looks(_one_run(ranks)["role"]), {}
    for role in dict.fromkeys(ranks["role"]):
        of_role, colour = ranks[ranks["role"] == role], look[role]["color"]
        for _, layer in of_role.groupby("layer"):
            ax.plot(layer["epoch"], layer["rank"], color=colour, linewidth=0.7, alpha=0.5)
        middle = of_role.groupby("epoch")["rank"].mean()
        ax.plot(middle.index, middle, color=colour, linestyle=look[role]["linestyle"], linewidth=2.4, label=role)
        ends[role] = (middle.index[-1], middle.iloc[-1], look[role])
    ax.set(xlabel=unit("epoch"), ylabel=unit("rank"), title=title)
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    name_ends(ax, ends)
    return fig


@drawn
def rank_map(ranks: pd.DataFrame, title: str = "") -> Figure:
    """The rank of every layer of one run over its epochs as a heat map, layers in module order from the top."""
    layers = list(dict.fromkeys(_one_run(ranks)["layer"]))
    grid = ranks.pivot(index="layer", columns="epoch", values="rank").loc[layers]               # layers x epochs
    fig, ax = plt.subplots(figsize=(7.6, 1.4 + 0.19 * max(len(layers), 6)))
    names = [name.removeprefix("blocks.") for name in layers]
    sns.heatmap(grid, ax=ax, cmap="cividis", yticklabels=names, cbar_kws={"label": unit("rank")})
    ax.tick_params(length=3, rotation=0)
    ax.tick_params(axis="y", labelsize=8)
    ax.set(xlabel=unit("epoch"), ylabel="layer (block.part)", title=title)
    return fig


@drawn
def rank_roles(ranks: pd.DataFrame, title: str = "") -> Figure:
    """Final ranks by role (q, k, v, o, up, down) and arm: a dot per seed (mean of layers), their mean with its bar."""
    last = ranks[ranks["epoch"] == _some(ranks, "ranks").groupby("run")["epoch"].transform("max")]
    seeds = last.groupby(["arm", "run", "role"], as_index=False)["rank"].mean()
    roles, look = list(dict.fromkeys(last["role"])), looks(last["arm"])
    fig, ax = plt.subplots(figsize=(7.6, 3.8))
    both = {"data": seeds, "x": "role", "y": "rank", "hue": "arm", "order": roles, "hue_order": list(look), "ax": ax,
            "palette": {arm: style["color"] for arm, style in look.items()}}
    sns.stripplot(**both, dodge=True, jitter=False, size=4, alpha=0.45, legend=False)
    sns.pointplot(**both, dodge=0.8 * (1 - 1 / len(look)), errorbar=_interval, capsize=0.2 / len(look), linestyle="none",
                  markers=[style["marker"] for style in look.values()], markersize=5, err_kws={"linewidth": 1.2})
    ax.get_legend().remove()
    ax.set_xticks(range(len(roles)), roles)
    ax.set(xlabel="layer (role in the block)", ylabel="final " + unit("rank"), title=title)
    ax.set_ylim(bottom=0)
    ax.grid(axis="x", visible=False)
    _legend(fig)
    return fig


@drawn
def spectrum(values: Mapping[str, Sequence[float]], estimates: Mapping[str, float], title: str = "") -> Figure:
    """Singular values, falling, of matrices (name -> values), and what estimators read from them (name -> rank).

    Each matrix is scaled by its largest value; zeros have no place on the logarithmic axis and are left out.
    """
    fig, ax = plt.subplots(figsize=(7.6, 3.8))
    hues = [BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY]        # by place: matrices and readings have names of their own
    for i, (name, s) in enumerate(values.items()):
        s = np.sort(np.asarray(s, dtype=float))[::-1]                                           # (r,)
        if not len(s) or s[0] <= 0:
            raise ValueError(f"plot: the spectrum of {name!r} has no value above 0.")
        ax.plot(np.arange(1, len(s) + 1)[s > 0], s[s > 0] / s[0], color=INK if len(values) == 1 else hues[i % 6],
                marker=".", markersize=4, linewidth=1.2, label=name)
    for i, (name, k) in enumerate(estimates.items()):
        ax.axvline(k, color=hues[i % 6], linestyle=DASHES[1 + i % 4],
                   linewidth=1.6, label=f"{name}: {k:.1f}")
    ax.set(xlabel="singular value (index, largest first)", ylabel="size (share of the largest)", title=title)
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 4, 6) if high / low < 30 else (1,), numticks=30))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    _legend(fig)
    return fig


# ------------------------------------------------------------------------------------------------ trade-offs

def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats: none is as low in one coordinate and lower in the other; by first."""
    best, out = np.inf, []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if points[i][1] < best:
            best, out = points[i][1], [*out, i]
    return out


@drawn
def pareto(ends: pd.DataFrame, x: str = "params_blocks", y: str = "val_loss", title: str = "") -> Figure:
    """What a loss costs: one mark per arm (means over seeds, bars are intervals), and the front of those nobody beats.

    x: params_blocks, flops or seconds, on a logarithmic axis.  Lower is better on both.
    """
    labels = {"xlabel": unit(x), "ylabel": unit(y)}
    fig, ax = plt.subplots(figsize=(7.6, 4.4))
    look, means, bars = looks(_some(ends, "finished runs")["arm"]), [], []
    seeds = ends.groupby("arm")["run"].nunique()
    for arm, style in look.items():
        mx, my = (mean(ends.loc[ends["arm"] == arm, c]) for c in (x, y))
        means.append((mx.value, my.value))
        bars += [((m.low, my.value), (m.high, my.value)) if m is mx else ((mx.value, m.low), (mx.value, m.high))
                 for m in (mx, my) if m.low is not None]
        ax.errorbar(mx.value, my.value, my.bar, mx.bar, color=style["color"], marker=style["marker"], markersize=7,
                    capsize=3, linestyle="none", elinewidth=1, label=f"{arm} ({_seeds(mx.n)})")
    lost = [arm for arm, point in zip(look, means) if not np.isfinite(point).all()]
    if lost:
        raise ValueError(f"plot: {x} or {y} is missing for {', '.join(lost)}.")
    left, right = min(a for a, _ in means) / 1.4, max(a for a, _ in means) * 1.4
    best = [means[i] for i in front(means)]
    corners = [best[0], *((x1, y0) for (_, y0), (x1, _) in itertools.pairwise(best)), (right, best[-1][1])]
    stairs = [corners[0], *(p for c, b in zip(corners[1:], best[1:]) for p in (c, b)), corners[-1]]
    ax.plot(*zip(*stairs), color=GREY, linestyle="--", linewidth=1, label="front", zorder=0)
    ax.set(**labels, title=title, xscale="log", xlim=(left, right))
    narrow = right / left < 8
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8) if narrow else (1, 2, 5), numticks=30))
    ax.xaxis.set_major_formatter(EngFormatter(sep="\N{THIN SPACE}"))
    ax.xaxis.set_minor_locator(NullLocator())
    same = seeds.nunique() == 1
    ax.set_title("dashed: the front" + (f"; {_seeds(seeds.iloc[0])} each" if same else ""), loc="right", fontsize=9)
    name_points(ax, {arm if same else f"{arm} ({_seeds(seeds[arm])})": (*point, look[arm])
                     for arm, point in zip(look, means)}, [*bars, *itertools.pairwise(stairs)])
    return fig


# ---------------------------------------------------------------------------------------------------- claims

@drawn
def forest(claims: Mapping[str, dict], title: str = "", keys: bool = False) -> Figure:
    """The entries of claims.json: value, interval, what the rule allows (shaded, to its threshold), verdict by name.

    One panel for means, differences or ratios of each unit.  A claim without records keeps its row.  keys: rows are named by
    their keys in the register, where their sentences stand in a table beside the picture.
    """
    if not claims:
        raise ValueError("plot: no claims to draw.")
    panels: dict[str, list] = {}
    for k, c in claims.items():
        panels.setdefault(f"{c['kind']} ({c['unit']})", []).append((k, c))
    text = {k: k if keys else textwrap.fill(c["text"], 46) for k, c in claims.items()}
    heights = [sum(0.35 + 0.16 * text[k].count("\n") + 0.12 for k, _ in rows) + 0.5 for rows in panels.values()]
    fig, axes = plt.subplots(len(panels), 1, figsize=(9.6, sum(heights) + 0.4), squeeze=False, height_ratios=heights)
    for ax, (name, rows) in zip(axes[:, 0], panels.items()):
        limits = [(bounds(k, c["rule"], c["threshold"])[:2] if c["rule"] else ()) for k, c in rows]
        seen = [v for (_, c), ends in zip(rows, limits) for v in (c["value"], c["low"], c["high"], *ends)
                if v is not None and np.isfinite(v)]
        if not seen:
            ax.set_xticks([])
        seen = seen or [0.0]
        pad = 0.12 * (max(seen) - min(seen)) or 0.1 * abs(seen[0]) or 1.0
        left, right = min(seen) - pad, max(seen) + pad
        for y, ((_, c), ends) in enumerate(zip(rows, limits)):
            colour, tint = VERDICTS[c["verdict"]]
            if ends:
                a, b = max(ends[0], left), min(ends[1], right)
                ax.fill_betweenx([y - 0.36, y + 0.36], a, b, color="#efefef", linewidth=0, zorder=0)
                ax.vlines([e for e in ends if np.isfinite(e)], y - 0.36, y + 0.36, color=INK, linewidth=1.4)
            if c["value"] is not None:
                found = Interval(c["value"], c["low"], c["high"], c["n"])
                ax.errorbar(found.value, y, xerr=found.bar, color=colour, marker="o", markersize=7, capsize=4,
                            markerfacecolor="white" if c["verdict"] == OPEN else colour)
            value = "" if c["value"] is None else f"{phrase(c)}\n"
            ax.text(1.02, y, f"{value}{c['verdict']}", color=colour, va="center", weight="bold", fontsize=9,
                    transform=ax.get_yaxis_transform())
        ax.set_yticks(range(len(rows)), [text[k] for k, _ in rows], fontsize=9)
        ax.set(xlim=(left, right), ylim=(len(rows) - 0.4, -0.6), xlabel=name)
        ax.xaxis.set_major_locator(MaxNLocator(5) if ax.get_xticks().size else NullLocator())      # room for "-0.125"
        ax.grid(axis="y", visible=False)
    allowed = Line2D([], [], color="#d8d8d8", linewidth=8, label="what the rule allows")
    fig.legend(handles=[allowed, Line2D([], [], color=INK, marker="o", label="value, 95 % interval")], ncols=2,
               loc="outside lower right", fontsize=9)
    fig.suptitle(title, x=0.01, ha="left", fontsize=11)
    return fig
