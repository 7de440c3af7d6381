"""Laws of the machine that records: nothing half written, nothing twice, nothing by hand, nothing unchecked."""

import collections
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time

import pytest

import alr
from alr import recipes
from alr.evidence import records, sweep
from alr.evidence import suite as suites
from alr.evidence.records import record_digest
from alr.evidence.suite import borrowed
from alr.lab import Config

BASE = """
about = "a toy"
seeds = [0, 1]
[base]
data_file = "{text}"
level = "char"
epochs = 2
steps_per_epoch = 6
batch_size = 4
block_size = 16
d_model = 16
n_layers = 1
n_heads = 2
d_ff = 32
log_every = 2
threads = 1
device = "cpu"
lr = 1e-2
"""
ARMS = """
[[arms]]
name = "alr"
recipe = "replace(alr, rank=12, every=100)"
[[arms]]
name = "held"
recipe = "uniform"
ranks_from = "alr"
ranks_how = "permuted"
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    rng = random.Random(0)
    text = tmp_path / "text.txt"
    text.write_text("".join(rng.choice("abcdefgh \n") for _ in range(3000)), encoding="utf-8")
    monkeypatch.setattr(suites, "DATA", tmp_path)
    (tmp_path / "suites").mkdir()

    def make(body=ARMS, name="toy"):
        path = tmp_path / "suites" / f"{name}.toml"
        path.write_text(BASE.format(text=text.as_posix()) + body, encoding="utf-8")
        return suites.load(path), tmp_path
    return make


def forked(do) -> int:
    """A second process that does it; its number.  Exit status 1 if that fails."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")
            status = int(do() is False)
        finally:
            os._exit(status)
    return child


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_suite_runs_once_and_borrows_ranks(make):
    suite, root = make()
    assert "4 runs to make" in sweep.dry_run(suite, root)
    assert sweep.sweep(suite, data=root) == 4
    files = sorted(p.name for p in (root / "runs" / "toy").iterdir())
    assert files == ["alr.seed0.jsonl", "alr.seed1.jsonl", "held.seed0.jsonl", "held.seed1.jsonl"]
    for seed in (0, 1):
        a, b = (lines(root / "runs" / "toy" / f"{arm}.seed{seed}.jsonl")[-1] for arm in ("alr", "held"))
        assert sorted(a["ranks"].values()) == sorted(b["ranks"].values()) and a["params"] == b["params"]
    assert sweep.sweep(suite, data=root) == 0
    assert "0 runs to make" in sweep.dry_run(suite, root)


def test_a_suite_can_be_shared_out_by_arm(make):
    suite, root = make()
    with pytest.raises(RuntimeError, match="held wait for ranks"):
        sweep.sweep(suite, data=root, only=["held"])
    assert "2 runs to make" in sweep.dry_run(suite, root, only=["alr"])
    assert sweep.sweep(suite, data=root, only=["alr"]) == 2 and sweep.sweep(suite, data=root, only=["held"]) == 2
    with pytest.raises(ValueError, match="no arm 'hold'; it has alr, held"):
        sweep.sweep(suite, data=root, only=["hold"])


def test_an_interrupted_sweep_ends_in_the_same_records(make, monkeypatch):
    suite, root = make()
    real, calls = sweep.train, []

    def dies_in_the_second_run(config, **kwargs):
        calls.append(config)
        if len(calls) == 2:
            def die(*_):
                raise KeyboardInterrupt
            return real(config, callback=die, **kwargs)
        return real(config, **kwargs)

    monkeypatch.setattr(sweep, "train", dies_in_the_second_run)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(suite, data=root)
    assert [p.name for p in (root / "runs" / "toy").iterdir()] == ["alr.seed0.jsonl"]       # nothing half written
    assert sweep.sweep(suite, data=root) == 3
    again = root / "again"
    suite2, _ = make(name="toy")
    sweep.sweep(suite2, data=again)
    for path in (root / "runs" / "toy").iterdir():
        for a, b in zip(lines(path), lines(again / "runs" / "toy" / path.name), strict=True):
            for key in a.keys() - sweep.NOT_COMPARED:
                assert a[key] == b[key], (path.name, key)


