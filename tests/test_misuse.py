"""Other people's mistakes and surroundings: each is answered, or refused by name with what to write; nothing is half done."""

import contextlib
import copy
import os
import re
import socket
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import alr
from alr import fisher
from alr.budget import Budget, size
from alr.control import Bidirectional, ByLayer, Hold
from alr.init import Fresh, Gaussian, Normal, Spectral
from alr.linear import densify_, factorize_, low_rank_layers
from alr.observe import Observer
from alr.state import Reset, Transport

FAST = replace(alr.recipes.alr, every=8, control=Budget(share=0.3, end=0.8, min_rank=2, per_parameter=True))
NAN, INF = float("nan"), float("inf")


def dense(d=48):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d), nn.ReLU(), nn.Linear(d, 12))


def net(d=48):
    return factorize_(dense(d), rank=0.9)


def batch(i, d=48):
    x = torch.randn(32, d, generator=torch.Generator().manual_seed(i))
    return x, x[:, :12].argmax(1)


def backward(model, i=0):
    x, y = batch(i)
    F.cross_entropy(model(x), y).backward()


def start(model, recipe=FAST, total=60, lr=1e-3):
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    return optimizer, alr.RankAdapter(model, optimizer, recipe, total_steps=total)


def train(model, optimizer, adapter, begin, end):
    events = []
    for i in range(begin, end):
        backward(model, i)
        optimizer.step()
        events += adapter.step()
        optimizer.zero_grad()
    return events


def everything(model, optimizers=(), adapter=None):
    """All that a refusal could have half changed: modules, parameters, their numbers, param groups, state, memory."""
    modules = {name: id(mod) for name, mod in model.named_modules()}
    numbers = {name: (id(p), p.detach().clone(), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)}
    groups = [[[id(p) for p in group["params"]] for group in o.param_groups] for o in optimizers]
    state = [{id(p): {k: x.clone() if isinstance(x, torch.Tensor) else x for k, x in s.items()} for p, s in o.state.items()}
             for o in optimizers]
    books = None if adapter is None else copy.deepcopy((adapter.ranks, adapter.memory, adapter.steps, adapter.losses))
    return modules, numbers, groups, state, books


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)


@contextlib.contextmanager
def refused(error, match, model, optimizers=(), adapter=None):
    """The block raises, and all is as it was before."""
    before = everything(model, optimizers, adapter)
    with pytest.raises(error, match=match) as caught:
        yield
    text = str(caught.value)
    assert same(before, everything(model, optimizers, adapter)) and "\n" not in text and len(text) > 30
    if adapter is not None:
        adapter.check_held()


# ------------------------------------------------------------------------------------------------ who holds the factors

def too_early(model):
    optimizer = torch.optim.AdamW(model.parameters())
    factorize_(model, rank=8)
    return optimizer


def of_a_copy(model):
    return torch.optim.AdamW(copy.deepcopy(factorize_(model, rank=8)).parameters())


def of_biases(model):
    return torch.optim.AdamW([p for name, p in factorize_(model, rank=8).named_parameters() if "bias" in name])


def of_one_factor(model):
    return torch.optim.AdamW([p for name, p in factorize_(model, rank=8).named_parameters() if name != "2.V"])


@pytest.mark.parametrize("recipe", [alr.recipes.uniform, alr.recipes.repaired, alr.recipes.v10, FAST], ids=lambda r: r.name)
@pytest.mark.parametrize("made", [too_early, of_a_copy, of_biases, of_one_factor])
def test_an_optimizer_that_does_not_hold_the_factors_is_refused_at_once(made, recipe):
    model = dense()
    optimizer = made(model)
    layer = "2" if made is of_one_factor else "0"
    with refused(ValueError, f"no optimizer holds the factors of '{layer}'.*Make the optimizer after factorize_", model,
                 [optimizer]):
        alr.RankAdapter(model, optimizer, recipe, total_steps=600)
    assert not optimizer._optimizer_step_post_hooks


def test_loading_a_model_after_its_optimizer_was_made_puts_the_new_factors_into_it():
    a = net()
    optimizer, adapter = start(a)
    train(a, optimizer, adapter, 0, 20)
    saved = copy.deepcopy((a.state_dict(), optimizer.state_dict(), adapter.state_dict()))
    train(a, optimizer, adapter, 20, 40)
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2)):                 # all made first, then loaded; accelerate's is the first
        b = net()
        optimizer2, adapter2 = start(b)
        parts = (b, optimizer2, adapter2)
        for i in order:
            parts[i].load_state_dict(copy.deepcopy(saved[i]))
        held = {id(p) for group in optimizer2.param_groups for p in group["params"]}
        assert held == {id(p) for p in b.parameters()}
        train(b, optimizer2, adapter2, 20, 40)
        assert adapter2.ranks == adapter.ranks
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(p, q), order


def test_an_adapter_that_is_loaded_before_its_model_is_refused():
    a = net()
    optimizer, adapter = start(a)
    train(a, optimizer, adapter, 0, 20)
    b = net()
    optimizer2, adapter2 = start(b)
    with pytest.raises(ValueError, match="'0' has rank .* in the state and .* in the model. Load the model's state dict first"):
        adapter2.load_state_dict(copy.deepcopy(adapter.state_dict()))
    assert adapter2.steps == 0 and adapter2.memory == start(net())[1].memory


def test_an_adapter_made_after_the_model_was_loaded_sees_that_the_optimizer_is_older():
    a = net()
    optimizer, adapter = start(a)
    train(a, optimizer, adapter, 0, 20)
    b = net()
    older = torch.optim.AdamW(b.parameters())
    b.load_state_dict(a.state_dict())
    with refused(ValueError, "no optimizer holds the factors of '0'.*after factorize_ and load_state_dict", b, [older]):
        alr.RankAdapter(b, older, FAST, total_steps=60)


def tie(model, other, *keys):
    for key in keys:
        setattr(other, key, getattr(model[0], key))


@pytest.mark.parametrize("keys", ["UV", "U", "V"])
@pytest.mark.parametrize("kind", ["layer", "left out", "embedding", "late"])
def test_a_factor_that_another_module_holds_too_is_refused(kind, keys):
    model = factorize_(nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24), nn.Embedding(24, 4)), rank=4)
    recipe = replace(FAST, where=("0",)) if kind == "left out" else FAST
    other = f"2.{keys[0].lower()}" if kind == "embedding" else f"1.{keys[0]}"
    def make():
        if kind == "embedding":
            for key in keys:
                setattr(model[2], key.lower(), getattr(model[0], key))
        else:
            tie(model, model[1], *keys)
    if kind == "late":                                              # tied after the adapter was made
        optimizer, adapter = start(model, replace(alr.recipes.uniform, rank=4))
        make()
        with refused(ValueError, f"'0' shares its {keys[0]} with '{other}'", model, [optimizer]):
            adapter.resize({"0": 2, "1": 2})
        return
    make()
    optimizer = torch.optim.AdamW(model.parameters())
    with refused(ValueError, rf"RankAdapter: '0' shares its {keys[0]} with '{other}'.*detach\(\).clone", model, [optimizer]):
        alr.RankAdapter(model, optimizer, recipe, total_steps=60)
    assert not optimizer._optimizer_step_post_hooks


