"""The update rules of pairs: the fast step against the obvious one, and the laws of the tangent step.

The problem everywhere is the same: W = U V falls towards a fixed matrix, so that G = W - target is known in full.
Tolerances are about ten times what was measured, unless they say otherwise.
"""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from alr.factor import grow, svd_core
from alr.linear import factorize_
from alr.optim import PairOptimizer
from alr.rules import LoRAMuon, Pair, Settings, Spectron, inverse_root, orthogonalize, product_decay_
from alr.state import Reset, Slice, Swap, Transport
from alr.tangent import LoRATSD, Tangent, frame

SETTINGS = Settings(lr=0.05, momentum=0.95, nesterov=True, weight_decay=0.1, decay="factors", ns_steps=5,
                    adjust_lr_fn="original")
RULES = [Spectron(), Tangent(), Tangent(cut="svd"), LoRAMuon(), LoRATSD(), LoRATSD(tau=1, balance=False)]
FREE = [rule for rule in RULES if not isinstance(rule, Spectron)]           # of how W is split
SHAPES = [(20, 5, 12), (12, 5, 20), (20, 5, 12), (20, 7, 12), (12, 12, 20), (20, 12, 12), (9, 9, 9), (30, 1, 8)]


def product(U, V):
    return U @ V                                                    # (m, n)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(shapes=SHAPES, dtype=torch.float64, seed=0):
    """[(U, V)], [target]; W and target of norms around 1."""
    pairs = [(nn.Parameter((draw(m, r, seed=seed + 2 * i) / m ** 0.5).to(dtype)),
              nn.Parameter((draw(r, n, seed=seed + 2 * i + 1) / n ** 0.5).to(dtype))) for i, (m, r, n) in enumerate(shapes)]
    return pairs, [draw(m, n, seed=100 + i) / 3 for i, (m, _, n) in enumerate(shapes)]


def gradients(U, V, target):
    G = U.detach().double() @ V.detach().double() - target                  # (m, n)
    return (G @ V.detach().double().mT).to(U.dtype), (U.detach().double().mT @ G).to(V.dtype)


def train(optimizer, pairs, targets, steps=10):
    for _ in range(steps):
        for (U, V), target in zip(pairs, targets):
            U.grad, V.grad = gradients(U, V, target)
        optimizer.step()


def optimizer_of(pairs, rule, **changes):
    """With SETTINGS."""
    return PairOptimizer(pairs, **{**SETTINGS._asdict(), **changes}, rule=rule)


def worst(pairs, others):
    """The largest relative difference between the products of two lists of pairs."""
    def W(pair):
        return product(*(x.detach().double() for x in pair))
    return max(((W(a) - W(b)).norm() / W(b).norm()).item() for a, b in zip(pairs, others))


def named(rule):
    return repr(rule).replace("balance=", "").replace("cut=", "")


@pytest.fixture(params=RULES, ids=named)
def rule(request):
    return request.param


# ------------------------------------------------------------------------------------------------ all rules

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 5e-3)])     # worst measured: 2e-12, 6e-4
def test_the_fast_step_is_the_obvious_one(rule, dtype, tolerance):
    pairs, targets = problem(dtype=dtype)
    slow = [tuple(x.detach().clone() for x in pair) for pair in pairs]
    states = [rule.state(*pair) for pair in slow]
    train(optimizer_of(pairs, rule), pairs, targets)
    for i, target in enumerate(targets):
        for _ in range(10):
            U, V, *states[i] = rule.reference(*slow[i], *gradients(*slow[i], target), *states[i], SETTINGS)
            slow[i] = U, V
    assert worst(pairs, slow) < tolerance


def test_together_is_one_by_one(rule):
    (together, targets), (alone, _) = problem(), problem()
    train(optimizer_of(together, rule), together, targets)
    for pair, target in zip(alone, targets):
        train(optimizer_of([pair], rule), [pair], [target])
    assert worst(together, alone) < 1e-10


def test_ranks_padded_to_one_width_are_those_by_themselves(rule, monkeypatch):
    shapes = [(20, 5, 12), (20, 7, 12), (20, 12, 12), (20, 1, 12)]
    (together, targets), (alone, _) = problem(shapes), problem(shapes)
    train(optimizer_of(alone, rule), alone, targets)
    for place in ("alr.rules.alike", "alr.tangent.alike"):          # the CPU pads nothing of its own accord
        monkeypatch.setattr(place, lambda pairs: [list(pairs)])
    train(optimizer_of(together, rule), together, targets)
    assert worst(together, alone) < 1e-8


