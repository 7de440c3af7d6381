"""Recipes from text: whatever stands in it, a Recipe comes out or a ValueError of one paragraph, and nothing runs."""

import json
import random
import sys
import time
import unicodedata  # noqa: F401  # what Python's own parser imports for \\N{...}
from dataclasses import fields, is_dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alr import recipes
from alr.adapt import Recipe
from alr.axes import VALUES, hints
from alr.recipes import ALL, FLAWS, parse

WATCHED = ("open", "exec", "import", "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "marshal.", "pickle.")
seen: list[str] = []
listening = False


def _listen(event: str, args: tuple) -> None:
    if listening and event.startswith(WATCHED):
        seen.append(f"{event} {args!r}"[:200])


sys.addaudithook(_listen)                       # there is no way to take one off again; it is deaf but in `quietly`
KINDS = {**{name: kind for name, kind in VALUES.items() if is_dataclass(kind)}, "Recipe": Recipe}
for kind in KINDS.values():
    hints(kind)                                 # reads our own annotations, once


def quietly(text):
    """What parse says of a text: a Recipe, or the text of its ValueError.  AssertionError for all else that happens."""
    global listening
    seen.clear()
    listening = True
    try:
        found = parse(text)
    except ValueError as error:
        found = str(error)
    finally:
        listening = False
    assert not seen, (text, seen)
    assert isinstance(found, Recipe) or found and "\n" not in found and len(found) < 3000, (text, found)
    return found


def test_the_hook_hears():
    global listening
    listening = True
    eval("__import__('os').getcwd()")
    open(__file__).close()
    listening = False
    assert any(x.startswith("open") for x in seen)
    seen.clear()


# ------------------------------------------------------------------------------------------------ what runs in an eval

OS = "[c for c in (1).__class__.__base__.__subclasses__() if c.__name__ == '_wrap_close'][0].__init__.__globals__['system']"
CODE = [
    "__import__('os').system('touch CANARY')", "open('CANARY', 'w')", "eval(\"open('CANARY', 'w')\")", "exec('import os')",
    "print(1)", f"{OS}('touch CANARY')", f"replace(v10, name={OS}('touch CANARY'))",
    "replace(v10, name=[open('CANARY', 'w') for _ in (1,)][0])", "(lambda: open('CANARY', 'w'))()",
    "f'{open(\"CANARY\", \"w\")}'", "replace(v10, name=f'{v10.__init__.__globals__}')", "(x := open('CANARY', 'w'))",
    "await open('CANARY', 'w')", "v10.__class__.__mro__[1].__subclasses__()", "v10.__init__.__globals__",
    "v10.prepare.__func__.__globals__['torch']", "v10.control.__class__", "v10.estimate.__call__.__globals__",
    "v10.control.__reduce_ex__(4)", "v10.prepare", "v10.paced(3)", "v10.due(1)", "''.join(['a'])", "'x'.format(v10)",
    "'{0.__class__}'.format(v10)", "type(v10)", "getattr(v10, 'control')", "vars(v10)", "dir()", "globals()", "breakpoint()",
    "input()", "Recipe.__init__", "Recipe.__new__(Recipe)", "replace.__globals__", "each.__globals__['VALUES']", "Budget.step",
    "VALUES['Budget']()", "(Budget if 1 else Budget)()", "(Budget)()()", "[Budget][0]()", "{**{'a': open('CANARY', 'w')}}",
    "replace(*[v10])", "replace(v10, **{'name': open('CANARY', 'w')})", "Recipe(**{'name': 'x'})", "Budget(*(1,))",
    "(open('CANARY', 'w') for _ in (1,))", "{open('CANARY', 'w')}", "{1: 2 for _ in (1,)}", "yield v10",
    "v10 if open('CANARY', 'w') else v10", "v10 or v9", "not v10", "v10[0]", "v10[0:1]", "v10 @ v10", "~1", "1 < 2", "...",
    "b'x'", "1j", "import os", "v10; import os", "v10\nimport os", "v10 = 1", "def f(): pass", "class A: pass",
    "@v10\ndef f(): pass", "del v10", "assert 0", "v10: int = 3", "async def f(): pass", "lambda: v10", "print(v10) or v10",
    "torch.load('CANARY')", "os", "sys.exit(0)", "__builtins__", "__loader__", "Axis()", "Control()", "Estimate()", "Rule()",
    "replace(v10, state=_Policy())", "FisherStart(seen={'a': open('CANARY', 'w')})",
]


@pytest.mark.parametrize("text", CODE)
def test_what_an_eval_would_run_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = quietly(text)
    assert isinstance(found, str) and "cannot be read" in found and "Write a name" in found
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ what is too much

LARGE = [
    "9**9**9**9", "2**10**9", "'a' * 10**9", "[0] * 10**9", "1 << 10**9", "-" * 15_000 + "1", "not " * 4_000 + "v10",
    "1/" * 4_000 + "1", "v10" + ".control" * 2_000, "(" * 10_000, "(" * 39 + "v10", "(" * 41 + "v10" + ")" * 41,
    "[" * 200 + "]" * 200, "{" * 90 + "}" * 90, "(" * 9_000 + "v10" + ")" * 9_000, "((),) + " * 2_000 + "()", "v10" * 7_000,
    "a" * 100_000, " " * 100_000 + "v10", "v10" + " " * 100_000, "replace(" * 38 + "v10" + ", every=3)" * 38 + "x", "9" * 5_000,
    "9" * 19_000, "replace(v10, every=" + "9" * 5_000 + ")", "replace(v10, control=Budget(share=1/" + "9" * 400 + "))",
    "1/" + "9" * 400, "replace(v10, where=(" + "'*', " * 4_000 + "))", "0" * 19_000 + "1", "1e" + "9" * 300,
    "'" + "\\N{BULLET}" * 1_500 + "'", "lambda " + ", ".join(f"a{i}" for i in range(3_000)) + ": 0", "f'" + "{1}" * 5_000 + "'",
    "x" + "[0]" * 5_000, "await " * 3_000 + "x",
]


@pytest.mark.parametrize("text", LARGE, ids=lambda text: f"{text[:16]} {len(text)}")
def test_what_is_too_long_too_deep_or_too_large_is_refused_at_once(text):
    start = time.perf_counter()
    assert isinstance(quietly(text), str)
    assert time.perf_counter() - start < 2


# ------------------------------------------------------------------------------------------------ what is no text

ODD = [
    "", " ", "\n", "\0", "v10\0", "\0v10", "v10\n\nv10", "\u202ev10", "v\u200b10", "\ufeffv10", "v10\\", "'", '"""', "\\", "#",
    "# v10", "replace(v10, name='\ud800')", "\ud800", "replace(v10, name=\u201cx\u201d)", "v10,", "(v10,)", "[v10]", "{v10: 1}",
    "{'a': v10}", "'v10'", "3", "None", "True", "-v10", "+v10", "v10/v10", "-True", "1/0", "0/0", "1/True", "-'a'", "nan",
    "inf", "-inf", "1e999", "v10.nope", "v10.every", "v10.control", "v10.name", "nope", "nope()", "v99", "V10", "v5.2",
    "replace()", "replace(3)", "replace(v10, 3)", "replace(v10, nope=3)", "replace(Budget(), begin=0.9, end=0.1)", "each(3)",
    "each(v10.control, nope=3)", "Recipe()", "Recipe(3)", "Budget()", "Spectron()", "{(1, 2): 3}", "{[1]: 2}", "{1: 2, 1: 3}",
    "{}", "[]", "()", "Recipe('x', 'y', 'z', 1, 2, 3, 4, 5, 6)", "ByLayer(())", "ByLayer((('*', 3),))",
    "Schedule(((0, {'a': 'x'}),))", "Schedule(((0, {1: 2}),))", "Schedule(((0, {'a': 0}),))",
]


@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_what_is_no_recipe_is_refused(text):
    assert isinstance(quietly(text), str)


@pytest.mark.parametrize("value", [None, 3, b"v10", ["v10"], recipes.v10, object(), 1.5, True])
def test_what_is_no_text_is_refused(value):
    assert "not a text" in quietly(value)


@pytest.mark.parametrize("text", ["(v10)", " v10 ", "v10  # a comment", "\tv10", "replace(v10, every=0x10)", "v5.1", "v5_1",
                                  "replace(v10, every=1_000)", "replace(replace(v10), every=3)", "replace(v10, name='a' 'b')",
                                  "replace(v10, control=Budget(share=1/6, end=1/2), estimate=Spectrum())",
                                  "replace(v10, control=v9.control)", "replace(v10, control=each(v10.control, min_rank=4))"])
def test_what_is_one_is_read(text):
    assert isinstance(quietly(text), Recipe)


def test_the_texts_of_all_recipes_and_repairs_read_back():
    for recipe in ALL.values():
        assert quietly(repr(recipe)) == recipe and repr(quietly(repr(recipe))) == repr(recipe)
    for flaw in FLAWS.values():
        for version in flaw.of:
            assert isinstance(quietly(flaw.repair(version)), Recipe)


# ------------------------------------------------------------------------------------------------ values of wrong types

WRONG = [
    "-1", "0", "1.5", "-0.5", "1e999", "10**3", "None", "True", "'x'", "()", "{}", "[1]", "v10", "Hold()", "('a', 3)",
    "9" * 400,
]


def calls():
    """Name(field=value) for every value of the vocabulary, each of its fields and each wrong value; and of Recipe."""
    for name, kind in sorted(KINDS.items()):
        for field in fields(kind):
            if field.init:
                yield from (f"{name}({field.name}={value})" for value in WRONG)


def test_every_field_of_every_value_is_checked_when_it_is_made():
    texts = list(calls())
    assert len(texts) > 800
    for text in texts:
        found = quietly(f"replace(v10, name={text})")
        assert isinstance(found, str)                       # whatever it is, it is no name
        quietly(f"replace(alr, control={text})")
        quietly(text)


# ------------------------------------------------------------------------------------------------ whatever comes

ALPHABET = "()[]{}'\",.:;=+-*/%@!~<>|&^\\#_ \n\0\t0189eEjxaAvN\u202e\ud800\u00e9"
WORDS = [
    "lambda", "None", "True", "for", "in", "if", "else", "import", "yield", "await", "not", "**", "*", ":=", "__class__", "v10",
    "replace", "Recipe", "Budget", "1e999", "-", "()", ".control", "1/0", "eval", "open('x')", "f'{1}'", "...", "{**{}}",
]


def mutated(rng, texts):
    """One or a few random changes of a random recipe's text."""
    text = rng.choice(texts)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        a, b = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        b = min(b, a + rng.choice((0, 1, 1, 3, 12)))
        how = rng.randrange(5)
        if how == 0:
            text = text[:a] + text[b:]
        elif how == 1:
            text = text[:a] + rng.choice(ALPHABET) + text[b:]
        elif how == 2:
            text = text[:a] + rng.choice(WORDS) + text[b:]
        elif how == 3:
            text = text[:a] + text[a:b] * 2 + text[b:]
        else:
            other = rng.choice(texts)
            c = rng.randrange(len(other) + 1)
            text = text[:a] + other[c:c + rng.choice((1, 5, 20))] + text[b:]
    return text


def test_two_thousand_mutants_of_recipes_are_read_or_refused():
    rng = random.Random(0)
    texts = [repr(recipe) for recipe in ALL.values()] + ["replace(v10, state=Transport())", "v10"]
    texts += [flaw.repair(version) for flaw in FLAWS.values() for version in flaw.of]
    found = [quietly(mutated(rng, texts)) for _ in range(2000)]
    assert 50 < sum(isinstance(one, Recipe) for one in found) < 1500


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60) | st.lists(st.sampled_from(WORDS + list(ALPHABET)), max_size=25).map("".join))
def test_any_text_at_all_is_read_or_refused(text):
    quietly(text)


