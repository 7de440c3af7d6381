"""What the book claims, checked against the records: data/claims.toml in, data/claims.json out.  No torch.

    python -m alr.claims                # compute every claim and write claims.json
    python -m alr.claims --check        # compute and compare; exit 1 when records and claims.json disagree
    python -m alr.claims --diff v0.1    # which values left the interval that they had at that tag or commit

What an entry of the register says stands in alr/evidence/register.py.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import pandas as pd

from . import mine
from .metrics import METRICS
from .paths import CLAIMS_JSON, CLAIMS_TOML, RUNS
from .records import Runs, merge, one_per_seed, runs
from .register import FAILS, HOLDS, OPEN, ClaimError, bar, bounds, judge, load, named, no_difference
from .stats import Interval, compare, mean, p_value

# ------------------------------------------------------------------------------------------------ computing

def digits(x: float | None) -> float | None:
    """x to 6 significant digits: the same on every machine."""
    return None if x is None else float(f"{x:.6g}") + 0.0


def _values(key, claim, suite, arm) -> pd.Series:
    """The metric of every run of an arm, by seed."""
    ends = one_per_seed(suite.of(arm=arm).ends)
    name = claim["metric"]
    if name in METRICS:
        try:
            found = [METRICS[name](suite.of(run=r), suite, **claim.get("with", {})) for r in ends["run"]]
        except TypeError as e:
            raise ClaimError(f"claim {key}: {e}; arguments of a metric go into with = {{...}}.") from None
    elif name in ends and pd.api.types.is_numeric_dtype(ends[name]):
        found = ends[name].tolist()
    else:
        raise ClaimError(f"claim {key}: metric {name!r} is neither a number in the `end` lines nor one of "
                         f"{', '.join(METRICS)}.")
    return pd.Series([float(x) for x in found], index=ends["seed"].tolist()).sort_index()


def compute_one(key: str, claim: dict, suite: Runs | None) -> dict:
    """One entry of claims.json: what was claimed, what the records say, and the verdict.  suite None: not recorded."""
    kind = "ratio of means" if claim.get("ratio") else "mean" if no_difference(claim) is None else "difference of means"
    source = ", ".join(f"data/runs/{name}" for name in named(claim))
    out = {"text": claim["text"], "value": None, "low": None, "high": None, "unit": claim["unit"], "n": 0, "p": None,
           "verdict": "not recorded", "source": source, "chapter": claim["chapter"], "format": claim.get("format", ".3f"),
           "seeds": [], "kind": kind,
           "rule": claim.get("rule"), "threshold": claim.get("threshold"), "note": ""}
    arms = claim.get("arms") or [claim["single"]]
    absent = [repr(arm) for arm in arms if suite is None or arm not in suite.arms]
    if absent:
        there = f"; there are {', '.join(suite.arms)}" if suite else ", nor of any other"
        return out | {"note": f"no records of {' and '.join(absent)}{there}"}
    sides, notes = [_values(key, claim, suite, arm) for arm in arms], []
    left_out = []
    if claim.get("paired"):
        common = sides[0].index.intersection(sides[1].index)
        left_out = sorted(set(sides[0].index) ^ set(sides[1].index))
        sides = [s.loc[common] for s in sides]
    elif "single" in claim and no_difference(claim) is not None:    # over_...: NaN where the others have no run at a seed
        left_out = sorted(set(sides[0].index[sides[0].isna()]))
        sides = [sides[0].dropna()]
    notes += [f"unpaired seeds left out: {', '.join(map(str, left_out))}"] * bool(left_out)
    used = suite.provenance[suite.provenance["arm"].isin(arms)]
    seeds = sorted({int(seed) for side in sides for seed in side.index})
    out |= {"seeds": seeds, "source": _source(out["source"], used, arms)}
    bad = [f"{arm} at seed {s}" for arm, side in zip(arms, sides) for s, x in side.items()
           if not (math.isfinite(x) and (x > 0 or not claim.get("ratio")))]
    if bad or any(side.empty for side in sides):
        notes.append(f"no finite{' positive' * bool(claim.get('ratio'))} {claim['metric']}: {', '.join(bad)}" if bad
                     else "the arms share no seed")
        out["n"] = min(map(len, sides))
    else:
        found = _interval([side.tolist() for side in sides], claim)
        out |= {k: digits(v) for k, v in zip(("value", "low", "high"), found)} | {"n": found.n}
        if "rule" in claim and claim.get("interval", "t") == "t":
            out["p"] = digits(_p([side.tolist() for side in sides], claim))
    verdict = "figure"
    if "rule" in claim:
        verdict = judge(out["low"], out["high"], claim["rule"], claim["threshold"], key, no_difference(claim))
        if verdict == OPEN and out["low"] is not None:
            notes += _wide(out["low"], out["high"], claim)
    return out | {"verdict": verdict, "note": "; ".join(notes)}


def _interval(sides, claim) -> Interval:
    method = claim.get("interval", "t")
    if len(sides) == 1:
        return mean(sides[0], method)
    if not claim.get("ratio"):
        return compare(*sides, paired=claim["paired"], method=method)
    logs = compare(*([math.log(x) for x in side] for side in sides), paired=claim["paired"], method=method)
    return Interval(*(None if x is None else math.exp(x) for x in logs[:3]), logs.n)


def _wide(low: float, high: float, claim: dict) -> list[str]:
    """What to say of an open claim whose interval turned out wider than its bar is high."""
    if claim.get("ratio"):
        low, high = math.log(low), math.log(high)
    half, needed = (high - low) / 2, bar(claim)
    return [f"underpowered: half width {half:.2g}, bar {needed:.2g}"] * (0 < needed < half)


def _p(sides, claim) -> float | None:
    """How sure the claim is (see `stats.p_value`), from the values of its one or two arms."""
    ends = bounds("", claim["rule"], claim["threshold"])[:2]
    if claim.get("ratio"):
        sides = [[math.log(x) for x in side] for side in sides]
        ends = tuple(math.log(x) if x > 0 else -math.inf for x in ends)
    if claim.get("paired"):
        sides = [[a - b for a, b in zip(*sides, strict=True)]]
    return p_value(sides[0], sides[1] if len(sides) > 1 else None, *ends)


def _source(folder, used, arms) -> str:
    """Where a number comes from, for a tooltip: folder, arms, commits, torch, device."""
    def all_of(column):
        return ", ".join(sorted({str(x) for x in used[column]}))
    dirty = " with local changes" if used["dirty"].fillna(True).astype(bool).any() else ""
    commits = ", ".join(sorted({str(c or "unknown")[:7] for c in used["commit"]}))
    return f"{folder}: {' and '.join(arms)}; commit {commits}{dirty}; torch {all_of('torch')}; {all_of('processor')}"


def compute(register: dict[str, dict], root: str | Path = RUNS) -> dict[str, dict]:
    """All claims, in the order of the register.  A suite without a folder of records gives "not recorded"."""
    suites: dict[tuple, Runs | None] = {}
    for names in dict.fromkeys(named(claim) for claim in register.values()):
        there = [runs(name, root) for name in names if any((Path(root) / name).glob("*.jsonl"))]
        suites[names] = merge(*there) if len(there) > 1 else there[0] if there else None
    return {key: compute_one(key, claim, suites[named(claim)]) for key, claim in register.items()}


def dumps(claims: dict[str, dict]) -> str:
    """The text of claims.json, in full: register order, strict JSON, a newline at the end."""
    return json.dumps(claims, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def phrase(claim: dict, unit: bool = False) -> str:
    """A value as prose prints it: '4.430 [4.401, 4.459]', in the claim's own format; its verdict where it has none.

    Tables, figures and the role {val} print a value by this function alone."""
    if claim["value"] is None:
        return claim["verdict"]
    found = Interval(claim["value"], claim["low"], claim["high"], claim["n"])
    return found.text(claim["format"], claim["unit"] if unit else "")


# ------------------------------------------------------------------------------------------------- showing

def condition(claim: dict) -> str:
    """The rule in words and signs: '< −0.03', 'within [0.9, 1.1]'; empty for a figure."""
    if claim["rule"] is None:
        return ""
    t = claim["threshold"]
    pair = t if isinstance(t, list) else [-t, t]
    ends = f"[{pair[0]:g}, {pair[1]:g}]" if claim["rule"] == "within" else f"{t:g}"
    return f"{claim['rule']} {ends}".replace("-", "−")


def read(path: str | Path = CLAIMS_JSON) -> dict[str, dict]:
    """claims.json.  FileNotFoundError that says how to make it."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} is not there; `python -m alr.claims` makes it.")
    return json.loads(Path(path).read_text(encoding="utf-8"))