def test_a_layer_that_stands_in_two_places_is_one_layer():
    model = factorize_(nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24)), rank=8)
    model.append(model[0])
    optimizer, adapter = start(model, replace(alr.recipes.uniform, rank=8))
    assert adapter.resize({"0": 2})[0].new == model[2].rank == 2 and set(adapter.ranks) == {"0", "1"}


@pytest.mark.parametrize("swap", [lambda model: densify_(model), lambda model: model.__setitem__(0, nn.Linear(48, 48)),
                                  lambda model: model.__setitem__(0, copy.deepcopy(model[0]))],
                                  ids=["densify_", "dense", "copy"])
def test_a_layer_that_is_no_longer_in_the_model_is_named_at_the_next_decision(swap):
    model = net()
    optimizer, adapter = start(model)
    train(model, optimizer, adapter, 0, 8)
    swap(model)
    with pytest.raises(ValueError, match="'0' is no longer in the model.*Make a new RankAdapter"):
        train(model, optimizer, adapter, 8, 16)
    with refused(ValueError, "'0' is no longer in the model", model, [optimizer], adapter=None):
        adapter.resize({"2": 3})


@pytest.mark.parametrize("change", ["parametrize", "prune"])
def test_factors_that_are_computed_have_no_rank_to_change(change):
    def apply(layer):
        if change == "prune":
            prune.l1_unstructured(layer, "U", 0.5)
        else:
            nn.utils.parametrize.register_parametrization(layer, "U", nn.Identity())
    model = net()
    optimizer, adapter = start(model)
    apply(model[0])
    with pytest.raises(ValueError, match="the factors of '0' are computed"):
        adapter.resize({"0": 5})
    with pytest.raises(ValueError, match="the factors of '0' are computed"):
        start(model)


def test_what_hangs_on_a_parameter_hangs_on_its_successor():
    model = net()
    optimizer, adapter = start(model)
    seen, stepped = [], []
    model[0].U.register_hook(lambda grad: seen.append(grad.shape))
    model[0].U.register_post_accumulate_grad_hook(stepped.append)
    model[0].U.no_weight_decay = True
    for k in (5, 9):
        adapter.resize({"0": k})
        backward(model)
        assert seen[-1] == (48, k) and stepped[-1] is model[0].U and model[0].U.no_weight_decay


def test_an_optimizer_stepped_in_the_backward_goes_on_after_a_resize():
    model = net()
    optimizers = {name: torch.optim.SGD([p], 0.1) for name, p in model.named_parameters()}
    adapter = alr.RankAdapter(model, list(optimizers.values()), alr.recipes.repaired)
    for name, p in model.named_parameters():
        def hook(p, optimizer=optimizers[name]):
            optimizer.step()
            optimizer.zero_grad()
        p.register_post_accumulate_grad_hook(hook)
    adapter.resize({"0": 8})
    before = model[0].U.detach().clone(), model[0].V.detach().clone()
    backward(model)
    assert not torch.equal(model[0].U, before[0]) and not torch.equal(model[0].V, before[1])


# ------------------------------------------------------------------------------------------------ all or nothing

@pytest.mark.parametrize("ranks, match", [
    ({"0": 3, "2": 99}, "RankAdapter.resize: rank 99 asked of 2 .48 x 48.; it takes 0 to 48"),
    ({"0": 3, "nope": 3}, "'nope' is no layer of this adapter; there are 3, the first is '0'"),
    ({"0": 3, "2": -1}, "it takes 0 to 48"),
    ({"0": 3, "2": "8"}, "rank '8' asked of 2"),
    ({"0": 3, "2": None}, "rank None asked of 2"), ({"0": 3, "2": True}, "rank True asked of 2"),
    ({"0": 3, "2": 2.5}, "share 2.5 asked of 2"), ({"0": 3, "2": NAN}, "rank nan asked of 2"),
    ({"0": 3, "2": [4]}, "rank .4. asked"),
    (5, "wanted {layer name: rank}"), ("0", "wanted {layer name: rank}"), (None, "wanted {layer name: rank}")])
@pytest.mark.parametrize("pairs", [False, True])
def test_a_refused_resize_changes_nothing(ranks, match, pairs):
    model = net()
    optimizer, adapter = start(model)
    if pairs:
        optimizer = alr.PairOptimizer(model)
        adapter = alr.RankAdapter(model, optimizer, FAST, total_steps=60)
    train(model, optimizer, adapter, 0, 3)
    with refused(ValueError, match, model, [optimizer], adapter):
        adapter.resize(ranks)
    assert train(model, optimizer, adapter, 3, 16)


