"""Training loops that are not the usual one: other optimizers, several of them, and layers that are used now and then."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import alr
from alr.axes import Signal
from alr.budget import Budget, LossTarget, Proportional, size
from alr.control import ByLayer
from alr.estimate import OutputSpectrum, Place
from alr.linear import factorize_
from alr.resize import SvdCore
from alr.rules import Spectron
from alr.sensitivity import Sensitivity, SensitivityCut
from alr.state import Reset, Slice

EIGHT = replace(alr.recipes.alr, every=8, control=Budget(share=0.3, end=0.8, min_rank=2))


def net(rank=0.9, d=32):
    torch.manual_seed(0)
    return factorize_(nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d), nn.ReLU(), nn.Linear(d, 12)), rank=rank)


def batch(i, d=32):
    x = torch.randn(32, d, generator=torch.Generator().manual_seed(i))
    return x, x[:, :12].argmax(1)


def backward(model, i):
    x, y = batch(i)
    F.cross_entropy(model(x), y).backward()


def go(model, optimizer, adapter, begin, end):
    events = []
    for i in range(begin, end):
        backward(model, i)
        optimizer.step()
        events += adapter.step()
        optimizer.zero_grad()
    return events


def adamw(model):
    return torch.optim.AdamW(model.parameters(), 1e-3)


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.05)


# ------------------------------------------------------------------------------------------------ who steps

class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation as it is widely copied: nobody calls its own step()."""

    def __init__(self, params, base, **settings):
        super().__init__(params, settings)
        self.base_optimizer = base(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.detach().clone()
                p.add_(p.grad, alpha=0.05)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old"]
        self.base_optimizer.step()
        self.zero_grad()


def by_a_new_optimizer(model, optimizer):
    other = sgd(model)
    def step(i):
        backward(model, i)
        other.step()
        other.zero_grad()
    return step


def by_hand(model, optimizer):
    def step(i):
        backward(model, i)
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.05 * p.grad
        model.zero_grad()
    return step


def by_sam(model, optimizer):
    def step(i):
        backward(model, i)
        optimizer.first_step()
        backward(model, i)
        optimizer.second_step()
    return step


@pytest.mark.parametrize("how", [by_a_new_optimizer, by_hand, by_sam])
def test_weights_that_move_without_a_step_of_our_optimizer_are_noticed_once(how):
    model = net()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.01) if how is by_sam else adamw(model)
    adapter = alr.RankAdapter(model, optimizer, replace(EIGHT, state=Reset(everything=False)), total_steps=100)
    if how is not by_sam:
        go(model, optimizer, adapter, 0, 5)
    step, steps = how(model, optimizer), adapter.steps
    with pytest.warns(UserWarning, match=r"weights have moved .*none of this adapter's optimizers \((AdamW|SAM)\) has "
                                         "stepped.*whose .step.. is called; for SAM that is its base_optimizer") as caught:
        for i in range(5, 40):
            step(i)
            adapter.step()
    assert len(caught) == 1 and adapter.steps == steps


def test_sam_with_its_base_optimizer_decides():
    model = net()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.01)
    adapter, step = alr.RankAdapter(model, optimizer.base_optimizer, EIGHT, total_steps=40), by_sam(model, optimizer)
    events = []
    for i in range(40):
        step(i)
        events += adapter.step()
    assert events and adapter.steps == 40


