"""Laws of `alr.lab`: stopping is not losing, validation is whole and so is the log, bad input writes nothing."""

import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F

import alr
from alr import recipes
from alr.evidence.records import check
from alr.lab import Config, Run, checkpoint, command, device, evaluate, load, loop, train
from alr.lab.command import main
from alr.lab.data import corpus
from alr.lab.log import provenance
from alr.lab.model import GPT, GPTConfig, count_parameters
from alr.lab.processes import Workers

from bits import same

# one rank less in every step
QUICK = 'replace({0}, every=50, cap="min", control=each({0}.control, safety=0.4, ema=0.0, max_step=1){1})'
SHRINK = "replace(alr, every=50, control=Budget(share=0.05, begin=0.1, end=1.2, min_rank=1){0})"
TIMES = {"seconds", "tokens_per_s", "time_sec", "peak_memory_mb", "digest", "started", "resumed"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = random.Random(0)
    words = "the cat sat on a mat and ate rats while bats flew at dusk".split()
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(rng.choice(words) for _ in range(900)), encoding="utf-8")
    return path


@pytest.fixture
def small(text):
    return Config(recipe="v10", data_file=str(text), level="char", epochs=2, steps_per_epoch=4, batch_size=4,
                  block_size=16, d_model=16, n_layers=1, n_heads=2, d_ff=32, init_rank=12, min_rank=2, lr=1e-2,
                  log_every=3, dropout=0.1, device="cpu", threads=1)


def lines(path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def timeless(run: Run) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in run.log]


def state(run: Run) -> dict:
    adapter = {k: v for k, v in run.adapter.state_dict().items() if k != "seconds"}
    return {"model": run.model.state_dict(), "optimizers": [o.state_dict() for o in run.optimizers], "adapter": adapter,
            "rng": torch.get_rng_state(), "log": timeless(run)}


def stop_at(step):
    def callback(run):
        if run.step == step:
            raise KeyboardInterrupt
    return callback


# ------------------------------------------------------------------------------------------------ which code

@pytest.mark.parametrize("change, dirty",
                         [("", False), ("alr/factor.py", True), ("alr/lab/new.py", True), ("README.md", False)])
def test_a_log_says_whether_its_code_was_changed(change, dirty, tmp_path, monkeypatch):
    for path in ("alr/factor.py", "alr/lab/log.py", "README.md"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("as committed")
    def git(*words):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "all")
    if change:
        (tmp_path / change).write_text("changed")
    monkeypatch.setattr(alr.lab.log, "PACKAGE", tmp_path / "alr")
    found = provenance()
    assert found["dirty"] is dirty and len(found["commit"]) == 40
    git("rm", "-q", "--cached", "alr/factor.py")                    # staged alone
    assert provenance()["dirty"] is True


# ------------------------------------------------------------------------------------------------ validation

def test_whole_split_loss_equals_a_slow_reference():
    torch.manual_seed(0)
    model = GPT(GPTConfig(11, block_size=5, n_layers=1, n_heads=2, d_model=8, d_ff=8, dropout=0.5))
    tokens = torch.randint(11, (53,))                                           # (N,)
    losses = []
    with torch.no_grad():
        for i in range(1, 53):                                                  # every target once, from its own block
            start = (i - 1) // 5 * 5
            losses.append(F.cross_entropy(model.eval()(tokens[None, start:i])[0, -1], tokens[i]).item())
    model.train()
    before = torch.get_rng_state()
    for batch in (1, 3, 100):
        assert evaluate(model, tokens, 5, batch) == pytest.approx(sum(losses) / 52, rel=1e-6)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    model(tokens[None, :5]).sum().backward()            # nothing of inference mode is left


def test_how_much_is_validated_changes_no_training_step(small):
    small = replace(small, log_every=1)
    whole, part = train(small, quiet=True), train(replace(small, eval_tokens=20), quiet=True)
    assert same(whole.model.state_dict(), part.model.state_dict())
    assert [x for x in timeless(whole) if x["kind"] == "step"] == [x for x in timeless(part) if x["kind"] == "step"]
    end = whole.log[-1]
    assert part.log[-2]["val_loss"] != end["val_loss"] == part.log[-1]["val_loss"] == whole.log[-2]["val_loss"]
    text = whole.corpus
    assert end["val_loss"] == evaluate(whole.model, text.valid, 16, 4)
    assert end["test_loss"] == evaluate(whole.model, text.test, 16, 4)
    assert end["val_bpb"] == text.bits_per_byte(end["val_loss"])
    assert part.log[-2]["val_loss"] == evaluate(whole.model, text.valid[:21], 16, 4)

    short = train(replace(small, end_tokens=30), quiet=True)
    assert same(whole.model.state_dict(), short.model.state_dict())
    assert short.log[-1]["val_loss"] == evaluate(whole.model, text.valid[:31], 16, 4) != end["val_loss"]
    assert short.log[-1]["test_loss"] == evaluate(whole.model, text.test[:31], 16, 4)
    both = train(replace(small, eval_tokens=30, end_tokens=30), quiet=True)
    assert both.log[-1]["val_loss"] == both.log[-2]["val_loss"] == short.log[-1]["val_loss"]


# ------------------------------------------------------------------------------------------------ the log

