"""Checkpoints: a folder with the weights (safetensors) and all else that a run needs to go on (state.pt).

state.pt names the weights that belong to it and is replaced last, in one rename: a folder that was cut off at any
moment holds the old pair or the new one.  Both load without running code: safetensors, torch.load(weights_only=True).
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

STATE = "state.pt"


def save(folder: str | Path, model: nn.Module, state: dict, step: int) -> None:
    """Write the model and the state of `step`; older weights go when the new pair stands."""
    from safetensors.torch import save_model
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / f"model-{step:08d}.safetensors"
    part = weights.with_suffix(".part")
    save_model(model, str(part))                                    # a tied matrix is written once
    os.replace(part, weights)
    part = folder / (STATE + ".part")
    torch.save({**state, "weights": weights.name}, part)
    os.replace(part, folder / STATE)
    for old in folder.glob("model-*"):
        if old.name != weights.name:
            old.unlink()


def exists(folder: str | Path) -> bool:
    return (Path(folder) / STATE).exists()


def load(folder: str | Path) -> dict:
    """The state, with everything on the CPU.  FileNotFoundError without a checkpoint, ValueError for a broken one."""
    path = Path(folder) / STATE
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint in {folder} ({STATE} is not there); leave out --resume to start anew.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                          # torch raises whatever the broken bytes made it do
        raise ValueError(f"{path} cannot be read ({type(error).__name__}); start anew in another folder.") from error


def load_weights(folder: str | Path, state: dict, model: nn.Module) -> None:
    """Put the weights of `state` into the model, in place; low-rank layers take the saved ranks."""
    from safetensors.torch import load_model
    load_model(model, str(Path(folder) / state["weights"]))
