"""Laws of `alr.control`: no torch, fixed points, bounded steps; and v10 at its edges."""

import ast
import json
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

import alr.control
from alr.budget import Budget
from alr.control import Bidirectional, ByLayer, Hold, Schedule, Signal, Stairs

CAPS = Signal(caps=(512, 512))


def drive(control, rank, target, steps, cap=512):
    ranks, memory, path = [rank], control.init([rank]), []
    for _ in range(steps):
        ranks, memory = control.step(ranks, [target], memory, Signal(caps=[cap]))
        path.append(ranks[0])
    return path


def test_control_imports_no_torch():
    tree = ast.parse(pathlib.Path(alr.control.__file__).read_text(encoding="utf-8"))
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "torch" not in " ".join(filter(None, names)) and names


def test_v10_by_hand():
    """64 and an estimate of 12.3: target 18.45, e = 0.8 * 64 + 0.2 * 18.45 = 54.89, a wish of -9, a step of -4."""
    ranks, memory = Bidirectional().step([64], [12.3], Bidirectional().init([64]), Signal(caps=[512]))
    assert ranks == [60] and memory == [pytest.approx(54.89)]


def test_v10_target_equal_to_the_rank_is_a_fixed_point():
    assert drive(Bidirectional(), 30, 20.0, 50) == [30] * 50              # 1.5 * 20 = 30


def test_v10_dead_band():
    assert drive(Bidirectional(), 30, 31.9 / 1.5, 100) == [30] * 100      # e approaches 31.9, never 2 away
    assert drive(Bidirectional(), 30, 33.0 / 1.5, 100)[-1] == 32          # crosses 2 once, moves, and is then inside


def test_v10_goes_down_by_four_and_stops_in_the_dead_band_above_min_rank():
    path = drive(Bidirectional(), 64, 1.0, 40)
    assert path[:3] == [60, 56, 52] and path[-1] == min(path) == 10


def test_v10_grows_up_to_the_cap():
    path = drive(Bidirectional(), 8, 500.0, 60, cap=40)
    assert path[-1] >= 39 and max(path) <= 40 and path[0] == 12


@given(st.integers(1, 512), st.floats(1, 512), st.integers(1, 512), st.integers(1, 60))
def test_v10_is_bounded(rank, target, cap, steps):
    rank = min(rank, cap)
    path = [rank] + drive(Bidirectional(), rank, target, steps, cap)
    low = min(8, cap)
    for a, b in zip(path, path[1:]):
        assert (abs(b - a) <= 4 or a < low) and b <= cap and (b >= low or b == a)


def test_layers_do_not_know_each_other_and_hold_holds():
    c = Bidirectional()
    both, _ = c.step([64, 20], [12.3, 90.0], c.init([64, 20]), CAPS)
    assert both == [c.step([r], [t], c.init([r]), Signal(caps=[512]))[0][0] for r, t in [(64, 12.3), (20, 90.0)]]
    assert Hold().step([3, 4], [100, 100], Hold().init([3, 4]), CAPS) == ([3, 4], [])
    with pytest.raises(ValueError):
        c.step([64, 20], [12.3], c.init([64, 20]), CAPS)


def test_a_schedule_does_not_listen():
    c = Schedule(path=((10, 60), (20, 30)))
    at = [c.step([64, 64], [1.0, 500.0], [], Signal(caps=[512, 40], step=step))[0] for step in (9, 10, 19, 20, 99)]
    assert at == [[64, 64], [60, 40], [60, 40], [30, 30], [30, 30]]
    named = Schedule(path=((10, {"a": 5}),)).step([64, 64], [1.0, 1.0], [], Signal(caps=[512, 512], step=10, names=["a", "b"]))
    assert named == ([5, 64], [])


@pytest.mark.parametrize("changes", [1, 3, 9, 18, 36])
def test_stairs_make_the_same_way_in_so_many_equal_steps(changes):
    c, path = Stairs(rank=28, changes=changes), [[64, 20]]
    memory = c.init(path[0])
    assert memory == [64, 20] and json.loads(json.dumps(memory)) == memory
    for step in range(20, 741, 20):
        signal = Signal(caps=[512, 25], step=step, progress=step / 740)
        assert not c.finished(path[-1], memory, signal) or path[-1] == [28, 25]
        path.append(c.step(path[-1], [], memory, signal)[0])
    moves = [b[0] - a[0] for a, b in zip(path, path[1:]) if a != b]
    assert moves == [-36 // changes] * changes and path[-1] == [28, 25]          # the second grows, up to its cap
    first = next(i for i, ranks in enumerate(path) if ranks[0] < 64)
    assert first == -(-37 // (changes + 1)), "the first change comes when its share of training has passed"
    assert c.finished(path[-1], memory, signal)


def test_rules_by_layer_are_finished_when_all_of_them_are():
    names = ["a", "b"]
    def done(control, memory=None, names=names, **signal):
        ranks = [8] * len(names)
        return control.finished(ranks, control.init(ranks) if memory is None else memory,
                                Signal(caps=[512] * len(names), names=names, shapes=[(64, 64)] * len(names), **signal))
    assert done(ByLayer((("*", Hold()),))) and done(ByLayer((("a", Hold()), ("b", ByLayer((("*", Hold()),))))))
    assert not done(ByLayer((("a", Hold()), ("*", Bidirectional()))))
    assert done(ByLayer((("a", Hold()), ("*", Bidirectional()))), names=["a", "a"])         # of the rules that have a layer
    cut = ByLayer((("a", Hold()), ("*", Budget(share=0.25, end=0.5))))
    assert not done(cut, progress=0.4) and done(cut, {"a": [], "*": [8]}, progress=0.6)
    with pytest.raises(ValueError, match="1 ranks and 0 names"):
        ByLayer((("*", Hold()),)).finished([1], {}, Signal(caps=[9]))


def test_rules_by_layer_answer_for_their_own_layers_however_deep():
    inner = ByLayer((("a*", Hold()), ("*", Budget())))
    outer = ByLayer((("x", Hold()), ("*", inner)))
    assert outer.parts(["x", "a1", "b", "a2"]) == [(Hold(), [0]), (Hold(), [1, 3]), (Budget(), [2])]
    assert outer.for_layer("b") == Budget() and Hold().parts(["x", "y"]) == [(Hold(), [0, 1])]


def test_a_schedule_keeps_its_steps_on_another_clock():
    c = Schedule(path=((100, 8), (200, {"a": 4})))
    assert c.paced(0.1) == c and ByLayer((("*", c),)).paced(0.1).for_layer("a") == c
