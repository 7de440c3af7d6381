"""Laws of `alr.lab.muon`: it is torch's Muon but for the rounding to bfloat16."""

import pytest
import torch
from torch import nn

from alr.lab.muon import Muon
from alr.rules import orthogonalize, shape_scale


def matrices(seed: int, dtype=torch.float32) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=draw, dtype=dtype)) for shape in ((12, 8), (8, 12), (12, 8), (10, 10))]


def run(optimizer, ps, steps=6):
    draw = torch.Generator().manual_seed(5)
    for _ in range(steps):
        for p in ps:
            p.grad = torch.randn(p.shape, generator=draw, dtype=p.dtype)
        optimizer.step()


@pytest.mark.parametrize("settings", [{}, {"nesterov": False, "momentum": 0.8}, {"adjust_lr_fn": "match_rms_adamw"}])
def test_it_is_torchs_muon_as_far_as_bfloat16_goes(settings):
    mine, theirs = matrices(0), matrices(0)
    start = [p.detach().clone() for p in mine]
    run(Muon(mine, lr=0.05, weight_decay=0.1, **settings), mine)
    run(torch.optim.Muon(theirs, lr=0.05, weight_decay=0.1, **settings), theirs)
    for a, b, w in zip(mine, theirs, start):
        assert (a - b).norm() < 0.02 * (a - w).norm() and not torch.equal(a, b)


def test_it_is_the_formula_step_by_step():
    ps, lr, decay, mu = matrices(1, torch.float64), 0.05, 0.1, 0.95
    want, M = [p.detach().clone() for p in ps], [torch.zeros_like(p) for p in ps]
    draw = torch.Generator().manual_seed(5)
    for _ in range(6):
        for i, W in enumerate(want):
            G = torch.randn(W.shape, generator=draw, dtype=W.dtype)
            M[i] = mu * M[i] + (1 - mu) * G
            Z = orthogonalize((1 - mu) * G + mu * M[i])
            want[i] = (1 - lr * decay) * W - lr * shape_scale("original", *W.shape) * Z
    run(Muon(ps, lr=lr, weight_decay=decay), ps)
    for p, W in zip(ps, want):
        torch.testing.assert_close(p.detach(), W, rtol=1e-9, atol=1e-9)


def test_a_matrix_without_a_gradient_stays():
    ps = matrices(2)
    before = ps[0].detach().clone()
    for p in ps[1:]:
        p.grad = torch.ones_like(p)
    Muon(ps, lr=0.1).step()
    assert torch.equal(ps[0], before) and not ps[0].grad


def test_its_state_goes_into_torchs_and_back():
    mine, theirs = matrices(3), matrices(3)
    a, b = Muon(mine, lr=0.05), torch.optim.Muon(theirs, lr=0.05)
    run(a, mine)
    b.load_state_dict(a.state_dict())
    assert all(torch.equal(a.state[p]["momentum_buffer"], b.state[q]["momentum_buffer"]) for p, q in zip(mine, theirs))
