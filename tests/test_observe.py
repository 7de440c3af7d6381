"""What a decision has seen: every row once, whole optimizer steps, float32, and nothing left behind."""

import copy
import io
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import alr
from alr import LowRankLinear, RankAdapter
from alr.budget import Budget
from alr.linear import factored, factorize_, low_rank_layers
from alr.observe import Observer

close = torch.testing.assert_close


def net(seed=0):
    torch.manual_seed(seed)
    return factorize_(nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 5)), rank=4)


def batch(i=0, rows=32, n=12):
    g = torch.Generator().manual_seed(i)
    return torch.randn(rows, n, generator=g), torch.randint(5, (rows,), generator=g)


def loss(model, x, y):
    return F.cross_entropy(model(x), y)


def observed(model, passes, steps=4, needs=("importance",), **kwargs):
    """Seen, after `passes(model, step)` has run forward and backward in each of the steps."""
    observer = Observer(low_rank_layers(model), needs, steps, **kwargs)
    for i in range(steps):
        model.zero_grad()
        passes(model, i)
        observer.commit()
    return observer.close()


def plain(model, i):
    loss(model, *batch(i)).backward()


def same(a, b, **bounds):
    assert a.keys() == b.keys()
    for name in a:
        close(a[name].importance, b[name].importance, **(bounds or dict(rtol=1e-4, atol=1e-12)))


# ------------------------------------------------------------------------------------------------ what is counted

def test_moments_are_those_of_hidden_values_and_of_the_summed_loss():
    model, layer = net(), None
    seen = observed(model, plain, steps=2, needs=("input_moment", "grad_moment"))
    layer, H, K = model[2], 0, 0
    for i in range(2):
        x, y = batch(i)
        h = (torch.tanh(model[0](x)) @ layer.V.mT).detach().requires_grad_()            # (B, r)
        F.cross_entropy(model[4](torch.tanh(h @ layer.U.mT + layer.bias)), y, reduction="sum").backward()
        H, K = H + h.detach().mT @ h.detach() / 64, K + h.grad.mT @ h.grad / 64         # means over both batches
    close(seen["2"].input_moment, H.double(), rtol=1e-5, atol=1e-7)
    close(seen["2"].grad_moment, K.double(), rtol=1e-5, atol=1e-7)
    assert (seen["2"].steps, seen["2"].rows) == (2, 32)


def along(layer, one):
    """Squares of the derivatives of the loss just gone back, along each direction: with W' = U M V, dloss/dM = U^T g_U."""
    M = layer.U.detach().double().mT @ layer.U.grad.double()                            # (r, r)
    return torch.einsum("ri,rs,is->i", one.A, M, one.B).square()


def by_hand(model, seen, data, rows):
    """Importance from one backward per loss term of the second half of the window, {layer: (r,)}."""
    felt = {name: 0 for name in seen}
    for i in (2, 3):
        x, y = data(i)
        for row in range(rows):
            model.zero_grad()
            loss(model, x[row:row + 1], y[row:row + 1]).backward()
            for name, layer in low_rank_layers(model).items():
                felt[name] = felt[name] + along(layer, seen[name]) / (2 * 2 * rows)
    return felt


def test_importance_is_half_the_mean_square_of_what_the_loss_of_a_row_feels():
    model = net()
    seen = observed(model, plain)
    for name, felt in by_hand(model, seen, batch, 32).items():
        close(seen[name].importance, felt, rtol=1e-3, atol=1e-9)
        assert (seen[name].importance.diff() <= 0).all()
        close(seen[name].A @ seen[name].B, torch.eye(4, dtype=torch.double), rtol=1e-6, atol=1e-6)


