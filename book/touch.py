"""The numbers behind the pictures that a reader can touch, and their still versions: python book/touch.py spectrum.

`write` is called by build.py at every build: it reads the recorded runs and lays, below a folder, NAME.json for the scripts
of _static/touch.js and NAME.png for readers without scripts.  The spectrum is of a run that is not recorded with its
weights; `python book/touch.py spectrum` trains it again (a minute) into data/touch/spectrum.json, which is committed.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from alr.control import Bidirectional, Signal
from alr.evidence import plot, records
from alr.evidence.paths import DATA, RUNS
from alr.evidence.style import BLUE, GREY, INK, LOOKS, VERMILION, drawn, looks

SUITE, SEED = "evolution", 0                    # the runs that the player and the controllers show
PLAYED = {"v10": "v10", "repaired": "v10, repaired", "alr, pairs": "the budget recipe"}     # arm -> its name here
SPECTRUM = DATA / "touch" / "spectrum.json"
LAYER = "blocks.1.mlp.up"                       # of the trained model whose spectrum is shown


# ---------------------------------------------------------------- the numbers

def ranks(runs: records.Runs) -> dict:
    """Ranks of every layer and the validation loss, epoch by epoch, of one run of each arm in PLAYED, by its name there.

    Returns layers (in module order), epochs, full (the largest useful rank of each layer), and runs: name -> ranks
    (epochs x layers) and loss (nats per token), with the rank before training in front and no loss there.
    """
    out = {"runs": {}, "colours": {}, "source": f"suite {SUITE}, seed {SEED}"}
    for arm in [arm for arm in PLAYED if arm in runs.arms]:
        one = runs.of(arm=arm, seed=SEED)
        layers = list(dict.fromkeys(one.ranks["layer"]))
        grid = one.ranks.pivot(index="epoch", columns="layer", values="rank")[layers]
        start = one.resizes.drop_duplicates("layer").set_index("layer")["old"]          # before its first change
        first = [int(start.get(layer, grid.iloc[0][layer])) for layer in layers]
        out["layers"], out["epochs"] = layers, [0, *map(int, grid.index)]
        out["runs"][PLAYED[arm]] = {"ranks": [first, *grid.astype(int).values.tolist()],
                            "loss": [None, *one.curves.set_index("epoch")["val_loss"].round(4)]}
    roles = [name.rsplit(".", 1)[-1] for name in out["layers"]]
    out["colours"] = {role: look["color"] for role, look in looks(roles).items()}
    return out


def targets(runs: records.Runs) -> dict:
    """What v10 asked for at each of its decisions in the layer that it moved most often.

    A record holds the target of a decision that moved the rank; one that did not repeats the last target known.  Returns
    layer, targets (a stable rank per decision), ranks (as recorded, the start in front), cap, and the controller's values.
    """
    one = runs.of(arm="v10", seed=SEED)
    layer = one.resizes["layer"].value_counts().sort_index().idxmax()
    moved = one.resizes[one.resizes["layer"] == layer].set_index("step")
    steps = one.ranks[one.ranks["layer"] == layer].set_index("step")["rank"]
    asked = moved["target"].reindex(steps.index).ffill().bfill()
    return {"layer": layer, "targets": asked.round(4).tolist(), "known": [bool(step in moved.index) for step in steps.index],
            "ranks": [int(moved["old"].iloc[0]), *map(int, steps)], "cap": 128, "control": asdict(Bidirectional()),
            "source": f"suite {SUITE}, arm v10, seed {SEED}"}


def follow(control: Bidirectional, asked: list[float], rank: int, cap: int) -> list[int]:
    """The ranks of one layer under a controller that is asked for these targets, the first rank in front."""
    path, memory = [rank], control.init([rank])
    for target in asked:
        (rank,), memory = control.step([path[-1]], [target], memory, Signal(caps=[cap], step=1))
        path.append(rank)
    return path


def train_spectrum() -> dict:
    """Train the dense arm of the suite again -> singular values of LAYER before and after, with where they come from.

    SystemExit when the loss at the end is not the recorded one: then the numbers would be of another run.
    """
    import torch

    from alr.lab import Config, train

    log = records.read(RUNS / SUITE / f"dense.seed{SEED}.jsonl")
    known = {field.name for field in fields(Config)}
    settings = {key: value for key, value in log[0]["config"].items() if key in known}
    seen = []

    def watch(run):
        if run.step == 1:
            seen.append(run.model.get_submodule(LAYER).weight.detach().clone())

    run = train(Config(**settings), callback=watch, quiet=True)
    ends, wanted = run.log[-1]["val_loss"], log[-1]["val_loss"]
    if abs(ends - wanted) > 0.02:
        raise SystemExit(f"The run ended at {ends:.4f} nats per token, the record at {wanted:.4f}: it is not the recorded run.")
    values = {name: torch.linalg.svdvals(W.double()).tolist()
              for name, W in (("start", seen[0]), ("trained", run.model.get_submodule(LAYER).weight.detach()))}
    m, n = seen[0].shape
    return {"layer": LAYER, "rows": m, "columns": n, "step": run.step, "loss": round(ends, 3),
            "source": f"suite {SUITE}, arm dense, seed {SEED}, trained again",
            **{name: np.round(s, 5).tolist() for name, s in values.items()}}


def costs(m: int, n: int, r: int) -> dict:
    """What rank r of an m x n layer costs against the dense one.

    Returns parameters (of U and V), flops (of one token's forward pass, 2 per multiply-add), share (of the dense layer's,
    of both), break_even (the rank at which the share is 1), and rows, columns of the dense layer of the same shape with
    as many parameters.
    """
    share = r * (m + n) / (m * n)
    return {"parameters": r * (m + n), "flops": 2 * r * (m + n), "share": share, "break_even": m * n / (m + n),
            "rows": m * share ** 0.5, "columns": n * share ** 0.5}


# ---------------------------------------------------------------- the still pictures

@drawn
def still_targets(data: dict) -> Figure:
    """Rank and target over v10's decisions."""
    fig, ax = plt.subplots(figsize=(7.6, 3.6))
    safety = data["control"]["safety"]
    ax.step(range(1, len(data["targets"]) + 1), [safety * t for t in data["targets"]], color=GREY, where="post",
            label=f"{safety} x stable rank")
    ax.step(range(len(data["ranks"])), data["ranks"], color=VERMILION, where="post", label="rank")
    ax.set(xlabel="decision (one per epoch)", ylabel="rank (directions)", ylim=(0, None), title=data["layer"])
    ax.legend()
    return fig


