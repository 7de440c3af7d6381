"""A suite: which runs belong together, and by which rule a learning rate is chosen.  Read from TOML, no run in this file.

    about = "what is asked"
    seeds = [0, 1, 2]

    [base]                                   # fields of train.Config, for every arm
    corpus = "wikitext-2"
    lr = 1e-3

    [thin]                                   # optional: which step lines a record keeps, see records.thin
    every = 10
    window = 0

    [tune]                                   # optional: try these on the tune seeds, keep the lowest final val_loss
    seeds = [100]
    grid = { lr = [1e-3, 2e-3, 4e-3] }
    set = { epochs = 5 }                     # optional: shorter runs for choosing

    [[arms]]
    name = "uniform"
    recipe = "uniform"                       # a name or an expression, see recipes.parse
    ranks_from = "alr"                       # optional: ranks that another arm ended with, at the same seed ...
    ranks_how = "mean"                       # ... "same", "mean" (uniform, equal block parameters), "permuted" or "cut"
    set = { lr = 2e-3 }                      # optional: fields of train.Config for this arm alone
    tune = false                             # optional: leave this arm out of the tuning
    grid = { muon_lr = [0.01, 0.02] }        # optional: this arm's own grid; `set` may hold what goes with it
    seeds = [0, 1, 2]                        # optional: fewer seeds for this arm, some of the suite's
"""

from __future__ import annotations

import random
import tomllib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from .. import recipes
from ..adapt import Recipe
from ..control import Schedule
from ..lab.config import Config
from .paths import DATA
from .records import run_and_end

HOW = ("same", "mean", "permuted", "cut")


@dataclass(frozen=True)
class Arm:
    name: str
    recipe: str
    set: dict = field(default_factory=dict)
    ranks_from: str | None = None
    ranks_how: str = "same"
    tune: bool = True
    grid: dict | None = None
    seeds: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Tune:
    grid: dict
    seeds: tuple[int, ...] = (100,)
    set: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One run of a suite: everything that decides its record, before ranks of another arm are known."""

    suite: str
    arm: Arm
    config: Config
    tuned: str | None = None            # in a run for choosing: the field of Config that is chosen

    @property
    def tuning(self) -> bool:
        return self.tuned is not None

    @property
    def name(self) -> str:
        if not self.tuning:
            return f"{self.arm.name}.seed{self.config.seed}"
        return f"tune/{self.arm.name}.lr{getattr(self.config, self.tuned):g}.seed{self.config.seed}"

    def path(self, data: Path) -> Path:
        """Where its record lies; data: the project's folder data/."""
        return data / "runs" / self.suite / f"{self.name}.jsonl"


