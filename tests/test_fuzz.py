"""Whatever stands in a flag, a text, a recipe, a suite, a record or a checkpoint: one line, no traceback, no half output.
Whenever a run is killed: it goes on and ends bit for bit where an unbroken one does.

Each kind draws cases from a seed until its seconds are over: FUZZ_SECONDS (5 by default, `make fuzz` takes more) and
FUZZ_SEED; of kills at least FUZZ_KILLS.  A case that fails is printed as it can be repeated; the last line counts the cases.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator

import pytest
import torch

from alr.evidence import records, sweep
from alr.evidence import suite as suites
from alr.lab import Config, checkpoint
from alr.lab.command import main
from alr.lab.log import provenance
from alr.recipes import ALL

from bits import same
from synthetic import log, write

SECONDS, SEED = float(os.environ.get("FUZZ_SECONDS", 5)), int(os.environ.get("FUZZ_SEED", 0))
KILLS = int(os.environ.get("FUZZ_KILLS", 5))
COUNTS: dict[str, int] = {}             # cases of each kind
ODD = ["", " ", "0", "-1", "1", "2", "3", "7", "0.5", "1.5", "-0.0", "nan", "inf", "-inf", "1e400", "1e-320", "1e-3", "1e30",
       "99999999999999999999", "9" * 400, "x", "None", "True", "[]", "{lr}", "a\nb", "\u202e", "\U0001f642", "../..", "--", "~",
       "/dev/null", "'", "%s", "$HOME", "nul\0"]
LONG = {"--epochs", "--steps-per-epoch"}                # where a large number is a wish that can be had
TEXT = "the cat sat on a mat and ate rats while bats flew at dusk "
SUITE = """about = "a toy"
seeds = [0, 1]
[base]
data_file = "text.txt"
level = "char"
epochs = 1
lr = 1e-2
d_model = 16
n_heads = 2
[thin]
every = 10
[tune]
seeds = [7]
grid = { lr = [1e-3, 1e-2] }
set = { epochs = 1 }
[[arms]]
name = "alr"
recipe = "replace(alr, rank=12)"
[[arms]]
name = "held"
recipe = "uniform"
ranks_from = "alr"
ranks_how = "mean"
set = { lr = 2e-3 }
seeds = [0]
tune = false
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    (tmp_path / "text.txt").write_text(TEXT * 30, encoding="utf-8")
    yield tmp_path
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def summary(request):
    """The last line: how many cases there were of each kind."""
    yield
    kinds = ", ".join(f"{name} {count:,}" for name, count in COUNTS.items())
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print(f"\nfuzz, seed {SEED}: {sum(COUNTS.values()):,} cases ({kinds})")


def cases(name: str, least: int = 5) -> Iterator[random.Random]:
    """Sources of random choices, one a case, until the time is over; so many at least."""
    end, i = time.monotonic() + SECONDS, 0
    while i < least or time.monotonic() < end:
        COUNTS[name] = COUNTS.get(name, 0) + 1
        yield random.Random(f"{SEED} {name} {i}")
        i += 1


def flags(**changes) -> list[str]:
    tiny = dict(data_file="text.txt", level="char", epochs=1, steps_per_epoch=2, batch_size=2, block_size=8, d_model=8,
                n_layers=1, n_heads=2, d_ff=16, lr=1e-3, log_every=1, threads=1, device="cpu", eval_tokens=20, end_tokens=20)
    return [f"--{k.replace('_', '-')}={v}" for k, v in (tiny | changes).items()]


