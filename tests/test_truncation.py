"""A decision that keeps directions of W and of the optimizer's momentum."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import alr
from alr.axes import Momentum
from alr.budget import Budget
from alr.control import Schedule
from alr.factor import grow
from alr.fisher import FisherCut
from alr.linear import factorize_
from alr.observe import Seen
from alr.resize import SvdCore, TwoWays
from alr.rules import Spectron
from alr.tangent import Tangent, orthonormal
from alr.truncation import TangentCut, augmented, outward, promise

close = torch.testing.assert_close
M, N, R = 20, 30, 5


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def point(seed=0, strength=1.0):
    """U, V and a momentum that is tangent to some other W: (m, r), (r, n)."""
    U, V = draw(M, R, seed=seed), draw(R, N, seed=seed + 1)
    X, F_U = strength * draw(M, R, seed=seed + 2), orthonormal(draw(M, R, seed=seed + 3) + U)
    Y, F_V = strength * draw(R, N, seed=seed + 4), orthonormal((draw(R, N, seed=seed + 5) + V).mT).mT
    return U, V, Momentum(X, F_U, Y, F_V, 0.02)


def formed(momentum):
    return momentum.X @ momentum.F_V + momentum.F_U @ momentum.Y    # (m, n)


def outer_part(U, V, momentum):
    """The reference, formed: P_T(M) - P_U M P_V, (m, n)."""
    P_U, P_V = U @ torch.linalg.pinv(U), torch.linalg.pinv(V) @ V
    W = formed(momentum)
    return W @ P_V + P_U @ W - 2 * P_U @ W @ P_V


def seen_of(U, V, momentum=None, seed=9):
    """What a window of 200 rows would have seen of the factors."""
    x, g = draw(200, N, seed=seed) * torch.linspace(0.1, 2, N), draw(200, M, seed=seed + 1)
    h, d = x @ V.mT, g @ U                                          # (200, r), (200, r)
    S, A, B = alr.fisher.metric(U, V, h.mT @ h / 200, d.mT @ d / 200)
    return Seen(4, 200.0, importance=S.square() / 2, A=A, B=B, momentum=momentum)


# ------------------------------------------------------------------------------------------------ directions

def test_the_directions_are_the_singular_ones_of_the_part_outside():
    U, V, momentum = point()
    sizes, columns, rows = outward(U, V, momentum)
    outer = outer_part(U, V, momentum)
    close(sizes, torch.linalg.svdvals(outer)[:2 * R])
    assert len(sizes) == 2 * R and ((columns.norm(dim=0) > 0) != (rows.norm(dim=1) > 0)).all()
    for size, p, z in zip(sizes, columns.mT, rows):
        close((outer.mT @ p if p.any() else outer @ z).norm(), size)
        close(U.mT @ p, torch.zeros(R, dtype=p.dtype), atol=1e-10, rtol=0)
        close(V @ z, torch.zeros(R, dtype=z.dtype), atol=1e-10, rtol=0)


def test_a_tangent_vector_of_w_s_own_block_has_nothing_outside():
    U, V, _ = point()
    Q_U, Q_V = orthonormal(U), orthonormal(V.mT)
    inside = Momentum(Q_U @ draw(R, R), Q_U, torch.zeros(R, N).double(), Q_V.mT, 0.02)
    assert len(outward(U, V, inside)[0]) == 0
    assert len(outward(U, V, inside._replace(X=torch.zeros(M, R).double()))[0]) == 0


@pytest.mark.parametrize("k", [5, 6, 9, 15, 20])
def test_growth_keeps_w_and_catches_more_of_the_momentum_than_chance(k):
    U, V, momentum = point()
    U2, V2 = augmented(U, V, k, *outward(U, V, momentum)[1:])
    assert U2.shape == (M, k) and V2.shape == (k, N)
    close(U2 @ V2, U @ V)
    outer, q = outer_part(U, V, momentum), min(k - R, 2 * R)

    def caught(columns, rows):                                      # energy of the part outside that the new spaces hold
        P, Z = orthonormal(columns), orthonormal(rows.mT)
        return (P.mT @ outer).square().sum() + (outer @ Z).square().sum() - (P.mT @ outer @ Z).square().sum()

    got = caught(U2[:, R:R + q], V2[R:R + q]) if q else torch.zeros((), dtype=torch.double)
    best = torch.linalg.svdvals(outer)[:q].square().sum()
    close(got, best)
    for seed in range(5):
        torch.manual_seed(seed)
        assert caught(*(x[..., R:R + q] if i == 0 else x[R:R + q] for i, x in enumerate(grow(U, V, R + q)))) <= got + 1e-9


def test_growth_beyond_the_momentum_is_drawn_and_alive():
    U, V, momentum = point()
    U2, V2 = augmented(U, V, 18, *outward(U, V, momentum)[1:])
    assert ((U2.norm(dim=0) > 0.1) | (V2.norm(dim=1) > 0.1)).all()
    assert (V2[15:].norm(dim=1) > 0.1).all()
    with pytest.raises(ValueError, match="rank 4 asked of factors of rank 5"):
        augmented(U, V, 4, *outward(U, V, momentum)[1:])


# ------------------------------------------------------------------------------------------------ laws of the cut

def test_without_momentum_it_is_the_cut_of_fisher():
    U, V, momentum = point(strength=0.0)
    for seen in (seen_of(U, V), seen_of(U, V, momentum)):
        for k in range(1, R + 1):
            for new, old in zip(TangentCut(ahead=50.0)(U, V, k, seen)[:2], FisherCut()(U, V, k, seen)[:2]):
                assert torch.equal(new, old)
        close(torch.linalg.multi_dot(TangentCut(ahead=50.0)(U, V, R, seen)[:2]), U @ V)
    for new, old in zip(TangentCut()(U, V, 3)[:2], SvdCore()(U, V, 3)[:2]):
        assert torch.equal(new, old)


def test_not_looking_ahead_it_cuts_as_fisher_does_whatever_the_momentum_is():
    U, V, momentum = point()
    seen = seen_of(U, V, momentum)
    for new, old in zip(TangentCut()(U, V, 3, seen)[:2], FisherCut()(U, V, 3, seen)[:2]):
        assert torch.equal(new, old)


def test_what_is_felt_less_than_a_new_direction_would_be_is_given_up_for_one():
    U, V, momentum = point()
    seen = seen_of(U, V, momentum)
    unit = promise(U, V, seen.A, seen.B, seen.importance, 1.0)
    for fresh in (0, 1, 2):                                         # as long as the new ones must be to beat so many
        least = (seen.importance[3 - fresh] + (seen.importance[3 - fresh - 1] if fresh < 3 else 0)) / 2
        ahead = (least / unit) ** 0.5 / momentum.lr if fresh else 0.0
        U2, V2 = TangentCut(ahead=float(ahead))(U, V, 4 - 1, seen)[:2]
        close(U2 @ V2, torch.linalg.multi_dot(FisherCut()(U, V, 3 - fresh, seen)[:2]))
        new = (U2.norm(dim=0) == 0) | (V2.norm(dim=1) == 0)
        assert new.sum() == fresh
        _, columns, rows = outward(U, V, momentum)
        for i, j in enumerate(new.nonzero()[:, 0]):
            for got, there in ((U2[:, j], columns[:, i]), (V2[j], rows[i])):
                close(F.normalize(got, dim=0), there)
    assert TangentCut(ahead=1e9)(U, V, 3, seen).U.norm(dim=0).count_nonzero() >= 1     # at least one of W's stays


def test_a_promise_does_not_depend_on_the_split_and_is_the_mean_of_what_is_felt():
    U, V, _ = point()
    T = draw(R, R, seed=7)
    U_, V_ = U @ T, torch.linalg.solve(T, V)
    a, b = seen_of(U, V), seen_of(U_, V_)
    other = promise(U_, V_, b.A, b.B, b.importance, 0.3)
    assert promise(U, V, a.A, a.B, a.importance, 0.3) == pytest.approx(other, rel=1e-6)
    lengths = (U @ a.A).norm(dim=0) * (a.B @ V).norm(dim=1)
    curved = a._replace(importance=3.0 * lengths.square())          # one curvature, 6, for all: half of it times the square
    assert promise(U, V, a.A, a.B, curved.importance, 0.3) == pytest.approx(3.0 * 0.3 ** 2)
    assert promise(0 * U, V, a.A, a.B, a.importance, 0.3) == 0.0


@pytest.mark.parametrize("k", [2, 4, 8, 14])
def test_it_does_not_depend_on_how_w_is_split(k):
    U, V, momentum = point()
    T = draw(R, R, seed=7)
    U_, V_ = U @ T, torch.linalg.solve(T, V)
    rule = TangentCut(ahead=12.0)
    (A, B), (C, D) = (rule(u, v, k, seen_of(u, v, momentum))[:2] for u, v in ((U, V), (U_, V_)))
    close(A @ B, C @ D)
    for x, y in ((orthonormal(A), orthonormal(C)), (orthonormal(B.mT), orthonormal(D.mT))):
        close(x @ x.mT, y @ y.mT)                                   # the same spaces, those without weight among them


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_factors_choose_what_wide_ones_do(dtype):
    U, V, momentum = point()
    sizes = outward(U, V, momentum)[0]
    narrow = Momentum(*(x.to(dtype) for x in momentum[:4]), momentum.lr)
    got, columns, rows = outward(U.to(dtype), V.to(dtype), narrow)
    close(got, sizes, rtol=0.05 if dtype == torch.bfloat16 else 1e-4, atol=0.02 if dtype == torch.bfloat16 else 1e-5)
    for k in (3, 8, 17):
        U2, V2 = TangentCut(ahead=12.0)(U.to(dtype), V.to(dtype), k, seen_of(U, V, narrow))[:2]
        assert U2.dtype == V2.dtype == dtype and U2.isfinite().all() and V2.isfinite().all() and U2.shape[1] == k
        if k > R:
            assert torch.equal((U2 @ V2)[:, :4], (U2[:, :R] @ V2[:R])[:, :4]) and torch.equal(U2[:, :R], U.to(dtype))


# ------------------------------------------------------------------------------------------------ with the optimizer

def small(rank=6, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 16)).to(dtype)
    return factorize_(model, rank=rank)


def batch(step):
    x = draw(32, 24, seed=1000 + step)
    return x, torch.tanh(x @ draw(24, 16, seed=3))


def recipe(control, **changes):
    return replace(alr.recipes.alr, every=6, control=control, resize=TangentCut(**changes))


def train(model, optimizer, adapter, first, last):
    events = []
    for step in range(first, last):
        x, y = batch(step)
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        events += adapter.step()
        optimizer.zero_grad()
    return events


UP = Schedule(((0, 6), (6, 4), (12, 9), (18, 5)))
SHRINKING = Budget(share=0.5, end=0.8, min_rank=2)


def test_growing_takes_nothing_from_w_or_from_the_momentum_and_moves_at_once():
    model = small()
    optimizer = alr.PairOptimizer(model, lr=0.02)
    adapter = alr.RankAdapter(model, optimizer, recipe(SHRINKING), total_steps=100)
    train(model, optimizer, adapter, 0, 4)
    layer = model[0]
    W, before = layer.weight.detach().clone(), optimizer.tangent(optimizer.param_groups[0], layer.U, layer.V)
    P_U, P_V = (layer.U @ torch.linalg.pinv(layer.U)).detach(), (torch.linalg.pinv(layer.V) @ layer.V).detach()
    old = formed(before)
    old = old @ P_V + P_U @ old - P_U @ old @ P_V
    adapter.resize({"0": 11})
    close(layer.weight.detach(), W)
    new = formed(optimizer.tangent(optimizer.param_groups[0], layer.U, layer.V))     # seen from a larger tangent space
    close(new @ P_V + P_U @ new - P_U @ new @ P_V, old, atol=1e-9, rtol=1e-6)
    train(model, optimizer, adapter, 4, 5)
    assert torch.linalg.svdvals(layer.weight.detach())[10] > 1e-4


@pytest.mark.parametrize("control", [UP, SHRINKING])
def test_training_stopped_between_decisions_goes_on_as_if_it_had_not(control):
    def made():
        model = small()
        optimizer = alr.PairOptimizer(model, lr=0.02)
        return model, optimizer, alr.RankAdapter(model, optimizer, recipe(control, ahead=4.0), total_steps=30)

    torch.manual_seed(1)
    whole = made()
    events = train(*whole, 0, 30)
    assert events
    torch.manual_seed(1)
    first = made()
    train(*first, 0, 10)
    saved = copy.deepcopy([one.state_dict() for one in first])
    second = made()
    for one, state in zip(second, saved):
        one.load_state_dict(state)
    torch.manual_seed(1)
    train(*second, 10, 30)
    for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        close(a, b, atol=1e-9, rtol=1e-7)


def test_what_keeps_no_tangent_momentum_is_refused_with_what_to_write():
    model = small()
    for optimizer, named in ((torch.optim.AdamW(model.parameters()), "stepped by AdamW,"),
                             (alr.PairOptimizer(model, rule=Spectron()), r"PairOptimizer with rule=Spectron\(\)")):
        for resize in (TangentCut(), TwoWays(FisherCut(), TangentCut())):
            with pytest.raises(TypeError, match=named + r"(.|\n)*Write alr.PairOptimizer\(model\)"):
                alr.RankAdapter(model, optimizer, replace(recipe(SHRINKING), resize=resize), total_steps=30)
    frozen = small()
    for p in frozen[0].parameters():
        p.requires_grad_(False)
    alr.RankAdapter(frozen, alr.PairOptimizer(frozen), recipe(SHRINKING), total_steps=30)


def test_its_repr_reads_back_and_other_resizes_ask_for_no_momentum():
    assert alr.recipes.parse(repr(recipe(SHRINKING, ahead=3.0))) == recipe(SHRINKING, ahead=3.0)
    assert TwoWays(FisherCut(), TangentCut()).momentum and not TwoWays(FisherCut(), SvdCore()).momentum
    assert Tangent().keeps_tangent and not Spectron().keeps_tangent
