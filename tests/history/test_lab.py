"""The scripts' order of things in the loop of `alr.lab`: when a decision is made, what has been seen, what a log says."""

import os
import signal
from dataclasses import replace

import pytest
import torch

from alr import recipes
from alr.control import Hold
from alr.lab import Config, loop, train

TEXT = "the cat sat on the mat and the dog sat on the log; " * 60


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return Config(data_file=str(path), level="char", epochs=6, steps_per_epoch=4, batch_size=4, block_size=8, n_layers=1,
                  n_heads=2, d_model=16, d_ff=32, log_every=2, device="cpu", threads=1)


def lines(run, kind):
    return [line for line in run.log if line["kind"] == kind]


def named(name, **changes):
    return replace(recipes.get(name), rank=14, **changes)


def test_v9_decides_at_the_end_of_an_epoch_with_its_loss_known(small, monkeypatch):
    heard, real = [], recipes.v9.control.step

    def step(self, ranks, targets, memory, signal):
        heard.append((signal.step, list(signal.losses)))
        return real(ranks, targets, memory, signal)
    monkeypatch.setattr(type(recipes.v9.control), "step", step)
    run = train(small, named("v9"), quiet=True)
    losses = [line["val_loss"] for line in lines(run, "epoch")]
    assert heard == [(16, losses[:4]), (24, losses[:6])]                        # epochs 4 and 6 of 4 steps


def test_a_log_of_v10_as_published_has_the_loss_before_the_resize(small):
    """The same decisions; where ranks move at an epoch's end, the logged loss is that of the epoch before they did."""
    usual = train(replace(small, embed_std=1.0, causal=False), named("v10"), quiet=True)
    published = train(replace(small, embed_std=1.0, causal=False), named("v10", when="validated"), quiet=True)
    still = train(replace(small, embed_std=1.0, causal=False), named("v10", control=Hold()), quiet=True)
    assert usual.model.wte.weight.std().item() == pytest.approx(1, abs=0.2)
    assert [line["new"] for line in lines(usual, "resize")] == [line["new"] for line in lines(published, "resize")] != []
    assert [line["ranks"] for line in lines(usual, "epoch")] == [line["ranks"] for line in lines(published, "epoch")]
    e = lines(usual, "resize")[0]["step"] // 4 - 1                              # the first epoch that ends with a change
    before, after, held = (lines(run, "epoch")[e] for run in (published, usual, still))
    assert before["val_loss"] == held["val_loss"] != after["val_loss"] and before["train_loss"] == after["train_loss"]
    assert published.log[-1]["val_loss"] == usual.log[-1]["val_loss"]           # at the end: of the model as it is


@pytest.mark.parametrize("name, text", [("v9", ""), ("v9", "cut while validating"), ("v5.1", ""), ("v7.2", ""), ("v7.4", "")])
def test_resume_equals_not_stopping(small, tmp_path, monkeypatch, name, text):
    """Sums of gradients, a decision that waits for its validation, what a controller remembers: all of it goes on."""
    control = {"control": recipes.v8.control} if name in ("v5.1", "v7.2") else {}       # so that much moves
    recipe = named(name, **control)
    recipe = replace(recipe, warmup=0, where=("*",))
    never, stopped = train(small, recipe, quiet=True), replace(small, out=str(tmp_path / "out"))
    real, calls = loop._nats, []

    def interrupted(*args):
        calls.append(args)
        if text and len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)
    monkeypatch.setattr(loop, "_nats", interrupted)

    def stop(run):
        if run.step == 14 and not text:
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, recipe, callback=stop, quiet=True)
    again = train(replace(stopped, resume=True), recipe, quiet=True)
    assert again.log[-1]["resumed"][0]["step"] == (16 if text else 14)
    assert again.adapter.ranks == never.adapter.ranks and len(set(never.adapter.ranks.values()) | {14}) > 1
    for p, q in zip(never.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert [line["new"] for line in lines(again, "resize")] == [line["new"] for line in lines(never, "resize")]


@pytest.mark.parametrize("zero", [False, True])
def test_the_loop_leaves_sums_to_the_recipe(small, zero):
    """Under `Stale` gradients of frozen factors pile up over the steps of the loop, unless the recipe says otherwise."""
    norms = []

    def look(run):
        for name in run.adapter.stale:
            grad = run.adapter.layers[name].U.grad
            norms.append(None if grad is None else grad.norm().item())
            return
    recipe = named("v7.2", control=recipes.v8.control, state=replace(recipes.v7_2.state, zero=zero), stop=1)
    run = train(replace(small, grad_clip=0.5), recipe, callback=look, quiet=True)
    assert {line["step"] for line in lines(run, "resize")} == {4} and len(norms) == 21 and norms[0] is None
    if zero:
        assert norms == [None] * 21
    else:
        assert norms[-1] > 4 * norms[1]
    other = train(replace(small, grad_clip=0.5), replace(recipe, state=replace(recipe.state, zero=not zero)), quiet=True)
    for p, q in zip(run.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)                                                # clipping does not see the sums
