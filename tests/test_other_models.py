"""Models and inputs of other kinds than the book's: each is answered, or refused by name with what to write."""

import contextlib
import copy
import warnings
from collections import UserDict
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import alr
from alr.linear import factorize_, low_rank_layers
from alr.observe import Observer

FAST = replace(alr.recipes.alr, every=8)


def net(rank=0.9, d=48):
    torch.manual_seed(0)
    return factorize_(nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d), nn.ReLU(), nn.Linear(d, 24)), rank=rank)


def batch(i, d=48):
    x = torch.randn(32, d, generator=torch.Generator().manual_seed(i))
    return x, x[:, :24].argmax(1)


def start(model, total=60, recipe=FAST):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    return optimizer, alr.RankAdapter(model, optimizer, recipe, total_steps=total)


def train(model, optimizer, adapter, begin, end, loss=None):
    events = []
    for i in range(begin, end):
        (loss(i) if loss else F.cross_entropy(model(batch(i)[0]), batch(i)[1])).backward()
        optimizer.step()
        events += adapter.step()
        optimizer.zero_grad()
    return events


def seen_in(model, loss, steps=4, needs=("importance", "weight_gradient")):
    """What an observer sees of the losses `loss(0)`, `loss(1)`, ..."""
    observer = Observer(low_rank_layers(model), needs, steps)
    for i in range(steps):
        model.zero_grad()
        loss(i).backward()
        observer.commit()
    return observer.close()


def alike(a, b, **bounds):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].steps == b[name].steps and a[name].rows == b[name].rows
        for key in ("importance", "weight_gradient"):
            torch.testing.assert_close(getattr(a[name], key), getattr(b[name], key), **bounds)


# ------------------------------------------------------------------------------------------------ what a window sees

@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0)])
def test_an_empty_batch_is_no_batch(shape):
    def loss(model, i, empty):
        value = F.cross_entropy(model(batch(i)[0]), batch(i)[1], reduction="sum")
        return value + model(torch.zeros(*shape, 48)).sum() if empty else value
    a, b = net(), net()
    alike(seen_in(a, lambda i: loss(a, i, True)), seen_in(b, lambda i: loss(b, i, False)))
    model = net()                                                   # whole steps of it, in both halves of the window
    optimizer, adapter = start(model)
    events = train(model, optimizer, adapter, 0, 24, lambda i: F.cross_entropy(
        model(batch(i)[0][i % 3 == 0 and 32:]), batch(i)[1][i % 3 == 0 and 32:], reduction="sum"))
    assert events and all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wide, factor", [(torch.float32, 1e5), (torch.float64, 1e25)])
def test_the_default_dtype_is_no_part_of_what_is_seen(default, wide, factor):
    def loss(model, i):
        return factor * F.cross_entropy(model(batches[i][0].to(wide)), batches[i][1])
    batches, a, b = [batch(i) for i in range(4)], net().to(wide), net().to(wide)
    try:
        torch.set_default_dtype(default)
        seen = seen_in(a, lambda i: loss(a, i))
    finally:
        torch.set_default_dtype(torch.float32)
    alike(seen, seen_in(b, lambda i: loss(b, i)))
    assert seen["0"].steps == 4 and seen["0"].importance[0] > 0


@pytest.mark.parametrize("at", [5, 7])                              # in both halves of the window
@pytest.mark.parametrize("before, since", [({"0"}, set()), (set(), {"0"}), ({"0"}, {"2"}), ({"0", "2", "4"}, set()),
                                           (set(), {"0", "2", "4"})])
def test_going_on_in_a_window_with_other_layers_frozen(at, before, since):
    def built(frozen):
        model = net()
        for name in frozen:
            model[int(name)].U.requires_grad_(False)
            model[int(name)].V.requires_grad_(False)
        return model, *start(model)
    model, optimizer, adapter = built(before)
    train(model, optimizer, adapter, 0, at)
    saved = copy.deepcopy((model.state_dict(), adapter.state_dict()))
    model, optimizer, adapter = built(since)
    model.load_state_dict(saved[0])
    adapter.load_state_dict(saved[1])
    events = train(model, optimizer, adapter, at, 16)
    assert not {e.layer for e in events} & since
    assert not {e.layer for e in events if e.step == 8} & before     # of these the window has no book
    adapter.close()
    assert not any("op" in layer.__dict__ for layer in low_rank_layers(model).values())


