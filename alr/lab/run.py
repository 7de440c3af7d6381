"""A run: everything that training holds, made from a Config, saved to a checkpoint and had back from one."""

from __future__ import annotations

import datetime
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import recipes
from ..adapt import RankAdapter, Recipe
from ..axes import each
from ..factor import check_rank
from ..linear import picks
from ..observe import shared_out
from . import checkpoint
from .config import Config, MissingFile, SettingError, naming
from .data import Corpus, corpus
from .device import memory_limit, pick_device, pick_dtype, processor
from .log import Lines, Log, is_line, provenance, seed_line
from .model import GPT, MLPLM, GPTConfig, MLPConfig, block_linears, count_parameters
from .optimizers import OPTIMIZERS, make_optimizers
from .processes import Workers

MOVABLE = {"device", "threads"}                         # settings that a resumed run may change
COMPARED_ELSEWHERE = {"recipe", "corpus", "data_file"}  # on resume: by value and by fingerprint, however they were named
STATE = {"config": dict, "recipe": str, "fingerprint": str, "step": int, "epoch": int, "running": Tensor,
         "val_loss": float | None, "spent": float, "seconds": dict, "resumed": list, "rng": dict, "each": list, "lines": list,
         "adapter": dict, "optimizers": list, "weights": str, "weights_digest": str}      # what a checkpoint holds


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
    seed_log: Lines = field(default_factory=Lines)      # the epochs with the original scripts' keys alone
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

    def own(self) -> dict:
        """What this process alone knows: its random numbers, its share of this epoch's loss, what it saw in an open window."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type != "cpu":
            rng[self.device.type] = torch.get_device_module(self.device).get_rng_state()
        observer = self.adapter.observer
        return {"rng": rng, "running": self.running.cpu(), "seen": None if observer is None else on_cpu(observer.state_dict())}

    def save(self, each: list[dict] | None = None) -> None:
        """Write a checkpoint to config.out, if there is one.  each: `own` of every process, where there are several."""
        if self.config.out is None:
            return
        each = each or [self.own()]
        checkpoint.save(self.config.out, self.model, {
            "config": self.config.describe(), "recipe": self.given, "fingerprint": self.corpus.fingerprint,
            "step": self.step, "epoch": self.epoch, "running": torch.stack([x["running"] for x in each]).mean(0),
            "val_loss": self.val_loss, "spent": self.spent, "seconds": dict(self.seconds), "resumed": list(self.resumed),
            "rng": each[0]["rng"], "each": each[1:] and each, "lines": list(self.writer.lines),
            "adapter": self.adapter.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}, self.step, self.config.keep)

    def restore(self, state: dict, workers: Workers) -> None:
        """Go back to a checkpoint's state; the weights are in the model already, and the optimizers are new.

        As many processes as before go on exactly; with another number, sums are taken in another order, and all processes but
        the first draw new random numbers.
        """
        same = processes(state) == workers.size
        seen = [x.get("seen", state["adapter"]["seen"]) for x in state["each"] or [state["adapter"]]]
        if not same and seen[0] is not None:
            seen = shared_out(seen, workers.size)
        self.adapter.load_state_dict(state["adapter"] | {"seen": seen[0] and seen[workers.rank]})
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name in ("step", "epoch", "val_loss", "spent", "seconds", "resumed"):
            setattr(self, name, state[name])
        if not 0 <= self.step <= self.config.steps or self.epoch != self.step // self.config.steps_per_epoch and (
                self.step != (self.epoch + 1) * self.config.steps_per_epoch):
            raise ValueError(f"step {self.step} of epoch {self.epoch} is no moment of this run")
        mine = state["each"][workers.rank] if state["each"] and same else state
        self.running = mine["running"].to(self.device)
        if same or workers.rank == 0:
            torch.set_rng_state(mine["rng"]["cpu"])
            if self.device.type != "cpu" and self.device.type in mine["rng"]:
                torch.get_device_module(self.device).set_rng_state(mine["rng"][self.device.type])
        else:
            draw_apart(self, workers)


def on_cpu(x):
    """A nest of dicts, lists and tensors with its tensors on the CPU."""
    if isinstance(x, dict):
        return {key: on_cpu(value) for key, value in x.items()}
    if isinstance(x, list):
        return [on_cpu(value) for value in x]
    return x.cpu() if isinstance(x, Tensor) else x


def processes(state: dict) -> int:
    """How many processes a checkpoint is of."""
    return len(state["each"] or [None])


def draw_apart(run: Run, workers: Workers) -> None:
    """Random numbers of its own for every process but the first, which draws those of a run in one process."""
    if workers.rank:
        torch.manual_seed((run.config.seed + workers.rank + (run.step << 20)) % 2**63)


def prepare(config: Config, recipe: Recipe | None = None, workers: Workers | None = None) -> Run:
    """All that can be refused is refused here, before a file is written.  config.resume: as the checkpoint left it."""
    workers = workers or Workers()
    given = recipe if recipe is not None else recipes.parse(config.recipe or "v10")
    adjusted = adjust(given, config).paced(config.steps_per_epoch)
    if adjusted.rank is None and "pairs_lr" in OPTIMIZERS[config.optimizer].reads:
        raise SettingError(f"{{optimizer}} {config.optimizer} steps pairs of factors, and {{recipe}} {adjusted.name} has "
                           "none: its layers stay dense. Write {optimizer} adamw or muon, or {recipe} alr or uniform.")
    device = pick_device(config.device, workers.local_rank)
    with naming("out", config.out):
        saved = _saved(config, repr(given))
    if config.batch_size % workers.size:
        raise SettingError(f"{{batch_size}} {config.batch_size} cannot be shared by {workers.size} processes.")
    if config.threads is not None:
        if config.threads > (most := max(64, 4 * (os.cpu_count() or 1))):
            raise SettingError(f"{{threads}} is {config.threads}; on this machine write at most {most}.")
        torch.set_num_threads(config.threads)
    text = find_corpus(config)
    if len(text.train) <= config.block_size:
        raise SettingError(f"{{block_size}} {config.block_size} is longer than the text: {text.name}'s training split has "
                           f"{len(text.train)} tokens; write at most {max(1, len(text.train) - 1)}.")
    if saved is not None and saved["fingerprint"] != text.fingerprint:
        raise SettingError(f"resume: the corpus is not the one of the checkpoint (fingerprint {text.fingerprint}, then "
                           f"{saved['fingerprint']}).")
    fits_memory(config, len(text.vocab), device, workers.size)
    check_ranks(config, adjusted, len(text.vocab))
    writer = Log(log_path(config) if workers.rank == 0 else None, saved["lines"] if saved else ())
    seed_log = Lines(config.seed_log if workers.rank == 0 else None,
                     [seed_line(x) for x in writer.records if x["kind"] == "epoch"], "seed_log")
    check_places(config, writer, seed_log)
    workers.start(device)
    torch.manual_seed(config.seed)
    model = adjusted.prepare(make_model(config, len(text.vocab)), block_linears)    # on the CPU: the same everywhere
    if saved is not None:
        checkpoint.load_weights(config.out, saved, model)
    model.to(device)
    optimizers = make_optimizers(config, model, device)
    adapter = RankAdapter(model, optimizers, adjusted, total_steps=config.steps)
    dtype = pick_dtype(config.precision, device)
    run = Run(config, adjusted, text, device, dtype, model, optimizers, adapter, repr(given), leads=workers.rank == 0,
              writer=writer, seed_log=seed_log, running=torch.zeros((), device=device, dtype=torch.float32))
    if saved is None:
        draw_apart(run, workers)
        return run
    try:
        run.restore(saved, workers)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{Path(config.out) / checkpoint.STATE} does not fit this run ({type(error).__name__}: {error}); "
                         "start anew in another folder.") from error
    if not ended(run):
        here = {"device": device.type, "processor": processor(device), "threads": torch.get_num_threads(),
                "processes": workers.size, **provenance()}
        run.resumed.append({"step": run.step, "started": now(), **here, "exact": exact(run, saved, here)})
    return run


def exact(run: Run, saved: dict, here: dict) -> bool:
    """Does a resumed run go on bit for bit, by all that is known: as many processes, and the same machine and torch?"""
    before = (run.resumed or run.log or [{}])[-1 if run.resumed else 0] | {"processes": processes(saved)}
    return all(before.get(key) == here[key] for key in ("device", "processor", "threads", "processes", "torch"))


def find_corpus(config: Config) -> Corpus:
    """The corpus of a configuration; what is wrong with it names the setting."""
    which = "corpus" if config.data_file is None else "data_file"
    try:
        return corpus(config.data_file or config.corpus, data_dir=config.data_dir, level=config.level,
                      vocab_size=config.vocab_size)
    except FileNotFoundError as error:
        raise MissingFile(f"{{{which}}}: {error}") from None
    except ValueError as error:
        raise SettingError(f"{{{which}}}: {error}") from None


def log_path(config: Config) -> Path | None:
    """Where the log goes: OUT/log.jsonl where only a folder for checkpoints is given."""
    return Path(config.log_file) if config.log_file else Path(config.out) / "log.jsonl" if config.out else None


def check_places(config: Config, *logs: Lines) -> None:
    """SettingError where a log would be written over something else, or the folder for checkpoints is a file."""
    with naming("out", config.out):
        if config.out is not None and Path(config.out).exists() and not Path(config.out).is_dir():
            raise SettingError(f"{{out}} {config.out} is a file; wanted a folder for checkpoints.")
    taken: dict[str, str] = {}
    if config.data_file is not None:
        taken[os.path.realpath(config.data_file)] = "data_file"
    for log in logs:
        if log.path is None:
            continue
        log.check()
        place = os.path.realpath(log.path)
        if place in taken:
            raise SettingError(f"{{{log.setting}}} {log.path} is also {{{taken[place]}}}; write another name.")
        folder, name = os.path.split(place)
        if config.out is not None and folder == os.path.realpath(config.out) and checkpoint.is_ours(name):
            raise SettingError(f"{{{log.setting}}} {log.path} is the name of a checkpoint's file; write another name.")
        taken[place] = log.setting


def fits_memory(config: Config, vocab: int, device: torch.device, processes: int = 1) -> None:
    """SettingError for sizes that need more memory than there is, by a lower bound in bytes: float32 weights of the dense
    model, which is made on the CPU, and one process's tokens and logits of one step."""
    c, most = config, memory_limit(torch.device("cpu"))
    head = (1 if c.tied else 2) * vocab * c.d_model
    if c.model == "gpt":
        numbers = c.n_layers * (4 * c.d_model ** 2 + 2 * c.d_model * c.d_ff) + head + c.block_size * c.d_model
        sizes = "{n_layers}, {d_model}, {d_ff}"
    else:
        numbers = vocab * (c.d_embed + c.d_model) + c.window * c.d_embed * c.d_model + c.d_model ** 2
        sizes = "{d_model}, {d_embed}, {window}"
    if most is not None and 4 * numbers > most:
        raise SettingError(f"{sizes}: the dense model has {numbers:.3g} parameters, {4 * numbers / 2**30:,.0f} GiB, and this "
                           f"machine has {most / 2**30:,.1f} GiB of memory. Write smaller sizes.")
    most, tokens = memory_limit(device), c.batch_size // processes * c.block_size
    if most is not None and tokens * (16 + 4 * vocab) > most:
        raise SettingError(f"{{batch_size}} {c.batch_size}, {{block_size}} {c.block_size}: the logits of one step need "
                           f"{4 * tokens * vocab / 2**30:,.0f} GiB, and {device} has {most / 2**30:,.1f} GiB of memory. "
                           "Write smaller sizes.")


