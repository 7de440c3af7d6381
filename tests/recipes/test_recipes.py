"""Laws of `alr.recipes`: every version is a value that reads back, trains, stops and goes on, and each flaw of the old
scripts is there, with a repair of one field."""

import copy
import pathlib
import re
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import alr
from alr import RankAdapter, recipes
from alr.budget import Budget
from alr.lab.model import GPT, MLPLM, GPTConfig, MLPConfig, block_linears

EPOCH = 5                               # steps: every script's epochs, shortened to that
STEPS = 32                              # v9 decides at 21 and 31
NAMES = list(recipes.ALL)
ADAPTIVE = [name for name in NAMES if recipes.get(name).estimate is not None]
STALE = recipes.FLAWS["stale"].of
REPAIRS = [(flaw, version) for flaw in recipes.FLAWS.values() for version in flaw.of]


def on_mlp(name):
    """v1 to v6 belong on the MLP, all else on the GPT."""
    return re.fullmatch(r"v[1-6](\..)?", name) is not None


def language_model(mlp, seed=0):
    torch.manual_seed(seed)
    if mlp:
        return MLPLM(MLPConfig(vocab_size=23, block_size=4, d_embed=8, d_hidden=32))
    return GPT(GPTConfig(vocab_size=23, block_size=8, n_layers=2, n_heads=2, d_model=24, d_ff=48))


