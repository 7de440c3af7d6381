"""Laws of `alr.history.grouping`: labels are a partition, averaging keeps the sum and projects, fast equals slow."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from alr import RankAdapter, recipes
from alr.history.grouping import (
    Grouping,
    by_chance,
    by_index,
    by_norm,
    group_mean,
    group_mean_loop,
    groups,
    groups_loop,
    largest_group,
    number_of_groups,
    similarity,
    starters,
    widest_group,
)


def rows(m, n, dims, seed):
    """m rows in n columns that vary in `dims` directions: the fewer, the more of them agree."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, dims, generator=g) @ torch.randn(dims, n, generator=g)


def built(sizes, n=64, noise=0.01, seed=0):
    """Rows in groups of these sizes: orthogonal directions, lengths of their own, a little noise, shuffled."""
    g = torch.Generator().manual_seed(seed)
    member = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    G = torch.eye(n)[member] * torch.rand(len(member), 1, generator=g).add(0.5)
    G = G + noise * torch.randn(G.shape, generator=g)
    shuffled = torch.randperm(len(member), generator=g)
    return G[shuffled], member[shuffled]


many = given(st.integers(1, 60), st.integers(1, 5), st.floats(0.05, 0.999), st.integers(0, 10_000))


@settings(deadline=None, max_examples=80)
@many
def test_labels_are_a_partition_and_the_rule_holds(m, dims, threshold, seed):
    G = rows(m, 8, dims, seed)
    S, order = similarity(G), by_chance(m, seed)
    labels = groups(S, order, threshold)
    k = number_of_groups(labels)
    assert labels.shape == (m,) and sorted(set(labels.tolist())) == list(range(k)) and labels.bincount().sum() == m
    first_of = []
    for i in order.tolist():
        if labels[i] == len(first_of):
            first_of.append(i)
    assert len(first_of) == k
    first = torch.tensor(first_of)
    assert torch.equal(starters(labels, order), first)
    near = (S[first] >= threshold) | (torch.arange(m) == first[:, None])        # (k, m)
    assert near[labels, torch.arange(m)].all()                                  # each row is near its starter
    assert near[:, first].sum() == k                                            # no starter is near another
    place = order.argsort()
    for i in range(m):                                                          # and near no earlier starter
        earlier = first[:labels[i]]
        assert not (S[earlier, i] >= threshold).logical_and(place[earlier] < place[i]).any()


@settings(deadline=None, max_examples=80)
@many
def test_the_passes_give_the_labels_of_the_loop(m, dims, threshold, seed):
    G = rows(m, 8, dims, seed)
    G[:: 7] = 0                                                                 # dead neurons
    for order in (by_chance(m, seed), by_norm(G), by_index(m)):
        slow = groups_loop(similarity(G), order, threshold)
        assert torch.equal(groups(similarity(G), order, threshold), slow)
        torch.testing.assert_close(group_mean(G, slow), group_mean_loop(G, slow))


@pytest.mark.parametrize("m, dims", [(512, 2), (512, 6), (300, 100)])
def test_the_passes_give_the_labels_of_the_loop_at_full_size(m, dims):
    S = similarity(rows(m, 128, dims, seed=3))
    for threshold in (0.3, 0.7, 0.9):
        assert torch.equal(groups(S, by_chance(m), threshold), groups_loop(S, by_chance(m), threshold))


@settings(deadline=None, max_examples=50)
@many
def test_averaging_keeps_the_sum_and_projects(m, dims, threshold, seed):
    G = rows(m, 8, dims, seed).double()
    labels = groups(similarity(G), by_norm(G), threshold)
    mean = group_mean(G, labels)
    torch.testing.assert_close(mean.sum(0), G.sum(0))
    torch.testing.assert_close(group_mean(mean, labels), mean)                  # twice is once
    torch.testing.assert_close((mean * G).sum(), mean.square().sum())           # so cosine = ||mean|| / ||G|| <= 1
    for k in range(number_of_groups(labels)):
        assert (mean[labels == k] - mean[labels == k][0]).abs().max() < 1e-12


def test_one_group_is_the_mean_and_singletons_are_unchanged():
    G = rows(20, 12, 12, seed=0)
    torch.testing.assert_close(group_mean(G, torch.zeros(20, dtype=torch.int64)), G.mean(0).expand(20, 12))
    assert torch.equal(group_mean(G, torch.randperm(20)), G)
    alone = groups(similarity(G), by_norm(G), 0.99999)
    assert number_of_groups(alone) == 20 and torch.equal(group_mean(G, alone), G)
    assert torch.equal(G, rows(20, 12, 12, seed=0))                             # and nothing was done in place


