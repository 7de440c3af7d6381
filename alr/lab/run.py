"""A run: everything that training holds, made from a Config, saved to a checkpoint and had back from one."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import recipes
from ..adapt import RankAdapter, Recipe
from ..axes import each
from ..factor import check_rank
from ..linear import low_rank_layers
from . import checkpoint
from .config import Config
from .data import Corpus, corpus
from .device import pick_device, pick_dtype, processor
from .log import Log, provenance
from .model import GPT, MLPLM, GPTConfig, MLPConfig, block_linears, count_parameters
from .optimizers import make_optimizers
from .processes import Workers

MOVABLE = {"device", "threads"}                         # settings that a resumed run may change


@dataclass(eq=False)
class Run:
    """What `train` returns, and what it hands to a callback while it goes."""

    config: Config
    recipe: Recipe                      # as it runs: ranks as configured, clock in steps of this run
    corpus: Corpus
    device: torch.device
    dtype: torch.dtype | None           # of autocast; None: float32
    model: nn.Module
    optimizers: list[Optimizer]
    adapter: RankAdapter
    given: str                          # repr of the recipe before configuration and clock touched it
    leads: bool = True                  # is this the process that writes files and speaks?
    writer: Log = field(default_factory=Log)
    step: int = 0                       # optimizer steps done
    epoch: int = 0                      # epochs done
    running: Tensor | None = None       # sum of this epoch's training losses, on the device
    val_loss: float | None = None       # the latest; the adapter hears of it with the next step
    spent: float = 0.0                  # seconds of training and adaptation when this epoch began
    seconds: dict[str, float] = field(default_factory=lambda: {"work": 0.0, "evaluation": 0.0, "other": 0.0})
    resumed: list[dict] = field(default_factory=list)

    @property
    def log(self) -> list[dict]:
        """The lines of the log so far, as dicts."""
        return self.writer.records

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer; with --optimizer muon, the one of the block matrices."""
        return self.optimizers[0]

    def save(self) -> None:
        """Write a checkpoint to config.out, if there is one."""
        if self.config.out is None:
            return
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type != "cpu":
            rng[self.device.type] = torch.get_device_module(self.device).get_rng_state()
        checkpoint.save(self.config.out, self.model, {
            "config": self.config.describe(), "recipe": self.given, "fingerprint": self.corpus.fingerprint,
            "step": self.step, "epoch": self.epoch, "running": self.running.cpu(), "val_loss": self.val_loss,
            "spent": self.spent, "seconds": dict(self.seconds), "resumed": list(self.resumed), "rng": rng,
            "lines": list(self.writer.lines), "adapter": self.adapter.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}, self.step)

    def restore(self, state: dict) -> None:
        """Go back to a checkpoint's state; the weights are in the model already, and the optimizers are new."""
        self.adapter.load_state_dict(state["adapter"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name in ("step", "epoch", "val_loss", "spent", "seconds", "resumed"):
            setattr(self, name, state[name])
        self.running = state["running"].to(self.device)
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type != "cpu" and self.device.type in state["rng"]:
            torch.get_device_module(self.device).set_rng_state(state["rng"][self.device.type])


def prepare(config: Config, recipe: Recipe | None = None, workers: Workers | None = None) -> Run:
    """All that can be refused is refused here, before a file is written.  config.resume: as the checkpoint left it."""
    workers = workers or Workers()
    given = recipe if recipe is not None else recipes.parse(config.recipe or "v10")
    adjusted = adjust(given, config).paced(config.steps_per_epoch)
    device = pick_device(config.device, workers.local_rank)
    saved = _saved(config, repr(given))
    if config.batch_size % workers.size:
        raise ValueError(f"batch_size {config.batch_size} cannot be shared by {workers.size} processes.")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    text = corpus(config.data_file or config.corpus, data_dir=config.data_dir, level=config.level,
                  vocab_size=config.vocab_size)
    if len(text.train) <= config.block_size:
        raise ValueError(f"block_size {config.block_size} is longer than the text: {text.name}'s training split has "
                         f"{len(text.train)} tokens; write at most {max(1, len(text.train) - 1)}.")
    if saved is not None and saved["fingerprint"] != text.fingerprint:
        raise ValueError(f"resume: the corpus is not the one of the checkpoint (fingerprint {text.fingerprint}, then "
                         f"{saved['fingerprint']}).")
    workers.start(device)
    torch.manual_seed(config.seed)
    model = adjusted.prepare(make_model(config, len(text.vocab)), block_linears)    # on the CPU: the same everywhere
    for name, layer in low_rank_layers(model).items():
        check_rank(config.init_rank or 1, layer.out_features, layer.in_features, "init_rank", name)
    if saved is not None:
        checkpoint.load_weights(config.out, saved, model)
    model.to(device)
    optimizers = make_optimizers(config, model, device)
    adapter = RankAdapter(model, optimizers, adjusted, total_steps=config.steps)
    dtype = pick_dtype(config.precision, device)
    run = Run(config, adjusted, text, device, dtype, model, optimizers, adapter, repr(given),
              leads=workers.rank == 0, running=torch.zeros((), device=device))
    if saved is not None:
        run.restore(saved)
    if workers.size > 1:
        torch.manual_seed(config.seed + workers.rank + (run.step << 20))            # dropout of its own
    path = config.log_file or (Path(config.out) / "log.jsonl" if config.out else None)
    run.writer = Log(path if run.leads else None, saved["lines"] if saved else ())
    if saved is not None and not ended(run):
        run.resumed.append({"step": run.step, "started": now(), **provenance()})
    return run


def _saved(config: Config, given: str) -> dict | None:
    """The checkpoint to go on from, or None.  ValueError when it is another run's, or would be overwritten."""
    if config.resume and config.out is None:
        raise ValueError("--resume needs --out, the folder that holds the checkpoint.")
    if not config.resume:
        if config.out is not None and checkpoint.exists(config.out):
            raise ValueError(f"{config.out} holds a checkpoint already; add --resume to go on from it, or choose "
                             "another folder.")
        return None
    saved, mine = checkpoint.load(config.out), config.describe()
    for key in mine.keys() - MOVABLE:
        if saved["config"].get(key) != mine[key]:
            raise ValueError(f"resume: {key} is {mine[key]!r}, but {saved['config'].get(key)!r} in the checkpoint.")
    if saved["recipe"] != given:
        raise ValueError(f"resume: the recipe is {given}, but {saved['recipe']} in the checkpoint.")
    return saved


def load(out: str | Path, data_dir: str | None = None, device: str = "auto") -> Run:
    """The run whose checkpoint lies in `out`, as it was left: load("out").model.generate(...)."""
    state = checkpoint.load(out)
    config = Config(**state["config"] | {"out": str(out), "resume": True, "data_dir": data_dir, "device": device})
    return prepare(config, recipes.parse(state["recipe"]))


def adjust(recipe: Recipe, config: Config) -> Recipe:
    """The recipe with --init-rank and --min-rank.  ValueError where it has no such thing."""
    if config.init_rank is not None:
        if recipe.rank is None:
            raise ValueError(f"recipe {recipe.name!r} is dense and has no ranks; leave out --init-rank.")
        recipe = replace(recipe, rank=config.init_rank)
    if config.min_rank is not None:
        try:
            recipe = replace(recipe, control=each(recipe.control, min_rank=config.min_rank))
        except TypeError:                               # no such field
            raise ValueError(f"recipe {recipe.name!r} chooses ranks by {recipe.control}, which knows no least rank; "
                             "leave out --min-rank.") from None
    return recipe


def make_model(config: Config, vocab_size: int) -> nn.Module:
    """The dense model of a configuration."""
    if config.model == "mlp":
        return MLPLM(MLPConfig(vocab_size, config.window, config.d_embed, config.d_model))
    return GPT(GPTConfig(vocab_size, config.block_size, config.n_layers, config.n_heads, config.d_model, config.d_ff,
                         config.dropout, config.causal, config.tied, config.embed_std))


def ended(run: Run) -> bool:
    """Has this run written its `end` line?"""
    return bool(run.log) and run.log[-1]["kind"] == "end"


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def opening(run: Run, label: str | None = None) -> dict:
    """The values of the `run` line."""
    c = run.config
    short = next((name for name, recipe in recipes.ALL.items() if repr(recipe) == run.given), run.given)
    return {"name": label or run.recipe.name, "recipe": run.given, "paced": repr(run.recipe), "config": c.describe(),
            "seed": c.seed, **provenance(), "device": run.device.type, "processor": processor(run.device),
            "threads": torch.get_num_threads(), "precision": str(run.dtype or torch.float32).removeprefix("torch."),
            "corpus": run.corpus.describe(), "params": count_parameters(run.model), "command": c.command(short),
            "started": now()}
