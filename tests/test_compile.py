"""torch.compile over changes of rank: never stale, and recompiled as often as shapes ask for, which can be seldom."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import alr
from alr.budget import Budget, allocate
from alr.control import Schedule
from alr.linear import factorize_, low_rank_layers

counters = torch._dynamo.utils.counters


@pytest.fixture(autouse=True)
def anew():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def dynamic():
    """What a user writes before the model is compiled, so that parameters may change their shapes."""
    with torch._dynamo.config.patch(force_parameter_static_shapes=False):
        yield


def net(d=48, rank=24):
    torch.manual_seed(0)
    return factorize_(nn.Sequential(nn.Linear(d, d), nn.Tanh(), nn.Linear(d, d), nn.Tanh(), nn.Linear(d, 30)),
                      rank=lambda name, linear: min(rank, linear.in_features * linear.out_features // 80))


def batch(i, d=48):
    x = torch.randn(16, d, generator=torch.Generator().manual_seed(i))
    return x, x[:, :30].argmax(1)


def resized(ranks, backend="eager"):
    """Graphs after each change of layer "0" and a training step; the compiled model is compared with itself, eager."""
    model = net()
    compiled = torch.compile(model, backend=backend)
    optimizer = alr.PairOptimizer(model, lr=0.01)
    adapter, graphs = alr.RankAdapter(model, optimizer, alr.recipes.repaired), []
    for i, k in enumerate(ranks):
        adapter.resize({"0": k})
        x, y = batch(i)
        out = compiled(x)
        torch.testing.assert_close(out, model(x), rtol=1e-5, atol=1e-6)     # never stale
        F.cross_entropy(out, y).backward()
        optimizer.step()
        adapter.step()
        optimizer.zero_grad()
        graphs.append(counters["stats"]["unique_graphs"])
    return graphs


def test_a_static_model_is_compiled_once_per_shape_up_to_torchs_limit():
    ranks = [24, 24, 23, 22, 22, 24]
    assert resized(ranks) == [1, 1, 2, 3, 3, 3]            # ranks that were there already cost nothing
    counters.clear()
    torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit
    many = resized(range(24, 24 - limit - 3, -1))
    assert many[-1] == limit and many[limit - 1] == limit           # and runs eagerly from then on: right, but not fast


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_with_dynamic_parameter_shapes_few_graphs_do_for_many_ranks(backend, dynamic):
    graphs = resized(range(24, 8, -1), backend)                     # sixteen ranks
    assert graphs[0] == 1 and graphs[-1] <= 3 and graphs[-1] == graphs[3]


def adapted(recipe, steps=48):
    """(graphs, rank changes, ranks) of a compiled training, and the same training not compiled."""
    out = []
    for compile_it in (True, False):
        torch._dynamo.reset()
        counters.clear()
        model = net()
        forward = torch.compile(model, backend="eager") if compile_it else model
        optimizer = alr.PairOptimizer(model, lr=0.02)
        adapter, events = alr.RankAdapter(model, optimizer, recipe, total_steps=steps), []
        for i in range(steps):
            x, y = batch(i)
            F.cross_entropy(forward(x), y).backward()
            optimizer.step()
            events += adapter.step()
            optimizer.zero_grad()
        out.append((counters["stats"]["unique_graphs"], len(events), adapter.ranks, [p.detach() for p in model.parameters()]))
    (graphs, changes, ranks, a), (_, changes2, ranks2, b) = out
    assert changes == changes2 and ranks == ranks2
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    return graphs, changes, ranks


BUDGET = Budget(share=0.3, end=0.9, min_rank=2, per_parameter=True)


def test_a_training_with_many_changes_and_dynamic_shapes_is_compiled_a_few_times(dynamic):
    graphs, changes, _ = adapted(replace(alr.recipes.alr, every=6, control=BUDGET))
    # at rest and both halves of the window, static and dynamic
    assert changes >= 8 and graphs < torch._dynamo.config.recompile_limit


def test_ranks_in_multiples_change_less_often_and_so_are_compiled_less_often():
    with torch._dynamo.config.patch(recompile_limit=64):
        fine = adapted(replace(alr.recipes.alr, every=6, control=BUDGET), 18)
        coarse = adapted(replace(alr.recipes.alr, every=6, control=replace(BUDGET, multiple=8, min_rank=8, share=0.4)), 18)
    assert 0 < coarse[1] < fine[1] and coarse[0] <= fine[0]
    start, limit = {name: layer.rank for name, layer in low_rank_layers(net()).items()}, alr.recipes.alr.limit
    caps = {name: limit(layer) for name, layer in low_rank_layers(net()).items()}
    assert all(k % 8 == 0 or k in (start[name], caps[name]) for name, k in coarse[2].items())
    assert all(k % 8 == 0 for k in allocate([[1.0] * 24] * 3, [(48, 48)] * 3, 3000, 8, None, 8))


def test_a_schedule_of_three_ranks_is_three_graphs():
    recipe = replace(alr.recipes.repaired, every=4, control=Schedule(((0, 16), (12, 12), (24, 8))))
    graphs, changes, ranks = adapted(recipe, 32)
    assert graphs == 4 and changes == 9 and set(ranks.values()) == {8}      # and the one that it started with
