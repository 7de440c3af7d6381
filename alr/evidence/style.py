"""One look for all figures: colours, units, a white card with dark ink.  No torch.

Colours are Okabe and Ito's (2008), which survive the common kinds of colour blindness.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from .records import natural

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
INK, GREY = "#222222", "#8a8a8a"
FIXED = {"dense": INK, "alr": BLUE, "v10": VERMILION, "uniform": GREEN,
         "q": BLUE, "k": SKY, "v": PURPLE, "o": VERMILION, "up": GREEN, "down": ORANGE}
SPARE = [PURPLE, ORANGE, SKY, GREY]     # for all others, with another dash each time round; yellow is unseen on white
DASHES = ["-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1))]
MARKERS = "osD^v<>PX*hpd8H"
STYLE = {
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white", "figure.dpi": 120,
    "savefig.dpi": 150, "figure.constrained_layout.use": True, "font.family": "DejaVu Sans", "font.size": 10,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": "#555555", "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e8e8e8",
    "axes.axisbelow": True, "axes.titlesize": 11, "axes.titlelocation": "left", "legend.frameon": False,
    "lines.linewidth": 1.8, "svg.hashsalt": "alr",
}
UNITS = {
    "val_loss": "validation loss (nats per token)", "train_loss": "training loss (nats per token)",
    "test_loss": "test loss (nats per token)", "loss": "batch loss (nats per token)", "lr": "learning rate (per step)",
    "val_bpb": "validation loss (bits per byte)", "test_bpb": "test loss (bits per byte)",
    "val_ppl": "validation perplexity (per token)", "test_ppl": "test perplexity (per token)",
    "step": "training (optimizer steps)", "epoch": "training (epochs)", "seconds": "training time (seconds)",
    "flops": "training cost (FLOPs)", "params_blocks": "size of the blocks (parameters)",
    "params_total": "size of the model (parameters)", "params_millions": "size of the model (million parameters)",
    "rank": "rank (directions)", "rank_avg": "mean rank (directions)", "rank_mean": "mean rank (directions)",
    "grad_norm": "gradient norm (L2)", "tokens_per_s": "speed (tokens per second)",
    "peak_memory_mb": "peak memory (MB)",
}


def unit(column: str) -> str:
    """The axis label of a column.  ValueError when no unit is known: an axis without one is not drawn."""
    if column not in UNITS:
        raise ValueError(f"plot: no unit is known for {column!r}; there are {', '.join(UNITS)}. Add it to style.UNITS.")
    return UNITS[column]


def looks(names: Sequence[str]) -> dict[str, dict]:
    """Colour, dash and marker of every arm or role: known names keep their colour, "alr, a third" has that of "alr" with
    another dash, the others take turns in order."""
    out, spare, kin = {}, 0, {}
    for i, name in enumerate(sorted(set(names), key=natural)):
        family = name.split(", ")[0]
        dash, colour = "-", FIXED.get(family)
        if colour is None:
            dash, colour = DASHES[(spare // len(SPARE) + 1) % len(DASHES)], SPARE[spare % len(SPARE)]
            spare += 1
        elif name != family:
            kin[family] = kin.get(family, 0) + 1
            dash = DASHES[kin[family] % len(DASHES)]
        out[name] = {"color": colour, "linestyle": dash, "marker": MARKERS[i % len(MARKERS)]}
    return out


def drawn(function):
    """The function in this file's style; its figure is closed, so that a notebook shows it once, as a cell's value."""
    @functools.wraps(function)
    def inner(*args, **kwargs) -> Figure:
        before = set(plt.get_fignums())
        with plt.rc_context(STYLE):
            try:
                return function(*args, **kwargs)
            finally:
                for number in set(plt.get_fignums()) - before:
                    plt.close(number)
    return inner
