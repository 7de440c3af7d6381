"""A suite: which runs belong together, and by which rule a learning rate is chosen.  Read from TOML, no run in this file.

    about = "what is asked"
    seeds = [0, 1, 2]

    [base]                                   # fields of train.Config, for every arm
    corpus = "wikitext-2"
    lr = 1e-3

    [thin]                                   # optional: which step lines a record keeps, see records.thin
    every = 10
    window = 0

    [trial]                                  # optional: after each run, cut every layer to these ranks and look at the loss
    ranks = [2, 4, 8]
    tokens = 5_000                           # of the validation text

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

import math
import random
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from .. import recipes
from ..adapt import Recipe
from ..control import Schedule
from ..lab.config import PLACES, Config
from .paths import DATA
from .records import run_and_end

# what a suite may set: not what the sweep decides for every run
SETTINGS = {f.name for f in fields(Config)} - {"recipe", "seed"} - set(PLACES) | {"data_dir"}
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
    trial: dict | None = None           # what `lab.damage.trial` is called with

    def config(self, arm: Arm, seed: int, **more) -> Config:
        return Config(**{**self.base, **arm.set, **more, "recipe": arm.name, "seed": seed})

    def tuning_jobs(self, arms: Sequence[Arm] | None = None) -> list[Job]:
        """Every run that is needed to choose: arms (all if not said) x grid x tune seeds."""
        if self.tune is None:
            return []
        jobs = []
        for arm in self.arms if arms is None else arms:
            key, values = self.grid(arm)
            jobs += [Job(self.name, arm, self.config(arm, seed, **{**self.tune.set, key: value}), tuned=key)
                     for value in values for seed in self.tune.seeds]
        return jobs

    def grid(self, arm: Arm) -> tuple[str, list]:
        """(field, values) that are tried for an arm; no values for one that is not tuned."""
        (key, values), = (arm.grid or self.tune.grid).items()
        return key, values if arm.tune else []

    def chosen(self, arm: Arm, data: Path) -> dict | None:
        """The tuned field of one arm and the value of the lowest mean final val_loss; None until all of its grid is there.

        A value whose run diverged has the loss inf.  ValueError when all of them did.
        """
        if self.tune is None or not arm.tune:
            return {}
        losses, (key, values) = {}, self.grid(arm)
        for job in self.tuning_jobs([arm]):
            if job.path(data).exists():
                run, end = run_and_end(job.path(data))
                if run["config"].get(key) == getattr(job.config, key):      # else another run's, under this one's name
                    losses.setdefault(getattr(job.config, key), []).append(end["val_loss"])
        if len(losses) < len(values) or any(len(found) < len(self.tune.seeds) for found in losses.values()):
            return None
        best = min(losses, key=lambda value: sum(losses[value]))
        if not sum(losses[best]) < math.inf:
            raise ValueError(f"suite {self.name}, arm {arm.name!r}: every {key} of {values} diverged; write lower ones.")
        return {key: best}

    def choose(self, data: Path) -> dict[str, dict]:
        """The field and value that the rule picked, by arm, where all tuning runs of that arm are recorded."""
        found = {arm.name: self.chosen(arm, data) for arm in self.arms}
        return {name: value for name, value in found.items() if value}

    def jobs(self, data: Path, values: Mapping[str, dict | None] | None = None) -> list[Job]:
        """The runs that count, arms whose ranks come from another arm last; only arms whose tuning is finished.

        values: what `chosen` has said, by arm, of these arms alone; it is asked of all if not said.
        """
        if values is None:
            values = {arm.name: self.chosen(arm, data) for arm in self.arms}
        ready = [arm for arm in self.arms if values.get(arm.name) is not None]
        ready.sort(key=lambda arm: arm.ranks_from is not None)
        return [Job(self.name, arm, self.config(arm, seed, **values[arm.name]))
                for seed in self.seeds for arm in ready if seed in self.seeds_of(arm)]

    def seeds_of(self, arm: Arm) -> tuple[int, ...]:
        return self.seeds if arm.seeds is None else arm.seeds

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
    if not path.is_file():
        known = sorted(p.stem for p in (DATA / "suites").glob("*.toml"))
        raise ValueError(f"suite {str(path)!r} is not there; there are {', '.join(known) or 'none'} in {DATA / 'suites'}.")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}.") from None
    _known(raw, {"about", "seeds", "base", "tune", "thin", "trial", "arms"}, f"{path}")
    base, thin = _table(raw, "base", SETTINGS, f"{path}: [base]"), _table(raw, "thin", {"every", "window"}, f"{path}: [thin]")
    for key, least in (("every", 1), ("window", 0)):
        if key in thin and not (_whole(thin[key]) and thin[key] >= least):
            raise ValueError(f"{path}: [thin] {key} is {thin[key]!r}; wanted a whole number of at least {least}.")
    trial = _table(raw, "trial", {"ranks", "tokens"}, f"{path}: [trial]") if "trial" in raw else None
    if trial is not None:
        ranks = trial.get("ranks")
        if not (isinstance(ranks, list) and ranks and all(_whole(k) and k >= 1 for k in ranks)):
            raise ValueError(f"{path}: [trial] ranks is {ranks!r}; wanted a list of whole numbers of at least 1.")
        if not (_whole(trial.get("tokens")) and trial["tokens"] >= 2):
            raise ValueError(f"{path}: [trial] tokens is {trial.get('tokens')!r}; wanted a whole number of at least 2.")
    if not isinstance(raw.get("about", ""), str):
        raise ValueError(f"{path}: about is {raw['about']!r}; wanted a text.")
    if not raw.get("arms") or not raw.get("seeds"):
        raise ValueError(f"{path}: a suite needs seeds = [...] and at least one [[arms]].")
    if not isinstance(raw["arms"], list) or not all(isinstance(entry, dict) for entry in raw["arms"]):
        raise ValueError(f"{path}: arms is no list of tables; write [[arms]] above each arm.")
    seeds = _seeds(raw["seeds"], f"{path}: seeds")
    tune = _tune(raw, path)
    arms = tuple(_arm(entry, seeds, tune, path) for entry in raw["arms"])
    _check_sources(arms, path)
    _check_name(path.stem, f"{path}: suite {path.stem!r}")
    suite = Suite(path.stem, raw.get("about", ""), seeds, base, arms, tune, thin, trial)
    _check_configs(suite, path)
    return suite


def _arm(entry: dict, seeds: tuple[int, ...], tune: Tune | None, path: Path) -> Arm:
    where = f"{path}: arm {entry.get('name', '(no name)')!r}"
    _known(entry, {f.name for f in fields(Arm)}, where)
    for key in ("name", "recipe", "ranks_from", "ranks_how"):
        if not isinstance(entry.get(key, ""), str):
            raise ValueError(f"{where}: {key} is {entry[key]!r}; wanted a text.")
    if "name" not in entry or "recipe" not in entry:
        raise ValueError(f"{where}: an arm needs a name and a recipe.")
    _check_name(entry["name"], where)
    try:
        recipes.parse(entry["recipe"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    _table(entry, "set", SETTINGS, f"{where}, set")
    if not isinstance(entry.get("tune", True), bool):
        raise ValueError(f"{where}: tune is {entry['tune']!r}; wanted true or false.")
    if "grid" in entry:
        _check_grid(entry["grid"], f"{where}, grid")
        if tune is None:
            raise ValueError(f"{where}: a grid, but the suite has no [tune] to say on which seeds.")
    if entry.get("ranks_how", "same") not in HOW:
        raise ValueError(f"{where}: ranks_how is {entry['ranks_how']!r}; it is one of {', '.join(HOW)}.")
    if "seeds" in entry:
        mine = _seeds(entry["seeds"], f"{where}: seeds")
        if not set(mine) <= set(seeds):
            raise ValueError(f"{where}: seeds {entry['seeds']} are not all among the suite's, {list(seeds)}.")
        entry = {**entry, "seeds": mine}
    return Arm(**entry)


def _tune(raw: dict, path: Path) -> Tune | None:
    if "tune" not in raw:
        return None
    where, given = f"{path}: [tune]", _table(raw, "tune", {"grid", "seeds", "set"}, f"{path}: [tune]")
    if "grid" not in given:
        raise ValueError(f"{where}: no grid = {{ lr = [...] }}, the values that are tried.")
    _check_grid(given["grid"], f"{where} grid")
    _table(given, "set", SETTINGS, f"{where} set")
    return Tune(**{**given, **({"seeds": _seeds(given["seeds"], f"{where}: seeds")} if "seeds" in given else {})})


def _check_grid(grid: object, where: str) -> None:
    """One field, and several numbers for it that have different names in a record's file name."""
    if not isinstance(grid, dict) or len(grid) != 1:
        raise ValueError(f"{where}: wanted one field and its values, {{ lr = [1e-3, 2e-3] }}; one is tuned at a time.")
    _known(grid, SETTINGS, where)
    (key, values), = grid.items()
    if not isinstance(values, list) or not values or not all(
            isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= 1e300 for x in values):
        raise ValueError(f"{where}: {key} = {values!r}; wanted a list of numbers.")
    names = [f"{x:g}" for x in values]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{where}: {key} has {twice[0]} twice.")