def check_ranks(config: Config, recipe: Recipe, vocab: int) -> None:
    """SettingError for --init-rank or --min-rank that the layers cannot have, told from their shapes alone."""
    with torch.device("meta"):
        model = make_model(config, vocab)
    limits = {}
    for name, x in model.named_modules():
        if isinstance(x, nn.Linear) and block_linears(name) and picks(recipe.where, name):
            limits[name] = min(x.out_features, x.in_features)
            try:
                check_rank(config.init_rank or 1, x.out_features, x.in_features, "{init_rank}", name)
            except ValueError as error:
                raise SettingError(str(error)) from None
    if config.min_rank is not None and config.min_rank > max(limits.values(), default=math.inf):
        raise SettingError(f"{{min_rank}} is {config.min_rank}, and no layer has a rank above {max(limits.values())}.")


def _saved(config: Config, given: str) -> dict | None:
    """The checkpoint to go on from, or None.  ValueError when it is another run's, or would be overwritten."""
    if config.resume and config.out is None:
        raise SettingError("{resume} needs {out}, the folder that holds the checkpoint.")
    if not config.resume:
        if config.out is not None and checkpoint.exists(config.out):
            raise SettingError(f"{{out}}: {config.out} holds a checkpoint already; add {{resume}} to go on from it, or "
                               "choose another folder.")
        return None
    saved, mine = saved_in(config.out), config.describe()
    was = Config().describe() | saved["config"]         # a setting younger than the checkpoint stood at its default
    differ = [key for key in mine if key not in MOVABLE | COMPARED_ELSEWHERE and was[key] != mine[key]]
    if differ:
        raise SettingError("resume: " + "; ".join(f"{{{key}}} is {mine[key]!r}, but {was[key]!r} in the checkpoint"
                                                  for key in differ) + ".")
    if saved["recipe"] != given:
        raise SettingError(f"resume: the {{recipe}} is {given}, but {saved['recipe']} in the checkpoint.")
    return saved


