"""Budgets shared over layers: laws of the allocation, checked by hypothesis against what they promise."""

import itertools
import random
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import alr
from alr.budget import Budget, LossTarget, allocate, size
from alr.control import Signal

layer = st.tuples(st.integers(2, 40), st.integers(2, 40), st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=8))


def unpack(layers):
    return [sorted(w, reverse=True) for _, _, w in layers], [(m, n) for m, n, _ in layers]


@given(st.lists(layer, min_size=1, max_size=6), st.floats(0, 2000), st.integers(1, 3), st.integers(1, 4))
def test_never_above_the_budget_but_for_the_least(layers, parameters, least, multiple):
    worths, shapes = unpack(layers)
    ranks = allocate(worths, shapes, parameters, least, None, multiple)
    floor = [min(len(w), -(-least // multiple) * multiple) for w in worths]
    assert all(f <= r <= len(w) for f, r, w in zip(floor, ranks, worths))
    assert size(ranks, shapes) <= max(parameters, size(floor, shapes))
    assert all(r % multiple == 0 or r == len(w) for r, w in zip(ranks, worths))


@given(st.lists(layer, min_size=1, max_size=4), st.floats(0, 1500), st.floats(0, 1500))
def test_more_budget_never_keeps_less_where_all_directions_cost_the_same(layers, a, b):
    importances = unpack(layers)[0]     # with unlike costs a greedy choice may be beaten by its own smaller budget
    def kept(parameters):
        return sum(sum(w[:r]) for w, r in zip(importances, allocate(importances, [(7, 9)] * len(layers), parameters)))
    assert kept(min(a, b)) <= kept(max(a, b)) + 1e-12


@settings(max_examples=50)
@given(st.integers(0, 10 ** 6))
def test_equal_costs_it_is_the_best_choice(seed):
    rng = random.Random(seed)
    worths = [sorted((rng.random() for _ in range(3)), reverse=True) for _ in range(3)]
    shapes = [(4, 6)] * 3
    best = max((sum(sum(w[:r]) for w, r in zip(worths, ranks)) for ranks in itertools.product(range(1, 4), repeat=3)
                if size(ranks, shapes) <= 60), default=0)
    assert sum(sum(w[:r]) for w, r in zip(worths, allocate(worths, shapes, 60))) == pytest.approx(best)


def test_a_dearer_direction_needs_more_importance():
    # a direction of the wide layer costs four times as much and is worth three times as much: it loses, though it would fit
    importances, shapes = [[1.0, 0.1], [1.0, 0.3]], [(5, 5), (20, 20)]
    assert allocate(importances, shapes, 90) == [2, 1]
    assert allocate(importances, shapes, 90, per_parameter=False) == [1, 2]
    assert allocate(importances, shapes, 100) == [2, 2]


def signal(progress, shapes=((10, 10), (10, 30))):
    return Signal([9, 9], 0, (), progress, ["a", "b"], shapes)


def test_budget_follows_its_cubic_and_then_rests():
    control, ranks, worths = Budget(share=0.25, begin=0.1, end=0.5, min_rank=1), [8, 8], [[1.0] * 8, [1.0] * 8]
    memory, sizes = control.init(ranks), []
    for progress in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0):
        ranks, memory = control.step(ranks, [w[:r] for w, r in zip(worths, ranks)], memory, signal(progress))
        sizes.append(size(ranks, [(10, 10), (10, 30)]))
    assert sizes[:2] == [480, 480] and sizes == sorted(sizes, reverse=True)
    assert 480 - sizes[2] > sizes[2] - sizes[3] > 0                 # most is cut early
    assert sizes[5] == sizes[6] == sizes[7] <= 100 and sizes[5] > 100 - 40


def test_budget_from_below_stays_and_wants_to_know_the_length():
    control = Budget(share=0.5, min_rank=1)
    assert control.step([1, 1], [[1.0], [1.0]], control.init([1, 1]), signal(0.5))[0] == [1, 1]
    model = alr.factorize_(nn.Sequential(nn.Linear(8, 8)), rank=4)
    with pytest.raises(ValueError, match="total_steps"):
        alr.RankAdapter(model, torch.optim.Adam(model.parameters()), alr.recipes.alr)


def test_budget_with_a_start_forgets_the_initial_rank():
    control, shapes = Budget(share=0.25, end=0.5, min_rank=1, start=6), [(10, 10), (10, 30)]
    def path(ranks):
        memory, sizes = control.init(ranks), []
        for progress in (0.1, 0.2, 0.3, 0.5, 1.0):
            ranks, memory = control.step(ranks, [[1.0] * r for r in ranks], memory, signal(progress))
            sizes.append(size(ranks, shapes))
        return sizes, ranks
    small, wide = path([2, 8]), path([9, 9])
    assert small[0][0] == size([6, 8], shapes)                      # who is wider is cut when worths are known
    assert small[0][1:] == wide[0][1:] and wide[0] == sorted(wide[0], reverse=True)
    capped, memory = control.step([2, 2], [[1.0] * 2] * 2, control.init([2, 2]), signal(0.1)._replace(caps=[4, 9]))
    assert capped == memory == [4, 6]


def test_a_budget_that_cannot_move_says_so():
    def adapter(rank, control=Budget(share=0.5)):
        model = alr.factorize_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 16)), rank=rank)
        return alr.RankAdapter(model, torch.optim.Adam(model.parameters()), replace(alr.recipes.alr, control=control), 90)
    with pytest.warns(UserWarning, match="no rank will ever move.*rank=0.5"):
        adapter(0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter(0.9, Budget(share=0.5, min_rank=1))
        adapter(1, Budget(share=0.5, start=3, min_rank=1))
    with pytest.warns(UserWarning, match="min_rank=4 in every layer takes 0.833 of the dense parameters.*missed"):
        adapter(0.9)


def test_loss_target_shrinks_while_it_is_free_and_grows_when_it_is_not():
    control, worths = LossTarget(loss=4.0, factor=0.8, min_rank=1), [[1.0] * 5, [1.0] * 5]
    def after(losses, memory=0):
        return control.step([5, 5], worths, memory, signal(None)._replace(losses=losses))
    assert after(())[0] == [5, 5] and after((3.9,), memory=1)[0] == [5, 5]
    small, memory = after((4.5, 3.9))
    large, _ = after((3.9, 4.5))
    assert size(small, [(10, 10), (10, 30)]) <= 240 and memory == 2
    assert size(large, [(10, 10), (10, 30)]) > 300 and max(large) <= 9


@pytest.mark.parametrize("per_parameter", [True, False])
@pytest.mark.parametrize("multiple", [1, 2, 3, 8])
@pytest.mark.parametrize("importance", [0.1, 0.3, 1 / 3, 1e-30])
def test_blocks_of_equal_importance_are_taken_in_order(importance, multiple, per_parameter):
    """The mean of eight equal numbers may round below the number itself, the mean of a part of a block."""
    for count, parameters in ((9, 20), (9, 160), (11, 180), (17, 330)):
        ranks = allocate([[importance] * count] * 2, [(10, 10)] * 2, parameters, 0, None, multiple, per_parameter)
        assert size(ranks, [(10, 10)] * 2) <= parameters
