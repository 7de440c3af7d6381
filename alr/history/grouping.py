"""Rows of a gradient that agree, and their mean: scripts v1 and v2, and the signal of v3 to v7.4.

Dims: m rows (neurons), n columns.  G (m, n) gradient of a weight, labels (m,) int64, 0 to groups - 1 in the order in
which the groups were started.  Pure functions first, then the frozen value that a recipe names on its `gradient` axis.

The grouping rule: go through the rows in some order; a row that has no group yet starts one, and takes with it every
other such row whose cosine similarity to it is at least the threshold.  Only the starter counts: members may differ.
v3 to v7.1 count a group's size in another way: `widest_group`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..axes import Count, GradientRule, NonNegative, Share, Whole
from ..factor import working


def similarity(G: Tensor) -> Tensor:
    """Cosine between all pairs of rows, by the scripts' x / (|x| + 1e-8).  (m, n) -> (m, m), float32 or wider.

    A row much longer than 1e-8 has 1 on the diagonal, up to rounding; one shorter than about 1e-7 is similar to nothing
    at a threshold of 0.85, not even to itself; a zero row has similarity 0.
    """
    G = G.detach().to(working(G.dtype))
    X = G / (G.norm(dim=1, keepdim=True) + 1e-8)                    # (m, n)
    return X @ X.mT                                                 # (m, m)


def by_index(m: int) -> Tensor:
    """The order of script v1 and of v3 to v7.4: row 0, 1, 2, ...  -> (m,) a permutation, on the CPU."""
    return torch.arange(m, device="cpu")                            # (m,)


def by_norm(G: Tensor) -> Tensor:
    """Script v2's order: rows by falling norm, so that the strongest gradients lead.  (m, n) -> (m,) a permutation."""
    return G.detach().norm(dim=1).argsort(descending=True, stable=True)     # (m,)


