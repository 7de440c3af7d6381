"""Record a suite of runs: `python -m alr.sweep data/suites/NAME.toml` (`make runs SUITE=NAME`).

Skips what is recorded with the same configuration, runs the rest, and survives being cut off: a run writes to a file
that is not a record yet and becomes one, thinned, in a single rename at its end.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from ..lab import Config, train
from ..lab.data import corpus
from ..lab.optimizers import read_by
from ..recipes import parse
from .paths import DATA
from .records import run_and_end, thin, verify_digest
from .suite import Job, Suite, load

NOT_COMPARED = {"seconds", "tokens_per_s", "time_sec", "peak_memory_mb", "digest", "started", "commit", "dirty", "source",
                "command", "config", "resumed"}     # differ between two honest runs of the same thing


def configuration(job: Job) -> dict:
    """What of a Config decides a run's numbers, as a log has it: not the rate of an optimizer that is not used."""
    settings = json.loads(json.dumps(job.config.describe()))
    return {k: v for k, v in settings.items()
            if k not in ("device", "threads") and job.config.optimizer in (read_by(k) or [job.config.optimizer])}


def recorded(job: Job, recipe, data: Path) -> bool:
    """Is there a record of this very configuration?  An older one of the same name does not count."""
    path = job.path(data)
    if not path.exists():
        return False
    first, _ = run_and_end(path)
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
    """Make one run and its record; returns the record's path.  Nothing half written is ever at that path."""
    path = job.path(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".running-") as folder:
        log = Path(folder) / "log.jsonl"
        recipe = suite.recipe(job, data)
        train(replace(job.config, log_file=str(log)), recipe=recipe, quiet=quiet)
        small = Path(folder) / "record.jsonl"
        small.write_text("\n".join(thin(log.read_text(encoding="utf-8").splitlines(), **suite.thin)) + "\n", encoding="utf-8")
        os.replace(small, path)
    return path


def pending(suite: Suite, data: Path, only: Sequence[str] = ()) -> tuple[list[Job], list[Job]]:
    """(runs that can start now, runs that wait for another arm's ranks), of the arms in `only`, or of all."""
    known = [arm.name for arm in suite.arms]
    if unknown := set(only) - set(known):
        raise ValueError(f"suite {suite.name} has no arm {sorted(unknown)[0]!r}; it has {', '.join(known)}.")
    now, later = [], []
    for job in suite.tuning_jobs() + suite.jobs(data):
        if only and job.arm.name not in only:
            continue
        try:
            if not recorded(job, suite.recipe(job, data), data):
                now.append(job)
        except FileNotFoundError:
            later.append(job)
    return now, later


def seconds(suite: Suite, job: Job, data: Path) -> float | None:
    """How long a run will take: the mean of this arm's records, else of the suite's, else not known."""
    times = {}
    for path in (data / "runs" / suite.name).rglob("*.jsonl"):
        if path.parent.name.startswith(".running-"):                    # of a sweep that is at work
            continue
        end = run_and_end(path)[1]
        times.setdefault(path.name.split(".seed")[0].split(".lr")[0], []).append(sum(end["seconds"].values()))
    known = times.get(job.arm.name) or [t for ts in times.values() for t in ts]
    return sum(known) / len(known) if known else None


def sweep(suite: Suite, jobs: int = 1, data: Path = DATA, limit: int | None = None, only: Sequence[str] = ()) -> int:
    """Record what is missing; returns how many runs were made.  Waves: tuning, then the runs, then borrowed ranks.

    only: the names of the arms to record, for a suite that is shared out; all if empty.
    """
    check_corpus(suite)
    made = 0
    while True:
        now, later = pending(suite, data, only)
        if limit is not None:
            now = now[:max(0, limit - made)]
        if not now:
            if later and limit is None:
                names = ", ".join(sorted({job.arm.name for job in later}))
                raise RuntimeError(f"sweep {suite.name}: {names} wait for ranks of an arm that has no record.")
            return made
        bar = tqdm(total=len(now), desc=suite.name, unit="run", dynamic_ncols=True)
        if jobs == 1:
            for job in now:
                bar.set_postfix_str(job.name)
                record(suite, job, data, quiet=False)
                bar.update()
        else:
            with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
                for done in pool.map(_record, [(suite, job, data) for job in now]):
                    bar.set_postfix_str(done)
                    bar.update()
        bar.close()
        made += len(now)


def _record(args) -> str:
    suite, job, data = args
    return record(suite, job, data).stem


