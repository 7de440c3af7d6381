"""Two processes that train one model equal one: same ranks and events, weights to rounding, processes bit for bit.

Run as a script, this file is one of the processes.
"""

import datetime
import os
import socket
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import alr
from alr.axes import Estimate, ResizeRule
from alr.budget import Budget
from alr.control import Bidirectional, Schedule
from alr.estimate import StableRank
from alr.group import Group
from alr.linear import factorize_
from alr.observe import Observer
from alr.resize import GrowAlongGradient
from alr.rules import Spectron
from alr.state import Reset
from alr.tangent import Tangent
from alr.truncation import TangentCut

STEPS, ROWS, D = 26, 32, 24
ALR = replace(alr.recipes.alr, every=6, control=Budget(share=0.4, end=0.8, min_rank=2, per_parameter=True))
UP = replace(alr.recipes.repaired, every=5, control=Schedule(((0, 4), (10, 7), (20, 11))))

RECIPES = {
    "alr": ALR,
    "alr with AdamW": ALR,
    "alr with SGD": replace(ALR, estimate=replace(ALR.estimate, steps=1), resize=replace(ALR.resize, steps=1)),
    "repaired": replace(alr.recipes.repaired, every=4, control=Bidirectional(min_rank=2, ema=0.0, threshold=1.0)),
    "v10": replace(alr.recipes.v10, every=4, control=Bidirectional(min_rank=2, ema=0.0, threshold=1.0)),
    "alr, tangent": ALR,
    "growing, tangent": UP,
    "momentum, tangent": replace(ALR, control=Schedule(((6, 5), (12, 9), (18, 4))), resize=TangentCut(ahead=20.0)),
    "growing": UP,
    "growing, reset": replace(UP, state=Reset(everything=False)),
    "growing along the gradient": replace(UP, resize=GrowAlongGradient(steps=3)),
    "shrinking": replace(UP, control=Schedule(((0, 8), (10, 5), (20, 3)))),
    "routed": ALR,
}
OPTIMIZERS = {**dict.fromkeys(("alr, tangent", "growing, tangent", "momentum, tangent"),
                              lambda model: alr.PairOptimizer(model, lr=0.02, rule=Tangent())),
              "alr with SGD": lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
              **dict.fromkeys(("alr with AdamW", "repaired", "growing, reset"),
                              lambda model: torch.optim.AdamW(model.parameters(), 3e-3))}


class Routed(nn.Module):
    """Rows with a positive first feature go one way, the others another; a way that no row takes is not called."""

    def __init__(self):
        super().__init__()
        self.first, self.a, self.b, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 12)

    def forward(self, x):
        out, left = torch.tanh(self.first(x)), x[:, 0] > 0
        for way, rows in ((self.a, left), (self.b, ~left)):
            if rows.any():
                out = out.index_put((rows.nonzero()[:, 0],), torch.tanh(way(out[rows])))
        return self.head(out)


def made(name):
    torch.manual_seed(0)
    model = Routed() if name == "routed" else nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.Tanh(),
                                                            nn.Linear(D, 12))
    return factorize_(model.double(), rank=0.9 if RECIPES[name].estimate.needs else 8)    # float64: near ties fall alike


def share(name, i, rank, size):
    """This process's rows of batch i; of the routed ones process 0 gets those that go one way, process 1 the others."""
    x = torch.randn(ROWS, D, generator=torch.Generator().manual_seed(i), dtype=torch.double)
    y = (3 * x[:, :12]).argmax(1)
    if name == "routed":
        x[:, 0] = x[:, 0].abs() * torch.where(torch.arange(ROWS) % 2 == 0, 1, -1)
    return x[rank::size], y[rank::size]


def trained(name, rank=0, size=1):
    model = made(name)
    torch.manual_seed(rank)                                         # processes draw other numbers
    optimizer = OPTIMIZERS.get(name, lambda model: alr.PairOptimizer(model, lr=0.02, rule=Spectron()))(model)
    adapter, events = alr.RankAdapter(model, optimizer, RECIPES[name], total_steps=STEPS), []
    for i in range(STEPS):
        x, y = share(name, i, rank, size)
        F.cross_entropy(model(x), y).backward()
        alr.average_gradients(model)
        optimizer.step()
        events += adapter.step()
        optimizer.zero_grad()
    return {"weights": {key: x.clone() for key, x in model.state_dict().items()}, "ranks": adapter.ranks,
            "moments": [{key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in state.items()}
                        for state in optimizer.state_dict()["state"].values()],
            "events": [(e.step, e.layer, e.old, e.new) for e in events], "figures": [(e.target, e.error) for e in events]}