class Pool(nn.Module):
    """A trunk over T positions, and a head over their mean: one loss per example."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.head = nn.Linear(16, 5)
        factorize_(self, rank=4)

    def forward(self, x):                                                               # (B, T, n)
        return self.head(self.trunk(x).mean(1))


@pytest.mark.parametrize("T", [1, 4, 16, 64])
def test_a_pooled_classifier_is_measured_on_examples(T):
    model = Pool()
    def data(i):
        return torch.randn(24, T, 12, generator=torch.Generator().manual_seed(i)), batch(i, 24)[1]
    seen = observed(model, lambda m, i: loss(m, *data(i)).backward())
    for name, felt in by_hand(model, seen, data, 24).items():
        close(seen[name].importance, felt, rtol=2e-2, atol=1e-9)


def test_what_a_term_of_the_loss_belongs_to_can_be_said():
    def data(i):
        return torch.randn(24, 8, 12, generator=torch.Generator().manual_seed(i)), batch(i, 24)[1]
    rows, examples, auto = (observed(Pool(), lambda m, i: loss(m, *data(i)).backward(), per=per)
                            for per in ("row", "example", "auto"))
    same(auto, examples)
    assert (rows["trunk.0"].importance / examples["trunk.0"].importance - 1).abs().max() > 0.5


def test_a_language_model_is_measured_on_tokens():
    torch.manual_seed(0)
    model = factorize_(nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5)), rank=4)
    flat, deep = copy.deepcopy(model), model
    def tokens(m, i, shape):
        x, y = batch(i, 32)
        F.cross_entropy(m(x.reshape(*shape, 12)).flatten(0, -2), y).backward()
    same(observed(flat, lambda m, i: tokens(m, i, (32,))), observed(deep, lambda m, i: tokens(m, i, (4, 8))))


class Experts(nn.Module):
    """Each row goes to one of two experts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(12, 5), nn.Linear(12, 5)
        factorize_(self, rank=4)

    def forward(self, x):
        out = x.new_zeros(len(x), 5)
        few = x[:, 0] > 1.0
        return out.index_put((few.nonzero()[:, 0],), self.a(x[few])).index_put(((~few).nonzero()[:, 0],), self.b(x[~few]))


def test_an_expert_has_the_share_of_the_loss_that_is_its_own():
    model = Experts()
    seen = observed(model, plain)
    felt = by_hand(model, seen, batch, 32)
    ours, theirs = sum(one.importance.sum() for one in seen.values()), sum(x.sum() for x in felt.values())
    for name in seen:                                               # no layer sees all rows: up to one factor for all
        close(seen[name].importance / ours, felt[name] / theirs, rtol=0.03, atol=1e-6)


# ------------------------------------------------------------------------------------------------ what is counted once

def checkpointed(model, i):
    x, y = batch(i)
    F.cross_entropy(model[4](model[3](checkpoint(model[:3], x, use_reentrant=False))), y).backward()


def with_a_forward_too_many(model, i):
    model[0](10 + batch(i)[0])                                      # gradients on, and no backward
    plain(model, i)


def validated(model, i):
    model.eval()
    loss(model, *batch(i + 50))
    model.train()
    plain(model, i)


def in_micro_batches(model, i):
    x, y = batch(i)
    for part in range(4):
        (loss(model, x[part::4], y[part::4]) / 4).backward()


@pytest.mark.parametrize("passes", [checkpointed, with_a_forward_too_many, validated, in_micro_batches])
def test_every_row_counts_once(passes):
    same(observed(net(), passes), observed(net(), plain))


def test_a_step_that_is_not_finite_does_not_count():
    def skipping(model, i):
        x, y = batch(i if i < 1 else i - 1)
        (loss(model, x, y) * (float("inf") if i == 1 else 1)).backward()
    five = observed(net(), skipping, steps=5)
    assert all(one.steps == 4 for one in five.values())
    assert all(one.importance.isfinite().all() and one.importance[0] > 0 for one in five.values())


def test_micro_batches_of_a_skipped_step_do_not_leak_into_the_next():
    a, b = net(), net()
    def overflown(model, i):
        if i == 1:
            (loss(model, *batch(9)) * float("inf")).backward()
            observer.settle()                                       # no optimizer step came of it
        plain(model, i)
    observer = Observer(low_rank_layers(a), ("importance",), 4)
    for i in range(4):
        overflown(a, i)
        observer.commit()
    same(observer.close(), observed(b, plain))


