"""Every setting of a training run, in one frozen value; the flags of `python -m alr.train` are made from it."""

from __future__ import annotations

import contextlib
import math
import numbers
import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Literal, get_args, get_origin, get_type_hints

from .optimizers import NAMES, read_by

# where files lie and how often they are written: no part of what a run is
PLACES = ("log_file", "seed_log", "out", "resume", "save_every", "keep", "data_dir")
PATHS = ("corpus", "data_file", "data_dir", "log_file", "seed_log", "out")
READ_BY_MODEL = {"gpt": ("n_layers", "n_heads", "d_ff", "dropout", "causal", "tied", "embed_std"),
                 "mlp": ("window", "d_embed")}          # what the other model does not read


class NamesSettings(Exception):
    """An error whose text names settings in braces: Python reads lr, a shell --lr (`on_command_line`)."""

    def __init__(self, text: str):
        super().__init__(re.sub(r"\{(\w+)\}", r"\1", text))
        self.on_command_line = with_flags(text)


class SettingError(NamesSettings, ValueError):
    """A setting that is refused."""


class MissingFile(SettingError, FileNotFoundError):
    """A setting that names a file which is not there."""


class Diverged(NamesSettings, FloatingPointError):
    """A loss or a gradient that is no finite number any more."""


@contextlib.contextmanager
def naming(setting: str, path: object) -> Iterator[None]:
    """A context in which what the system refuses about a path is a SettingError."""
    try:
        yield
    except OSError as error:
        kind = MissingFile if isinstance(error, FileNotFoundError) else SettingError
        raise kind(f"{{{setting}}} {path}: {str(error.strerror or error).rstrip('.')}.") from error


def flag(setting: str) -> str:
    """The flag of a setting: rest_lr -> --rest-lr."""
    return f"--{setting.replace('_', '-')}"


def with_flags(text: str) -> str:
    """A text that names settings in braces, as a shell knows them: "{lr} is -1" -> "--lr is -1"."""
    return re.sub(r"\{(\w+)\}", lambda found: flag(found[1]), text)


