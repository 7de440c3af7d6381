"""Laws of the values that other methods are made of: AdaLoRA's sensitivity, Cuttlefish's one cut, one rank for all."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import alr
from alr.axes import Signal
from alr.budget import Budget, Proportional, allocate, size
from alr.estimate import Place, ScaledStableRank
from alr.fisher import FisherCut
from alr.observe import Seen
from alr.resize import SvdCore
from alr.sensitivity import Sensitivity, SensitivityCut, sensitivity

close = torch.testing.assert_close


def drawn(m=14, n=10, r=5, seed=0):
    """Factors and a gradient: (m, r), (r, n), (m, n), float64."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g, dtype=torch.double) for shape in ((m, r), (r, n), (m, n))]


def by_svd(U, V, G):
    """|s_j p_j^T G z_j| and the directions' products, by the SVD of W: (r,), (r, m, n)."""
    P, S, Zt = torch.linalg.svd(U @ V, full_matrices=False)
    r = U.shape[1]
    parts = torch.einsum("mj,j,jn->jmn", P[:, :r], S[:r], Zt[:r])
    return (parts * G).sum((1, 2)).abs(), parts


def test_sensitivity_is_the_change_of_a_linear_loss_without_a_direction():
    U, V, G = drawn()
    felt, A, B = sensitivity(U, V, G)
    want, parts = by_svd(U, V, G)
    close(felt, want.sort(descending=True).values)
    close(torch.einsum("mj,jn->jmn", U @ A, B @ V), parts[want.argsort(descending=True)])
    close(U @ A @ B @ V, U @ V)


def test_sensitivity_does_not_depend_on_how_w_is_split():
    U, V, G = drawn()
    M = torch.randn(5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.double) + 3 * torch.eye(5, dtype=torch.double)
    close(sensitivity(U @ M, torch.linalg.solve(M, V), G)[0], sensitivity(U, V, G)[0])


def test_the_cut_keeps_what_is_felt_and_not_what_is_large():
    U, V, G = drawn()
    want, parts = by_svd(U, V, G)
    cut = SensitivityCut()(U, V, 2, Seen(4, 1.0, weight_gradient=G))
    close(cut.U @ cut.V, parts[want.argsort(descending=True)[:2]].sum(0))
    close(cut.U @ cut.V, U @ cut.mix[0] @ cut.mix[1] @ V)
    close(cut.U.norm(dim=0), cut.V.norm(dim=1))                         # split evenly
    assert (cut.U @ cut.V - U @ V).norm() > (SvdCore()(U, V, 2).U @ SvdCore()(U, V, 2).V - U @ V).norm()


def test_a_weight_that_has_fewer_directions_than_its_rank():
    U, V, G = drawn()
    U[:, 3:], V[3:] = U[:, :2], 0.0
    felt, A, B = sensitivity(U, V, G)
    assert felt.isfinite().all() and (felt[3:] < 1e-6 * felt[0]).all()
    cut = SensitivityCut()(U, V, 4, Seen(4, 1.0, weight_gradient=G))
    close(cut.U @ cut.V, U @ V)
    assert SensitivityCut()(U, V, 7, Seen(4, 1.0, weight_gradient=G)).U.shape == (14, 7)
    close(SensitivityCut()(U, V, 2).U, SvdCore()(U, V, 2).U)            # nothing was seen


def test_a_gradient_that_is_not_finite_is_refused():
    U, V, G = drawn()
    G[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="diverged"):
        sensitivity(U, V, G)


SHAPES = [(48, 48), (48, 48), (192, 48), (48, 192)]


# an estimate of a rank is zero or a number that float32 can hold
@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-38, 1e4)), min_size=4, max_size=4), st.floats(0.05, 1), st.booleans())
def test_proportional_fills_its_share_and_no_layer_grows(targets, share, hold):
    ranks, caps = [24, 24, 38, 38], [24, 24, 38, 38]
    control = Proportional(share=share, at=0.3)
    signal = Signal(caps=caps, shapes=SHAPES, progress=0.3, held=[hold] + [False] * 3)
    got, done = control.step(ranks, targets, control.init(ranks), signal)
    assert done and control.finished(got, done, signal)
    assert all(4 <= k <= r for k, r in zip(got, ranks)) and (got[0] == 24 or not hold)
    room, least = share * sum(m * n for m, n in SHAPES), size([24 if hold else 4, 4, 4, 4], SHAPES)
    assert size(got, SHAPES) <= max(room, least)
    if min(targets[hold:]) > 1e-3 and any(r - k for k, r in zip(got, ranks)):      # as large as the room allows
        more = [k if h or k == r else k + 1 for k, r, h in zip(got, ranks, signal.held)]
        assert size(more, SHAPES) > room
    free = [(k, t) for k, t, r, h in zip(got, targets, ranks, signal.held) if not h and 4 < k < r]
    assert all(k1 <= k2 or t1 >= t2 for k1, t1 in free for k2, t2 in free)


def test_proportional_by_hand():
    """Targets 10, 20, 30, 40 with factors 0.5: ranks 5, 10, 15, 20 cost (5 + 10) 96 + (15 + 20) 240 = 9,840."""
    signal = Signal(caps=[48] * 4, shapes=SHAPES, progress=0.5)
    dense = sum(m * n for m, n in SHAPES)
    assert Proportional(share=9840 / dense).step([48] * 4, [10, 20, 30, 40], False, signal) == ([5, 10, 15, 20], True)
    assert Proportional(share=9839 / dense).step([48] * 4, [10, 20, 30, 40], False, signal)[0] != [5, 10, 15, 20]
    early = signal._replace(progress=0.2)
    assert Proportional().step([48] * 4, [10, 20, 30, 40], False, early) == ([48] * 4, False)


def test_by_place_alone_all_layers_get_one_rank():
    got = allocate([[1 / j for j in range(1, r + 1)] for r in (24, 24, 38, 38)], SHAPES, 11 * size([1] * 4, SHAPES) + 100, 4,
                   per_parameter=False)
    assert set(got) <= {11, 12} and min(got) == 11


@pytest.mark.parametrize("change", [
    dict(estimate=Sensitivity(steps=2), resize=SensitivityCut(steps=2), control=Budget(share=0.3, min_rank=1)),
    dict(estimate=Place(), resize=FisherCut(steps=2), control=Budget(share=0.3, min_rank=1, per_parameter=False)),
    dict(estimate=ScaledStableRank(), resize=SvdCore(), control=Proportional(share=0.3, at=0.3, min_rank=1)),
], ids=["sensitivity", "place", "proportional"])
def test_in_a_training(change):
    torch.manual_seed(0)
    recipe = replace(alr.recipes.alr, rank=0.9, every=4, **change)
    assert alr.recipes.parse(repr(recipe)) == recipe
    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 24))
    x, y = torch.randn(64, 24), torch.randn(64, 24)
    recipe.prepare(model)
    optimizer = alr.PairOptimizer(model)
    adapter = alr.RankAdapter(model, optimizer, recipe, total_steps=40)
    for _ in range(40):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        adapter.step()
        optimizer.zero_grad()
    dense, held = sum(m * n for m, n in adapter.shapes), size(list(adapter.ranks.values()), adapter.shapes)
    assert 0.25 * dense < held <= 0.3 * dense
    if isinstance(recipe.estimate, Place):
        assert max(adapter.ranks.values()) - min(adapter.ranks.values()) <= 1