class Curious(torch.optim.AdamW):
    """Keeps something of its own beside AdamW's averages."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["own"] = torch.zeros(3, 3)


def test_an_optimizer_with_state_of_its_own_is_refused_before_anything_changes():
    model = net()
    optimizer = Curious(model.parameters(), 1e-3)
    adapter = alr.RankAdapter(model, optimizer, FAST, total_steps=60)
    train(model, optimizer, adapter, 0, 7)
    backward(model, 7)
    optimizer.step()
    before = everything(model, [optimizer])[:4], copy.deepcopy(adapter.memory)
    with pytest.raises(TypeError, match="'own' of shape .3, 3.*use state=Reset"):
        adapter.step()
    assert same(before, (everything(model, [optimizer])[:4], adapter.memory))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["alr", "repaired", "v10", "v9", "v8", "v7.5", "v7.4", "v7.2"])
def test_diverged_weights_are_named_and_a_rollback_trains_on(name, bad):
    recipe = replace(alr.recipes.get(name), every=2, warmup=0, offset=0, rank=20, stop=None)
    model = factorize_(dense(), rank=20, where=("0", "2"), init=recipe.init)
    optimizer, adapter = start(model, recipe)
    def step(i):
        backward(model, i)
        optimizer.step()
    step(0)
    adapter.step(3.0)
    optimizer.zero_grad()
    good = copy.deepcopy(model.state_dict())
    step(1)
    with torch.no_grad():
        model[2].V[0, 0] = bad
    before = everything(model, [optimizer])[:4], copy.deepcopy(adapter.memory)
    with pytest.raises(FloatingPointError, match="the weights of '2' are not finite: the model has diverged"):
        adapter.step(2.9)
    assert same(before, (everything(model, [optimizer])[:4], adapter.memory))
    model.load_state_dict(good)
    optimizer.state.clear()
    optimizer.zero_grad()
    events = []
    for i in range(2, 40):
        step(i)
        events += adapter.step(3.0 - i / 100)
        optimizer.zero_grad()
    assert {e.layer for e in events} == {"0", "2"} and "nan" not in repr(adapter.memory)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("init", [Spectral(), Spectral(match=True)], ids=repr)
def test_a_weight_that_is_not_finite_is_refused_before_anything_is_replaced(bad, init):
    model = dense()
    with torch.no_grad():
        model[4].weight[0, 0] = bad
    with refused(ValueError, "factorize_: '4': the weight holds numbers that are not finite", model):
        factorize_(model, rank=4, init=init)


# ------------------------------------------------------------------------------------------------ frozen layers

@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("sides", ["UV", "U", "V"])
@pytest.mark.parametrize("recipe",
                         [FAST, replace(alr.recipes.repaired, every=4, rank=20), replace(alr.recipes.v10, every=4, rank=20)],
                         ids=lambda r: r.name)
def test_a_frozen_layer_keeps_its_factors_and_the_rest_is_trained(recipe, sides, held):
    model = net()
    for side in sides:
        getattr(model[0], side).requires_grad_(False)
    factors, numbers = (model[0].U, model[0].V), {side: getattr(model[0], side).detach().clone() for side in sides}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if held or p.requires_grad], 1e-2)
    adapter = alr.RankAdapter(model, optimizer, recipe, total_steps=40)
    events = train(model, optimizer, adapter, 0, 40)
    assert (model[0].U, model[0].V) == factors or (model[0].U is factors[0] and model[0].V is factors[1])
    assert all(torch.equal(getattr(model[0], side), was) for side, was in numbers.items())
    assert events and "0" not in {e.layer for e in events}


def test_the_budget_counts_what_a_frozen_layer_costs():
    def spent(frozen):
        model = net()
        model[4].requires_grad_(not frozen)
        optimizer, adapter = start(model)
        train(model, optimizer, adapter, 0, 60)
        return size(list(adapter.ranks.values()), adapter.shapes), adapter.ranks
    room = 0.3 * (2 * 48 * 48 + 48 * 12)
    (free, _), (fixed, ranks) = spent(False), spent(True)
    assert ranks["4"] == low_rank_layers(net())["4"].rank
    assert room - 96 <= free <= room and room - 96 <= fixed <= room


def test_of_a_pair_both_factors_are_trained_or_neither():
    model = net()
    model[0].V.requires_grad_(False)
    with pytest.raises(ValueError, match="of pair 0 .* only U is trained.*Freeze both factors or neither"):
        alr.PairOptimizer(model)
    model[0].U.requires_grad_(False)
    optimizer = alr.PairOptimizer(model)
    before = model[0].weight.detach().clone()
    train(model, optimizer, alr.RankAdapter(model, optimizer, FAST, total_steps=60), 0, 20)
    assert torch.equal(before, model[0].weight)


class Bypassed(nn.Module):
    """The forward of `b` is never called: its weight is read."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(48, 48), nn.Linear(48, 48), nn.Linear(48, 12)

    def forward(self, x):
        return self.c(F.relu(F.linear(F.relu(self.a(x)), self.b.weight, self.b.bias)))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_bypassed_layer_keeps_its_rank_also_where_gradients_are_zeroed_early(set_to_none):
    model = factorize_(Bypassed(), rank=0.9)
    optimizer, adapter = start(model)
    rank = model.b.rank
    with pytest.warns(UserWarning, match="'b' has been trained, but its forward was not called in the 4 steps.*read .weight"):
        for i in range(16):
            backward(model, i)
            optimizer.step()
            optimizer.zero_grad(set_to_none)
            adapter.step()
    assert model.b.rank == rank > adapter.ranks["a"]


def test_no_rank_is_suggested_for_a_layer_that_the_loss_does_not_go_through():
    with pytest.warns(UserWarning, match="suggest_ranks: the loss of no batch went through the forward of 'b'"):
        found = alr.suggest_ranks(Bypassed(), [batch(i) for i in range(4)], share=0.5)
    assert "b" not in found.ranks and "b" not in found.left_dense and "a" in found.ranks
    assert found.parameters[0] <= 0.5 * found.parameters[1] == 0.5 * (48 * 48 + 12 * 48)
    with pytest.raises(ValueError, match="suggest_ranks: the loss went through the forward of none of the layers"):
        alr.suggest_ranks(Bypassed(), [batch(i) for i in range(4)], share=0.5, where="b")


@pytest.mark.parametrize("word, value", [("min_rank", 0), ("min_rank", 1.0), ("multiple", 0), ("multiple", True)])
def test_no_rank_is_suggested_that_factorize_would_refuse(word, value):
    model = Bypassed()
    with refused(ValueError, f"suggest_ranks: {word} is {value!r}; wanted a whole number of at least 1", model):
        alr.suggest_ranks(model, [batch(0), batch(1)], share=0.5, **{word: value})


def test_a_suggested_start_is_of_the_weights_that_were_seen():
    model = dense()
    found = alr.suggest_ranks(model, [batch(i) for i in range(4)], share=0.5)
    later = copy.deepcopy(model)
    with torch.no_grad():
        later[0].weight.mul_(1.01)
    with refused(ValueError, "factorize_: '0': the weight is not the one that suggest_ranks saw.*suggest_ranks again", later):
        factorize_(later, found.ranks, init=found.init)
    factorize_(model, found.ranks, init=found.init)


def test_a_suggestion_says_nothing_of_its_private_copy():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body = nn.Conv1d(1, 1, 3, padding=1), dense()
            self.mix = nn.Conv1d(4, 4, 3)

        def forward(self, x):
            return self.body(self.stem(x[:, None])[:, 0])
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = alr.suggest_ranks(model, [batch(i) for i in range(2)], share=0.5)
    with pytest.warns(UserWarning, match="factorize_: .* not taken, though they hold matrices"):
        factorize_(model, found.ranks, init=found.init)


def test_a_suggested_start_forms_no_gram_matrix_of_full_rank_again(monkeypatch):
    model = dense()
    found = alr.suggest_ranks(model, [batch(i) for i in range(4)], share=0.5)
    U, V, seen = found.init.seen["0"]
    want = fisher.cut_along(U, V, found.ranks["0"], seen.A, seen.B)
    monkeypatch.setattr(fisher, "gram", None)
    got = found.init.for_layer("0")(model[0].weight, found.ranks["0"])
    assert torch.equal(got[0], want.U) and torch.equal(got[1], want.V)