# ------------------------------------------------------------------------------------------------ texts that come in files

HOSTILE = f"replace(v10, name={OS}('touch CANARY'))"


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A folder in which nothing may appear but what the test puts there."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / "CANARY").exists()


def checkpoint_of(folder, state, sealed):
    """A file that somebody else made, with our seal or without."""
    from alr.lab import checkpoint
    torch.save(state, folder / "state.pt")
    if sealed:
        checkpoint._seal(folder / "state.pt", 1, "model-1.safetensors")


@pytest.mark.parametrize("sealed, says", [(True, "cannot be read"), (False, "no checkpoint of this program")])
def test_a_checkpoint_whose_recipe_is_code_runs_nothing(canary, sealed, says):
    from alr.lab import Config
    from alr.lab.run import STATE, load
    empty = {key: torch.zeros(()) if kind is torch.Tensor else None if kind == float | None else kind()
             for key, kind in STATE.items()}
    checkpoint_of(canary, empty | {"config": Config().describe(), "recipe": HOSTILE}, sealed)
    with pytest.raises(ValueError, match=says):
        load(canary)


class Code:
    def __reduce__(self):
        return eval, ("open('CANARY', 'w')",)


@pytest.mark.parametrize("sealed, says", [(True, "could run code and is not read"), (False, "no checkpoint of this program")])
def test_a_checkpoint_that_is_a_pickle_of_code_runs_nothing(canary, sealed, says):
    from alr.lab.run import load
    checkpoint_of(canary, {"config": {}, "recipe": Code()}, sealed)
    with pytest.raises(ValueError, match=says):
        load(canary)