class Twice(nn.Module):
    def __init__(self, shared):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(12, 12, bias=False)
        self.head = nn.Linear(12, 5)
        factorize_(self, rank=4)
        self.second = self.first if shared else copy.deepcopy(self.first)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def test_a_layer_used_twice_counts_as_its_two_uses():
    one, two = observed(Twice(True), plain), observed(Twice(False), plain)
    both = sum(two[name].importance.sum() for name in ("first", "second"))
    terms = one["first"].rows / 32                                  # its rows are twice the loss terms: one factor for all
    assert terms == 2
    close(one["first"].importance.sum() / terms, both, rtol=0.1, atol=0)
    close(one["head"].importance / terms, two["head"].importance, rtol=1e-3, atol=1e-9)


def test_the_scale_of_the_loss_is_one_factor_for_all():
    a, b = observed(net(), plain), observed(net(), lambda m, i: (loss(m, *batch(i)) * 65536).backward())
    for name in a:
        close(b[name].importance / 65536 ** 2, a[name].importance, rtol=1e-3, atol=1e-12)


def test_a_layer_that_saw_nothing_or_whose_output_nobody_feels_has_no_importance():
    model = nn.ModuleDict({"used": net(), "unused": LowRankLinear(12, 12, 3)})
    seen = observed(model, lambda m, i: plain(m["used"], i))
    assert seen["unused"].rows == 0 and not seen["unused"].importance.any()
    gate = observed(net(), lambda m, i: F.cross_entropy(0 * m(batch(i)[0]), batch(i)[1]).backward())
    dead = observed(net(), lambda m, i: loss(m, torch.zeros(32, 12), batch(i)[1]).backward())
    assert not gate["0"].importance.any() and not dead["0"].importance.any()


@pytest.mark.parametrize("shape", [(12,), (1, 12), (3, 2, 2, 12)])
def test_inputs_of_any_shape(shape):
    seen = observed(net(), lambda m, i: m(torch.ones(shape)).square().mean().backward())
    assert seen["0"].rows == max(1, torch.Size(shape[:-1]).numel()) and seen["0"].importance.isfinite().all()


def test_the_weight_gradient_is_the_one_that_a_formed_w_would_get():
    model = net()
    seen = observed(model, plain, steps=1, needs=("weight_gradient",))
    dense = alr.densify_(copy.deepcopy(model))
    dense.zero_grad()
    plain(dense, 0)
    for name, one in seen.items():
        close(one.weight_gradient, dense.get_submodule(name).weight.grad, rtol=1e-4, atol=1e-6)


def test_the_weight_gradient_is_the_sum_over_the_whole_window():
    whole = observed(net(), plain, steps=3, needs=("weight_gradient",))
    parts = [observed(net(), lambda m, _, i=i: plain(m, i), steps=1, needs=("weight_gradient",)) for i in range(3)]
    for name, one in whole.items():
        close(one.weight_gradient, sum(part[name].weight_gradient for part in parts), rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------ precision

@pytest.mark.parametrize("dtype, bound",
                         [(torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 0.15), (torch.float16, 0.05)])
def test_it_counts_in_float32_or_wider(dtype, bound):
    wide = observed(net().double(), lambda m, i: loss(m, batch(i)[0].double(), batch(i)[1]).backward())
    seen = observed(net().to(dtype), lambda m, i: F.cross_entropy(m(batch(i)[0].to(dtype)).float(), batch(i)[1]).backward())
    for name in seen:
        close(seen[name].importance.sum(), wide[name].importance.sum(), rtol=bound if dtype is not torch.float32 else 1e-4,
              atol=0)


def test_few_dimensions_under_autocast_are_no_divergence():
    basis = torch.randn(3, 12, generator=torch.Generator().manual_seed(3))
    def narrow(model, i, cast):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            out = model(batch(i)[0][:, :3] @ basis)
        F.cross_entropy(out.float(), batch(i)[1]).backward()
    cast, full = (observed(net(), lambda m, i, c=c: narrow(m, i, c)) for c in (True, False))
    for name in full:
        close(cast[name].importance.sum(), full[name].importance.sum(), rtol=0.1, atol=0)


# ------------------------------------------------------------------------------------------------ nothing is left behind

def test_outside_of_the_window_a_layer_is_what_it_was():
    model = net()
    before = [dict(layer.__dict__) for layer in low_rank_layers(model).values()]
    observed(model, plain)
    for layer, was in zip(low_rank_layers(model).values(), before):
        assert layer.__dict__.keys() == was.keys() and layer.op is factored


FAST = replace(alr.recipes.alr, every=8, control=Budget(share=0.3, end=0.8, min_rank=2, per_parameter=True))


def adapted(model, steps):
    optimizer = alr.PairOptimizer(model, lr=0.01)
    adapter = RankAdapter(model, optimizer, FAST, total_steps=64)
    run(model, optimizer, adapter, 0, steps)
    return optimizer, adapter


def run(model, optimizer, adapter, start, stop):
    for i in range(start, stop):
        plain(model, i)
        optimizer.step()
        adapter.step()
        optimizer.zero_grad()


def start(rank=0.9, width=24):
    torch.manual_seed(0)
    return factorize_(nn.Sequential(nn.Linear(12, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 5)),
                      rank=rank)


@pytest.mark.parametrize("steps", [3, 6])                           # at rest, and in the window
def test_a_model_can_be_saved_and_sent_whenever(steps):
    model = start()
    adapted(model, steps)
    assert (steps == 6) == any("op" in layer.__dict__ for layer in low_rank_layers(model).values())
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    for other in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        x = batch()[0]
        assert torch.equal(other(x), model(x)) and all(layer.op is factored for layer in low_rank_layers(other).values())


@pytest.mark.parametrize("steps", [5, 6, 7, 9])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))])
def test_a_copy_of_all_three_goes_its_own_way(steps, how):
    model = start()
    optimizer, adapter = adapted(model, steps)
    model2, optimizer2, adapter2 = how((model, optimizer, adapter))
    run(model2, optimizer2, adapter2, steps, 26)
    run(model, optimizer, adapter, steps, 26)
    assert adapter2.ranks == adapter.ranks == {k: x.rank for k, x in low_rank_layers(model2).items()}
    for p, q in zip(model.parameters(), model2.parameters(), strict=True):
        assert torch.equal(p, q) and p is not q


