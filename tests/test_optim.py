"""The optimizer for pairs of factors: the fast whitening against the obvious one, its bound, its life with ranks."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import alr
from alr.linear import factorize_, low_rank_layers
from alr.optim import PairOptimizer, pairs
from alr.resize import SvdCore
from alr.rules import LoRAMuon, Spectron, orthogonalize, whitener
from alr.state import Reset, Slice, Swap, Transport
from alr.tangent import LoRATSD, Tangent

from bits import same


def net(rank=4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 5))
    return factorize_(model, rank=lambda name, linear: rank + 1 if name == "2" else rank)


def grads(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    model.zero_grad()
    model(torch.randn(32, 12, generator=g)).square().mean().backward()


@pytest.mark.parametrize("shape", [(3, 40, 7), (40, 40), (2, 64, 1)])
def test_whitener_is_the_obvious_iteration(shape):
    X = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(X @ whitener(X.mT @ X), orthogonalize(X), atol=2e-5, rtol=1e-4)


def test_orthogonalized_values_lie_around_one():
    X = torch.randn(64, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    s = torch.linalg.svdvals(orthogonalize(X))
    assert 0.6 < s.min() and s.max() < 1.3


def test_padding_and_batching_change_nothing():
    together, alone = net(), net()
    grads(together), grads(alone)
    PairOptimizer(pairs(together), lr=0.1).step()
    for pair in pairs(alone):
        PairOptimizer([pair], lr=0.1).step()
    for a, b in zip(together.parameters(), alone.parameters()):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rule", [Tangent(), Spectron()], ids=repr)
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("rank", [1, 4, 11])
def test_a_step_moves_the_product_by_at_most_lr(scale, rank, rule):
    torch.manual_seed(1)
    layer = alr.LowRankLinear(12, 20, rank, bias=False)
    with torch.no_grad():
        layer.U.mul_(scale)
    optimizer = PairOptimizer([(layer.U, layer.V)], lr=0.05, rule=rule)
    for _ in range(5):
        before = layer.weight.detach().clone()
        layer.zero_grad()
        layer(torch.randn(16, 12)).pow(2).mean().backward()
        optimizer.step()
        moved = torch.linalg.matrix_norm(layer.weight.detach() - before, 2)
        assert 0 < moved <= 0.05 * 1.25 * (20 / 12) ** 0.5          # orthogonalised: at most about 1.2; shape scale
    if scale < 1 or rule == Tangent():  # tiny factors turn faster than one iteration a step follows; + 1 bounds them
        return
    sigma = torch.linalg.matrix_norm(layer.U.detach(), 2)
    direction = optimizer.state[layer.U]["direction"]
    assert torch.linalg.vector_norm(layer.U.detach().mT @ direction) > 0.9 * sigma


@pytest.mark.parametrize("rule, left", [(Tangent(), 1 - 0.1 * 0.1), (Spectron(), (1 - 0.1 * 0.1 / 2) ** 2)])
def test_decay_shrinks_the_product(rule, left):
    model = net()
    W = low_rank_layers(model)["0"].weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    PairOptimizer(pairs(model), lr=0.1, weight_decay=0.1, rule=rule).step()
    torch.testing.assert_close(low_rank_layers(model)["0"].weight, W * left)


@pytest.mark.parametrize("policy", [Transport(), Slice(), Reset(everything=False), Reset(everything=True)])
@pytest.mark.parametrize("k", [2, 7])
def test_it_lives_through_a_change_of_rank(policy, k):
    model = net()
    optimizer = PairOptimizer(model, lr=0.05)
    adapter = alr.RankAdapter(model, optimizer, replace(alr.recipes.alr, rank=4, state=policy), total_steps=100)
    for i in range(6):
        grads(model, i)
        optimizer.step()
        if i == 2:
            adapter.resize({"0": k, "4": 3})
    assert low_rank_layers(model)["0"].rank == k
    assert all(torch.isfinite(p).all() for p in model.parameters())
    held = [p for g in optimizer.param_groups for p in g["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}


def test_transport_carries_momentum_of_the_product():
    # g_U' = g_U T_U: the momentum in the new basis is the one that the new factors would have gathered
    model = net()
    layer = low_rank_layers(model)["0"]
    optimizer = PairOptimizer(pairs(model), lr=1e-9, rule=Spectron())
    grads(model)
    optimizer.step()
    U, V = layer.U, layer.V
    fresh = copy.deepcopy(model)
    U2, V2 = (nn.Parameter(x) for x in SvdCore()(U.detach(), V.detach(), 4)[:2])            # the same W in another basis
    other = low_rank_layers(fresh)["0"]
    other.U, other.V = nn.Parameter(U2.detach().clone()), nn.Parameter(V2.detach().clone())
    grads(fresh)
    Transport()([optimizer], [Swap(U, V, U2, V2)])
    torch.testing.assert_close(optimizer.state[U2]["momentum_buffer"], 0.05 * other.U.grad, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(optimizer.state[V2]["momentum_buffer"], 0.05 * other.V.grad, atol=1e-6, rtol=1e-3)


def test_what_is_no_pair_is_refused():
    with pytest.raises(ValueError, match="no pairs"):
        PairOptimizer([])
    with pytest.raises(ValueError, match="no factors of one matrix"):
        PairOptimizer([(nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(3, 4)))])


def test_saved_and_loaded_it_goes_on_the_same():
    a = net()
    optimizer = PairOptimizer(pairs(a), lr=0.05)
    grads(a)
    optimizer.step()
    b = copy.deepcopy(a)
    other = PairOptimizer(pairs(b), lr=0.05)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, o in ((a, optimizer), (b, other)):
        grads(model, 1)
        o.step()
    for p, q in zip(a.parameters(), b.parameters()):
        assert torch.equal(p, q)


def test_a_pair_that_is_frozen_at_first_is_stepped_as_a_pair_once_it_is_not():
    a, b = net(), net()
    for p in (low_rank_layers(a)["0"].U, low_rank_layers(a)["0"].V):
        p.requires_grad_(False)
    late, early = PairOptimizer(a), PairOptimizer(b)
    for p in a.parameters():
        p.requires_grad_(True)
    for model, optimizer in ((a, late), (b, early)):
        grads(model)
        optimizer.step()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_state_of_another_optimizer_is_refused_before_anything_is_loaded():
    model = net()
    optimizer = PairOptimizer(pairs(model))
    before = copy.deepcopy(optimizer.state_dict())
    other = torch.optim.AdamW([p for pair in pairs(model) for p in pair], 0.5)
    with pytest.raises(ValueError, match="the state has groups of the kinds .None., .*it is of another optimizer"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


@pytest.mark.parametrize("make", [
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=[0.03, 0.01], total_steps=12),
    lambda o: torch.optim.lr_scheduler.CyclicLR(o, base_lr=[0.01, 0.003], max_lr=[0.03, 0.01], step_size_up=4),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12),
    lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
])
def test_schedulers_move_the_rates_of_both_kinds_of_groups(make):
    model = net()
    optimizer = PairOptimizer(model, lr=0.03, rest_lr=0.01)
    scheduler, rates = make(optimizer), []
    for i in range(8):
        grads(model, i)
        optimizer.step()
        scheduler.step()
        rates.append(tuple(group["lr"] for group in optimizer.param_groups))
    assert len(set(rates)) > 4 and all(abs(a / b - 3) < 0.35 for a, b in rates)
    assert all(p.isfinite().all() for p in model.parameters())


RULES = [Tangent(), Spectron(), LoRAMuon(), LoRATSD()]


@pytest.mark.parametrize("named", [True, False], ids=["", "of before rules were named"])
@pytest.mark.parametrize("mine", RULES, ids=repr)
@pytest.mark.parametrize("theirs", RULES, ids=repr)
def test_the_state_of_another_rule_is_refused_before_anything_is_loaded_or_goes_on(theirs, mine, named):
    model, other = net(), net()
    optimizer, saved = PairOptimizer(model, lr=0.05, rule=mine), PairOptimizer(other, rule=theirs, lr=0.01)
    grads(other)
    saved.step()
    grads(model)
    state, before = saved.state_dict(), copy.deepcopy(optimizer.state_dict())
    if not named:
        del state["rule"]
    if mine != theirs and (named or {"momentum_buffer"} != set(state["state"][0]) | set(before["state"][0])):
        with pytest.raises(ValueError, match="another rule|of the rule"):
            optimizer.load_state_dict(state)
        assert same(optimizer.state_dict(), before)
    else:                               # LoRA-Muon's and LoRA-TSD's states are alike: averages of the factors' gradients
        optimizer.load_state_dict(state)
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_state_of_one_factor_alone_is_refused_and_a_pair_without_state_is_not():
    model = net()
    optimizer = PairOptimizer(pairs(model))
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][0], state["state"][1]                        # as after a reset
    optimizer.load_state_dict(copy.deepcopy(state))
    del state["state"][2]
    with pytest.raises(ValueError, match="is of another rule"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("setting", [
    {"rest_betas": 0.9}, {"rest_betas": None}, {"rest_betas": (0.9,)}, {"rest_betas": "ab"}, {"rest_betas": (0.9, None)},
    {"rest_betas": (0.9, 1.0)}, {"rest_eps": (1,)}, {"lr": torch.ones(2)}, {"lr": "0.1"}, {"ns_steps": 1.5}])
def test_a_setting_of_the_wrong_kind_is_refused_by_name(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"PairOptimizer: {name.removeprefix('rest_')} is .*; wanted"):
        PairOptimizer(net(), **setting)
