"""What a decision has seen: one object, made for a window of optimizer steps, gone afterwards.

    observer = Observer(layers, needs=("importance",), steps=4)
    for _ in range(4):
        ...                                 # forward, backward, optimizer.step()
        observer.commit()                   # the optimizer has stepped: what was booked since the last time counts
    seen = observer.close()                 # {layer name: Seen}; the layers are as they were

Dims: m out_features, n in_features, r rank, B rows of a batch (all leading dims but the features).  x (..., n),
h = x V^T (..., r), y = h U^T (..., m), d = dloss/dh (..., r), G = dloss/dW (m, n).

How it counts:
- Everything is booked in the backward pass, once per backward of a layer's output.  A forward that no backward follows
  (validation, a probe), and the recomputation of activation checkpointing, leave no trace.
- What was booked becomes part of the result when the optimizer has stepped (`commit`): micro-batches of one step are one
  step.  A step in which any number of any layer was not finite, as one that a GradScaler skips, does not count at all.
- Sums are over rows, so a layer that sees a part of the rows (an expert), or all of them twice (shared weights), has the
  share of the loss that is its own.
- In float32 or wider, autocast off, whatever the model computes in.
- Nothing is read from the device until `turn` and `close`.

The window has two halves.  The first books the second moments of h and d, from which `fisher.metric` takes directions;
the second measures how much the loss feels each of these directions.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .axes import Momentum
from .factor import gram, working
from .fisher import metric_of
from .group import Group
from .linear import LowRankLinear, factored

FIELDS = ("input_moment", "grad_moment", "importance", "weight_gradient")
PER = ("auto", "row", "example")        # what a term of the loss may belong to


class Seen(NamedTuple):
    """What was observed of one layer.  Small matrices are float64 on the CPU; what was not asked for is None."""

    steps: int                              # optimizer steps that counted
    rows: float                             # rows of the layer's input, per step; 0: it was not used
    input_moment: Tensor | None = None      # mean over rows of h h^T, (r, r)
    grad_moment: Tensor | None = None       # sum over rows of d d^T, times the loss terms of the step, (r, r)
    importance: Tensor | None = None        # half the mean square of what the loss feels of each direction, falling, (r,)
    A: Tensor | None = None                 # the directions, (r, r): W = U A B V, importance[j] is of U A[:, j] B[j] V
    B: Tensor | None = None                 # (r, r)
    weight_gradient: Tensor | None = None   # sum of G over the window, (m, n), on the layer's device
    grams: tuple[Tensor, Tensor] | None = None      # U^T U and V V^T as they are now, (r, r) each
    momentum: Momentum | None = None        # the optimizer's, of W, where a resize asks for it


# ------------------------------------------------------------------------------------------------ booking, in the graph
# Custom operators, so that torch.compile keeps them in its graph (one more graph for a window, none in between).

def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _leading(x: Tensor) -> int:
    """Entries of the first dim: examples, if the batch comes first; 1 for a single row."""
    return x.shape[0] if x.dim() > 1 else 1


@torch.library.custom_op("alr::book_moments", mutates_args=("H", "K", "count"))
def book_moments(h: Tensor, d: Tensor, H: Tensor, K: Tensor, count: Tensor) -> None:
    """H += sum of h h^T, K += sum of d d^T, count += (rows, examples).  (..., r), (..., r), (r, r), (r, r), (2,)."""
    if h.numel() == 0:                                                  # no row: an expert without tokens
        return
    with torch.autocast(h.device.type, enabled=False):
        hr, dr = _rows(h).to(H.dtype), _rows(d).to(K.dtype)             # (B, r), (B, r)
        H.add_(hr.mT @ hr)
        K.add_(dr.mT @ dr)
        count[0].add_(len(hr))
        count[1].add_(_leading(h))


@torch.library.custom_op("alr::book_importance", mutates_args=("felt", "count"))
def book_importance(h: Tensor, d: Tensor, A: Tensor, B: Tensor, felt: Tensor, count: Tensor) -> None:
    """felt[0] += sum over rows of (d^T a_j b_j^T h)^2; felt[1] the same with the rows of an example added up first.

    (..., r), (..., r), (r, r), (r, r), (2, r), (2,).
    """
    if h.numel() == 0:
        return
    with torch.autocast(h.device.type, enabled=False):
        change = (d.to(A.dtype) @ A) * (h.to(B.dtype) @ B.mT)           # (..., r)
        felt[0].add_(_rows(change).square().sum(0))
        whole = change.reshape(_leading(h), -1, change.shape[-1]).sum(1)    # (examples, r)
        felt[1].add_(whole.square().sum(0))
        count[0].add_(len(_rows(h)))
        count[1].add_(_leading(h))


@torch.library.custom_op("alr::book_gradient", mutates_args=("G", "passed"))
def book_gradient(x: Tensor, g: Tensor, G: Tensor, passed: Tensor) -> None:
    """G += dloss/dW, passed += (rows, examples).  x (..., n), g (..., m), G (m, n), passed (2,)."""
    if x.numel() == 0:
        return
    with torch.autocast(x.device.type, enabled=False):
        G.add_(_rows(g).to(G.dtype).mT @ _rows(x).to(G.dtype))
        passed[0].add_(len(_rows(x)))
        passed[1].add_(_leading(x))


for _op in (book_moments, book_importance, book_gradient):
    _op.register_fake(lambda *args: None)


def _plain(book, h: Tensor, d: Tensor, *buffers: Tensor) -> None:
    book(h, d, *buffers)


def _jagged(book, h: Tensor, d: Tensor, *buffers: Tensor) -> None:
    """The same of a nested tensor (examples, length of each, ...), whose lengths stay on the device."""
    rows, slopes, ends, examples = h.values(), d.values(), h.offsets()[1:], h.shape[0]      # (R, ...), (R, ...), (examples,)
    if book is torch.ops.alr.book_importance:
        A, B, felt, count = buffers
        each = torch.zeros_like(felt)                                   # (2, r)
        book(rows, slopes, A, B, each, count)
        with torch.autocast(rows.device.type, enabled=False):
            change = (slopes.to(A.dtype) @ A) * (rows.to(B.dtype) @ B.mT)       # (R, ..., r)
        change = change.reshape(len(rows), -1, len(A)).sum(1)           # (R, r)
        example = torch.bucketize(torch.arange(len(rows), device=ends.device), ends, right=True)      # (R,)
        whole = change.new_zeros(examples, len(A)).index_add(0, example, change)            # (examples, r)
        felt.add_(torch.stack([each[0], whole.square().sum(0)]))
    else:
        book(rows, slopes, *buffers)
    buffers[-1][1].add_(examples - len(rows))                           # the operator took each row for an example


class _Look(torch.autograd.Function):
    """The identity on h; its backward books what it sees.  The last tensors say what and where."""

    @staticmethod
    def forward(ctx, h, book, leaf, *buffers):
        ctx.book, ctx.leaf = book, leaf
        ctx.buffers = buffers                           # written into by every backward: not what autograd should watch
        ctx.save_for_backward(h)
        return h.view_as(h)

    @staticmethod
    def backward(ctx, d):
        h, = ctx.saved_tensors
        if _counts(d, ctx.leaf):
            with torch.no_grad():
                (_jagged if h.is_nested else _plain)(ctx.book, h, d.detach(), *ctx.buffers)
        return (d, None, None, *[None] * len(ctx.buffers))


class _LookOut(torch.autograd.Function):
    """The identity on a layer's output y; its backward books G from its input x.

    Not one with `_Look`: torch.compile refuses a Function that is given the same tensor twice.
    """

    @staticmethod
    def forward(ctx, y, x, leaf, *buffers):
        ctx.leaf, ctx.buffers = leaf, buffers
        ctx.save_for_backward(x)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, g):
        x, = ctx.saved_tensors
        if _counts(g, ctx.leaf):
            with torch.no_grad():
                (_jagged if x.is_nested else _plain)(torch.ops.alr.book_gradient, x, g.detach(), *ctx.buffers)
        return g, None, None, None, None


def _elsewhere() -> bool:
    """Is this forward exported, traced, differentiated forwards, or taken apart by functorch (vmap, per-sample gradients)?

    Then it is not seen.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return (torch._C._functorch.maybe_current_level() is not None or torch.jit.is_tracing()
            or torch.autograd.forward_ad._current_level >= 0)