# ------------------------------------------------------------------------------------------------ what goes wrong on one

@dataclass(frozen=True)
class Fails(Estimate):
    """Process 0, which decides, meets an error of this kind."""

    kind: str

    def __call__(self, layer, seen=None):
        raise {"ValueError": ValueError, "KeyError": KeyError, "TypeError": TypeError,
               "UnicodeError": lambda text: UnicodeDecodeError(
            "utf-8", b"x", 0, 1, text), "LinAlgError": torch.linalg.LinAlgError}[self.kind]("no estimate today")


@dataclass(frozen=True)
class FailsToResize(ResizeRule):
    def __call__(self, U, V, k, seen=None):
        raise FloatingPointError("no factors today")


def stopped(what, rank=0):
    """(the error's type and text, ranks afterwards) of a decision that cannot be made."""
    model = made("repaired")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    recipe = replace(RECIPES["repaired"], every=2)
    if what in KINDS:
        recipe = replace(recipe, estimate=Fails(what))
    elif what == "resize":
        recipe = replace(recipe, resize=FailsToResize(), estimate=StableRank(), control=Schedule(((0, 4),)))
    elif what == "metric":
        recipe = replace(ALR, every=4)
    try:
        if what == "unlike weights":
            with torch.no_grad():
                model[2].V[0, 0] += rank
        if what == "unlike ranks" and rank == 1:
            model = factorize_(nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 12)).double(),
                               rank=3)
            optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        adapter = alr.RankAdapter(model, optimizer, recipe, total_steps=STEPS)
        for i in range(4):
            F.cross_entropy(model(share("alr", i, rank, 2)[0]), share("alr", i, rank, 2)[1]).backward()
            alr.average_gradients(model)
            optimizer.step()
            if what == "metric" and i == 1 and rank == 0:
                adapter.observer.books["2"].total["H"].diagonal().neg_()    # no second moment at all
            if what == "weights" and i == 1:
                with torch.no_grad():
                    model[2].U[0, 0] = float("nan")
            adapter.step()
            optimizer.zero_grad()
        return "nothing", dict(adapter.ranks)
    except Exception as error:
        return f"{type(error).__name__}: {error}", {name: layer.rank for name, layer in alr.low_rank_layers(model).items()}


KINDS = ("ValueError", "KeyError", "TypeError", "UnicodeError", "LinAlgError")
STOPS = {**dict.fromkeys(KINDS, "no estimate today"), "resize": "RankAdapter: '0' cannot go from rank 8 to 4: no factors today",
         "weights": "the weights of '2' are not finite", "metric": "layer '2': a second moment is far from positive",
         "unlike weights": "the processes do not hold the same model",
         "unlike ranks": "the processes do not hold the same model"}


def skipped(rank=0, size=1):
    """A step that overflows on process 1 alone, which a GradScaler skips on both: what was counted, and what came of it."""
    model = made("alr")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    adapter, rows = alr.RankAdapter(model, optimizer, replace(ALR, every=5), total_steps=STEPS), []
    for i in range(7):
        x, y = share("alr", i, rank, size)
        (F.cross_entropy(model(x), y) * (float("inf") if i == 3 and (rank == 1 or size == 1) else 1)).backward()
        alr.average_gradients(model)
        if all(p.grad.isfinite().all() for p in model.parameters()):
            optimizer.step()
        adapter.step()
        if adapter.observer is not None:
            rows.append({name: book.total["count"].tolist() for name, book in adapter.observer.books.items()})
        optimizer.zero_grad()
    return {"steps": adapter.steps, "ranks": adapter.ranks, "rows": rows}


