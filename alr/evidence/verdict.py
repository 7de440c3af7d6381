"""A claim's trial as a box for a page: what was claimed, what the runs say, the verdict, how many runs, where they lie.

    Verdict("Once ranks stabilise, the loss drops.", [Finding("no drop without adaptation", gap, ">", 1.0)], 12, "data/runs/leak")

The words come from `register.judge`: supported only when the whole interval obeys the rule.  No torch.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Sequence

from .claims import VERDICTS
from .register import judge
from .stats import Interval


@dataclass(frozen=True)
class Finding:
    """What would have to be true if the claim were: a value with its interval, and the rule it has to obey."""

    says: str                           # in words, ending without a full stop
    value: Interval                     # from stats.mean or stats.compare
    rule: str                           # "<", ">" or "within", see alr.register
    threshold: float | list[float]
    unit: str = ""
    format: str = ".2f"

    @property
    def verdict(self) -> str:
        return judge(self.value.low, self.value.high, self.rule, self.threshold, self.says)

    def __str__(self) -> str:
        """The sentence with its rule, value, interval and verdict."""
        value, low, high = (None if x is None else format(x, self.format).replace("-", "−") for x in self.value[:3])
        t, unit = self.threshold, f" {self.unit}" if self.unit else ""
        rule = f"within {t}" if isinstance(t, list) else f"within ±{t:g}" if self.rule == "within" else f"{self.rule} {t:g}"
        interval = "one run, no interval" if low is None else f"95 % interval {low} to {high}, n = {self.value.n}"
        return f"{self.says} (rule: {rule}{unit}): {value}{unit}, {interval}: {self.verdict}"


@dataclass(frozen=True)
class Verdict:
    """The box.  The verdict is that of its weakest finding: supported if all are, not supported if one is not, else
    undecided.  ValueError without a finding."""

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
        return "not supported" if "not supported" in words else "undecided" if "undecided" in words else "supported"

    def __str__(self) -> str:
        lines = [f"Claim: {self.claim}", *(f"  - {finding}" for finding in self.findings),
                 f"Verdict: {self.verdict}", f"Runs: {self.runs}; records: {self.records}"]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        def word(verdict):
            ink, tint = VERDICTS[verdict]
            return (f'<strong style="color: {ink}; background-color: {tint}; padding: 0 0.3em; white-space: nowrap">'
                    f"{verdict}</strong>")
        rows = "".join(f"<li>{html.escape(str(finding).removesuffix(': ' + finding.verdict))}: {word(finding.verdict)}</li>"
                       for finding in self.findings)
        return (f'<div class="admonition verdict"><p class="admonition-title">Verdict</p>'
                f"<p><em>Claim.</em> {html.escape(self.claim)}</p><p><em>If it were so:</em></p><ul>{rows}</ul>"
                f"<p><em>Verdict.</em> {word(self.verdict)}</p>"
                f"<p>{self.runs} runs; records: <code>{html.escape(self.records)}</code></p></div>")
