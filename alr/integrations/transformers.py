"""`alr` in Hugging Face's Trainer, and factorised models from the folders that `save_pretrained` writes.

    alr.factorize_(model, rank=0.5, where=lambda name: name != "lm_head")
    trainer = Trainer(model, args, train_dataset=data, callbacks=[AdaptRanks(alr.recipes.alr)])
    trainer.train()
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError("alr.integrations.transformers needs transformers: pip install transformers accelerate") from error

from ..adapt import Recipe, adopt, bare
from ..linear import factorize_like_, low_rank_layers, unwrapped
from .common import Adapting, alike, prints

FILE = "alr.pt"                         # beside the Trainer's own files in every checkpoint


class AdaptRanks(Adapting, TrainerCallback):
    """Makes a RankAdapter when training begins, and calls it after every optimizer step.

    recipe: such as alr.recipes.alr; factorise the model before the Trainer is made, and give the callback to the Trainer's
    constructor.  The Trainer's own AdamW will do, or `optimizers=(alr.PairOptimizer(model), None)`.  Gradient accumulation,
    clipping, checkpointing, bf16 and fp16 are the Trainer's affair.  Logs get "rank_mean" and
    "low_rank_parameters"; `.events` holds every change, `.adapter.ranks` the ranks.  averages, per: see `common.Adapting`.

    The adapter's state lies beside each checkpoint as alr.pt, and `trainer.train(resume_from_checkpoint=...)` goes on bit
    for bit.  resume_from: that folder, where it is not OUTPUT_DIR/checkpoint-STEP.

    ValueError at the start of training: no low-rank layers; several processes or GPUs, whose wrapper would hold on to old
    parameters; a resumed run without a saved state, or with weights that are not those that were saved.
    """

    def __init__(self, recipe: Recipe, averages: Iterable[nn.Module] = (), per: Literal["auto", "row", "example"] = "auto",
                 resume_from: str | Path | None = None):
        super().__init__(recipe, averages, per)
        self.resume_from = resume_from
        self._known: dict[str, tuple] = {}          # the factors that an optimizer made by the user holds

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self._known = factors(model) if model is not None else {}

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if args.parallel_mode.name != "NOT_PARALLEL" or getattr(args, "deepspeed", None):
            raise ValueError(f"AdaptRanks: the Trainer runs in {args.parallel_mode.name} mode on {args.world_size} processes, "
                             f"{args.n_gpu} GPUs, and what it wraps the model in cannot follow a rank that changes. Run it on "
                             "one device (CUDA_VISIBLE_DEVICES=0), hold the ranks and leave the callback out, or write the "
                             "loop with alr.average_gradients(model).")
        optimizer = bare(optimizer)
        layers = low_rank_layers(model)
        # a checkpoint of other ranks may have been loaded after the user had made the optimizer
        adopt([optimizer], {name: pair for name, pair in self._known.items() if name in layers}, layers)
        saved = None
        if state.global_step:
            folder = self._folder(args, state)
            saved = torch.load(folder / FILE, map_location="cpu", weights_only=True)
            if saved["adapter"]["steps"] != state.global_step:
                raise ValueError(f"AdaptRanks: {folder / FILE} is of step {saved['adapter']['steps']}, and training goes on "
                                 f"from step {state.global_step}. Write AdaptRanks(recipe, resume_from=FOLDER).")
            if not alike(saved["prints"], prints(model)):           # the Trainer does not know its own file's names (ViT)
                here = factors(model)
                load_(model, folder)
                adopt([optimizer], here, layers)
        self.begin(model, optimizer, state.max_steps, saved)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.follow()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.adapter is not None and logs is not None and "loss" in logs:
            logs.update(self.sizes())
            state.log_history[-1].update(self.sizes())

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        # a search for hyperparameters, which never resumes, has others
        if state.is_world_process_zero and folder.is_dir():
            torch.save(self.saved(), folder / FILE)

    def on_train_end(self, args, state, control, **kwargs):
        self.end()

    def _folder(self, args, state) -> Path:
        given = self.resume_from or (args.resume_from_checkpoint if isinstance(args.resume_from_checkpoint, str) else None)
        folder = Path(given or Path(args.output_dir) / f"checkpoint-{state.global_step}")
        if not (folder / FILE).is_file():
            raise ValueError(f"AdaptRanks: training goes on from step {state.global_step}, and {folder / FILE} is not there. "
                             f"If the "
                             "checkpoint lies elsewhere, write AdaptRanks(recipe, resume_from=FOLDER); if it was made without "
                             "AdaptRanks, load it with alr.integrations.transformers.load_(model, FOLDER) and train anew.")
        return folder


def factors(model: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """(U, V) of every low-rank layer by name."""
    return {name: (layer.U, layer.V) for name, layer in low_rank_layers(model).items()}


def load_(model: nn.Module, folder: str | Path) -> nn.Module:
    """Load what `save_pretrained` has written of a factorised model, in place; returns the model.

    model: made from the config, dense or factorised at any ranks: `load_(AutoModelForCausalLM.from_config(config), folder)`.
    `from_pretrained` itself makes a dense model and leaves its layers as random as they come.
    ValueError, before any number is loaded, for a folder without a factorised model, and for weights that the model lacks or
    that it holds under other names: transformers converts those of some models (the experts of Mixtral) when it saves.
    """
    state = read(folder)
    inner = unwrapped(model)
    names = saved_names(inner, state)
    state = {names.get(key, key): x for key, x in state.items()}
    low = {key[:-2] for key in state if key.endswith(".U") and f"{key[:-2]}.V" in state}
    here = {key for key in inner.state_dict() if key.rpartition(".")[0] not in low or key.endswith(".bias")}
    here |= {f"{name}.{factor}" for name in low for factor in "UV"}
    tied = set(getattr(inner, "all_tied_weights_keys", None) or ())
    missing, unknown = sorted(here - set(state) - tied), sorted(set(state) - here)
    if low and (missing or unknown):
        found = [f"{len(keys)} {what}, the first is {keys[0]!r}" for keys, what in (
            (missing, "of the model are not saved"), (unknown, "of the folder are not in the model")) if keys]
        raise ValueError(f"load_: {folder} and the model hold weights of different names: {'; '.join(found)}. transformers "
                         f"renames "
                         "some when it saves; torch.save(model.state_dict(), file), and alr.factorize_like_(model, "
                         "state).load_state_dict(state), do not.")
    factorize_like_(inner, state)
    inner.load_state_dict(state, strict=False)
    if tied and hasattr(inner, "tie_weights"):
        inner.tie_weights()
    return model


def read(folder: str | Path) -> dict[str, Tensor]:
    """The weights in a folder, in one file or in several with an index."""
    from safetensors.torch import load_file

    folder = Path(folder)
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if whole.is_file():
        return load_file(whole)
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return {key: x for file in files for key, x in load_file(folder / file).items()}
    raise ValueError(f"load_: {folder} holds no model.safetensors; wanted a folder that save_pretrained has written.")


def saved_names(model: nn.Module, state: dict[str, Any]) -> dict[str, str]:
    """{name in the file: name in the model} for weights that `save_pretrained` renames, as it does ViT's; {} for most models.

    Found by saving names: those of the factors that the model will have, through transformers' own conversion.
    """
    if set(model.state_dict()) <= set(state) or not hasattr(model, "config"):
        return {}
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:                                             # transformers 4 renames nothing
        return {}
    ends = {"weight": ("weight", "U", "V"), "U": ("weight", "U", "V"), "V": ("weight", "U", "V")}
    names = {f"{stem}.{end}" for stem, _, last in (key.rpartition(".") for key in model.state_dict())
             for end in ends.get(last, (last,))}
    marks = {name: torch.empty(1) for name in names}
    back = {id(x): name for name, x in marks.items()}
    try:
        found = revert_weight_conversion(model, marks)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError):     # weights that are joined or split, not renamed
        return {}
    return {key: back[id(x)] for key, x in found.items() if id(x) in back}
