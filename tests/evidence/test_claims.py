"""Laws of `alr.evidence.claims`: verdicts on records with a known answer, and nothing that CI could not make again."""

import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
from scipy.stats import ttest_1samp, ttest_ind

from alr.evidence import claims, metrics
from alr.evidence.claims import ClaimError, changes, compute, condition, dumps, judge, load, main, phrase
from alr.evidence.metrics import shrink_after_drop
from alr.evidence.paths import ROOT
from alr.evidence.records import tables
from alr.evidence.register import GAIN

from synthetic import log, suite, write

BETTER = [4.10, 4.32, 4.21, 4.05]               # 0.20 below WORSE at every seed, give or take 0.01
WORSE = [4.31, 4.51, 4.41, 4.26]
DIFF = [a - b for a, b in zip(BETTER, WORSE)]
LONELY = [4.9]
CLAIM = {"text": "A sentence.", "suite": "toy", "metric": "val_loss", "arms": ["better", "worse"], "paired": True,
         "rule": "<", "threshold": 0.0, "chapter": "14", "unit": "nats"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    suite(folder / "toy", {"better": BETTER, "worse": WORSE, "lonely": LONELY, "dense": [4.0, 4.1]})
    return folder


def one(root, **changed):                        # None takes a field away
    claim = {k: v for k, v in {**CLAIM, **changed}.items() if v is not None}
    return compute({"key": claim}, root)["key"]


# --------------------------------------------------------------------------------------------------- verdicts

@pytest.mark.parametrize("rule, threshold, verdict", [
    ("<", 0.0, "holds"), ("<", -0.15, "holds"), ("<", -0.2, "open"), ("<", -0.25, GAIN),
    (">", 0.0, "fails"), (">", -0.25, "holds"), (">", -0.2, "open"),
    ("within", 0.25, "holds"), ("within", 0.2, "open"), ("within", 0.15, "fails"),
    ("within", [-0.22, -0.18], "holds"), ("within", [0.0, 0.1], "fails")])
def test_the_verdict_on_a_known_difference(root, rule, threshold, verdict):
    c = one(root, rule=rule, threshold=threshold)
    diff = [a - b for a, b in zip(BETTER, WORSE)]                               # -0.21 -0.19 -0.20 -0.21
    assert c["value"] == pytest.approx(sum(diff) / 4, abs=1e-6) and c["n"] == 4 and c["seeds"] == [0, 1, 2, 3]
    half = math.sqrt(sum((d - sum(diff) / 4) ** 2 for d in diff) / 3 / 4) * 3.18244631      # t table, 3 degrees
    assert (c["low"], c["high"]) == pytest.approx((c["value"] - half, c["value"] + half), abs=2e-6)
    assert c["verdict"] == verdict


@pytest.mark.parametrize("low, high, rule, threshold, null, verdict", [
    (-0.02, -0.01, "<", -0.03, 0.0, GAIN), (-0.02, 0.0, "<", -0.03, 0.0, "fails"), (-0.02, 0.01, "<", -0.03, 0.0, "fails"),
    (0.01, 0.02, "<", -0.03, 0.0, "fails"), (-0.04, -0.01, "<", -0.03, 0.0, "open"),
    (-0.05, -0.04, "<", -0.03, 0.0, "holds"),
    (0.01, 0.02, ">", 0.03, 0.0, GAIN), (-0.01, 0.02, ">", 0.03, 0.0, "fails"),
    (0.7, 0.9, "<", 0.6, 1.0, GAIN), (0.7, 1.1, "<", 0.6, 1.0, "fails"),
    (0.6, 0.7, "<", 0.5, 0.0, "fails"),                                 # a bar above zero: nothing was gained
    (0.1, 0.2, "<", 0.0, 0.0, "fails"), (0.01, 0.02, ">", 0.03, None, "fails"), (0.1, 0.2, "within", 0.05, 0.0, "fails")])
def test_a_missed_bar_says_whether_the_gain_is_decided(low, high, rule, threshold, null, verdict):
    assert judge(low, high, rule, threshold, null=null) == verdict


def test_a_difference_and_a_ratio_know_what_no_difference_is(root):
    assert one(root, threshold=-0.3)["verdict"] == GAIN                 # 0.20 lower, less than the bar
    assert one(root, ratio=True, threshold=0.9)["verdict"] == GAIN      # 0.953 times
    assert one(root, arms=["worse", "better"], threshold=-0.3)["verdict"] == "fails"
    assert one(root, arms=None, paired=None, single="better", rule=">", threshold=5)["verdict"] == "fails"


@pytest.mark.parametrize("changed, p", [
    ({}, ttest_1samp(DIFF, 0).pvalue), ({"threshold": -0.19}, ttest_1samp(DIFF, -0.19).pvalue),
    ({"rule": ">"}, 1.0), ({"paired": False}, ttest_ind(BETTER, WORSE, equal_var=False).pvalue),
    ({"rule": "within", "threshold": 0.25}, 2 * ttest_1samp(DIFF, -0.25, alternative="greater").pvalue),
    ({"ratio": True, "threshold": 1}, ttest_1samp([math.log(a / b) for a, b in zip(BETTER, WORSE)], 0).pvalue),
    ({"rule": None, "threshold": None}, None), ({"interval": "bootstrap"}, None), ({"arms": ["better", "better"]}, None)])
def test_a_claim_says_how_sure_it_is(root, changed, p):
    found = one(root, **changed)
    assert found["p"] == (None if p is None else pytest.approx(p, rel=1e-5))
    assert found["p"] is None or (found["p"] < 0.05) == (found["verdict"] == "holds")


def test_an_open_claim_says_that_its_bar_is_too_small_for_its_seeds(root):
    found = one(root, rule="<", threshold=-0.01, arms=["dense", "worse"])               # two seeds, -0.31 and -0.41
    assert found["verdict"] == "open" and found["note"] == ("unpaired seeds left out: 2, 3; "
                                                            "underpowered: half width 0.64, bar 0.01")
    assert "underpowered" not in one(root, rule="<", threshold=-0.2)["note"]                  # open, and narrow enough
    assert "underpowered" not in one(root, rule="<", threshold=0.0, arms=["dense", "worse"])["note"]
    assert "underpowered" not in one(root, rule=">", threshold=-0.001)["note"]                # decided all the same


@pytest.mark.parametrize("changed, refused", [
    ({"sd": 0.02, "n": 3}, "half width 0.0497, wider than the bar of 0.03 is high.*Wanted n = 5, or threshold = 0"),
    ({"sd": 0.02, "n": 5}, None), ({"sd": 0.02, "n": 3, "threshold": 0.0}, None),
    ({"sd": 0.02, "n": 3, "rule": "within", "threshold": [-0.03, 0.5]}, "bar of 0.03"),
    ({"sd": 0.02, "n": 3, "ratio": True, "threshold": 0.97}, "bar of 0.0305.*threshold = 1"),
    ({"sd": 0.02}, "n = None; wanted both"), ({"n": 3}, "sd = None"), ({"sd": 0.02, "n": 1}, "two seeds or more"),
    ({"sd": -1, "n": 3}, "positive"), ({"sd": 0.02, "n": 3, "rule": None, "threshold": None}, "with a rule")])
def test_a_bar_that_the_planned_seeds_cannot_reach_is_refused(tmp_path, changed, refused):
    claim = {k: v for k, v in {**CLAIM, "threshold": -0.03, **changed}.items() if v is not None}
    path = tmp_path / "claims.toml"
    path.write_text("[key]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in claim.items()), encoding="utf-8")
    if refused is None:
        assert list(load(path)) == ["key"]
    else:
        with pytest.raises(ClaimError, match=refused):
            load(path)


def test_pairing_decides_what_the_seeds_would_hide(root):
    pairs, loose = one(root, threshold=-0.1), one(root, threshold=-0.1, paired=False)
    assert pairs["value"] == loose["value"] and (pairs["verdict"], loose["verdict"]) == ("holds", "open")


def test_arms_of_two_suites_are_compared_by_seed(root, tmp_path):
    suite(tmp_path / "a", {"better": BETTER})
    suite(tmp_path / "b", {"worse": WORSE})
    both = one(tmp_path, suite=["a", "b"])
    assert {k: both[k] for k in ("value", "low", "high", "n", "verdict")} == \
        {k: one(root)[k] for k in ("value", "low", "high", "n", "verdict")}
    assert "data/runs/a, data/runs/b" in both["source"]
    suite(tmp_path / "b", {"better": BETTER})
    with pytest.raises(ValueError, match="both have better.seed0"):
        one(tmp_path, suite=["a", "b"])


def test_too_few_runs_are_open_whatever_the_value(root):
    for arms in (["lonely", "better"], ["better", "lonely"]):
        for paired in (True, False):
            c = one(root, arms=arms, paired=paired, rule="<", threshold=100)
            assert (c["n"], c["low"], c["high"], c["verdict"]) == (1, None, None, "open")
    assert one(root, arms=None, paired=None, single="lonely", rule=">", threshold=0)["verdict"] == "open"


def test_no_difference_is_open_or_within(root):
    same = {"arms": ["better", "better"]}
    assert one(root, **same)["verdict"] == "fails"              # exactly 0 is not below 0, at every seed
    assert one(root, **same, rule="within", threshold=0.01)["verdict"] == "holds"
    assert judge(-0.1, 0.1, "<", 0) == judge(-0.1, 0.1, ">", 0) == judge(-0.1, 0.1, "within", 0.05) == "open"
    assert judge(-0.1, 0.0, "<", 0) == "open" and judge(0.0, 0.1, "<", 0) == "fails"
    assert judge(-0.05, 0.05, "within", 0.05) == "holds" and judge(None, None, "<", 9) == "open"


def test_one_arm_a_ratio_and_a_figure(root):
    c = one(root, arms=None, paired=None, single="better", rule="within", threshold=[4, 5])
    assert c["value"] == pytest.approx(sum(BETTER) / 4) and "and" not in c["source"]
    r = one(root, ratio=True, rule="<", threshold=1)
    logs = sum(math.log(a / b) for a, b in zip(BETTER, WORSE)) / 4
    assert r["value"] == pytest.approx(math.exp(logs), rel=1e-5) and r["low"] < r["value"] < r["high"] < 1
    assert r["verdict"] == "holds"
    f = one(root, rule=None, threshold=None)
    assert f["verdict"] == "figure" and f["value"] == one(root)["value"] and condition(f) == ""
    assert one(root, interval="bootstrap")["low"] > one(root)["low"]    # too narrow, as its docstring says


def test_pairs_without_a_partner_are_left_out_and_named(root):
    c = one(root, arms=["better", "dense"])
    assert c["n"] == 2 and c["seeds"] == [0, 1] and c["note"] == "unpaired seeds left out: 2, 3"
    assert one(root, arms=["better", "dense"], paired=False)["seeds"] == [0, 1, 2, 3]


def test_what_was_not_recorded_says_so(root):
    c = one(root, suite="method")
    assert (c["value"], c["low"], c["verdict"], c["n"], c["seeds"]) == (None, None, "not recorded", 0, [])
    assert phrase(c) == "not recorded" and c["source"] == "data/runs/method"
    c = one(root, arms=["better", "wrose"])
    assert c["verdict"] == "not recorded" and "'wrose'; there are better, dense, lonely, worse" in c["note"]


def test_a_diverged_run_leaves_the_claim_open(tmp_path):
    suite(tmp_path / "toy", {"better": [4.0, math.nan], "worse": [4.5, 4.6]})
    c = one(tmp_path)
    assert c["value"] is None and c["verdict"] == "open" and c["note"] == "no finite val_loss: better at seed 1"
    dumps({"key": c})                                                   # strict JSON: no NaN in it


# ------------------------------------------------------------------------------------------- metrics of curves

def test_metrics_of_curves(tmp_path):
    suite(tmp_path / "toy", {"alr": [4.0, 4.1], "dense": [4.5, 4.6]}, epochs=6, per_epoch=10, drop=0.3, cost=2.0)

    def value(metric, arm="alr", **arguments):
        given = {"with": arguments} if arguments else {}
        given |= {"arms": None, "paired": None, "single": arm, "metric": metric, "rule": None, "threshold": None}
        return one(tmp_path, **given)["value"]

    # alr at seed 0 ends its epochs at 5.5 5.2 4.9 4.6 4.3 4.0, at seed 1 a tenth above
    assert value("steps_to_loss", level=4.65) == (40 + 50) / 2 and value("seconds_to_loss", level=4.65) == (8 + 10) / 2
    assert value("steps_to_loss", level="dense") == 50                  # 4.5 (4.6) is passed in the fifth epoch
    assert value("steps_to_loss", "dense", level="dense") == 60
    assert value("steps_to_loss", level=1.0) is None                    # never reached: no value, not a made-up one
    assert value("best_val_loss") == 4.05 and value("val_loss_at", epoch=1) == 5.55
    assert value("role_rank", role="o") == 64 + 3 - 5 * 4 and value("growth_moves") == 0
    assert value("role_gap", role="o", other="q") == 3 and value("role_gap", role="q", other="down") == -5
    assert value("mean_rank_at", epoch=1) > value("mean_rank_at", epoch=6) and value("mean_rank_at", epoch=99) is None
    assert value("adaptation_share") == pytest.approx(1 / 12)            # a second beside six epochs of two
    assert value("lowest_of_suite", "dense") == value("best_val_loss")  # alr's, at the same seed
    c = one(tmp_path, arms=["alr", "dense"], metric="steps_to_loss", ratio=True, rule="<", threshold=0.9,
            **{"with": {"level": "dense"}})
    assert c["verdict"] == "holds" and c["value"] == c["high"] == pytest.approx(5 / 6, abs=1e-6)
    with pytest.raises(ClaimError, match="metric 'val_los' is neither.*steps_to_loss"):
        value("val_los")
    with pytest.raises(ClaimError, match="with = "):
        value("steps_to_loss", lvl=4)


def test_metrics_of_cuts():
    """Two ranks, three layers: one prediction has the order of the damage at both, one at none, one of the Fisher cut's."""
    rows = [{"k": k, "damage": d, "damage_fisher": f, "right": d * k, "wrong": -d, "Fisher importance": -f}
            for k in (2, 4) for d, f in ((1.0, 0.3), (2.0, 0.1), (4.0, 0.4))]
    run = SimpleNamespace(cuts=pd.DataFrame(rows))
    assert metrics.across(run, None, "right") == pytest.approx(1) and metrics.across(run, None, "wrong") == pytest.approx(-1)
    assert metrics.across(run, None, "Fisher importance") == pytest.approx(-1)
    assert metrics.across_lead(run, None, "right", "wrong") == pytest.approx(2)
    assert metrics.fisher_damage(run, None) == pytest.approx(0.1)
    assert metrics.fisher_damage(run, None, least=1.5) == pytest.approx(0.075)


def test_what_the_ranks_still_lose_after_the_drop(tmp_path):
    lines = log("v10", epochs=6, blocks=1)
    parsed = [json.loads(line) for line in lines[:-1]]
    losses = iter([6.0, 5.9, 5.8, 1.0, 0.9, 0.8])                       # falls in the fourth epoch
    parsed = [p | {"val_loss": next(losses)} if p["kind"] == "epoch" else p for p in parsed]
    r = tables({"v10.seed0": [*parsed, json.loads(lines[-1])]}, "toy")
    assert r.curves["rank_avg"].diff().tolist()[1:] == [-4, -4, -4, -4, 0]
    assert shrink_after_drop(r, r) == 4                                 # one move of 4 after it, and none at the end
    dense = tables({"dense.seed0": [json.loads(x) for x in log("dense", start=None)]}, "toy")
    assert math.isnan(shrink_after_drop(dense, dense))
    assert math.isnan(shrink_after_drop(r.of(arm="none"), r))


# ------------------------------------------------------------------------------------------------ the register

TOML = """
[better_than_worse]
text = "Better ends lower than worse & <all> the rest."
suite = "toy"
metric = "val_loss"
arms = ["better", "worse"]
paired = true
rule = "<"
threshold = -0.03
chapter = "14_does_adaptivity_pay"
unit = "nats per token"

[loss_of_better]
text = "Where better ends."
suite = "toy"
metric = "val_loss"
single = "better"
chapter = "10_v10"
unit = "nats per token"
format = ".2f"

[later]
text = "Of a suite that nobody ran."
suite = "method"
metric = "val_loss"
single = "alr"
rule = "<"
threshold = 4
chapter = "16_alr"
unit = "nats per token"
"""


@pytest.mark.parametrize("old, new, words", [
    ('rule = "<"\nthreshold = -0.03', 'rule = "<"', "a rule needs its threshold"), ('"<"', '"=<"', "wanted '<' or '>'"),
    ("threshold = -0.03", 'threshold = "small"', "with a number"), ("paired = true\n", "", "say paired = true"),
    ('arms = ["better", "worse"]', 'arms = ["better"]', "wanted arms"), ('single = "better"\n', "", "wanted arms"),
    ('format = ".2f"', 'format = ".2q"', "fits no number"), ('format = ".2f"', 'interval = "z"', "wanted t or boot"),
    ('metric = "val_loss"', 'metrik = "x"', "unknown metrik; missing metric"), ("= true", "= yes", "claims.toml"),
    ("[better_than_worse]", "x = 1\n[better_than_worse]", "stands outside of an entry"),
    ('single = "better"', 'single = "better"\nratio = true', "neither paired nor a ratio")])
def test_a_register_with_a_mistake_is_refused(tmp_path, old, new, words):
    path = tmp_path / "claims.toml"
    path.write_text(TOML, encoding="utf-8")
    assert list(load(path)) == ["better_than_worse", "loss_of_better", "later"]
    assert old in TOML
    path.write_text(TOML.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ClaimError, match=words):
        load(path)


@pytest.fixture
def project(tmp_path):
    """A register, records, and the command-line options that point there."""
    (tmp_path / "claims.toml").write_text(TOML, encoding="utf-8")
    suite(tmp_path / "runs" / "toy", {"better": BETTER, "worse": WORSE})
    return tmp_path, [f"--register={tmp_path / 'claims.toml'}", f"--runs={tmp_path / 'runs'}",
                      f"--out={tmp_path / 'claims.json'}"]


def test_write_then_check_agrees_to_the_byte(project, capsys):
    folder, options = project
    assert main(["--check", *options]) == 1 and "python -m alr.claims" in capsys.readouterr().err     # not written yet
    assert main(options) == 0
    text = (folder / "claims.json").read_text(encoding="utf-8")
    assert main(options) == 0 and (folder / "claims.json").read_text(encoding="utf-8") == text
    assert main(["--check", *options]) == 0 and "3 claims agree" in capsys.readouterr().out
    written = json.loads(text)
    assert list(written) == ["better_than_worse", "loss_of_better", "later"]
    assert [c["verdict"] for c in written.values()] == ["holds", "figure", "not recorded"]
    for c in written.values():
        assert set("text value low high unit n verdict source chapter format seeds".split()) <= c.keys()
        for x in (c["value"], c["low"], c["high"]):
            assert x is None or len(re.sub(r"^-?0?\.0*|[-.]", "", repr(x))) <= 6
    source = written["better_than_worse"]["source"]
    assert source == "data/runs/toy: better and worse; commit 0123456; torch 2.13.0; a CPU"


def test_check_notices_a_new_record_an_edited_figure_and_a_lost_claim(project, capsys):
    folder, options = project
    main(options)
    path, good = folder / "claims.json", (folder / "claims.json").read_text(encoding="utf-8")
    wrong = json.loads(good)
    wrong["loss_of_better"]["value"] = 1.155
    path.write_text(dumps(wrong), encoding="utf-8")
    assert main(["--check", *options]) == 1
    assert "loss_of_better.value: claims.json says 1.155, the records say 4.17" in capsys.readouterr().out
    del wrong["later"]
    path.write_text(dumps(wrong), encoding="utf-8")
    assert main(["--check", *options]) == 1 and "later.verdict" in capsys.readouterr().out
    path.write_text(good, encoding="utf-8")
    write(folder / "runs" / "toy", log("better", 4, 9.0, epochs=3, blocks=1, per_epoch=4))
    assert main(["--check", *options]) == 1 and "loss_of_better.n" in capsys.readouterr().out


def test_the_command_line_ends_with_one_sentence(project):
    folder, options = project
    (folder / "claims.toml").write_text("[a]\ntext = 'x'\n", encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "alr.claims", *options], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "alr.claims: " in done.stderr and "missing" in done.stderr
    assert "Traceback" not in done.stderr and not (folder / "claims.json").exists()


# --------------------------------------------------------------------------------------------- tables, changes

def entry(value, low=None, high=None, verdict="holds"):
    return {"text": "t", "value": value, "low": low, "high": high, "unit": "nats", "n": 3, "verdict": verdict,
            "source": "", "chapter": "c", "format": ".2f", "seeds": [0], "kind": "mean", "rule": "<", "threshold": 0,
            "note": ""}


def test_changes_are_those_that_left_the_old_interval():
    old = {"stays": entry(1, 0.5, 1.5), "leaves": entry(1, 0.5, 1.5), "turns": entry(1, 0.5, 1.5), "gone": entry(1),
           "bare": entry(1), "same": entry(1), "came": entry(None, verdict="not recorded"), "never": entry(None)}
    new = {"stays": entry(1.4, 1, 2), "leaves": entry(1.6, 1, 2), "turns": entry(1, 0.5, 1.5, "open"),
           "bare": entry(2), "same": entry(1), "came": entry(1), "never": entry(None), "fresh": entry(1)}
    found = changes(old, new).set_index("key")["why"].to_dict()
    assert found == {"leaves": "left the old interval", "turns": "another verdict", "gone": "gone", "fresh": "new",
                     "bare": "another value, no old interval", "came": "recorded now; another verdict"}
    assert changes(old, old).empty


def test_diff_reads_the_old_figures_from_git(project, capsys):
    folder, options = project
    main(options)

    def git(*words):
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *words], cwd=folder, check=True,
                       capture_output=True)
    path = folder / "claims.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"holds"', '"supported"'), encoding="utf-8")   # the word then
    git("init", "-q")
    git("add", "claims.json")
    git("commit", "-q", "-m", "old")
    git("tag", "v0.1")
    main(options)
    capsys.readouterr()
    assert main(["--diff", "v0.1", *options]) == 0 and "0 claims moved since v0.1" in capsys.readouterr().out
    suite(folder / "runs" / "toy", {"better": [x - 1 for x in BETTER]})
    main(options)
    capsys.readouterr()
    assert main(["--diff", "v0.1", *options]) == 0
    out = capsys.readouterr().out
    assert "better_than_worse" in out and "left the old interval" in out and "later" not in out
    assert main(["--diff", "v9", *options]) == 1 and "no claims.json at 'v9'" in capsys.readouterr().err


@pytest.mark.parametrize("revision", ["--output=x", "-h", "--ext-diff"])
def test_a_revision_is_no_option_of_git(project, capsys, revision):
    folder, options = project
    main(options)
    assert main([f"--diff={revision}", *options]) == 1 and f"{revision!r} is no tag or commit" in capsys.readouterr().err


def test_a_value_is_said_in_one_way(project):
    folder, options = project
    main(options)
    read = claims.read(folder / "claims.json")
    assert phrase(read["loss_of_better"]) == "4.17 [3.98, 4.36]"
    assert phrase(read["better_than_worse"], unit=True) == "−0.203 [−0.218, −0.187] nats per token"
    with pytest.raises(FileNotFoundError, match="python -m alr.claims"):
        claims.read(folder / "no.json")