# ------------------------------------------------------------------------------------------------ suggest_ranks

def dense(d=48):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, 24))


class Labelled(nn.Module):
    """As transformers' models: keyword arguments in, .loss out."""

    def __init__(self):
        super().__init__()
        self.net = dense()

    def forward(self, x, labels=None):
        logits = self.net(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return type("Output", (), {"loss": loss, "logits": logits})()


def test_suggest_takes_what_collators_return_wherever_it_is_called():
    batches = [{"x": batch(i)[0], "labels": batch(i)[1]} for i in range(4)]
    found = alr.suggest_ranks(Labelled(), batches, share=0.5)
    for around in (contextlib.nullcontext, torch.no_grad, torch.inference_mode):
        with around():
            other = alr.suggest_ranks(Labelled(), map(UserDict, batches), share=0.5)
        assert other.ranks == found.ranks
        model = factorize_(Labelled(), other.ranks, init=other.init)
        model(*batch(0)).loss.backward()


def test_suggest_takes_probabilities_and_models_with_whole_numbers():
    model = dense()
    model.register_parameter("table", nn.Parameter(torch.arange(3), requires_grad=False))
    hard = alr.suggest_ranks(model, [batch(i) for i in range(4)], share=0.5)
    soft = alr.suggest_ranks(model, [(x, F.one_hot(y, 24).float()) for x, y in map(batch, range(4))], share=0.5)
    column = alr.suggest_ranks(model, [(x, y[:, None]) for x, y in map(batch, range(4))], share=0.5)
    assert hard.ranks == soft.ranks == column.ranks


@pytest.mark.parametrize("make, batched, words", [
    (Labelled, lambda x, y: {"x": x}, "no .loss for a batch of x; is the label missing.*loss="),
    (Labelled, lambda x, y: (x, y), "the model gives Output.*loss="),
    (dense, lambda x, y: (x, y, y), "a batch is a tuple of Tensor, Tensor, Tensor.*loss="),
    (dense, lambda x, y: x, "a batch is a Tensor.*loss="),
    (dense, lambda x, y: (x, x[:, :24]), "targets are torch.float32 of shape .32, 24.*loss="),
    (dense, lambda x, y: (x, x[:, 0]), "targets are torch.float32 of shape .32,.*loss="),
    (dense, lambda x, y: (x, y[:30]), "targets are torch.int64 of shape .30,.*loss="),
    (lambda: nn.Sequential(dense(), nn.Linear(24, 1)), lambda x, y: (x, x[:, :1].abs() * 0 + 1), "of two classes or more"),
])
def test_suggest_says_what_a_batch_should_be(make, batched, words):
    with pytest.raises(ValueError, match=f"suggest_ranks: .*{words}"):
        alr.suggest_ranks(make(), [batched(*batch(i)) for i in range(2)], share=0.5)


@pytest.mark.parametrize("loss, words", [
    (lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"), "a tensor of shape .32,."),
    (lambda m, b: F.cross_entropy(m(b[0]), b[1]).detach(), "a number without a gradient"),
    (lambda m, b: F.cross_entropy(m(b[0]), b[1]).item(), "float; wanted one number"),
])
def test_suggest_says_what_a_loss_should_be(loss, words):
    with pytest.raises(ValueError, match=f"suggest_ranks: the loss of a batch is .*{words}"):
        alr.suggest_ranks(dense(), [batch(i) for i in range(2)], share=0.5, loss=loss)


# ------------------------------------------------------------------------------------------------ models

def test_an_offloaded_model_is_refused_and_can_be_brought_back():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = accelerate.cpu_offload(dense())
    calls = {"factorize_": lambda: factorize_(model, 4), "PairOptimizer": lambda: alr.PairOptimizer(model),
             "suggest_ranks": lambda: alr.suggest_ranks(model, [batch(0), batch(1)], 0.5)}
    for who, call in calls.items():
        with pytest.raises(ValueError, match=f"{who}: accelerate keeps the weights of Linear .at '0'. elsewhere .*"
                                             "remove_hook_from_submodules"):
            call()
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(factorize_(model, 24)[0].weight.isfinite().all(), torch.tensor(True))
    model(batch(0)[0])


def test_inference_mode_makes_no_parameters_that_cannot_be_trained():
    model, low = dense(), net(rank=8)
    optimizer = alr.PairOptimizer(low)
    adapter = alr.RankAdapter(low, optimizer, alr.recipes.uniform)
    average, other = copy.deepcopy(low), net(rank=6)
    calls = [lambda: factorize_(model, 4), lambda: alr.factorize_like_(dense(), low.state_dict()), lambda: alr.densify_(low),
             lambda: low.load_state_dict(other.state_dict()), lambda: alr.PairOptimizer(low),
             lambda: adapter.resize({"0": 5}), lambda: alr.integrations.follow_ranks_(average, other)]
    for call in calls:
        with torch.inference_mode(), pytest.raises(RuntimeError, match="cannot be trained.*outside of torch.inference_mode"):
            call()
    with torch.inference_mode():
        low.load_state_dict(average.state_dict())                   # of the same rank: written in place
        low(batch(0)[0])
    assert adapter.ranks == {"0": 8, "2": 8, "4": 8} and not low_rank_layers(model)
    train(low, optimizer, adapter, 0, 2)


def test_layers_of_complex_or_whole_numbers_stay_dense_and_are_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, dtype=torch.cfloat), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = nn.Parameter(model[2].weight.to(torch.int8), requires_grad=False)
    model[3].to(torch.float8_e4m3fn)
    with pytest.warns(UserWarning, match="1 Linear of complex64, 1 Linear of float8_e4m3fn, 1 Linear of int8.$"):
        factorize_(model, rank=2)
    assert list(low_rank_layers(model)) == ["0"]
    with pytest.raises(ValueError, match="no linear layer matched.*1 Linear of complex64"):
        factorize_(nn.Sequential(model[1]), rank=2)
    for make in (lambda: alr.LowRankLinear(8, 8, 2, dtype=torch.cfloat), lambda: alr.LowRankLinear.from_linear(model[1], 2)):
        with pytest.raises(ValueError, match="a weight of torch.complex64; wanted float16"):
            make()
    turned = net().to(torch.cfloat)
    with pytest.raises(ValueError, match="pair 0 .* is complex"):
        alr.PairOptimizer(turned)
    adapter = alr.RankAdapter(turned, torch.optim.AdamW(turned.parameters()), alr.recipes.uniform)
    with pytest.raises(TypeError, match="a factor is torch.complex64"):
        adapter.resize({"0": 3})


# ------------------------------------------------------------------------------------------------ passes that train nothing

def saliency(model, x):
    torch.autograd.grad(model(x.requires_grad_()).sum(), x)


def of_another_layer(model, x):
    torch.autograd.grad(model(x).sum(), model[4].bias)


def all_at_once(model, x):
    y = model(x[:2])
    torch.autograd.grad(y, model[0].U, torch.eye(24)[:, None].expand(-1, 2, -1), is_grads_batched=True)


def jacobian(model, x):
    torch.autograd.functional.jacobian(model, x[:2], vectorize=True)


def forwards(model, x):
    with torch.autograd.forward_ad.dual_level():
        model(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("extra", [saliency, of_another_layer, all_at_once, jacobian, forwards])
def test_a_pass_that_trains_nothing_is_not_seen(extra):
    def loss(model, i, extra=None):
        if extra:
            extra(model, batch(i + 50)[0])
        return F.cross_entropy(model(batch(i)[0]), batch(i)[1])
    a, b = net(), net()
    alike(seen_in(a, lambda i: loss(a, i, extra)), seen_in(b, lambda i: loss(b, i)), rtol=0, atol=0)


def test_gradients_asked_for_by_name_are_seen():
    a, b = net(), net()
    def by_hand(i):
        value = F.cross_entropy(a(batch(i)[0]), batch(i)[1])
        params = list(a.parameters())
        for p, g in zip(params, torch.autograd.grad(value, params)):
            p.grad = g
    observer = Observer(low_rank_layers(a), ("importance", "weight_gradient"), 4)
    for i in range(4):
        by_hand(i)
        observer.commit()
    alike(observer.close(), seen_in(b, lambda i: F.cross_entropy(b(batch(i)[0]), batch(i)[1])), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ nested, scripted

@pytest.mark.parametrize("per", ["row", "example"])
def test_examples_of_different_lengths_are_seen_as_they_are(per):
    lengths = (3, 7, 1, 5)
    def parts(i):
        return [batch(i)[0][:n] + j for j, n in enumerate(lengths)]
    def seen(passed, steps=4):
        model = net()
        observer = Observer(low_rank_layers(model), ("importance", "weight_gradient"), steps, per)
        for i in range(steps):
            model.zero_grad()
            passed(model, parts(i))
            observer.commit()
        return observer.close(), [book.total["count"].tolist() for book in observer.books.values()]
    def jagged(model, parts):
        model(torch.nested.nested_tensor(parts, layout=torch.jagged)).values().sin().sum().backward()
    def one_by_one(model, parts):
        sum(model(x[None]).sin().sum() for x in parts).backward()
    (a, count), (b, same) = seen(jagged), seen(one_by_one)
    assert count == same == [[2.0 * sum(lengths), 2.0 * len(lengths)]] * 3
    for name in a:
        assert a[name].rows == b[name].rows
        torch.testing.assert_close(a[name].importance, b[name].importance, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(a[name].weight_gradient, b[name].weight_gradient, rtol=1e-4, atol=1e-5)


def test_a_model_can_be_scripted_at_rest_and_says_what_to_do_in_a_window():
    model = net()
    optimizer, adapter = start(model)
    x = batch(0)[0]
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
    train(model, optimizer, adapter, 0, 5)
    with pytest.raises(RuntimeError, match="cannot be scripted.*script copy.deepcopy.model., or call adapter.close"):
        torch.jit.script(model)
    torch.testing.assert_close(torch.jit.script(copy.deepcopy(model))(x), model(x))
    adapter.close()
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


# ------------------------------------------------------------------------------------------------ advice that leads somewhere

def test_an_optimizer_that_cannot_follow_a_rank_serves_a_recipe_that_holds_them():
    model = net(rank=8)
    optimizer = torch.optim.LBFGS(model.parameters())
    adapter = alr.RankAdapter(model, optimizer, alr.recipes.uniform)
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch(0)[0]), batch(0)[1])
        loss.backward()
        return loss
    optimizer.step(closure)
    assert adapter.step() == []
    with pytest.raises(TypeError, match="LBFGS keeps state"):
        adapter.resize({"0": 4})


@pytest.mark.parametrize("give, words", [
    (lambda m: [{"params": m.parameters()}], 'a group of them is {"pairs": .*optimizers=.alr.PairOptimizer.model., None.'),
    (lambda m: m.named_parameters(), "params are single Parameters, which nobody can pair; give the model"),
    (lambda m: dense(), "no pairs; call alr.factorize_"),
])
def test_what_an_optimizer_of_pairs_should_be_given(give, words):
    with pytest.raises(ValueError, match=f"PairOptimizer: .*{words}"):
        alr.PairOptimizer(give(net()))


def test_a_weight_that_is_two_factors_cannot_be_tied():
    emb, model = nn.Embedding(24, 48), net()
    with pytest.raises(ValueError, match="its weight is U @ V, which cannot be set or shared.*where="):
        model[4].weight = emb.weight
    assert model[4].rank > 0 and "weight" not in model[4]._parameters


def test_a_second_adapter_is_said_and_the_first_keeps_quiet():
    model = net()
    optimizer, first = start(model)
    with pytest.warns(UserWarning, match="another RankAdapter hears the same.*'0' is the first.*close.. of the older"):
        second = alr.RankAdapter(model, optimizer, FAST, total_steps=60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, second, 0, 12)
        first.close()
        second.close()
        a, b = (alr.RankAdapter(model, optimizer, replace(FAST, where=(name,)), total_steps=60) for name in "02")


def test_an_average_that_is_no_module_is_refused():
    with pytest.raises(TypeError, match="follow_ranks_: the average is list; wanted a module"):
        alr.integrations.follow_ranks_([p.clone() for p in net().parameters()], net())


def test_a_rank_may_be_a_tensor_of_one_number():
    assert factorize_(dense(), torch.tensor(4))[0].rank == factorize_(dense(), {"0": torch.tensor([4])[0]})[0].rank == 4
    assert factorize_(dense(), torch.tensor(0.5))[0].rank == factorize_(dense(), 0.5)[0].rank
    for rank in (torch.tensor([4, 4]), torch.tensor(True)):
        with pytest.raises((ValueError, TypeError), match="rank"):
            factorize_(dense(), rank)


# ------------------------------------------------------------------------------------------------ kept, or refused

def test_attributes_and_hooks_of_a_layer_go_along():
    model, seen = dense(), []
    model[0].weight.no_weight_decay, model[0].group = True, "trunk"
    model[0].weight.register_hook(lambda g: seen.append(tuple(g.shape)))
    factorize_(model, rank=4)
    assert model[0].U.no_weight_decay is model[0].V.no_weight_decay is True and model[0].group == "trunk"
    assert not hasattr(model[2].U, "no_weight_decay") and (model[0].in_features, model[0].out_features) == (48, 48)
    model(batch(0)[0]).sum().backward()
    assert sorted(seen) == [(4, 48), (48, 4)]


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_are_refused_by_name(kind):
    model = nn.ModuleDict({"wte": kind(10, 8, sparse=True), "fc": nn.Linear(8, 8)})
    factorize_(model, rank=2)
    with pytest.raises(ValueError, match="PairOptimizer: 'wte' has sparse gradients.*sparse=False"):
        alr.PairOptimizer(model)
    optimizer = alr.PairOptimizer([{"pairs": alr.optim.pairs(model)}, {"params": model["wte"].parameters()}])
    model["fc"](model["wte"](torch.zeros(3, 1, dtype=torch.long))).sum().backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="the parameter of shape .10, 8. is sparse.*sparse=False"):
        optimizer.step()
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


def test_a_model_may_be_widened_on_the_way():
    model = net()
    optimizer = alr.PairOptimizer(model)
    adapter = alr.RankAdapter(model, optimizer, FAST, total_steps=60)
    train(model, optimizer, adapter, 0, 3)
    model.double()
    train(model, optimizer, adapter, 3, 12, lambda i: F.cross_entropy(model(batch(i)[0].double()), batch(i)[1]))
    assert all(p.dtype == torch.float64 and p.isfinite().all() for p in model.parameters())
    assert optimizer.state[model[0].bias]["exp_avg"].dtype == torch.float64


# ------------------------------------------------------------------------------------------------ alr.train

def test_a_warm_up_as_long_as_the_run_is_said():
    from alr.lab import Config
    short = dict(epochs=1, steps_per_epoch=4)
    assert Config(warmup_steps=100, **short).unread() == ["{warmup_steps} 100 in a run of 4 steps: {lr} is never reached."]
    assert Config(warmup_steps=4, schedule="cosine", **short).unread() == [
        "{warmup_steps} 4 in a run of 4 steps: the cosine never begins."]
    assert Config(warmup_steps=4, **short).unread() == Config(warmup_steps=3, schedule="cosine", **short).unread() == []


def test_a_dense_run_has_no_pairs_to_step():
    from alr.lab.config import Config, SettingError
    from alr.lab.run import prepare
    with pytest.raises(SettingError, match="optimizer tangent steps pairs of factors, and recipe dense has none"):
        prepare(Config(recipe="dense", optimizer="tangent"))
