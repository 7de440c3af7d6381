"""Laws of `alr.evidence.records`: what was written comes back, and what was touched is noticed."""

import hashlib
import json
import math

import pytest

from alr.evidence.records import RecordError, check, leaderboard, natural, read, run_and_end, runs, thin, verify_digest
from alr.lab.log import digest

from synthetic import log, suite, write


def parsed(lines):
    return [json.loads(line) for line in lines]


# ---------------------------------------------------------------------------------------------- digests, thinning

def test_the_digest_is_the_one_that_a_log_carries():
    lines = log()
    assert parsed(lines)[-1]["digest"] == hashlib.sha256("\n".join(lines[:-1]).encode()).hexdigest()
    assert check(lines) == parsed(lines)


def test_every_edit_of_a_record_is_noticed():
    lines = thin(log(epochs=3, blocks=1), every=3)
    assert check(lines, record=True) == parsed(lines)
    for i, line in enumerate(lines):
        for key, value in json.loads(line).items():
            if key == "kind":
                continue
            edited = json.dumps({**json.loads(line), key: "edited" if value != "edited" else "x"})
            with pytest.raises(RecordError, match="was changed after it was written.*digest"):
                check([*lines[:i], edited, *lines[i + 1:]], record=True)
        if i not in (0, len(lines) - 1):
            with pytest.raises(RecordError, match="digest"):
                check([*lines[:i], *lines[i + 1:]], record=True)                # one line less
    with pytest.raises(RecordError, match="digest"):
        check([lines[0], lines[2], lines[1], *lines[3:]], record=True)          # two lines swapped


def test_a_record_edited_and_given_the_digest_of_a_log_is_noticed():
    lines = thin(log())
    end = {**parsed(lines)[-1], "val_loss": 1.155, "digest": digest(lines[:-1])}
    with pytest.raises(RecordError, match="leaves out the `end` line"):
        check([*lines[:-1], json.dumps(end)], record=True)


def test_thin_keeps_everything_but_steps_and_those_to_the_letter():
    lines = log(epochs=4, per_epoch=20, log_every=1)
    for every in (1, 3, 10, 10_000):
        kept = thin(lines, every)
        others = [[x for x in y[:-1] if '"step", "step"' not in x] for y in (kept, lines)]
        assert others[0] == others[1]
        assert set(kept[:-1]) <= set(lines)
        steps = [p["step"] for p in parsed(kept) if p["kind"] == "step"]
        assert steps == sorted({*range(1, 81, every), 80})
        assert {**parsed(kept)[-1], "digest": 0} == {**parsed(lines)[-1], "digest": 0}
        assert check(kept, record=True)
    assert thin(kept, 1) == kept                                                # thinning a record again is allowed


def test_thin_keeps_the_neighbourhood_of_resizes():
    lines = log(epochs=3, per_epoch=20, log_every=1)
    steps = {p["step"] for p in parsed(thin(lines, 10_000, window=2)) if p["kind"] == "step"}
    assert steps == {1, 18, 19, 20, 21, 22, 38, 39, 40, 41, 42, 60}


def test_thin_refuses_what_it_cannot_trust():
    lines = log()
    with pytest.raises(RecordError, match="did not finish"):
        thin(lines[:-1])
    with pytest.raises(RecordError, match="digest"):
        thin([lines[0], *lines[2:]])
    with pytest.raises(ValueError, match="every = 0"):
        thin(lines, every=0)


@pytest.mark.parametrize("spoil, words", [
    (lambda x: [], "wanted one `run` line"), (lambda x: x[1:], "wanted one `run` line"),
    (lambda x: [x[0], *x], "wanted one `run` line"), (lambda x: [*x, x[1]], "is the `end`, but"),
    (lambda x: [*x[:-1], x[-1][:40]], "the run was cut off"), (lambda x: ["[1]", *x[1:]], "no 'kind'"),
    (lambda x: [x[0], '{"epoch": 1}'], "no 'kind'")])
def test_a_broken_log_says_what_is_wrong(tmp_path, spoil, words):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(spoil(log())), encoding="utf-8")
    with pytest.raises(RecordError, match=words) as e:
        read(path)
    assert "x.jsonl" in str(e.value)


def test_verify_digest_gives_the_lines_of_the_file(tmp_path):
    path = write(tmp_path, log())
    assert verify_digest(path) == path.read_text(encoding="utf-8").splitlines()
    path.write_text(path.read_text(encoding="utf-8").replace('"val_loss": 4.5', '"val_loss": 1.155'), encoding="utf-8")
    with pytest.raises(RecordError, match="digest"):
        verify_digest(path)


def test_first_and_last_line_are_those_of_a_whole_record_only(tmp_path):
    path = write(tmp_path, log())
    lines = path.read_text(encoding="utf-8").splitlines()
    assert run_and_end(path) == (json.loads(lines[0]), json.loads(lines[-1]))
    with pytest.raises(FileNotFoundError):
        run_and_end(tmp_path / "none.jsonl")
    for spoilt, words in (([], "wanted one `run` line"), (lines[1:], "wanted one `run`"), (lines[:-1], "did not finish"),
                          ([*lines[:5], *lines[6:]], "was changed"), (["[1]", *lines[1:]], "no 'kind'"),
                          (["null", *lines[1:]], "no 'kind'"), ([*lines[:-1], lines[-1][:40]], "the run was cut off")):
        path.write_text("\n".join(spoilt), encoding="utf-8")
        with pytest.raises(RecordError, match=words):
            run_and_end(path)


# ----------------------------------------------------------------------------------------------------- tables

