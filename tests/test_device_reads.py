"""How often does the host wait for the device?  Counted by a dispatch mode: a read of one number, or a copy to the CPU.

On the CPU a copy is none, so calls are counted at which an accelerator would have to hand something over: reads of numbers
(aten._local_scalar_dense, also inside of torch's C++, and operators whose result's size depends on numbers), and .cpu(),
.numpy() and .tolist().  What lies on the CPU already is counted too, so the figures are upper bounds.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import alr
from alr.budget import Budget
from alr.estimate import OutputSpectrum
from alr.linear import factorize_
from alr.resize import GrowAlongGradient

ALR = replace(alr.recipes.alr, every=12, control=Budget(share=0.3, end=0.8, min_rank=2, per_parameter=True))
READS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::_unique2")
COPIES = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist}


class Ops(TorchDispatchMode):
    """Reads by operators.  torch's optimizers keep their step counts (`own`) on the CPU: reading those waits for nobody."""

    def __init__(self, own):
        super().__init__()
        self.own, self.reads = own, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func.overloadpacket._qualified_op_name in READS and id(args[0]) not in self.own
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Copies to the CPU by what Python calls on tensors."""

    def __init__(self):
        super().__init__()
        self.copies = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.copies += func in COPIES
        return func(*args, **(kwargs or {}))


def counted(work, optimizers=()):
    """(reads, copies) of some work."""
    own = {id(state["step"]) for o in optimizers for state in o.state.values() if "step" in state}
    with Calls() as calls, Ops(own) as ops:
        work()
    return ops.reads, calls.copies


def net(blocks=3, d=24):
    torch.manual_seed(0)
    layers = [layer for _ in range(blocks) for layer in (nn.Linear(d, d), nn.Tanh())]
    return factorize_(nn.Sequential(*layers, nn.Linear(d, 8)), rank=0.9)


def pairs(model):
    return [alr.PairOptimizer(model)]


def adamw(model):
    return [torch.optim.AdamW(model.parameters(), 1e-3)]


def fused(model):
    return [torch.optim.AdamW(model.parameters(), 1e-3, fused=True)]


def sgd(model):
    return [torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)]


def muon(model):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    return [torch.optim.Muon(matrices, 0.01), torch.optim.SGD([p for p in model.parameters() if p.dim() != 2], 0.01)]


def steps_counted(make, recipe, count=24, model=None):
    """[(step, reads, copies, rank changes)] of the optimizers' and the adapter's steps, forward and backward."""
    model = model or net()
    optimizers = make(model)
    adapter = alr.RankAdapter(model, optimizers, recipe, total_steps=count)
    out = []
    for i in range(count):
        x = torch.randn(32, 24, generator=torch.Generator().manual_seed(i))
        y, events = x[:, :8].argmax(1), []

        def work():
            F.cross_entropy(model(x), y).backward()
            for o in optimizers:
                o.step()
            events.extend(adapter.step())
            for o in optimizers:
                o.zero_grad()
        if i:
            out.append((i + 1, *counted(work, optimizers), len(events)))
        else:
            work()                                                  # optimizers make their state
    return out


@pytest.mark.filterwarnings("ignore:RankAdapter. Budget")
@pytest.mark.parametrize("make", [pairs, adamw, fused, sgd, muon])
@pytest.mark.parametrize("recipe",
                         [ALR, replace(alr.recipes.repaired, every=12, rank=10), replace(alr.recipes.v10, every=12, rank=10),
                                    replace(ALR, estimate=OutputSpectrum()), replace(ALR, resize=GrowAlongGradient()),
                                    alr.recipes.uniform], ids=["alr", "repaired", "v10", "output", "along", "uniform"])
def test_between_decisions_nothing_is_read_from_the_device(make, recipe):
    measures = any("importance" in axis.needs for axis in recipe.observes)
    turn = 12 - recipe.window + (recipe.window + 1) // 2 if measures else None      # directions are chosen in mid-window
    for step, reads, copies, events in steps_counted(make, recipe):
        if recipe.due(step) or turn is not None and step % 12 == turn:
            assert copies > 0
        else:
            assert (reads, copies, events) == (0, 0, 0), step


@pytest.mark.parametrize("make", [pairs, adamw, sgd])
def test_a_step_in_micro_batches_or_on_gradients_set_to_zero_reads_nothing(make):
    model = net()
    optimizers = make(model)
    adapter = alr.RankAdapter(model, optimizers, ALR, total_steps=48)
    def work(i):
        for part in range(3):
            model(torch.randn(8, 24)).square().mean().backward()
            if part < 2:
                adapter.step()
        for o in optimizers:
            o.step()
        adapter.step()
        for o in optimizers:
            o.zero_grad(set_to_none=False)
    work(0)
    for i in range(1, 9):                                           # step 9 opens the window, 10 is its middle
        assert counted(lambda: work(i), optimizers) == (0, 0)


def test_when_the_budget_has_ended_a_decision_costs_nothing():
    recipe = replace(ALR, every=4, control=replace(ALR.control, end=0.4))
    found = steps_counted(pairs, recipe, 48)
    assert any(events for *_, events in found)
    assert all((reads, copies) == (0, 0) for step, reads, copies, _ in found if step > 24)


def test_average_gradients_of_one_process_reads_nothing():
    model = net()
    model(torch.randn(4, 24)).sum().backward()
    assert counted(lambda: alr.average_gradients(model)) == (0, 0)


class Two(alr.group.Group):
    """Two processes that hold the same, as far as their sums go."""

    size = 2

    def sum(self, tensors):
        for x in tensors:
            x.mul_(2)


@pytest.mark.parametrize("used", ["all", "some", "none", "no parameters"])
def test_gradients_are_averaged_without_a_read_where_all_parameters_were_used(used, monkeypatch):
    monkeypatch.setattr(alr.group, "Group", Two)
    model = net() if used != "no parameters" else nn.Tanh()
    if used in ("all", "some"):
        (model if used == "all" else model[:2])(torch.randn(4, 24)).sum().backward()
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    found = counted(lambda: alr.average_gradients(model))
    assert found == (0, 0) or used in ("some", "none")
    for p, grad in zip(model.parameters(), before, strict=True):
        assert p.grad is grad is None or torch.equal(p.grad, grad)


def decision(layers):
    """(reads, copies, rank changes) of the first decision of a model of so many layers, its forward and backward included."""
    return next(found[1:] for found in steps_counted(pairs, ALR, 24, net(layers - 1)) if ALR.due(found[0]))


def test_what_a_decision_over_36_layers_asks_of_the_device():
    (reads, copies, changes), (reads2, copies2, changes2) = decision(12), decision(36)
    print(f"36 layers, {changes2} of them changed: {reads2} reads, {copies2} copies; 12, {changes}: {reads}, {copies}")
    assert changes2 > changes > 1
    # two or so a layer: its importance as plain numbers, and what its new factors need
    assert copies2 <= 3 * 36
