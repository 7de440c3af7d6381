"""Laws of the pictures to touch: their numbers are the records', and the script's mathematics is Python's."""

import importlib.util
import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alr.control import Bidirectional
from alr.evidence import records
from alr.evidence.style import LOOKS

from chromium import Chromium, find

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "book" / "_static" / "touch.js"
sys.path.insert(0, str(ROOT / "book"))


def load():
    spec = importlib.util.spec_from_file_location("touch", ROOT / "book" / "touch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


touch = load()


@pytest.fixture(scope="module")
def recorded():
    return records.runs(touch.SUITE)


@pytest.fixture(scope="module")
def javascript(tmp_path_factory):
    """A function: an expression in the script's words -> its value, by node or by a browser."""
    if shutil.which("node"):
        def by_node(expression):
            code = f"require({json.dumps(str(SCRIPT))}); console.log(JSON.stringify({expression}))"
            return json.loads(subprocess.run(["node", "-e", code], capture_output=True, text=True, check=True).stdout)
        yield by_node
    elif find():
        page = tmp_path_factory.mktemp("page") / "index.html"
        page.write_text(f"<script>{SCRIPT.read_text(encoding='utf8')}</script>")
        with Chromium(find()) as browser:
            yield browser.open(page.as_uri()).run
    else:
        pytest.skip("neither node nor Chromium is here to run touch.js")


def test_the_script_rounds_as_python_does(javascript):
    halves = [k / 4 for k in range(-30, 31)]
    assert javascript(f"{halves}.map(alrTouch.round)") == [round(x) for x in halves]


def test_the_script_controls_as_python_does(javascript):
    rng, cases = random.Random(0), []
    for _ in range(60):
        control = {"safety": rng.choice([0.5, 1.5, 4.0]), "ema": rng.choice([0.0, 0.5, 0.8, 0.95]),
                   "threshold": rng.choice([0.0, 2.0, 10.0]), "max_step": rng.choice([1, 4, 32]),
                   "min_rank": rng.choice([1, 8])}
        asked = [rng.choice([rng.uniform(0, 90), float(rng.randint(0, 60))]) for _ in range(25)]
        cases.append([control, asked, rng.randint(8, 100), rng.choice([64, 128])])
    found = javascript(f"{json.dumps(cases)}.map((c) => alrTouch.follow(...c))")
    wanted = [touch.follow(Bidirectional(**control), asked, rank, cap) for control, asked, rank, cap in cases]
    assert found == wanted and len({tuple(path) for path in found}) > 50


@pytest.mark.parametrize("m, n, r", [(512, 128, 1), (512, 128, 100), (512, 128, 128), (64, 64, 32)])
def test_the_script_counts_as_python_does(javascript, m, n, r):
    cost, found = touch.costs(m, n, r), javascript(f"alrTouch.costs({m}, {n}, {r})")
    assert found == pytest.approx(cost)
    assert cost["rows"] * cost["columns"] == pytest.approx(cost["parameters"]) and cost["rows"] / cost["columns"] == m / n
    even = math.floor(cost["break_even"])
    assert touch.costs(m, n, even)["share"] <= 1 < touch.costs(m, n, even + 1)["share"]


def test_the_error_of_a_cut_is_eckart_and_youngs(javascript):
    W = np.random.default_rng(0).standard_normal((12, 7))
    U, s, V = np.linalg.svd(W, full_matrices=False)
    for r in (0, 1, 4, 7):
        wanted = np.linalg.norm(W - (U[:, :r] * s[:r]) @ V[:r]) / np.linalg.norm(W)
        assert javascript(f"alrTouch.error({s.tolist()}, {r})") == pytest.approx(wanted, abs=1e-12)


def test_the_players_numbers_are_the_records(recorded):
    data = touch.ranks(recorded)
    assert set(data["runs"]) == set(touch.PLAYED.values()) and data["epochs"] == list(range(len(data["epochs"])))
    for arm, name in touch.PLAYED.items():
        run = data["runs"][name]
        one = recorded.of(arm=arm, seed=touch.SEED)
        assert len(run["ranks"]) == len(run["loss"]) == len(data["epochs"]) and run["loss"][0] is None
        last = one.ranks[one.ranks["epoch"] == one.ranks["epoch"].max()].set_index("layer")["rank"]
        assert run["ranks"][-1] == [last[layer] for layer in data["layers"]]
        assert run["loss"][-1] == pytest.approx(one.curves["val_loss"].iloc[-1], abs=1e-4)
    assert set(data["runs"]["v10"]["ranks"][0]) == {64}, "v10 starts at 64 everywhere"
    assert data["colours"] == {role: LOOKS[role]["color"] for role in ("q", "k", "v", "o", "up", "down")}


def test_the_controllers_targets_are_the_records(recorded):
    data = touch.targets(recorded)
    one = recorded.of(arm="v10", seed=touch.SEED)
    mine = one.resizes[one.resizes["layer"] == data["layer"]]
    assert sum(data["known"]) == len(mine) == one.resizes["layer"].value_counts().max()
    assert [t for t, known in zip(data["targets"], data["known"]) if known] == pytest.approx(list(mine["target"]), abs=1e-4)
    assert len(data["ranks"]) == len(data["targets"]) + 1 and data["ranks"][0] == 64
    path = touch.follow(Bidirectional(**data["control"]), data["targets"], data["ranks"][0], data["cap"])
    assert max(abs(a - b) for a, b in zip(path, data["ranks"])) <= 2, "the record, but for the targets that it does not hold"


def test_the_spectrum_is_of_a_trained_layer():
    data = json.loads(touch.SPECTRUM.read_text(encoding="utf8"))
    assert len(data["trained"]) == len(data["start"]) == min(data["rows"], data["columns"])
    assert data["trained"] == sorted(data["trained"], reverse=True) and data["trained"][0] > 1.2 * data["start"][0]
    end = records.runs(touch.SUITE).of(arm="dense", seed=touch.SEED).ends["val_loss"].iloc[0]
    assert data["loss"] == pytest.approx(end, abs=0.02)


def test_every_picture_is_written_with_a_still_one(tmp_path):
    touch.write(tmp_path)
    names = {path.stem for path in tmp_path.glob("*.png")}
    assert names == {"ranks", "spectrum", "controller"}
    for name in names:
        json.loads((tmp_path / f"{name}.json").read_text(encoding="utf8"), parse_constant=lambda word: pytest.fail(word))
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width > 700
    assert json.loads((tmp_path / "looks.json").read_text(encoding="utf8"))["alr"] == LOOKS["alr"]["color"]