@pytest.mark.parametrize("rule", FREE, ids=named)
def test_the_path_of_w_does_not_depend_on_its_factors(rule):
    pairs, targets = problem()
    others = []
    for i, (U, V) in enumerate(pairs):
        A = torch.eye(U.shape[1], dtype=U.dtype) + 0.5 * draw(U.shape[1], U.shape[1], seed=50 + i) / U.shape[1] ** 0.5
        others.append((nn.Parameter((U @ A).detach()), nn.Parameter(torch.linalg.solve(A, V.detach()))))
    train(optimizer_of(pairs, rule), pairs, targets)
    train(optimizer_of(others, rule), others, targets)
    # LoRA-Muon's roots have a floor, which does depend on the factors
    assert worst(pairs, others) < (0.02 if isinstance(rule, LoRAMuon) else 1e-9)


def test_nothing_is_read_from_the_device(rule):
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    pairs, targets = problem()
    optimizer = optimizer_of(pairs, rule)
    for (U, V), target in zip(pairs, targets):
        U.grad, V.grad = gradients(U, V, target)
    with Reads() as reads:
        optimizer.step()
    assert reads.count == 0
    with Reads() as reads:
        pairs[0][0].sum().item()
    assert reads.count == 1                                         # it does count


def test_saved_and_loaded_it_goes_on_bit_for_bit(rule):
    pairs, targets = problem(dtype=torch.float32)
    optimizer = optimizer_of(pairs, rule)
    train(optimizer, pairs, targets, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    others = [tuple(nn.Parameter(x.detach().clone()) for x in pair) for pair in pairs]
    other = optimizer_of(others, rule)
    other.load_state_dict(saved)
    train(optimizer, pairs, targets, 3)
    train(other, others, targets, 3)
    assert all(torch.equal(x, y) for a, b in zip(pairs, others) for x, y in zip(a, b))


def test_the_state_is_at_most_twice_the_factors_and_whole_from_the_start(rule):
    pairs, targets = problem()
    optimizer = optimizer_of(pairs, rule)
    before = {i: {key: x.shape for key, x in s.items()} for i, s in optimizer.state_dict()["state"].items()}
    train(optimizer, pairs, targets, 1)
    assert before == {i: {key: x.shape for key, x in s.items()} for i, s in optimizer.state_dict()["state"].items()}
    for pair in pairs:
        for p in pair:
            assert sum(x.numel() for x in optimizer.state[p].values() if x.dim() == 2) <= 2 * p.numel()


@pytest.mark.parametrize("policy", [Transport(), Transport(first=False), Slice(), Reset(everything=False), Reset()], ids=repr)
@pytest.mark.parametrize("k", [3, 5, 8])
def test_it_lives_through_a_change_of_rank(rule, policy, k):
    (pair,), (target,) = problem([(20, 5, 12)])
    optimizer = optimizer_of([pair], rule, lr=0.02)
    train(optimizer, [pair], [target], 3)
    U, V = (x.detach() for x in pair)
    new = tuple(map(nn.Parameter, svd_core(U, V, k) if k <= 5 else grow(U, V, k)))
    policy([optimizer], [Swap(*pair, *new)])
    before = (product(*new).detach() - target).norm()
    train(optimizer, [new], [target], 20)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in new}
    assert (product(*new).detach() - target).norm() < before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_fall_and_autocast_is_nothing_to_it(rule, dtype):
    pairs, targets = problem(dtype=dtype)
    before = [(product(*(x.detach().double() for x in pair)) - target).norm() for pair, target in zip(pairs, targets)]
    others = copy.deepcopy(pairs)
    train(optimizer_of(pairs, rule, lr=0.03), pairs, targets)
    assert all((product(*(x.detach().double() for x in pair)) - target).norm() < old
               for pair, target, old in zip(pairs, targets, before))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train(optimizer_of(others, rule, lr=0.03), others, targets)
    assert all(torch.equal(x, y) for a, b in zip(pairs, others) for x, y in zip(a, b))


@pytest.mark.parametrize("rule", [Tangent(), Tangent(cut="svd"), LoRAMuon()], ids=named)
def test_decay_shrinks_w_by_all_of_it(rule):
    pairs, _ = problem()
    W = [product(*pair).detach() for pair in pairs]
    for pair in pairs:
        for p in pair:
            p.grad = torch.zeros_like(p)
    optimizer_of(pairs, rule).step()
    for pair, w in zip(pairs, W):
        torch.testing.assert_close(product(*pair).detach(), (1 - 0.05 * 0.1) * w)