def test_a_trial_is_part_of_the_record(make):
    body = '[trial]\nranks = [2, 3]\ntokens = 100\n[[arms]]\nname = "held"\nrecipe = "replace(uniform, rank=4)"\nseeds = [0]\n'
    suite, root = make(body)
    assert sweep.sweep(suite, data=root) == 1 and sweep.sweep(suite, data=root) == 0
    cuts = records.runs("toy", root / "runs").cuts
    assert len(cuts) == 2 * 6 and set(cuts["k"]) == {2, 3} and cuts["damage"].notna().all()
    assert "the same, bit for bit" in sweep.verify(suite, root)
    suite, _ = make(body.replace("tokens = 100", "tokens = 101"))
    assert len(sweep.plan(suite, root)) == 1, "another trial is another record"


@pytest.mark.parametrize("trial, words", [
    ("ranks = []\ntokens = 9", "ranks is .]; wanted a list of whole numbers"), ("ranks = [0]\ntokens = 9", "ranks is .0]"),
    ("ranks = [2]", "tokens is None; wanted a whole number"), ("ranks = [2]\ntokens = 9\nseed = 1", "seed")])
def test_a_trial_that_cannot_be_is_refused(make, trial, words):
    with pytest.raises(ValueError, match=words):
        make(f"[trial]\n{trial}\n{ARMS}")


def test_a_changed_configuration_is_run_again(make):
    suite, root = make()
    sweep.sweep(suite, data=root)
    changed, _ = make(ARMS.replace("rank=12", "rank=11"))
    assert sweep.sweep(changed, data=root) >= 2


def test_a_field_younger_than_a_record_does_not_make_it_another_run():
    text = repr(recipes.alr)
    assert ", start=None" in text and sweep.same_recipe(text.replace(", start=None", ""), recipes.alr)
    assert not sweep.same_recipe(text.replace("start=None", "start=9"), recipes.alr)
    assert not sweep.same_recipe(text.replace("FisherCut", "NoSuchCut"), recipes.alr)


def test_tuning_chooses_by_the_rule_in_the_file(make):
    suite, root = make("""
[tune]
seeds = [7]
grid = { lr = [1e-5, 1e-2] }
[[arms]]
name = "dense"
recipe = "dense"
""")
    assert "; then 2 runs of dense, once tuned" in sweep.dry_run(suite, root)
    assert sweep.sweep(suite, data=root) == 4
    assert suite.choose(root) == {"dense": {"lr": 1e-2}}                # 1e-5 learns nothing in twelve steps
    assert lines(root / "runs" / "toy" / "dense.seed0.jsonl")[0]["config"]["lr"] == 1e-2


def test_verify_repeats_a_record_and_notices_a_changed_one(make):
    suite, root = make()
    sweep.sweep(suite, data=root)
    assert "bit for bit" in sweep.verify(suite, root, seed=0)
    for path in (root / "runs" / "toy").iterdir():
        text = path.read_text(encoding="utf-8")
        end = json.loads(text.splitlines()[-1])
        path.write_text(text.replace(f'"val_loss": {end["val_loss"]}', '"val_loss": 1.155'), encoding="utf-8")
    with pytest.raises(ValueError, match="digest"):
        sweep.verify(suite, root, seed=0)


def test_verify_leaves_records_of_earlier_code_alone(make):
    suite, root = make()
    sweep.sweep(suite, data=root)
    entry = '[[earlier]]\nsuite = "toy"\narms = ["{}"]\nsince = 2026-01-01\nwhy = "a test"\n'
    (root / "archive.toml").write_text(entry.format(suite.arms[0].name), encoding="utf-8")
    assert all(sweep.verify(suite, root, seed=k).startswith(suite.arms[1].name) for k in range(3))
    (root / "archive.toml").write_text("".join(entry.format(arm.name) for arm in suite.arms), encoding="utf-8")
    with pytest.raises(RuntimeError, match="all of its records were made by code that has changed"):
        sweep.verify(suite, root, seed=0)


