"""Every example in a docstring of the library runs and says what it says; every public name has one."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import alr

WITHOUT = {"Recipe", "Resize", "Suggestion", "assert_causal", "average_gradients", "low_rank_layers", "recipes"}
PARTS = sorted(m.name for m in pkgutil.iter_modules(alr.__path__) if not m.ispkg and m.name not in ("train", "sweep", "claims"))


@pytest.mark.parametrize("name", PARTS)
def test_examples(name):
    torch.manual_seed(0)
    found = doctest.testmod(importlib.import_module(f"alr.{name}"), extraglobs={"torch": torch, "nn": torch.nn})
    assert found.failed == 0


def test_public_names_are_documented_and_most_have_an_example():
    for name in alr.__all__:
        value = getattr(alr, name)
        assert value.__doc__, f"alr.{name} has no docstring"
        assert name in WITHOUT or ">>>" in value.__doc__, f"alr.{name} has no example"
