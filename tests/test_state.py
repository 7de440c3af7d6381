"""Laws of `alr.state`: the first moment is the one that the new basis would have gathered; a layer goes on training,
and under `Stale` it does not."""

import pytest
import torch
from torch import nn

from alr import LowRankLinear, PairOptimizer, RankAdapter, Recipe
from alr.factor import change_of_basis
from alr.history.resize import SvdFull
from alr.resize import SvdCore
from alr.state import Reset, Slice, Stale, Swap, Transport

close = torch.testing.assert_close


def one_layer(dtype=torch.double, m=24, n=18, r=8):
    torch.manual_seed(0)
    return nn.Sequential(LowRankLinear(n, m, r, bias=False, dtype=dtype), nn.Tanh(), nn.Linear(m, 3, dtype=dtype))


def make(name, model, lr=1e-3):
    params = list(model.parameters())
    return {"adam": lambda: torch.optim.Adam(params, lr), "adamw": lambda: torch.optim.AdamW(params, lr),
            "amsgrad": lambda: torch.optim.Adam(params, lr, amsgrad=True),
            "sgd": lambda: torch.optim.SGD(params, lr, momentum=0.9), "plain sgd": lambda: torch.optim.SGD(params, lr),
            "nadam": lambda: torch.optim.NAdam(params, lr)}[name]()


def train(model, optimizer, steps, seed=0):
    g = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        model.zero_grad()
        x = torch.randn(16, 18, generator=g).to(dtype)
        (model(x) - 1).square().mean().backward()
        optimizer.step()


def gathered(U, V, gradients, make_optimizer):
    """An optimizer that has seen this sequence of gradients of W at factors (U, V), with a learning rate of 0."""
    U, V = nn.Parameter(U.clone()), nn.Parameter(V.clone())
    optimizer = make_optimizer([U, V])
    for G in gradients:
        U.grad, V.grad = G @ V.detach().mT, U.detach().mT @ G
        optimizer.step()
    return optimizer, U, V


@pytest.mark.parametrize("k", [3, 8, 11])
@pytest.mark.parametrize("resize", [SvdCore(), SvdFull(eps=0.0)])
@pytest.mark.parametrize("key, make_optimizer", [
    ("exp_avg", lambda p: torch.optim.Adam(p, lr=0.0)),
    ("momentum_buffer", lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9))])
def test_first_moment_is_the_one_gathered_in_the_new_basis(k, resize, key, make_optimizer):
    torch.manual_seed(0)
    U, V = torch.randn(24, 8, dtype=torch.double), torch.randn(8, 18, dtype=torch.double)
    gradients = torch.randn(40, 24, 18, dtype=torch.double)
    U2, V2 = resize(U, V, k)[:2]
    optimizer, pu, pv = gathered(U, V, gradients, make_optimizer)
    new_u, new_v = nn.Parameter(U2), nn.Parameter(V2)
    Transport()([optimizer], [Swap(pu, pv, new_u, new_v)])
    truth, tu, tv = gathered(U2, V2, gradients, make_optimizer)
    old = min(k, 8)                                                     # of grown directions the past says nothing
    close(optimizer.state[new_u][key][:, :old], truth.state[tu][key][:, :old], atol=1e-10, rtol=1e-8)
    close(optimizer.state[new_v][key][:old], truth.state[tv][key][:old], atol=1e-10, rtol=1e-8)
    close(optimizer.state[new_u][key][:, old:], torch.zeros(24, k - old, dtype=torch.double), atol=1e-6, rtol=0)