@drawn
def still_spectrum(data: dict) -> Figure:
    """Singular values before and after training, and the rank at which factors stop paying."""
    fig, ax = plt.subplots(figsize=(7.6, 3.6))
    for name, colour in (("start", GREY), ("trained", BLUE)):
        ax.plot(range(1, len(data[name]) + 1), data[name], color=colour, label=name)
    even = costs(data["rows"], data["columns"], 1)["break_even"]
    ax.axvline(even, color=INK, linestyle=":", label=f"break-even: rank {even:.0f}")
    ax.set(xlabel="singular value (index, largest first)", ylabel="size (of W)", ylim=(0, None), title=data["layer"])
    ax.legend()
    return fig


def write(folder: Path) -> None:
    """NAME.json and NAME.png of every picture, and looks.json: the colour of every known arm.  FileNotFoundError as `runs`."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = records.runs(SUITE)
    spectrum = json.loads(SPECTRUM.read_text(encoding="utf8"))
    pictures: dict[str, tuple[dict, Callable[[], Figure]]] = {
        "ranks": (ranks(runs), lambda: plot.rank_paths(runs.of(arm="v10", seed=SEED).ranks, title="v10")),
        "controller": (asked := targets(runs), lambda: still_targets(asked)),
        "spectrum": (spectrum, lambda: still_spectrum(spectrum)),
    }
    for name, (data, draw) in pictures.items():
        (folder / f"{name}.json").write_text(json.dumps(data, separators=(",", ":"), allow_nan=False), encoding="utf8")
        draw().savefig(folder / f"{name}.png", dpi=120)
    colours = {name: look["color"] for name, look in LOOKS.items()}
    (folder / "looks.json").write_text(json.dumps(colours, separators=(",", ":")), encoding="utf8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["spectrum"], help="train again what data/touch holds")
    parser.parse_args()
    SPECTRUM.parent.mkdir(exist_ok=True)
    SPECTRUM.write_text(json.dumps(train_spectrum()) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