@pytest.mark.parametrize("sizes", [[1], [40], [1] * 30, [17, 5, 1, 9], [3] * 20])
@pytest.mark.parametrize("order", ["index", "norm", "random"])
def test_rows_built_to_agree_are_found(sizes, order):
    G, member = built(sizes)
    labels = Grouping(order=order).labels(G, 0.9)
    assert number_of_groups(labels) == len(sizes) and largest_group(labels) == max(sizes)
    assert torch.equal(labels[:, None] == labels, member[:, None] == member)


def test_lengths_do_not_matter_but_dead_rows_stand_alone():
    G, _ = built([10, 6])
    order = by_chance(16)
    assert torch.equal(groups(similarity(G), order, 0.9),
                       groups(similarity(G * torch.logspace(-5, 6, 16)[:, None]), order, 0.9))
    G[:4] = 0
    labels = groups(similarity(G), order, 0.9)
    assert all((labels == labels[i]).sum() == 1 for i in range(4)) and number_of_groups(labels) == 6
    assert torch.equal(group_mean(G, labels)[:4], torch.zeros(4, 64))


def test_rows_under_a_ten_millionth_are_similar_to_nothing():
    """History: the scripts add 1e-8 to a row's length, so that a row of 1e-7 has similarity 0.83 to itself."""
    G = torch.eye(4)[[0, 0, 0, 1]]                                              # three rows that agree, one that does not
    for length, size, number in ((1.0, 3, 2), (1e-6, 3, 2), (1e-7, 1, 4), (1e-9, 1, 4)):
        S = similarity(length * G)
        assert S[0, 1].item() == S[0, 0].item() == pytest.approx((length / (length + 1e-8)) ** 2, rel=1e-5)
        assert widest_group(S, 0.9) == size and number_of_groups(groups(S, by_index(4), 0.9)) == number


def test_v3_counts_rows_that_an_earlier_group_has_taken():
    """History: rows 20 degrees apart, at 0.9.  Row 0 takes row 1; row 2 starts the next group and counts row 1 again."""
    angle = torch.tensor([0.0, 20.0, 40.0, 60.0]).deg2rad()
    S = similarity(torch.stack([angle.cos(), angle.sin()], dim=1))
    labels = groups(S, by_index(4), 0.9)
    assert labels.tolist() == [0, 0, 1, 1] and largest_group(labels) == 2 and widest_group(S, 0.9) == 3


def test_v2_lets_the_strongest_lead_and_v1_the_first():
    """History: three rows 20 degrees apart, at 0.9: led by the middle one they are one group, by an outer one two."""
    angle = torch.tensor([-20.0, 0.0, 20.0]).deg2rad()
    G = torch.stack([angle.cos(), angle.sin()], dim=1)
    S = similarity(G)
    assert groups(S, torch.tensor([1, 0, 2]), 0.9).tolist() == [0, 0, 0]
    assert groups(S, torch.tensor([0, 1, 2]), 0.9).tolist() == [0, 0, 1]
    assert by_norm(G * torch.tensor([1.0, 3.0, 2.0])[:, None]).tolist() == [1, 2, 0]
    assert by_index(3).tolist() == [0, 1, 2] and recipes.v1.gradient.order == "index"
    found = {number_of_groups(groups(S, by_chance(3, seed), 0.9)) for seed in range(10)}
    assert found == {1, 2} and torch.equal(by_chance(9, 4), by_chance(9, 4))


# ------------------------------------------------------------------------------------------------ when, and on whom

def test_modes():
    baseline, coarse = Grouping(mode="baseline"), Grouping(mode="coarse-to-fine")
    assert {baseline.threshold_at(s) for s in range(50)} == {None}
    assert {Grouping().threshold_at(s) for s in range(50)} == {0.9}
    assert [coarse.threshold_at(s) for s in (0, 937, 938, 1875, 1876, 9999)] == [0.7, 0.7, 0.85, 0.85, None, None]
    fast = coarse.paced(10 / 469)
    assert [fast.threshold_at(s) for s in (19, 20, 39, 40)] == [0.7, 0.85, 0.85, None]