def refuses_or_runs(program, argv, capfd) -> int:
    """The exit status of a program that says what is wrong in words and never fails in another way."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            status = program(argv)
    except SystemExit as stop:                          # what tyro and argparse refuse
        status = stop.code
    except Exception as error:
        pytest.fail(f"{argv}: {type(error).__name__}: {error}")
    said = capfd.readouterr().err
    assert status in (0, 1, 2) and "Traceback" not in said, argv
    assert status == 0 or said.strip(), f"{argv}: refused without a word"
    return status


def test_flags(here, capfd):
    names = [f"--{name.replace('_', '-')}" for name in Config.__dataclass_fields__]
    for rng in cases("flags"):
        argv = flags()
        for name in rng.sample(names, rng.choice((1, 1, 1, 2, 3))):
            odd = [x for x in ODD if name not in LONG or len(x) < 4]
            argv.append(f"{name}={rng.choice(odd)}")
        refuses_or_runs(main, argv, capfd)


def test_texts(here, capfd):
    pieces = [TEXT.encode(), b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\x1f\x8b", b" ", b"\r\n", b"<unk> ",
              "\U0001f642e\u0301".encode(), TEXT.encode("utf-16"), b"\xc3", b"\xed\xa0\x80", b"x" * 3000, b"\x89PNG",
              "\u202e\u05d0".encode(), b"1 2 3 "]
    for rng in cases("texts"):
        raw = b"".join(rng.choice(pieces) * rng.choice((0, 1, 1, 20)) for _ in range(rng.randrange(6)))
        (here / "odd.txt").write_bytes(raw)
        refuses_or_runs(main, flags(data_file="odd.txt", level=rng.choice(("word", "char", "space")),
                                    vocab_size=rng.choice((2, 5, 1000))), capfd)


def test_recipes(here, capfd):
    fields = "rank estimate control resize init state op every when epoch offset warmup cap where gradient start".split()
    values = ["1", "0", "-1", "0.5", "2.0", "None", "'x'", "[]", "()", "True", "1e30", "9**9", "each", "v10", "Transport()",
              "Hold()", "StableRank()", "LossSpectrum()", "Budget(share=0.5)", "Budget(begin=0.5, end=0.5)", "LossAware()",
              "Bidirectional()", "SvdFull()", "Spectral()", "Reset()", "'min'", "'after'", "{'a': 3}", "lambda: 1",
              "v10.control", "Normal(std=0)",
              "__import__('os')", "Transport", "(1, 2)"]
    for rng in cases("recipes"):
        base = rng.choice(list(ALL))
        text = f"replace({ALL[base].name if rng.random() < 0.1 else base}, {rng.choice(fields)}={rng.choice(values)})"
        if rng.random() < 0.3:
            i = rng.randrange(len(text))
            text = text[:i] + rng.choice("()[]{},.'\\ *0x=") + text[i + rng.randrange(2):]
        refuses_or_runs(main, flags(recipe=text), capfd)


def test_suites(here, capfd, monkeypatch):
    monkeypatch.setattr(suites, "DATA", here)
    monkeypatch.setattr(sweep, "DATA", here)
    lines = SUITE.splitlines()
    values = ["3", "-1", "0.5", '"x"', '""', "[]", "[0, 0]", '["a"]', "true", "{ lr = 1 }", "{ x = [1] }", "nan", "inf",
              '"../x"', "1979-05-27", "[[1]]", '"alr"', '"held"', "99999999999999999999"]
    for rng in cases("suites"):
        text = list(lines)
        for _ in range(rng.choice((1, 1, 2))):
            i = rng.randrange(len(text))
            key = text[i].split("=")[0]
            cut = text[i][:rng.randrange(len(text[i]) + 1)]
            text[i] = rng.choice(("", text[i] + "\n" + text[i], f"{key}= {rng.choice(values)}", cut,
                                  f"odd = {rng.choice(values)}", rng.choice(lines)))
        (here / "toy.toml").write_text("\n".join(text), encoding="utf-8")
        refuses_or_runs(sweep.main, ["toy.toml", "--dry-run"], capfd)
    assert not (here / "runs").exists()


def test_records(here):
    path = write(here, log(epochs=2, blocks=1))
    raw = path.read_bytes()
    values = [None, "x", -1, 1e400, [], {}, True]
    for rng in cases("records"):
        lines = raw.decode().splitlines()
        i = rng.randrange(len(lines))
        how = rng.randrange(4)
        if how == 0:
            at = rng.randrange(len(raw))
            spoilt = raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1:]
        elif how == 1:
            spoilt = raw[:rng.randrange(len(raw))]
        else:
            line = json.loads(lines[i])
            line[rng.choice(list(line))] = rng.choice(values)
            lines[i] = json.dumps(line)
            spoilt = "\n".join(lines[:rng.choice((i, len(lines)))] + lines[i:] if how == 2 else lines).encode()
        path.write_bytes(spoilt)
        for read in (records.run_and_end, records.verify_digest, lambda p: records.runs(here.name, here.parent)):
            try:
                read(path)
                assert spoilt.rstrip(b"\n") == raw.rstrip(b"\n"), spoilt
            except records.RecordError as error:
                assert path.name in str(error)


def test_checkpoints(here, capfd):
    assert refuses_or_runs(main, flags(out="out"), capfd) == 0
    names = ("state.pt", next(p.name for p in (here / "out").iterdir() if checkpoint.WEIGHTS.fullmatch(p.name)))
    for rng in cases("checkpoints"):
        path = here / "out" / rng.choice(names)
        raw = path.read_bytes()
        at = rng.randrange(len(raw))
        flipped = raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1:]
        spoilt = rng.choice((raw[:at], flipped, flipped, raw + b"x", raw[at:]))
        if spoilt != raw:
            path.write_bytes(spoilt)
            assert refuses_or_runs(main, flags(out="out") + ["--resume"], capfd) == 1
            path.write_bytes(raw)
    assert refuses_or_runs(main, flags(out="out") + ["--resume"], capfd) == 0


# ------------------------------------------------------------------------------------------------ kills

LONGER = dict(epochs=3, steps_per_epoch=8, save_every=1, dropout=0.1, log_every=3)
KILLED = {                              # ranks move at steps 8 and 16, by what some steps before them showed
    "v10": dict(recipe="replace(v10, epoch=8, every=8, control=each(v10.control, safety=0.4, ema=0.0, max_step=1))",
                init_rank=6, min_rank=2),
    "alr": dict(recipe="replace(alr, epoch=8, every=8, estimate=FisherSpectrum(steps=4), resize=FisherCut(steps=4), "
                       "control=Budget(share=0.3, begin=0.1, end=0.9, min_rank=1))", optimizer="pairs"),
    "gradient": dict(recipe="replace(repaired, epoch=8, every=8, control=Schedule(((0, 2), (8, 4), (16, 6))), "
                            "resize=GrowAlongGradient(steps=5))", init_rank=2),
}


def left(folder) -> dict:
    """What a run has left, without its times: all of its state, the SHA-256 of its weights, the lines of its log."""
    state = checkpoint.load(folder)
    log = [json.loads(line) for line in state.pop("lines")]
    timeless = [{k: v for k, v in line.items() if k not in sweep.NOT_COMPARED} for line in log]
    return {**{k: v for k, v in state.items() if k not in ("seconds", "spent", "resumed")}, "log": timeless,
            "adapter": {k: v for k, v in state["adapter"].items() if k != "seconds"}}


def saved(folder) -> int:
    """When its checkpoint was written, in nanoseconds; 0 without one."""
    path = folder / "state.pt"
    return path.stat().st_mtime_ns if path.exists() else 0


def started(argv) -> int:
    """A process that trains, its errors in errors.txt; its number."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})       # a child hit outside of `try` would be a second pytest
    child = os.fork()
    if child == 0:
        status = 99
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            sys.stderr = open("errors.txt", "w")
            os.dup2(sys.stderr.fileno(), 2)
            status = main(argv)
        except KeyboardInterrupt:                       # before the program listens, or after it
            status = 130
        finally:
            os._exit(status)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    return child