def changes(old: dict[str, dict], new: dict[str, dict]) -> pd.DataFrame:
    """The claims that moved: value outside of the old interval, another verdict, new, or gone (key, old, new, why).

    A value without an old interval has moved when it is not the same number.
    """
    rows = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if a is None or b is None:
            why = "new" if a is None else "gone"
        elif a["value"] is None or b["value"] is None:
            why = "" if a["value"] is b["value"] else "recorded now" if a["value"] is None else "no longer recorded"
        elif a["low"] is None:
            why = "" if a["value"] == b["value"] else "another value, no old interval"
        else:
            why = "" if a["low"] <= b["value"] <= a["high"] else "left the old interval"
        if a and b and a["verdict"] != b["verdict"]:
            why = "; ".join(filter(None, [why, "another verdict"]))
        if why:
            rows.append({"key": key, **{k: "-" if c is None else f"{phrase(c, unit=True)}, {c['verdict']}"
                                        for k, c in (("old", a), ("new", b))}, "why": why})
    return pd.DataFrame(rows, columns=["key", "old", "new", "why"])


def at(revision: str, path: str | Path = CLAIMS_JSON) -> dict[str, dict]:
    """claims.json as it was at a tag or commit of its repository, verdicts in today's words.  ClaimError when git has none.

    Until 2026-11-26 a missed bar had one word, whether or not its gain was sure.
    """
    path = Path(path)
    if revision.startswith("-"):                        # git would read an option
        raise ClaimError(f"{revision!r} is no tag or commit.")
    shown = subprocess.run(["git", "show", f"{revision}:./{path.name}"], cwd=path.parent, capture_output=True)
    if shown.returncode:
        raise ClaimError(f"no {path.name} at {revision!r}: git says {shown.stderr.decode().strip()!r}. Wanted a tag or "
                         "a commit.")
    words = {"supported": HOLDS, "not supported": FAILS, "undecided": OPEN}
    old = json.loads(shown.stdout.decode())
    return {key: c | {"verdict": words.get(c["verdict"], c["verdict"])} for key, c in old.items()}


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    p = argparse.ArgumentParser(prog="python -m alr.claims", description=__doc__.split("\n")[0])
    p.add_argument("--check", action="store_true", help="compare with claims.json instead of writing it")
    p.add_argument("--diff", metavar="OLD", help="claims that left the interval they had at this tag or commit")
    p.add_argument("--mine", nargs="+", metavar="LOG", help="compare your own finished runs, one per seed, with a suite's")
    p.add_argument("--suite", help="with --mine: the suite to compare with, such as equal_shakespeare")
    p.add_argument("--metric", help="with --mine: val_loss if not said, or test_loss, val_bpb")
    p.add_argument("--register", type=Path, default=CLAIMS_TOML, help="claims.toml")
    p.add_argument("--runs", type=Path, default=RUNS, help="folder of the suites' records")
    p.add_argument("--out", type=Path, default=CLAIMS_JSON, help="claims.json")
    a = p.parse_args(args)
    try:
        return _run(a)
    except (ValueError, FileNotFoundError) as error:
        print(f"alr.claims: {error}", file=sys.stderr)
        return 1