class Run:
    """A small training run: model, optimizer, adapter, and the events so far."""

    def __init__(self, recipe, mlp, seed=0, total_steps=STEPS):
        self.model = recipe.prepare(language_model(mlp, seed), block_linears)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 3e-3)
        self.adapter = RankAdapter(self.model, self.optimizer, recipe, total_steps)
        self.events, self.losses = [], []

    def train(self, steps):
        for i in range(self.adapter.steps, self.adapter.steps + steps):
            tokens = torch.randint(5, (4, 9), generator=torch.Generator().manual_seed(i)).cumsum(1) % 23    # (B, T + 1)
            loss = F.cross_entropy(self.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            self.optimizer.zero_grad(set_to_none=True)                          # not the model's: as in the scripts
            loss.backward()
            seen = loss.item() if (i + 1) % EPOCH == 0 else None
            if self.adapter.recipe.when == "before":
                self.events += self.adapter.step(loss=seen)
            self.optimizer.step()
            if self.adapter.recipe.when != "before":
                self.events += self.adapter.step(loss=seen)
            self.losses.append(loss.item())
        return self


# ------------------------------------------------------------------------------------------------ they are values

def test_every_version_is_there():
    versions = "v1 v2 v3 v4 v5 v5.1 v6 v7 v7.1 v7.2 v7.3 v7.4 v7.5 v8 v9 v10".split()
    assert NAMES == ["dense", "uniform", *versions, "repaired", "alr"]
    assert all(recipe.about for recipe in recipes.ALL.values())
    for name in NAMES:
        assert recipes.get(name) is getattr(recipes, name.replace(".", "_")) and recipes.get(name).name == name
    with pytest.raises(ValueError, match="recipe 'v11' is not known; there are dense, uniform, v1"):
        recipes.get("v11")


@pytest.mark.parametrize("name", NAMES)
def test_the_repr_reads_back(name):
    for recipe in (recipes.get(name), recipes.get(name).paced(7)):
        assert recipes.parse(repr(recipe)) == recipe and repr(recipes.parse(repr(recipe))) == repr(recipe)
    assert recipes.parse(name) is recipes.parse(name.replace(".", "_")) is recipes.get(name)


def test_what_is_not_a_recipe_is_refused():
    for text in ("v11", "SvdCore()", "__import__('os')", "replace(v3, rnak=3)", "open('x')", ""):
        with pytest.raises(ValueError, match="recipe"):
            recipes.parse(text)


@pytest.mark.parametrize("a, b", list(zip(NAMES, NAMES[1:])))
def test_the_literal_difference_makes_one_version_into_the_next(a, b):
    changed = recipes.difference(recipes.get(a), recipes.get(b))
    text = ", ".join([f"name={b!r}"] + [f"{field}={new}" for field, (_, new) in changed.items()])
    assert recipes.parse(f"replace({a.replace('.', '_')}, {text})") == recipes.get(b)
    back = recipes.difference(recipes.get(b), recipes.get(a))
    assert back == {field: (new, old) for field, (old, new) in changed.items()}
    assert recipes.difference(recipes.get(a), recipes.get(a)) == {}


def test_small_steps_of_the_story():
    def changed(a, b):
        return set(recipes.difference(recipes.get(a), recipes.get(b)))
    assert changed("v1", "v2") == {"gradient"} and changed("v3", "v4") == {"control", "resize", "when"}
    assert changed("v4", "v5") == {"when", "where"} and changed("v5", "v5.1") == {"estimate", "control", "warmup"}
    assert changed("v5.1", "v6") == {"op"} == changed("v7.2", "v7.3")
    assert changed("v7.4", "v7.5") == {"estimate", "state", "every", "warmup"}
    assert changed("v8", "v9") == {"estimate", "control", "state", "every", "warmup", "epoch", "when"}


def test_the_table_is_read_off_the_recipes():
    table = recipes.table()
    assert [row["name"] for row in table] == NAMES and len({tuple(row) for row in table}) == 1
    for row in table:
        recipe = recipes.get(row["name"])
        used = [axis for axis in ("estimate", "control", "resize", "state", "gradient", "op") if row[axis]]
        text = "".join(f", {axis}={row[axis]}" for axis in used)
        read = recipes.parse(f"replace(dense{text})")
        assert all(getattr(read, axis) == getattr(recipe, axis) for axis in used) and row["about"]
        assert (row["estimate"] == row["every"] == "") == (row["name"] not in ADAPTIVE)
        assert all(isinstance(cell, str) for cell in row.values())
    every = {row["name"]: row["every"] for row in table}
    assert (every["v3"], every["v7.2"], every["v7.5"], every["v9"]) == ("1 epoch", "1 epoch", "3 epochs", "2 epochs")


def test_no_code_asks_for_a_version():
    for path in pathlib.Path(alr.__file__).parent.rglob("*.py"):
        assert not re.search(r"(==|!=|\bin)\s*[\[({]*\s*[\"']v\d", path.read_text(encoding="utf-8")), path


# ------------------------------------------------------------------------------------------------ their clocks

@pytest.mark.parametrize("name, when, steps", [
    ("v3", "before", [1, 470, 939]), ("v4", "after", [1, 470, 939]), ("v5", "before", [1, 470]), ("v5.1", "before", [470, 939]),
    ("v6", "before", [470, 939]), ("v7.1", "before", [601, 801]), ("v7.2", "after", [1, 2, 3]), ("v7.3", "after", [1, 2, 3]),
    ("v7.4", "after", [30, 40, 50]), ("v7.5", "after", [60, 90]), ("v8", "after", [120, 180]), ("v9", "validated", [200, 300]),
    ("v10", "after", [200, 400])])
def test_decisions_come_when_the_scripts_took_them(name, when, steps):
    recipe = recipes.get(name)
    assert recipe.when == when and [step for step in range(1, steps[-1] + 1) if recipe.due(step)] == steps
    step, found = 0, []
    while len(found) < len(steps):
        found.append(step := recipe.next_due(step))
    assert found == steps


@pytest.mark.parametrize("name, lost", [("v3", True), ("v4", False)])
def test_v3_loses_the_step_of_its_decision_and_v4_does_not(name, lost):
    """History: a decision between backward and the optimizer's step, and the step goes to factors that nobody uses."""
    run = Run(replace(recipes.get(name), resize=alr.resize.SvdCore(), control=recipes.v8.control), mlp=True)    # grows none
    low = alr.low_rank_layers(run.model)["fc2"]
    before = low.weight.detach().clone()
    run.train(1)
    best = torch.linalg.svd(before, full_matrices=False)
    cut = (best[0][:, :low.rank] * best[1][:low.rank]) @ best[2][:low.rank]
    assert len(run.events) == 1 and (torch.allclose(low.weight, cut, atol=1e-6) == lost)


def test_pacing_moves_everything_that_counts_steps():
    fast = recipes.v5_1.paced(100)
    assert (fast.every, fast.offset, fast.warmup, fast.epoch) == (100, 1, 100, 100)
    assert fast.control.for_layer("fc1").warmup == 500 and fast.control.for_layer("fc2").warmup == 0
    assert recipes.v1.paced(100).gradient.stages == ((200, 0.7), (400, 0.85)) and recipes.v2.paced(100).gradient.epoch == 100
    assert recipes.v7_2.paced(200).every == 200 and recipes.v9.paced(200).warmup == 600
    for name in NAMES:
        assert recipes.get(name).paced(recipes.get(name).epoch) == recipes.get(name)


# ------------------------------------------------------------------------------------------------ they run

@pytest.mark.parametrize("name", NAMES)
def test_it_trains_on_its_model_and_resumes_as_if_it_had_not_stopped(name):
    recipe, mlp = recipes.get(name).paced(EPOCH), on_mlp(name)
    run = Run(recipe, mlp).train(STEPS // 2 + 2)
    saved = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict(), run.adapter.state_dict(),
                           torch.get_rng_state()))
    run.train(STEPS - run.adapter.steps)
    assert sum(run.losses[-5:]) < sum(run.losses[:5])
    assert bool(run.events) == (name in ADAPTIVE)

    other = Run(recipe, mlp, seed=1)
    other.model.load_state_dict(saved[0])
    other.optimizer = torch.optim.Adam(other.model.parameters(), 3e-3)
    other.adapter = RankAdapter(other.model, other.optimizer, recipe, STEPS)
    other.adapter.load_state_dict(saved[2])
    other.optimizer.load_state_dict(saved[1])
    torch.set_rng_state(saved[3])
    other.train(STEPS - other.adapter.steps)
    assert other.adapter.ranks == run.adapter.ranks
    for (key, p), q in zip(run.model.named_parameters(), other.model.named_parameters(), strict=True):
        assert torch.equal(p, q[1]), key