def test_a_layer_that_no_batch_reaches_takes_no_budget_from_the_others():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = net(), alr.LowRankLinear(48, 48, 21)

        def forward(self, x):
            return self.used(x)
    model = Half()
    optimizer, adapter = start(model)
    train(model, optimizer, adapter, 0, 60)
    assert adapter.ranks["unused"] == FAST.control.min_rank < min(adapter.ranks["used.0"], adapter.ranks["used.2"])


# ------------------------------------------------------------------------------------------------ the clock

@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize("pairs", [False, True])
def test_a_call_per_micro_batch_is_no_step(pairs, scaler):
    def run(micro):
        model = net()
        optimizer = alr.PairOptimizer(model, lr=0.01) if pairs else torch.optim.AdamW(model.parameters(), 1e-3)
        adapter, events = alr.RankAdapter(model, optimizer, FAST, total_steps=24), []
        scale = torch.amp.GradScaler("cpu", enabled=scaler, init_scale=2.0 ** 8)
        for i in range(24):
            x, y = batch(i)
            for part in range(4):
                scale.scale(F.cross_entropy(model(x[part::4]), y[part::4]) / 4).backward()
                if micro and part < 3:
                    events += adapter.step()
            scale.step(optimizer)
            scale.update()
            events += adapter.step()
            optimizer.zero_grad()
        return adapter.steps, [e._replace(target=0, error=0) for e in events]
    assert run(True) == run(False) and run(True)[0] == 24 and run(True)[1]


def test_a_second_call_in_the_same_step_is_no_step():
    model = net()
    optimizer, adapter = start(model)
    for i in range(15):
        backward(model, i)
        optimizer.step()
        adapter.step()
        assert adapter.step() == []
        optimizer.zero_grad()
    assert adapter.steps == 15


def test_a_step_that_a_grad_scaler_skips_ends_no_run():
    for overflow in range(3, 9):                                    # inside and outside of the window before step 8
        model = net()
        optimizer, adapter = start(model)
        scale, events = torch.amp.GradScaler("cpu"), []
        for i in range(20):
            x, y = batch(i)
            scale.scale(F.cross_entropy(model(x), y) * (INF if i == overflow else 1)).backward()
            scale.step(optimizer)
            scale.update()
            events += adapter.step()
            optimizer.zero_grad()
        assert adapter.steps == 19 and events and all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_wrong_order_of_steps_is_said_once(set_to_none):
    model = net()
    optimizer, adapter = start(model)
    with pytest.warns(UserWarning, match="a backward pass came between optimizer.step.. and adapter.step") as caught:
        for i in range(20):
            backward(model, i)
            adapter.step()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    assert len(caught) == 1


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("pairs", [True, False])
def test_the_right_orders_are_not_warned_about(pairs, set_to_none):
    for order in ("step adapt zero", "step zero adapt", "zero backward step adapt"):
        model = net()
        optimizer = alr.PairOptimizer(model) if pairs else torch.optim.AdamW(model.parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adapter, events = alr.RankAdapter(model, optimizer, FAST, total_steps=60), []
            for i in range(20):
                if "backward" not in order:
                    backward(model, i)
                for word in order.split():
                    if word == "adapt":
                        events += adapter.step()
                    elif word == "step":
                        optimizer.step()
                    elif word == "backward":
                        backward(model, i)
                    else:
                        optimizer.zero_grad(set_to_none=set_to_none)
        assert adapter.steps == 20 and events


@pytest.mark.parametrize("total, every", [(40, 50), (7, 8), (1, 2)])
def test_a_run_too_short_for_a_decision_is_said(total, every):
    with pytest.warns(UserWarning, match=f"first decision would come at step {every}, and the run has {total}: no rank will "
                                         f"ever "
                                         "move. Decide more often"):
        start(net(), replace(FAST, every=every), total)
    with pytest.warns(UserWarning, match="would come never"):
        start(net(), replace(FAST, every=8, stop=4), 60)


@pytest.mark.parametrize("total", [0, -5, "60", True, 60.0, NAN])
def test_a_length_of_the_run_that_is_none_is_refused(total):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    with refused(ValueError, "total_steps is .*wanted the number of optimizer steps", model, [optimizer]):
        alr.RankAdapter(model, optimizer, FAST, total_steps=total)
    with pytest.raises(ValueError, match="Budget plans over the whole run; write .*total_steps="):
        alr.RankAdapter(model, optimizer, FAST)
    assert not optimizer._optimizer_step_post_hooks
    alr.RankAdapter(model, optimizer, FAST, total_steps=np.int64(60))


def test_stop_at_zero_is_never():
    recipe = replace(alr.recipes.repaired, every=2, rank=20, stop=0)
    assert not any(recipe.due(step) for step in range(50)) and recipe.next_due(0) is None
    assert replace(alr.recipes.repaired, stop=100, epoch=200).paced(1).stop == 0
    model = net()
    optimizer, adapter = start(model, recipe, None)
    assert train(model, optimizer, adapter, 0, 12) == []


@pytest.mark.parametrize("steps, every", [(4, 2), (7, 3), (3, 8)])
def test_a_window_never_reaches_behind_the_decision_before(steps, every):
    recipe = replace(FAST, every=every, estimate=replace(FAST.estimate, steps=steps), resize=replace(FAST.resize, steps=steps))
    assert recipe.window == min(steps, every)
    model = net()
    optimizer, adapter = start(model, recipe)
    for i in range(3 * every):
        before = adapter.steps % every                              # steps since the decision
        assert (adapter.observer is not None) == (every - before <= min(steps, every))
        if adapter.observer is not None:
            assert adapter.observer.steps == min(steps, every)
        train(model, optimizer, adapter, i, i + 1)


def test_inference_mode_makes_no_factors_that_cannot_be_trained():
    model = net()
    optimizer, adapter = start(model)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="call it outside of torch.inference_mode"):
        adapter.step()
    assert train(model, optimizer, adapter, 0, 8)


# ------------------------------------------------------------------------------------------------ wrong types

@pytest.mark.parametrize("bad", ["alr", None, 3, alr.recipes, alr.Recipe])
def test_what_is_no_recipe_is_refused(bad):
    model = net()
    with refused(TypeError, "recipe is .*wanted a Recipe, such as alr.recipes.alr", model):
        alr.RankAdapter(model, torch.optim.AdamW(model.parameters()), bad, total_steps=60)