@pytest.mark.parametrize("loaded", [False, True])
def test_calls_without_a_step_at_which_nothing_moves_are_not_warned_about(loaded):
    model = net()
    optimizer = adamw(model)
    adapter, scale = alr.RankAdapter(model, optimizer, EIGHT, total_steps=40), torch.amp.GradScaler("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(60):                                         # 30 micro-batches a step, the second of them skipped
            x, y = batch(i)
            scale.scale(F.cross_entropy(model(x), y) * (float("inf") if i == 50 else 1)).backward()
            if i % 30 == 29:
                scale.step(optimizer)
                scale.update()
            if loaded and i % 10 == 0:                              # weights swapped for a validation, and back
                model.load_state_dict(copy.deepcopy(model.state_dict()))
            adapter.step()
    assert adapter.steps == 1


def held(optimizer):
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def momentum(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def of_first_factors(model):
    return torch.optim.SGD([layer.U for layer in alr.linear.low_rank_layers(model).values()], 0.05, momentum=0.9)


@pytest.mark.parametrize("state", [alr.recipes.alr.state, Reset(everything=False), Slice()], ids=repr)
@pytest.mark.parametrize("second", [momentum, of_first_factors, alr.PairOptimizer])
@pytest.mark.parametrize("turned", [False, True])
def test_every_optimizer_that_holds_a_factor_is_told_of_its_rank(state, second, turned):
    model = net()
    optimizers = [adamw(model), second(model)]
    if turned:
        optimizers.reverse()
    adapter, events = alr.RankAdapter(model, optimizers, replace(EIGHT, state=state), total_steps=40), []
    before = model[0].U.detach().clone()
    for i in range(40):
        events += go(model, optimizers[i // 10 % 2], adapter, i, i + 1)
    assert events and adapter.steps == 40 and not torch.equal(model[0].U, before)
    for optimizer in optimizers:
        factors = [p for layer in alr.linear.low_rank_layers(model).values() for p in
                   ((layer.U,) if second is of_first_factors and not isinstance(optimizer, torch.optim.AdamW) else
                    (layer.U, layer.V))]
        assert {id(p) for p in factors} <= held(optimizer) and set(map(id, optimizer.state)) <= held(optimizer)
        assert all(x.shape == p.shape for p, s in optimizer.state.items() for x in s.values() if x.dim() > 1)


def test_both_optimizers_carry_their_own_moments():
    model = net()
    first, second = adamw(model), momentum(model)
    adapter = alr.RankAdapter(model, [first, second], EIGHT, total_steps=40)
    for optimizer in (first, second):
        backward(model, 0)
        optimizer.step()
        adapter.step()
    def alone(optimizer):
        twin, other = copy.deepcopy((model, optimizer))
        alr.RankAdapter(twin, other, EIGHT, total_steps=40).resize({"0": 5})
        return other.state[twin[0].U]
    expected = alone(first), alone(second)
    adapter.resize({"0": 5})
    for optimizer, state in zip((first, second), expected):
        assert state and all(torch.equal(optimizer.state[model[0].U][key], x) for key, x in state.items())


def test_every_optimizer_follows_a_state_dict_of_other_ranks():
    model = net()
    optimizers = [adamw(model), momentum(model)]
    adapter = alr.RankAdapter(model, optimizers, alr.recipes.uniform)
    model.load_state_dict(net(rank=5).state_dict())
    go(model, optimizers[1], adapter, 0, 1)
    assert held(optimizers[0]) == held(optimizers[1]) == {id(p) for p in model.parameters()}


# ------------------------------------------------------------------------------------------------ steps that do not count

@pytest.mark.parametrize("fused", [False, True])
def test_before_a_decision_only_steps_that_a_scaler_did_not_skip_are_seen(fused):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=fused)
    adapter, scale, events = alr.RankAdapter(model, optimizer, EIGHT, total_steps=40), torch.amp.GradScaler("cpu"), []
    def run(begin, end, skipped):
        for i in range(begin, end):
            x, y = batch(i)
            scale.scale(F.cross_entropy(model(x), y) * (float("inf") if i in skipped else 1)).backward()
            scale.step(optimizer)
            scale.update()
            events.extend(adapter.step())
            optimizer.zero_grad()
    memory = copy.deepcopy(adapter.memory)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run(0, 8, (4, 5, 6, 7))
    # a fused optimizer skips on the device, where nobody reads it: the clock goes on, and nothing is decided
    assert adapter.steps == (8 if fused else 4) and not events and adapter.memory == memory
    assert [str(one.message) for one in told if "none counted, so no rank is decided now" in str(one.message)] or not fused
    assert not [one for one in told if "forward of '" in str(one.message)]
    run(8, 24, ())
    assert events and all(p.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------------------------------------ loaded on the way

def trained_pair(rank=8, steps=5):
    model = net(rank)
    optimizer = alr.PairOptimizer(model)
    for i in range(steps):
        pair_step(model, optimizer, i)
    return model, optimizer


def pair_step(model, optimizer, i):
    backward(model, i)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("rule", [alr.PairOptimizer(net(2)).rule, Spectron()], ids=lambda rule: type(rule).__name__)
def test_an_optimizer_of_pairs_made_before_the_model_is_loaded_goes_on_as_if_never_stopped(order, assign, rule):
    model = net(8)
    optimizer = alr.PairOptimizer(model, rule=rule)
    for i in range(5):
        pair_step(model, optimizer, i)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other = net(11)
    later = alr.PairOptimizer(other, rule=rule)
    def load_model():
        other.load_state_dict(saved[0], assign=assign)
    if order == "model first":
        load_model()
    later.load_state_dict(saved[1])
    if order != "model first":
        load_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(5, 8):
            pair_step(model, optimizer, i)
            pair_step(other, later, i)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_moments_of_another_rank_are_dropped_with_a_word():
    model, optimizer = trained_pair()
    model.load_state_dict(net(5).state_dict())
    with pytest.warns(UserWarning, match="PairOptimizer: the model was loaded at other ranks.*they start anew") as caught:
        for i in range(3):
            pair_step(model, optimizer, i)
    assert len(caught) == 1 and held(optimizer) == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("rank", [8, 5])
@pytest.mark.parametrize("make", [alr.PairOptimizer, adamw])
@pytest.mark.parametrize("adapted", [False, True])
def test_what_is_loaded_with_assign_is_trained(rank, make, adapted):
    if make is adamw and not adapted:
        return                                                      # torch's own affair: make the optimizer afterwards
    model = net(8)
    optimizer = make(model)
    adapter = alr.RankAdapter(model, optimizer, alr.recipes.uniform) if adapted else None
    kept = dict(net(rank).named_parameters())                       # Parameters, which `assign` takes as they are
    for i, state in enumerate((net(rank).state_dict(), kept, net(rank - 1).state_dict(), kept, net(rank).state_dict())):
        model.load_state_dict(state, assign=True)
        before = [p.detach().clone() for layer in (model[0], model[4]) for p in (layer.U, layer.V)]
        backward(model, i)
        optimizer.step()
        if i % 2 and adapted:
            model.load_state_dict(net(rank + 1).state_dict(), assign=True)      # between the optimizer's step and ours
        if adapted:
            adapter.step()
        optimizer.zero_grad()
        backward(model, i)
        optimizer.step()
        if adapted:
            adapter.step()
        optimizer.zero_grad()
        after = [p for layer in (model[0], model[4]) for p in (layer.U, layer.V)]
        assert all(p.shape != q.shape or (p != q).any() for p, q in zip(after, before))
        assert {id(p) for layer in (model[0], model[4]) for p in (layer.U, layer.V)} <= held(optimizer)


@pytest.mark.parametrize("make", [alr.PairOptimizer, adamw])
@pytest.mark.parametrize("rank", [8, 5])
def test_with_assign_all_that_was_trained_is_trained_and_goes_on_as_if_never_stopped(make, rank):
    """Norms, biases and embeddings too: a loss that falls by the factors alone would tell nobody."""
    def built(rank):
        torch.manual_seed(0)
        model = alr.factorize_(nn.Sequential(nn.Linear(24, 24), nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, 24)), rank=rank)
        optimizer = make(model)
        return model, optimizer, alr.RankAdapter(model, optimizer, alr.recipes.uniform)

    def steps(model, optimizer, adapter, first, last):
        for i in range(first, last):
            x = torch.randn(16, 24, generator=torch.Generator().manual_seed(i))     # (16, 24)
            (model(x) - x).square().mean().backward()
            optimizer.step()
            adapter.step()
            optimizer.zero_grad()

    whole = built(rank)
    steps(*whole, 0, 4)
    saved = copy.deepcopy([part.state_dict() for part in whole])
    steps(*whole, 4, 8)
    other = built(8)
    for part, state, how in zip(other, saved, ({"assign": True}, {}, {})):
        part.load_state_dict(state, **how)
    assert {id(p) for p in other[0].parameters()} == held(other[1])
    before = {name: p.detach().clone() for name, p in other[0].named_parameters()}
    steps(*other, 4, 8)
    assert all((p != before[name]).any() for name, p in other[0].named_parameters())
    for (name, p), q in zip(whole[0].named_parameters(), other[0].parameters()):
        assert torch.equal(p, q), name


def test_a_replacement_that_no_optimizer_holds_is_refused_by_recipes_that_hold_ranks_too():
    model = net(8)
    optimizer = adamw(model)
    adapter = alr.RankAdapter(model, optimizer, alr.recipes.uniform)
    go(model, optimizer, adapter, 0, 2)
    optimizer.param_groups[0]["params"] = [p for p in optimizer.param_groups[0]["params"] if p is not model[0].U]
    model[0].U = nn.Parameter(model[0].U.detach().clone())
    with pytest.raises(ValueError, match="no optimizer holds the factors of '0'"):
        go(model, optimizer, adapter, 2, 3)


# ------------------------------------------------------------------------------------------------ used now and then

def size_of(ranks, adapter, start):
    return sum(k * sum(shape) for (name, k), shape in zip(ranks.items(), adapter.shapes) if name.startswith(start))


def gan(zero, every=50, total=300, recipe=EIGHT, begin=0, end=60, parts=None):
    """A generator that is trained in every fifth step, and a critic in the others: (adapter, events, what was said)."""
    if parts is None:
        models = nn.ModuleDict(dict(g=net(), d=net()))
        optimizers = [adamw(models["g"]), adamw(models["d"])]
        parts = models, optimizers, alr.RankAdapter(models, optimizers, replace(recipe, every=every), total_steps=total)
    (models, optimizers, adapter), events = parts, []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for i in range(begin, end):
            (x, y), turn = batch(i), int(i % 5 > 0)
            if zero == "before backward":
                optimizers[turn].zero_grad()
            model = models["d" if turn else "g"]
            (F.cross_entropy(model(x), y) if turn else model(x).square().mean()).backward()
            optimizers[turn].step()
            events += adapter.step()
            if zero.startswith("after step"):
                optimizers[turn].zero_grad(set_to_none=not zero.endswith("zeros"))
    return adapter, events, [str(one.message) for one in told]


@pytest.mark.parametrize("change", [dict(), dict(estimate=OutputSpectrum(), resize=SvdCore()),
                                    dict(estimate=Sensitivity(), resize=SensitivityCut()),
                                    dict(estimate=Place(), control=Budget(share=0.3, min_rank=2, per_parameter=False))],
                         ids=["fisher", "output", "sensitivity", "place"])
def test_a_layer_that_is_trained_but_not_seen_before_a_decision_keeps_its_rank_at_nobodys_cost(change):
    found = [gan(zero, recipe=replace(EIGHT, **change)) for zero in ("before backward", "after step", "after step, zeros")]
    adapter, events, told = found[0]
    assert {e.layer[0] for e in events} == {"d"} and sum("has been trained, but its forward" in one for one in told) == 1
    assert any("'g.0' (and 2 more layers, each) has been trained" in one for one in told)
    assert all(other[1] == events for other in found[1:])           # wherever gradients are zeroed
    # the critic is cut as it would be alone
    alone = net()
    optimizer = adamw(alone)
    single = alr.RankAdapter(alone, optimizer, replace(EIGHT, every=40, **change), total_steps=240)
    go(alone, optimizer, single, 0, 40)
    d = size_of(adapter.ranks, adapter, "d")
    assert abs(d - size_of(single.ranks, single, "")) <= 2 * 64


def test_a_generator_that_is_seen_now_and_then_is_cut_when_it_is_seen():
    adapter, events, told = gan("after step", every=9, total=100, end=100)
    assert {e.layer[0] for e in events} == {"g", "d"} and all(e.error < 0.8 for e in events)
    assert size_of(adapter.ranks, adapter, "") <= 0.3 * (4 * 32 * 32 + 2 * 32 * 12) + 2 * 64


def test_going_on_where_layers_are_used_now_and_then_is_not_stopping():
    whole = gan("after step", end=120)
    adapter, first, _ = gan("after step", end=47)
    saved = copy.deepcopy((adapter.model.state_dict(), [o.state_dict() for o in adapter.optimizers], adapter.state_dict()))
    models = nn.ModuleDict(dict(g=net(), d=net()))
    models.load_state_dict(saved[0])
    optimizers = [adamw(models["g"]), adamw(models["d"])]
    again = alr.RankAdapter(models, optimizers, adapter.recipe, total_steps=300)
    for o, state in zip(optimizers, saved[1]):
        o.load_state_dict(state)
    again.load_state_dict({key: value for key, value in saved[2].items() if key != "untrained"})    # of an older version
    again.load_state_dict(saved[2])
    _, second, told = gan("after step", begin=47, end=120, parts=(models, optimizers, again))
    assert first + second == whole[1] and told == whole[2]


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.a, self.b = net(), alr.LowRankLinear(12, 48, 9), alr.LowRankLinear(12, 48, 9)

    def forward(self, x, head):
        return getattr(self, head)(self.trunk(x))


def test_of_tasks_that_take_turns_no_head_is_cut_while_the_other_has_its_turn():
    model = Heads()
    optimizer = adamw(model)
    adapter, events = alr.RankAdapter(model, optimizer, replace(EIGHT, every=10, warmup=20), total_steps=200), []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for i in range(80):
            x, _ = batch(i)
            model(x, "ab"[i // 20 % 2]).square().mean().backward()
            optimizer.step()
            events += adapter.step()
            optimizer.zero_grad()
    turns = {"a": (range(1, 21), range(41, 61)), "b": (range(21, 41), range(61, 81))}
    assert all(any(e.step in turn for turn in turns[e.layer]) for e in events if e.layer in turns)
    assert any(e.layer == "trunk.0" for e in events) and any("'a' has been trained" in str(one.message) for one in told)


def test_a_layer_that_is_never_trained_is_cut_with_a_word():
    model = Heads()
    optimizer = adamw(model)
    adapter = alr.RankAdapter(model, optimizer, EIGHT, total_steps=40)
    with pytest.warns(UserWarning, match="'b' has not been trained so far.*let decisions begin later") as caught:
        for i in range(40):
            model(batch(i)[0], "a").square().mean().backward()
            optimizer.step()
            adapter.step()
            optimizer.zero_grad()
    assert adapter.ranks["b"] == EIGHT.control.min_rank and len(caught) == 1


SHAPES = [(48, 48), (48, 48), (96, 48)]
WORTH = [[1 / (j + 1) for j in range(24)] for _ in SHAPES]


@pytest.mark.parametrize("control, targets, memory, losses", [
    (Budget(share=0.2, min_rank=2), WORTH, [24] * 3, ()), (Proportional(share=0.2, at=0.1), [9.0, 12.0, 15.0], False, ()),
    (LossTarget(loss=3.0, factor=0.5), WORTH, 0, (2.0,))], ids=lambda x: type(x).__name__)
def test_layers_that_are_seen_are_shared_out_as_if_there_were_no_others(control, targets, memory, losses):
    whole = Signal(caps=[24] * 3, shapes=SHAPES, names=["a", "b", "c"], progress=0.4, losses=losses,
                   held=[False, True, False], unseen=[False, True, False])
    part = Signal(caps=[24] * 2, shapes=[SHAPES[0], SHAPES[2]], names=["a", "c"], progress=0.4, losses=losses)
    got, after = control.step([24] * 3, targets, memory, whole)
    fewer, _ = control.step([24] * 2, targets[::2], memory[::2] if memory else memory, part)
    assert got == [fewer[0], 24, fewer[1]] and fewer != [24, 24]
    assert type(after) is type(memory)
    inner = ByLayer((("*", control),))
    assert inner.step([24] * 3, targets, {"*": memory}, whole)[0] == got
    nobody = whole._replace(held=[True] * 3, unseen=[True] * 3)
    assert control.step([24] * 3, targets, memory, nobody) == ([24] * 3, memory)
    if isinstance(control, Budget):                                 # a frozen layer is paid for by the others
        frozen = whole._replace(unseen=[False] * 3)
        assert size(control.step([24] * 3, targets, memory, frozen)[0], SHAPES) < size(got, SHAPES)
