"""What the original scripts answered when they were driven by hand, and that ours answer the same.

data/controllers.json: {version and layer: [{cap, start, targets, ranks}]}, `targets` what was suggested at each decision
(v7.2, v7.3: in each epoch), `ranks` what a layer of that cap then had; v9 with the validation losses.
data/groups.json: small matrices with v1's and v2's labels, v1's averaged rows, the largest group of v3 to v7.1 and the
number of groups of v7.4.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from alr import LowRankLinear, recipes
from alr.control import Signal
from alr.history.estimate import LargestGroup, NumberOfGroups
from alr.history.grouping import group_mean, group_mean_loop

DATA = Path(__file__).parent / "data"
CONTROLLERS = json.loads((DATA / "controllers.json").read_text(encoding="utf-8"))
GROUPS = json.loads((DATA / "groups.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("version", CONTROLLERS)
def test_controllers_answer_as_the_scripts_did(version):
    name, _, layer = version.partition(" ")
    control = recipes.get(name).control.for_layer(layer)
    assert len(CONTROLLERS[version]) == 36
    for trace in CONTROLLERS[version]:
        ranks, memory, path = [trace["start"]], control.init([trace["start"]]), []
        for i, target in enumerate(trace["targets"]):
            memory = json.loads(json.dumps(memory))                             # as a checkpoint would keep it
            ranks, memory = control.step(ranks, [target], memory, Signal(
                caps=[trace["cap"]], step=10 ** 6, losses=trace.get("losses", [])[:i + 1]))
            path.append(ranks[0])
        assert path == trace["ranks"]


def partition(labels) -> set[frozenset]:
    """Labels of rows that are ties may be numbered in another way; who is with whom may not differ."""
    groups = {}
    for row, label in enumerate(labels):
        groups.setdefault(int(label), []).append(row)
    return {frozenset(rows) for rows in groups.values()}


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_rows_are_grouped_as_the_scripts_did(version):
    for trace in GROUPS:
        labels = recipes.get(version).gradient.labels(torch.tensor(trace["rows"]), trace["threshold"])
        assert partition(labels) == partition(trace[f"{version} labels"])


def test_v1_averages_as_the_script_did():
    seen = 0
    for trace in (t for t in GROUPS if "v1 averaged" in t):
        G, labels = torch.tensor(trace["rows"]), torch.tensor(trace["v1 labels"])       # (m, n), (m,)
        for mean in (group_mean, group_mean_loop):
            torch.testing.assert_close(mean(G, labels), torch.tensor(trace["v1 averaged"]), rtol=1e-4, atol=2e-5)
        seen += 1
    assert seen == 15


def with_gradient(G: Tensor) -> LowRankLinear:
    """A layer whose G = dU V + U dV is that matrix to the last bit: V = 1, dU = G, U = 0."""
    m, n = G.shape
    layer = LowRankLinear(n, m, min(m, n), bias=False)
    layer.V.data, layer.U.data = torch.eye(n), torch.zeros(m, n)
    layer.U.grad, layer.V.grad = G.clone(), torch.zeros(n, n)
    return layer


def test_gradients_suggest_the_ranks_that_the_scripts_suggested():
    for trace in GROUPS:
        layer = with_gradient(torch.tensor(trace["rows"]))
        assert LargestGroup(trace["threshold"])(layer) == trace["largest group (v3 to v7.1)"]
        assert NumberOfGroups(trace["threshold"])(layer) == trace["number of groups (v7.4)"]