def test_verify_takes_recipes_by_value():
    now = repr(alr.recipes.v10)
    assert ", always=False" in now and sweep.agrees("paced", now.replace(", always=False", ""), now)
    assert not sweep.agrees("paced", now.replace("always=False", "always=True"), now)
    assert not sweep.agrees("recipe", now.replace("rank=64", "rank=32"), now)
    assert not sweep.agrees("about", "a", "b") and sweep.agrees("step", 3, 3)


@pytest.mark.parametrize("factor, says", [(1 + 1e-7, "differs first in rounding .grad_norm in line step"),
                                          (1.01, "on the same kind of machine")])
def test_verify_tells_rounding_from_a_difference(make, monkeypatch, factor, says):
    suite, root = make()
    sweep.sweep(suite, data=root)
    honest = sweep.run
    def again(*args, **kwargs):
        out = []
        for text in honest(*args, **kwargs):
            line = json.loads(text)
            out.append(json.dumps(line | {"grad_norm": line["grad_norm"] * factor} if "grad_norm" in line else line))
        return out
    monkeypatch.setattr(sweep, "run", again)
    try:
        said = sweep.verify(suite, root, seed=0)
    except RuntimeError as error:
        said = str(error)
    assert re.search(says, said)


@pytest.mark.parametrize("body, words", [
    (ARMS.replace('recipe = "uniform"', 'recipe = "unifrom"'), "arm 'held': recipe 'unifrom'"),
    (ARMS.replace("ranks_from", "rank_from"), "key 'rank_from' is not known; there are"),
    (ARMS.replace('ranks_from = "alr"', 'ranks_from = "alx"'), "takes ranks from 'alx'; arms are alr, held"),
    (ARMS.replace("permuted", "shuffled"), "it is one of same, mean, permuted, cut"),
    (ARMS + 'set = { learning_rate = 1 }', "key 'learning_rate' is not known"),
    (ARMS + 'seeds = [1, 7]', r"arm 'held': seeds \[1, 7\] are not all among the suite's"),
    (ARMS.replace('name = "held"', 'name = "alr"'), "share a name"), ("", "at least one"),
    ("[[arms]\n", "toy.toml"),
    ("[arms]\nname = 'x'\n", "arms is no list"), (ARMS.replace('"held"', '"../x"'), "becomes a file's"),
    *((ARMS.replace('"held"', name), "becomes a file's") for name in (
        '""', '"a/b"', '"/abs"', r'"a\\b"', r'"a\u0000"', '".x"', f'"{"x" * 201}"', r'"a\nb"')),
    (ARMS.replace('"held"', '"ALR"'), "share a name"), (ARMS.replace('"held"', "3"), "name is 3; wanted a text"),
    (ARMS.replace('ranks_from = "alr"', 'ranks_from = "held"'), "in a circle: held <- held"),
    (ARMS.replace("every=100)\"", "every=100)\"\nranks_from = \"held\"", 1), "in a circle: alr <- held <- alr"),
    (ARMS.replace('recipe = "replace(alr, rank=12, every=100)"', 'recipe = "dense"'), "which is dense and has none"),
    (ARMS + "grid = { lr = [1e-3] }", "the suite has no .tune."),
    (ARMS + "set = { epochs = '2' }", "arm 'held': epochs is '2'"),
    (ARMS + "set = 3", "wanted a table"), (ARMS + "tune = 1", "wanted true or false"), (ARMS + "seeds = 1", "list of whole"),
    (ARMS + "set = { out = 'x' }", "key 'out' is not known"), (ARMS + "set = { seed = 3 }", "key 'seed' is not known"),
    (ARMS + f"set = {{ lr = 1{'0' * 400} }}", "wanted a number"),
    (ARMS + "set = { lr = -1.0 }", "toy.toml: arm 'held': lr is -1.0"), ("[thin]\nevery = 'a'\n" + ARMS, "every is 'a'"),
    *((f"[tune]\n{grid}\n" + ARMS, words) for grid, words in (
        ("", "no grid"), ("grid = { lr = 1e-3 }", "a list of numbers"), ("grid = { lr = [] }", "a list of numbers"),
        ("grid = { lr = ['a'] }", "a list of numbers"), (f"grid = {{ lr = [1{'0' * 400}] }}", "a list of numbers"),
        ("grid = { lr = [nan, 1e-3] }", "a list of numbers"), ("grid = { lr = [0] }", "lr is 0; wanted a number above 0"),
        ("grid = { lr = [true] }", "a list of numbers"),
        ("grid = { lr = [1e-3, 0.001] }", "lr has 0.001 twice"), ("grid = { lr = [1.0, 1.0000001] }", "lr has 1 twice"),
        ("grid = { lr = [1], muon_lr = [1] }", "one is tuned at a time"),
        ("grid = { d_model = [16, 7] }", "7 is not divisible"), ("grid = { seed = [1, 2] }", "key 'seed' is not known"),
        ("grid = { lr = [1e-3] }\nseeds = 'x'", "list of whole numbers")))])
