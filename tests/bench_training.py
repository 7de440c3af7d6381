"""What adaptive ranks add to a training, as ratios in one run: `make bench`.

The seed's model: 6 blocks, d 512, FFN 2048, every one of the 36 layers in them at rank 64.
"""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import alr
from alr.budget import Budget
from alr.control import Bidirectional
from alr.init import Fresh, Spectral, leading
from alr.lab.model import GPT, GPTConfig
from alr.linear import factorize_, low_rank_layers
from alr.observe import Observer
from alr.optim import pairs

WORDS = 512                             # a small vocabulary: embeddings and head are nobody's business here


def gpt(rank=64):
    torch.manual_seed(0)
    return factorize_(GPT(GPTConfig(vocab_size=WORDS)), rank=rank, where=lambda name: name != "head", init=Fresh())


def backward(model, seed=0, rows=2):
    x = torch.randint(WORDS, (rows, 256), generator=torch.Generator().manual_seed(seed))
    F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()


@pytest.mark.parametrize("what", ["AdamW, fused", "pair optimizer"])
def bench_optimizer_step(benchmark, what):
    benchmark.group = "one optimizer step on the factors of 36 layers"
    model = gpt()
    backward(model)
    factors = [p for pair in pairs(model) for p in pair]
    optimizer = torch.optim.AdamW(factors, fused=True) if what.startswith("AdamW") else alr.PairOptimizer(pairs(model))
    benchmark.pedantic(optimizer.step, rounds=15, warmup_rounds=3)


@pytest.mark.parametrize("what", ["at rest", "moments", "importances"])
def bench_observing(benchmark, what):
    benchmark.group = "forward + backward, 512 tokens, while a window is open"
    model = gpt()
    if what != "at rest":
        observer = Observer(low_rank_layers(model), ("importance",), 4)
        if what == "importances":
            for _ in range(2):
                backward(model)
                observer.commit()
    benchmark.pedantic(backward, (model,), rounds=5, warmup_rounds=1)


SHRINKING = Bidirectional(safety=0.5, ema=0.0)
RECIPES = {
    "alr: importances, cuts, moments carried": replace(alr.recipes.alr, control=Budget(share=0.06, end=0.5)),
    "repaired: stable ranks, cuts, moments carried": replace(alr.recipes.repaired, control=SHRINKING),
    "v10: W formed, its whole SVD, all forgotten": replace(alr.recipes.v10, control=SHRINKING),
}


@pytest.mark.parametrize("what", [*RECIPES, "a forward and backward of 512 tokens"])
def bench_decision(benchmark, what):
    benchmark.group = "a decision over 36 layers"
    model = gpt()
    if what not in RECIPES:
        benchmark.pedantic(backward, (model,), rounds=3, warmup_rounds=1)
        return
    optimizer = alr.PairOptimizer(model)
    adapter = alr.RankAdapter(model, optimizer, replace(RECIPES[what], every=10_000), total_steps=40_000)
    backward(model)
    optimizer.step()
    adapter.step()
    adapter.observe(4)
    for i in range(4):
        backward(model, i)
        optimizer.step()
        adapter.step()
    events = []

    def anew():                         # every round decides from the same state
        one = copy.deepcopy((model, optimizer, adapter))[2]
        one.steps = 20_000
        return (one,), {}

    def decide(one):
        events.append(one.adapt())
    benchmark.pedantic(decide, setup=anew, rounds=1 if what.startswith("v10") else 3)
    assert len(events[0]) > 25


class Blocks(nn.Sequential):
    """The matrices of four blocks of width 2048: q, k, v, o, up, down."""

    def __init__(self, d=2048, blocks=4):
        super().__init__(*(layer for _ in range(blocks) for layer in (*(nn.Linear(d, d) for _ in range(4)), nn.Linear(d, 4 * d),
                                                                      nn.Linear(4 * d, d))))


@pytest.mark.parametrize("init", [Fresh(), Spectral()], ids=["drawn (Fresh)", "decomposed (Spectral)"])
def bench_factorize(benchmark, init):
    benchmark.group = "factorize_ of a new model: 4 blocks of width 2048, rank 256"
    benchmark.pedantic(lambda model: factorize_(model, rank=256, init=init), setup=lambda: ((Blocks(),), {}), rounds=1)


@pytest.mark.parametrize("way", ["whole SVD (before)", "randomised SVD", "drawn"])
def bench_start(benchmark, way):
    benchmark.group = "the start of one new layer, 2048x2048, rank 256"
    W = nn.Linear(2048, 2048).weight.detach()
    start = {"whole SVD (before)": lambda: leading(W, 256, exact=2048), "randomised SVD": lambda: leading(W, 256),
             "drawn": lambda: Fresh()(W, 256)}[way]
    benchmark.pedantic(start, rounds=1 if "whole" in way else 3)


@pytest.mark.parametrize("what", ["suggest_ranks, 4 batches", "a forward and backward of 4 batches"])
def bench_suggest(benchmark, what):
    benchmark.group = "ranks for a trained model: 2 blocks, d 256"
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=WORDS, n_layers=2, d_model=256, n_heads=4, d_ff=1024))
    batches = [(x := torch.randint(WORDS, (2, 256)), x) for _ in range(4)]

    def work():
        if what.startswith("suggest"):
            alr.suggest_ranks(model, batches, share=0.5, where=lambda name: name != "head")
        else:
            for x, y in batches:
                F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    benchmark.pedantic(work, rounds=3, warmup_rounds=1)
