"""The register of claims, data/claims.toml: reading it, and judging an interval by a rule.  No torch, no records.

An entry; the rule and its threshold are fixed before the runs:

    [v10_against_uniform]
    text = "At equal size, v10 ends at a lower loss than a uniform rank."
    suite = "evolution"                 # data/runs/evolution; or several of one base, ["method", "adaptivity"]
    metric = "val_loss"                 # a column of `ends`, or a function in alr/evidence/metrics.py
    arms = ["v10", "uniform"]           # value = mean of v10 - uniform; or single = "v10": the mean of one arm
    paired = true                       # the arms share seeds, hence batches: interval of the differences, else Welch's
    rule = "<"                          # "<", ">", "within"; without a rule the entry is a figure, not a claim
    threshold = -0.03                   # for "within": t means [-t, t], or [low, high]
    chapter = "14_does_adaptivity_pay"
    unit = "nats per token"

    sd = 0.012                          # of one difference (of its logarithm, for a ratio), from an earlier suite
    n = 5                               # seeds per arm that are planned

sd and n are given together: `load` refuses a claim whose interval is expected to be wider than its bar is high (see `bar`).

Optional: format = ".3f";  interval = "bootstrap";  ratio = true (a / b instead of a - b, by logarithms);
with = {level = 4.5} (arguments of the metric's function).
"""

from __future__ import annotations

import math
import tomllib
from pathlib import Path

from .paths import CLAIMS_TOML
from .stats import METHODS, half_width

HOLDS, FAILS, OPEN = "holds", "fails", "open"
GAIN = "fails its bar, gain decided"    # the difference is smaller than the bar, and its sign is sure

NEEDED = {"text", "suite", "metric", "chapter", "unit"}
OPTIONAL = {"arms", "single", "paired", "ratio", "rule", "threshold", "format", "interval", "with", "sd", "n"}


class ClaimError(ValueError):
    """An entry of the register that cannot be read or computed."""


def load(path: str | Path = CLAIMS_TOML) -> dict[str, dict]:
    """The register, by key.  ClaimError for an entry with unknown, missing or contradicting fields."""
    try:
        register = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as e:
        raise ClaimError(f"{path}: {e}") from None
    for key, claim in register.items():
        if not isinstance(claim, dict):
            raise ClaimError(f"{path}: {key} stands outside of an entry; every claim is a table, [{key}].")
        unknown, missing = claim.keys() - NEEDED - OPTIONAL, NEEDED - claim.keys()
        if unknown or missing:
            raise ClaimError(f"{path}, claim {key}: unknown {', '.join(sorted(unknown)) or 'nothing'}; missing "
                             f"{', '.join(sorted(missing)) or 'nothing'}. Known: "
                             f"{', '.join(sorted(NEEDED | OPTIONAL))}.")
        arms = claim.get("arms")
        if ("single" in claim) == ("arms" in claim) or not (arms is None or isinstance(arms, list) and len(arms) == 2):
            raise ClaimError(f"{path}, claim {key}: wanted arms = [a, b] or single = a, one of them.")
        if "arms" in claim and not isinstance(claim.get("paired"), bool):
            raise ClaimError(f"{path}, claim {key}: two arms; say paired = true (shared seeds) or paired = false.")
        if "single" in claim and {"paired", "ratio"} & claim.keys():
            raise ClaimError(f"{path}, claim {key}: one arm is neither paired nor a ratio.")
        if ("rule" in claim) != ("threshold" in claim):
            raise ClaimError(f"{path}, claim {key}: a rule needs its threshold, and a threshold its rule.")
        if "rule" in claim:
            bounds(key, claim["rule"], claim["threshold"])
        _power(path, key, claim)
        try:
            format(1.0, claim.get("format", ".3f"))
        except (ValueError, TypeError):
            raise ClaimError(f"{path}, claim {key}: format {claim['format']!r} fits no number; e.g. '.3f'.") from None
        if claim.get("interval", "t") not in METHODS:
            raise ClaimError(f"{path}, claim {key}: interval {claim['interval']!r}; wanted {' or '.join(METHODS)}.")
    return register


