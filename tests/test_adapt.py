"""Laws of `alr.adapt`: nothing changes in silence, nothing is forgotten, stopping and going on is not stopping."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

import alr
from alr import RankAdapter, Recipe, low_rank_layers, recipes
from alr.budget import Budget
from alr.control import Bidirectional
from alr.estimate import StableRank
from alr.state import Reset, Stale, Transport
from alr.truncation import TangentCut


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


def windowed():
    model = alr.factorize_(net(), rank=0.9)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    recipe = replace(recipes.alr, every=10, control=Budget(share=0.2, min_rank=2))
    return model, optimizer, RankAdapter(model, optimizer, recipe, total_steps=100)


def resized(k):
    return lambda model, optimizer, adapter: adapter.resize({"0": model[0].rank + k})


def taken(model, optimizer, adapter):
    model[0].take_rank(6)
    with torch.no_grad():
        model[0].U.normal_()
        model[0].V.normal_()


def loaded(model, optimizer, adapter):
    model.load_state_dict(alr.factorize_(net(1), rank={"0": 6, "2": model[2].rank, "4": model[4].rank}).state_dict())


def by_another(model, optimizer, adapter):
    other = RankAdapter(model, optimizer, replace(recipes.uniform, rank=8))
    other.resize({"0": 6})
    other.close()


@pytest.mark.parametrize("at", [6, 7, 8, 9])
@pytest.mark.parametrize("change", [resized(-3), resized(2), resized(0), taken, loaded, by_another],
                         ids=["shrunk", "grown", "anew", "taken", "loaded", "by another"])
def test_whoever_changes_a_rank_in_an_open_window_drops_what_it_has_seen(change, at):
    model, optimizer, adapter = windowed()
    train(model, optimizer, adapter, at)
    was = adapter.observer
    assert was is not None
    with pytest.warns(UserWarning, match="'0' w.* before the decision of step 10; what was seen so far is dropped") as told:
        change(model, optimizer, adapter)
        events = train(model, optimizer, adapter, 10 - at, start=at)
    assert sum("dropped" in str(one.message) for one in told) == 1
    assert adapter.observer is not was and adapter.ranks["0"] == model[0].rank
    assert bool(events) == (at < 9 or change.__name__ == "<lambda>")       # by the steps that are left, if there are any
    assert {e.step for e in train(model, optimizer, adapter, 10, start=10)} == {20}
    adapter.check_held()


def test_moments_of_two_bases_are_never_added_up():
    model, optimizer, adapter = windowed()
    train(model, optimizer, adapter, 7)
    with pytest.warns(UserWarning, match="the rank of '0' was changed by hand after step 7"):
        adapter.resize({"0": model[0].rank})
    assert adapter.observer.done == 0 and adapter.observer.steps == 3
    assert not any(x.any() for book in adapter.observer.books.values() for x in book.total.values())


def test_every_dropped_window_is_said():
    model, optimizer, adapter = windowed()
    for start in (0, 10):
        train(model, optimizer, adapter, 9, start=start)
        with pytest.warns(UserWarning, match=f"the factors of '0' were replaced .*the decision of step {start + 10}") as told:
            loaded(model, optimizer, adapter)
            with torch.no_grad():
                model[0].take_rank(model[0].rank + 1)
                model[0].U.normal_()
                model[0].V.normal_()
            assert train(model, optimizer, adapter, 1, start=start + 9) == [] and len(told) == 1
    assert {e.step for e in train(model, optimizer, adapter, 10, start=20)} == {30}


def test_a_decision_by_hand_inside_the_clocks_window_leaves_the_clock_a_decision():
    model, optimizer, adapter = windowed()
    train(model, optimizer, adapter, 9)
    assert adapter.adapt() and adapter.observer.steps == 1
    train(model, optimizer, adapter, 11, start=9)
    assert adapter.steps == 20


def test_a_window_that_nobody_can_go_on_with_is_not_saved():
    model, optimizer, adapter = windowed()
    train(model, optimizer, adapter, 7)
    assert adapter.state_dict()["seen"]["steps"] == 4
    taken(model, optimizer, adapter)
    assert adapter.state_dict()["seen"] is None


def test_a_closed_adapter_opens_no_window():
    model, optimizer, adapter = windowed()
    train(model, optimizer, adapter, 7)
    adapter.close()
    adapter.resize({"0": 5})
    assert adapter.observer is None and all("op" not in layer.__dict__ for layer in low_rank_layers(model).values())


def test_who_is_frozen_is_asked_a_few_times_and_not_once_per_layer(monkeypatch):
    asked, frozen = [], RankAdapter.frozen
    monkeypatch.setattr(RankAdapter, "frozen", property(lambda self: asked.append(1) or frozen.fget(self)))
    counts = []
    for layers in (3, 30):
        model = alr.factorize_(nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers))), rank=4)
        optimizer = alr.PairOptimizer(model)
        recipe = replace(recipes.alr, every=2, control=Budget(share=0.5, end=1.0, min_rank=1), resize=TangentCut())
        adapter = RankAdapter(model, optimizer, recipe, total_steps=8)
        for i in range(4):
            model(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
            adapter.step()
        with pytest.warns(UserWarning, match="what was seen so far is dropped"):
            adapter.resize({name: 3 for name in adapter.ranks})
        counts.append(len(asked))
        asked.clear()
    assert counts[0] == counts[1]
