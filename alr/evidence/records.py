"""Recorded runs: JSONL logs in, tidy tables out.  No torch: a record outlives the machine that made it.

    r = runs("evolution")                   # every data/runs/evolution/*.jsonl, each checked against its digest
    r.ends, r.curves, r.steps, r.ranks, r.resizes, r.cuts, r.provenance
    leaderboard(r.ends)                     # one row per arm

A log is a `run` line (provenance), then `step`, `resize` and `epoch` lines, last an `end` line, whose digest is the
SHA-256 of the exact text of the lines before it, joined by newlines.  A committed record is a log that went through
`thin`; the figures of record stand in its `end` line, so there the digest takes in that line too, less itself.  This
catches accidents and quiet repairs, not forgers; anyone can compute a SHA-256.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from ..lab.log import digest
from .paths import RUNS
from .stats import mean

KEYS = ["suite", "run", "arm", "seed"]                  # open every table
COLUMNS = {                                             # what a table has even when it is empty
    "curves": ["epoch", "step", "train_loss", "val_loss", "rank_avg", "params_millions", "time_sec", "seconds"],
    "steps": ["step", "loss", "lr", "grad_norm", "tokens_per_s"],
    "ranks": ["epoch", "step", "layer", "role", "rank"],
    "resizes": ["step", "layer", "old", "new", "target", "error"],
    "cuts": ["layer", "k", "damage", "damage_fisher"],
    "ends": ["lr", "step", "train_loss", "val_loss", "val_bpb", "params_blocks", "seconds", "flops"],
    "provenance": ["recipe", "commit", "dirty", "torch", "device", "command", "started"],
}


NUMBER = (int, float)
RUN, END = {"recipe": str, "config": dict}, {"val_loss": NUMBER, "seconds": dict, "ranks": dict, "shapes": dict}
AGAIN = "Restore it (git checkout), or delete the file and record it again."


class RecordError(ValueError):
    """A log that cannot be trusted or understood: what is wrong, where, and what to do."""


# -------------------------------------------------------------------------------------------------- digests

def record_digest(lines: Sequence[str], end: dict) -> str:
    """The digest of a record: of all lines before the `end` line, and of that line without its digest."""
    return digest([*lines, json.dumps({k: v for k, v in end.items() if k != "digest"})])


def check(lines: Sequence[str], where: str = "log", complete: bool = False, record: bool = False) -> list[dict]:
    """The lines of a log, parsed, if they are what was written.

    RecordError for a line that is no JSON object with a `kind`, for a first line that is not `run`, for anything after
    `end`, for a digest that does not fit.  `complete` wants an `end` line; `record` the digest that `thin` writes.
    """
    parsed = []
    for i, line in enumerate(lines, 1):
        try:
            parsed.append(json.loads(line))
        except (json.JSONDecodeError, RecursionError) as e:
            raise RecordError(f"{where}, line {i}: not JSON ({e}); the run was cut off while writing, or the file was "
                              f"edited. {AGAIN}") from None
        if not isinstance(parsed[-1], dict) or "kind" not in parsed[-1]:
            raise RecordError(f"{where}, line {i}: no 'kind' in {line[:60]!r}; this is not a log of alr.train.")
    kinds = [p["kind"] for p in parsed]
    if kinds[:1] != ["run"] or "run" in kinds[1:]:
        raise RecordError(f"{where}: wanted one `run` line, the first; found lines of kind {kinds[:3]} ... "
                          "Without it nobody knows what was run.")
    if "end" not in kinds:
        if complete or record:
            raise RecordError(f"{where}: no `end` line, so the run did not finish; resume it, or delete the file and record "
                              "it again.")
        return parsed
    if kinds.index("end") != len(kinds) - 1:
        raise RecordError(f"{where}: line {kinds.index('end') + 1} is the `end`, but {len(kinds)} lines are there.")
    log, full, found = digest(lines[:-1]), record_digest(lines[:-1], parsed[-1]), parsed[-1].get("digest")
    if found not in (log, full):
        raise RecordError(f"{where} was changed after it was written: its `end` line says digest {str(found)[:12]}, "
                          f"its lines give {full[:12]} as a record ({log[:12]} as a log). {AGAIN}")
    if record and found != full:
        raise RecordError(f"{where}: the digest leaves out the `end` line; this is a log, or its `end` was edited. "
                          "A record is a log that went through records.thin.")
    return parsed


def thin(lines: Iterable[str], every: int = 10, window: int = 0) -> list[str]:
    """What a committed record keeps of a finished log: every line but most of the `step` lines.

    Of those it keeps the first, every `every`-th, the last, and all within `window` steps of a resize (for figures
    aligned at resizes).  What is kept is kept to the letter; the `end` line gets the digest of what is left.
    RecordError for a log that is unfinished or was edited: thinning does not launder.
    """
    if every < 1:
        raise ValueError(f"thin: every = {every}; wanted 1 (keep all) or more.")
    lines = [line.rstrip("\r\n") for line in lines]
    parsed = check(lines, "thin", complete=True)
    count = sum(p["kind"] == "step" for p in parsed)
    events = {p["step"] for p in parsed if p["kind"] == "resize"}
    kept, i = [], 0
    for line, p in zip(lines[:-1], parsed):
        if p["kind"] == "step":
            i += 1
            near = window and any(abs(p["step"] - e) <= window for e in events)
            if (i - 1) % every and i != count and not near:
                continue
        kept.append(line)
    return [*kept, json.dumps({**parsed[-1], "digest": record_digest(kept, parsed[-1])})]


def read(path: str | Path, record: bool = False) -> list[dict]:
    """The lines of one log file, checked and parsed.  FileNotFoundError, or RecordError as `check`."""
    return check(_lines(path, record), str(path), record=record)


def verify_digest(path: str | Path) -> list[str]:
    """The lines of one record as they stand in the file, checked."""
    lines = _lines(path, record=True)
    check(lines, str(path), record=True)
    return lines


def run_and_end(path: str | Path) -> tuple[dict, dict]:
    """The first and the last line of one record, parsed; the lines between are covered by the digest and not parsed.

    FileNotFoundError where there is none; RecordError for a file that is no record or was changed.
    """
    lines = _lines(path, record=True)
    try:
        run, end = json.loads(lines[0]), json.loads(lines[-1])
        if (run["kind"], end["kind"]) == ("run", "end") and end["digest"] == record_digest(lines[:-1], end):
            for line, wanted in ((run, RUN), (end, END)):
                for key, kind in wanted.items():
                    if not isinstance(line.get(key), kind):
                        raise RecordError(f"{path}: its `{line['kind']}` line says {key} {line.get(key)!r}; wanted "
                                          f"{'a number' if kind is NUMBER else kind.__name__}. {AGAIN}")
            return run, end
    except RecordError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    check(lines, str(path), record=True)                            # says what is wrong, and in which line
    raise RecordError(f"{path}: its first line is no `run`, or its last no `end`. {AGAIN}")


def _lines(path, record: bool = False) -> list[str]:
    if record and Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir():
        raise RecordError(f"{path}: a pipe or a device stands where a record belongs; remove it.")      # would be waited for
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise RecordError(f"{path}: not UTF-8 at byte {e.start}, so no log of alr.train. {AGAIN}") from None
    except IsADirectoryError:
        raise RecordError(f"{path}: a folder stands where a record belongs; remove it.") from None
    return text.rstrip("\n").split("\n") if text.strip() else []


# --------------------------------------------------------------------------------------------------- tables

@dataclass(frozen=True)
class Runs:
    """The runs of a suite (or one log) as tables; each opens with suite, run (file name), arm and seed."""

    suite: str
    curves: pd.DataFrame                # a row per epoch; `seconds` is time_sec summed so far
    steps: pd.DataFrame                 # a row per logged step: the loss of its batch, learning rate, gradient norm
    ranks: pd.DataFrame                 # a row per epoch and layer, in module order
    resizes: pd.DataFrame               # a row per rank change
    cuts: pd.DataFrame                  # a row per cut of a trial: what was predicted, and the rise of the loss
    ends: pd.DataFrame                  # a row per finished run: whole-split losses, params_*, seconds, flops, rank_*
    provenance: pd.DataFrame            # a row per run: the `run` line, nested keys with dots (config.lr, corpus.name)

    def of(self, **keys) -> Runs:
        """The runs with these values, e.g. of(arm="v10", seed=0) or of(arm=["v10", "alr"])."""
        def cut(table):
            for k, v in keys.items():
                table = table[table[k].isin(v) if isinstance(v, list) else table[k] == v]
            return table
        return replace(self, **{t: cut(getattr(self, t)) for t in COLUMNS})

    @property
    def arms(self) -> list[str]:
        """The arms, v2 before v10."""
        return sorted(self.provenance["arm"].unique(), key=natural)


def natural(name: str) -> list:
    """A sort key under which v2 comes before v10."""
    return [(0, int(t), "") if t.isdigit() else (1, 0, t) for t in re.split(r"(\d+)", str(name)) if t]


def flops(run: dict, resizes: Sequence[dict], end: dict) -> float:
    """FLOPs of the training steps, counted: 6 per token and parameter that multiplies, and 12 L T d per token for the
    attention scores of a GPT (forward and backward; Kaplan et al. 2020, sec. 2.1; Chowdhery et al. 2022, app. B).

    The size follows the resizes step by step; evaluation and adaptation are left out.  NaN when the lines do not tell:
    a log not made by alr.train, or one whose resizes do not lead from its first to its last size.
    """
    c = run.get("config", {})
    if not {"batch_size", "block_size", "d_model", "n_layers", "model", "tied"} <= c.keys() or "params" not in run:
        return math.nan
    # a tied head multiplies by the token embedding; then only the positions are looked up
    looked_up = c["block_size"] * c["d_model"] if c["tied"] else end["params"]["embedding"]
    attention = 12 * c["n_layers"] * c["block_size"] * c["d_model"] if c["model"] == "gpt" else 0
    size, total, before = run["params"]["total"], 0, 0
    for event in [*resizes, {"step": end["step"], "old": 0, "new": 0, "layer": None}]:
        tokens = (event["step"] - before) * c["batch_size"] * c["block_size"]
        total, before = total + tokens * (6 * (size - looked_up) + attention), event["step"]
        size += (event["new"] - event["old"]) * sum(end["shapes"].get(event["layer"], ()))
    return float(total) if size == end["params"]["total"] else math.nan


def flat(end: dict) -> dict:
    """An `end` line as one row: params -> params_*, seconds -> seconds_* and their sum without evaluation, `seconds`;
    ranks -> rank_mean, rank_min, rank_max (NaN for a dense model)."""
    row = {k: v for k, v in end.items() if not isinstance(v, dict | list) and k not in ("kind", "digest")}
    row |= {f"params_{k}": v for k, v in end["params"].items()} | {f"seconds_{k}": v for k, v in end["seconds"].items()}
    ranks = list(end["ranks"].values()) or [math.nan]
    return row | {"seconds": end["seconds"]["training"] + end["seconds"]["adaptation"],
                  "rank_mean": math.fsum(ranks) / len(ranks), "rank_min": min(ranks), "rank_max": max(ranks)}


def tables(logs: dict[str, list[dict]], suite: str) -> Runs:
    """Parsed logs by run name -> Runs."""
    rows: dict[str, list[dict]] = {t: [] for t in COLUMNS}
    for name, lines in logs.items():
        run, kinds = lines[0], {}
        for line in lines:
            kinds.setdefault(line["kind"], []).append({k: v for k, v in line.items() if k != "kind"})
        key = dict(zip(KEYS, (suite, name, run["name"], run["seed"])))
        seconds, layers = 0.0, list(lines[-1].get("ranks", {})) if lines[-1]["kind"] == "end" else []
        for e in kinds.get("epoch", []):
            seconds += e["time_sec"]
            ranks = e.pop("ranks")
            rows["curves"].append(key | e | {"seconds": seconds})
            names = layers or [f"layer {i}" for i in range(len(ranks))]         # only the `end` line knows names
            rows["ranks"] += [key | {"epoch": e["epoch"], "step": e["step"], "layer": layer,
                                     "role": layer.rsplit(".", 1)[-1], "rank": r}
                              for layer, r in zip(names, ranks, strict=True)]
        rows["steps"] += [key | s for s in kinds.get("step", [])]
        rows["resizes"] += [key | s for s in kinds.get("resize", [])]
        rows["cuts"] += [key | s for s in kinds.get("cut", [])]
        rows["ends"] += [key | {"lr": run.get("config", {}).get("lr"), "flops": flops(run, kinds.get("resize", []), e)}
                         | flat(e) for e in kinds.get("end", [])]
        nested = pd.json_normalize({k: v for k, v in run.items() if k not in ("kind", "seed")}).iloc[0]
        rows["provenance"].append(key | nested.to_dict())
    made = {}
    for t, columns in COLUMNS.items():
        found = list(dict.fromkeys(c for row in rows[t] for c in row))
        made[t] = pd.DataFrame(rows[t], columns=list(dict.fromkeys([*KEYS, *columns, *found])))
    return Runs(suite, **made)


def runs(name: str | Path, root: str | Path | None = None) -> Runs:
    """The records of a suite, by name (data/runs/NAME) or folder; or one log, which may still be running, by its path.

    FileNotFoundError with the list of suites when there is none of that name or it is empty; RecordError as `check`.
    In a suite every file must be a record: finished, and through `thin`.
    """
    path, root = Path(name), Path(root or RUNS)
    if path.suffix == ".jsonl":
        return tables({path.stem: read(path)}, path.parent.name)
    folder = path if path.is_absolute() or len(path.parts) > 1 else root / path
    files = sorted(folder.glob("*.jsonl"), key=lambda f: natural(f.stem))
    if not files:
        there = sorted({f.parent.name for f in folder.parent.glob("*/*.jsonl")}, key=natural)
        raise FileNotFoundError(f"runs: no records in {folder}; there are {', '.join(there) or 'none beside it'}. "
                                f"`make runs SUITE={folder.name}` records them.")
    return tables({f.stem: read(f, record=True) for f in files}, folder.name)


def merge(*suites: Runs) -> Runs:
    """Suites of one base configuration as one table each, to be compared.  RecordError where two share a run's name."""
    names = [name for s in suites for name in s.provenance["run"]]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecordError(f"merge: {' and '.join(s.suite for s in suites)} both have {twice[0]}; give the arms other names.")
    return Runs(", ".join(s.suite for s in suites),
                **{t: pd.concat([getattr(s, t) for s in suites], ignore_index=True) for t in COLUMNS})


