"""A claim's trial as a box for a page: what was claimed, what the runs say, the verdict, how many runs, where they lie.

    Verdict("Once ranks stabilise, the loss drops.", [Finding("no drop without it", gap, ">", 1.0)], 12, "data/runs/leak")

The words come from `register.judge`: a finding holds only when the whole interval obeys the rule.  No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .markup import Html, pill, tag
from .register import FAILS, GAIN, HOLDS, OPEN, judge
from .stats import Interval


@dataclass(frozen=True)
class Finding:
    """What would have to be true if the claim were: a value with its interval, and the rule it has to obey."""

    says: str                           # in words, ending without a full stop
    value: Interval                     # from stats.mean or stats.compare
    rule: str                           # "<", ">" or "within", see alr.evidence.register
    threshold: float | list[float]
    unit: str = ""
    format: str = ".2f"
    null: float | None = None           # the value that means no difference, see `judge`; None: there is none

    @property
    def verdict(self) -> str:
        return judge(self.value.low, self.value.high, self.rule, self.threshold, self.says, self.null)

    def __str__(self) -> str:
        """The sentence with its rule, value, interval and verdict."""
        value, low, high = self.value.words(self.format)
        t, unit = self.threshold, f" {self.unit}" if self.unit else ""
        rule = f"within {t}" if isinstance(t, list) else f"within ±{t:g}" if self.rule == "within" else f"{self.rule} {t:g}"
        interval = "one run, no interval" if low is None else f"95 % interval {low} to {high}, n = {self.value.n}"
        return f"{self.says} (rule: {rule}{unit}): {value}{unit}, {interval}: {self.verdict}"


@dataclass(frozen=True)
class Verdict:
    """The box.  It holds if all findings hold, and fails if one fails; where none fails and one is open, it is open.

    A finding that fails its bar with a gain that is decided passes its verdict on where all others hold or are like it;
    beside an open one the box fails.  ValueError without a finding.
    """

    claim: str
    findings: Sequence[Finding]
    runs: int
    records: str                        # where they lie: data/runs/NAME, or "this page" for live runs

    def __post_init__(self):
        if not self.findings:
            raise ValueError("Verdict: no findings; a claim that asks nothing of the runs has no verdict.")

    @property
    def verdict(self) -> str:
        words = {finding.verdict for finding in self.findings}
        if FAILS in words or {GAIN, OPEN} <= words:
            return FAILS
        return GAIN if GAIN in words else OPEN if OPEN in words else HOLDS

    def __str__(self) -> str:
        lines = [f"Claim: {self.claim}", *(f"  - {finding}" for finding in self.findings),
                 f"Verdict: {self.verdict}", f"Runs: {self.runs}; records: {self.records}"]
        return "\n".join(lines)

    def _repr_html_(self) -> Html:
        rows = [tag("li", str(finding).removesuffix(f": {finding.verdict}"), ": ", pill(finding.verdict))
                for finding in self.findings]
        return tag("div", tag("p", "Verdict", class_="admonition-title"), tag("p", tag("em", "Claim."), " ", self.claim),
                   tag("p", tag("em", "If it were so:")), tag("ul", *rows),
                   tag("p", tag("em", "Verdict."), " ", pill(self.verdict)),
                   tag("p", self.runs, " runs; records: ", tag("code", self.records)), class_="admonition verdict")