@pytest.mark.parametrize("bad", [None, "adam", 3, [None], torch.optim.AdamW, {"a": 1}])
def test_what_is_no_optimizer_is_refused(bad):
    with pytest.raises(TypeError, match="optimizer is .*wanted a torch Optimizer, or a list of them"):
        alr.RankAdapter(net(), bad, FAST, total_steps=60)


@pytest.mark.parametrize("bad", [None, 3, "model", nn.Linear, [nn.Linear(4, 4)]])
def test_what_is_no_model_is_refused(bad):
    batches = [batch(0), batch(1)]
    for call in (lambda: factorize_(bad, rank=2), lambda: densify_(bad), lambda: alr.suggest_ranks(bad, batches, 0.5),
                 lambda: alr.RankAdapter(bad, torch.optim.AdamW(net().parameters()), FAST, total_steps=60)):
        with pytest.raises(TypeError, match="the model is .*wanted an nn.Module"):
            call()


@pytest.mark.parametrize("rank", [np.int64(5), np.int32(5), 5])
def test_numpys_whole_numbers_are_ranks(rank):
    for model in (factorize_(dense(), rank=rank), factorize_(dense(), rank={"0": rank, "2": rank, "4": rank}),
                  factorize_(dense(), rank=lambda name, linear: rank)):
        assert {layer.rank for layer in low_rank_layers(model).values()} == {5}
    optimizer, adapter = start(net())
    adapter.resize({"0": rank})
    assert adapter.ranks["0"] == 5 and type(adapter.ranks["0"]) is int
    assert alr.LowRankLinear(np.int64(8), np.int64(8), rank).rank == 5


@pytest.mark.parametrize("share", [np.float32(0.5), np.float64(0.5), 0.5])
def test_numpys_other_numbers_are_shares(share):
    assert low_rank_layers(factorize_(dense(), rank=share))["0"].rank == 12
    assert alr.LowRankLinear(48, 48, share).rank == 12


@pytest.mark.parametrize("bad", ["8", None, True, np.bool_(True), 0, -1, 49, 1.5, 0.0, NAN, INF, [5], (5,), {},
                                 torch.tensor([5, 6]), 8j, b"8"])
def test_what_is_no_rank_is_refused_and_says_what_is(bad):
    for rank in (bad, {"0": bad, "2": bad}, lambda name, linear: bad):
        model = dense()
        if rank == {}:
            continue
        with refused(ValueError, "(rank|share) .*(it takes|wanted)", model):
            factorize_(model, rank=rank)
    with pytest.raises(ValueError, match="LowRankLinear: (rank|share) .* it takes"):
        alr.LowRankLinear(48, 48, bad)


@pytest.mark.parametrize("bad", ["svd", None, 3, Spectral, Fresh])
def test_what_is_no_start_is_refused(bad):
    model = dense()
    with refused(ValueError, "init is .*wanted a start such as", model):
        factorize_(model, rank=2, init=bad)


@pytest.mark.parametrize("bad", [3, [3], {"0": 3}.items(), True])
def test_what_picks_no_layers_is_refused(bad):
    model = dense()
    with refused(ValueError, "where is .*wanted a function of a layer's name, or shell patterns", model):
        factorize_(model, rank=2, where=bad)


@pytest.mark.parametrize("where", [["0"], ("0",), "0", lambda name: name == "0"])
def test_layers_are_picked_by_patterns_or_by_a_function(where):
    assert list(low_rank_layers(factorize_(dense(), rank=2, where=where))) == ["0"]


def test_who_is_named_where_nothing_matches():
    with pytest.raises(ValueError, match="no linear layer matched `where`. The model has 3, the first is '0'"):
        factorize_(dense(), rank=2, where="blocks.*")
    with pytest.raises(ValueError, match="rank names 'nope', which is no linear layer of the model; it has 3, the first "
                                         "is '0'"):
        factorize_(dense(), rank={"nope": 3})
    model = net()
    with refused(ValueError, "holds 3 LowRankLinear already; change a rank with RankAdapter.resize", model):
        factorize_(model, rank=2)
    with pytest.raises(ValueError, match="itself a linear layer.*LowRankLinear.from_linear"):
        factorize_(nn.Linear(8, 8), rank=2)


@pytest.mark.parametrize("per", ["token", None, 3])
def test_what_a_term_of_the_loss_belongs_to_is_one_of_three(per):
    model = net()
    with refused(ValueError, "per is .*wanted one of auto, row, example", model):
        alr.RankAdapter(model, torch.optim.AdamW(model.parameters()), FAST, total_steps=60, per=per)
    with refused(ValueError, "per is .*wanted one of auto, row, example", model):
        Observer(low_rank_layers(model), ("importance",), 4, per)


@pytest.mark.parametrize("changes", [
    dict(every=0), dict(every=2.5), dict(every=True), dict(warmup=-1), dict(stop=-1), dict(offset=-1), dict(epoch=0),
    dict(rank=0),
    dict(rank="8"), dict(rank=True), dict(rank=1.5), dict(rank={"a": 0}), dict(where="*"), dict(where=["0"]), dict(when="now"),
    dict(cap="x"), dict(control=None), dict(estimate=3), dict(name=3), dict(init=None), dict(state=None), dict(resize=None),
    dict(control=Bidirectional()), dict(estimate=None)], ids=repr)
def test_a_recipe_checks_itself(changes):
    with pytest.raises(ValueError, match=f"Recipe.*{next(iter(changes)) if 'control' not in changes else ''}"):
        replace(alr.recipes.alr, **changes)


@pytest.mark.parametrize("changes", [dict(begin=0.5, end=0.5), dict(end=0.0), dict(multiple=0), dict(min_rank=-1),
                                     dict(share=0), dict(share=2), dict(share="a"), dict(share=True), dict(start=0),
                                     dict(begin=NAN)], ids=repr)
def test_a_budget_that_can_never_act_is_refused_when_it_is_made(changes):
    with pytest.raises(ValueError, match=f"Budget: {next(iter(changes))}"):
        Budget(**changes)


@pytest.mark.parametrize("state, error, match", [
    (Transport(), TypeError, "LBFGS keeps state.*Use an optimizer of that list"),
    (Reset(everything=False), TypeError, "LBFGS keeps one flat history.*use another optimizer")])
def test_lbfgs_is_refused_with_advice_that_works(state, error, match):
    model = net()
    with refused(error, match, model):
        alr.RankAdapter(model, torch.optim.LBFGS(model.parameters()), replace(FAST, state=state), total_steps=60)