def check_corpus(suite: Suite) -> None:
    """Load every corpus that the suite names, before the first run."""
    for job in {(job.config.corpus, job.config.vocab_size, job.config.level, job.config.data_dir): job
                for job in suite.tuning_jobs() + [Job(suite.name, a, suite.config(a, 0)) for a in suite.arms]}.values():
        c = job.config
        corpus(c.data_file or c.corpus, data_dir=c.data_dir, level=c.level, vocab_size=c.vocab_size)


def dry_run(suite: Suite, data: Path = DATA, only: Sequence[str] = ()) -> str:
    """What would run, and for how long from what was measured so far."""
    now, later = pending(suite, data, only)
    times = [seconds(suite, job, data) for job in now + later]
    known = [t for t in times if t is not None]
    lines = [f"  {job.name:<44} {'?' if t is None else f'{t:6.0f} s'}"
             + (f"  (waits for {job.arm.ranks_from})" if job in later else "") for job, t in zip(now + later, times)]
    untuned = [a.name for a in suite.arms if suite.tune and a.tune and a.name not in suite.choose(data)]
    lines.append(f"{suite.name}: {len(now) + len(later)} runs to make"
                 + (f", about {sum(known) / 60:.0f} min in one process" if known else ", no time measured yet")
                 + (f"; then {len(suite.seeds)} seeds each of {', '.join(untuned)}, once tuned" if untuned else ""))
    return "\n".join(lines)


def verify(suite: Suite, data: Path = DATA, seed: int | None = None, tolerance: float = 0.05) -> str:
    """Run a random record of the suite again and compare: bit for bit on the same processor, torch and thread count,
    within `tolerance` nats of validation loss elsewhere (ours: float sums in another order, then 10^3 steps).

    Returns what was compared; RuntimeError when it differs.
    """
    there = [job for job in suite.jobs(data) + suite.tuning_jobs() if job.path(data).exists()]
    if not there:
        raise RuntimeError(f"verify {suite.name}: there is no record yet; run python -m alr.sweep "
                           f"data/suites/{suite.name}.toml")
    job = random.Random(seed).choice(there)
    old = [json.loads(line) for line in verify_digest(job.path(data))]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        train(replace(job.config, log_file=str(log)), recipe=suite.recipe(job, data))
        new = [json.loads(line) for line in thin(log.read_text(encoding="utf-8").splitlines(), **suite.thin)]
    same = all(old[0].get(k) == new[0].get(k) for k in ("processor", "torch", "threads", "device"))
    if same:
        for a, b in zip(old, new, strict=True):
            for key in a.keys() - NOT_COMPARED - {"alr", "python"}:
                if a[key] != b[key]:
                    raise RuntimeError(f"verify {suite.name}: {job.name}, line {a['kind']} {a.get('step', '')}: {key} was "
                                       f"{a[key]!r} and is {b[key]!r} on the same kind of machine.")
        return f"{job.name}: the same, bit for bit, in {len(old)} lines"
    gap = abs(old[-1]["val_loss"] - new[-1]["val_loss"])
    if not gap <= tolerance:
        raise RuntimeError(f"verify {suite.name}: {job.name}: val_loss was {old[-1]['val_loss']:.4f} and is "
                           f"{new[-1]['val_loss']:.4f}, more than {tolerance} apart on another machine.")
    return f"{job.name}: val_loss within {gap:.4f} of the record, on another machine (tolerance {tolerance})"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m alr.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("suite", help="a suite file, or the name of one in data/suites")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--limit", type=int, help="make at most this many runs")
    parser.add_argument("--only", action="append", default=[], metavar="ARM", help="record this arm alone; may be repeated")
    parser.add_argument("--dry-run", action="store_true", help="say what would run and for how long")
    parser.add_argument("--verify", action="store_true", help="run a random record again and compare")
    parser.add_argument("--pick", type=int, help="with --verify: seed of the random choice")
    args = parser.parse_args(argv)
    path = Path(args.suite) if args.suite.endswith(".toml") else DATA / "suites" / f"{args.suite}.toml"
    try:
        suite = load(path)
        if args.dry_run:
            print(dry_run(suite, only=args.only))
        elif args.verify:
            print(verify(suite, seed=args.pick))
        else:
            made = sweep(suite, args.jobs, limit=args.limit, only=args.only)
            print(f"{suite.name}: {made} runs recorded in {DATA / 'runs' / suite.name}")
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 1
    return 0
