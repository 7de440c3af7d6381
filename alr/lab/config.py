"""Every setting of a training run, in one frozen value; the flags of `python -m alr.train` are made from it."""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict, dataclass, fields
from typing import Literal, get_args, get_type_hints

from .optimizers import NAMES

PLACES = ("log_file", "out", "resume", "data_dir")      # where files lie: no part of what a run is


@dataclass(frozen=True)
class Config:
    """Train a language model with adaptive rank.  Defaults are script v10's unless said otherwise.

    The log (JSONL) opens with what was run; see --recipe list for what can be.
    """

    recipe: str | None = None           # what to do with ranks: a name, an expression, or "list"; v10 if not said
    corpus: str = "pydoc"               # pydoc, wikitext-2, tinyshakespeare, shakespeare, or the path of a text
    data_file: str | None = None        # a UTF-8 text file, instead of --corpus
    data_dir: str | None = None         # folder in which corpora are looked for first
    level: Literal["word", "char"] | None = None        # token = word or character; the corpus's own if not said
    vocab_size: int | None = None       # at most this many vocabulary entries, <unk> among them; all if not said
    log_file: str | None = None         # JSONL log; OUT/log.jsonl if only --out is given, none if neither
    out: str | None = None              # folder for checkpoints, written after every epoch and when interrupted
    resume: bool = False                # go on from the checkpoint in --out

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
        if self.data_file is not None and self.corpus != "pydoc":
            raise ValueError(f"data_file {self.data_file} and corpus {self.corpus} are both given; leave one out.")
        for name in ("epochs", "steps_per_epoch", "batch_size", "block_size", "log_every", "min_rank", "threads",
                     "eval_tokens", "end_tokens"):
            value = getattr(self, name)
            if value is not None and (value != int(value) or value < 1):
                raise ValueError(f"{name} is {value}; wanted a whole number of at least 1.")
        start = self.init_rank
        if start is not None and not (0 < start <= 1 if isinstance(start, float) else start >= 1):
            raise ValueError(f"init_rank is {start}; wanted a rank as a whole number of at least 1, or a share of the "
                             "dense layer's parameters between 0 and 1.")
        for name in ("lr", "rest_lr", "muon_lr", "pairs_lr", "embed_std", "grad_clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; wanted a number above 0.")
        for name in ("weight_decay", "warmup_steps", "momentum"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted 0 or more.")
        for name in ("model", "schedule", "decay", "precision", "optimizer"):
            known = get_args(get_type_hints(Config)[name])
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it is one of {', '.join(known)}.")

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
