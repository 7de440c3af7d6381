"""Laws of `alr.adapt`: nothing changes in silence, nothing is forgotten, stopping and going on is not stopping."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

import alr
from alr import RankAdapter, Recipe, low_rank_layers, recipes
from alr.control import Bidirectional
from alr.estimate import StableRank
from alr.state import Reset, Stale, Transport


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 4))


def pace(recipe, every=5):
    return replace(recipe, rank=24, every=every)


def train(model, optimizer, adapter, steps, start=0):
    events = []
    for i in range(start, start + steps):
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(i))
        model.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        events += adapter.step()
    return events


@pytest.mark.parametrize("recipe", [recipes.v10, recipes.repaired])
def test_every_change_is_an_event_and_every_event_a_change(recipe):
    recipe = pace(recipe)
    model = recipe.prepare(net())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    adapter = RankAdapter(model, optimizer, recipe)
    ranks = dict(adapter.ranks)
    events = train(model, optimizer, adapter, 30)
    assert events and {e.step % 5 for e in events} == {0}
    for e in events:
        assert ranks[e.layer] == e.old != e.new and e.target >= 1 and 0 <= e.error < 1
        ranks[e.layer] = e.new
    assert ranks == adapter.ranks == {k: v.rank for k, v in low_rank_layers(model).items()}
    assert adapter.seconds > 0


def test_dense_is_left_alone_and_uniform_holds():
    model = recipes.dense.prepare(net())
    assert not low_rank_layers(model)
    opt = torch.optim.AdamW(model.parameters())
    assert train(model, opt, RankAdapter(model, opt, recipes.dense), 5) == []
    model = replace(recipes.uniform, rank=3, every=1).prepare(net())
    opt = torch.optim.AdamW(model.parameters())
    assert train(model, opt, RankAdapter(model, opt, replace(recipes.uniform, every=1)), 5) == []
    assert [x.rank for x in low_rank_layers(model).values()] == [3, 3, 3]


def test_break_even_caps_ranks_and_min_does_not():
    big = replace(recipes.repaired, rank=1000)
    assert [x.rank for x in low_rank_layers(big.prepare(net())).values()] == [19, 19, 3]      # mn // (m + n)
    assert [x.rank for x in low_rank_layers(replace(big, cap="min").prepare(net())).values()] == [32, 32, 4]
    greedy = replace(recipes.repaired, rank=16, every=1, control=Bidirectional(safety=50.0, ema=0.0, min_rank=1))
    model = greedy.prepare(net())
    opt = torch.optim.AdamW(model.parameters())
    train(model, opt, adapter := RankAdapter(model, opt, greedy), 3)
    assert list(adapter.ranks.values()) == [19, 19, 3]


@pytest.mark.parametrize("state", [Transport(), Reset(), Stale()])
@pytest.mark.parametrize("recipe", [recipes.v10, recipes.repaired])
def test_resume_equals_not_stopping(recipe, state):
    recipe = replace(pace(recipe), state=state)
    model = recipe.prepare(net())
    opt = torch.optim.AdamW(model.parameters(), 1e-2)
    adapter = RankAdapter(model, opt, recipe)
    train(model, opt, adapter, 12)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict(), adapter.state_dict(), torch.get_rng_state()))
    train(model, opt, adapter, 12, start=12)

    other = recipe.prepare(net(seed=1))
    other.load_state_dict(saved[0])
    opt2 = torch.optim.AdamW(other.parameters(), 1e-2)
    adapter2 = RankAdapter(other, opt2, recipe)
    adapter2.load_state_dict(saved[2])
    opt2.load_state_dict(saved[1])
    torch.set_rng_state(saved[3])
    train(other, opt2, adapter2, 12, start=12)
    assert adapter2.ranks == adapter.ranks != {k: 24 for k in adapter.ranks}
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_forgotten_step_is_noticed_once():
    model = pace(recipes.repaired).prepare(net())
    opt = torch.optim.AdamW(model.parameters())
    RankAdapter(model, opt, recipes.repaired)
    with pytest.warns(UserWarning, match=r"10 optimizer steps, 0 calls of adapter.step\(\)") as caught:
        for _ in range(30):
            opt.step()
    assert len(caught) == 1


def test_a_remembered_step_is_not_warned_about():
    recipe = pace(recipes.repaired)
    model = recipe.prepare(net())
    opt = torch.optim.AdamW(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, opt, RankAdapter(model, opt, recipe), 40)


def test_a_change_while_an_older_graph_is_alive_keeps_that_graph():
    recipe = pace(recipes.repaired)
    model = recipe.prepare(net())
    opt = torch.optim.AdamW(model.parameters())
    adapter = RankAdapter(model, opt, recipe)
    loss = model(torch.randn(3, 32)).sum()
    adapter.resize({"0": 5})
    loss.backward()


def test_frozen_factors_stay_frozen():
    recipe = pace(recipes.repaired)
    model = recipe.prepare(net())
    model[0].U.requires_grad_(False)
    opt = torch.optim.AdamW(model.parameters())
    RankAdapter(model, opt, recipe).resize({"0": 5})
    assert not model[0].U.requires_grad and model[0].V.requires_grad


def test_clock_warmup_stop_and_pace():
    recipe = replace(recipes.repaired, rank=18, every=200, warmup=400, stop=1000).paced(10)
    assert (recipe.every, recipe.warmup, recipe.stop, recipe.epoch) == (10, 20, 50, 10)
    recipe = replace(recipe, estimate=StableRank(), control=Bidirectional(safety=0.1, ema=0.0, min_rank=1))
    model = recipe.prepare(net())
    opt = torch.optim.AdamW(model.parameters())
    assert {e.step for e in train(model, opt, RankAdapter(model, opt, recipe), 80)} <= {30, 40, 50}
    assert recipe.paced(10) == recipe


def test_a_diverged_layer_stops_instead_of_becoming_noise():
    recipe = pace(recipes.repaired)
    model = recipe.prepare(net())
    opt = torch.optim.AdamW(model.parameters())
    adapter = RankAdapter(model, opt, recipe)
    with torch.no_grad():
        model[0].U[0, 0] = float("nan")
    with pytest.raises((FloatingPointError, torch.linalg.LinAlgError)):
        adapter.resize({"0": 5})


def test_reprs_evaluate_back():
    for recipe in recipes.ALL.values():
        assert recipes.parse(repr(recipe)) == recipe


def test_refusals():
    opt = torch.optim.AdamW(net().parameters())
    with pytest.raises(ValueError, match="no LowRankLinear"):
        RankAdapter(net(), opt, recipes.repaired)
    with pytest.raises(ValueError, match="wrapped in DataParallel"):
        RankAdapter(nn.DataParallel(net()), opt, recipes.repaired)


def test_the_whole_price_of_adoption():
    model = net()
    alr.factorize_(model, rank=16, where=lambda name: name != "4")
    optimizer = torch.optim.AdamW(model.parameters())
    adapter = RankAdapter(model, optimizer, recipes.repaired)
    train(model, optimizer, adapter, 3)
    assert isinstance(recipes.repaired, Recipe) and set(adapter.ranks) == {"0", "2"}