def observed(name, rank=0, size=1):
    """What is seen of every layer over a window of four steps, on process 0."""
    model, found = made(name), {}
    for needs in (("input_moment", "grad_moment"), ("importance",), ("weight_gradient",)):
        observer = Observer(alr.low_rank_layers(model), needs, 4, group=Group())
        for i in range(4):
            x, y = share(name, i, rank, size)
            F.cross_entropy(model(x), y).backward()
            alr.average_gradients(model)
            observer.commit()
        for layer, seen in observer.close().items():
            for field in needs:
                found[layer, field] = getattr(seen, field)
            found[layer, needs[0], "steps"] = seen.steps
            if needs != ("weight_gradient",):
                found[layer, needs[0], "rows"] = seen.rows
    return found


# ------------------------------------------------------------------------------------------------ two processes

def worker(rank, port, folder):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    warnings.simplefilter("ignore")
    results = {name: trained(name, rank, 2) for name in RECIPES}
    results["observed"] = {name: observed(name, rank, 2) for name in ("alr", "routed")}
    results["skipped"] = skipped(rank, 2)
    results["stopped"] = {what: stopped(what, rank) for what in STOPS}
    torch.save(results, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What both processes found, of everything above."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root = str(Path(alr.__file__).parents[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    both = [subprocess.Popen([sys.executable, __file__, str(rank), port, str(folder)], env=environment, stderr=subprocess.PIPE,
                             text=True) for rank in (0, 1)]
    ends = [None, None]
    readers = [threading.Thread(target=lambda i=i: ends.__setitem__(i, both[i].communicate(timeout=240)[1])) for i in (0, 1)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(250)
    for process in both:
        process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(str(end)[-2000:] for end in ends)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.filterwarnings("ignore:RankAdapter. Budget")
@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_equal_one(name, two):
    one, (a, b) = trained(name), (found[name] for found in two)
    assert one["events"] and a["ranks"] == b["ranks"] == one["ranks"] and a["events"] == b["events"] == one["events"]
    assert any(new > old for _, _, old, new in one["events"]) or "growing" not in name
    assert a["figures"] == b["figures"]
    for key in one["weights"]:
        assert torch.equal(a["weights"][key], b["weights"][key]), key
        torch.testing.assert_close(a["weights"][key], one["weights"][key], rtol=1e-5, atol=1e-7)
    for x, y in zip(a["moments"], b["moments"], strict=True):
        assert x.keys() == y.keys() and all(torch.equal(torch.as_tensor(x[k]), torch.as_tensor(y[k])) for k in x)


def test_what_was_grown_is_more_than_zeros(two):
    for name in ("growing", "growing along the gradient", "growing, reset"):
        U = two[1][name]["weights"]["0.U"]                          # on the process that did not draw it
        assert U.shape[1] == 11 and (U.norm(dim=0) > 0).all()
    random, along = (two[1][name]["weights"]["0.V"] for name in ("growing", "growing along the gradient"))
    assert not torch.allclose(random, along)


@pytest.mark.parametrize("name", ["alr", "routed"])
def test_two_processes_see_what_one_sees(name, two):
    one, (a, b) = observed(name), (found["observed"][name] for found in two)
    assert a.keys() == one.keys() and not b                         # process 0 decides
    for key, x in one.items():
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(a[key], x, rtol=1e-9, atol=1e-15)
        else:
            assert a[key] == x, key


def test_a_step_that_overflows_on_one_process_counts_on_none(two):
    one, (a, b) = skipped(), (found["skipped"] for found in two)
    assert a["steps"] == b["steps"] == one["steps"] == 6 and a["ranks"] == b["ranks"] == one["ranks"]
    for mine, theirs, whole in zip(a["rows"], b["rows"], one["rows"], strict=True):
        for name in whole:
            assert [x + y for x, y in zip(mine[name], theirs[name])] == whole[name]


@pytest.mark.parametrize("what", STOPS)
def test_what_stops_one_process_stops_both_and_changes_nothing(what, two):
    (a, ranks), (b, others) = (found["stopped"][what] for found in two)
    assert STOPS[what] in a and STOPS[what] in b
    assert a.split(":")[0] == b.split(":")[0] or what == "UnicodeError"     # whose type wants more than a text
    if what != "unlike ranks":
        assert ranks == others


if __name__ == "__main__":
    worker(int(sys.argv[1]), *sys.argv[2:])