# -------------------------------------------------------------------------------------------------- summaries

def one_per_seed(ends: pd.DataFrame) -> pd.DataFrame:
    """ends, if it has one run for every arm and seed.  RecordError otherwise: such a mean would mix settings."""
    for (arm, seed), group in ends.groupby(["arm", "seed"], sort=False):
        if len(group) > 1:
            raise RecordError(f"arm {arm!r} has {len(group)} runs at seed {seed}: {', '.join(group['run'])} (learning "
                              f"rates {', '.join(map(str, group['lr']))}). Keep one, by a rule fixed before the runs.")
    return ends


def leaderboard(ends: pd.DataFrame, columns: Sequence[str] = ("val_loss", "val_bpb", "params_blocks", "seconds"),
                method: str = "t") -> pd.DataFrame:
    """One row per arm, best first: n runs; of each column its mean and interval (column, column_low, column_high)."""
    rows = []
    for arm, group in one_per_seed(ends).groupby("arm", sort=False):
        row = {"arm": arm, "n": len(group)}
        for c in columns:
            m = mean(group[c], method)
            row |= {c: m.value, f"{c}_low": m.low, f"{c}_high": m.high}
        rows.append(row)
    table = pd.DataFrame(rows, columns=["arm", "n", *(f"{c}{end}" for c in columns for end in ("", "_low", "_high"))])
    table = table.astype({c: float for c in table.columns[2:]})
    return table.sort_values(columns[0], kind="stable", ignore_index=True)