@pytest.mark.filterwarnings("ignore")
def test_kills(here, capfd, monkeypatch):
    """A signal at a random moment of a run that saves after every step; then to the end, perhaps through a second signal."""
    code = provenance()
    monkeypatch.setattr("alr.lab.run.provenance", lambda: code)     # git is asked once
    unbroken, takes = {}, {}
    for name, changes in KILLED.items():                # here, so that processes find modules imported
        saves = []
        with monkeypatch.context() as patch:
            real = checkpoint.save
            patch.setattr(checkpoint, "save", lambda *a: (real(*a), saves.append(time.monotonic())))
            assert main(flags(**LONGER | changes, out=f"unbroken-{name}")) == 0
        takes[name], unbroken[name] = saves[-1] - saves[0], left(f"unbroken-{name}")
        assert {8, 16} <= {x["step"] for x in unbroken[name]["log"] if x["kind"] == "resize"}, name
    seen = {}
    for rng in cases("kills", KILLS):
        name, out = rng.choice(list(KILLED)), here / "out"
        shutil.rmtree(out, ignore_errors=True)
        argv = flags(**LONGER | KILLED[name], out="out")
        for _ in range(rng.choice((1, 1, 2))):
            number = rng.choice((signal.SIGKILL,) * 8 + (signal.SIGTERM, signal.SIGHUP, signal.SIGINT))
            before = saved(out)
            child = started(argv + ["--resume"] * (before > 0))
            if rng.random() < 0.9:                      # else perhaps before it has begun
                while saved(out) == before and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                    time.sleep(0.001)
            time.sleep(rng.uniform(0, takes[name]))
            os.kill(child, number)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert status in (0, 130, -number), (name, number, status, (here / "errors.txt").read_text())
            assert "Traceback" not in (here / "errors.txt").read_text()
            then = "had ended" if status == 0 else "goes on" if checkpoint.exists(out) else "begins anew"
            key = f"{signal.Signals(number).name} {then}"
            seen[key] = seen.get(key, 0) + 1
        assert os.waitpid(started(argv + ["--resume"] * checkpoint.exists(out)), 0)[1] == 0, (here / "errors.txt").read_text()
        assert same(left(out), unbroken[name]), (name, seen)
        assert not [p.name for p in out.iterdir() if p.name.endswith(".part")], sorted(os.listdir(out))
    with capfd.disabled():
        print("kills:", ", ".join(f"{count} {key}" for key, count in sorted(seen.items())))
