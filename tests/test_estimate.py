"""Laws of `alr.estimate`: identity scores n, rank one scores 1, nothing depends on the scale."""

import pytest
import torch

from alr import LowRankLinear
from alr.estimate import (
    EffectiveRank,
    ScaledStableRank,
    SpectralShare,
    StableRank,
    StableRankPower,
    effective_rank,
    fresh_stable_rank,
    share_rank,
    stable_rank,
    stable_rank_exact,
    stable_rank_power,
)
from alr.init import Fresh, Gaussian, Spectral


def layer(m=64, n=48, r=16, seed=0):
    torch.manual_seed(seed)
    return LowRankLinear(n, m, r, bias=False)


@pytest.mark.parametrize("f", [stable_rank, stable_rank_exact, effective_rank])
def test_identity_is_n_and_rank_one_is_one(f):
    eye = torch.eye(24)
    assert f(eye, eye) == pytest.approx(24, rel=1e-5)
    assert f(torch.randn(30, 1), torch.randn(1, 20)) == pytest.approx(1, rel=1e-5)
    assert f(torch.zeros(30, 4), torch.zeros(4, 20)) == 1.0


@pytest.mark.parametrize("shape", [(512, 512, 64), (2048, 512, 64), (512, 2048, 16), (40, 30, 30), (7, 300, 3)])
@pytest.mark.parametrize("decay", [0.0, 1.0, 3.0])
def test_from_the_factors_it_is_exact_to_one_percent(shape, decay):
    m, n, r = shape
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        U = torch.randn(m, r, generator=g) * torch.arange(1, r + 1.0) ** -decay
        V = torch.randn(r, n, generator=g)
        exact = stable_rank_exact(U.double(), V.double())
        assert stable_rank(U, V) == pytest.approx(exact, rel=0.01)
        assert 1 <= stable_rank(U, V) <= r


@pytest.mark.parametrize("scale", [1e-25, 1e-10, 1e10, 1e18])
def test_it_does_not_know_the_scale(scale):
    U, V = layer().U.detach(), layer().V.detach()
    assert stable_rank(scale * U, V) == pytest.approx(stable_rank(U, V), rel=1e-3)
    assert stable_rank_exact(scale * U, V) == pytest.approx(stable_rank_exact(U, V), rel=1e-3)


def test_five_cold_power_iterations_overestimate():
    """History (script v10): sigma_max from below, so the stable rank from above; by 12 % on average, up to 30 %."""
    ratios = []
    for seed in range(20):
        torch.manual_seed(seed)
        U, V = torch.randn(512, 64), torch.randn(64, 512)
        ratios.append(stable_rank_power(U @ V, 5) / stable_rank_exact(U, V))
    assert min(ratios) >= 1 and 1.05 < sum(ratios) / len(ratios) < 1.25
    assert stable_rank_power(U @ V, 500) == pytest.approx(stable_rank_exact(U, V), rel=1e-2)


def test_share_rank_on_a_known_spectrum():
    s = torch.tensor([4.0, 3.0, 2.0, 1.0])                              # sums 4 7 9 10, squares 16 25 29 30
    assert [share_rank(s, share, 1) for share in (0.4, 0.41, 0.9, 0.91, 1.0)] == [1, 2, 3, 4, 4]
    assert [share_rank(s, share, 2) for share in (0.5, 0.8, 0.95, 0.97)] == [1, 2, 3, 4]
    assert share_rank(torch.zeros(4), 0.9) == 1


def test_more_share_needs_more_rank_and_energy_less_than_nuclear():
    low = layer()
    for power in (1, 2):
        ranks = [SpectralShare(share, power)(low) for share in (0.1, 0.5, 0.9, 0.99)]
        assert ranks == sorted(ranks) and ranks[-1] <= 16
    assert SpectralShare(0.9, 2)(low) <= SpectralShare(0.9, 1)(low)


@pytest.mark.parametrize("estimate", [StableRank(), StableRankPower(iters=50), EffectiveRank(), SpectralShare(0.9)])
def test_an_estimate_takes_a_layer_and_stays_within_its_rank(estimate):
    low = layer()
    value = estimate(low)
    assert isinstance(value, float) and 1 <= value <= low.rank + 1e-3
    assert eval(repr(estimate)) == estimate


def test_scaled_stable_rank_of_a_fresh_layer_is_its_rank():
    torch.manual_seed(5)
    layer = LowRankLinear(40, 60, 12, bias=False)
    state = torch.get_rng_state()
    assert ScaledStableRank()(layer) == pytest.approx(12, rel=0.1)
    assert torch.equal(state, torch.get_rng_state()), "a measurement draws no random number of the run's"
    with torch.no_grad():
        layer.U[:, 0] *= 10                                         # one direction outgrows the others
    assert ScaledStableRank()(layer) < 6
    assert ScaledStableRank(init=Gaussian()) != ScaledStableRank()


def test_what_a_fresh_layer_scores_is_asked_without_touching_any_generator(monkeypatch):
    """torch.manual_seed seeds every device, and only the CPU's generator is put back."""
    def seeds_all(seed):
        raise AssertionError("this seeds every device")
    for place in (torch, torch.random, torch.cuda, torch.mps):
        for name in ("manual_seed", "manual_seed_all", "seed", "seed_all"):
            if hasattr(place, name):
                monkeypatch.setattr(place, name, seeds_all)
    fresh_stable_rank.cache_clear()
    before = torch.get_rng_state()
    for init in (Spectral(), Fresh(), Gaussian()):
        assert 1 <= fresh_stable_rank(12, 9, 4, init) <= 4
    assert torch.equal(torch.get_rng_state(), before)
