"""Optimizers by name, for `--optimizer`.  A new one is an entry of `OPTIMIZERS`.

    make_optimizers(config, model, device)              # a list: all parameters of the model, each in one of them
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from ..linear import low_rank_layers
from ..optim import PairOptimizer
from ..rules import LoRAMuon, Rule, Spectron
from ..tangent import LoRATSD, Tangent
from .muon import Muon

if TYPE_CHECKING:
    from .config import Config


class Parts(NamedTuple):
    """A model's parameters as the entries need them."""

    pairs: list[tuple[nn.Parameter, nn.Parameter]]      # factors of the low-rank layers
    matrices: list[nn.Parameter]                        # 2-D parameters of the blocks, factors among them
    rest: list[nn.Parameter]                            # embeddings, head, norms, biases
    fused: dict                                         # keyword arguments of torch's optimizers on this device
    all: list[nn.Parameter]                             # in the model's order


def groups(config: Config, parts: Parts, which: Iterable[nn.Parameter], lr: float | None = None) -> list[dict]:
    """Param groups of these parameters: matrices of the blocks learn at `lr`, the rest at its own rate, if it has one.

    Factors whose product decays (config.decay) have no decay of their own.
    """
    lr = config.lr if lr is None else lr
    matrices = {id(p) for p in parts.matrices}
    bare = {id(p) for pair in parts.pairs for p in pair} if config.decay == "product" else set()
    found: dict[tuple, list] = {}
    for p in which:
        found.setdefault((id(p) in matrices, id(p) in bare), []).append(p)
    rest_lr = config.lr if config.rest_lr is None else config.rest_lr
    return [{"params": part, "lr": lr if block else rest_lr, "weight_decay": 0.0 if no_decay else config.weight_decay}
            for (block, no_decay), part in found.items()]


def _adam(kind):
    return lambda c, p: [kind(groups(c, p, p.all), **p.fused)]


def _sgd(c: Config, p: Parts) -> list[Optimizer]:
    return [torch.optim.SGD(groups(c, p, p.all), momentum=c.momentum, **p.fused)]


def _muon(c: Config, p: Parts) -> list[Optimizer]:
    return [torch.optim.Muon(groups(c, p, p.matrices, c.muon_lr)), torch.optim.AdamW(groups(c, p, p.rest), **p.fused)]


def _muon_float32(c: Config, p: Parts) -> list[Optimizer]:
    return [Muon(groups(c, p, p.matrices, c.muon_lr)), torch.optim.AdamW(groups(c, p, p.rest), **p.fused)]


def _by_pairs(rule: Rule, scale: str) -> Callable[[Config, Parts], list[Optimizer]]:
    """PairOptimizer with this rule.  scale: adjust_lr_fn; Spectron's radius goes without, as its recorded runs did."""
    def make(c, p):
        mine = {id(x) for pair in p.pairs for x in pair}
        rest = groups(c, p, [x for x in p.all if id(x) not in mine])
        pairs = [{"pairs": p.pairs, "lr": c.pairs_lr, "weight_decay": c.weight_decay, "decay": c.decay, "adjust_lr_fn": scale}]
        return [PairOptimizer(pairs + rest, rule=rule)]
    return make


class Entry(NamedTuple):
    """make: (config, parts) -> optimizers.  reads: the settings that it alone reads."""

    make: Callable[[Config, Parts], list[Optimizer]]
    about: str
    reads: tuple[str, ...] = ()


OPTIMIZERS = {
    "adamw": Entry(_adam(torch.optim.AdamW), "AdamW on all"),
    "adam": Entry(_adam(torch.optim.Adam), "Adam on all"),
    "sgd": Entry(_sgd, "SGD with momentum on all", ("momentum",)),
    "muon": Entry(_muon, "Muon on the matrices of the blocks, AdamW on the rest", ("muon_lr",)),
    "muon-float32": Entry(_muon_float32, "the same in float32, fast on a CPU, AdamW on the rest", ("muon_lr",)),
    "pairs": Entry(_by_pairs(Spectron(), "none"), "Spectron's rule on pairs of factors, AdamW on the rest", ("pairs_lr",)),
    "tangent": Entry(_by_pairs(Tangent(), "original"), "Muon on rank-r matrices, AdamW on the rest", ("pairs_lr",)),
    "lora-muon": Entry(_by_pairs(LoRAMuon(), "original"), "LoRA-Muon's rule on pairs, AdamW on the rest", ("pairs_lr",)),
    "lora-tsd": Entry(_by_pairs(LoRATSD(), "original"), "LoRA-TSD's rule on pairs, AdamW on the rest", ("pairs_lr",)),
}
NAMES = tuple(OPTIMIZERS)


def read_by(setting: str) -> tuple[str, ...]:
    """The optimizers that read a setting; () where all do."""
    return tuple(name for name, entry in OPTIMIZERS.items() if setting in entry.reads)


def make_optimizers(config: Config, model: nn.Module, device: torch.device) -> list[Optimizer]:
    """The optimizers of a run; each group remembers the rate that the schedule multiplies as `initial_lr`."""
    named = dict(model.named_parameters())
    tables = {id(p) for mod in model.modules() if isinstance(mod, nn.Embedding) for p in mod.parameters()}
    def block(name, p):
        return p.dim() == 2 and id(p) not in tables and "head" not in name.split(".")
    parts = Parts([(layer.U, layer.V) for layer in low_rank_layers(model).values()],
                  [p for name, p in named.items() if block(name, p)], [p for name, p in named.items() if not block(name, p)],
                  {"fused": True} if device.type in ("cuda", "cpu") else {}, list(named.values()))
    made = OPTIMIZERS[config.optimizer].make(config, parts)
    for optimizer in made:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return made