@dataclass(frozen=True)
class Config:
    """Train a language model with adaptive rank.  Defaults are script v10's unless said otherwise.

    The log (JSONL) opens with what was run; see --recipe list for what can be.
    """

    recipe: str | None = None           # what to do with ranks: a name, an expression, or "list"; v10 if not said
    corpus: str = "pydoc"               # pydoc, wikitext-2, tinyshakespeare, shakespeare, or the path of a text
    data_file: str | None = None        # a UTF-8 text file, instead of --corpus
    data_dir: str | None = None         # folder in which corpora are looked for first
    level: Literal["word", "char", "space"] | None = None       # token: word or mark, character, between white space
    vocab_size: int | None = None       # at most this many vocabulary entries, <unk> among them; all if not said
    log_file: str | None = None         # JSONL log; OUT/log.jsonl if only --out is given, none if neither
    seed_log: str | None = None         # a second log with the original scripts' nine keys alone, a line per epoch
    out: str | None = None              # folder for checkpoints, written after every epoch and when interrupted
    resume: bool = False                # go on from the checkpoint in --out
    save_every: int | str | None = None # a checkpoint within the epoch too: every so many steps, or minutes (10m)
    keep: int = 1                       # how many checkpoints stay in --out: the last ones

    epochs: int = 30                    # epochs, of --steps-per-epoch steps each
    steps_per_epoch: int = 200          # optimizer steps; validation and the recipe's clock follow it
    batch_size: int = 32                # sequences per optimizer step, over all processes
    block_size: int = 256               # tokens per sequence
    model: Literal["gpt", "mlp"] = "gpt"                # mlp: two hidden layers over a window (the early versions)
    d_model: int = 512                  # width of the GPT; width of both hidden layers of the MLP
    n_layers: int = 6                   # blocks of the GPT
    n_heads: int = 8                    # attention heads of each block
    d_ff: int = 2048                    # width of the GPT's feed-forward layer
    window: int = 8                     # tokens that the MLP sees (ours)
    d_embed: int = 64                   # width of the MLP's embeddings (ours)
    dropout: float = 0.0                # probability, GPT only
    causal: bool = True                 # --no-causal: attention sees the tokens to be predicted (scripts v7 to v10)
    tied: bool = False                  # head and token embedding share one matrix
    embed_std: float = 0.02             # of the GPT's embeddings at the start; GPT-2's (script v10: 1)

    init_rank: int | float | None = None        # rank of every layer at the start, or (0.5) a share of its dense parameters
    min_rank: int | None = None         # least rank a controller may choose; the recipe's if not said

    optimizer: Literal[NAMES] = "adamw"         # muon*: on block matrices; pairs, tangent, lora-*: on factors
    lr: float = 3e-4                    # learning rate (with muon and rules for pairs: of AdamW, on the rest)
    rest_lr: float | None = None        # of embeddings, head and norms, whatever the optimizer; --lr if not said
    muon_lr: float = 0.02               # learning rate of Muon
    pairs_lr: float = 0.03              # of the rules for pairs of factors: spectral norm of a step of W
    momentum: float = 0.9               # of SGD
    weight_decay: float = 0.01          # on every parameter; decoupled for adamw and muon, an L2 term for adam and sgd
    decay: Literal["factors", "product"] = "factors"        # of low-rank layers: decay U and V, or W = U V (Frobenius)
    schedule: Literal["constant", "cosine"] = "constant"    # cosine: from --lr at the end of the warm-up to 0
    warmup_steps: int = 0               # optimizer steps of linear warm-up
    grad_clip: float | None = None      # largest norm of the whole gradient; no limit if not said

    seed: int = 0                       # of initialisation, data order and dropout
    device: str = "auto"                # auto, cpu, cuda, cuda:1, mps
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto: bfloat16 on CUDA
    threads: int | None = None          # CPU threads; torch's choice if not said
    log_every: int = 50                 # optimizer steps between `step` lines of the log
    eval_tokens: int | None = None      # validation tokens per epoch; the whole split if not said, always at the end
    end_tokens: int | None = None       # of each split that the losses at the end are over; the whole split if not said
    test: bool = True                   # --no-test: leave the test split alone at the end, as the sweeps do

    def __post_init__(self):
        for name, wanted in _hints().items():
            value = getattr(self, name)
            if name in PATHS and isinstance(value, os.PathLike):
                object.__setattr__(self, name, os.fspath(value))
            elif not _fits(value, wanted):
                raise SettingError(f"{{{name}}} is {value!r}; wanted {_words(wanted)}.")
            if name in (*PATHS, "recipe", "device") and value is not None and (not str(value).strip() or "\0" in str(value)):
                raise SettingError(f"{{{name}}} is {value!r}, which names nothing; leave it out, or write what is meant.")
        if self.data_file is not None and self.corpus != "pydoc":
            raise SettingError(f"{{data_file}} {self.data_file} and {{corpus}} {self.corpus} are both given; leave one out.")
        for name in ("epochs", "steps_per_epoch", "batch_size", "block_size", "log_every", "min_rank", "threads",
                     "eval_tokens", "end_tokens", "keep", "n_layers", "n_heads", "d_model", "d_ff", "window", "d_embed"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{{{name}}} is {value}; wanted a whole number of at least 1.")
        if self.vocab_size is not None and self.vocab_size < 2:
            raise SettingError(f"{{vocab_size}} is {self.vocab_size}; it counts <unk> too and must be at least 2.")
        if not 0 <= self.seed < 2**63:
            raise SettingError(f"{{seed}} is {self.seed}; wanted a whole number from 0 to 2^63 - 1.")
        start = self.init_rank
        if start is not None and not (0 < start <= 1 if isinstance(start, float) else start >= 1):
            raise SettingError(f"{{init_rank}} is {start}; wanted a rank as a whole number of at least 1, or a share of the "
                               "dense layer's parameters between 0 and 1.")
        for name in ("lr", "rest_lr", "muon_lr", "pairs_lr", "embed_std", "grad_clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise SettingError(f"{{{name}}} is {value}; wanted a number above 0.")
        for name in ("weight_decay", "warmup_steps", "momentum"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SettingError(f"{{{name}}} is {getattr(self, name)}; wanted 0 or more.")
        if not 0 <= self.dropout < 1:
            raise SettingError(f"{{dropout}} is {self.dropout}; wanted a probability from 0 to below 1.")
        if self.model == "gpt" and self.d_model % self.n_heads:
            raise SettingError(f"{{d_model}} {self.d_model} is not divisible by {{n_heads}} {self.n_heads}.")
        _every(self.save_every)                         # raises for what is neither

    @property
    def save_steps(self) -> int | None:
        """Optimizer steps between two checkpoints, where `save_every` counts steps."""
        return _every(self.save_every)[0]

    @property
    def save_minutes(self) -> float | None:
        """Minutes between two checkpoints, where `save_every` counts minutes."""
        return _every(self.save_every)[1]

    def unread(self) -> list[str]:
        """What was set and will not be read, a sentence each: a rate of another optimizer, a size of the other model,
        what comes after a warm-up that is as long as the run."""
        changed = {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        found = [(name, f"{{optimizer}} {self.optimizer}") for name in changed
                 if read_by(name) and self.optimizer not in read_by(name)]
        found += [(name, f"{{model}} {self.model}") for model, names in READ_BY_MODEL.items() if model != self.model
                  for name in changed.intersection(names)]
        if self.out is None:
            found += [(name, "a run without {out}") for name in changed & {"save_every", "keep"}]
        short = self.warmup_steps > self.steps
        late = [f"{{warmup_steps}} {self.warmup_steps} in a run of {self.steps} steps: "
                + ("{lr} is never reached." if short else "the cosine never begins.")
                ] if short or self.schedule == "cosine" and self.warmup_steps == self.steps else []
        return [f"{{{name}}} is not read by {by}." for name, by in sorted(found)] + late

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.epochs * self.steps_per_epoch

    def rate(self, step: int) -> float:
        """What the learning rates are multiplied by in step 0, 1, ...: linear warm-up, then 1 or half a cosine."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * done))

    def describe(self) -> dict:
        """The settings as plain values, without the places where a run's files lie."""
        return {key: value for key, value in asdict(self).items() if key not in PLACES}

    def command(self, recipe: str | None = None) -> str:
        """The command line that repeats this run, whatever started it.  recipe: an expression instead of the name."""
        words = ["python", "-m", "alr.train"]
        for f in fields(self):
            value = recipe if f.name == "recipe" and recipe is not None else getattr(self, f.name)
            flag = f.name.replace("_", "-")
            if f.name in PLACES or value == f.default:
                continue
            words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
        return shlex.join(words)


@cache
def _hints() -> dict:
    return get_type_hints(Config)


def _fits(value, wanted) -> bool:
    """Is a value of this type?  Whole numbers are numbers too; True and False are neither."""
    if get_origin(wanted) is Literal:
        return value in get_args(wanted)
    if options := get_args(wanted):                     # int | None
        return any(_fits(value, option) for option in options)
    if wanted in (int, float):
        if wanted is float and isinstance(value, numbers.Integral) and abs(value) > sys.float_info.max:
            return False                                # a TOML file can say so, and no float can hold it
        return isinstance(value, numbers.Integral if wanted is int else numbers.Real) and not isinstance(value, bool)
    return isinstance(value, wanted)


def _words(wanted) -> str:
    if get_origin(wanted) is Literal:
        return f"one of {', '.join(get_args(wanted))}"
    if options := get_args(wanted):
        return " or ".join(_words(option) for option in options if option is not type(None))
    return {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}[wanted]


def _every(text: int | str | None) -> tuple[int | None, float | None]:
    """(steps, minutes) of a `save_every`, one of them None: 500 -> (500, None), "10m" -> (None, 10.0)."""
    if text is None:
        return None, None
    found = re.fullmatch(r"([0-9]+)|([0-9]+(?:\.[0-9]+)?)m", str(text))
    if found is None or not float(found[1] or found[2]):
        raise SettingError(f"{{save_every}} is {text!r}; wanted steps (500) or minutes (10m), more than 0.")
    return (int(found[1]), None) if found[1] else (None, float(found[2]))