def test_second_moment_is_closer_than_rotating_it_or_slicing_it():
    """No diagonal survives a rotation; LDAdam's form is the best of the three on noisy gradients with a mean."""
    torch.manual_seed(0)
    U, V = torch.randn(24, 8, dtype=torch.double), torch.randn(8, 18, dtype=torch.double)
    gradients = torch.randn(24, 18, dtype=torch.double) + 0.5 * torch.randn(400, 24, 18, dtype=torch.double)
    U2, V2 = SvdCore()(U, V, 5)[:2]
    adam = lambda p: torch.optim.Adam(p, lr=0.0, betas=(0.9, 0.99))     # noqa: E731
    optimizer, pu, pv = gathered(U, V, gradients, adam)
    before = optimizer.state[pu]["exp_avg_sq"].clone()
    new_u, new_v = nn.Parameter(U2), nn.Parameter(V2)
    Transport()([optimizer], [Swap(pu, pv, new_u, new_v)])
    truth, tu, _ = gathered(U2, V2, gradients, adam)
    true = truth.state[tu]["exp_avg_sq"]
    T_U = change_of_basis(U, V, U2, V2)[0]
    ours = (optimizer.state[new_u]["exp_avg_sq"] - true).norm()
    assert ours < 0.5 * (before @ T_U.square() - true).norm() and ours < 0.5 * (before[:, :5] - true).norm()
    assert (optimizer.state[new_u]["exp_avg_sq"] >= 0).all()


def test_the_same_factors_carry_everything_unchanged():
    torch.manual_seed(0)
    U, V = torch.randn(24, 8, dtype=torch.double), torch.randn(8, 18, dtype=torch.double)
    optimizer, pu, pv = gathered(U, V, torch.randn(20, 24, 18, dtype=torch.double), torch.optim.AdamW)
    U, V = pu.detach().clone(), pv.detach().clone()
    before = {k: v.clone() for k, v in optimizer.state[pu].items()}
    new_u, new_v = nn.Parameter(U), nn.Parameter(V)
    Transport()([optimizer], [Swap(pu, pv, new_u, new_v)])
    close(optimizer.state[new_u], before, atol=1e-9, rtol=1e-6)


def test_grown_directions_start_with_a_mean_second_moment():
    torch.manual_seed(0)
    U, V = torch.randn(24, 8, dtype=torch.double), torch.randn(8, 18, dtype=torch.double)
    optimizer, pu, pv = gathered(U, V, torch.randn(20, 24, 18, dtype=torch.double), torch.optim.Adam)
    U2, V2 = SvdCore()(pu.detach(), pv.detach(), 11)[:2]
    new_u, new_v = nn.Parameter(U2), nn.Parameter(V2)
    Transport()([optimizer], [Swap(pu, pv, new_u, new_v)])
    v = optimizer.state[new_u]["exp_avg_sq"]
    close(v[:, 8:], v[:, :8].mean(1, keepdim=True).expand(24, 3))
    assert (v[:, 8:] > 0).all()


@pytest.mark.parametrize("optimizer_name", ["adam", "adamw", "amsgrad", "sgd", "plain sgd", "nadam"])
@pytest.mark.parametrize("state", [Transport(), Transport(first=False), Slice(), Reset(everything=True),
                                   Reset(everything=False)])
@pytest.mark.parametrize("k", [4, 8, 12])
def test_after_a_resize_the_layer_still_trains(optimizer_name, state, k):
    model = one_layer()
    optimizer = make(optimizer_name, model)
    adapter = RankAdapter(model, optimizer, Recipe("test", state=state))
    train(model, optimizer, 5)
    adapter.resize({"0": k})
    U, W = model[0].U.detach().clone(), model[0].weight.detach().clone()
    train(model, optimizer, 3)
    assert (model[0].U - U).abs().max() > 0 and (model[0].weight - W).norm() > 1e-6
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    optimizer.load_state_dict(optimizer.state_dict())                   # torch 42428: no key is lost


def test_under_stale_the_layer_never_moves_again():
    """History (scripts v3 to v6, v7.1 to v7.3, v9): the optimizer is not told, the layer is frozen."""
    model = one_layer()
    optimizer = make("adam", model)
    adapter = RankAdapter(model, optimizer, Recipe("test", state=Stale()))
    train(model, optimizer, 5)
    adapter.resize({"0": 5})
    W, head = model[0].weight.detach().clone(), model[2].weight.detach().clone()
    train(model, optimizer, 20)
    assert torch.equal(model[0].weight, W) and not torch.equal(model[2].weight, head)