def test_a_typo_stops_before_the_first_run(make, body, words):
    with pytest.raises(ValueError, match=words):
        make(body)


@pytest.mark.parametrize("text, words", [
    ("seeds = 3\n[[arms]]", "seeds = 3; wanted a list of whole numbers"), ("seeds = [0.5]\n[[arms]]", "list of whole numbers"),
    ("seeds = [0, 0]\n[[arms]]", "each seed once"), ("seeds = ['a']\n[[arms]]", "list of whole numbers"),
    ("seeds = [true]\n[[arms]]", "list of whole numbers"), ("seeds = [0]\narms = 3", "arms is no list of tables"),
    ("seeds = [0]\narms = ['v10']", "arms is no list"), ("seeds = [0]\nbase = 3\n[[arms]]", r"\[base\] is 3; wanted a table"),
    ("seeds = [0]\nabout = 3\n[[arms]]\n", "about is 3; wanted a text"), ("x = " + "[" * 3000, "toy.toml"),
    ("seeds = [0]\n[[arms]]\nname = 'x'", "arm 'x': an arm needs a name and a recipe"), ("\ufeffseeds = [0]", "toy.toml")])
def test_a_broken_file_says_which_it_is_and_what_is_wrong(tmp_path, text, words):
    path = tmp_path / "toy.toml"
    path.write_text(text + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        suites.load(path)
    path.write_bytes(b"about = '\xff'")
    with pytest.raises(ValueError, match="toy.toml: not UTF-8 at byte 9"):
        suites.load(path)
    with pytest.raises(ValueError, match="is not there"):
        suites.load(tmp_path)


def test_an_arm_may_run_on_fewer_seeds(make):
    suite, root = make(ARMS.replace("[[arms]]", "[[arms]]\nseeds = [1]", 1))
    assert [job.name for job in suite.jobs(root)] == ["held.seed0", "alr.seed1", "held.seed1"]


def test_a_missing_corpus_stops_before_the_first_run(make):
    suite, root = make()
    os.remove(root / "text.txt")
    with pytest.raises((ValueError, FileNotFoundError), match="text.txt"):
        sweep.sweep(suite, data=root)
    assert not (root / "runs").exists()


def test_an_unknown_suite_names_those_there_are(make, capsys):
    make()
    assert sweep.main([str(suites.DATA / "suites" / "no.toml")]) == 1
    assert "there are toy" in capsys.readouterr().err


def test_borrowed_ranks_keep_the_size():
    end = {"ranks": {"a": 8, "b": 20, "c": 5}, "shapes": {"a": [64, 64], "b": [64, 64], "c": [256, 64]}}
    total = sum(r * sum(end["shapes"][n]) for n, r in end["ranks"].items())
    assert borrowed(end, "same", Config()) == end["ranks"]
    k = set(borrowed(end, "mean", Config()).values())
    assert len(k) == 1 and abs(k.pop() * sum(map(sum, end["shapes"].values())) - total) <= 288
    seen = {tuple(borrowed(end, "permuted", Config(seed=s)).values()) for s in range(20)}
    assert seen == {(8, 20, 5), (20, 8, 5)}


def test_one_cut_lands_on_the_borrowed_ranks(make):
    suite, root = make(ARMS.replace('recipe = "uniform"', 'recipe = "replace(uniform, rank=16, estimate=StableRank())"')
                       .replace("permuted", "cut"))
    sweep.sweep(suite, data=root)
    a, b = (lines(root / "runs" / "toy" / f"{arm}.seed0.jsonl") for arm in ("alr", "held"))
    assert a[-1]["ranks"] == b[-1]["ranks"]
    assert {line["step"] for line in b if line["kind"] == "resize"} == {6}


def test_a_setting_that_the_run_does_not_read_makes_no_other_run(make):
    suite, root = make()
    sweep.sweep(suite, data=root)
    job = suite.jobs(root)[0]
    path = job.path(root)
    run, *middle, end = path.read_text(encoding="utf-8").splitlines()
    run, end = json.loads(run), json.loads(end)

    def is_there(**config):
        changed = {k: v for k, v in (run["config"] | config).items() if v != "gone"}
        text = [json.dumps(run | {"config": changed}), *middle]
        path.write_text("\n".join([*text, json.dumps(end | {"digest": record_digest(text, end)})]), encoding="utf-8")
        return sweep.recorded(job, suite.recipe(job, root), root)
    assert is_there() and is_there(pairs_lr=0.5) and is_there(muon_lr="gone") and is_there(decay="gone")
    assert not is_there(lr=0.5) and not is_there(optimizer="sgd")


def test_a_record_that_was_changed_is_believed_nowhere(make):
    """Neither as recorded, nor for its time, its choice of a rate, or the ranks that another arm takes from it."""
    suite, root = make("[tune]\ngrid = { lr = [1e-2] }\n" + ARMS + "tune = false\n")
    sweep.sweep(suite, data=root, only=["alr"])
    tuned, (alr, held) = suite.tuning_jobs()[0], [job for job in suite.jobs(root) if job.config.seed == 0]
    for job, asked in ((tuned, [lambda: suite.choose(root), lambda: sweep.seconds(suite, held, root)]),
                       (alr, [lambda: sweep.recorded(alr, suite.recipe(alr, root), root), lambda: suite.recipe(held, root),
                              lambda: sweep.seconds(suite, held, root)])):
        text = job.path(root).read_text(encoding="utf-8")
        job.path(root).write_text(text.replace('"val_loss": ', '"val_loss": 1', 1), encoding="utf-8")
        for ask in asked:
            with pytest.raises(ValueError, match="was changed after it was written"):
                ask()
        job.path(root).write_text(text, encoding="utf-8")
        for ask in asked:
            ask()


# ------------------------------------------------------------------------------------------------ a long job

DENSE = """
[[arms]]
name = "dense"
recipe = "dense"
"""


def test_a_value_that_diverges_has_the_loss_inf(make, capsys):
    suite, root = make("[tune]\nseeds = [7]\ngrid = { lr = [1e30, 1e-2] }\n" + DENSE)
    assert sweep.sweep(suite, data=root) == 4 and suite.choose(root) == {"dense": {"lr": 1e-2}}
    first, *_, end = lines(root / "runs" / "toy" / "tune" / "dense.lr1e+30.seed7.jsonl")
    assert end["val_loss"] == float("inf") and "not finite any more" in end["diverged"] and first["config"]["lr"] == 1e30
    assert sweep.sweep(suite, data=root) == 0
    suite, root = make("[tune]\nseeds = [7]\ngrid = { lr = [1e30, 1e31] }\n" + DENSE, name="none")
    with pytest.raises(RuntimeError, match=r"2 runs recorded; these were not:\n  dense: .*every lr of \[.*\] diverged"):
        sweep.sweep(suite, data=root)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failing_arm_does_not_stop_the_others(make, monkeypatch, capsys, jobs):
    suite, root = make(DENSE + "set = { lr = 1e30 }\n" + ARMS)
    monkeypatch.setattr(sweep, "DATA", root)
    with pytest.raises(RuntimeError, match="4 runs recorded; these were not:\n  dense.seed0: the loss .*\n  dense.seed1: "):
        sweep.sweep(suite, jobs, data=root)
    assert len(list((root / "runs" / "toy").iterdir())) == 4
    monkeypatch.setattr(sweep, "sweep", lambda suite, jobs, *k: (_ for _ in ()).throw(RuntimeError("these were not")))
    assert sweep.main(["toy"]) == 1 and capsys.readouterr().err.endswith("sweep: these were not\n")


def test_a_broken_record_stops_its_own_arm_only(make):
    suite, root = make(DENSE + ARMS)
    folder = root / "runs" / "toy"
    folder.mkdir(parents=True)
    (folder / "alr.seed0.jsonl").write_text("{}\n")
    (folder / "dense.seed1.jsonl").write_bytes(b"\xff")
    assert "alr.seed0.jsonl, line 1: no 'kind'" in sweep.dry_run(suite, root)
    with pytest.raises(RuntimeError) as error:
        sweep.sweep(suite, data=root)
    said = str(error.value)
    assert "3 runs recorded" in said and "alr.seed0.jsonl, line 1: no 'kind'" in said and "dense.seed1.jsonl: not UTF-8" in said
    assert (folder / "alr.seed0.jsonl").read_text() == "{}\n" and (folder / "dense.seed1.jsonl").read_bytes() == b"\xff"


def test_a_record_of_other_settings_is_moved_aside(make, capsys):
    suite, root = make(DENSE)
    sweep.sweep(suite, data=root)
    path = root / "runs" / "toy" / "dense.seed0.jsonl"
    before = path.read_text()
    suite, root = make(DENSE + "set = { lr = 2e-2 }\n")
    sweep.sweep(suite, data=root)
    assert path.with_name("dense.seed0.jsonl.1").read_text() == before and lines(path)[0]["config"]["lr"] == 2e-2
    assert "recorded with other settings" in capsys.readouterr().err


def test_a_suite_of_the_same_name_elsewhere_replaces_nothing(make, monkeypatch, tmp_path, capsys):
    suite, root = make(DENSE)
    monkeypatch.setattr(sweep, "DATA", root)
    other = tmp_path / "elsewhere" / "toy.toml"
    other.parent.mkdir()
    other.write_text((root / "suites" / "toy.toml").read_text())
    assert sweep.main([str(other)]) == 1 and "called like the project's own suite" in capsys.readouterr().err
    assert not (root / "runs").exists()


@pytest.mark.parametrize("name", ["..toml", "...toml", ".toml", ".hidden.toml", "a\nb.toml", " .toml"])
def test_a_suites_name_is_the_name_of_a_folder(make, tmp_path, name):
    """`..toml` would record into the folder of all suites, and `...toml` into the one above."""
    make()
    path = tmp_path / name
    path.write_text((tmp_path / "suites" / "toy.toml").read_text())
    with pytest.raises(ValueError, match="the name becomes"):
        suites.load(path)


def test_a_pipe_in_the_place_of_a_record_is_not_waited_for(make):
    suite, root = make(DENSE)
    folder = root / "runs" / "toy"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "dense.seed0.jsonl")
    (folder / "dense.seed1.jsonl").symlink_to(folder / "nowhere")
    with pytest.raises(RuntimeError, match="1 runs recorded.*\n.*dense.seed0.jsonl: a pipe or a device stands where a record"):
        sweep.sweep(suite, data=root)
    assert (folder / "dense.seed0.jsonl").is_fifo() and lines(folder / "dense.seed1.jsonl")[-1]["kind"] == "end"
    with pytest.raises(ValueError, match="a pipe or a device"):
        records.runs("toy", root / "runs")


