"""Ways to change a rank, and importances that come from inputs and gradients."""



from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import alr
from alr import recipes
from alr.axes import Factors, ResizeRule
from alr.control import Schedule
from alr.estimate import LossSpectrum, OutputSpectrum, loss_lost, output_energy
from alr.factor import core, svd_core
from alr.fisher import FisherCut
from alr.linear import factorize_, low_rank_layers
from alr.observe import Seen
from alr.resize import GrowAlongGradient, SvdCore, TwoWays, grow_along

close = torch.testing.assert_close


def factors(m=14, n=10, r=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(m, r, generator=g, dtype=torch.double), torch.randn(r, n, generator=g, dtype=torch.double))


def test_output_energy_is_that_of_the_outputs():
    U, V = factors()
    x = torch.randn(500, 10, dtype=torch.double) * torch.linspace(0.1, 3, 10)
    h = x @ V.mT
    y = h @ U.mT                                                    # (500, 14)
    close(output_energy(U, V, h.mT @ h / 500), torch.linalg.eigvalsh(y.mT @ y / 500).flip(0)[:5], rtol=1e-6, atol=1e-8)
    white = V @ V.mT                                                # inputs of identity covariance: the spectrum of W
    close(output_energy(U, V, white), core(U, V)[0].square(), rtol=1e-6, atol=1e-8)


def test_loss_lost_is_the_first_order_change():
    U, V = factors()
    x, t = torch.randn(40, 10, dtype=torch.double), torch.randn(40, 14, dtype=torch.double)
    U.requires_grad_()
    loss = F.mse_loss(x @ (U @ V).mT, t)
    loss.backward()
    P, S, Zt = torch.linalg.svd((U @ V).detach(), full_matrices=False)
    got, eps = loss_lost(U, V, U.grad), 1e-6
    for j in range(5):
        W = (U @ V).detach() - eps * S[j] * torch.outer(P[:, j], Zt[j])
        close(got[j], (F.mse_loss(x @ W.mT, t) - loss.detach()).abs() / eps, rtol=1e-4, atol=1e-7)


def test_growing_along_the_gradient_keeps_w_and_finds_the_steepest_direction():
    U, V = factors()
    G = torch.randn(14, 10, dtype=torch.double)
    U2, V2 = grow_along(U, V, 7, G)
    assert torch.equal(U2 @ V2, U2[:, :5] @ V2[:5]) and torch.equal(U2[:, :5], U)
    close(V2[5:] @ V.mT, torch.zeros(2, 5, dtype=torch.double), atol=1e-10, rtol=0)
    Qu, Qv = torch.linalg.qr(U).Q, torch.linalg.qr(V.mT).Q
    R = G - Qu @ Qu.mT @ G
    R = R - R @ Qv @ Qv.mT
    rows = V2[5:] / V2[5:].norm(dim=1, keepdim=True)
    close((R @ rows.mT).norm().square(), torch.linalg.svdvals(R)[:2].square().sum())    # no two directions hold more


def test_growing_where_no_gradient_is_left_falls_back_to_random_rows():
    U, V = factors()
    U2, V2 = grow_along(U, V, 6, U @ V)                             # the gradient lies in the present spaces
    assert torch.isfinite(V2).all() and V2[5].norm() > 0
    close(V2[5:] @ V.mT, torch.zeros(1, 5, dtype=torch.double), atol=1e-10, rtol=0)


def net():
    torch.manual_seed(0)
    return factorize_(nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 6)), rank=4)


def train(model, recipe, steps=12):
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    adapter = alr.RankAdapter(model, optimizer, recipe, total_steps=steps)
    g, events = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        model.zero_grad()
        model(torch.randn(8, 10, generator=g)).square().mean().backward()
        optimizer.step()
        events += adapter.step()
    return events


@pytest.mark.parametrize("estimate", [OutputSpectrum(), OutputSpectrum(relative=False), LossSpectrum()])
def test_any_of_them_feeds_a_budget(estimate):
    model = net()
    recipe = replace(alr.recipes.alr, estimate=estimate, control=alr.recipes.parse("replace(alr, "
                     "control=Budget(share=0.4, min_rank=1))").control, every=3, epoch=12)
    events = train(model, recipe)
    assert events and all(e.new < e.old for e in events)


def test_growth_sees_the_gradient_of_the_last_steps_and_uses_it_up():
    model = net()
    recipe = replace(alr.recipes.alr, resize=GrowAlongGradient(steps=2), control=Schedule(path=((6, 5),)), every=6,
                     epoch=12, cap="min")
    events = train(model, recipe)
    assert [(e.step, e.old, e.new) for e in events] == [(6, 4, 5)] * 2 and all(e.error < 1e-6 for e in events)
    layer = low_rank_layers(model)["0"]
    assert layer.U.grad[:, 4].norm() > 0


@dataclass(frozen=True)
class AlongOnes(ResizeRule):
    """Grows along a gradient of ones, which no layer needs to be observed for."""

    def __call__(self, U, V, k, seen=None):
        return Factors(*grow_along(U, V, k, torch.ones(len(U), V.shape[1], dtype=U.dtype)))


def test_two_ways_asks_one_rule_to_shrink_and_another_to_grow():
    U, V = factors()                                                # rank 5
    ways = TwoWays(SvdCore(), AlongOnes())
    close(ways(U, V, 3)[0], svd_core(U, V, 3)[0])
    assert ways(U, V, 6)[0].shape[1] == 6
    model = net()
    recipe = replace(alr.recipes.alr, resize=TwoWays(FisherCut(steps=2), GrowAlongGradient(steps=2)), every=4, epoch=12,
                     control=Schedule(path=((4, 6), (8, 2))), cap="min")
    events = train(model, recipe)
    assert [(e.step, e.old, e.new) for e in events] == [(4, 4, 6)] * 2 + [(8, 6, 2)] * 2
    assert all(e.error < 1e-6 for e in events[:2])
    assert recipes.parse(repr(recipe)) == recipe


def test_growth_without_a_gradient_is_random_and_leaves_w():
    U, V = factors()
    for seen in (None, Seen(4, 8.0)):
        grown = GrowAlongGradient()(U, V, 6, seen)
        close(grown.U @ grown.V, U @ V)


def test_svd_core_and_growth_agree_on_shrinking():
    U, V = factors()
    for a, b in zip(GrowAlongGradient()(U, V, 3), svd_core(U, V, 3)):
        close(a, b)