def test_reset_of_everything_forgets_every_parameter_and_of_the_layer_only_its_own():
    for everything, left in ((True, 0), (False, 2)):
        model = one_layer()
        optimizer = make("adam", model)
        adapter = RankAdapter(model, optimizer, Recipe("test", state=Reset(everything)))
        train(model, optimizer, 5)
        assert len(optimizer.state) == 4
        adapter.resize({"0": 5})
        assert len(optimizer.state) == left


def test_other_optimizers_are_refused_by_name():
    model = one_layer()
    for optimizer in (torch.optim.LBFGS(model.parameters()), torch.optim.Adagrad(model.parameters()),
                      torch.optim.Adafactor(model.parameters())):
        with pytest.raises(TypeError, match=type(optimizer).__name__):          # a recipe that holds asks at the first change
            RankAdapter(model, optimizer, Recipe("test", state=Transport())).resize({"0": 2})
        if not isinstance(optimizer, torch.optim.LBFGS):
            RankAdapter(model, optimizer, Recipe("test", state=Reset()))
    with pytest.raises(TypeError, match="LBFGS keeps one flat history"):
        RankAdapter(model, torch.optim.LBFGS(model.parameters()), Recipe("test", state=Reset())).resize({"0": 2})


def test_an_optimizer_made_too_early_is_noticed_at_once():
    with pytest.raises(ValueError, match="no optimizer holds the factors of '0'"):
        RankAdapter(one_layer(), torch.optim.Adam(nn.Linear(2, 2).parameters()), Recipe("test"))


def test_two_optimizers_share_a_model():
    model = one_layer()
    a = torch.optim.Adam(model[2].parameters())
    b = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    adapter = RankAdapter(model, [a, b], Recipe("test"))
    train(model, b, 3)
    adapter.resize({"0": 5})
    assert b.param_groups[0]["params"][0] is model[0].U and b.state[model[0].U]["momentum_buffer"].shape == (24, 5)


def test_slicing_is_not_transport_and_zeroing_zeroes_the_first_moment_alone():
    torch.manual_seed(0)
    U, V = torch.randn(24, 8, dtype=torch.double), torch.randn(8, 18, dtype=torch.double)
    gradients = torch.randn(40, 24, 18, dtype=torch.double)
    U2, V2 = SvdCore()(U, V, 5)[:2]
    truth, tu, _ = gathered(U2, V2, gradients, torch.optim.Adam)
    true = truth.state[tu]["exp_avg"].flatten()
    got = {}
    for policy in (Transport(), Slice(), Transport(first=False), Transport(count=False)):
        optimizer, pu, pv = gathered(U, V, gradients, lambda p: torch.optim.Adam(p, lr=0.0))
        new_u, new_v = nn.Parameter(U2), nn.Parameter(V2)
        policy([optimizer], [Swap(pu, pv, new_u, new_v)])
        got[policy] = optimizer.state[new_u]
    cos = torch.nn.functional.cosine_similarity
    assert abs(cos(got[Slice()]["exp_avg"].flatten(), true, 0)) < 0.5
    assert (got[Transport(first=False)]["exp_avg"] == 0).all()
    close(got[Transport(first=False)]["exp_avg_sq"], got[Transport()]["exp_avg_sq"])
    for key in ("exp_avg", "exp_avg_sq"):
        close(got[Transport(count=False)][key], got[Transport()][key])
    assert got[Transport(count=False)]["step"] == 0 and got[Transport()]["step"] == len(gradients)


@pytest.mark.parametrize("name", ["sgd", "plain sgd"])
def test_an_optimizer_that_counts_nothing_cannot_have_its_counter_set_back(name):
    model = one_layer()
    with pytest.raises(TypeError, match="corrects no averages"):
        RankAdapter(model, make(name, model), Recipe("test", state=Transport(count=False))).resize({"0": 2})
    pairs = PairOptimizer(model)
    with pytest.raises(TypeError, match="PairOptimizer"):
        RankAdapter(model, pairs, Recipe("test", state=Transport(count=False))).resize({"0": 2})