def test_an_adapters_state_whose_recipe_is_code_runs_nothing(canary):
    import alr
    model = alr.factorize_(torch.nn.Sequential(torch.nn.Linear(8, 8)), rank=4)
    adapter = alr.RankAdapter(model, torch.optim.AdamW(model.parameters()), recipes.repaired)
    with pytest.raises(ValueError, match="the state is of recipe"):
        adapter.load_state_dict(adapter.state_dict() | {"recipe": HOSTILE})


def test_a_suite_in_toml_whose_recipe_is_code_runs_nothing(canary):
    from alr.evidence import suite
    path = canary / "bad.toml"
    path.write_text(f'about = "x"\nseeds = [0]\n[[arms]]\nname = "a"\nrecipe = {json.dumps(HOSTILE)}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="arm 'a': .*cannot be read"):
        suite.load(path)


def test_a_record_in_jsonl_whose_recipe_is_code_runs_nothing(canary):
    from alr.evidence import records
    from alr.evidence.sweep import same_recipe
    from alr.lab.log import digest

    import synthetic
    lines = synthetic.log("v10", 0, epochs=2)
    lines[0] = json.dumps(json.loads(lines[0]) | {"recipe": HOSTILE})
    lines[-1] = json.dumps(json.loads(lines[-1]) | {"digest": digest(lines[:-1])})
    path = synthetic.write(canary, lines, "a")
    assert records.read(path)
    assert HOSTILE in path.read_text(encoding="utf-8").replace('\\"', '"') and not same_recipe(HOSTILE, recipes.v10)