def _run(a) -> int:
    if a.mine or a.suite or a.metric:
        if not (a.mine and a.suite):
            raise ValueError("--mine LOG ... and --suite NAME go together: your runs, and what they are compared with.")
        print(mine.report(a.mine, a.suite, a.runs, a.metric or "val_loss"))
        return 0
    if a.diff:
        moved = changes(at(a.diff, a.out), read(a.out))
        print(f"{len(moved)} claims moved since {a.diff}." if moved.empty else moved.to_string(index=False))
        return 0
    new = compute(load(a.register), a.runs)
    if a.check:
        return _check(new, a.out)
    a.out.write_text(dumps(new), encoding="utf-8")
    for key, claim in new.items():
        note = f"  ({claim['note']})" if claim["note"] else ""
        print(f"{claim['verdict']:>13}  {key}: {phrase(claim, unit=True)}{note}")
    return 0


def _check(new, path) -> int:
    old = read(path)
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key, {}), new.get(key, {})
        for field in dict.fromkeys([*a, *b]):
            if a.get(field) != b.get(field):
                print(f"{key}.{field}: {path.name} says {a.get(field)!r}, the records say {b.get(field)!r}")
    same = dumps(new) == path.read_text(encoding="utf-8")
    print(f"{len(new)} claims agree with the records." if same else
          f"{path.name} disagrees with the register and the records; `python -m alr.claims` rewrites it.")
    return int(not same)