# ------------------------------------------------------------------------------------------------ the tangent step

def dense_muon(W, target, steps, scale):
    """Muon on the whole matrix, in ten lines."""
    M = torch.zeros_like(W)
    for _ in range(steps):
        G = W - target
        M = M.lerp(G, 0.05)
        W = (1 - 0.05 * 0.1) * W - 0.05 * scale * orthogonalize(G.lerp(M, 0.95))
    return W


@pytest.mark.parametrize("cut", ["qr", "svd"])
@pytest.mark.parametrize("shape", [(12, 12, 20), (20, 12, 12), (9, 9, 9), (7, 1, 1)])
def test_at_full_rank_it_is_dense_muon(shape, cut):
    (pair,), (target,) = problem([shape])
    m, _, n = shape
    want = dense_muon(product(*pair).detach(), target, 10, max(1, m / n) ** 0.5)
    train(optimizer_of([pair], Tangent(cut)), [pair], [target])
    torch.testing.assert_close(product(*pair).detach(), want, atol=1e-9, rtol=1e-9)


def test_at_full_rank_it_is_the_muon_of_torch_as_far_as_bfloat16_goes():
    (pair,), (target,) = problem([(20, 12, 12)], torch.float32)
    W = nn.Parameter(product(*pair).detach())
    muon = torch.optim.Muon([W], lr=0.05, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="original")
    start = W.detach().clone()
    for _ in range(10):
        W.grad = (W.detach() - target).float()
        muon.step()
    train(optimizer_of([pair], Tangent()), [pair], [target])
    assert (product(*pair) - W).norm() < 0.02 * (W - start).norm()          # torch's iteration is in bfloat16: 0.004


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 6, 30), (30, 6, 40), (64, 16, 24)])
def test_the_step_of_w_before_the_cut_has_the_rate_as_its_spectral_norm(shape, dtype):
    (pair,), (target,) = problem([shape], dtype)
    states = Tangent().state(*(x.detach() for x in pair))
    _, _, sign, _ = Tangent().sign([Pair(*(x.detach() for x in pair), *gradients(*pair, target), *states)], SETTINGS)
    s = torch.linalg.svdvals(sign.formed()[0].double())
    r = shape[1]
    assert 0.7 < s[0] < 1.21                                        # Newton-Schulz's band
    assert s[min(2 * r, *s.shape) - 1] > 0.3 and s[2 * r:].sum() < 1e-4     # 2r directions, lifted together, and no more


@pytest.mark.parametrize("lr", [0.001, 0.05, 0.5])
def test_either_cut_drops_no_more_than_the_step(lr):
    (pair,), (target,) = problem([(20, 5, 12)])
    U, V = (x.detach() for x in pair)
    settings, states = SETTINGS._replace(lr=lr, weight_decay=0.0), Tangent().state(U, V)
    _, _, sign, _ = Tangent().sign([Pair(U, V, *gradients(U, V, target), *states)], settings)
    step = lr * (20 / 12) ** 0.5 * sign.formed()[0]
    size = {}
    for cut in ("qr", "svd"):
        W = product(*Tangent(cut).reference(U, V, *gradients(U, V, target), *states, settings)[:2])
        size[cut] = torch.linalg.matrix_norm(W - U @ V + step, 2)
    norm = torch.linalg.matrix_norm(step, 2)
    assert 0 < size["svd"] <= size["qr"] * (1 + 1e-9) and size["qr"] <= norm * (1 + 1e-9)


def momentum(optimizer, U, V):
    """M, formed."""
    a, b = optimizer.state[U], optimizer.state[V]
    return a["momentum_buffer"] @ b["frame"] + a["frame"] @ b["momentum_buffer"]


def test_momentum_survives_other_factors_of_the_same_w():
    (kept, targets), (turned, _) = problem([(20, 5, 12)]), problem([(20, 5, 12)])
    one, two = optimizer_of(kept, Tangent()), optimizer_of(turned, Tangent())
    train(one, kept, targets, 4)
    train(two, turned, targets, 4)
    (U, V), A = turned[0], torch.eye(5, dtype=torch.float64) + 0.3 * draw(5, 5)
    new = nn.Parameter((U @ A).detach()), nn.Parameter(torch.linalg.solve(A, V.detach()))
    Transport()([two], [Swap(U, V, *new)])
    train(one, kept, targets, 6)
    train(two, [new], targets, 6)
    assert worst(kept, [new]) < 1e-9