@pytest.mark.parametrize("name", [name for name in NAMES if on_mlp(name)])
def test_the_mlps_versions_train_on_a_gpt_too(name):
    run = Run(recipes.get(name).paced(EPOCH), mlp=False).train(STEPS)
    assert len(run.adapter.ranks) == (12 if name in ADAPTIVE else 0)
    assert bool(run.events) == (name in ADAPTIVE)
    assert set(run.adapter.grouped) == ({"blocks.0.mlp.up", "blocks.1.mlp.up"} if name in ("v1", "v2") else set())


def test_who_is_adapted():
    def layers(name, mlp):
        return list(alr.low_rank_layers(recipes.get(name).prepare(language_model(mlp), block_linears)))
    assert layers("v3", True) == layers("v4", True) == ["fc2"]
    assert layers("v5", True) == layers("v6", True) == ["fc1", "fc2"]
    assert len(layers("v7.1", False)) == len(layers("v9", False)) == 12
    assert layers("v7", False) == layers("v1", True) == []


def test_an_optimizer_that_no_rank_will_meet_is_not_asked_about():
    model = language_model(True)
    RankAdapter(model, torch.optim.Adagrad(model.parameters()), recipes.v1)     # Transport would refuse it
    low = recipes.uniform.prepare(language_model(True), block_linears)
    adapter = RankAdapter(low, torch.optim.Adagrad(low.parameters()), recipes.uniform)
    with pytest.raises(TypeError, match="Adagrad"):
        adapter.resize({"fc1": 2})


# ------------------------------------------------------------------------------------------------ their flaws

@pytest.mark.parametrize("flaw, version", REPAIRS, ids=lambda x: getattr(x, "name", x))
def test_a_repair_is_one_field_and_runs(flaw, version):
    text = flaw.repair(version)
    recipe = recipes.parse(text)
    assert len(recipes.difference(recipes.get(version), recipe)) == 1
    recipe = replace(recipe.paced(EPOCH), warmup=0, every=EPOCH)
    run = Run(recipe, on_mlp(version)).train(EPOCH + 2)
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def moved_after_its_resize(recipe, mlp, steps=8):
    """For each layer resized in `steps` steps: how far W went in as many steps more, without further resizing."""
    run = Run(replace(recipe.paced(EPOCH), warmup=0, offset=1, every=1), mlp)
    low = alr.low_rank_layers(run.model)
    run.train(steps)
    names = {e.layer for e in run.events}
    run.adapter.recipe = replace(run.adapter.recipe, estimate=None, control=alr.control.Hold())
    before = {name: low[name].weight.detach().clone() for name in names}
    run.train(steps)
    return [(low[name].weight - before[name]).norm().item() for name in names]


