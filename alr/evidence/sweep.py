"""Record a suite of runs: `python -m alr.sweep data/suites/NAME.toml` (`make runs SUITE=NAME`).

Skips what is recorded with the same configuration, runs the rest, and survives being cut off: a run writes to a file
that is not a record yet and becomes one, thinned, in a single rename at its end.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from ..lab import Config, train
from ..lab.damage import trial
from ..lab.data import Corpus
from ..lab.device import pick_device
from ..lab.files import held, open_locked, put
from ..lab.log import digest
from ..lab.optimizers import read_by
from ..lab.run import adjust, check_ranks, find_corpus, fits_memory
from ..lab.stop import listen
from ..recipes import parse
from . import archive
from .paths import DATA
from .records import run_and_end, thin, verify_digest
from .suite import Job, Suite, load

RUNNING = ".running-"                   # how the folder of a run at work begins
LOCK = ".sweep.lock"                    # in a suite's folder while a sweep records there: which process it is
NOT_COMPARED = {"seconds", "tokens_per_s", "time_sec", "peak_memory_mb", "digest", "started", "commit", "dirty", "source",
                "command", "config", "resumed"}     # differ between two honest runs of the same thing


def configuration(job: Job) -> dict:
    """What of a Config decides a run's numbers, as a log has it: not the rate of an optimizer that is not used."""
    settings = json.loads(json.dumps(job.config.describe()))
    return {k: v for k, v in settings.items()
            if k not in ("device", "threads") and job.config.optimizer in (read_by(k) or [job.config.optimizer])}


def recorded(job: Job, recipe, data: Path, trial: dict | None = None) -> bool:
    """Is there a record of this very configuration, and of this trial?  An older one of the same name does not count."""
    path = job.path(data)
    if not path.exists():
        return False
    first, end = run_and_end(path)
    if end.get("trial") != trial:
        return False
    now = configuration(job)
    was = Config().describe() | first["config"]         # a setting younger than the record stood at its default
    return same_recipe(first["recipe"], recipe) and {k: was[k] for k in now} == now


def same_recipe(text: str, recipe) -> bool:
    """Is this a record's text of that recipe?  Values count: a field younger than the record stood at its default."""
    try:
        return text == repr(recipe) or parse(text) == recipe
    except ValueError:                                  # something in it has another name today
        return False


def record(suite: Suite, job: Job, data: Path = DATA, quiet: bool = True) -> Path:
    """Make one run and its record; returns the record's path.  Nothing half written is ever at that path.

    A record of other settings that stands there is moved aside.  FloatingPointError for a run that diverged, unless it
    tries a value of a grid: that value is recorded with the loss inf.
    """
    path = job.path(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=RUNNING) as folder, held(folder):
        small = Path(folder) / "record.jsonl"
        small.write_text("\n".join(run(suite, job, data, Path(folder), quiet)) + "\n", encoding="utf-8")
        if path.exists():
            run_and_end(path)                           # whatever else stands there is not ours to move: RecordError
            aside = next(name for n in itertools.count(1) if not (name := path.with_name(f"{path.name}.{n}")).exists())
            os.replace(path, aside)
            print(f"sweep: {path} was recorded with other settings; that is now {aside.name}.", file=sys.stderr)
        put(small, path)
    return path


def run(suite: Suite, job: Job, data: Path, folder: Path, quiet: bool = True) -> list[str]:
    """The lines of a job's record, from a run that is made now and logged in `folder`."""
    log, began = folder / "log.jsonl", time.perf_counter()
    try:
        done = train(replace(job.config, log_file=str(log)), recipe=suite.recipe(job, data), quiet=quiet)
        lines = log.read_text(encoding="utf-8").splitlines()
        if suite.trial is not None:
            lines = tried(lines, trial(done, **suite.trial), suite.trial)
    except FloatingPointError as error:
        if not job.tuning:
            raise
        lines = diverged(log.read_text(encoding="utf-8").splitlines(), str(error), time.perf_counter() - began)
    return thin(lines, **suite.thin)


