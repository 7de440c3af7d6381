"""Laws of `alr.history.op`: what is written by hand equals autograd, and what each way keeps is what it says."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from alr import LowRankLinear, factorize_
from alr.history.op import FormsW, OwnBackward, saved_bytes
from alr.linear import factored

OPS = [OwnBackward(), FormsW()]


def tensors(shape=(2, 3), m=5, n=4, r=2, bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    def make(*size):
        return torch.randn(*size, dtype=dtype, requires_grad=True)
    return make(*shape, n), make(m, r), make(r, n), make(m) if bias else None


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(op, shape, bias):
    assert gradcheck(op, tensors(shape, bias=bias))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_it_equals_autograd(op, dtype, tolerance):
    args = tensors((8, 16), m=48, n=32, r=6, dtype=dtype)
    y, reference = op(*args), factored(*args)
    g = torch.randn_like(y)
    torch.testing.assert_close(y, reference, rtol=tolerance, atol=10 * tolerance)
    for ours, theirs in zip(torch.autograd.grad(y, args, g), torch.autograd.grad(reference, args, g), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("frozen", [0, 1, 2, 3])
def test_what_needs_no_gradient_gets_none(op, frozen):
    args = tensors()
    args[frozen].requires_grad_(False)
    wanted = [a for a in args if a.requires_grad]
    ours = torch.autograd.grad(op(*args).sum(), wanted)
    for a, b in zip(ours, torch.autograd.grad(factored(*args).sum(), wanted), strict=True):
        torch.testing.assert_close(a, b)
    assert args[frozen].grad is None


@pytest.mark.parametrize("op", OPS)
def test_under_bfloat16_autocast_gradients_come_in_the_parameters_dtype(op):
    x, U, V, b = tensors((64,), m=32, n=24, r=4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, reference = op(x, U, V, b), factored(x, U, V, b)
    assert y.dtype == reference.dtype == torch.bfloat16
    ours = torch.autograd.grad(y.float().square().sum(), (x, U, V, b))
    theirs = torch.autograd.grad(reference.float().square().sum(), (x, U, V, b))
    for a, c in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32 and (a - c).norm() < 0.03 * c.norm()


@pytest.mark.parametrize("op", OPS)
def test_a_second_derivative_is_refused_not_wrong(op):
    x, U, V, b = tensors()
    (g,) = torch.autograd.grad(op(x, U, V, b).square().sum(), U, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


@pytest.mark.parametrize("op", OPS)
def test_a_layer_takes_it_and_trains_alike(op):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.Tanh(), torch.nn.Linear(20, 4))
    plain, own = factorize_(copy.deepcopy(model), 3), factorize_(copy.deepcopy(model), 3, op=op)
    own = copy.deepcopy(own)                                                    # the op goes with it
    assert all(layer.op is not factored for layer in own.modules() if isinstance(layer, LowRankLinear))
    for m in (plain, own):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(m.parameters(), 0.1)
        for _ in range(10):
            m.zero_grad()
            m(torch.randn(16, 10)).square().mean().backward()
            optimizer.step()
    for p, q in zip(plain.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_v6_saves_nothing_that_autograd_does_not():
    """What each keeps for its backward, in numbers of 4 bytes.  Autograd's own way keeps x, h and the factors as well:
    the hand-written backward of v6 saves no memory.  What saves is not forming W, which both have from v3."""
    N, m, n, r = 256, 96, 64, 8
    x, U, V, _ = tensors((N,), m, n, r, bias=False, dtype=torch.float32)
    W = (U @ V).detach().requires_grad_()
    kept = {"autograd": saved_bytes(lambda: factored(x, U, V, None)),
            "v6": saved_bytes(lambda: OwnBackward()(x, U, V, None)),
            "v7.3": saved_bytes(lambda: FormsW()(x, U, V, None)),
            "dense": saved_bytes(lambda: F.linear(x, W)),
            "autograd through W": saved_bytes(lambda: F.linear(x, U @ V))}
    factors = r * (m + n)
    assert kept["v6"] == kept["autograd"] == 4 * (N * n + N * r + factors)
    assert kept["v7.3"] == 4 * (N * n + factors)
    assert kept["dense"] == 4 * (N * n + m * n)
    assert kept["autograd through W"] == 4 * (N * n + m * n + factors)
