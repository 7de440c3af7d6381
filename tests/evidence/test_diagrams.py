"""Drawn pictures: what they show is true of the matrices, recipes and numbers behind them."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from alr import recipes
from alr.evidence import diagrams
from alr.evidence.paths import DATA


def words(fig) -> str:
    """All that is written in the axes of a figure."""
    return " ".join(text.get_text() for ax in fig.axes for text in [*ax.texts, ax.title])


def test_the_drawn_layer_has_the_singular_values_that_it_says():
    U, V = diagrams.example()
    np.testing.assert_allclose(np.linalg.svd(U @ V, compute_uv=False)[:5], [4, 2, 1, 0.5, 0], atol=1e-12)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_drawn_cut_is_the_best_one_and_its_words_are_computed(keep):
    s = np.array([4, 2, 1, 0.5])
    moved = np.sqrt((s[keep:] ** 2).sum() / (s ** 2).sum())             # Eckart and Young
    said = words(diagrams.cut(keep))
    assert f"{moved:.0%} of its size" in said and f"{keep * 18} numbers" in said and f"the {4 - keep} directions" in said


@pytest.mark.parametrize("keep", [0, 4])
def test_a_cut_that_is_none_is_refused(keep):
    with pytest.raises(ValueError, match=f"keep is {keep}"):
        diagrams.cut(keep)


def test_the_loop_names_what_the_recipes_hold():
    said = words(diagrams.loop({"v10": recipes.v10, "the budget recipe": recipes.alr}))
    for recipe in (recipes.v10, recipes.alr):
        for axis in ("estimate", "control", "resize", "state"):
            assert type(getattr(recipe, axis)).__name__ in said


def test_a_recipe_that_adapts_nothing_has_no_loop():
    with pytest.raises(ValueError, match="estimate of 'uniform' is empty"):
        diagrams.loop({"uniform": SimpleNamespace(name="uniform", estimate=None)})


def test_only_without_a_mask_a_position_sees_its_answer():
    fig = diagrams.mask(("a", "b", "c"))
    without, with_mask = fig.axes
    assert [t.get_text() for t in without.texts] == ["answer", "answer"] and not with_mask.texts
    seen = [patch.get_facecolor()[:3] != (1, 1, 1) for patch in with_mask.patches]                 # row by row
    np.testing.assert_array_equal(np.reshape(seen, (3, 3)), np.tri(3, dtype=bool))


def test_an_optimizer_that_was_not_told_steps_the_old_factor():
    said = words(diagrams.forgotten())
    assert "never moves again" in said and "old U\n16 columns" in said


@pytest.mark.parametrize("narrow", [False, True])
def test_the_layer_that_nobody_trains_keeps_its_values_and_loses_its_rank_like_the_other(narrow):
    log = pd.read_csv(DATA / "published" / "v8_block0.csv").set_index(["layer", "epoch"])
    idle, trained = log.loc["attn_o"], log.loc["attn_q"]
    assert idle["first"].nunique() == 1 and trained["first"].nunique() == len(trained) == 9
    assert (idle["rank"] == trained["rank"])[:-1].all() and idle["rank"].iloc[0] == 60
    left, right = diagrams.own_null(log.reset_index(), narrow).axes
    np.testing.assert_array_equal(right.lines[0].get_ydata(), trained["rank"])
    np.testing.assert_array_equal(right.lines[1].get_ydata(), idle["rank"])
    assert len(left.lines) == 6