def tried(lines: Sequence[str], rows: Sequence[dict], asked: dict) -> list[str]:
    """A finished log with a `cut` line for each row of a trial; its `end` line says which trial, and has a new digest."""
    def short(x):
        return float(f"{x:.7g}") if isinstance(x, float) else x
    lines, end = list(lines[:-1]), json.loads(lines[-1])
    lines += [json.dumps({"kind": "cut"} | {key: short(x) for key, x in row.items()}) for row in rows]
    return [*lines, json.dumps({**end, "trial": asked, "digest": digest(lines)})]


def diverged(lines: Sequence[str], why: str, seconds: float) -> list[str]:
    """The log of a run whose loss is no number any more, with an `end` line: val_loss is inf, `diverged` says why."""
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    end = {"kind": "end", "step": last.get("step", 0), "train_loss": math.inf, "val_loss": math.inf, "val_bpb": math.inf,
           "diverged": why, "params": first["params"], "ranks": {}, "shapes": {},
           "seconds": {"training": round(seconds, 3), "evaluation": 0.0, "adaptation": 0.0}, "resumed": []}
    return [*lines, json.dumps({**end, "digest": digest(lines)})]


@dataclass(frozen=True)
class Plan:
    """What is left to do: runs that can start now, runs that wait for another arm's ranks, what is broken, by name and why,
    and how many runs will follow once arms are tuned."""

    now: list[Job]
    later: list[Job]
    broken: dict[str, str]
    untuned: dict[str, int]

    def __len__(self) -> int:
        return len(self.now) + len(self.later) + sum(self.untuned.values())


def plan(suite: Suite, data: Path, only: Sequence[str] = ()) -> Plan:
    """The plan for the arms in `only`, or for all.  A broken record concerns its own arm and those that build on it."""
    known = [arm.name for arm in suite.arms]
    if unknown := set(only) - set(known):
        raise ValueError(f"suite {suite.name} has no arm {sorted(unknown)[0]!r}; it has {', '.join(known)}.")
    now, later, broken, values = [], [], {}, {}
    for arm in suite.arms:
        if not only or arm.name in only:
            try:
                values[arm.name] = suite.chosen(arm, data)
            except ValueError as error:
                broken[arm.name] = str(error)
    good = [arm for arm in suite.arms if arm.name in values]
    untuned = {arm.name: len(suite.seeds_of(arm)) for arm in good if values[arm.name] is None}
    for job in suite.tuning_jobs(good) + suite.jobs(data, values):
        try:
            if not recorded(job, suite.recipe(job, data), data, suite.trial):
                now.append(job)
        except FileNotFoundError:
            later.append(job)
        except ValueError as error:
            broken[job.name] = str(error)
    return Plan(now, later, broken, untuned)


def pending(suite: Suite, data: Path) -> tuple[list[Job], list[Job]]:
    """(runs that can start now, runs that wait for another arm's ranks).  ValueError for a broken record."""
    found = plan(suite, data)
    for why in found.broken.values():
        raise ValueError(why)
    return found.now, found.later


def measured(suite: Suite, data: Path) -> dict[str, list[float]]:
    """How long the recorded runs have taken, in seconds, by arm."""
    times: dict[str, list[float]] = {}
    for path in (data / "runs" / suite.name).rglob("*.jsonl"):
        if path.parent.name.startswith(RUNNING):                    # of a sweep that is at work
            continue
        end = run_and_end(path)[1]
        times.setdefault(path.name.split(".seed")[0].split(".lr")[0], []).append(sum(end["seconds"].values()))
    return times


def seconds(suite: Suite, job: Job, data: Path, times: dict[str, list[float]] | None = None) -> float | None:
    """How long a run will take: the mean of this arm's records, else of the suite's, else not known.

    times: `measured` of the suite, where it is known already.
    """
    times = measured(suite, data) if times is None else times
    known = times.get(job.arm.name) or [t for ts in times.values() for t in ts]
    return sum(known) / len(known) if known else None


