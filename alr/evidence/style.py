"""One look for all figures: colours, units, a white card with dark ink.  No torch.

Colours are Okabe and Ito's (2008), which survive the common kinds of colour blindness; their orange and sky blue are
darkened here until a line on white has a contrast of 3 : 1, as WCAG 2.1 asks of graphics (1.4.11).
"""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from .records import natural

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#C28500", "#2F97D6"
INK, GREY = "#222222", "#8a8a8a"
DASHES = ["-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (3, 1, 1, 1)), (0, (8, 2, 2, 2))]
MARKERS = "osD^v<>PX*hpd8H"
KNOWN = {       # colour -> names; the place in its row gives a name its dash and marker, so append and never insert
    INK: ("dense", "dense, Muon", "dense, two rates", "v7", "dense 4 x 52", "dense 3 x 60", "dense 2 x 74", "dense 1 x 104",
          "dense 2 x 96", "dense 1 x 136", "dense 4 x 74", "dense 2 x 104", "dense 1 x 148"),
    BLUE: ("alr", "alr, pairs", "alr, a third", "alr, default", "alr, AdamW", "alr, from half", "wide", "one rate",
           "alr 4 x 96", "alr 4 x 128", "alr 4 x 96, a third", "alr 4 x 96, its ranks from step 0", "alr 4 x 96, rest 0.012",
           "alr 2 x 128", "alr 4 x 64"),
    VERMILION: ("v10", "v5", "v7.1", "v3", "v10's controller"),
    GREEN: ("uniform", "uniform, pairs", "uniform, v10 init", "uniform, spectral init", "v7.2", "v1", "v8", "uniform 4 x 128",
            "uniform 2 x 128", "uniform 1 x 128", "one rank, same cubic"),
    PURPLE: ("repaired", "v9", "v7.3", "v4", "fixed rank", "final ranks from step 0", "own ranks from step 0",
             "by sensitivity", "rank 64, Spectron"),
    ORANGE: ("one cut", "v2", "v7.4", "v5.1", "no transport", "final ranks permuted", "own ranks permuted",
             "cut once at 60 %", "cut once at 80 %", "by stable rank, cut once"),
    SKY: ("v6", "v7.5", "from rank 16", "from rank 32", "from rank 128", "from rank 8", "from rank 4", "no spectral init",
          "AdamW on the factors", "multiples of 8", "a loss of 2 is enough", "from half", "from break-even",
          "grown from rank 4", "rank 64, tangent"),
    GREY: ("no blocks", "baseline", "held", "without mask", "no decay", "strong decay", "exact estimate", "small start",
           "large start", "worth and cut by energy", "worth by the loss, cut by energy", "grouped", "coarse-to-fine"),
}
OTHERS = [      # kinds of names that never share axes with an arm
    {BLUE: ("q",), SKY: ("k",), PURPLE: ("v",), VERMILION: ("o", "fc2"), GREEN: ("up", "fc1"), ORANGE: ("down",)},  # roles
    {BLUE: ("transport",), VERMILION: ("stale",), GREEN: ("slice",), PURPLE: ("reset layer", "reset"),              # policies
     ORANGE: ("reset all",), SKY: ("zero first moment",), INK: ("keep",), GREY: ("counter back",)},
    {VERMILION: ("stable rank",), PURPLE: ("scaled stable rank",), INK: ("effective rank",), SKY: ("energy share",),
     GREEN: ("output energy",), ORANGE: ("loss by direction",), BLUE: ("Fisher importance",)},                     # estimators
    {BLUE: ("tangent",), PURPLE: ("Spectron",), GREEN: ("LoRA-Muon",), SKY: ("LoRA-TSD",), VERMILION: ("AdamW",),
     GREY: ("by energy",)},                                                                                        # rules
]
LAYER = re.compile(r"(?:blocks|layers|h)\.(\d+)\.(?:\w+\.)*(\w+)")
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


def _table() -> dict[str, dict]:
    """The look of every known name.  Within a kind of names, colour and place differ; between kinds, they may meet."""
    out = {}
    for kind, start in zip([KNOWN, *OTHERS], (0, 0, 4, 8, 2)):
        for row, (colour, names) in enumerate(kind.items()):
            for i, name in enumerate(names):
                out[name] = {"color": colour, "linestyle": DASHES[i % len(DASHES)],
                             "marker": MARKERS[(start + row + 2 * i) % len(MARKERS)]}
    return out


LOOKS = _table()


def _look(name: str) -> dict:
    """The look of one name: its own, that of its layer's role, or its family's with another dash and marker."""
    if name in LOOKS:
        return dict(LOOKS[name])
    layer = LAYER.fullmatch(name)
    if layer and layer[2] in LOOKS:                             # the colour says the role, the dash the block
        return LOOKS[layer[2]] | {"linestyle": DASHES[int(layer[1]) % len(DASHES)]}
    family = max((known for known in LOOKS if name.startswith((known + ", ", known + " "))), key=len, default=None)
    if family is None:
        raise ValueError(f"style: {name!r} has no look. Append it to a row of style.KNOWN (arms and recipes) or style.OTHERS "
                         "(roles, policies, estimators), or begin it with a known name and a comma, as in 'alr, a third'.")
    dashes = [dash for dash in DASHES[1:] if dash != LOOKS[family]["linestyle"]]
    markers = [marker for marker in MARKERS if marker != LOOKS[family]["marker"]]
    turn = zlib.crc32(name.encode())              # fixed by the name alone: the same in every figure
    return {"color": LOOKS[family]["color"], "linestyle": dashes[turn % len(dashes)],
            "marker": markers[turn // len(dashes) % len(markers)]}


def looks(names: Sequence[str]) -> dict[str, dict]:
    """Colour, dash and marker of arms, roles, policies or estimators, in natural order: the same in the whole book.

    A name that begins with a known one ("alr, half", "dense 2 x 74, Muon") has its colour with another dash and marker; a
    layer ("blocks.1.mlp.up") has the colour of its role and the dash of its block.  ValueError for any other name.
    """
    return {name: _look(name) for name in sorted(set(names), key=natural)}


def contrast(a: str, b: str) -> float:
    """The contrast ratio of two colours, 1 to 21 (WCAG 2.1, relative luminance of sRGB)."""
    def luminance(colour):
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def ink(colour: str, least: float = 4.5) -> str:
    """The colour, darkened just so far that words written in it can be read on white: contrast `least` or more."""
    rgb = to_rgb(colour)
    return next(to_hex(dark) for k in range(101) for dark in [[c * (1 - k / 100) for c in rgb]]
                if contrast(to_hex(dark), "white") >= least)


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
