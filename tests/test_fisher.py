"""Importance and cuts in the metric of the loss: best in that metric, blind to how W is factored, and about right in nats."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import alr
from alr.budget import Budget
from alr.factor import core, svd_core
from alr.fisher import FisherCut, FisherSpectrum, fisher_cut, metric
from alr.linear import factorize_
from alr.observe import Seen

close = torch.testing.assert_close


def setting(m=14, n=10, r=5, seed=0):
    """Factors and second moments of some hidden values and gradients, all in float64."""
    g = torch.Generator().manual_seed(seed)
    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.double)
    U, V = normal(m, r), normal(r, n)
    x, out = normal(400, n) * torch.linspace(0.1, 2, n), normal(400, m) * torch.linspace(2, 0.1, m)     # (B, n), (B, m)
    h, d = x @ V.mT, out @ U                                        # (B, r), (B, r)
    return U, V, h.mT @ h / 400, d.mT @ d / 400


def test_worth_and_cut_do_not_depend_on_how_w_is_factored():
    U, V, H, K = setting()
    G = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.double) + 3 * torch.eye(5, dtype=torch.double)
    back = torch.linalg.inv(G)
    U2, V2, H2, K2 = U @ G, back @ V, back @ H @ back.mT, G.mT @ K @ G
    bound = dict(rtol=1e-5, atol=1e-5)                              # the floor under grown directions, 1e-10, is not invariant
    close(metric(U2, V2, H2, K2)[0], metric(U, V, H, K)[0], **bound)
    for k in (1, 3):
        (a, b), (c, d) = fisher_cut(U, V, k, H, K), fisher_cut(U2, V2, k, H2, K2)
        close(c @ d, a @ b, **bound)


def test_isotropic_inputs_and_gradients_give_the_singular_values_and_the_svd():
    U, V, _, _ = setting()
    H, K = V @ V.mT, U.mT @ U
    S, A, B = metric(U, V, H, K, damping=0.0)
    close(S, core(U, V)[0])
    close(A @ B, torch.eye(5, dtype=torch.double))
    close(torch.mul(*map(torch.det, (A, B))), torch.tensor(1.0, dtype=torch.double))
    (a, b), (c, d) = fisher_cut(U, V, 2, H, K), svd_core(U, V, 2)
    close(a @ b, c @ d)


def test_no_cut_is_better_in_the_metric_of_the_loss():
    U, V, H, K = setting()
    def felt(U2, V2):                                               # of W' = U M V: M by least squares, exact here
        M = torch.linalg.pinv(U) @ U2 @ V2 @ torch.linalg.pinv(V)   # (r, r)
        E = torch.eye(5, dtype=torch.double) - M
        return torch.einsum("ij,jk,lk,li->", E, H, E, K)
    S = metric(U, V, H, K, damping=0.0)[0]
    for k in (1, 2, 4):
        best = felt(*fisher_cut(U, V, k, H, K, damping=0.0))
        close(best, S[k:].square().sum())
        assert felt(*svd_core(U, V, k)) > best * 1.01
        for seed in range(20):
            P = torch.randn(5, k, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
            assert felt(U @ P, torch.linalg.pinv(P) @ V) > best
    U2, V2 = fisher_cut(U, V, 5, H, K)
    close(U2 @ V2, U @ V)                                           # nothing to cut


def test_what_no_input_has_reached_counts_as_one_percent_of_the_mean():
    Q = torch.linalg.qr(torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.double)).Q
    one = torch.eye(2, dtype=torch.double)
    S = metric(Q, Q.mT, torch.diag(torch.tensor([2.0, 0.0], dtype=torch.double)), one)[0]      # W = U V with U, V^T orthonormal
    close(S.square(), torch.tensor([2.01 * 1.01, 0.01 * 1.01], dtype=torch.double), rtol=1e-6, atol=1e-8)


def test_half_of_s_squared_is_the_rise_of_the_loss():
    g = torch.Generator().manual_seed(0)
    B, m, n, r = 40_000, 6, 8, 4
    U = torch.randn(m, r, generator=g, dtype=torch.double) * 0.3
    V = torch.randn(r, n, generator=g, dtype=torch.double) * 0.3
    x = torch.randn(B, n, generator=g, dtype=torch.double)
    labels = torch.multinomial((x @ (U @ V).mT).softmax(-1), 1, generator=g)[:, 0]      # drawn from the model: a minimum
    logits = (x @ (U @ V).mT).requires_grad_()
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    h, d = x @ V.mT, B * logits.grad @ U
    H, K = h.mT @ h / B, d.mT @ d / B
    S = metric(U, V, H, K)[0]
    for k in (1, 2, 3):
        U2, V2 = fisher_cut(U, V, k, H, K)
        rise = F.cross_entropy(x @ (U2 @ V2).mT, labels) - loss.detach()
        close(rise, S[k:].square().sum() / 2, rtol=0.35, atol=1e-4)     # K-FAC: h and d are not quite independent


def net():
    torch.manual_seed(0)
    return factorize_(nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 6)), rank=4)


def test_a_budget_shared_by_it_cuts_and_learns():
    model = net()
    recipe = replace(alr.recipes.alr, estimate=FisherSpectrum(steps=2), resize=FisherCut(steps=2),
                     control=Budget(share=0.4, min_rank=1, per_parameter=True), every=3, epoch=12)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
    adapter = alr.RankAdapter(model, optimizer, recipe, total_steps=12)
    events = []
    for _ in range(12):
        model.zero_grad()
        model(torch.randn(8, 10)).square().mean().backward()
        optimizer.step()
        events += adapter.step()
    assert events and all(e.new < e.old for e in events) and all(layer.U.isfinite().all() for layer in adapter.layers.values())


def test_moments_rounded_in_float32_are_no_divergence():
    g = torch.Generator().manual_seed(0)
    U, V = torch.randn(40, 16, generator=g), torch.randn(16, 30, generator=g)
    U, V = U * torch.logspace(0, -6, 16), V * torch.logspace(0, -6, 16)[:, None]     # directions that have hardly grown yet
    h, d = torch.randn(300, 30, generator=g) @ V.mT, torch.randn(300, 40, generator=g) @ U
    H, K = h.mT @ h / 300, d.mT @ d / 300
    worst = torch.linalg.eigvalsh(H.double())
    H = H - 2e-7 * worst[-1] * torch.eye(16)                        # rounding, at its worst
    S = metric(U, V, H, K)[0]
    assert S.isfinite().all() and S[0] > 100 * S[8]
    assert all(x.isfinite().all() for x in fisher_cut(U, V, 6, H, K))


def test_where_nothing_was_felt_the_directions_are_those_of_w():
    U, V, H, K = setting()
    for h, k in ((H, torch.zeros_like(K)), (torch.zeros_like(H), K), (torch.zeros_like(H), torch.zeros_like(K))):
        S, A, B = metric(U, V, h, k)
        assert not S.any()
        close(A @ B, torch.eye(5, dtype=torch.double))
        (a, b), (c, d) = fisher_cut(U, V, 2, h, k), svd_core(U, V, 2)
        close(a @ b, c @ d)


def test_moments_that_are_not_finite_are_refused():
    U, V, H, K = setting()
    with pytest.raises(FloatingPointError, match="not finite"):
        metric(U, V, H * torch.nan, K)


def test_the_axes_read_what_was_seen():
    U, V, H, K = setting()
    S, A, B = metric(U, V, H, K)
    seen = Seen(4, 8.0, H, K, S.square() / 2, A, B)
    assert FisherSpectrum()(None, seen) == tuple((S.square() / 2).tolist())
    cut = FisherCut()(U, V, 2, seen)
    close(cut.U @ cut.V, torch.mm(*fisher_cut(U, V, 2, H, K)))
    close(U @ cut.mix[0], cut.U, rtol=1e-5, atol=1e-6)
    unseen = FisherCut()(U, V, 2, Seen(4, 0.0))
    close(unseen.U @ unseen.V, torch.mm(*svd_core(U, V, 2)))