def test_a_state_of_something_else_is_refused():
    model = net()
    optimizer, adapter = start(model)
    other = nn.Sequential(net())
    for state, match in ((start(other)[1].state_dict(), "of other layers; '0' is absent there|'0.0' is .* there and absent"),
                         (start(net(60))[1].state_dict(), "of other layers; '0' is .60, 60. there and .48, 48. here"),
                         (start(net(), replace(alr.recipes.repaired, every=8))[1].state_dict(),
                          "the state is of recipe Recipe.name='repaired'"),
                         ({}, "is not in the state; wanted what adapter.state_dict"), (None, "is not in the state"),
                         ({"steps": 3}, "is not in the state")):
        with refused(ValueError, match, model, [optimizer], adapter):
            adapter.load_state_dict(state)


def test_a_wrapped_optimizer_is_looked_through():
    class Wrapped(torch.optim.Optimizer):                           # as accelerate's and Lightning's
        def __init__(self, optimizer):
            self.optimizer = optimizer
    model = net()
    inner = torch.optim.AdamW(model.parameters(), 1e-3)
    adapter = alr.RankAdapter(model, Wrapped(Wrapped(inner)), FAST, total_steps=60)
    assert adapter.optimizers == [inner] and train(model, inner, adapter, 0, 8)


def a_pair(m=8, r=2, n=6):
    return nn.Parameter(torch.ones(m, r)), nn.Parameter(torch.ones(r, n))


@pytest.mark.parametrize("settings, match", [
    (dict(lr=-1), "lr is -1; wanted 0 or more"), (dict(lr="0.1"), "lr is '0.1'"), (dict(lr=NAN), "lr is nan"),
    (dict(lr=True), "lr is True"),
    (dict(momentum=1.0), "momentum is 1.0; wanted 0 or more and below 1"), (dict(momentum=-0.1), "momentum is -0.1"),
    (dict(weight_decay=-1), "weight_decay is -1"), (dict(ns_steps=0), "ns_steps is 0; wanted a whole number of at least 1"),
    (dict(ns_steps=2.5), "ns_steps is 2.5"), (dict(nesterov=1), "nesterov is 1; wanted True or False"),
    (dict(decay="all"), "decay is 'all'; wanted one of factors, product"),
    (dict(adjust_lr_fn="x"), "adjust_lr_fn is 'x'; wanted one of original"),
    (dict(rule="muon"), "rule is 'muon'; wanted a value such as"), (dict(rest_lr=-1), "lr is -1"),
    (dict(rest_betas=(0.9, 1.0)), "betas is"), (dict(rest_eps=-1), "eps is -1")], ids=repr)
def test_a_setting_that_no_step_can_be_made_with_is_refused(settings, match):
    with pytest.raises(ValueError, match=f"PairOptimizer: {match}"):
        alr.PairOptimizer(net(), **settings)


@pytest.mark.parametrize("params, match", [
    ([], "no pairs; a group of them is"), (dense(), "no pairs; call alr.factorize_"),
    ([{"params": [nn.Parameter(torch.ones(3))]}], "no pairs"),
    ([a_pair()[:1]], "pair 0 is .8, 2., which are no factors of one matrix"),
    ([(*a_pair(), nn.Parameter(torch.ones(3)))], "no factors of one"),
    ([a_pair()[::-1]], "no factors of one matrix|is it .V, U."),
    ([a_pair(6, 2, 6)[::-1]], "of a rank above both sides; is it .V, U."),
    ([(nn.Parameter(torch.ones(8, 2)), nn.Parameter(torch.ones(3, 6)))], "no factors of one matrix; wanted .m, r. and .r, n."),
    ([("U", "V")], "pair 0 is str, str, which are no factors"), ([(p := a_pair()), p], "pair 1 .* is given twice"),
    ([{"pairs": [a_pair()], "colour": 3}], "'colour' is no setting of a group of pairs; there are lr, momentum"),
    ([{"pairs": [a_pair()], "betas": (0.9, 0.99)}], "'betas' is no setting of a group of pairs"),
    ([{"pairs": [a_pair()]}, {"params": [nn.Parameter(torch.ones(3))], "momentum": 0.9}],
     "'momentum' is no setting of a group of other")],
    ids=range(13))
def test_what_is_no_pair_of_factors_is_refused(params, match):
    with pytest.raises(ValueError, match=f"PairOptimizer: .*({match})"):
        alr.PairOptimizer(params)


def test_a_refused_param_group_adds_nothing():
    model = net()
    optimizer = alr.PairOptimizer(model)
    for group in ({"pairs": [a_pair()], "lr": -1}, {"pairs": [a_pair()[::-1]]}, {"pairs": [(model[0].U, model[0].V)]}):
        with refused(ValueError, "lr is -1|no factors|more than one parameter group", model, [optimizer]):
            optimizer.add_param_group(group)
    optimizer.add_param_group({"pairs": [a_pair()], "lr": 0.1})
    assert len(optimizer.param_groups) == 3 and optimizer.param_groups[-1]["lr"] == 0.1


def test_one_gradient_of_a_pair_is_no_step():
    model = net()
    optimizer = alr.PairOptimizer(model)
    backward(model)
    model[2].V.grad = None
    with refused(ValueError, "of the pair .48, 21., .21, 48. only U has a gradient. Freeze both", model, [optimizer]):
        optimizer.step()


# ------------------------------------------------------------------------------------------------ wrapped and sharded models

@pytest.fixture(scope="module")
def group():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def fsdp2(model):
    from torch.distributed.fsdp import fully_shard
    return fully_shard(model)