def test_records_that_change_their_names_choose_nothing(make, capsys):
    """Of the values of a grid: each is believed about the value that stands in it, not in its name."""
    suite, root = make("[tune]\ngrid = { lr = [1e-3, 1e-2] }\nseeds = [7]\n" + DENSE)
    sweep.sweep(suite, data=root)
    best = suite.choose(root)
    a, b = (root / "runs" / "toy" / "tune" / f"dense.lr{lr}.seed7.jsonl" for lr in ("0.001", "0.01"))
    text = a.read_text(), b.read_text()
    a.write_text(text[1]), b.write_text(text[0])
    assert suite.choose(root) == {} and "2 runs to make" in sweep.dry_run(suite, root)
    assert sweep.sweep(suite, data=root) == 2 and suite.choose(root) == best
    assert a.with_name(a.name + ".1").read_text() == text[1]       # moved aside, not lost


@pytest.mark.parametrize("size", [100, 2000])
def test_a_full_disk_stops_no_other_run_and_leaves_no_half_record(make, size):
    suite, root = make(DENSE)

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            sweep.sweep(suite, data=root)
        except RuntimeError as error:
            return str(error).count("File too large") == 2 and "0 runs recorded" in str(error)
        return False
    assert os.waitpid(forked(full), 0)[1] == 0
    assert list((root / "runs" / "toy").iterdir()) == [] and sweep.sweep(suite, data=root) == 2