@pytest.mark.parametrize("k", [2, 5, 9])
def test_momentum_survives_another_rank_but_for_what_no_tangent_can_hold(k):
    pairs, targets = problem([(20, 5, 12)])
    optimizer = optimizer_of(pairs, Tangent())
    train(optimizer, pairs, targets, 4)
    (U, V), = pairs
    new = tuple(map(nn.Parameter, svd_core(U.detach(), V.detach(), k) if k < 5 else grow(U.detach(), V.detach(), k)))
    U2, V2 = (x.detach() for x in new)
    P_U, P_V = U2 @ torch.linalg.pinv(U2), torch.linalg.pinv(V2) @ V2
    M = momentum(optimizer, U, V)
    Transport()([optimizer], [Swap(U, V, *new)])
    torch.testing.assert_close(momentum(optimizer, *new), M @ P_V + P_U @ M - P_U @ M @ P_V, atol=1e-9, rtol=1e-9)


def zeroed(X, start, stop):
    X = X.detach().clone()
    X[:, start:stop] = 0
    return X


@pytest.mark.parametrize("cut", ["qr", "svd"])
@pytest.mark.parametrize("which", ["columns of U", "rows of V", "other halves", "U", "V"])
def test_directions_without_weight_move_at_once(which, cut):
    ((U, V),), targets = problem([(20, 6, 12)], torch.float32)
    U = zeroed(U, *{"columns of U": (3, 6), "other halves": (3, 6), "U": (0, 6)}.get(which, (0, 0)))
    V = zeroed(V.mT, *{"rows of V": (2, 5), "other halves": (0, 3), "V": (0, 6)}.get(which, (0, 0))).mT
    pair = nn.Parameter(U), nn.Parameter(V.contiguous())
    train(optimizer_of([pair], Tangent(cut)), [pair], targets, 3)
    s = torch.linalg.svdvals(product(*pair).detach())
    assert s.isfinite().all() and s[5] > 1e-3 and s[6] < 1e-5       # all six directions have weight now


@pytest.mark.parametrize("cut", ["qr", "svd"])
def test_a_layer_that_is_not_used_rests(cut):
    pairs, targets = problem(dtype=torch.float32)
    optimizer = optimizer_of(pairs, Tangent(cut), weight_decay=0.0)
    train(optimizer, pairs, targets, 2)
    for pair in pairs:
        for p in pair:
            p.grad = torch.zeros_like(p)
            optimizer.state[p]["momentum_buffer"].mul_(1e-25)       # after a thousand steps without a gradient
    W = [product(*pair).detach().clone() for pair in pairs]
    optimizer.step()
    for pair, w in zip(pairs, W):
        torch.testing.assert_close(product(*pair).detach(), w, atol=1e-5, rtol=1e-5)


def test_factors_stay_near_and_u_is_orthonormal():
    # so that a bfloat16 weight that should not move does not, and averages of factors over steps are averages of W
    pairs, targets = problem([(20, 5, 12), (12, 5, 20)])
    optimizer = optimizer_of(pairs, Tangent())
    train(optimizer, pairs, targets, 5)
    before = copy.deepcopy(pairs)
    optimizer.param_groups[0]["lr"] = 1e-6
    train(optimizer, pairs, targets, 1)
    for (U, V), (U0, V0) in zip(pairs, before):
        torch.testing.assert_close(U.detach().mT @ U.detach(), torch.eye(5, dtype=U.dtype))
        assert (U - U0).norm() < 1e-4 and (V - V0).norm() < 1e-4


def test_a_frame_spans_what_is_there_and_nothing_else():
    for X in (draw(3, 40, 6), draw(3, 40, 2) @ draw(3, 2, 6, seed=1), torch.zeros(3, 40, 6).double(), draw(1, 6, 6)):
        for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-3)):
            Q, A = frame(X.to(dtype))
            assert Q.isfinite().all() and A.isfinite().all()
            torch.testing.assert_close((Q @ (Q.mT @ X.to(dtype))).double(), X, atol=1e-5, rtol=0)
            s, size = torch.linalg.svdvals(Q), torch.linalg.svdvals(X)
            there = size > 1e-3
            torch.testing.assert_close(s[there], torch.ones_like(s[there]), atol=tolerance, rtol=0)
            assert s.max() < 1 + 1e-4 and (s[size < 1e-12] < 0.1).all()     # float32 has 0.03 of its own noise there