def sweep(suite: Suite, jobs: int = 1, data: Path = DATA, limit: int | None = None, only: Sequence[str] = ()) -> int:
    """Record what is missing; returns how many runs were made.  Waves: tuning, then the runs, then borrowed ranks.

    only: the names of the arms to record, for a suite that is shared out; all if empty.  A run that fails does not stop
    the others: RuntimeError at the end, with a line for each that failed or could not start.  RuntimeError at once where
    another process records the same suite.
    """
    check_arms(suite, only)
    with claim(data / "runs" / suite.name):
        return waves(suite, jobs, data, limit, only)


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """A context in which this process alone records in a folder, which is made.  RuntimeError names the one that does.

    A process that ends in any way holds it no longer; the name that a killed one left in the lock file counts for nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    file = open_locked(path)
    if file is None:
        who = ""
        with contextlib.suppress(OSError):              # it has ended since
            who = " ".join(path.read_text(encoding="utf-8").split())
        raise RuntimeError(f"{folder} is being recorded by {who or 'another process'}; wait for its end, or stop it: what it "
                           "has recorded stays. For several runs at a time give one sweep --jobs.")
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()                               # before it is released: whoever finds it can believe it
        file.close()


def waves(suite: Suite, jobs: int, data: Path, limit: int | None, only: Sequence[str]) -> int:
    """`sweep` in a folder that nobody else records in."""
    clean(data / "runs" / suite.name)
    todo, failed, tried = plan(suite, data, only), {}, 0
    total = len(todo) if limit is None else min(limit, len(todo))
    with tqdm(total=total, desc=suite.name, unit="run", dynamic_ncols=True) as bar:     # over all waves, with the time left
        while True:
            failed |= todo.broken
            now = [job for job in todo.now if job.name not in failed][:None if limit is None else limit - tried]
            if not now:
                break
            for job, error in attempts(suite, now, jobs, data):
                tried += 1
                bar.set_postfix_str(job.name)
                bar.update()
                if error is not None:
                    failed[job.name] = error
            todo = plan(suite, data, only)
    made = tried - len(failed.keys() - todo.broken.keys())
    said = [f"{name}: {why}" for name, why in sorted(failed.items())]             # not in the order in which they ended
    if todo.later and limit is None:
        said.append(", ".join(sorted({job.arm.name for job in todo.later})) + " wait for ranks of an arm that has no record.")
    if said:
        raise RuntimeError(f"sweep {suite.name}: {made} runs recorded; these were not:\n  " + "\n  ".join(said))
    return made


def attempts(suite: Suite, todo: Sequence[Job], jobs: int, data: Path) -> Iterator[tuple[Job, str | None]]:
    """(job, None or why it failed) for each run as it ends; `jobs` processes at a time, this one alone for 1."""
    if jobs == 1:
        for job in todo:
            yield job, attempt(suite, job, data, quiet=False)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=die_with_parent) as pool:
        futures = {pool.submit(attempt, suite, job, data): job for job in todo}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:                       # those that were at work: one of them was killed
            for job in [job for future, job in futures.items() if not future.done() or future.exception()][:jobs]:
                yield job, "a process that recorded was killed, perhaps for want of memory; call again with fewer --jobs."
        except BaseException:                           # Ctrl-C: nobody waits for runs that nobody waits for
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def attempt(suite: Suite, job: Job, data: Path, quiet: bool = True) -> str | None:
    """Record one run; None, or what went wrong, in a line."""
    try:
        record(suite, job, data, quiet)
    except (ValueError, OSError, ArithmeticError) as error:
        return " ".join(str(error).split())
    except Exception as error:                          # a fault of ours, or of torch: where?
        place = traceback.extract_tb(error.__traceback__)[-1]
        return " ".join(f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})".split())
    return None


def die_with_parent() -> None:
    """End this process as soon as the one that started it has ended, however that was."""
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()


def clean(folder: Path) -> None:
    """Remove what killed sweeps left of runs at work; a sweep that is alive holds its own."""
    for place in [p for p in folder.rglob(f"{RUNNING}*") if p.is_dir() and not p.is_symlink()]:
        if {p.name for p in place.iterdir()} <= {"log.jsonl", ".log.jsonl.part", "record.jsonl"}:
            with held(place) as mine:
                if mine:
                    shutil.rmtree(place, ignore_errors=True)


def check_arms(suite: Suite, only: Sequence[str] = ()) -> None:
    """Can every arm start?  Its corpus, ranks and sizes are looked at before the first run.  ValueError names the arm."""
    texts: dict[tuple, Corpus] = {}
    for arm in suite.arms:
        if only and arm.name not in only:
            continue
        source = next((a for a in suite.arms if a.name == arm.ranks_from), arm)
        if missing := set(suite.seeds_of(arm)) - set(suite.seeds_of(source)):
            raise ValueError(f"suite {suite.name}, arm {arm.name!r}: takes ranks from {source.name!r}, which has no run at "
                             f"seed {min(missing)}.")
        c = suite.config(arm, suite.seeds[0])
        key = (c.corpus, c.data_file, c.vocab_size, c.level, c.data_dir)
        try:
            text = texts[key] if key in texts else texts.setdefault(key, find_corpus(c))
            if len(text.train) <= c.block_size:
                raise ValueError(f"block_size {c.block_size} is longer than the text, {len(text.train)} tokens.")
            fits_memory(c, len(text.vocab), pick_device(c.device))
            check_ranks(c, adjust(parse(arm.recipe), c), len(text.vocab))
        except ValueError as error:
            raise ValueError(f"suite {suite.name}, arm {arm.name!r}: {error}") from None


def sensible_jobs(suite: Suite) -> int:
    """How many runs at a time keep this machine busy: its cores over the threads of one run; one on an accelerator."""
    if pick_device(suite.base.get("device", "auto")).type != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // (suite.base.get("threads") or torch.get_num_threads()))


def dry_run(suite: Suite, data: Path = DATA, only: Sequence[str] = ()) -> str:
    """What would run, and for how long from what was measured so far; which records are broken."""
    todo = plan(suite, data, only)
    try:
        spent = measured(suite, data)
    except ValueError:                                  # of a broken record, which is named below or is another arm's
        spent = {}
    times = [seconds(suite, job, data, spent) for job in todo.now + todo.later]
    known = [t for t in times if t is not None]
    untuned = ", ".join(f"{count} run{'s' * (count > 1)} of {name}" for name, count in todo.untuned.items())
    lines = [f"  {job.name:<44} {'?' if t is None else f'{t:6.0f} s'}"
             + (f"  (waits for {job.arm.ranks_from})" if job in todo.later else "")
             for job, t in zip(todo.now + todo.later, times)]
    lines += [f"  {name}: {why}" for name, why in todo.broken.items()]
    lines.append(f"{suite.name}: {len(todo.now) + len(todo.later)} runs to make"
                 + (f", about {sum(known) / 60:.0f} min in one process" if known else ", no time measured yet")
                 + (f"; then {untuned}, once tuned" if untuned else "")
                 + f"; up to --jobs {sensible_jobs(suite)} make sense here")
    return "\n".join(lines)


def verify(suite: Suite, data: Path = DATA, seed: int | None = None, tolerance: float = 0.05) -> str:
    """Run a random record of the suite again and compare: bit for bit on the same processor, torch and thread count; within
    `tolerance` nats of validation loss on another one, or where the first difference is one of rounding (ours: float
    sums in another order, then 10^3 steps).

    Records of arms that data/archive.toml names are left out: today's code does not repeat them, and it says why.
    Returns what was compared; RuntimeError when it differs.
    """
    earlier = archive.arms(suite.name, data / archive.ARCHIVE.name)
    made = [job for job in suite.jobs(data) + suite.tuning_jobs() if job.path(data).exists()]
    there = [job for job in made if job.arm.name not in earlier]
    if not made:
        raise RuntimeError(f"verify {suite.name}: there is no record yet; run python -m alr.sweep "
                           f"data/suites/{suite.name}.toml")
    if not there:
        raise RuntimeError(f"verify {suite.name}: all of its records were made by code that has changed since "
                           f"(data/{archive.ARCHIVE.name}); today's would not repeat them.")
    job = random.Random(seed).choice(there)
    old = [json.loads(line) for line in verify_digest(job.path(data))]
    with tempfile.TemporaryDirectory() as folder:
        new = [json.loads(line) for line in run(suite, job, data, Path(folder), quiet=False)]
    same = all(old[0].get(k) == new[0].get(k) for k in ("processor", "torch", "threads", "device"))
    first = next(((a, key, b[key]) for a, b in zip(old, new, strict=True)
                  for key in sorted(a.keys() - NOT_COMPARED - {"alr", "python"})
                  if not agrees(key, a[key], b[key])), None) if same else None
    if same and first is None:
        return f"{job.name}: the same, bit for bit, in {len(old)} lines"
    if same and not rounding(first[0][first[1]], first[2]):
        line, key, now = first
        raise RuntimeError(f"verify {suite.name}: {job.name}, line {line['kind']} {line.get('step', '')}: {key} was "
                           f"{line[key]!r} and is {now!r} on the same kind of machine.")
    where = f"differs first in rounding ({first[1]} in line {first[0]['kind']} {first[0].get('step', '')}), on a " \
        "processor of the same name" if same else "on another machine"
    gap = abs(old[-1]["val_loss"] - new[-1]["val_loss"])
    if not gap <= tolerance:
        raise RuntimeError(f"verify {suite.name}: {job.name}: val_loss was {old[-1]['val_loss']:.4f} and is "
                           f"{new[-1]['val_loss']:.4f}, more than {tolerance} apart; {where}.")
    return f"{job.name}: val_loss within {gap:.4f} of the record; {where} (tolerance {tolerance})"


def rounding(was: object, now: object) -> bool:
    """Do two numbers differ by no more than sums in another order do in float32: 1e-5 of their size?  Processors of one
    name have unlike vector units, and torch chooses its sums by them."""
    return isinstance(was, float) and isinstance(now, float) and math.isclose(was, now, rel_tol=1e-5)


def agrees(key: str, was: object, now: object) -> bool:
    """Does a value of a record's line stand as it did?  Recipes count by value: what they have gained since stood at its
    default."""
    return was == now or key in ("recipe", "paced") and same_recipe(was, parse(now))


def at_least(least: int) -> Callable[[str], int]:
    """For argparse: a whole number that is not below `least`."""
    def number(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}; wanted a whole number of at least {least}")
        return int(text)
    return number


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 1 for what cannot be done or failed, 130 when interrupted."""
    listen()
    parser = argparse.ArgumentParser(prog="python -m alr.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("suite", help="a suite file, or the name of one in data/suites")
    parser.add_argument("--jobs", type=at_least(1), default=1,
                        help="processes at a time; cores over threads of a run make sense, --dry-run says how many that are")
    parser.add_argument("--limit", type=at_least(0), help="make at most this many runs")
    parser.add_argument("--only", action="append", default=[], metavar="ARM",
                        help="record this arm alone; may be repeated. One sweep at a time records a suite, whatever the arms: "
                        "a second one in the same checkout is refused, and --jobs makes several runs at a time")
    parser.add_argument("--dry-run", action="store_true", help="say what would run and for how long")
    parser.add_argument("--verify", action="store_true", help="run a random record again and compare")
    parser.add_argument("--pick", type=int, help="with --verify: seed of the random choice")
    args = parser.parse_args(argv)
    home = DATA / "suites"
    path = Path(args.suite) if args.suite.endswith(".toml") else home / f"{args.suite}.toml"
    try:
        suite = load(path)
        if (home / path.name).exists() and not path.samefile(home / path.name):
            raise ValueError(f"{path} is called like the project's own suite in {home}, whose records it would replace; "
                             "give the file another name.")
        if args.dry_run:
            print(dry_run(suite, DATA, args.only))
        elif args.verify:
            print(verify(suite, DATA, args.pick))
        else:
            if args.jobs > (most := sensible_jobs(suite)):
                print(f"sweep: --jobs {args.jobs} is more than this machine can use at once; {most} make sense.",
                      file=sys.stderr)
            made = sweep(suite, args.jobs, DATA, args.limit, args.only)
            print(f"{suite.name}: {made} runs recorded in {DATA / 'runs' / suite.name}")
    except KeyboardInterrupt:
        print("sweep: interrupted; what is recorded stays, the same command goes on.", file=sys.stderr)
        return 130
    except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 1
    return 0
