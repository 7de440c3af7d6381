"""Laws of the trial of chapter 15: predictions are what their formulas say of W, the model is left alone."""

import random
from dataclasses import replace

import pytest
import torch

import alr
from alr.estimate import loss_lost
from alr.factor import svd_core
from alr.lab import Config, train
from alr.lab.damage import PREDICTORS, expected, show, trial
from alr.lab.loop import evaluate

close = torch.testing.assert_close


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    rng = random.Random(0)
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("".join(rng.choice("aaabcd ef\n") for _ in range(9_000)), encoding="utf-8")
    config = Config(recipe="uniform", data_file=str(text), level="char", epochs=2, steps_per_epoch=10, batch_size=4,
                    block_size=16, d_model=16, n_layers=1, n_heads=2, d_ff=32, device="cpu", threads=1,
                    optimizer="tangent", test=False)
    return train(config, recipe=replace(alr.recipes.uniform, rank=6), quiet=True)


def test_predictions_are_what_their_formulas_say_of_the_matrix():
    g = torch.Generator().manual_seed(0)
    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.double)
    U, V, x, d = draw(14, 5), draw(5, 10), draw(40, 10), draw(40, 5)
    G, k = draw(14, 10), 2
    h = x @ V.mT                                                    # (40, 5)
    H, K, W = h.mT @ h / 40, d.mT @ d, U @ V                        # (5, 5), (5, 5), (14, 10)
    said = expected(U, V, k, H, K, loss_lost(U, V, G @ V.mT))
    P, S, Zt = torch.linalg.svd(W)
    cut = W - P[:, :k] @ torch.diag(S[:k]) @ Zt[:k]                 # (14, 10): what the cut takes out
    E = torch.linalg.lstsq(U, cut).solution @ torch.linalg.pinv(V)  # (5, 5)
    first = sum(abs(S[j] * P[:, j] @ G @ Zt[j]) for j in range(k, 5))
    felt = torch.einsum("bi,cj->bcij", d, h)                        # of every pair: h and d taken for independent
    second = (felt * E).sum((2, 3)).square().sum() / 40 / 2
    want = [S[k:].square().sum() / S.square().sum(), S[k:].square().sum(), (x @ cut.mT).square().sum(1).mean(), first, second]
    close(torch.tensor(list(said.values()), dtype=torch.double), torch.stack(want))
    assert list(said) == list(PREDICTORS)[:5]


def test_a_trial_cuts_every_layer_and_leaves_the_model_alone(run):
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    ids = {name: id(p) for name, p in run.model.named_parameters()}
    rows = trial(run, ranks=(2, 4, 6, 9), tokens=500)
    assert [(row["layer"], row["k"]) for row in rows] == [(name, k) for name in run.adapter.layers for k in (2, 4)]
    assert all(torch.equal(p, before[name]) and id(p) == ids[name] for name, p in run.model.named_parameters())
    assert all(set(PREDICTORS) <= row.keys() and all(isinstance(row[key], float) for key in PREDICTORS) for row in rows)

    name, layer = next(iter(run.adapter.layers.items()))
    whole = evaluate(run.model, run.corpus.valid[:500], 16, 32)
    own = layer.U, layer.V
    layer.U, layer.V = (torch.nn.Parameter(x) for x in svd_core(layer.U, layer.V, 2))
    assert rows[0]["damage"] == pytest.approx(evaluate(run.model, run.corpus.valid[:500], 16, 32) - whole, abs=1e-7)
    layer.U, layer.V = own


def test_a_model_is_as_it_was_also_where_a_trial_fails(run, monkeypatch):
    from alr.lab import damage
    calls = []

    def fails(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return 1.0
    monkeypatch.setattr(damage, "evaluate", fails)
    before = {name: id(p) for name, p in run.model.named_parameters()}
    with pytest.raises(KeyboardInterrupt):
        trial(run, ranks=(2,))
    assert {name: id(p) for name, p in run.model.named_parameters()} == before


def test_what_is_shown_is_training_text_and_has_to_be_long_enough(run):
    seen = show(run, ("input_moment", "grad_moment"), batches=2)
    assert all(s.rows == 32 * 16 and s.steps == 2 for s in seen.values())
    with pytest.raises(ValueError, match="damage: 100 batches of 512 tokens, and the training text has"):
        show(run, ("importance",), batches=100)