def _holey(h: Tensor) -> bool:
    """Is it a nested tensor whose rows do not lie one after another?"""
    return h.layout is not torch.jagged or h._ragged_idx != 1 or h.lengths() is not None


def _leaf(U: Tensor):
    """The node of the graph that adds to U's gradient; None where it cannot be asked for, in a compiled graph."""
    if torch.compiler.is_compiling() or not U.requires_grad:
        return None
    return torch.autograd.graph.get_gradient_edge(U).node


def _counts(d: Tensor, leaf) -> bool:
    """Does the backward pass under way train the layer?  Not one of several directions at once (is_grads_batched), nor one
    that asks for other gradients only: of the input, for a saliency or a gradient penalty."""
    if torch.compiler.is_compiling():
        return True
    if torch._C._functorch.is_batchedtensor(d) or torch._C._functorch.is_legacy_batchedtensor(d):
        return False
    try:
        return leaf is None or torch._C._will_engine_execute_node(leaf)
    except RuntimeError:                                # autograd.grad asks for this very gradient
        return True


def _at_rest():
    return factored


class Watched:
    """`linear.factored` of one layer while it is observed.  A copy of it, or a saved one, is `factored` again."""

    def __init__(self, book: Book):
        self.book = book

    def __call__(self, x: Tensor, U: Tensor, V: Tensor, bias: Tensor | None) -> Tensor:
        book = self.book
        h = F.linear(x, V)                                              # (..., r)
        seen = h.requires_grad and not _elsewhere() and not (h.is_nested and _holey(h))
        inside = seen and h.shape[-1] > 0                               # a layer of rank 0 has no inside
        if inside and book.H is not None and book.H.shape[1] != h.shape[-1]:     # of another rank: loaded since
            seen = inside = False
        leaf = _leaf(U) if seen else None
        if inside and book.measuring:
            h = _Look.apply(h, torch.ops.alr.book_importance, leaf, book.A, book.B, book.felt, book.count)
        elif inside and book.H is not None:
            h = _Look.apply(h, torch.ops.alr.book_moments, leaf, book.H, book.K, book.count)
        y = F.linear(h, U, bias)                                        # (..., m)
        return _LookOut.apply(y, x, leaf, book.G, book.passed) if seen and book.G is not None else y

    def __reduce__(self):
        return _at_rest, ()


