"""A layer of rank 0 is its bias: no factors, no step, no importance; it can be saved, loaded, densified and brought back."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import alr
from alr.adapt import effective_number
from alr.axes import Signal
from alr.budget import Budget, LossTarget, allocate
from alr.control import Schedule
from alr.estimate import EffectiveRank
from alr.factor import core_cut
from alr.fisher import FisherCut, metric
from alr.lab.muon import Muon
from alr.linear import factorize_, factorize_like_
from alr.resize import GrowAlongGradient, SvdCore, TwoWays, grow_along
from alr.rules import LoRAMuon, Spectron
from alr.tangent import LoRATSD, Tangent
from alr.truncation import TangentCut

close = torch.testing.assert_close
OFF = Schedule(((0, 6), (6, {"2": 0}), (18, {"2": 3})))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(rank=6, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 12)).to(dtype)
    return factorize_(model, rank=rank)


def made(resize=FisherCut(), control=OFF, optimizer=alr.PairOptimizer, **changes):
    model = small()
    optimizer = optimizer(model)
    recipe = replace(alr.recipes.alr, every=6, control=control, resize=resize, **changes)
    return model, optimizer, alr.RankAdapter(model, optimizer, recipe, total_steps=30)


def train(model, optimizer, adapter, first, last):
    events = []
    for step in range(first, last):
        x = draw(32, 24, seed=1000 + step)
        F.mse_loss(model(x), torch.tanh(x @ draw(24, 12, seed=3))).backward()
        optimizer.step()
        events += adapter.step()
        optimizer.zero_grad()
    return events


def test_a_layer_that_is_off_is_its_bias_and_costs_nothing_else():
    model = small()
    layer = model[2]
    layer.take_rank(0)
    x = draw(2, 5, 20).requires_grad_()
    y = layer(x)
    close(y, layer.bias.expand(2, 5, 16))
    y.sum().backward()
    assert not x.grad.any() and layer.U.numel() + layer.V.numel() == 0 and not layer.weight.any()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    dense = alr.densify_(copy.deepcopy(model))
    close(dense(draw(3, 24)), model(draw(3, 24)))
    with pytest.raises(ValueError, match="it takes a whole number, 1 to|it takes 1 to"):
        alr.LowRankLinear(4, 4, rank=0)


@pytest.mark.parametrize("optimizer", [
    *(lambda model, rule=rule: alr.PairOptimizer(model, rule=rule) for rule in (Tangent(), Spectron(), LoRAMuon(), LoRATSD())),
    lambda model: torch.optim.AdamW(model.parameters(), 1e-2),
    lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
    lambda model: [Muon([p for p in model.parameters() if p.dim() == 2]),
                   torch.optim.AdamW([p for p in model.parameters() if p.dim() == 1])],
], ids=["tangent", "spectron", "lora-muon", "lora-tsd", "adamw", "sgd", "muon"])
def test_off_and_back_under_every_optimizer(optimizer):
    model = small()
    opts = optimizer(model)
    adapter = alr.RankAdapter(model, opts, replace(alr.recipes.alr, every=6, control=OFF, resize=FisherCut()), total_steps=30)
    class Both:
        step = staticmethod(lambda: [o.step() for o in adapter.optimizers])
        zero_grad = staticmethod(lambda: [o.zero_grad() for o in adapter.optimizers])
    events = train(model, Both, adapter, 0, 10)
    gone = next(e for e in events if e.new == 0)
    assert (gone.layer, gone.old, gone.error) == ("2", 6, pytest.approx(1.0)) and adapter.ranks["2"] == 0
    close(model[2](draw(3, 20)), model[2].bias.detach().expand(3, 16))
    events = train(model, Both, adapter, 10, 18)
    back = next(e for e in events if e.layer == "2")
    assert (back.old, back.new, back.target, back.error) == (0, 3, 0.0, 0.0)
    before = model[2].weight.detach().clone()
    train(model, Both, adapter, 18, 30)
    assert not before.any() and model[2].weight.isfinite().all() and model[2].weight.norm() > 1e-3


def test_a_layer_comes_back_along_the_gradient_that_its_window_has_seen():
    model, optimizer, adapter = made(TwoWays(FisherCut(), GrowAlongGradient(steps=3)))
    train(model, optimizer, adapter, 0, 17)
    assert adapter.ranks["2"] == 0 and adapter.observer is not None
    seen = copy.deepcopy(adapter.observer.books["2"].total["G"])
    x = draw(32, 24, seed=1017)
    F.mse_loss(model(x), torch.tanh(x @ draw(24, 12, seed=3))).backward()
    G = seen + adapter.observer.books["2"].G                        # (16, 20)
    optimizer.step()
    assert any(e.layer == "2" and e.new == 3 for e in adapter.step())
    Z = torch.linalg.svd(G.double()).Vh[:3]                         # (3, 20)
    rows = F.normalize(model[2].V.detach().double(), dim=1)
    close((rows @ Z.mT).abs(), torch.eye(3).double(), atol=1e-4, rtol=0)
    U2, V2 = grow_along(torch.zeros(16, 0), torch.zeros(0, 20), 2, G)
    assert V2.isfinite().all() and not U2.any()


def test_coming_back_under_the_cut_of_the_step():
    model, optimizer, adapter = made(TangentCut(ahead=5.0))
    train(model, optimizer, adapter, 0, 30)
    assert adapter.ranks["2"] == 3 and model[2].weight.norm() > 1e-3


def test_the_budget_may_switch_a_layer_off_where_it_is_asked_to():
    control = Budget(share=0.3, begin=0.0, end=0.5, min_rank=0)
    names, shapes = ["a", "b"], [(10, 10), (10, 10)]
    ranks, memory = [4, 4], control.init([4, 4])
    signal = Signal([5, 5], 1, (), 0.9, names, shapes)
    ranks, memory = control.step(ranks, [(4.0, 3.0, 2.0, 1.0), (1e-9,) * 4], memory, signal)
    assert ranks == [3, 0]
    assert control.step(ranks, [(4.0, 3.0, 2.0), ()], memory, signal)[0] == [3, 0]
    assert replace(control, min_rank=1).step([4, 4], [(4.0, 3.0, 2.0, 1.0), (1e-9,) * 4], [4, 4], signal)[0] == [2, 1]
    assert allocate([(), (1.0,)], shapes, 100, least=0) == [0, 1]
    assert effective_number(()) == 0.0 and effective_number((0.0,)) == 1.0


def test_a_budget_trains_with_layers_off():
    model, optimizer, adapter = made(control=Budget(share=0.1, end=0.5, min_rank=0, per_parameter=True))
    with torch.no_grad():
        model[2].U.mul_(1e-6)                                       # nobody feels it
    train(model, optimizer, adapter, 0, 30)
    assert all(p.isfinite().all() for p in model.parameters()) and min(adapter.ranks.values()) >= 0


def test_a_loss_above_its_target_brings_a_layer_back_last():
    control = LossTarget(loss=1.0, factor=0.5, min_rank=0)
    signal = Signal([4, 4], 1, (2.0,), None, ["a", "b"], [(10, 10), (10, 10)])
    assert control.step([3, 0], [(3.0, 2.0, 1.0), ()], 0, signal)[0] == [4, 2]


def test_an_estimate_is_not_asked_for_a_layer_that_is_off():
    model, optimizer, adapter = made(SvdCore(), estimate=EffectiveRank())
    events = train(model, optimizer, adapter, 0, 30)
    assert next(e for e in events if e.layer == "2" and e.old == 0).target == 0.0


def test_saved_loaded_and_resumed():
    model, optimizer, adapter = made()
    train(model, optimizer, adapter, 0, 10)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), adapter.state_dict()])
    again = made()
    for one, state in zip(again, saved):
        one.load_state_dict(state)
    assert again[2].ranks == adapter.ranks and again[2].ranks["2"] == 0
    torch.manual_seed(1)
    train(model, optimizer, adapter, 10, 24)
    torch.manual_seed(1)
    train(*again, 10, 24)
    for a, b in zip(model.parameters(), again[0].parameters(), strict=True):
        close(a, b)
    fresh = nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 12))
    fresh = factorize_like_(fresh, saved[0])
    fresh.load_state_dict(saved[0])
    assert fresh[2].rank == 0


def test_pure_functions_know_rank_zero():
    U, V = draw(7, 3), draw(3, 9)
    moments = torch.eye(3).double(), torch.eye(3).double()
    for cut in (core_cut(U, V, 0), FisherCut()(U, V, 0), alr.fisher.fisher_cut(U, V, 0, *moments)):
        assert cut[0].shape == (7, 0) and cut[1].shape == (0, 9)
    S, A, B = metric(U[:, :0], V[:0], torch.zeros(0, 0), torch.zeros(0, 0))
    assert S.shape == (0,) and A.shape == B.shape == (0, 0)
    with pytest.raises(ValueError, match="it takes 0 to 3"):
        core_cut(U, V, -1)


def test_torch_s_muon_is_refused_with_what_to_write():
    model = small()
    opts = [torch.optim.Muon([p for p in model.parameters() if p.dim() == 2]),
            torch.optim.AdamW([p for p in model.parameters() if p.dim() == 1])]
    adapter = alr.RankAdapter(model, opts, replace(alr.recipes.alr, control=OFF), total_steps=300)
    with pytest.raises(ValueError, match=r"rank 0 asked of '2'.*Take alr.PairOptimizer\(model\)"):
        adapter.resize({"2": 0})
    assert adapter.ranks["2"] == 6