@pytest.mark.parametrize("steps", [4, 5, 6, 7, 8])
def test_going_on_inside_of_the_window_is_not_stopping(steps):
    model = start()
    optimizer, adapter = adapted(model, steps)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), adapter.state_dict()))
    run(model, optimizer, adapter, steps, 26)
    other = start(rank=2)
    optimizer2 = alr.PairOptimizer(other, lr=0.01)
    with pytest.warns(UserWarning, match="no rank will ever move"):
        adapter2 = RankAdapter(other, optimizer2, adapter.recipe, total_steps=64)
    other.load_state_dict(saved[0])                                 # all three made first, then all three loaded
    optimizer2.load_state_dict(saved[1])
    adapter2.load_state_dict(saved[2])
    run(other, optimizer2, adapter2, steps, 26)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("stop", [None, 1])
@pytest.mark.parametrize("steps", [2, 5])                           # in each half of the window
def test_a_window_opened_by_hand_goes_on_too(steps, stop):
    recipe = replace(FAST, every=50, stop=stop)
    def begin():
        optimizer = alr.PairOptimizer(model := start(), lr=0.01)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*the first decision would come never")
            return model, optimizer, RankAdapter(model, optimizer, recipe, total_steps=64)
    parts, others = begin(), begin()
    parts[2].observe(8)
    run(*parts, 0, steps)
    for part, other in zip(parts, others):
        other.load_state_dict(copy.deepcopy(part.state_dict()))
    assert (others[2].observer.steps, others[2].observer.half, others[2].observer.done) == (8, 4, steps)
    for some in (parts, others):
        run(*some, steps, 8)
    a, b = (some[2].observer.close() for some in (parts, others))
    assert all(torch.equal(a[name].importance, b[name].importance) and a[name].steps == b[name].steps == 8 for name in a)
    state = copy.deepcopy(parts[2].state_dict() | {"seen": parts[2].observer.state_dict()})
    del state["seen"]["steps"]                                      # as written before the length was kept
    others[2].load_state_dict(state)


@pytest.mark.parametrize("steps", [-3, 0, True, 2.5, "4"])
def test_a_window_without_a_step_is_refused(steps):
    model = start()
    _, adapter = adapted(model, 1)
    with pytest.raises(ValueError, match="RankAdapter.observe: steps is .*; wanted the length of the window.*at least 1"):
        adapter.observe(steps)
    with pytest.raises(ValueError, match="Observer: steps is"):
        Observer(low_rank_layers(model), ("importance",), steps)
    assert adapter.observer is None