# ------------------------------------------------------------------------------------------------ its relatives

@pytest.mark.parametrize("shape", [(40, 6), (6, 6)])
def test_the_inverse_root_is_one(shape):
    X = draw(*shape)
    G = X.mT @ X
    R = inverse_root(G, 1e-9)
    torch.testing.assert_close(R @ G @ R, torch.eye(6, dtype=G.dtype), atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_lora_muon_moves_w_by_at_most_the_rate_to_first_order(scale):
    ((U, V),), (target,) = problem([(20, 5, 12)])
    U, V = scale * U.detach(), V.detach()
    settings = SETTINGS._replace(weight_decay=0.0, adjust_lr_fn="none")
    U2, V2, *_ = LoRAMuon().reference(U, V, *gradients(U, V, target), *LoRAMuon().state(U, V), settings)
    moved = torch.linalg.matrix_norm((U2 - U) @ V + U @ (V2 - V), 2)
    assert 0.3 * 0.05 < moved < 1.21 * 0.05


def test_lora_tsd_moves_w_along_the_projected_sign():
    ((U, V),), (target,) = problem([(20, 5, 12)])
    U, V = U.detach(), V.detach()
    settings = SETTINGS._replace(weight_decay=0.0)
    U2, V2, *_ = LoRATSD(tau=1, balance=False).reference(U, V, *gradients(U, V, target), *LoRATSD().state(U, V), settings)
    _, _, sign, _ = Tangent().sign([Pair(U, V, *gradients(U, V, target), *Tangent().state(U, V))], settings)
    Z, P_U, P_V = sign.formed()[0], U @ torch.linalg.pinv(U), torch.linalg.pinv(V) @ V
    want = -0.05 * (20 / 12) ** 0.5 * (Z @ P_V + P_U @ Z - P_U @ Z @ P_V)
    torch.testing.assert_close((U2 - U) @ V + U @ (V2 - V), want, atol=1e-9, rtol=1e-9)


def test_lora_tsd_balances_its_factors_and_their_momenta():
    pairs, targets = problem([(20, 5, 12)])
    optimizer = optimizer_of(pairs, LoRATSD())
    with torch.no_grad():
        pairs[0][0].mul_(9)
        pairs[0][1].div_(9)
    train(optimizer, pairs, targets, 2)
    U, V = pairs[0]
    torch.testing.assert_close(U.norm(), V.norm())


def test_product_decay_is_the_gradient_step_of_the_products_norm():
    torch.manual_seed(0)
    model = factorize_(nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 5)), rank=3)
    layer = model[0]
    U, V = layer.U.detach().clone(), layer.V.detach().clone()
    (0.5 * (layer.U @ layer.V).square().sum()).backward()
    want = U - 0.1 * layer.U.grad, V - 0.1 * layer.V.grad
    bias = layer.bias.detach().clone()
    product_decay_(model, 0.1)
    torch.testing.assert_close(layer.U.detach(), want[0])
    torch.testing.assert_close(layer.V.detach(), want[1])
    assert torch.equal(layer.bias, bias)


@pytest.mark.parametrize("zero", ["of rank 0", "U is zero", "V is zero"])
def test_a_layer_without_a_direction_is_taken_and_trained_once_it_has_one(rule, zero):
    r = 0 if zero == "of rank 0" else 3
    (U, V), target = problem([(20, r, 12)])[0][0], draw(20, 12) / 3
    with torch.no_grad():
        (U if zero[0] == "U" else V).zero_()
    optimizer = optimizer_of([(U, V)], rule)
    train(optimizer, [(U, V)], [target], 2)
    new = [nn.Parameter(x) for x in grow(U, V, r + 2)]
    Transport()([optimizer], [Swap(U, V, *new)])
    for _ in range(5):
        before = product(*new).detach()
        train(optimizer, [new], [target], 1)
    moved = torch.linalg.matrix_norm(product(*new).detach() - before, 2)
    assert 0 < moved < (0.25 if isinstance(rule, Spectron | Tangent) else 1e3)      # lr * shape scale * some 2.5
    if isinstance(rule, Spectron):                                  # it knows the size of both factors, as at any birth
        for x, side in zip(new, (new[0].detach(), new[1].detach().mT)):
            direction = optimizer.state[x]["direction"]
            assert direction.norm() > 0.99 and (side.mT @ direction).norm() > 0.3 * torch.linalg.matrix_norm(side, 2)