def _check_name(name: str, where: str) -> None:
    """A suite's name becomes the name of a folder, an arm's that of files in it."""
    if not name.strip() or name.startswith(".") or set(name) & set("/\\") or not name.isprintable() or (
            len(name.encode(errors="replace")) > 200):
        raise ValueError(f"{where}: the name becomes a file's; wanted 1 to 200 bytes, no slash or backslash, no dot at its "
                         "beginning, nothing that cannot be printed.")


def _check_sources(arms: Sequence[Arm], path: Path) -> None:
    """Do arms that take ranks from another arm get any?"""
    by_name = {arm.name: arm for arm in arms}
    lower = [arm.name.lower() for arm in arms]
    if len(by_name) < len(arms) or len(set(lower)) < len(arms):
        raise ValueError(f"{path}: two arms share a name, but for small and capital letters; each needs its own.")
    for arm in arms:
        if arm.ranks_from is None:
            continue
        where = f"{path}: arm {arm.name!r} takes ranks from {arm.ranks_from!r}"
        if arm.ranks_from not in by_name:
            raise ValueError(f"{where}; arms are {', '.join(by_name)}.")
        circle = [arm.name]
        while (source := by_name[circle[-1]].ranks_from) in by_name:
            if source in circle:
                raise ValueError(f"{where}, which goes round in a circle: {' <- '.join([*circle, source])}.")
            circle.append(source)
        if recipes.parse(by_name[arm.ranks_from].recipe).rank is None:
            raise ValueError(f"{where}, which is dense and has none.")


