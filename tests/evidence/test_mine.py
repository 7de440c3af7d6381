"""Laws of `alr.evidence.mine`: one's own runs are judged by the book's rule, and only where they can be compared."""

import math

import pytest

from alr.evidence import claims, mine
from alr.evidence.records import RecordError, runs

from synthetic import log, suite

OURS, THEIRS = [4.10, 4.32, 4.21], [4.31, 4.51, 4.41]


def own(folder, losses=OURS, seeds=None, **changed):
    paths = []
    for seed, loss in zip(seeds or range(len(losses)), losses):
        path = folder / f"mine {seed}.jsonl"
        lines = log("whatever", seed, loss, **{"epochs": 3, "blocks": 1, "per_epoch": 4, **changed})
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        paths.append(path)
    return paths


@pytest.fixture
def root(tmp_path):
    suite(tmp_path / "runs" / "toy", {"theirs": THEIRS, "twin": OURS, "noisy": [4.0, 4.5, 4.2], "lonely": [4.9]})
    return tmp_path / "runs"


def test_runs_are_paired_by_seed_and_judged_by_their_interval(root, tmp_path):
    table = mine.score(mine.logs(own(tmp_path)), runs("toy", root))
    row, d = table.loc["theirs"], [a - b for a, b in zip(OURS, THEIRS)]
    half = 4.30265273 * math.sqrt(sum((x - sum(d) / 3) ** 2 for x in d) / 2 / 3)            # t table, 2 degrees
    assert (row["difference"], row["low"], row["high"]) == pytest.approx((sum(d) / 3, sum(d) / 3 - half, sum(d) / 3 + half))
    assert row["verdict"] == "better" and row["n"] == 3 and row["blocks"] == 1
    assert table.loc["noisy", "verdict"] == "open" and table.loc["lonely", "verdict"] == "one seed"
    two = mine.score(mine.logs(own(tmp_path, THEIRS[:2], [0, 1])), runs("toy", root))
    assert two.loc["twin", "n"] == 2 and two.loc["theirs", "difference"] == 0


def test_what_cannot_be_compared_is_refused_with_what_differs(root, tmp_path):
    with pytest.raises(ValueError, match="sequences per step: yours 8, the suite's 4; tokens per sequence: yours 32, .* 16"):
        mine.score(mine.logs(own(tmp_path, tokens=(8, 32))), runs("toy", root))
    with pytest.raises(ValueError, match=r"at your seeds, \[7\]; it has seeds \[0, 1, 2\]"):
        mine.score(mine.logs(own(tmp_path, [4.0], [7])), runs("toy", root))
    with pytest.raises(RecordError, match=r"seeds \[0, 0\]; wanted one run for each"):
        mine.logs(own(tmp_path)[:1] * 2)


def test_a_log_that_was_cut_off_or_edited_is_refused(tmp_path):
    path = own(tmp_path)[0]
    whole = path.read_text(encoding="utf-8")
    path.write_text("\n".join(whole.splitlines()[:-1]) + "\n", encoding="utf-8")
    with pytest.raises(RecordError, match="did not finish"):
        mine.logs([path])
    path.write_text(whole.replace('"val_loss": 4.1,', '"val_loss": 1.1,'), encoding="utf-8")
    with pytest.raises(RecordError, match="changed after it was written"):
        mine.logs([path])


def test_the_command_prints_the_table(root, tmp_path, capsys):
    paths = list(map(str, own(tmp_path)))
    assert claims.main(["--mine", *paths, "--suite", "toy", "--runs", str(root)]) == 0
    out = capsys.readouterr().out
    assert "3 runs of yours against toy" in out and "better" in out
    assert claims.main(["--mine", *paths]) == 1
    assert "--suite NAME go together" in capsys.readouterr().err


@pytest.mark.parametrize("metric", ["foo", "arm", "run", ""])
def test_a_metric_that_is_none_is_answered_with_those_there_are(metric, root, tmp_path):
    with pytest.raises(ValueError, match=f"--metric '{metric}' is no number .*there are .*val_loss.*test_loss"):
        mine.score(mine.logs(own(tmp_path)), runs("toy", root), metric)
