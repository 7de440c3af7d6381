"""Laws of `alr.evidence.verdict`: the words are computed, the weakest finding decides, and a box says what it rests on."""

import re

import pytest

from alr.evidence import stats
from alr.evidence.markup import VERDICTS
from alr.evidence.register import FAILS, GAIN, HOLDS, OPEN
from alr.evidence.verdict import Finding, Verdict


def finding(values, rule=">", threshold=1.0, **more):
    return Finding("the gap is wide", stats.mean(values), rule, threshold, **more)


WIDE, NARROW, TORN, ONE = (finding(v) for v in ([3, 3.1, 3.2], [0.1, 0.2, 0.3], [0, 1, 2.5], [9]))


def test_the_weakest_finding_decides():
    assert [f.verdict for f in (WIDE, NARROW, TORN, ONE)] == ["holds", "fails", "open", "open"]
    def of(*findings):
        return Verdict("It pays.", findings, 3, "data/runs/x").verdict
    assert of(WIDE) == "holds" and of(WIDE, TORN) == of(ONE) == "open"
    assert of(WIDE, NARROW) == of(NARROW, TORN, ONE) == "fails"
    gain = finding([0.4, 0.5, 0.6], null=0.0)
    assert gain.verdict == of(gain) == of(gain, WIDE) == GAIN and {HOLDS, FAILS, OPEN} < set(VERDICTS)
    assert of(gain, TORN) == of(gain, NARROW) == "fails"
    with pytest.raises(ValueError, match="no findings"):
        of()


def test_a_finding_says_its_rule_value_and_interval():
    assert str(finding([-3, -3.1, -3.2], "<", -1, unit="nats")) == \
        "the gap is wide (rule: < -1 nats): −3.10 nats, 95 % interval −3.35 to −2.85, n = 3: holds"
    assert "one run, no interval: open" in str(ONE)
    assert "rule: within ±1" in str(finding([0.1, 0.2], "within", 1.0))
    assert "rule: within [0, 1]" in str(finding([0.1, 0.2], "within", [0, 1]))


def test_the_box_shows_all_of_it_and_escapes():
    box = Verdict("a < b & c", [WIDE, NARROW], 6, "data/runs/leak")
    for text in (str(box), box._repr_html_()):
        assert re.search(r"(?:Runs: |>)6\b", text)
        assert all(words in text for words in ("data/runs/leak", "the gap is wide", "fails"))
    assert "a &lt; b &amp; c" in box._repr_html_() and 'class="admonition' in box._repr_html_()
    assert VERDICTS["fails"][0] in box._repr_html_() and VERDICTS["holds"][0] in box._repr_html_()