def _check_configs(suite: Suite, path: Path) -> None:
    """Can every run's settings be had?  Each arm at one seed, and each value of its grid."""
    for arm in suite.arms:
        try:
            suite.config(arm, suite.seeds[0])
            if suite.tune is not None:
                key, values = suite.grid(arm)
                for value in values:
                    suite.config(arm, suite.tune.seeds[0], **{**suite.tune.set, key: value})
        except ValueError as error:
            raise ValueError(f"{path}: arm {arm.name!r}: {error}") from None


def _whole(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _seeds(given: object, where: str) -> tuple[int, ...]:
    if not isinstance(given, list) or not given or not all(_whole(x) and 0 <= x < 2**63 for x in given):
        raise ValueError(f"{where} = {given!r}; wanted a list of whole numbers, [0, 1, 2].")
    if len(set(given)) < len(given):
        raise ValueError(f"{where} = {given}; each seed once.")
    return tuple(given)


def _table(given: dict, key: str, allowed: Collection[str], where: str) -> dict:
    table = given.get(key, {})
    if not isinstance(table, dict):
        raise ValueError(f"{where} is {table!r}; wanted a table.")
    _known(table, allowed, where)
    return table


def _known(given: dict, allowed: Collection[str], where: str) -> None:
    for key in given:
        if key not in allowed:
            raise ValueError(f"{where}: key {key!r} is not known; there are {', '.join(sorted(allowed))}.")