def test_what_cannot_start_stops_before_the_first_run(make):
    for body, words in ((ARMS + "set = { init_rank = 99 }", "arm 'held': init_rank: rank 99 asked of blocks.0.attn.q"),
                        (ARMS.replace('name = "alr"', 'name = "alr"\nseeds = [1]'), "from 'alr', which has no run at"),
                        (ARMS + "set = { block_size = 99999 }", "arm 'held': block_size 99999 is longer than the text"),
                        (ARMS + "set = { d_ff = 9999999999999 }", "arm 'held': n_layers, d_model, d_ff: the dense model has")):
        suite, root = make(body)
        with pytest.raises(ValueError, match=words):
            sweep.sweep(suite, data=root)
    assert not (root / "runs").exists()


def test_what_a_killed_sweep_left_is_cleaned_and_what_lives_is_not(make):
    suite, root = make(DENSE)
    folder = root / "runs" / "toy"
    for name in (".running-dead", ".running-alive", ".running-mine"):
        (folder / name).mkdir(parents=True)
        (folder / name / "log.jsonl").write_text("{")
    (folder / ".running-mine" / "notes.txt").write_text("mine")
    with sweep.held(folder / ".running-alive"):
        sweep.sweep(suite, data=root, limit=0)
    assert sorted(p.name for p in folder.iterdir()) == [".running-alive", ".running-mine"]