def named(claim: dict) -> tuple[str, ...]:
    """The suites that a claim draws on."""
    return (claim["suite"],) if isinstance(claim["suite"], str) else tuple(claim["suite"])


def bounds(key: str, rule: str, threshold) -> tuple[float, float, bool]:
    """What a rule allows: (low, high, whether the ends are allowed).  ClaimError for a rule that makes no sense."""
    def number(x):
        return isinstance(x, (int, float)) and not isinstance(x, bool)
    if rule in ("<", ">") and number(threshold):
        return (-math.inf, threshold, False) if rule == "<" else (threshold, math.inf, False)
    pair = [-threshold, threshold] if number(threshold) else threshold
    if rule == "within" and isinstance(pair, list) and len(pair) == 2 and all(map(number, pair)) and pair[0] < pair[1]:
        return (*pair, True)
    raise ClaimError(f"claim {key}: rule {rule!r} with threshold {threshold!r}; wanted '<' or '>' with a number, or "
                     "'within' with a positive number t (for [-t, t]) or [low, high].")


def bar(claim: dict) -> float:
    """How far from no difference the threshold lies: its distance from 0, for a ratio that of its logarithm from 0; for
    "within" the distance of the nearer end.  A bar of 0 asks for a sign alone.

    A claim with a bar cannot be decided when the half width of its interval is larger than the bar: an effect that small
    is not told from none.
    """
    ends = [x for x in bounds("", claim["rule"], claim["threshold"])[:2] if math.isfinite(x)]
    if claim.get("ratio"):
        ends = [math.log(x) if x > 0 else math.inf for x in ends]
    return min(map(abs, ends))


def _power(path, key: str, claim: dict) -> None:
    """ClaimError where sd and n are not there together, or promise an interval that is wider than the bar is high."""
    if not {"sd", "n"} & claim.keys():
        return
    sd, n = claim.get("sd"), claim.get("n")
    if not ("rule" in claim and isinstance(sd, (int, float)) and sd > 0 and isinstance(n, int) and n >= 2):
        raise ClaimError(f"{path}, claim {key}: sd = {sd!r} and n = {n!r}; wanted both, a positive standard deviation of "
                         "one difference and two seeds or more, in a claim with a rule.")
    needed = bar(claim)
    if needed and half_width(sd, n) > needed:
        enough = next((k for k in range(n, 1000) if half_width(sd, k) <= needed), None)
        plan = f"n = {enough}" if enough else "a threshold further away"
        raise ClaimError(f"{path}, claim {key}: {n} seeds with sd = {sd:g} give an interval of half width "
                         f"{half_width(sd, n):.3g}, wider than the bar of {needed:.3g} is high: such runs cannot decide it. "
                         f"Wanted {plan}, or threshold = {'1' if claim.get('ratio') else '0'}.")


def judge(low: float | None, high: float | None, rule: str, threshold, key: str = "", null: float | None = None) -> str:
    """The verdict: HOLDS when the whole interval obeys the rule, FAILS when all of it breaks it, else OPEN.

    null: the value of no difference (0 for a difference, 1 for a ratio).  A bar may ask for more than a difference: where
    the interval misses such a bar and still lies on the claimed side of null, the verdict is GAIN.  A rule "within", or a
    value that is no comparison (null None), has no claimed side.
    """
    a, b, closed = bounds(key, rule, threshold)
    if low is None or high is None:
        return OPEN
    if closed:
        return HOLDS if a <= low and high <= b else FAILS if high < a or b < low else OPEN
    if a < low and high < b:
        return HOLDS
    if b <= low:                                                    # all of it above the bar of "<"
        return GAIN if null is not None and high < null else FAILS
    if high <= a:                                                   # all of it below the bar of ">"
        return GAIN if null is not None and low > null else FAILS
    return OPEN


def no_difference(claim: dict) -> float | None:
    """The value of a claim that would mean no difference between its arms: 0, for a ratio 1, for one arm None.

    Metrics named over_... are differences from other arms already (`metrics.over_best`).
    """
    if "single" in claim:
        return 0.0 if claim["metric"].startswith("over_") else None
    return 1.0 if claim.get("ratio") else 0.0