@pytest.mark.parametrize("name", STALE)
def test_stale_freezes_what_it_resizes_and_transport_does_not(name):
    """History: the optimizer goes on holding the old factors; from its first change on a layer never learns again."""
    recipe = recipes.get(name)
    recipe = replace(recipe, control=recipes.v8.control)            # so that every version changes something in 8 steps
    frozen = moved_after_its_resize(recipe, on_mlp(name))
    assert frozen and max(frozen) == 0.0
    alive = moved_after_its_resize(replace(recipe, state=alr.state.Transport()), on_mlp(name))
    assert alive and min(alive) > 1e-4


def test_stale_is_exactly_where_the_scripts_had_it():
    assert set(STALE) == {n for n in NAMES if isinstance(recipes.get(n).state, alr.state.Stale)}
    assert set(STALE) == {"v3", "v4", "v5", "v5.1", "v6", "v7.1", "v7.2", "v7.3", "v9"}
    reset = {n for n in NAMES if isinstance(recipes.get(n).state, alr.state.Reset)}
    assert {n for n in reset if recipes.get(n).state.always} == {"v7.4"} and all(recipes.get(n).state.everything for n in reset)
    assert reset == set(recipes.FLAWS["reset"].of) == {"v7.4", "v7.5", "v8", "v10"}


@pytest.mark.parametrize("name", recipes.FLAWS["reset"].of)
def test_reset_forgets_the_embeddings_too(name):
    run = Run(replace(recipes.get(name).paced(EPOCH), warmup=0, every=EPOCH), mlp=False).train(EPOCH - 1)
    assert len(run.optimizer.state) == len(list(run.model.parameters()))
    while not run.events:
        run.train(1)
    assert run.events[0].step <= 2 * EPOCH and len(run.optimizer.state) == 0


@pytest.mark.parametrize("name", recipes.FLAWS["summed gradients"].of)
def test_stale_lets_gradients_pile_up_and_its_repair_does_not(name):
    """History: zero_grad() of the optimizer does not reach the new factors, whose .grad is a sum since the change."""
    recipe = replace(recipes.get(name).paced(EPOCH), control=recipes.v8.control, warmup=0, offset=1, every=100)
    run, own = Run(recipe, on_mlp(name)).train(1), []
    layer = run.adapter.layers[run.events[0].layer]
    layer.U.register_hook(own.append)                               # the gradient of each batch
    run.train(4)
    assert len(own) == 4 and min(g.norm() for g in own) > 0
    torch.testing.assert_close(layer.U.grad, sum(own))

    other = Run(recipes.parse(f"replace({recipe!r}, state=Stale(zero=True))"), on_mlp(name)).train(5)
    assert other.adapter.ranks == run.adapter.ranks and other.losses == run.losses
    assert all(other.adapter.layers[e.layer].U.grad is None for e in other.events)


@pytest.mark.parametrize("zero", [False, True])
def test_v7_2_the_sum_is_what_its_decisions_read(zero):
    """History: a layer that v7.2 has frozen asks for 16 and four times the norm of a sum; repaired, of one gradient."""
    recipe = replace(recipes.v7_2, control=alr.control.Schedule(((1, 20),)), state=alr.state.Stale(zero=zero))
    run, asked = Run(recipe, mlp=False).train(1), []
    layer, decide, own = run.adapter.layers["blocks.1.mlp.up"], run.adapter.adapt, {"U": [], "V": []}
    layer.U.register_hook(own["U"].append)
    layer.V.register_hook(own["V"].append)
    run.adapter.adapt = lambda: [asked.append(recipe.estimate(layer)), decide()][1]
    run.train(20)
    def suggestion(first, last):
        return 16 + int(2 * sum(sum(grads[first:last]).norm().item() for grads in own.values()))
    sums, each = [suggestion(0, i + 1) for i in range(20)], [suggestion(i, i + 1) for i in range(20)]
    assert asked == (each if zero else sums) and sums[-1] > max(each)