def test_workers_die_with_their_parent(tmp_path):
    """The parent is killed; its worker, idle or at work, ends by itself."""
    code = """
import multiprocessing, os, sys, time
from alr.evidence.sweep import die_with_parent
def work(path):
    die_with_parent()
    open(path, "w").write(str(os.getpid()))
    time.sleep(600)
if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=work, args=(sys.argv[1],)).start()
    while not os.path.exists(sys.argv[1]) or not os.path.getsize(sys.argv[1]):
        time.sleep(0.05)
    os.kill(os.getpid(), 9)
"""
    script, pid = tmp_path / "x.py", tmp_path / "pid"
    script.write_text(code)
    root = os.path.dirname(os.path.dirname(alr.__file__))
    subprocess.run([sys.executable, str(script), str(pid)], env={**os.environ, "PYTHONPATH": root}, timeout=120)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(int(pid.read_text()), 0)
        except ProcessLookupError:
            return
        if open(f"/proc/{pid.read_text()}/stat").read().split()[2] == "Z":
            return                                      # dead, and nobody has asked for its exit status
        time.sleep(0.05)
    pytest.fail("the worker outlived its parent")


def test_numbers_of_the_command_line_are_checked(make, capsys):
    for flags in ("--jobs 0", "--jobs -1", "--jobs x", "--limit -1"):
        with pytest.raises(SystemExit) as error:
            sweep.main(["toy", *flags.split()])
        assert error.value.code == 2 and flags.split()[0] in capsys.readouterr().err
    suite, root = make()
    assert f"up to --jobs {sweep.sensible_jobs(suite)} make sense here" in sweep.dry_run(suite, root)