def test_a_log_says_what_was_run_and_every_change(small, tmp_path):
    path = tmp_path / "deep" / "log.jsonl"

    def is_on_disk(run):
        assert check(lines(path)) == run.log
    run = train(replace(small, epochs=3, log_file=str(path)), callback=is_on_disk, quiet=True)
    assert check(lines(path), complete=True) == run.log
    first, end = run.log[0], run.log[-1]
    assert recipes.parse(first["recipe"]) == recipes.v10 and recipes.parse(first["paced"]) == run.recipe
    assert (run.recipe.every, run.recipe.rank, run.recipe.control.min_rank) == (4, 12, 2)
    assert first["config"]["d_model"] == 16 and not {"log_file", "out", "data_dir"} & first["config"].keys()
    assert first["corpus"]["fingerprint"] == run.corpus.fingerprint and first["threads"] == 1
    assert {"commit", "dirty", "source", "alr", "torch", "python", "device", "processor", "started"} <= first.keys()
    model = alr.factorize_(GPT(GPTConfig(len(run.corpus.vocab), 16, 1, 2, 16, 32)), 12, lambda name: name != "head")
    ranks = {name: layer.rank for name, layer in alr.low_rank_layers(model).items()}
    assert first["params"] == count_parameters(model)
    moved = 0
    for line in run.log:
        if line["kind"] == "resize":
            assert ranks[line["layer"]] == line["old"] != line["new"]
            ranks[line["layer"]], moved = line["new"], moved + 1
        if line["kind"] == "epoch":
            r = list(ranks.values())
            assert line["ranks"] == r and line["step"] == 4 * line["epoch"] and line["time_sec"] > 0
            assert (line["rank_min"], line["rank_max"], line["rank_avg"]) == (min(r), max(r), sum(r) / len(r))
            again = alr.factorize_(GPT(GPTConfig(len(run.corpus.vocab), 16, 1, 2, 16, 32)), ranks)
            assert line["params_millions"] == count_parameters(again)["total"] / 1e6
    assert moved and [x["step"] for x in run.log if x["kind"] == "step"] == [3, 6, 9, 12]
    assert end["ranks"] == ranks == run.adapter.ranks and end["params"] == count_parameters(run.model)
    assert end["shapes"]["blocks.0.mlp.up"] == [32, 16] and end["seconds"]["adaptation"] > 0
    assert end["val_ppl"] == pytest.approx(2.718281828459045 ** end["val_loss"])


def test_the_logged_command_repeats_the_run(small, tmp_path):
    import tyro
    value = replace(recipes.alr, rank=7)
    for config, recipe in ((small, None), (replace(small, recipe="mine", init_rank=None, causal=False), value)):
        run = train(config, recipe, quiet=True)
        after = state(run)
        words = shlex.split(run.log[0]["command"])
        assert words[:3] == ["python", "-m", "alr.train"]
        again = tyro.cli(Config, args=words[3:])
        assert recipe is not None or same(after, state(train(again, quiet=True)))
        assert asdict(again) == asdict(replace(config, recipe=repr(value) if recipe else "v10"))
    assert run.log[0]["name"] == "mine" and run.log[0]["recipe"] == repr(value)
    assert timeless(train(again, quiet=True))[1:] == timeless(run)[1:]


