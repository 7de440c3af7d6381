"""Every law that has a precision, in every precision: a table of law x dtype, and float32 weights inside autocast."""

import ast
import contextlib
import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import alr
from alr.estimate import effective_rank, stable_rank, stable_rank_exact
from alr.factor import core_cut, exact, grow, relative_change, svd_core, svd_full
from alr.fisher import fisher_cut
from alr.init import Fresh, Gaussian, Spectral
from alr.linear import densify_, factorize_, low_rank_layers
from alr.resize import SvdCore, grow_along
from alr.rules import Pair, Settings, Spectron, orthogonalize, whitener
from alr.state import Swap, Transport
from alr.tangent import Tangent

EPS = {"float32": 2 ** -23, "bfloat16": 2 ** -7, "float16": 2 ** -10, "float64": 2 ** -52, "autocast": 2 ** -23}
dtypes = pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "float64"])
kinds = pytest.mark.parametrize("kind", list(EPS))


def dtype_of(kind):
    return torch.float32 if kind == "autocast" else getattr(torch, kind)


def cast(kind):
    """The caller's autocast, where the kind says so."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if kind == "autocast" else contextlib.nullcontext()


def factors(m, n, r, kind, seed=0):
    g = torch.Generator().manual_seed(seed)
    return ((torch.randn(m, r, generator=g, dtype=torch.float64) / m ** 0.5).to(dtype_of(kind)),
            (torch.randn(r, n, generator=g, dtype=torch.float64) / n ** 0.5).to(dtype_of(kind)))


def change(U, V, U2, V2):
    """||U V - U' V'|| / ||U V||, by forming both in float64."""
    W = U.detach().double() @ V.detach().double()
    return (torch.linalg.norm(U2.detach().double() @ V2.detach().double() - W) / torch.linalg.norm(W)).item()


# ------------------------------------------------------------------------------------------------ changes of rank

def best(U, V, k):
    s = torch.linalg.svdvals(U.double() @ V.double())
    return (s[k:].square().sum() / s.square().sum()).sqrt().item()


@kinds
@pytest.mark.parametrize("r, k", [(64, 60), (128, 120)])
@pytest.mark.parametrize("cut",
                         [svd_core, svd_full, lambda U, V, k: core_cut(U, V, k)[:2], lambda U, V, k: SvdCore()(U, V, k)[:2]],
                         ids=["svd_core", "svd_full", "core_cut", "SvdCore"])
def test_a_cut_is_as_good_as_the_best_to_the_rounding_of_its_dtype(cut, r, k, kind):
    U, V = factors(512, 512, r, kind)
    with cast(kind):
        U2, V2 = cut(U, V, k)
    assert U2.dtype == V2.dtype == U.dtype and (U2.shape, V2.shape) == ((512, k), (k, 512))
    assert change(U, V, U2, V2) <= 1.1 * best(U, V, k) + 2 * EPS[kind]
    assert (U2.double().norm(dim=0) > 0).all()                      # no column is thrown away


@kinds
def test_a_cut_in_the_metric_of_the_loss_keeps_its_precision(kind):
    U, V = factors(96, 80, 24, kind)
    H, K = V.double() @ V.double().mT, U.double().mT @ U.double()   # isotropic inputs and gradients: the SVD is the best cut
    with cast(kind):
        U2, V2 = fisher_cut(U, V, 20, H, K)
    assert U2.dtype == U.dtype and change(U, V, U2, V2) <= 1.1 * best(U, V, 20) + 2 * EPS[kind]


@kinds
@pytest.mark.parametrize("more", [lambda U, V, k: grow(U, V, k), lambda U, V, k: grow_along(U, V, k, torch.ones(96, 80)),
                                  lambda U, V, k: SvdCore()(U, V, k)[:2]], ids=["grow", "grow_along", "SvdCore"])
def test_growing_leaves_w_as_it_was(more, kind):
    U, V = factors(96, 80, 24, kind)
    with cast(kind):
        U2, V2 = more(U, V, 30)
    assert U2.dtype == V2.dtype == U.dtype and torch.equal(U2[:, :24], U) and torch.equal(V2[:24], V)
    assert not U2[:, 24:].any() and (V2[24:].double().norm(dim=1) > 0).all()
    assert change(U, V, U2, V2) == 0


@kinds
def test_estimates_hardly_depend_on_the_precision(kind):
    U, V = factors(96, 80, 24, kind)
    with cast(kind):
        got = stable_rank(U, V), stable_rank_exact(U, V), effective_rank(U, V), relative_change(U, V, U, V)
    s = torch.linalg.svdvals(U.double() @ V.double())
    assert got[1] == pytest.approx((s.square().sum() / s[0] ** 2).item(), rel=1e-4)
    assert got[0] == pytest.approx(got[1], rel=0.01) and got[3] < 1e-6
    assert 1 <= got[2] <= 24


@kinds
@pytest.mark.parametrize("init", [Spectral(), Spectral(match=True), Fresh(), Gaussian()], ids=repr)
def test_every_start_answers_in_the_weights_dtype(init, kind):
    W = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).to(dtype_of(kind))
    with cast(kind):
        U, V = init(W, 30)
    assert U.dtype == V.dtype == W.dtype and U.isfinite().all() and V.isfinite().all()
    if isinstance(init, Spectral):
        assert change(W, torch.eye(30), U, V) <= 4 * EPS[kind] + 1e-6


@kinds
def test_into_factors_and_back_again_is_w_to_rounding(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 48)).to(dtype_of(kind))
    W = [layer.weight.detach().double() for layer in (model[0], model[2])]
    with cast(kind):
        densify_(factorize_(model, rank=lambda name, linear: min(linear.weight.shape)))
    for layer, before in zip((model[0], model[2]), W):
        assert layer.weight.dtype == dtype_of(kind)
        assert (layer.weight.double() - before).norm() <= (4 * EPS[kind] + 2e-6) * before.norm()


# ------------------------------------------------------------------------------------------------ what the user has set

CUDA, CPU = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
SET = {"nothing": lambda: None, "highest": lambda: torch.set_float32_matmul_precision("highest"),
       "high": lambda: torch.set_float32_matmul_precision("high"),
       "medium": lambda: torch.set_float32_matmul_precision("medium"),
       "allow_tf32": lambda: setattr(CUDA, "allow_tf32", True),
       "cuda tf32": lambda: setattr(CUDA, "fp32_precision", "tf32"),
       "cpu bf16": lambda: setattr(CPU, "fp32_precision", "bf16"), "cpu tf32": lambda: setattr(CPU, "fp32_precision", "tf32"),
       "all tf32": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
       "all bf16": lambda: setattr(torch.backends, "fp32_precision", "bf16"),
       "both": lambda: (torch.set_float32_matmul_precision("high"), setattr(CPU, "fp32_precision", "bf16"))}


def precisions():
    """What torch tells of itself, by both of its ways; the older refuses to answer where the newer was used."""
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = "mixed"
    return CUDA.fp32_precision, CPU.fp32_precision, torch.backends.fp32_precision, older, torch.is_autocast_enabled("cpu")


@pytest.fixture(params=SET)
def as_set(request):
    SET[request.param]()
    yield request.param
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    CUDA.fp32_precision = CPU.fp32_precision = "none"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_products_are_exact_and_what_the_user_had_set_comes_back(as_set, device):
    knob = CUDA if device == "cuda" else CPU
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = precisions()
        for error in (None, ValueError):
            with contextlib.suppress(ValueError):
                with exact(torch.device(device)):
                    with exact(torch.device(device)):               # nested
                        pass
                    assert knob.fp32_precision in ("ieee", "none") and torch.is_autocast_enabled(device) is False
                    if error:
                        raise error
            assert precisions() == before
    torch.backends.fp32_precision = "ieee"                          # a knob that followed this one still does
    assert knob.fp32_precision == ("ieee" if as_set.split()[0] in ("all", "nothing") or before[device == "cpu"] == "none"
                                   else before[device == "cpu"])


@pytest.mark.parametrize("rule", [Tangent(), Spectron()], ids=repr)
def test_the_pair_optimizer_and_a_resize_work_whatever_the_user_has_set(as_set, rule):
    def trained():
        torch.manual_seed(0)
        model = factorize_(nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 8)), rank=5)
        optimizer = alr.PairOptimizer(model, rule=rule)
        adapter = alr.RankAdapter(model, optimizer, alr.recipes.uniform)
        for k in (4, 6):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
            adapter.resize({"0": k})
        return model, precisions()
    model, after = trained()
    assert after == precisions() and all(p.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------------------------------------ the pair optimizer

@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("condition", [1e1, 1e2, 1e4, 1e6])
def test_orthogonalized_values_stay_below_their_bound_whatever_the_condition(kind, condition):
    Q = torch.linalg.qr(torch.randn(512, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    P = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    X = ((Q * torch.logspace(0, -torch.tensor(condition).log10().item(), 64, dtype=torch.float64)) @ P.mT).to(dtype_of(kind))
    wide = torch.promote_types(X.dtype, torch.float32)
    for O in (X.to(wide) @ whitener(X.to(wide).mT @ X.to(wide)), orthogonalize(X).double()):
        assert 0.6 < torch.linalg.matrix_norm(O.double(), 2) < 1.25
    if X.dtype != wide:
        with pytest.raises(ValueError, match="whitener: G is b?float16.*form it in float32"):
            whitener(X.mT @ X)


SETTINGS = Settings(lr=0.05, momentum=0.95, nesterov=True, weight_decay=0.0, decay="factors", ns_steps=5,
                    adjust_lr_fn="original")


def by_hand(U, V, grads, lr):
    """Ten lines of Spectron in float64: Nesterov momentum, Newton-Schulz on each factor, one radius for the two."""
    U, V, (M_U, M_V) = U.double(), V.double(), (torch.zeros_like(x, dtype=torch.float64) for x in (U, V))
    u, v = torch.linalg.svd(U)[0][:, 0], torch.linalg.svd(V)[2][0]      # the longest directions, by the SVD
    path = []
    for g_U, g_V in grads:
        M_U, M_V = 0.95 * M_U + 0.05 * g_U, 0.95 * M_V + 0.05 * g_V
        O_U, O_V = orthogonalize(0.05 * g_U + 0.95 * M_U), orthogonalize((0.05 * g_V + 0.95 * M_V).mT).mT
        u, v = F.normalize(U @ (U.mT @ u), dim=0), F.normalize(V.mT @ (V @ v), dim=0)
        rho = lr * max(1, len(U) / V.shape[1]) ** 0.5 / ((U.mT @ u).norm() + (V @ v).norm() + 1)
        U, V = U - rho * O_U, V - rho * O_V
        path.append((U, V))
    return path


def spread(m, r, seed):
    """A matrix with singular values 2, 1, ..., so that a few power iterations find the first."""
    g = torch.Generator().manual_seed(seed)
    P, Q = (torch.linalg.qr(torch.randn(n, r, generator=g, dtype=torch.float64)).Q for n in (m, r))
    return P * torch.cat([torch.tensor([2.0]), torch.linspace(1, 0.3, r - 1)]) @ Q.mT


@kinds
def test_ten_steps_are_those_of_spectron_by_hand(kind):
    U, V = spread(40, 8, 0).to(dtype_of(kind)), spread(24, 8, 1).mT.contiguous().to(dtype_of(kind))
    g = torch.Generator().manual_seed(2)
    grads = [(torch.randn(40, 8, generator=g, dtype=torch.float64), torch.randn(8, 24, generator=g, dtype=torch.float64))
             for _ in range(10)]
    a, b = nn.Parameter(U.clone()), nn.Parameter(V.clone())
    optimizer = alr.PairOptimizer([(a, b)], lr=0.05, rule=Spectron())
    for (g_U, g_V), (U2, V2) in zip(grads, by_hand(U, V, grads, 0.05)):
        a.grad, b.grad = g_U.to(U), g_V.to(V)
        with cast(kind):
            optimizer.step()
    for p, start, end in ((a, U, U2), (b, V, V2)):
        moved = (end - start.double()).norm()
        assert (p.detach().double() - end).norm() <= (0.002 + 8 * EPS[kind]) * moved + 10 * EPS[kind] * start.double().norm()


@dtypes
def test_one_step_of_the_rule_is_its_reference(kind):
    U, V = factors(40, 24, 8, kind)
    g_U, g_V = factors(40, 24, 8, kind, seed=1)
    rule = Spectron()
    s_U, s_V = rule.state(U, V)
    U2, V2, t_U, t_V = rule.reference(U, V, g_U, g_V, copy.deepcopy(s_U), copy.deepcopy(s_V), SETTINGS)
    a, b = nn.Parameter(U.clone()), nn.Parameter(V.clone())
    with torch.no_grad():
        rule.step([Pair(a, b, g_U, g_V, s_U, s_V)], SETTINGS)
    for p, q in ((a, U2), (b, V2), (s_U["direction"], t_U["direction"]), (s_V["momentum_buffer"], t_V["momentum_buffer"])):
        torch.testing.assert_close(p.detach().double(), q.double(), rtol=1e-4 + 2 * EPS[kind], atol=1e-5 + EPS[kind])


def test_at_birth_the_longest_direction_is_known():
    U, V = spread(40, 8, 0).float(), spread(24, 8, 1).mT.float()
    s_U, s_V = Spectron().state(U, V)
    for s, side in ((s_U, U), (s_V, V.mT)):
        assert (side.mT @ s["direction"]).norm() > 0.999 * torch.linalg.matrix_norm(side, 2)


def net(kind, d=48, rank=0.9):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d), nn.ReLU(), nn.Linear(d, 12)).to(dtype_of(kind))
    return factorize_(model, rank=rank)


def batch(i, kind, d=48):
    x = torch.randn(64, d, generator=torch.Generator().manual_seed(i))
    return x.to(dtype_of(kind)), x[:, :12].argmax(1)


def loss_of(model, i, kind):
    x, y = batch(i, kind)
    return F.cross_entropy(model(x).float(), y)


@kinds
@pytest.mark.parametrize("rule, most", [(Spectron(), 1.25), (Tangent(), 2.5)], ids=repr)    # its cut drops a step's length
def test_a_step_moves_w_by_about_lr_and_never_by_more(kind, rule, most):
    model, lr, moves = net(kind), 0.03, []
    optimizer = alr.PairOptimizer(model, lr=lr, rule=rule)
    for i in range(25):
        before = [(layer.U.detach().double().clone(),
                   layer.V.detach().double().clone()) for layer in low_rank_layers(model).values()]
        loss_of(model, i, kind).backward()
        with cast(kind):
            optimizer.step()
        optimizer.zero_grad()
        for layer, (U, V) in zip(low_rank_layers(model).values(), before):
            moved = torch.linalg.matrix_norm(layer.U.detach().double() @ layer.V.detach().double() - U @ V, 2)
            moves.append(moved.item() / lr / max(1, layer.out_features / layer.in_features) ** 0.5)
    assert max(moves) < most and min(moves) > 0.2


# ------------------------------------------------------------------------------------------------ moments

@dtypes
@pytest.mark.parametrize("k", [6, 9])
def test_transport_carries_moments_to_the_rounding_of_their_dtype(k, kind):
    U, V = (nn.Parameter(x) for x in factors(40, 30, 8, kind))
    G = torch.randn(40, 30, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    optimizer = torch.optim.Adam([U, V])
    for p, g in ((U, G @ V.detach().double().mT), (V, U.detach().double().mT @ G)):
        optimizer.state[p] = {"step": torch.tensor(1000.0), "exp_avg": g.to(p), "exp_avg_sq": (g.square() * 2).to(p)}
    new = SvdCore()(U.detach(), V.detach(), k)
    U2, V2 = (nn.Parameter(x) for x in new[:2])
    Transport()([optimizer], [Swap(U, V, U2, V2, new.mix)])
    kept = min(k, 8)
    for p, wanted in ((U2, G @ V2.detach().double().mT), (V2, U2.detach().double().mT @ G)):
        state = optimizer.state[p]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == p.dtype and state["exp_avg"].shape == p.shape
        got = (state["exp_avg"][:, :kept] if p is U2 else state["exp_avg"][:kept]).double()
        wanted = wanted[:, :kept] if p is U2 else wanted[:kept]
        assert (got - wanted).norm() <= (1e-5 + 6 * EPS[kind]) * wanted.norm()
        assert (state["exp_avg_sq"] >= 0).all() and state["exp_avg_sq"].isfinite().all()


@dtypes
def test_going_on_after_a_change_of_rank_is_not_stopping(kind):
    a = net(kind)
    optimizer = alr.PairOptimizer(a, lr=0.03)
    recipe = replace(alr.recipes.alr, every=4, control=replace(alr.recipes.alr.control, min_rank=2))
    adapter = alr.RankAdapter(a, optimizer, recipe, total_steps=24)
    def run(model, optimizer, adapter, start, stop):
        for i in range(start, stop):
            loss_of(model, i, kind).backward()
            optimizer.step()
            adapter.step()
            optimizer.zero_grad()
    run(a, optimizer, adapter, 0, 9)
    saved = copy.deepcopy((a.state_dict(), optimizer.state_dict(), adapter.state_dict()))
    b = net(kind, rank=0.9)
    b.load_state_dict(saved[0])
    other = alr.PairOptimizer(b, lr=0.03)
    other.load_state_dict(saved[1])
    second = alr.RankAdapter(b, other, recipe, total_steps=24)
    second.load_state_dict(saved[2])
    run(a, optimizer, adapter, 9, 18)
    run(b, other, second, 9, 18)
    assert adapter.ranks == second.ranks
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


# ------------------------------------------------------------------------------------------------ all of it together

def trained(name, kind, steps=40):
    recipe = replace(alr.recipes.get(name), every=8)
    if name == "alr":
        recipe = replace(recipe, control=replace(recipe.control, min_rank=2))
    model = net(kind)
    optimizer = alr.PairOptimizer(model, lr=0.05)
    adapter = alr.RankAdapter(model, optimizer, recipe, total_steps=steps)
    losses, events = [], []
    for i in range(steps):
        with cast(kind):                                            # the whole step inside, as many loops are written
            loss = loss_of(model, i, kind)
            loss.backward()
            optimizer.step()
            events += adapter.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert all(p.isfinite().all() for p in model.parameters())
    return sum(losses[-8:]) / 8, losses[0], events, adapter.ranks


@pytest.mark.parametrize("name", ["alr", "repaired", "v10"])
def test_a_short_training_is_the_same_in_every_precision(name):
    torch.manual_seed(0)
    end, start, events, ranks = trained(name, "float32")
    assert end < 0.95 * start and events
    for kind in ("bfloat16", "float16", "float64", "autocast"):
        torch.manual_seed(0)
        other, _, moved, chosen = trained(name, kind)
        assert other == pytest.approx(end, rel=0.04), kind
        assert moved and all(abs(chosen[layer] - ranks[layer]) <= 4 for layer in ranks), (kind, chosen, ranks)


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float64"])
def test_suggested_ranks_hardly_depend_on_the_precision(kind):
    def found(kind):
        model = densify_(net(kind))
        with torch.no_grad():                                       # layers that differ in how much rank they need
            model[2].weight[:, 4:] *= 0.01
        return model, alr.suggest_ranks(model, [batch(i, kind) for i in range(8)], share=0.4,
                                        loss=lambda m, b: F.cross_entropy(m(b[0]).float(), b[1]))
    (_, full), (model, other) = found("float32"), found(kind)
    assert other.parameters[0] <= 0.4 * other.parameters[1] and other.ranks.keys() == full.ranks.keys()
    assert all(abs(other.ranks[name] - full.ranks[name]) <= 3 for name in full.ranks)
    factorize_(model, other.ranks, init=other.init)
    assert all(p.dtype == dtype_of(kind) for p in model.parameters())


# ------------------------------------------------------------------------------------------------ devices without float64

def test_nothing_becomes_float64_before_it_has_left_its_device():
    """MPS has no float64: X.double() is for `factor.wide` alone; elsewhere it may only follow .cpu()."""
    def calls(place, name):
        return [node for node in ast.walk(place) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                and node.func.attr == name]
    root = Path(alr.__file__).parent
    found = []
    for path in sorted(root.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        allowed = [node for part in ast.walk(tree) if isinstance(part, ast.FunctionDef) and part.name == "wide"
                   for node in calls(part, "double")]
        for call in calls(tree, "double"):
            if call not in allowed and "cpu" not in ast.unparse(call.func.value).rpartition(".")[2]:
                found.append(f"{path.relative_to(root)}: {ast.unparse(call)}")
    assert [line for line in found if not line.startswith("adapt.py")] == []
