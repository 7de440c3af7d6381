"""Averaged copies of a model across a change of rank."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import alr
from alr.history.resize import SvdFull, SvdRandom
from alr.integrations import follow_ranks_
from alr.resize import SvdCore
from alr.truncation import TangentCut

RECIPE = replace(alr.recipes.alr, every=8, control=replace(alr.recipes.alr.control, min_rank=1))


def net(seed=0, d=32):
    torch.manual_seed(seed)
    return alr.factorize_(nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d), nn.ReLU(), nn.Linear(d, 8)), rank=0.9)


def train(model, steps, seen, recipe=RECIPE, total=48, before=None):
    """Train on a fixed task; seen(events) after every step."""
    optimizer = alr.PairOptimizer(model, lr=0.02)
    adapter = alr.RankAdapter(model, optimizer, recipe, total_steps=total)
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(32, 32, generator=g).to(model[0].U)
        F.cross_entropy(model(x), x[:, :8].argmax(1)).backward()
        optimizer.step()
        if before:
            before()
        seen(adapter.step())
        optimizer.zero_grad()
    return adapter


@pytest.mark.parametrize("kind", ["torch", "torch, one tensor at a time", "plain copy", "timm"])
def test_an_average_goes_on_over_every_change(kind):
    model = net()
    if kind == "plain copy":
        average = copy.deepcopy(model)
    elif kind == "timm":
        class Ema(nn.Module):                                       # as timm.utils.ModelEmaV2 holds it
            def __init__(self, m):
                super().__init__()
                self.module = copy.deepcopy(m)
        average = Ema(model)
    else:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)) if kind == "torch" else \
            AveragedModel(model, avg_fn=lambda a, p, n: 0.9 * a + 0.1 * p)
    inner = average if kind == "plain copy" else average.module
    changes = []

    def seen(events):
        if events:
            changes.extend(events)
            follow_ranks_(average, model, events)
        if isinstance(average, AveragedModel):
            average.update_parameters(model)
        else:
            for a, p in zip(inner.parameters(), model.parameters(), strict=True):
                a.data.lerp_(p.data, 0.1)
    adapter = train(model, 48, seen)
    assert len(changes) > 3 and {name: layer.rank for name, layer in alr.low_rank_layers(inner).items()} == adapter.ranks
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(2))
    y = x[:, :8].argmax(1)
    assert F.cross_entropy(inner(x), y) < F.cross_entropy(model(x), y) + 0.05 < F.cross_entropy(net()(x), y)


def test_a_copy_that_equals_the_model_still_does():
    """Whatever the change: the average gets the combinations that the model got."""
    model = net().double()
    average = copy.deepcopy(model)
    adapter = train(model, 24, lambda events: follow_ranks_(average, model, events) if events else None,
                    before=lambda: average.load_state_dict(model.state_dict()))
    assert adapter.ranks != {name: layer.rank for name, layer in alr.low_rank_layers(net()).items()}
    for ours, theirs in zip(model.parameters(), average.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-7, atol=1e-9)


def test_an_average_keeps_what_the_model_has_lost():
    """At a change the averaged product moves by no more than the model's, and does not become the model's."""
    model = net().double()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    checked = []

    def seen(events):
        old = {name: layer.weight for name, layer in alr.low_rank_layers(average.module).items()}
        if events:
            follow_ranks_(average, model, events)
        for event in events:
            new, live = average.module.get_submodule(event.layer).weight, model.get_submodule(event.layer).weight
            moved = ((new - old[event.layer]).norm() / old[event.layer].norm()).item()
            checked.append((moved, event.error, ((new - live).norm() / live.norm()).item()))
        average.update_parameters(model)
    train(model, 40, seen)
    assert len(checked) > 3
    assert all(moved < 1.5 * error + 0.1 and apart > 0.01 for moved, error, apart in checked), checked


def test_growing_keeps_the_averaged_product():
    model = net().double()
    average = copy.deepcopy(model)
    with torch.no_grad():
        for p in average.parameters():
            p.add_(0.05 * torch.randn_like(p))
    W = average[0].weight
    adapter = alr.RankAdapter(model, alr.PairOptimizer(model), alr.recipes.uniform)
    events = adapter.resize({"0": model[0].rank + 6})
    follow_ranks_(average, model, events)
    assert average[0].rank == model[0].rank
    torch.testing.assert_close(average[0].weight, W)


def test_what_follow_refuses():
    with pytest.raises(ValueError, match="model's '0' is low-rank, 32 x 32; the average has no low-rank layer of that name"):
        follow_ranks_(nn.Sequential(nn.Linear(32, 32)), net())
    with pytest.raises(ValueError, match="16 x 16 there"):
        follow_ranks_(net(d=16), net())


RULES = [SvdFull(), SvdFull(split="left"), SvdRandom(), SvdCore(), TangentCut()]


def grown_by(rule, drift):
    """A model whose layer has grown from 4 to 6 by this rule, its copy of before, moved by `drift`, and that copy's W."""
    model = alr.factorize_(nn.Sequential(nn.Linear(32, 32)), rank=4).double()
    optimizer = alr.PairOptimizer(model)
    (model(torch.randn(64, 32, dtype=torch.double)) - 1).square().mean().backward()
    optimizer.step()                                                # a momentum, for `TangentCut`
    average = copy.deepcopy(model)
    with torch.no_grad():
        for p in average.parameters():
            p.add_(drift * torch.randn_like(p) * p.norm() / p.numel() ** 0.5)
    W = average[0].weight.detach()
    adapter = alr.RankAdapter(model, optimizer, replace(alr.recipes.uniform, resize=rule))
    follow_ranks_(average, model, adapter.resize({"0": 6}))
    return model[0], average[0], W


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_copy_equals_the_model_after_it_has_grown_by_any_rule(rule):
    torch.manual_seed(0)
    layer, mine, _ = grown_by(rule, 0.0)
    for name in ("U", "V"):
        torch.testing.assert_close(getattr(mine, name), getattr(layer, name), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_an_average_that_has_grown_by_any_rule_keeps_its_product_and_is_averaged_on(rule):
    torch.manual_seed(0)
    layer, mine, W = grown_by(rule, 0.1)
    size = W.norm()
    assert (mine.weight - W).norm() < 1e-3 * size
    half = (mine.U + layer.U) / 2 @ ((mine.V + layer.V) / 2)        # (m, n): one step of an average by halves
    assert (half - (W + layer.weight) / 2).norm() < 0.02 * size     # a wrong basis: 0.75