def test_v7_4_rebuilds_its_optimizer_whether_or_not_a_rank_changes():
    recipe = replace(recipes.v7_4.paced(EPOCH), warmup=0, estimate=alr.estimate.StableRank(), control=alr.control.Hold())
    run = Run(recipe, mlp=False).train(EPOCH - 1)
    assert len(run.optimizer.state) == len(list(run.model.parameters()))
    run.train(1)
    assert run.events == [] and len(run.optimizer.state) == 0
    other = Run(replace(recipe, state=recipes.v7_5.state), mlp=False).train(EPOCH)
    assert other.events == [] and len(other.optimizer.state) == len(list(other.model.parameters()))


def test_v3_decides_on_the_first_batch_and_is_frozen_from_then_on():
    run = Run(recipes.v3, mlp=True).train(1)
    assert [e.step for e in run.events] == [1]
    start = alr.low_rank_layers(run.model)["fc2"].weight.detach().clone()
    run.train(20)
    assert torch.equal(alr.low_rank_layers(run.model)["fc2"].weight, start) and len(run.events) == 1
    assert Run(recipes.parse(recipes.FLAWS["first batch"].repair("v3")), mlp=True).train(20).events == []


# ------------------------------------------------------------------------------------------------ who starts how

def test_an_offset_moves_with_the_clock_and_the_first_batch_stays_the_first():
    late = replace(recipes.repaired, every=200, offset=100, epoch=200)
    assert late.paced(20).offset == 10 and late.paced(400).offset == 200 and late.paced(1).offset == 1
    assert late.paced(20).paced(200).offset == 100 and late.paced(20).paced(20) == late.paced(20)
    for clock in (7, 200, 4000):
        assert recipes.v3.paced(clock).offset == 1 and recipes.v10.paced(clock).offset == 0


def test_every_axis_that_counts_steps_is_paced():
    @dataclass(frozen=True)
    class Late(alr.resize.SvdCore):
        after: int = 100

        def paced(self, factor):
            return replace(self, after=round(self.after * factor))
    assert replace(recipes.repaired, resize=Late(), epoch=200).paced(20).resize == Late(after=10)
    del alr.axes.VALUES["Late"]


@pytest.mark.parametrize("rank", [{"0": 4, "2": 3}, 4, 0.5], ids=str)
def test_only_what_both_wheres_pick_is_factorised(rank):
    def model():
        return torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.ReLU(), torch.nn.Linear(12, 12), torch.nn.Linear(12, 12))
    recipe = replace(recipes.uniform, rank=rank)
    assert list(alr.low_rank_layers(recipe.prepare(model(), lambda name: name == "0"))) == ["0"]
    assert list(alr.low_rank_layers(replace(recipe, where=("0",)).prepare(model()))) == ["0"]
    with pytest.raises(ValueError, match="no linear layer matched `where`"):
        recipe.prepare(model(), "1")


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, Fraction])
def test_numbers_of_numpy_are_pythons(kind):
    budget = Budget(share=kind(0.25), end=kind(0.5), min_rank=np.int64(4), start=np.uint8(9))
    assert budget == Budget(share=0.25, end=0.5, min_rank=4, start=9)
    recipe = replace(recipes.alr, name=np.str_("mine"), rank={np.str_("a"): kind(0.5)}, control=budget, every=np.int32(10),
                     estimate=alr.control.ByLayer(((np.str_("*"), recipes.alr.estimate),)))
    assert recipes.parse(repr(recipe)) == recipe and "np." not in repr(recipe) and "Fraction" not in repr(recipe)
    path = alr.control.Schedule(((np.int64(3), {"a": np.int64(2)}), (np.int64(5), np.int64(1))))
    assert recipes.parse(repr(replace(recipes.repaired, control=path))).control == path
    assert "np." not in repr(path)


def test_a_share_of_numpy_is_a_share():
    ranks = [alr.low_rank_layers(replace(recipes.uniform, rank=kind(0.9)).prepare(torch.nn.Sequential(torch.nn.Linear(64, 64))))
             ["0"].rank for kind in (float, np.float64, np.float32)]
    assert ranks == [28, 28, 28]
    with pytest.raises(ValueError, match="rank is .*; wanted"):
        replace(recipes.uniform, rank=np.bool_(True))