def saved_in(out: str | Path) -> dict:
    """The state in a folder, whose parts are of the kinds that `Run.save` writes.  FileNotFoundError and ValueError as
    `checkpoint.load`."""
    saved, why = checkpoint.load(out), None
    if not isinstance(saved, dict) or (lacks := sorted(STATE.keys() - saved.keys())):
        why = f"it lacks {lacks[0] if isinstance(saved, dict) else 'everything'}"
    elif wrong := [key for key, kind in STATE.items() if not isinstance(saved[key], kind)]:
        why = f"{wrong[0]} is of type {type(saved[wrong[0]]).__name__}"
    elif unknown := saved["config"].keys() - Config().describe().keys():
        why = f"there is no setting {min(unknown, key=str)!r}"
    elif not all(isinstance(line, str) and is_line(line) for line in saved["lines"]):
        why = "its log is none"
    if why is not None:
        raise ValueError(f"{Path(out) / checkpoint.STATE} is of another version of this program ({why}); start anew in another "
                         "folder.")
    return saved


def load(out: str | Path, data_dir: str | None = None, device: str = "auto") -> Run:
    """The run whose checkpoint lies in `out`, as it was left: load("out").model.generate(...)."""
    state = saved_in(out)
    config = Config(**state["config"] | {"out": str(out), "resume": True, "data_dir": data_dir, "device": device})
    return prepare(config, recipes.parse(state["recipe"]))


def adjust(recipe: Recipe, config: Config) -> Recipe:
    """The recipe with --init-rank and --min-rank.  ValueError where it has no such thing."""
    if config.init_rank is not None:
        if recipe.rank is None:
            raise SettingError(f"{{recipe}} {recipe.name!r} is dense and has no ranks; leave out {{init_rank}}.")
        recipe = replace(recipe, rank=config.init_rank)
    if config.min_rank is not None:
        try:
            recipe = replace(recipe, control=each(recipe.control, min_rank=config.min_rank))
        except TypeError:                               # no such field
            raise SettingError(f"{{recipe}} {recipe.name!r} chooses ranks by {recipe.control}, which knows no least rank; "
                             "leave out {min_rank}.") from None
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