@dataclass(frozen=True)
class Suite:
    name: str
    about: str
    seeds: tuple[int, ...]
    base: dict
    arms: tuple[Arm, ...]
    tune: Tune | None = None
    thin: dict = field(default_factory=dict)

    def config(self, arm: Arm, seed: int, **more) -> Config:
        return Config(**{**self.base, **arm.set, **more, "recipe": arm.name, "seed": seed})

    def tuning_jobs(self) -> list[Job]:
        """Every run that is needed to choose: arms x grid x tune seeds."""
        if self.tune is None:
            return []
        jobs = []
        for arm in self.arms:
            key, values = self.grid(arm)
            jobs += [Job(self.name, arm, self.config(arm, seed, **self.tune.set, **{key: value}), tuned=key)
                     for value in values for seed in self.tune.seeds]
        return jobs

    def grid(self, arm: Arm) -> tuple[str, list]:
        """(field, values) that are tried for an arm; no values for one that is not tuned."""
        (key, values), = (arm.grid or self.tune.grid).items()
        return key, values if arm.tune else []

    def choose(self, data: Path) -> dict[str, dict]:
        """{arm: {field: value}} with the lowest mean final validation loss over the tune seeds; arms not yet tuned are
        left out.  The rule stands in the suite file, before any run."""
        chosen = {}
        if self.tune is None:
            return chosen
        for arm in self.arms:
            losses, (key, values) = {}, self.grid(arm)
            for job in self.tuning_jobs():
                if job.arm == arm and job.path(data).exists():
                    losses.setdefault(getattr(job.config, key), []).append(run_and_end(job.path(data))[1]["val_loss"])
            if values and len(losses) == len(values) and all(len(v) == len(self.tune.seeds) for v in losses.values()):
                chosen[arm.name] = {key: min(losses, key=lambda value: sum(losses[value]))}
        return chosen

    def jobs(self, data: Path) -> list[Job]:
        """The runs that count, arms whose ranks come from another arm last; only arms whose tuning is finished."""
        chosen = self.choose(data)
        ready = [arm for arm in self.arms if self.tune is None or not arm.tune or arm.name in chosen]
        ready.sort(key=lambda arm: arm.ranks_from is not None)
        return [Job(self.name, arm, self.config(arm, seed, **chosen.get(arm.name, {})))
                for seed in self.seeds for arm in ready if arm.seeds is None or seed in arm.seeds]

    def recipe(self, job: Job, data: Path) -> Recipe:
        """The job's recipe as a value; reads the other arm's record where ranks come from one.  FileNotFoundError if it
        is not there yet."""
        recipe = recipes.parse(job.arm.recipe)
        if job.arm.ranks_from is None:
            return recipe
        source = replace(job, arm=next(a for a in self.arms if a.name == job.arm.ranks_from), tuned=None)
        if job.tuning:                                                  # the tuned arm borrows the first seed's ranks
            source = replace(source, config=replace(source.config, seed=self.seeds[0]))
        ranks = borrowed(run_and_end(source.path(data))[1], job.arm.ranks_how, job.config)
        if job.arm.ranks_how != "cut":
            return replace(recipe, rank=ranks)
        e = job.config.steps_per_epoch                                  # the first epoch's end after a third of the run
        return replace(recipe, control=Schedule(path=((e * -(-job.config.epochs // 3), ranks),)), every=e, epoch=e)


def borrowed(end: dict, how: str, config: Config) -> dict[str, int]:
    """Ranks to hold from step 0, from another run's `end` line.

    "same": its final ranks.  "mean": one rank for all layers, the one whose block parameters come closest to its own.
    "permuted": its final ranks, shuffled by the seed among layers of one shape, so that the size stays exactly the same.
    "cut": its final ranks as they are; `Suite.recipe` makes them one cut after a third of the run.
    """
    ranks, sizes = end["ranks"], {name: tuple(s) for name, s in end["shapes"].items()}
    if how in ("same", "cut"):
        return dict(ranks)
    if how == "mean":
        total = sum(r * sum(sizes[name]) for name, r in ranks.items())
        k = max(1, round(total / sum(sum(s) for s in sizes.values())))
        return {name: min(k, *sizes[name]) for name in ranks}
    rng, out = random.Random(config.seed), {}
    for shape in sorted(set(sizes.values())):
        names = [n for n in ranks if sizes[n] == shape]
        shuffled = [ranks[n] for n in names]
        rng.shuffle(shuffled)
        out |= dict(zip(names, shuffled))
    return {name: out[name] for name in ranks}


def load(path: str | Path) -> Suite:
    """A suite file, checked whole before any run: ValueError says which key of which arm is wrong and what is known."""
    path = Path(path)
    if not path.exists():
        known = sorted(p.stem for p in (DATA / "suites").glob("*.toml"))
        raise ValueError(f"suite {str(path)!r} is not there; there are {', '.join(known) or 'none'} in {DATA / 'suites'}.")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    _known(raw, {"about", "seeds", "base", "tune", "thin", "arms"}, f"{path}")
    _known(raw.get("thin", {}), {"every", "window"}, f"{path}: [thin]")
    config_keys = {f.name for f in fields(Config)}
    _known(raw.get("base", {}), config_keys, f"{path}: [base]")
    if not raw.get("arms") or not raw.get("seeds"):
        raise ValueError(f"{path}: a suite needs seeds = [...] and at least one [[arms]].")
    arms = []
    for entry in raw["arms"]:
        where = f"{path}: arm {entry.get('name', '(no name)')!r}"
        _known(entry, {f.name for f in fields(Arm)}, where)
        _known(entry.get("set", {}), config_keys, f"{where}, set")
        if "grid" in entry:
            _known(entry["grid"], config_keys, f"{where}, grid")
        if "name" not in entry or "recipe" not in entry:
            raise ValueError(f"{where}: an arm needs a name and a recipe.")
        try:
            recipes.parse(entry["recipe"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if not set(entry.get("seeds", ())) <= set(raw["seeds"]):
            raise ValueError(f"{where}: seeds {entry['seeds']} are not all among the suite's, {raw['seeds']}.")
        arms.append(Arm(**{k: tuple(v) if k == "seeds" else v for k, v in entry.items()}))
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two arms share a name; each needs its own.")
    for arm in arms:
        if arm.ranks_from is not None and arm.ranks_from not in names:
            raise ValueError(f"{path}: arm {arm.name!r} takes ranks from {arm.ranks_from!r}; arms are {', '.join(names)}.")
        if arm.ranks_how not in HOW:
            raise ValueError(f"{path}: arm {arm.name!r}: ranks_how is {arm.ranks_how!r}; it is one of {', '.join(HOW)}.")
    tune = None
    if "tune" in raw:
        _known(raw["tune"], {"grid", "seeds", "set"}, f"{path}: [tune]")
        _known(raw["tune"]["grid"], config_keys, f"{path}: [tune] grid")
        if len(raw["tune"]["grid"]) != 1:
            raise ValueError(f"{path}: [tune] grid names {len(raw['tune']['grid'])} fields; one is tuned at a time.")
        tune = Tune(**{k: tuple(v) if k == "seeds" else v for k, v in raw["tune"].items()})
    return Suite(path.stem, raw.get("about", ""), tuple(raw["seeds"]), raw.get("base", {}), tuple(arms), tune,
                 raw.get("thin", {}))


def _known(given: dict, allowed: set[str], where: str) -> None:
    for key in given:
        if key not in allowed:
            raise ValueError(f"{where}: key {key!r} is not known; there are {', '.join(sorted(allowed))}.")