def test_ctrl_c_is_one_line(make, monkeypatch, capsys):
    suite, root = make(DENSE)
    monkeypatch.setattr(sweep, "DATA", root)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(sweep, "train", interrupted)
    assert sweep.main(["toy"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "sweep: interrupted; what is recorded stays, the same command goes on."
    assert list((root / "runs" / "toy").iterdir()) == []


# ------------------------------------------------------------------------------------------------ two sweeps

def test_two_sweeps_of_one_suite_exclude_each_other_and_a_kill_frees_it(make, monkeypatch, tmp_path, capsys):
    """The second says in one line which process records, also with --only of another arm; after a SIGKILL it goes on."""
    suite, root = make(DENSE + ARMS)
    monkeypatch.setattr(sweep, "DATA", root)
    real, begun = sweep.train, tmp_path / "begun"

    def waits(*args, **kwargs):
        begun.touch()
        time.sleep(600)
    monkeypatch.setattr(sweep, "train", waits)
    child = forked(lambda: sweep.sweep(suite, data=root, only=["dense"]))
    try:
        deadline = time.monotonic() + 60
        while not begun.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        for flags in ([], ["--only", "alr"], ["--jobs", "2"]):
            assert sweep.main(["toy", *flags]) == 1
            said = capsys.readouterr().err.splitlines()[-1]
            assert f"runs/toy is being recorded by process {child} on " in said and "wait for its end, or stop it" in said
        assert "6 runs to make" in sweep.dry_run(suite, root)       # who only asks is not in the way
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    folder = root / "runs" / "toy"
    assert sorted(p.name[:9] for p in folder.iterdir()) == [".running-", ".sweep.lo"]
    monkeypatch.setattr(sweep, "train", real)
    assert sweep.sweep(suite, data=root) == 6 and all(p.suffix == ".jsonl" for p in folder.iterdir())


def test_sweeps_that_start_at_once_make_every_run_once(make, tmp_path):
    suite, root = make(DENSE)
    made = tmp_path / "made"

    def record():
        try:
            count = sweep.sweep(suite, data=root)
        except RuntimeError as error:
            assert "is being recorded by" in str(error)
            count = 0
        with open(made, "a") as file:
            file.write(f"{count}\n")
    children = [forked(record) for _ in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert sum(map(int, made.read_text().split())) == 2 and sorted(map(int, made.read_text().split())) == [0, 0, 2]
    assert sorted(os.listdir(root / "runs" / "toy")) == ["dense.seed0.jsonl", "dense.seed1.jsonl"]


def test_a_sweep_that_makes_nothing_leaves_nothing(make):
    suite, root = make(DENSE)
    assert sweep.sweep(suite, data=root, limit=0) == 0 and list((root / "runs").rglob("*.*")) == []


def test_a_dry_run_counts_what_follows_arm_by_arm_and_reads_each_record_a_few_times(make, monkeypatch):
    suite, root = make("""
[tune]
seeds = [7]
grid = { lr = [1e-3, 1e-2] }
[[arms]]
name = "dense"
recipe = "dense"
[[arms]]
name = "alone"
recipe = "dense"
seeds = [1]
[[arms]]
name = "held"
recipe = "uniform"
tune = false
""")
    assert "; then 2 runs of dense, 1 run of alone, once tuned" in sweep.dry_run(suite, root)
    assert sweep.sweep(suite, data=root) == 9
    for path in (root / "runs" / "toy").glob("held.*"):             # two runs to make again
        path.unlink()
    read, whole = collections.Counter(), sweep.run_and_end
    def counted(path):
        read[path] += 1
        return whole(path)
    for place in (sweep, suites):
        monkeypatch.setattr(place, "run_and_end", counted)
    assert "2 runs to make" in sweep.dry_run(suite, root)
    assert len(read) == 7 and max(read.values()) <= 3               # chosen, recorded, measured: each asks once