def test_a_second_window_is_refused_and_the_first_goes_on():
    model = start()
    optimizer, adapter = adapted(model, 2)
    adapter.observe(4)
    run(model, optimizer, adapter, 2, 3)
    was = adapter.observer
    with pytest.raises(ValueError, match="a window of 8 steps was asked for, and one of 4 is open, 1 of them done"):
        adapter.observe(8)
    adapter.observe()
    assert adapter.observer is was and was.steps == 4


def test_close_leaves_nothing():
    model = start()
    optimizer, adapter = adapted(model, 6)
    adapter.close()
    assert all("op" not in layer.__dict__ for layer in low_rank_layers(model).values())
    assert not optimizer._optimizer_step_post_hooks


def test_it_holds_a_few_r_by_r_matrices_per_layer_and_nothing_as_large_as_w():
    model = start(rank=4, width=64)
    optimizer, adapter = adapted(model, 7)                          # the second half of the window, where it holds most
    held = {name: [x for x in (*book.pending().values(), *book.total.values(), book.A, book.B)]
            for name, book in adapter.observer.books.items()}
    for name, tensors in held.items():
        m, n = adapter.layers[name].out_features, adapter.layers[name].in_features
        assert max(x.numel() for x in tensors) <= 16 < m * n and sum(x.numel() for x in tensors) <= 6 * 16 + 30


# ------------------------------------------------------------------------------------------------ compiled, traced, exported

def graphs(compiled, model, steps, recipe):
    from torch._dynamo.utils import counters
    optimizer = alr.PairOptimizer(model, lr=0.01)
    adapter = RankAdapter(model, optimizer, recipe, total_steps=200)
    for i in range(steps):
        F.cross_entropy(compiled(batch(i)[0]), batch(i)[1]).backward()
        optimizer.step()
        adapter.step()
        optimizer.zero_grad()
    return counters["stats"]["unique_graphs"], adapter


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_is_compiled_three_times_and_sees_the_same(backend, fullgraph):
    """At rest, and once for each half of the window; never again, and with the ranks of a model that is not compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    held = replace(FAST, control=Budget(share=0.99, min_rank=2))
    model = start()
    count, adapter = graphs(torch.compile(model, backend=backend, fullgraph=fullgraph), model, 40, held)
    assert count == 3 and set(adapter.ranks.values()) == set(low.rank for low in low_rank_layers(start()).values())
    torch._dynamo.reset()
    a, b = start(), start()
    _, adapted_a = graphs(torch.compile(a, backend=backend), a, 20, FAST)
    _, adapted_b = graphs(b, b, 20, FAST)
    assert adapted_a.ranks == adapted_b.ranks != {name: low.rank for name, low in low_rank_layers(start()).items()}


def test_per_sample_gradients_traces_and_exports_in_the_window_are_not_seen():
    model = start()
    optimizer, adapter = adapted(model, 5)
    assert adapter.observer is not None
    params = {name: p.detach() for name, p in model.named_parameters()}
    def one(params, x, y):
        return F.cross_entropy(torch.func.functional_call(model, params, (x[None],)), y[None])
    x, y = batch()
    grads = torch.func.vmap(torch.func.grad(one), (None, 0, 0))(params, x, y)
    assert grads["0.U"].shape == (32, *model[0].U.shape)
    torch.jit.trace(model, x)
    torch.export.export(model, (x,))
    assert not adapter.observer.books["0"].count.any()
    run(model, optimizer, adapter, 5, 10)


def test_a_forward_whose_inside_is_hidden_is_refused_by_name():
    from alr.history.op import OwnBackward
    with pytest.raises(ValueError, match="op=OwnBackward.*FisherSpectrum and FisherCut observes"):
        replace(alr.recipes.alr, op=OwnBackward())
    model = factorize_(nn.Sequential(nn.Linear(8, 8)), rank=2, op=OwnBackward())
    with pytest.raises(ValueError, match="the forward of '0' is OwnBackward"):
        Observer(low_rank_layers(model), ("importance",))
    with pytest.raises(ValueError, match="'colour' cannot be observed"):
        Observer(low_rank_layers(net()), ("colour",))