# ------------------------------------------------------------------------------------------------ the window

BUFFERS = ("H", "K", "count", "felt", "G", "passed")


@dataclass(eq=False)
class Book:
    """The sums of one layer: those of the step under way, and in `total` those of the steps that counted."""

    count: Tensor                           # (2,): rows, examples
    H: Tensor | None = None                 # (r, r)
    K: Tensor | None = None                 # (r, r)
    felt: Tensor | None = None              # (2, r)
    G: Tensor | None = None                 # (m, n)
    passed: Tensor | None = None            # (2,): rows, examples that G was booked from
    A: Tensor | None = None                 # (r, r): the directions that are measured
    B: Tensor | None = None                 # (r, r)
    measuring: bool = False
    total: dict[str, Tensor] | None = None

    @classmethod
    def of(cls, layer: LowRankLinear, moments: bool, gradient: bool) -> Book:
        wide, r = working(layer.U.dtype), layer.rank
        def zeros(*shape):
            return torch.zeros(shape, device=layer.U.device, dtype=wide)
        book = cls(zeros(2), *((zeros(r, r), zeros(r, r)) if moments else (None, None)), None,
                   *((zeros(layer.out_features, layer.in_features), zeros(2)) if gradient else (None, None)))
        book.total = {name: torch.zeros_like(x) for name, x in book.pending().items()}
        return book

    def pending(self) -> dict[str, Tensor]:
        return {name: x for name in BUFFERS if (x := getattr(self, name)) is not None}


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in float64 on the CPU, by one copy per device instead of one per tensor."""
    out: list[Tensor | None] = [None] * len(tensors)
    places: dict[tuple, list[int]] = {}
    for i, x in enumerate(tensors):
        places.setdefault((x.device, x.dtype), []).append(i)
    for indices in places.values():
        flat = torch.cat([tensors[i].detach().reshape(-1) for i in indices]).cpu().double()
        for i, part in zip(indices, flat.split([tensors[i].numel() for i in indices])):
            out[i] = part.reshape(tensors[i].shape)
    return out


def check_steps(steps: int, who: str) -> int:
    """The length of a window as a whole number.  ValueError for one that no step fits into."""
    if isinstance(steps, bool) or not isinstance(steps, numbers.Integral) or steps < 1:
        raise ValueError(f"{who}: steps is {steps!r}; wanted the length of the window in optimizer steps, at least 1.")
    return int(steps)


class Observer:
    """Looks at low-rank layers over a window of optimizer steps; see the top of this file.

    layers: by name.  needs: which fields of `Seen` are wanted.  steps: the length of the window.  per: what one term of
    the loss belongs to, "row" (every token has a loss of its own: language models) or "example" (an entry of the first
    dim has one loss: pooled classifiers); "auto" takes "example" where all layers see the same number of examples, some
    of them several rows each and some one, and "row" otherwise.
    ValueError for a need that is not known, a window without a step, or a layer whose forward is not `factored`.
    """

    def __init__(self, layers: Mapping[str, LowRankLinear], needs: Iterable[str], steps: int = 1,
                 per: Literal["auto", "row", "example"] = "auto", group: Group = Group()):
        self.needs, self.steps, self.per, self.group = frozenset(needs), check_steps(steps, "Observer"), per, group
        if unknown := self.needs - set(FIELDS):
            raise ValueError(f"Observer: {sorted(unknown)[0]!r} cannot be observed; there are {', '.join(FIELDS)}.")
        if per not in PER:
            raise ValueError(f"Observer: per is {per!r}; wanted one of {', '.join(PER)}.")
        self.layers = dict(layers)
        for name, layer in self.layers.items():
            if layer.op is not factored and not isinstance(layer.op, Watched):
                raise ValueError(f"Observer: the forward of {name!r} is {layer.op!r}, whose inside cannot be seen; leave out "
                                 "`op`, or choose an estimate and a resize that observe nothing.")
        moments = bool(self.needs - {"weight_gradient"})
        self.books = {name: Book.of(layer, moments, "weight_gradient" in self.needs) for name, layer in self.layers.items()}
        self.done, self.turned, self.open = 0, False, True
        device = next(iter(self.books.values())).count.device if self.books else torch.device("cpu")
        self.good = torch.zeros(2, device=device, dtype=torch.float32)      # steps that counted, of each half
        self.first: dict[str, tuple] = {}               # after `turn`: layer -> (S, rows) of the first half
        self._install()

    @property
    def half(self) -> int:
        """The step after which directions are chosen; 0 where none are."""
        return (self.steps + 1) // 2 if "importance" in self.needs and self.steps > 1 else 0

    def _install(self) -> None:
        for name, layer in self.layers.items():
            layer.op = Watched(self.books[name])

    def remove(self) -> None:
        """Leave the layers as they were."""
        for layer in self.layers.values():
            if isinstance(layer.__dict__.get("op"), Watched):
                del layer.op
        self.open = False

    # ---------------------------------------------------------------- steps

    @torch.no_grad()
    def settle(self) -> None:
        """No optimizer step came of the last backward: drop what it booked if any of it is not finite, else keep it."""
        ok = self._finite()
        for book in self.books.values():
            for x in book.pending().values():
                x.copy_(torch.where(ok.to(x.device), x, torch.zeros((), dtype=x.dtype, device=x.device)))

    @torch.no_grad()
    def commit(self) -> None:
        """The optimizer has stepped: what was booked since the last commit counts, if all of it is finite."""
        counts = [x.to(self.good) for book in self.books.values() for x in (book.count, book.passed) if x is not None]
        terms = torch.stack(counts).amax(0) if counts else self.good    # (2,): rows, examples of the layer that saw the most
        ok = self._finite() & (terms[0] > 0)
        self.good[int(self.turned)].add_(ok.to(self.good))
        for book in self.books.values():
            scale = terms.to(book.count)
            for name, x in book.pending().items():
                part = x * scale[0] if name == "K" else x * scale[:, None] if name == "felt" else x
                book.total[name].add_(torch.where(ok.to(x.device), part, torch.zeros((), dtype=x.dtype, device=x.device)))
                x.zero_()
        self.done += 1
        if self.half and self.done == self.half:
            self.turn()

    def _finite(self) -> Tensor:
        """Is every number finite that was booked since the last commit?  A bool on the device."""
        sums = [x.sum().to(self.good.device) for book in self.books.values() for x in book.pending().values()]
        ok = torch.stack(sums).isfinite().all() if sums else torch.ones((), dtype=torch.bool, device=self.good.device)
        if self.group.size == 1:
            return ok
        bad = (~ok).to(self.good)                           # on one of the processes: then the step counts on none
        self.group.sum([bad])
        return bad == 0

    # ---------------------------------------------------------------- halves

    @torch.no_grad()
    def turn(self) -> None:
        """From the moments of the first half to the directions that the second half measures."""
        found, problem = {}, None
        try:
            found = self._metrics()
        except Exception as error:
            problem = error
        self.group.agree(problem, self.good.device)
        for name, book in self.books.items():
            if self.group.rank == 0:
                S, A, B, rows = found[name]
                self.first[name] = (S, rows)
            else:
                A, B = torch.zeros_like(book.H), torch.zeros_like(book.H)
            book.A, book.B, book.measuring = A.to(book.H), B.to(book.H), True
            book.felt = torch.zeros(2, len(A), device=book.H.device, dtype=book.H.dtype)
            book.total |= {"felt": torch.zeros_like(book.felt), "count": torch.zeros_like(book.count)}
        self.group.broadcast([x for book in self.books.values() for x in (book.A, book.B)])
        self.turned = True

    def _metrics(self) -> dict[str, tuple]:
        """{layer: (S, A, B, rows)} from the moments so far, on the process that decides; {} on others."""
        good = self._reduce(("H", "K", "count"))[0]
        if self.group.rank > 0:
            return {}
        return {name: (*directions(name, both, H, K), rows) for name, (H, K, rows, both) in self._moments(good).items()}

    def _moments(self, good: float) -> dict[str, tuple]:
        """{layer: (H, K, rows, Gram matrices)} of `good` steps, on the host by one copy."""
        small = iter(to_host([x for name, layer in self.layers.items()
                              for x in (*(self.books[name].total[key] for key in ("H", "K", "count")), *grams(layer))]))
        out = {}
        for name in self.layers:
            H, K, count, Gu, Gv = (next(small) for _ in range(5))
            out[name] = (H / count[0].clamp_min(1), K / max(good, 1), count[0].item(), (Gu, Gv))
        return out

    def _reduce(self, names: Sequence[str]) -> tuple[float, float]:
        """Sums over all processes, in place, in one order for all of them; returns the steps that counted, of each half."""
        self.group.sum([self.books[name].total[key] for name in self.layers for key in names if key in self.books[name].total])
        for name in self.layers:                            # a process's own d is of its own mean loss
            for key in ("K", "felt", "G"):
                if key in names and key in self.books[name].total:
                    self.books[name].total[key].div_(self.group.size)
        good = self.good.clone()
        self.group.sum([good])
        return tuple((good / self.group.size).tolist())

    # ---------------------------------------------------------------- the end

    @torch.no_grad()
    def close(self) -> dict[str, Seen]:
        """What was seen, by layer; {} on a process that does not decide.  The layers are as they were afterwards."""
        self.remove()
        if self.turned:
            return self._measured()
        good = self._reduce(BUFFERS)[0]
        if self.group.rank > 0:
            return {}
        if not self.needs - {"weight_gradient"}:
            passed = to_host([book.total["passed"] for book in self.books.values()])
            return {name: Seen(round(good), rows[0].item() / max(good, 1), weight_gradient=book.total["G"])
                    for (name, book), rows in zip(self.books.items(), passed)}
        out = {}
        for name, (H, K, rows, both) in self._moments(good).items():
            found = {}
            if "importance" in self.needs:
                S, A, B = directions(name, both, H, K)
                found = {"importance": S.square() / 2, "A": A, "B": B}
            out[name] = Seen(round(good), rows / max(good, 1), H, K, weight_gradient=self.books[name].total.get("G"),
                             grams=both, **found)
        return out

    def _measured(self) -> dict[str, Seen]:
        good = self._reduce(("felt", "count", "G"))
        if self.group.rank > 0:
            return {}
        small = to_host([x for name, book in self.books.items() for x in (
            book.total["felt"], book.total["count"], book.total["H"], book.total["K"], book.A, book.B,
            *grams(self.layers[name]))])
        counts = [small[8 * i + 1].tolist() for i in range(len(self.books))]
        example = self.per == "example" or self.per == "auto" and pooled(counts)
        out = {}
        for i, (name, book) in enumerate(self.books.items()):
            felt, count, H, K, A, B, *both = small[8 * i:8 * i + 8]
            S, rows = self.first[name]
            H, K = H / max(rows, 1), K / max(good[0], 1)
            if count[0] > 0:
                importance = felt[int(example)] / (2 * max(good[1], 1))     # (r,)
            else:                                           # seen in the first half alone, or never: then S is 0
                importance = S.square() / 2
            order = importance.argsort(descending=True, stable=True)
            A, B = A[:, order], B[order]
            steps = round(sum(good))
            out[name] = Seen(steps, (rows + count[0].item()) / max(sum(good), 1), H, K, importance[order], A, B,
                             book.total.get("G"), tuple(both))
        return out

    # ---------------------------------------------------------------- to stop and to go on

    def state_dict(self) -> dict:
        """Tensors and plain numbers: all that was booked so far, of several processes by this one (see `shared_out`)."""
        books = {name: {"pending": {k: x.clone() for k, x in book.pending().items()},
                        "total": {k: x.clone() for k, x in book.total.items()},
                        "A": book.A, "B": book.B} for name, book in self.books.items()}
        return {"steps": self.steps, "done": self.done, "turned": self.turned, "good": self.good.clone(), "books": books,
                "first": {name: list(pair) for name, pair in self.first.items()}}

    def load_state_dict(self, state: dict) -> None:
        """Go on where another observer stopped.  Layers that it did not look at are left alone; books of others are dropped."""
        self.steps = state.get("steps", self.steps)         # older checkpoints leave the length to the caller
        for name in [name for name in self.layers if name not in state["books"]]:      # frozen when the window was opened
            del self.layers[name].op, self.layers[name], self.books[name]
        self.done, self.turned, self.good = state["done"], state["turned"], state["good"].to(self.good)
        self.first = {name: tuple(pair) for name, pair in state["first"].items()}
        for name, book in self.books.items():
            saved = state["books"][name]
            like = book.count
            for key, x in saved["pending"].items():
                setattr(book, key, x.to(like))
            book.total = {key: x.to(like) for key, x in saved["total"].items()}
            book.measuring = self.turned
            book.A, book.B = (None if x is None else x.to(like) for x in (saved["A"], saved["B"]))

    def __setstate__(self, state):                          # a copy, or one that was pickled, looks at its own layers
        self.__dict__.update(state)
        if self.open:
            self._install()


@torch.no_grad()
def shared_out(states: Sequence[dict], size: int) -> list[dict]:
    """State dicts of the observers of several processes -> those with which `size` of them go on between two steps.

    The first is given all that was seen and the others nothing; their sum is what it was, up to rounding.
    """
    turned, books = states[0]["turned"], {}
    good = torch.stack([state["good"] for state in states]).mean(0)             # (2,)
    for name, book in states[0]["books"].items():
        total = {}
        for key, mine in book["total"].items():
            parts = torch.stack([state["books"][name]["total"][key] for state in states])      # (processes, ...)
            whole = mine if turned and key in ("H", "K") else parts.sum(0)      # `turn` has summed these two
            total[key] = whole * (size / len(states)) if key in ("K", "felt", "G") and whole is not mine else whole
        books[name] = book | {"total": total}
    nothing = {name: book | {"total": {key: torch.zeros_like(x) for key, x in book["total"].items()}}
               for name, book in books.items()}
    return [states[0] | {"good": good, "books": books}] + [states[0] | {"good": good, "books": nothing}] * (size - 1)


def directions(name: str, both: tuple[Tensor, Tensor], H: Tensor, K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`fisher.metric_of`; FloatingPointError names the layer."""
    try:
        return metric_of(*both, H, K)
    except (FloatingPointError, torch.linalg.LinAlgError) as error:
        raise FloatingPointError(f"layer {name!r}: {error}") from error


def grams(layer: LowRankLinear) -> tuple[Tensor, Tensor]:
    """U^T U and V V^T in float64, on the layer's device where it has float64: (r, r), (r, r)."""
    return gram(layer.U, host=False), gram(layer.V.mT, host=False)


def pooled(counts: Sequence[Sequence[float]]) -> bool:
    """Do the rows of an example come together in one loss?  counts: (rows, examples) of every layer.

    So it is taken where all layers in use see the same number of examples, some layers several rows of each and others
    one: a trunk over positions and a head over their mean.
    """
    used = [(rows, examples) for rows, examples in counts if rows > 0]
    return (len({examples for _, examples in used}) == 1 and any(rows > examples for rows, examples in used)
            and any(rows == examples for rows, examples in used))