def by_chance(m: int, seed: int = 0) -> Tensor:
    """An arbitrary order, to see how much the order decides; no script has it.  -> (m,) a permutation, on the CPU."""
    return torch.randperm(m, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")     # (m,)


def groups_loop(S: Tensor, order: Tensor, threshold: float) -> Tensor:
    """Script v1's way, and the one to check by eye: a Python loop over the rows.  (m, m), (m,) -> (m,) labels."""
    labels = torch.full((len(S),), -1, dtype=torch.int64, device=S.device)  # (m,)
    groups = 0
    for i in order.tolist():
        if labels[i] < 0:
            taken = (S[i] >= threshold) & (labels < 0)              # (m,)
            taken[i] = True
            labels[taken] = groups
            groups += 1
    return labels


def groups(S: Tensor, order: Tensor, threshold: float) -> Tensor:
    """The same labels from a few passes over all similar pairs at once: faster where groups are many and small, slower
    where they are few and large, since the loop pays per group and this per pair.

    In one pass, every open row that no earlier open row is similar to starts a group, and rows similar to a starter are
    closed.  The starters are the ones of the loop (the lexicographically first maximal independent set: Blelloch,
    Fineman & Shun 2012), since an open row's fate hangs on earlier open rows alone; for a random order they need
    O(log^2 m) passes.  (m, m), (m,) -> (m,).
    """
    if S.device.type == "mps":                                      # has no integer scatter by minimum
        return groups(S.cpu(), order.cpu(), threshold).to(S.device)
    order = order.to(S.device)
    place = torch.empty_like(order)                                 # (m,)
    place[order] = torch.arange(len(S), device=S.device)
    i, j = (S >= threshold).nonzero(as_tuple=True)                  # (pairs,), (pairs,)
    earlier = place[i] < place[j]
    i, j = i[earlier], j[earlier]                                   # i could take j
    is_open = torch.ones(len(S), dtype=torch.bool, device=S.device)     # (m,)
    starts = torch.zeros_like(is_open)                              # (m,)
    a, b = i, j                                                     # pairs with both ends open
    while is_open.any():
        new = is_open.clone()                                       # (m,)
        new[b] = False
        starts |= new
        is_open &= ~new
        is_open[b[new[a]]] = False
        both = is_open[a] & is_open[b]
        a, b = a[both], b[both]
    number = torch.empty_like(order)                                # (m,): a starter's group
    number[order] = starts[order].cumsum(0) - 1
    labels = torch.where(starts, number, len(S))                    # (m,)
    taken = starts[i]
    return labels.scatter_reduce(0, j[taken], number[i[taken]], "amin")     # to the earliest starter


def starters(labels: Tensor, order: Tensor) -> Tensor:
    """The rows that started the groups 0, 1, 2, ...: (m,) labels of `groups` in that order -> (groups,)."""
    order = order.to(labels.device)
    first = torch.full((number_of_groups(labels),), len(labels), device=labels.device)      # (groups,)
    place = torch.arange(len(labels), device=labels.device)         # (m,)
    return order[first.scatter_reduce(0, labels[order], place, "amin")]


def number_of_groups(labels: Tensor) -> int:
    """How many groups there are: script v7.4's suggestion for the rank.  (m,) -> int."""
    return int(labels.max()) + 1


def largest_group(labels: Tensor) -> int:
    """Size of the largest group, every row counted once.  (m,) -> int.  v3 to v7.1 count otherwise: `widest_group`."""
    return int(labels.bincount().max())


def widest_group(S: Tensor, threshold: float) -> int:
    """The most rows that any starter is similar to, those that an earlier group has taken counted again.

    Scripts v3 to v7.1 take it for the rank.  Starters in the order of the rows.  (m, m) -> int of at least 1.
    """
    order = by_index(len(S))                                        # (m,)
    first = starters(groups(S, order, threshold), order)            # (groups,)
    return max(1, int((S[first] >= threshold).sum(1).max()))


def group_mean_loop(G: Tensor, labels: Tensor) -> Tensor:
    """Each row replaced by the mean of its group, one group after another: script v1.  (m, n), (m,) -> (m, n)."""
    out = G.detach().clone()                                        # (m, n)
    for g in range(number_of_groups(labels)):
        mine = labels == g                                          # (m,)
        out[mine] = out[mine].mean(dim=0)
    return out


def group_mean(G: Tensor, labels: Tensor) -> Tensor:
    """The same by scatter-add: script v2.  (m, n), (m,) -> (m, n).  The sum over rows stays what it was."""
    G = G.detach()
    m = len(G)                                                      # as many bins as rows: no need to count the groups
    sums = torch.zeros_like(G).index_add_(0, labels, G)             # (m, n), the first `groups` rows in use
    sizes = torch.zeros(m, dtype=G.dtype, device=G.device).index_add_(0, labels, torch.ones_like(G[:, 0]))     # (m,)
    return (sums / sizes.clamp_min(1)[:, None])[labels]             # (m, n)


# ---------------------------------------------------------------------------------------------- the axis: gradient

class Grouped(NamedTuple):
    """What one averaging did to one weight's gradient."""

    step: int                           # optimizer steps taken before
    threshold: float
    groups: int
    largest: int
    kept: float                         # ||mean|| / ||G||; averaging projects, so it is the cosine between them, too


@dataclass(frozen=True)
class Grouping(GradientRule):
    """Replace each row of a dense weight's gradient by its group's mean, before the optimizer sees it: v1, v2.

    mode "baseline": never (what script v1 does if not told otherwise).  "grouped": at `threshold`.  "coarse-to-fine" (what
    script v2 does if not told otherwise): at the threshold of the first of `stages` (until, threshold) that is not over,
    and not at all after the last.  `until` counts optimizer steps; below 1 it is a fraction of the run's epochs, and the
    stage ends with the first epoch that begins at or after it.
    Only every `every`-th batch of an epoch, from its first; `epoch` is its number of steps.
    `order` of the starters: "index" (v1), "norm" (v2), or "random" (ours, to see how much the order decides).
    """

    mode: Literal["baseline", "grouped", "coarse-to-fine"] = "grouped"
    threshold: Share = 0.9                                          # scripts v1, v2
    stages: tuple[tuple[NonNegative, Share], ...] = ((938, 0.7), (1876, 0.85))      # script v1: 2 epochs of 469 steps each
    order: Literal["index", "norm", "random"] = "index"
    every: Count = 1
    epoch: Count = 469                                              # 60,000 pictures in batches of 128
    where: tuple[str, ...] = ("fc2", "*.mlp.up")                # script v1: fc2; a GPT's `up` is the like of it (ours)
    seed: Whole = 0                                                 # of the random order

    def paced(self, factor: float) -> Grouping:
        """The same on a clock with `factor` times as many steps per epoch.  Fractions stay, and so does `every`."""
        return replace(self, epoch=max(1, round(self.epoch * factor)),
                       stages=tuple((until if until < 1 else max(1, round(until * factor)), t) for until, t in self.stages))

    def threshold_at(self, step: int, total: int | None = None) -> float | None:
        """The threshold after `step` optimizer steps of `total`; None where gradients are left alone.

        ValueError for a stage that ends at a fraction of a run whose length is not known.
        """
        if self.mode == "baseline" or step % self.epoch % self.every:
            return None
        if self.mode == "grouped":
            return self.threshold
        for until, threshold in self.stages:
            if until < 1 and total is None:
                raise ValueError(f"Grouping: stage ({until}, {threshold}) ends at a fraction of the run, whose length "
                                 "is not known; give RankAdapter total_steps, or the stage a number of steps.")
            if (step // self.epoch < total / self.epoch * until) if until < 1 else step < until:
                return threshold
        return None

    def labels(self, G: Tensor, threshold: float, step: int = 0) -> Tensor:
        """(m, n) -> (m,)."""
        order = by_norm(G) if self.order == "norm" else by_index(len(G)) if self.order == "index" else \
            by_chance(len(G), self.seed + step)                     # (m,)
        return groups(similarity(G), order, threshold)

    def attach(self, adapter) -> list:
        """Average just before every optimizer step of the adapter; what it did last stands in `adapter.grouped`."""
        linears = {name: mod for name, mod in adapter.model.named_modules() if isinstance(mod, nn.Linear)}
        chosen = {name: mod for name, mod in linears.items() if any(fnmatchcase(name, p) for p in self.where)}
        if not chosen:
            raise ValueError(f"Grouping: no nn.Linear matched where={self.where}. The model has {len(linears)}"
                             + (f", the first is {next(iter(linears))!r}." if linears else "."))
        self.threshold_at(0, adapter.total_steps)                   # what it cannot say later, it says now

        @torch.no_grad()
        def average(optimizer, *_):
            threshold = self.threshold_at(adapter.steps, adapter.total_steps)
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for name, linear in chosen.items():
                G = linear.weight.grad                              # (m, n)
                if threshold is None or G is None or id(linear.weight) not in held:
                    continue
                labels = self.labels(G, threshold, adapter.steps)   # (m,)
                mean = group_mean(G, labels)                        # (m, n)
                kept = mean.norm().item() / max(G.norm().item(), 1e-30)
                adapter.grouped[name] = Grouped(adapter.steps, threshold, number_of_groups(labels),
                                                largest_group(labels), kept)
                G.copy_(mean)

        return [optimizer.register_step_pre_hook(average) for optimizer in adapter.optimizers]