def fsdp1(model):
    from torch.distributed.fsdp import FullyShardedDataParallel
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def tensor_parallel(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module
    return distribute_module(model, init_device_mesh("cpu", (1,)))


def peft(model):
    kind = type("Linear", (nn.Module,), {"__module__": "peft.tuners.lora.layer"})
    wrapped = kind()
    wrapped.base_layer = model
    return nn.Sequential(wrapped)


WRAPPERS = {
    "ddp": (ddp, "wrapped in DistributedDataParallel.*module inside.*average_gradients"),
    "ddp inside": (lambda m: nn.Sequential(ddp(m)), "wrapped in DistributedDataParallel .at '0'.*average_gradients"),
    "compiled ddp": (lambda m: torch.compile(ddp(m), backend="eager"), "wrapped in DistributedDataParallel.*average_gradients"),
    "data parallel": (nn.DataParallel, "wrapped in DataParallel.*module inside"),
    "fsdp2": (fsdp2, "sharded by FSDP.*before sharding"),
    "fsdp1": (fsdp1, "sharded by FSDP.*before sharding"),
    "dtensor": (tensor_parallel, "is a DTensor .*before the model is distributed"),
    "peft": (peft, "holds adapters of peft.*Merge them first"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_who_holds_the_parameters_of_a_wrapped_model_is_named(wrapper, group):
    wrap, match = WRAPPERS[wrapper]
    wrapped, outside = wrap(dense()), wrap(net())
    for who, call in (("factorize_", lambda: factorize_(wrapped, rank=2)),
                      ("suggest_ranks", lambda: alr.suggest_ranks(wrapped, [batch(0), batch(1)], 0.5)),
                      ("densify_", lambda: densify_(outside)), ("PairOptimizer", lambda: alr.PairOptimizer(outside)),
                      ("RankAdapter", lambda: alr.RankAdapter(outside, torch.optim.AdamW(outside.parameters()), FAST,
                                                              total_steps=9))):
        with pytest.raises(ValueError, match=f"^{who}: .*{match}"):
            call()


def test_compiled_models_are_looked_through():
    model = dense()
    compiled = torch.compile(model, backend="eager")
    assert factorize_(compiled, rank=0.9) is compiled and list(low_rank_layers(compiled)) == ["0", "2", "4"]
    optimizer, adapter = start(compiled)
    assert {e.layer for e in train(compiled, optimizer, adapter, 0, 8)} <= set(adapter.ranks)
    densify_(compiled)
    assert type(model[0]) is nn.Linear


# ------------------------------------------------------------------------------------------------ devices

@pytest.fixture
def elsewhere():
    """A default device that is not the CPU; "meta" stands for "cuda"."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def randn(*shape):
    return torch.randn(*shape, device="cpu")


def test_the_default_device_is_not_assumed(elsewhere):
    from alr.estimate import fresh_stable_rank
    from alr.factor import grow, svd_core
    from alr.fisher import fisher_cut, metric
    from alr.lab.data import Batches, blocks
    from alr.resize import grow_along
    tokens = torch.arange(100, device="cpu")
    x, y = Batches(tokens, block=8, batch=2)[0]
    x2, y2, n = next(blocks(tokens, block=8, batch=2))
    assert torch.equal(x + 1, y) and torch.equal(x2 + 1, y2) and n == 16
    U, V = randn(9, 5), randn(5, 9)
    H = V @ V.mT
    made = [*metric(U, V, H, H), *fisher_cut(U, V, 3, H, H), *grow(U, V, 7), *grow_along(U, V, 7, randn(9, 9)),
            *svd_core(U, V, 3)]
    for init in (Fresh(), Spectral(), Gaussian(), Normal()):
        made += init(randn(9, 8), 3)
    assert {t.device.type for t in made} == {"cpu"} and all(t.isfinite().all() for t in made)
    assert fresh_stable_rank(9, 8, 4, Spectral()) > 1


def test_a_language_model_on_the_cpu_is_tested_whatever_the_default_device(elsewhere):
    model = nn.Sequential(nn.Embedding(11, 8, device="cpu"), nn.Linear(8, 11, device="cpu"))
    alr.assert_causal(model)


def test_a_training_on_the_cpu_goes_on_whatever_the_default_device(elsewhere):
    model = nn.Sequential(nn.Linear(48, 48, device="cpu"), nn.ReLU(), nn.Linear(48, 12, device="cpu"))
    for p in model.parameters():
        nn.init.normal_(p, 0, 0.1, generator=torch.Generator("cpu").manual_seed(0))
    found = alr.suggest_ranks(model, [(x := randn(32, 48), x[:, :12].argmax(1)) for _ in range(4)], share=0.5)
    factorize_(model, rank=0.9)
    optimizer = alr.PairOptimizer(model)
    adapter, events = alr.RankAdapter(model, optimizer, FAST, total_steps=24), []
    for _ in range(16):
        x = randn(32, 48)
        F.cross_entropy(model(x), x[:, :12].argmax(1)).backward()
        optimizer.step()
        events += adapter.step()
        optimizer.zero_grad()
    assert events and found.ranks and {p.device.type for p in model.parameters()} == {"cpu"}
    adapter.resize({"0": 20})


@pytest.mark.parametrize("init", [Spectral(), Fresh(), Gaussian(), Normal()], ids=repr)
def test_a_model_without_numbers_becomes_factors_without_numbers(init):
    with torch.device("meta"):
        model = dense()
    factorize_(model, rank=4, init=init)
    assert {(p.device.type, layer.rank) for layer in low_rank_layers(model).values()
            for p in layer.parameters()} == {("meta", 4)}
    optimizer = alr.PairOptimizer(model)
    assert alr.RankAdapter(model, optimizer, alr.recipes.repaired).ranks == {"0": 4, "2": 4, "4": 4}
    saved = factorize_(dense(), rank=3).state_dict()
    model.load_state_dict(saved, assign=True)                       # a state dict of other ranks follows
    x = batch(0)[0]
    whole = factorize_(dense(), rank=3)
    assert torch.equal(model(x), whole(x)) and model[0].rank == 3
    densify_(model)


def test_layers_can_be_made_empty_and_filled_later():
    layer = torch.nn.utils.skip_init(alr.LowRankLinear, 8, 6, 2)
    assert (layer.U.shape, layer.V.shape) == ((6, 2), (2, 8))
    layer = alr.LowRankLinear(8, 6, 2, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert all(p.isfinite().all() and p.any() for p in layer.parameters())
    model = nn.Sequential(torch.nn.utils.skip_init(nn.Linear, 8, 6))
    assert factorize_(model, rank=2, init=Fresh())[0].U.shape == (6, 2)


# ------------------------------------------------------------------------------------------------ layers of other kinds

@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("wrap, kind", [
    (nn.utils.weight_norm, "Linear"), (nn.utils.spectral_norm, "Linear"),
    (lambda l: prune.l1_unstructured(l, "weight", 0.5), "Linear"),
    (nn.utils.parametrizations.weight_norm, "ParametrizedLinear"),
    (nn.utils.parametrizations.orthogonal, "ParametrizedLinear")],
    ids=["weight_norm", "spectral_norm", "prune", "parametrized weight_norm", "orthogonal"])
def test_a_layer_whose_weight_is_computed_is_left_out_and_said(wrap, kind):
    model = nn.Sequential(wrap(nn.Linear(8, 8)), nn.Linear(8, 4))
    with pytest.warns(UserWarning, match=f"1 layers are low-rank now; not taken, though they hold matrices: 1 {kind}"):
        factorize_(model, rank=2)
    assert list(low_rank_layers(model)) == ["1"] and model(torch.ones(2, 8)).shape == (2, 4)
    alone = nn.Sequential(wrap(nn.Linear(8, 8)))
    with refused(ValueError, f"The model has none. Not taken, though they hold matrices: 1 {kind}", alone):
        factorize_(alone, rank=2)


def test_what_holds_matrices_and_is_not_taken_is_said_in_one_line():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.zeros(4, 8, 8))
    model = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.LSTM(8, 8), nn.Conv2d(3, 3, 3), nn.Bilinear(3, 3, 3),
                           nn.LazyLinear(4),
                           Experts(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Embedding(8, 8)])
    with pytest.warns(UserWarning) as caught:
        factorize_(model, rank=2)
    text, = (str(w.message) for w in caught)
    assert text.endswith("not taken, though they hold matrices: 1 Bilinear, 1 Conv2d, 1 Experts, 1 LSTM, 1 LazyLinear, "
                         "1 MultiheadAttention, 1 NonDynamicallyQuantizableLinear.")
    with pytest.raises(ValueError, match="The model has none. Not taken, though they hold matrices: 1 Conv2d"):
        factorize_(nn.Sequential(nn.Conv2d(3, 3, 3)), rank=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        factorize_(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Embedding(8, 8)), rank=2)


def test_shared_weights_and_small_heads_are_refused_with_what_to_write():
    model = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 12, bias=False))
    model[1].weight = model[0].weight
    with refused(ValueError, "'1' shares its weight with '0'; leave it out with where=lambda name: name != '1'", model):
        factorize_(model, rank=2)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    with refused(ValueError, re.escape("For another rank in small layers: rank=lambda name, linear: min(8, linear.in_features, "
                                       "linear.out_features)."), model):
        factorize_(model, rank=8)
    factorize_(model, rank=lambda name, linear: min(8, linear.in_features, linear.out_features))
    assert [layer.rank for layer in low_rank_layers(model).values()] == [8, 2]


def test_a_layer_is_called_as_linear_is():
    layer, x = alr.LowRankLinear(8, 6, 2), torch.randn(3, 8)
    assert torch.equal(layer(input=x), layer(x)) and layer(x[0]).shape == (6,)
    model = net()
    optimizer, adapter = start(model)
    for i in range(16):                                             # single rows, also inside of the window
        F.cross_entropy(model(batch(i)[0][0]), batch(i)[1][0]).backward()
        optimizer.step()
        adapter.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("r", [9, 12])
def test_a_state_dict_of_a_rank_that_no_layer_has_is_refused(r):
    layer = alr.LowRankLinear(8, 8, 2)
    with refused(ValueError, f"load_state_dict: rank {r} asked of the layer .8 x 8.; it takes 0 to 8", layer):
        layer.load_state_dict({"U": torch.zeros(8, r), "V": torch.zeros(r, 8), "bias": torch.zeros(8)})


def test_a_budget_that_the_least_ranks_exceed_is_said():
    model = factorize_(nn.Sequential(*(nn.Linear(24, 24) for _ in range(4))), rank=12)
    with pytest.warns(UserWarning, match="min_rank=4 in every layer takes 0.333 of the dense parameters, more than "
                                         "share=0.167"):
        start(model, alr.recipes.alr, 200)


# ------------------------------------------------------------------------------------------------ loaded on the way

def test_an_optimizer_of_pairs_without_an_adapter_follows_a_state_dict_of_other_ranks():
    torch.manual_seed(0)
    def make(rank):
        return alr.factorize_(nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5)), rank=rank)
    model, other = make(3), make(2)
    optimizer = alr.PairOptimizer(model, lr=0.02)
    model.load_state_dict(other.state_dict())
    before = [p.detach().clone() for p in model.parameters()]
    F.cross_entropy(model(torch.randn(8, 12)), torch.arange(8) % 5).backward()
    optimizer.step()
    assert all((p.detach() - q).abs().max() > 0 for p, q in zip(model.parameters(), before))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    copy.deepcopy(model)


@pytest.mark.parametrize("at", [13, 14, 15, 16])
def test_a_rollback_in_the_steps_before_a_decision_drops_what_was_seen_and_goes_on(at):
    torch.manual_seed(0)
    model = alr.factorize_(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)), rank=0.9)
    optimizer = alr.PairOptimizer(model, lr=0.02)
    recipe = replace(alr.recipes.alr, every=8, control=Budget(share=0.3, min_rank=2, per_parameter=True))
    adapter = alr.RankAdapter(model, optimizer, recipe, total_steps=64)
    good, ranks = copy.deepcopy(model.state_dict()), []
    def run(start, stop):
        for i in range(start, stop):
            x = torch.randn(16, 32, generator=torch.Generator().manual_seed(i))
            F.mse_loss(model(x), x).backward()
            optimizer.step()
            adapter.step()
            optimizer.zero_grad()
            ranks.append(sum(adapter.ranks.values()))
    run(0, at)
    model.load_state_dict(good)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run(at, 40)
    assert any("what was seen so far is dropped" in str(one.message) for one in told) == (at in (13, 14, 15))
    assert ranks[-1] < ranks[at] and all(p.isfinite().all() for p in model.parameters())


def test_another_length_of_the_run_is_said_on_loading():
    model = alr.factorize_(nn.Sequential(nn.Linear(32, 32)), rank=0.9)
    optimizer = alr.PairOptimizer(model)
    recipe = replace(alr.recipes.alr, control=Budget(share=0.5, min_rank=2))
    state = alr.RankAdapter(model, optimizer, recipe, total_steps=100).state_dict()
    with pytest.warns(UserWarning, match="a run of 100 steps, and this one has 200"):
        alr.RankAdapter(model, optimizer, recipe, total_steps=200).load_state_dict(state)


@pytest.mark.parametrize("call, words", [
    (lambda model: alr.PairOptimizer(model.parameters()), "give the model"),
    (lambda model: alr.factorize_(nn.Sequential(nn.Linear(4, 4)), {}), "empty mapping"),
])
def test_what_a_newcomer_types_first_is_answered(call, words):
    with pytest.raises(ValueError, match=words):
        call(alr.factorize_(nn.Sequential(nn.Linear(8, 8)), rank=2))


def test_a_budget_among_rules_by_layer_says_what_is_wrong_with_its_own():
    recipe = replace(FAST, control=ByLayer((("0", Hold()), ("*", Budget(share=0.5, min_rank=2)))))
    with pytest.warns(UserWarning, match="share=0.5: no rank will ever move") as told:
        start(factorize_(dense(), {"0": 24, "2": 8, "4": 4}), recipe)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start(factorize_(dense(), {"0": 4, "2": 22, "4": 9}), recipe)


def test_rules_that_all_hold_open_no_window():
    model = net()
    optimizer, adapter = start(model, replace(FAST, control=ByLayer((("0", Hold()), ("*", Hold())))))
    assert train(model, optimizer, adapter, 0, 7) == [] and adapter.observer is None


def test_a_length_of_the_run_in_numpys_numbers_can_be_saved():
    model = net()
    state = start(model, total=np.int64(60))[1].state_dict()
    assert type(state["total_steps"]) is int
