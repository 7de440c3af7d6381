"""accelerate needs no callback: RankAdapter takes its optimizers as they are."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import alr

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

RECIPE = replace(alr.recipes.alr, every=6, control=replace(alr.recipes.alr.control, min_rank=1))


@pytest.fixture(autouse=True)
def alone():
    """One thread, and accelerate's process-wide state as it is in a new process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    accelerate.state.AcceleratorState._reset_state(True)
    yield
    accelerate.state.AcceleratorState._reset_state(True)
    torch.set_num_threads(before)


def parts(kind, micro=1, precision="no"):
    """(accelerator, model, optimizer, scheduler, adapter), prepared, from the same start at every call."""
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=micro, mixed_precision=precision)
    model = alr.factorize_(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)),
                           rank=0.9)
    optimizer = alr.PairOptimizer(model) if kind == "pairs" else torch.optim.AdamW(model.parameters(), 3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 24)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    adapter = alr.RankAdapter(model, optimizer, RECIPE, total_steps=24)
    accelerator.register_for_checkpointing(adapter)
    return accelerator, model, optimizer, scheduler, adapter


def train(parts, low, high):
    """Micro-batches low to high - 1, each the same whenever it is asked for; returns the events."""
    accelerator, model, optimizer, scheduler, adapter = parts
    events = []
    for i in range(low, high):
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(i))
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(x), x[:, :8].argmax(1)))
            optimizer.step()
            events += adapter.step()                                # also after micro-batches, where it counts nothing
            scheduler.step()
            optimizer.zero_grad()
    return events


@pytest.mark.parametrize("kind", ["adamw", "pairs"])
@pytest.mark.parametrize("micro, precision", [(1, "no"), (4, "no"), (1, "bf16")])
def test_prepared_parts_adapt(kind, micro, precision):
    made = parts(kind, micro, precision)
    adapter = made[-1]
    events = train(made, 0, 24 * micro)
    assert adapter.steps == 24 and events and {event.step for event in events} <= {6, 12, 18}
    x = torch.randn(256, 32)
    fresh = parts(kind, micro, precision)[1]
    assert F.cross_entropy(made[1](x), x[:, :8].argmax(1)) < F.cross_entropy(fresh(x), x[:, :8].argmax(1))


@pytest.mark.parametrize("kind", ["adamw", "pairs"])
@pytest.mark.parametrize("stop", [7, 12, 16])
def test_a_saved_state_goes_on_bit_for_bit(kind, stop, tmp_path):
    whole = parts(kind)
    train(whole, 0, stop)
    whole[0].save_state(tmp_path)
    events = train(whole, stop, 24)
    again = parts(kind)
    again[0].load_state(tmp_path)
    before = [p.detach().clone() for p in again[1].parameters()]
    assert train(again, stop, 24) == events
    for a, b in zip(whole[1].parameters(), again[1].parameters(), strict=True):
        assert torch.equal(a, b)
    moved = [not (a.shape == b.shape and torch.equal(a, b)) for a, b in zip(again[1].parameters(), before, strict=True)]
    assert all(moved)                                               # every factor is trained afterwards