def test_a_suite_becomes_tables(tmp_path):
    suite(tmp_path / "toy", {"v10": [4.0, 4.2], "v2": [5.0, 5.2]})
    r = runs("toy", root=tmp_path)
    assert r.suite == "toy" and r.arms == ["v2", "v10"]
    assert list(r.ends["run"]) == ["v2.seed0", "v2.seed1", "v10.seed0", "v10.seed1"]
    assert list(r.ends["val_loss"]) == [5.0, 5.2, 4.0, 4.2]
    assert len(r.curves) == 4 * 3 and list(r.curves["seconds"][:3]) == [10.0, 20.0, 30.0]
    assert len(r.steps) == 4 * 6 and len(r.resizes) == 4 * 2 * 6
    assert list(r.provenance["config.lr"]) == [1e-3] * 4 and set(r.provenance["corpus.fingerprint"]) == {"f00d"}
    one = r.of(run="v10.seed0")
    assert [len(t) for t in (one.curves, one.steps, one.resizes, one.ends, one.provenance)] == [3, 6, 12, 1, 1]
    last = one.ranks[one.ranks["epoch"] == 3]
    assert list(last["role"]) == ["q", "k", "v", "o", "up", "down"] and list(last["rank"]) == [56, 57, 58, 59, 60, 61]
    end = one.ends.iloc[0]
    assert end["rank_mean"] == 58.5 and end["params_blocks"] == 1000 + 10 * 351 and end["seconds"] == 31.0


def test_a_dense_run_has_no_ranks(tmp_path):
    suite(tmp_path / "toy", {"dense": [4.0]}, start=None)
    r = runs("toy", root=tmp_path)
    assert r.ranks.empty and r.resizes.empty and math.isnan(r.ends["rank_mean"].iloc[0])
    assert {"layer", "role", "rank"} <= set(r.ranks.columns) and {"old", "new"} <= set(r.resizes.columns)


def test_a_log_that_still_runs_has_curves_and_no_end(tmp_path):
    path = tmp_path / "live.jsonl"
    lines = log(epochs=4)
    path.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    r = runs(path)
    assert len(r.curves) == 4 and r.ends.empty and r.arms == ["alr"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert len(runs(str(path)).ends) == 1


def test_a_suite_takes_only_finished_records(tmp_path):
    suite(tmp_path / "toy", {"alr": [4.0]})
    (tmp_path / "toy" / "alr.seed1.jsonl").write_text("\n".join(log(seed=1)) + "\n", encoding="utf-8")
    with pytest.raises(RecordError, match="went through records.thin"):
        runs("toy", root=tmp_path)
    with pytest.raises(FileNotFoundError, match="there are toy.*make runs SUITE=tyo"):
        runs("tyo", root=tmp_path)


def test_flops_are_counted(tmp_path):
    write(tmp_path, log("dense", start=None, epochs=3, per_epoch=5, blocks=2))
    write(tmp_path, log("tied", start=None, epochs=3, per_epoch=5, blocks=2, tied=True))
    write(tmp_path, log("mlp", start=None, epochs=3, per_epoch=5, blocks=2, model="mlp"))
    f = runs(tmp_path).ends.set_index("arm")["flops"]
    tokens = 3 * 5 * 4 * 16
    assert f["dense"] == tokens * (6 * 1300 + 12 * 2 * 16 * 16)
    assert f["tied"] == tokens * (6 * (1800 - 256) + 12 * 2 * 16 * 16)
    assert f["mlp"] == tokens * 6 * 1300


def test_flops_follow_every_resize(tmp_path):
    write(tmp_path, log("alr", epochs=3, per_epoch=5, blocks=1, start=20, shrink=4, model="mlp"))
    ranks = [6 * 20 + 15 - 24 * i for i in range(3)]                            # of all six layers, in each epoch
    assert runs(tmp_path).ends["flops"].item() == sum(5 * 64 * 6 * (1300 + 10 * r) for r in ranks)
    lines = log("lost", epochs=3, per_epoch=5, blocks=1, start=20, shrink=4)
    lost = [x for x in lines[:-1] if '"kind": "resize"' not in x]
    write(tmp_path, [*lost, json.dumps({**parsed(lines)[-1], "digest": digest(lost)})])
    assert math.isnan(runs(tmp_path).of(arm="lost").ends["flops"].item())


def test_a_leaderboard_is_means_and_intervals_best_first(tmp_path):
    suite(tmp_path / "toy", {"uniform": [4.5, 4.7, 4.6], "alr": [4.1, 4.3, 4.2], "once": [4.4]})
    table = leaderboard(runs("toy", root=tmp_path).ends)
    assert list(table["arm"]) == ["alr", "once", "uniform"] and list(table["n"]) == [3, 1, 3]
    first = table.iloc[0]
    assert first["val_loss"] == pytest.approx(4.2)
    half = 4.302652730 * 0.1 / math.sqrt(3)                                     # t table, 2 degrees of freedom
    assert (first["val_loss_low"], first["val_loss_high"]) == pytest.approx((4.2 - half, 4.2 + half))
    assert math.isnan(table.iloc[1]["val_loss_low"])
    assert first["params_blocks"] == first["params_blocks_low"] == first["params_blocks_high"]


def test_two_settings_under_one_name_are_not_averaged(tmp_path):
    write(tmp_path, log(lr=1e-3), "alr.seed0")
    write(tmp_path, log(lr=2e-3), "alr.seed0-again")
    with pytest.raises(RecordError, match=r"2 runs at seed 0.*0\.001, 0\.002"):
        leaderboard(runs(tmp_path).ends)


def test_v2_stands_before_v10():
    assert sorted(["v10", "v2", "v7.10", "alr", "v7.2"], key=natural) == ["alr", "v2", "v7.2", "v7.10", "v10"]