def test_the_seed_log_has_the_originals_nine_keys(small, tmp_path):
    """What a reader of the original's logs does with them: every line is an epoch with these keys, and no other."""
    path, out = tmp_path / "seed.jsonl", str(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        train(replace(small, epochs=3, seed_log=str(path), out=out), callback=stop_at(9), quiet=True)
    run = train(replace(small, epochs=3, seed_log=str(path), out=out, resume=True), quiet=True)
    epochs = [json.loads(line) for line in lines(path)]
    keys = "epoch train_loss val_loss rank_min rank_max rank_avg ranks params_millions time_sec"
    assert [" ".join(x) for x in epochs] == [keys] * 3
    assert epochs == [{k: x[k] for k in keys.split()} for x in run.log if x["kind"] == "epoch"]
    folder = os.environ.get("ALR_DATA")
    published = os.path.join(folder or "", "seed-logs", "v10_log.jsonl")
    if folder and os.path.exists(published):
        with open(published, encoding="utf-8") as file:
            assert " ".join(json.loads(file.readline())) == keys


def test_a_dense_log_has_no_ranks(small):
    run = train(replace(small, recipe="dense", init_rank=None, min_rank=None), quiet=True)
    epoch = next(x for x in run.log if x["kind"] == "epoch")
    assert (epoch["ranks"], epoch["rank_min"], epoch["rank_avg"]) == ([], None, None)
    assert run.log[-1]["ranks"] == {} and run.log[-1]["seconds"]["adaptation"] == 0


def test_an_older_log_is_moved_aside(small, tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    for seed in range(3):
        train(replace(small, epochs=1, seed=seed, log_file=str(path)), quiet=True)
    seeds = [json.loads(open(tmp_path / name, encoding="utf-8").readline())["seed"]
             for name in ("log.1.jsonl", "log.2.jsonl", "log.jsonl")]
    assert seeds == [0, 1, 2] and "held another run" in capsys.readouterr().err
    assert len(os.listdir(tmp_path)) == 3


def test_the_seed_decides_everything(small):
    a, b, c = (state(train(replace(small, seed=s), quiet=True)) for s in (5, 5, 6))
    assert same(a, b) and not same(a["model"], c["model"])


# ------------------------------------------------------------------------------------------------ stopping and going on

@pytest.mark.parametrize("changes", [
    dict(recipe=QUICK.format("v10", "")),
    dict(recipe=QUICK.format("v10", ", state=Stale()")),
    dict(recipe=QUICK.format("repaired", ""), schedule="cosine", warmup_steps=3, grad_clip=0.5),
    dict(recipe=QUICK.format("repaired", ""), optimizer="muon", tied=True),
    dict(recipe=QUICK.format("repaired", ""), model="mlp", optimizer="sgd"),
    dict(recipe=SHRINK.format(""), optimizer="pairs"),
    dict(recipe=SHRINK.format(", estimate=OutputSpectrum(), resize=GrowAlongGradient()"), optimizer="pairs"),
    dict(recipe="dense", init_rank=None, min_rank=None)])
@pytest.mark.parametrize("step", [4, 6])
def test_resume_equals_not_stopping(small, tmp_path, changes, step):
    small = replace(small, epochs=3, **changes)
    never = state(train(small, quiet=True))
    stopped = replace(small, out=str(tmp_path / "out"))
    with pytest.raises(KeyboardInterrupt):
        train(stopped, callback=stop_at(step), quiet=True)
    last = check(lines(tmp_path / "out" / "log.jsonl"))[-1]
    assert last["kind"] != "end" and last["step"] <= step
    torch.manual_seed(999)
    again = train(replace(stopped, resume=True), quiet=True)
    assert same(never, state(again))
    steps = [line["step"] for line in again.log if line["kind"] == "resize"]
    assert again.recipe.rank is None or min(steps) <= step < max(steps)
    assert check(lines(tmp_path / "out" / "log.jsonl"), complete=True) == again.log
    assert [r["step"] for r in again.log[-1]["resumed"]] == [step]
    assert sorted(os.listdir(tmp_path / "out")) == ["log.jsonl", "model-00000012.safetensors", "state.pt"]


def test_a_run_cut_off_while_validating_goes_on(small, tmp_path, monkeypatch):
    never, stopped = state(train(small, quiet=True)), replace(small, out=str(tmp_path / "out"))
    calls, real = [], loop._nats

    def interrupted(*args):
        calls.append(args)
        if len(calls) in (1, 3, 5):
            os.kill(os.getpid(), signal.SIGINT)         # in the first epoch, in the second, and in the final test
        return real(*args)
    monkeypatch.setattr(loop, "_nats", interrupted)
    for resume in (False, True, True):
        with pytest.raises(KeyboardInterrupt):
            train(replace(stopped, resume=resume), quiet=True)
    assert same(never, state(train(replace(stopped, resume=True), quiet=True)))


def test_ctrl_c_waits_for_the_step_and_leaves_everything_whole(small, tmp_path):
    never, path = state(train(small, quiet=True)), tmp_path / "log.jsonl"
    stopped = replace(small, out=str(tmp_path / "out"), log_file=str(path))
    handler = signal.getsignal(signal.SIGINT)

    def interrupt(run):
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, callback=interrupt, quiet=True)
    assert signal.getsignal(signal.SIGINT) is handler
    assert [x["kind"] for x in check(lines(path))] == ["run", "step"]
    path.write_text('{"kind": "run"}\nhalf a li', encoding="utf-8")             # whatever became of the file
    again = train(replace(stopped, resume=True), quiet=True)
    assert same(never, state(again))
    assert check(lines(tmp_path / "log.jsonl"), complete=True) == again.log


def test_a_finished_run_is_not_run_again_and_can_be_loaded(small, tmp_path):
    done = replace(small, out=str(tmp_path / "out"))
    run = train(done, quiet=True)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert train(replace(done, resume=True), quiet=True).log == run.log
    again = load(tmp_path / "out", device="cpu")
    prompt = run.corpus.train[None, :4]
    assert torch.equal(again.model.generate(prompt, 5, 0), run.model.generate(prompt, 5, 0)) and again.step == 8
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before


def test_a_checkpoint_is_the_old_one_or_the_new_one(small, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        train(replace(small, out=str(out)), callback=stop_at(3), quiet=True)
    run, real = load(out, device="cpu"), os.replace
    for name in ("model-00000099", "state.pt"):         # the power fails before each of the two renames
        def fails(a, b):
            if name in str(b):
                raise OSError("power")
            real(a, b)
        monkeypatch.setattr(checkpoint.os, "replace", fails)
        with pytest.raises(OSError, match="power"):
            checkpoint.save(out, GPT(GPTConfig(3, 2, 1, 1, 2, 2)), {"step": 99}, 99)
        again = load(out, device="cpu")
        assert again.step == 3 and same(again.model.state_dict(), run.model.state_dict())
    monkeypatch.undo()
    again = state(train(replace(small, out=str(out), resume=True), quiet=True))
    assert same(again, state(train(small, quiet=True)))


@pytest.mark.parametrize("name", recipes.ALL)
def test_every_recipe_trains_saves_and_resumes(small, tmp_path, name):
    small = replace(small, recipe=name, init_rank=None, min_rank=None, dropout=0.0, out=str(tmp_path), epochs=5,
                    steps_per_epoch=2, d_ff=16)
    never = state(train(replace(small, out=None), quiet=True))
    with pytest.raises(KeyboardInterrupt):
        train(small, callback=stop_at(7), quiet=True)
    assert same(never, state(train(replace(small, resume=True), quiet=True)))


# ------------------------------------------------------------------------------------------------ bad input

@pytest.mark.parametrize("flags, words", [
    ("--recipe v99", "recipe 'v99'"), ("--recipe v3 --init-rank 99", "rank 99"),
    ("--data-file nope", "--data-file: corpus: unknown name 'nope'"),
    ("--corpus wikitext-2", "--corpus wikitext-2 are both given; leave one out"),
    ("--data-file missing.txt", "--data-file: corpus: no file 'missing.txt'"),
    ("--device tpu", "--device 'tpu' is not known; here there are"), ("--device cuda:77", "is not here"),
    ("--block-size 5000", "--block-size 5000 is longer than the text"), ("--recipe dense", "leave out --init-rank"),
    ("--n-heads 3", "--d-model 16 is not divisible by --n-heads 3"), ("--recipe uniform", "leave out --min-rank"),
    ("--resume", "no checkpoint in"), ("--data-file empty.txt", "empty"), ("--data-file binary.txt", "UTF-8"),
    ("--lr 1e30", "not finite any more by step"), ("--init-rank 17", "rank 17"), ("--init-rank 1.5", "--init-rank is 1.5"),
    ("--lr -1", "--lr is -1.0; wanted a number above 0"), ("--init-rank 0", "--init-rank is 0"), ("--bogus", "bogus"),
    ("--rest-lr nan", "--rest-lr is nan"), ("--model mlp --window 0", "--window is 0"), ("--dropout 1", "--dropout is 1.0"),
    ("--seed 18446744073709551616", "--seed is 18446744073709551616"), ("--keep 0", "--keep is 0"),
    ("--threads 100000", "--threads is 100000; on this machine write at most"), ("--vocab-size 1", "--vocab-size is 1"),
    ("--save-every 0m", "--save-every is '0m'; wanted steps (500) or minutes (10m)"), ("--save-every soon", "--save-every"),
    ("--min-rank 1000000", "--min-rank is 1000000, and no layer has a rank above 16"),
    ("--d-ff 99999999999999999999", "--n-layers, --d-model, --d-ff: the dense model has 3.2e+21 parameters"),
    ("--n-layers 99999999999999999999", "Write smaller sizes"), ("--model mlp --d-embed 99999999999999", "--d-embed"),
    ("--batch-size 99999999999999999999", "--batch-size 99999999999999999999, --block-size 16: the logits of one step need"),
    ("--data-file=", "--data-file is '', which names nothing"), ("--data-dir=", "--data-dir is ''"),
    ("--log-file=", "--log-file is ''"), ("--out=", "--out is ''"), ("--seed-log=", "--seed-log is ''"),
    ("--recipe=", "--recipe is ''"), ("--log-file binary.txt", "--log-file binary.txt is there and is no log of a run")])
def test_bad_input_is_one_message_an_exit_code_and_no_file(small, tmp_path, monkeypatch, capfd, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 20)
    argv = shlex.split(small.command())[3:] + ["--log-file", "log.jsonl", "--out", "out", *flags.split()]
    try:
        status = main(argv)
    except SystemExit as stop:                          # what tyro itself refuses
        status = stop.code
    assert status not in (0, None)
    torch.set_num_threads(1)
    said = " ".join(capfd.readouterr().err.split("\r")[-1].replace("│", " ").split())
    assert words in said and "Traceback" not in said
    files = {"empty.txt", "binary.txt"}
    if "1e30" in flags:                                 # a run that broke: its lines are whole, it has no end
        kinds = [x["kind"] for x in check(lines(tmp_path / "log.jsonl"))]
        files |= {"log.jsonl"}
        assert "end" not in kinds
    assert set(os.listdir()) == files


@pytest.mark.parametrize("bad, words", [
    (dict(batch_size=0), "batch_size is 0"), (dict(schedule="linear"), "wanted one of constant, cosine"),
    (dict(epochs="2"), "epochs is '2'; wanted a whole number"), (dict(lr=True), "lr is True; wanted a number"),
    (dict(d_model=16.5), "d_model is 16.5; wanted a whole number"), (dict(level="line"), "level is 'line'; wanted one of word"),
    (dict(data_file=""), "data_file is '', which names nothing"),
    (dict(eval_tokens=0), "eval_tokens is 0"), (dict(end_tokens=0), "end_tokens is 0"),
    (dict(grad_clip=0.0), "grad_clip is 0.0"),
    (dict(weight_decay=-1.0), "weight_decay is -1.0; wanted 0 or more")])
def test_a_config_refuses_what_makes_no_sense(bad, words):
    with pytest.raises(ValueError, match=words):
        Config(**bad)


def test_what_was_set_and_is_not_read_is_said(capsys, monkeypatch):
    assert Config().unread() == Config(optimizer="muon", muon_lr=0.1).unread() == Config(out="x", keep=2).unread() == []
    monkeypatch.setattr("alr.lab.command.train", lambda config: Run(*[None] * 9))
    monkeypatch.setattr("alr.lab.run.Run.log", [])
    assert main("--pairs-lr 7 --momentum 3 --window 99 --keep 2".split()) == 0
    assert capsys.readouterr().err.splitlines() == [
        "train: note: --keep is not read by a run without --out.",
        "train: note: --momentum is not read by --optimizer adamw.",
        "train: note: --pairs-lr is not read by --optimizer adamw.",
        "train: note: --window is not read by --model gpt."]
    assert Config(model="mlp", dropout=0.5).unread() == ["{dropout} is not read by {model} mlp."]


@pytest.mark.parametrize("step, out, words", [(1, None, "nothing was kept, --out FOLDER"), (1, "out", "go on with --resume"),
                                              (None, "out", "nothing was begun")])
def test_the_advice_to_resume_is_given_where_there_is_something(small, tmp_path, monkeypatch, capsys, step, out, words):
    import tyro

    from alr.lab import command
    monkeypatch.chdir(tmp_path)
    if step is None:                                    # Ctrl-C while the flags are read
        monkeypatch.setattr(tyro, "cli", lambda *a, **k: os.kill(os.getpid(), signal.SIGINT))
    monkeypatch.setattr(command, "train", lambda config: train(config, callback=stop_at(step), quiet=True))
    argv = shlex.split(small.command())[3:] + (["--out", out] if out else [])
    assert main(argv) == 130
    err = capsys.readouterr().err
    assert words in err and err.startswith("train: interrupted; ") and err.count("\n") == 1


@pytest.mark.parametrize("words", ["-m mine.go", "-um mine.go", "-mmine.go", "-m mine.go -m alr.train", "go.py -m alr.train"])
def test_ctrl_c_of_a_program_that_imports_alr_stays_its_own(words, tmp_path):
    """`python -m mine.go` imports mine, which imports alr, before go begins; nothing in it calls `listen`."""
    (tmp_path / "torch.py").write_text("raise ImportError")         # alr is imported as far as here
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("try:\n    import alr\nexcept ImportError:\n    pass\n")
    for place in (tmp_path, tmp_path / "mine"):
        (place / "go.py").write_text("import mine, signal as s\nprint(s.getsignal(s.SIGINT) is s.default_int_handler)")
    env = environment()
    env["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{env['PYTHONPATH']}"
    done = subprocess.run([sys.executable, *words.split()], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("True\n", "")


@pytest.mark.parametrize("words", ["-m alr.train", "-um alr.train --epochs 1", "-malr.train"])
def test_ctrl_c_during_start_up_is_quiet(words, tmp_path):
    """While `python -m alr.train` loads its modules there is nothing to lose and nothing to show."""
    (tmp_path / "torch.py").write_text("import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)")
    env = environment()
    env["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{env['PYTHONPATH']}"
    done = subprocess.run([sys.executable, *words.split()], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_another_run_is_neither_overwritten_nor_resumed(small, tmp_path):
    mine = replace(small, out=str(tmp_path / "out"))
    train(mine, quiet=True)
    with pytest.raises(ValueError, match="holds a checkpoint already; add resume to go on"):
        train(mine, quiet=True)
    with pytest.raises(ValueError, match="resume: lr is 0.5, but 0.01 in the checkpoint"):
        train(replace(mine, lr=0.5, resume=True), quiet=True)
    with pytest.raises(ValueError, match="resume: the recipe is"):
        train(replace(mine, resume=True), recipe=recipes.alr, quiet=True)
    (tmp_path / "out" / "state.pt").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="state.pt is no checkpoint of this program"):
        train(replace(mine, resume=True), quiet=True)


# ------------------------------------------------------------------------------------------------ settings

def test_the_seeds_command_is_understood_verbatim(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("alr.lab.command.train", lambda config: seen.append(config) or Run(*[None] * 9))
    monkeypatch.setattr("alr.lab.run.Run.log", [])
    command = ("python -m alr.train --data-file wiki.train.tokens --log-file v10_log.jsonl --epochs 30 --init-rank 64 "
               "--min-rank 8 --d-model 512")
    assert main(command.split()[3:]) == 0
    assert seen == [Config(data_file="wiki.train.tokens", log_file="v10_log.jsonl", epochs=30, init_rank=64, min_rank=8,
                           d_model=512)]
    rest = "--n-layers 6 --n-heads 8 --d-ff 2048 --block-size 256 --batch-size 32 --steps-per-epoch 200 --lr 3e-4"
    assert main(command.split()[3:] + rest.split()) == 0
    assert seen[1] == seen[0]                           # the seed's own values are the defaults


def test_the_seeds_command_runs_on_its_data(monkeypatch, tmp_path, capsys):
    folder = os.environ.get("ALR_DATA")
    if not folder or not os.path.exists(os.path.join(folder, "wikitext-2", "wiki.train.tokens")):
        pytest.skip("WikiText-2 is not here: set ALR_DATA to a folder that holds wikitext-2/")
    monkeypatch.setenv("ALR_DATA", os.path.abspath(folder))
    monkeypatch.chdir(tmp_path)
    text = corpus("wikitext-2")
    flags = "--data-file wiki.train.tokens --log-file v10_log.jsonl --epochs 1 --init-rank 6 --min-rank 2 --d-model 8"
    less = "--n-layers 1 --n-heads 2 --d-ff 8 --block-size 8 --batch-size 2 --steps-per-epoch 3 --eval-tokens 64"
    monkeypatch.setattr(loop.Loop, "final", lambda self: (1.0, None))           # 455,000 tokens: too slow for a test
    assert main(f"{flags} {less}".split()) == 0
    first = json.loads(lines(tmp_path / "v10_log.jsonl")[0])
    assert first["name"] == "v10" and first["corpus"]["fingerprint"] == text.fingerprint
    assert first["corpus"]["tokens"]["train"] == 2_051_910


def test_recipe_list_prints_the_table(capsys):
    assert main(["--recipe", "list"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[1:]] == list(recipes.ALL)
    v10 = next(line for line in printed if line.startswith("v10 "))
    assert "StableRankPower" in v10 and "Bidirectional" in v10 and "SvdFull" in v10 and "Reset" in v10


def test_learning_rates():
    constant = Config(epochs=1, steps_per_epoch=10, warmup_steps=4)
    assert [constant.rate(i) for i in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = replace(constant, schedule="cosine")
    rates = [cosine.rate(i) for i in range(11)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[7] == pytest.approx(0.5) and rates[10] == 0.0
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_the_schedule_reaches_every_optimizer(small):
    seen = []
    config = replace(small, optimizer="muon", schedule="cosine", warmup_steps=2, epochs=1)

    def note(run):
        seen.append([group["lr"] for optimizer in run.optimizers for group in optimizer.param_groups])
    train(config, callback=note, quiet=True)
    assert seen == [[0.02 * config.rate(i), 0.01 * config.rate(i)] for i in range(4)]


@pytest.mark.parametrize("recipe, optimizer, blocks", [
    ("repaired", "adamw", 0.01), ("repaired", "sgd", 0.01), ("repaired", "muon", 0.02), ("repaired", "pairs", 0.03),
    ("dense", "adamw", 0.01), ("dense", "muon", 0.02), ("dense", "muon-float32", 0.02)])
def test_embeddings_head_and_norms_have_a_rate_of_their_own(small, recipe, optimizer, blocks):
    ranks = {} if recipe == "repaired" else dict(init_rank=None, min_rank=None)
    config = replace(small, recipe=recipe, optimizer=optimizer, rest_lr=0.5, schedule="cosine", epochs=1, **ranks)
    rates = {}

    def note(run):
        of = {id(p): group["lr"] for o in run.optimizers for group in o.param_groups for p in group["params"]}
        rates.update({name: of.pop(id(p)) / config.rate(run.step - 1) for name, p in run.model.named_parameters()})
        assert not of                                               # every parameter once, and no other
    train(config, callback=note, quiet=True)
    for name, rate in rates.items():
        assert rate == pytest.approx(blocks if "attn" in name or "mlp" in name else 0.5), name


def test_clipping_bounds_the_gradient_and_logs_it_unclipped(small):
    norms = []

    def measure(run):
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in run.model.parameters()]).item())
    config = replace(small, recipe="dense", init_rank=None, min_rank=None, grad_clip=0.01, log_every=1)
    run = train(config, callback=measure, quiet=True)
    assert max(norms) <= 0.01 * (1 + 1e-4) and len(norms) == 8
    assert min(line["grad_norm"] for line in run.log if line["kind"] == "step") > 0.01


@pytest.mark.parametrize("changes", [
    dict(optimizer="adam"), dict(optimizer="sgd"), dict(optimizer="muon"), dict(model="mlp"), dict(decay="product"),
    dict(optimizer="muon", decay="product"), dict(recipe="alr", optimizer="pairs", decay="product"),
    dict(precision="bfloat16"), dict(causal=False), dict(tied=True), dict(recipe="alr", optimizer="pairs"),
    dict(rest_lr=0.02)])
def test_every_setting_learns(small, changes):
    run = train(replace(small, **dict(recipe="repaired", epochs=4, steps_per_epoch=10) | changes), quiet=True)
    first, last = (next(x["val_loss"] for x in log if x["kind"] == "epoch") for log in (run.log, run.log[::-1]))
    assert last < first - 0.05


def test_nothing_is_read_from_the_device_between_log_lines(small, monkeypatch):
    reads = []
    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu", "numpy"):
        def counted(self, *args, real=getattr(torch.Tensor, name), name=name):
            reads.append(name)
            return real(self, *args)
        monkeypatch.setattr(torch.Tensor, name, counted)
    counts = []
    train(replace(small, recipe="uniform", min_rank=None, steps_per_epoch=12, log_every=6, epochs=1),
          callback=lambda run: counts.append(len(reads)), quiet=True)
    steps = [b - a for a, b in zip(counts, counts[1:])]
    assert [i + 2 for i, n in enumerate(steps) if n] == [6, 12]


# ------------------------------------------------------------------------------------------------ processes

def environment(**more):
    root = os.path.dirname(os.path.dirname(alr.__file__))
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", **more}


def test_training_needs_torch_numpy_and_tqdm_alone(small):
    code = f"""
import sys
for name in ("tyro", "safetensors", "pandas", "pooch", "psutil", "matplotlib", "scipy", "yaml", "requests"):
    sys.modules[name] = None                            # importing it is an ImportError
from alr.lab import Config, train
from alr.lab.command import main
run = train(Config(**{asdict(small)!r}), quiet=True)
assert run.log[-1]["kind"] == "end"
assert main([]) == 1
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "needs tyro" in done.stderr


def test_processes_share_a_batch():
    batch, seen = torch.arange(12).view(6, 2), []                               # (B, T)
    for rank in range(3):
        workers = Workers()
        workers.rank, workers.size = rank, 3
        seen.append(workers.share(batch))
    assert [len(x) for x in seen] == [2, 2, 2] and same(torch.cat(seen).sort(0).values, batch)


def worker(rank, port, config, interrupt, kill):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))

    def callback(run):
        if interrupt and rank == 1 and run.step == 4:
            os.kill(os.getpid(), signal.SIGINT)         # one is told, both stop, at the same step
        if (rank, run.step) in kill:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.stderr = open(f"{config.out}-{rank}.err", "w", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "train", lambda config: train(config, callback=callback, quiet=True))
        sys.exit(main([*shlex.split(config.command())[3:], f"--out={config.out}", *["--resume"] * config.resume,
                       f"--save-every={config.save_every or 10**6}", f"--keep={config.keep}"]))


def two_processes(config, interrupt=False, kill=()):
    """Exit codes of two processes that train; kill: (number of the process, step) at which one kills itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # what torchrun does, without importing torch anew where the system can fork
    start = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    both = [start.Process(target=worker, args=(rank, port, config, interrupt, kill), daemon=True) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    return [process.exitcode for process in both]


def test_two_processes_equal_one_and_stop_together(small, tmp_path):
    small = replace(small, recipe=QUICK.format("repaired", "").replace("50", "150"), dropout=0.0, steps_per_epoch=7)
    one = train(small, quiet=True)
    out = replace(small, out=str(tmp_path))
    assert two_processes(out, interrupt=True) == [130, 130]
    assert checkpoint.load(tmp_path)["step"] == 6       # the next step that is logged
    for _ in range(2):                                  # the second time there is nothing left to do
        assert two_processes(replace(out, resume=True)) == [0, 0]
    two = check(lines(tmp_path / "log.jsonl"), complete=True)
    assert [x["kind"] for x in two] == [x["kind"] for x in one.log]
    for a, b in zip(one.log[1:], two[1:], strict=True):
        for key in a.keys() & {"layer", "old", "new", "ranks", "params", "step"}:
            assert a[key] == b[key]
        for key in a.keys() & {"loss", "train_loss", "val_loss", "test_loss", "grad_norm", "error"}:
            assert a[key] == pytest.approx(b[key], rel=1e-3)
    assert {x["layer"] for x in two if x["kind"] == "resize"} == set(one.adapter.ranks)
    last = load(tmp_path, device="cpu")
    for a, b in zip(one.model.parameters(), last.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_two_processes_go_on_with_their_own_random_numbers(small, tmp_path):
    """Dropout differs between the processes; stopped and resumed, both draw what they would have drawn, bit for bit."""
    small = replace(small, recipe=QUICK.format("v10", ""), dropout=0.3, steps_per_epoch=6, save_every=2, keep=9)
    never, cut = replace(small, out=str(tmp_path / "never")), replace(small, out=str(tmp_path / "cut"))
    assert two_processes(never) == [0, 0]
    assert two_processes(cut, interrupt=True) == [130, 130]
    assert 4 <= checkpoint.load(cut.out)["step"] < 12
    assert two_processes(replace(cut, resume=True)) == [0, 0]
    a, b = load(never.out, device="cpu"), load(cut.out, device="cpu")
    assert same(a.model.state_dict(), b.model.state_dict())
    each = checkpoint.load(cut.out)["each"]
    assert len(each) == 2 and not same(each[0]["rng"], each[1]["rng"]) and same(each, checkpoint.load(never.out)["each"])
    assert [x for x in timeless(a)[1:-1] if x["kind"] != "step"] == [x for x in timeless(b)[1:-1] if x["kind"] != "step"]
    for number in (4, 8):                               # with another number of processes it goes on, to rounding
        for name in ("state", "model"):
            suffix = "pt" if name == "state" else "safetensors"
            assert (tmp_path / "never" / f"{name}-{number:08d}.{suffix}").exists()
    os.replace(tmp_path / "never" / "state-00000008.pt", tmp_path / "never" / "state.pt")
    assert train(replace(never, resume=True), quiet=True).log[-1]["resumed"][-1]["processes"] == 1


# a decision every 6 steps, by what the 4 steps before it showed; of `cut` the first two choose directions for the other two
SEES = {"grow": dict(recipe="replace(repaired, every=6, epoch=6, control=Schedule(((0, 4), (6, 7), (12, 10))), "
                            "resize=GrowAlongGradient(steps=4))", init_rank=4, min_rank=None),
        "cut": dict(recipe="replace(alr, every=6, epoch=6, estimate=FisherSpectrum(steps=4), resize=FisherCut(steps=4), "
                           "control=Budget(share=0.2, begin=0.1, end=1.2, min_rank=1))", optimizer="pairs", min_rank=None)}


@pytest.mark.filterwarnings("ignore:RankAdapter. Budget")
@pytest.mark.parametrize("name", SEES)
def test_processes_are_killed_and_others_go_on(small, tmp_path, name):
    """In the middle of a window: 2 -> 2 ends bit for bit where two that are not killed do; 2 -> 1 and 1 -> 2 end there to
    rounding, which the log says."""
    small = replace(small, epochs=3, steps_per_epoch=6, dropout=0.0, save_every=1, keep=18, **SEES[name])
    one, two, cut = (replace(small, out=str(tmp_path / x)) for x in ("one", "two", "cut"))
    never = train(one, quiet=True)
    assert two_processes(two) == [0, 0]
    assert two_processes(cut, kill={(0, 4), (1, 4)}) == [-signal.SIGKILL, -signal.SIGKILL]
    assert checkpoint.load(cut.out)["step"] == 3 and checkpoint.load(cut.out)["each"][1]["seen"]["done"] == 1
    assert two_processes(replace(cut, resume=True)) == [0, 0]
    a, b = checkpoint.load(two.out), checkpoint.load(cut.out)
    assert same([a[k] for k in ("optimizers", "rng", "each")], [b[k] for k in ("optimizers", "rng", "each")])
    a, b = load(two.out, device="cpu"), load(cut.out, device="cpu")
    assert same(a.model.state_dict(), b.model.state_dict())
    assert [r["exact"] for r in b.log[-1]["resumed"]] == [True]
    resizes = [[x["step"], x["layer"], x["old"], x["new"]] for x in never.log if x["kind"] == "resize"]
    assert {6, 12} <= {x[0] for x in resizes}
    for begun, step, go_on in ((two, 3, 1), (two, 5, 1), (one, 4, 2)):      # before and after `cut` has chosen directions
        moved = replace(begun, out=str(tmp_path / f"{go_on} from {step}"), resume=True)
        shutil.copytree(begun.out, moved.out)
        os.replace(os.path.join(moved.out, f"state-{step:08d}.pt"), os.path.join(moved.out, "state.pt"))
        if go_on == 1:
            train(moved, quiet=True)
        else:
            assert two_processes(moved) == [0, 0]
        again = load(moved.out, device="cpu")
        assert [(r["processes"], r["exact"]) for r in again.log[-1]["resumed"]] == [(go_on, False)]
        assert [[x["step"], x["layer"], x["old"], x["new"]] for x in again.log if x["kind"] == "resize"] == resizes
        for p, q in zip(never.model.parameters(), again.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dead", [0, 1])
def test_a_process_that_is_killed_ends_the_other_and_loses_what_came_after_the_last_save(small, tmp_path, dead):
    small = replace(small, dropout=0.0, save_every=2)
    never, cut = replace(small, out=str(tmp_path / "never")), replace(small, out=str(tmp_path / "cut"))
    assert two_processes(never) == [0, 0]
    ends = two_processes(cut, kill={(dead, 3)})
    assert ends[dead] == -signal.SIGKILL and ends[1 - dead] == 1
    said = (tmp_path / f"cut-{1 - dead}.err").read_text(encoding="utf-8")
    assert "another process of this run has ended" in said and "go on with --resume" in said and "Traceback" not in said
    assert checkpoint.load(cut.out)["step"] == 2
    assert two_processes(replace(cut, resume=True)) == [0, 0]
    assert same(load(never.out, device="cpu").model.state_dict(), load(cut.out, device="cpu").model.state_dict())


def test_two_processes_equal_one_under_the_pair_optimizer(small, tmp_path):
    small = replace(small, recipe="alr", optimizer="pairs", min_rank=None, dropout=0.0, steps_per_epoch=7)
    one = train(small, quiet=True)
    assert two_processes(replace(small, out=str(tmp_path))) == [0, 0]
    last = load(tmp_path, device="cpu")
    assert last.adapter.ranks == one.adapter.ranks and max(one.adapter.ranks.values()) < 12    # it did shrink
    for a, b in zip(one.model.parameters(), last.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------ decay of products

@pytest.mark.parametrize("optimizer, rates", [
    ("adamw", dict(lr=1e-2)), ("sgd", dict(lr=1e-2)), ("muon-float32", dict(muon_lr=1e-2, lr=7e-2))])
@pytest.mark.parametrize("recipe", ["alr", "v9"])
def test_products_decay_at_the_rate_of_their_factors(small, optimizer, rates, recipe, monkeypatch):
    c = replace(small, recipe=recipe, optimizer=optimizer, decay="product", weight_decay=0.5, rest_lr=0.24, schedule="cosine",
                epochs=1, steps_per_epoch=2, **rates)
    asked = []
    monkeypatch.setattr(loop, "product_decay_", lambda layer, amount: asked.append((layer, amount)))
    run = train(c, quiet=True)
    for layer, amount in asked[:len(run.adapter.layers)]:           # of the first step
        name = next(name for name, mod in run.adapter.layers.items() if mod is layer)
        assert amount == pytest.approx(0.5 * (0.24 if "head" in name else 1e-2)), name
    assert len(asked) == 2 * len(run.adapter.layers)


# ------------------------------------------------------------------------------------------------ words for two readers

def test_python_is_told_settings_and_a_shell_flags(small, tmp_path):
    for made, error, flags in (
            (lambda: train(replace(small, lr=1e30), quiet=True), FloatingPointError,
             ["--lr", "--warmup-steps", "--grad-clip 1"]),
            (lambda: checkpoint.load(tmp_path), FileNotFoundError, ["--resume"]),
            (lambda: device.pick_device("xpu" if torch.cuda.is_available() else "cuda"), ValueError, ["--device"])):
        with pytest.raises(error) as caught:
            made()
        told = str(caught.value)
        assert "--" not in told and "{" not in told
        for flag in flags:
            assert flag in caught.value.on_command_line and flag.lstrip("-").replace("-", "_") in told