def test_v2s_stages_end_with_epochs_and_batches_count_within_one():
    """Six epochs: 0.75 in the first two (0 and 1 are below 1.8), 0.9 in the next three (up to 4.2), then nothing."""
    v2 = recipes.v2.gradient
    assert v2.mode == "coarse-to-fine" and v2.epoch == 469
    at = [v2.threshold_at(s, 6 * 469) for s in range(6 * 469)]
    epochs = [at[469 * e:469 * (e + 1)] for e in range(6)]
    for found, threshold in zip(epochs, (0.75, 0.75, 0.9, 0.9, 0.9, None)):
        assert found == [threshold if i % 10 == 0 else None for i in range(469)]
    fast = v2.paced(23 / 469)
    assert fast.epoch == 23 and fast.stages == v2.stages
    assert [s for s in range(69) if fast.threshold_at(s, 138)] == [0, 10, 20, 23, 33, 43, 46, 56, 66]
    with pytest.raises(ValueError, match="length is not known"):
        v2.threshold_at(0)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))


def test_the_optimizer_sees_the_mean_on_the_chosen_layer_alone():
    recipe = replace(recipes.v1, gradient=Grouping(threshold=0.5, where=("2",)))
    model, twin = net(), net()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    adapter = RankAdapter(recipe.prepare(model), optimizer, recipe)
    x = torch.randn(16, 12)
    for m in (model, twin):
        m(x).square().mean().backward()
    optimizer.step()
    assert adapter.step() == [] and adapter.ranks == {}
    G = twin[2].weight.grad
    mean = group_mean(G, recipe.gradient.labels(G, 0.5, step=0))
    assert (mean - G).norm() > 0.1 * G.norm()                                   # there was something to average
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q - (mean if name == "2.weight" else q.grad))
    done = adapter.grouped["2"]
    assert done.step == 0 and done.threshold == 0.5 and 1 <= done.groups < 40 and done.largest > 1
    assert done.kept == pytest.approx((mean.norm() / G.norm()).item(), rel=1e-4)
    assert done.kept == pytest.approx(torch.cosine_similarity(mean.flatten(), G.flatten(), dim=0).item(), rel=1e-4)


def test_every_tenth_batch_by_the_adapters_clock():
    recipe = replace(recipes.v2, gradient=replace(recipes.v2.gradient, where=("2",)))
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match="length is not known; give RankAdapter total_steps"):
        RankAdapter(model, torch.optim.Adam(model.parameters()), recipe)
    adapter = RankAdapter(model, optimizer, recipe, 469)
    seen = []
    for _ in range(25):
        model.zero_grad()
        model(torch.randn(8, 12)).square().mean().backward()
        optimizer.step()
        seen.append(adapter.grouped["2"].step)
        adapter.step()
    assert seen == [0] * 10 + [10] * 10 + [20] * 5


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="mode is 'groupd'; wanted one of 'baseline', 'grouped', 'coarse-to-fine'"):
        Grouping(mode="groupd")
    with pytest.raises(ValueError, match="order is 'up'"):
        Grouping(order="up")
    model = net()
    with pytest.raises(ValueError, match=r"no nn.Linear matched where=\('fc2', '\*.mlp.up'\). The model has 3"):
        RankAdapter(model, torch.optim.Adam(model.parameters()), recipes.v1)


def test_a_forgotten_step_is_noticed_here_too():
    recipe = replace(recipes.v2, gradient=replace(recipes.v2.gradient, where=("2",)))
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    RankAdapter(model, optimizer, recipe, 469)
    with pytest.warns(UserWarning, match="0 calls of adapter.step"):
        for _ in range(10):
            optimizer.step()


def test_averaging_ends_with_its_adapter_and_goes_along_with_a_copy():
    recipe = replace(recipes.v1, gradient=Grouping(threshold=0.5, where=("2",)))
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    for _ in range(3):
        RankAdapter(model, optimizer, recipe).close()
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    adapter = RankAdapter(model, optimizer, recipe)
    model2, optimizer2, adapter2 = copy.deepcopy((model, optimizer, adapter))
    assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer2._optimizer_step_pre_hooks) == 1
    x = torch.randn(16, 12)
    for m, o in ((model, optimizer), (model2, optimizer2)):
        m(x).square().mean().backward()
        o.step()
    assert adapter2.grouped == adapter.grouped and adapter.grouped["2"].groups < 40
    for p, q in zip(model.parameters(), model2.parameters(), strict=True):
        assert torch.equal(p, q) and p is not q
    adapter.close()
    assert not copy.deepcopy((optimizer, adapter))[0]._optimizer_step_post_hooks, "a copy of a closed one is closed"


def test_a_refused_rule_leaves_no_hook():
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match="no nn.Linear matched"):
        RankAdapter(model, optimizer, recipes.v1)
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
