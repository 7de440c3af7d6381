"""Laws of what a run saves: nothing is lost, nothing of the user's is touched, nothing is believed unread."""

import contextlib
import errno
import os
import random
import shlex
import signal
import socket
from dataclasses import replace

import pytest
import torch
from torch import nn

import alr
from alr.lab import Config, checkpoint, load, train
from alr.lab import files as file_tools
from alr.lab.command import main
from alr.lab.files import held, lock, open_locked, replacing
from alr.lab.log import Lines, Log
from alr.lab.run import Run
from alr.lab.stop import Stop


@pytest.fixture
def small(tmp_path_factory):
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(rng.choice("the cat sat on a mat and ate rats".split()) for _ in range(900)), encoding="utf-8")
    return Config(recipe="v10", data_file=str(path), level="char", epochs=2, steps_per_epoch=6, batch_size=2, block_size=8,
                  d_model=8, n_layers=1, n_heads=2, d_ff=16, init_rank=6, min_rank=2, lr=1e-2, log_every=3, dropout=0.1,
                  device="cpu", threads=1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def at(step, do):
    def callback(run):
        if run.step == step:
            do(run)
    return callback


def interrupt(run):
    raise KeyboardInterrupt


def final(run):
    return {**run.model.state_dict(), "rng": torch.get_rng_state()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


DECOYS = ("model-final.pt", "model-card.md", "model-old/weights.bin", "model-00000006.safetensors", "model-6.safetensors",
          "state-00000003.pt", "state-mine.pt", "state.pt.part", "model-00000006.part", "log.jsonl.part", "notes.txt")


def decoys(folder):
    for name in DECOYS:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"precious " + name.encode())
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------ what is the user's

@pytest.mark.parametrize("keep", [1, 2])
def test_no_file_of_the_users_is_touched(small, tmp_path, keep):
    before = decoys(tmp_path)
    config = replace(small, out=str(tmp_path), keep=keep, save_every=3)
    with pytest.raises(KeyboardInterrupt):
        train(config, callback=at(7, interrupt), quiet=True)
    train(replace(config, resume=True), quiet=True)
    after = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert before.items() <= after.items()
    mine = sorted(map(str, after.keys() - before.keys()))
    assert mine == ["log.jsonl", "model-00000012.safetensors", "state.pt"] if keep == 1 else len(mine) == 5
    assert load(tmp_path, device="cpu").step == 12


def test_a_log_is_written_in_place_where_it_is_no_regular_file(small, tmp_path):
    fifo, target, link = tmp_path / "fifo", tmp_path / "disk" / "log.jsonl", tmp_path / "link.jsonl"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    target.parent.mkdir()
    link.symlink_to(target)
    for path in (fifo, link):
        run = train(replace(small, epochs=1, log_file=str(path)), quiet=True)
        assert path.is_fifo() if path == fifo else path.is_symlink()
    assert b'"kind": "end"' in os.read(reader, 1 << 16)
    os.close(reader)
    assert target.read_text(encoding="utf-8").splitlines() == run.writer.lines
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["disk", "fifo", "link.jsonl", "log.jsonl"]
    assert train(replace(small, epochs=1, log_file=os.devnull), quiet=True).step == 6
    assert not os.path.isfile(os.devnull)


def test_a_file_that_is_no_log_is_refused_and_left(small, tmp_path):
    for text in ("my notes\n", "\n", '{"epoch": 3}\n', "{}", "\0\1\2"):
        (tmp_path / "x").write_text(text)
        for setting in ("log_file", "seed_log"):
            with pytest.raises(ValueError, match=f"{setting} .*x is there and is no log of a run; it is left as it is"):
                train(replace(small, **{setting: str(tmp_path / "x")}), quiet=True)
        assert (tmp_path / "x").read_text() == text and os.listdir(tmp_path) == ["x"]
    text = open(small.data_file, "rb").read()
    for changes, words in ((dict(log_file=small.data_file), "no log of a run"), (dict(log_file=str(tmp_path)), "is a folder"),
                           (dict(out=str(tmp_path / "o"), log_file=str(tmp_path / "o" / "state.pt")), "a checkpoint's file"),
                           (dict(log_file="same.jsonl", seed_log="same.jsonl"), "is also log_file"),
                           (dict(out=str(tmp_path / "x")), "out .* is a file")):
        with pytest.raises(ValueError, match=words):
            train(replace(small, **changes), quiet=True)
    assert open(small.data_file, "rb").read() == text and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_under_a_name_of_ours_leads_to_no_other_file(small, tmp_path, link):
    """A file elsewhere is not written to because a link to it is called as a file that is being written."""
    out, precious = tmp_path / "out", tmp_path / "precious"
    config = replace(small, out=str(out), save_every=2, keep=2)
    with pytest.raises(KeyboardInterrupt):
        train(config, callback=at(5, interrupt), quiet=True)
    precious.write_text("precious")
    for name in checkpoint.PARTS:
        link(precious, out / name)
    train(replace(config, resume=True), quiet=True)
    assert precious.read_text() == "precious" and not {*checkpoint.PARTS[:2]} & {*os.listdir(out)}
    for name in ("lock", ".log.jsonl.part"):
        os.symlink(precious, tmp_path / name)
        with pytest.raises(OSError, match=name):
            open_locked(tmp_path / name)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file.*pipe"):
        open_locked(tmp_path / "pipe")
    (out / checkpoint.PARTS[0]).mkdir()
    with pytest.raises(OSError, match="could not be written to .*still stands"):
        checkpoint.save(out, nn.Linear(1, 1), {}, 9)
    assert load(out, device="cpu").step == 12


@pytest.mark.parametrize("flags, words", [
    ("--out=dangling", "--out dangling: File exists."), ("--out=" + "x" * 300, "File name too long."),
    ("--out=file/x", "--out file/x: "), ("--out=none --resume", "--out none: no checkpoint in none"),
    ("--log-file=socket", "--log-file socket: No such device"), ("--log-file=loop", "--log-file loop: Too many levels"),
    ("--log-file=file/x", "--log-file file/x: "), ("--seed-log=" + "x" * 300, "File name too long."),
    ("--seed-log=/proc/x/y", "--seed-log /proc/x/y: No such file or directory.")])
def test_a_place_that_cannot_be_had_names_its_flag_and_makes_nothing(small, tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("precious")
    os.symlink("nowhere", "dangling")
    os.symlink("loop", "loop")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
    before = sorted(os.listdir())
    assert main([*shlex.split(small.command())[3:], *flags.split()]) == 1
    said = capsys.readouterr().err
    assert words in said and said.startswith(f"train: {flags.split('=')[0]} ") and said.count("\n") == 1
    assert sorted(os.listdir()) == before and (tmp_path / "file").read_text() == "precious"


def test_two_runs_on_one_folder_or_one_log_exclude_each_other(small, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log.jsonl"
    refused = []

    def second(run):
        for changes in (dict(out=str(out)), dict(out=str(out), resume=True), dict(log_file=str(log))):
            with pytest.raises(ValueError, match="another process"):
                train(replace(small, seed=1, **changes), quiet=True)
            refused.append(changes)
    run = train(replace(small, out=str(out), log_file=str(log)), callback=at(7, second), quiet=True)
    assert len(refused) == 3 and sorted(os.listdir(tmp_path)) == ["log.jsonl", "out"]
    assert log.read_text(encoding="utf-8").splitlines() == run.writer.lines
    assert train(replace(small, out=str(out), resume=True), quiet=True).step == 12      # held no longer


def test_a_crash_releases_its_locks(tmp_path):
    for take in (lambda: held(tmp_path).__enter__(), lambda: open_locked(tmp_path / "log") is not None):
        child = os.fork()
        if child == 0:
            ok = take()
            os.kill(os.getpid(), signal.SIGKILL if ok else signal.SIGTERM)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with held(tmp_path) as mine:
        assert mine
        with held(tmp_path) as again:
            assert not again
    log = Lines(tmp_path / "log")
    log.add("x")
    assert open_locked(tmp_path / "log") is None
    log.close()
    assert lock(os.open(tmp_path / "log", os.O_RDONLY))


def test_a_system_without_locks_lets_everybody_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(file_tools, "fcntl", None)
    with held(tmp_path) as mine, held(tmp_path) as again:
        assert mine and again and open_locked(tmp_path / "x") is not None


# ------------------------------------------------------------------------------------------------ nothing believed unread

def test_every_flipped_bit_is_noticed(small, tmp_path):
    out = tmp_path / "out"
    train(replace(small, epochs=1, out=str(out)), quiet=True)
    rng = random.Random(0)
    for path in (out / "state.pt", out / "model-00000006.safetensors"):
        raw = path.read_bytes()
        places = [0, 9, len(raw) - 1, len(raw) - 70, *(rng.randrange(len(raw)) for _ in range(20))]
        cuts = [raw[:n] for n in (0, 1, 8, len(raw) // 2, len(raw) - 1)]
        for broken in [raw[:i] + bytes([raw[i] ^ 1 << rng.randrange(8)]) + raw[i + 1:] for i in places] + cuts:
            path.write_bytes(broken)
            with pytest.raises(ValueError, match=f"{path.name}.*(SHA-256 differs|no checkpoint|cannot be read|newer alr)"):
                state = checkpoint.load(out)
                checkpoint.load_weights(out, state, nn.Linear(1, 1))
        path.write_bytes(raw)
    assert load(out, device="cpu").step == 6


def test_foreign_newer_and_incompatible_checkpoints_are_one_line(small, tmp_path, model, capsys):
    argv = [*small.command().split()[3:], "--resume", "--out", str(tmp_path)]

    def said():
        assert main(argv) == 1
        err = capsys.readouterr().err
        assert "Traceback" not in err and err.count("\n") == 1
        return err
    torch.save({"config": {}}, tmp_path / "state.pt")
    assert "is no checkpoint of this program" in said()
    checkpoint.save(tmp_path / "new", model, {"a": 1}, 3)
    raw = (tmp_path / "new" / "state.pt").read_bytes()
    (tmp_path / "state.pt").write_bytes(raw.replace(b"alr-checkpoint 1 ", b"alr-checkpoint 2 "))
    assert "newer alr (format 2, this one reads 1)" in said()
    (tmp_path / "state.pt").unlink()
    checkpoint.save(tmp_path, model, {"config": small.describe(), "recipe": ""}, 3)
    assert "of another version of this program (it lacks adapter)" in said()
    done = replace(small, epochs=1, out=str(tmp_path / "done"))
    run = train(done, quiet=True)
    state = checkpoint.load(done.out)
    for spoil, words in (({"optimizers": []}, "does not fit this run"), ({"rng": {"cpu": torch.zeros(3, dtype=torch.uint8)}},
                         "does not fit this run"), ({"step": 99}, "step 99 of epoch 1 is no moment of this run"),
                         ({"adapter": {}}, "does not fit this run"), ({"lines": "x"}, "lines is of type str"),
                         ({"lines": [1]}, "its log is none"), ({"lines": ["[]"]}, "its log is none"),
                         ({"lines": ["{"]}, "its log is none"), ({"resumed": None}, "resumed is of type NoneType"),
                         ({"config": state["config"] | {"newer": 1}}, "no setting 'newer'"),
                         ({"config": []}, "config is of type list"), ({"val_loss": "x"}, "val_loss is of type str"),
                         ({"each": [1, 2]}, "does not fit this run"), ({"fingerprint": None}, "fingerprint is of type")):
        checkpoint.save(done.out, run.model, state | spoil, 6)
        for go_on in (lambda: train(replace(done, resume=True), quiet=True), lambda: load(done.out, device="cpu")):
            with pytest.raises(ValueError, match=f"state.pt .*{words}" if "step" not in spoil else words):
                go_on()
    checkpoint.save(done.out, run.model, {"evil": os.system}, 6)
    with pytest.raises(ValueError, match="could run code and is not read") as error:
        load(done.out)
    assert "weights_only" not in str(error.value)
    checkpoint.save(done.out, model, state, 6)
    with pytest.raises(ValueError, match="does not fit the model of these settings"):
        train(replace(done, resume=True), quiet=True)


def test_a_state_is_still_an_archive_that_torch_reads(tmp_path, model):
    checkpoint.save(tmp_path, model, {"a": torch.arange(3)}, 7)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["a"].tolist() == [0, 1, 2] and state["weights"] == "model-00000007.safetensors"
    assert checkpoint.seal(tmp_path / "state.pt")[:3] == (1, 7, state["weights"])
    assert (tmp_path / "state.pt").stat().st_mode == (tmp_path / state["weights"]).stat().st_mode


def test_a_full_disk_is_one_line_and_the_last_pair_stands(small, tmp_path, monkeypatch, model):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        train(replace(small, out=str(out)), callback=at(7, interrupt), quiet=True)
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def full(*args, **kwargs):
        raise RuntimeError("unexpected pos 90048 vs 89936")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="checkpoint of step 9 could not be written to .*unexpected pos.*still stands"):
        checkpoint.save(out, model, {}, 9)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.name in before} == before
    assert not [p for p in out.iterdir() if p.name.endswith(".part")]
    again = final(train(replace(small, out=str(out), resume=True), quiet=True))
    assert equal(again, final(train(small, quiet=True)))
    assert sorted(p.name for p in out.iterdir()) == ["log.jsonl", "model-00000012.safetensors", "state.pt"]
    log = Log("/dev/full")
    if os.path.exists("/dev/full"):
        with pytest.raises(OSError, match="/dev/full") as error:
            log.write("run")
        assert error.value.errno == errno.ENOSPC
        log.close()


def test_a_file_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (order.append(name), real(*a))[1])
    with replacing(tmp_path / "x", "x.part") as part:
        part.write_text("new")
    assert order == ["fsync", "replace", "fsync"] and (tmp_path / "x").read_text() == "new"
    with contextlib.suppress(ZeroDivisionError), replacing(tmp_path / "x", "x.part") as part:
        part.write_text("half")
        1 / 0                                           # noqa: B018
    assert (tmp_path / "x").read_text() == "new" and os.listdir(tmp_path) == ["x"]


def test_a_resumed_run_says_what_it_changed_and_all_that_it_may_not(small, tmp_path):
    config = replace(small, out=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        train(config, callback=at(7, interrupt), quiet=True)
    with pytest.raises(ValueError, match=r"resume: epochs is 3, but 2 in the checkpoint; lr is 0.5, but 0.01"):
        train(replace(config, resume=True, lr=0.5, epochs=3), quiet=True)
    relative = os.path.relpath(small.data_file)
    try:
        end = train(replace(config, resume=True, threads=2, data_file=relative), recipe=alr.recipes.v10, quiet=True).log[-1]
    finally:
        torch.set_num_threads(1)
    resumed, = end["resumed"]
    assert resumed["step"] == 7 and resumed["threads"] == 2 and resumed["device"] == "cpu" and resumed["processor"]
    assert not resumed["exact"]


# ------------------------------------------------------------------------------------------------ less to lose

@pytest.mark.parametrize("every, steps", [(2, [2, 4, 6, 8, 10, 12, 12]), ("4", [4, 6, 8, 12, 12]), (None, [6, 12, 12]),
                                          ("1000m", [6, 12, 12])])
def test_checkpoints_are_written_every_so_many_steps(small, tmp_path, monkeypatch, every, steps):
    seen, real = [], Run.save
    monkeypatch.setattr(Run, "save", lambda run, each=None: (seen.append(run.step), real(run, each))[1])
    never = final(train(small, quiet=True))
    seen.clear()
    assert equal(final(train(replace(small, out=str(tmp_path), save_every=every), quiet=True)), never)
    assert seen == steps


def test_checkpoints_are_written_by_the_clock(small, tmp_path, monkeypatch):
    seen, now = [], [0.0]
    monkeypatch.setattr("alr.lab.loop.time.monotonic", lambda: now[0])
    monkeypatch.setattr(Run, "save", lambda run, each=None: seen.append(run.step))

    def minute(run):
        now[0] += 60
    train(replace(small, out=str(tmp_path / "o"), save_every="4m"), callback=minute, quiet=True)
    assert seen == [4, 6, 10, 12, 12]


@pytest.mark.parametrize("step", [1, 3, 4, 5, 6, 7, 11])        # with the three below, ten kills
def test_a_kill_loses_only_what_came_after_the_last_save(small, tmp_path, step):
    """SIGKILL between two steps, with a checkpoint every two: the resumed run ends bit for bit where an unbroken one does."""
    never = final(train(small, quiet=True))
    config = replace(small, out=str(tmp_path / "out"), save_every=2)
    child = os.fork()
    if child == 0:
        train(config, callback=at(step, lambda run: os.kill(os.getpid(), signal.SIGKILL)), quiet=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    there = checkpoint.exists(config.out)
    assert there == (step > 2)
    run = train(replace(config, resume=there), quiet=True)
    assert equal(final(run), never) and [x["step"] for x in run.log[-1]["resumed"]] == ([(step - 1) // 2 * 2] if there else [])


@pytest.mark.parametrize("moment", ["model-00000004", "state.pt", "unlink"])
def test_a_kill_within_a_save_leaves_a_pair(small, tmp_path, monkeypatch, moment):
    never = final(train(small, quiet=True))
    config = replace(small, out=str(tmp_path / "out"), save_every=2)
    child = os.fork()
    if child == 0:
        real, calls = os.replace, []

        def dies(a, b):
            calls.append(b)
            if moment in str(b) and len(calls) > 2:
                os.kill(os.getpid(), signal.SIGKILL)
            real(a, b)
        if moment == "unlink":
            unlink = checkpoint.Path.unlink
            monkeypatch.setattr(checkpoint.Path, "unlink", lambda path, **k: os.kill(os.getpid(), signal.SIGKILL)
                                if checkpoint.WEIGHTS.fullmatch(path.name) else unlink(path, **k))
        monkeypatch.setattr(os, "replace", dies)
        train(config, quiet=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert equal(final(train(replace(config, resume=True), quiet=True)), never)
    assert sorted(os.listdir(config.out)) == ["log.jsonl", "model-00000012.safetensors", "state.pt"]


def test_the_last_k_checkpoints_stay_and_can_be_gone_on_from(small, tmp_path):
    config = replace(small, out=str(tmp_path), save_every=2, keep=3)
    run = train(config, quiet=True)
    assert sorted(os.listdir(tmp_path)) == [
        "log.jsonl", *(f"model-{n:08d}.safetensors" for n in (8, 10, 12)), "state-00000008.pt", "state-00000010.pt", "state.pt"]
    (tmp_path / "state.pt").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=r"go on from step 10, which was kept: mv (\S+) (\S+)$") as error:
        train(replace(config, resume=True), quiet=True)
    os.replace(*str(error.value).split()[-2:])
    assert equal(final(train(replace(config, resume=True, keep=1), quiet=True)), final(run) | {"rng": torch.get_rng_state()})
    assert sorted(os.listdir(tmp_path)) == ["log.jsonl", "model-00000012.safetensors", "state.pt"]


def test_a_closed_terminal_saves_and_nohup_is_obeyed(small, tmp_path, monkeypatch):
    never = final(train(small, quiet=True))
    config = replace(small, out=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        train(config, callback=at(4, lambda run: os.kill(os.getpid(), signal.SIGHUP)), quiet=True)
    assert checkpoint.load(tmp_path)["step"] == 4
    assert equal(final(train(replace(config, resume=True), quiet=True)), never)
    def gone(*_):
        raise OSError(errno.EIO, "the terminal is gone")
    monkeypatch.setattr(os, "write", gone)
    with Stop() as stop:
        for _ in range(2):                              # from the system and from the shell
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.asked
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGHUP, old)
