"""What cutting one layer does to the loss, and what could be said of it beforehand: the trial of notebook
15_how_much_rank.

Dims: m out_features, n in_features, r rank, k rank kept.  W = U V, h = V x (r,), d = dloss/dh (r,), H = mean of h h^T (r, r),
K = sum of d d^T per step times its loss terms (r, r), G = dloss/dW (m, n).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..estimate import loss_lost
from ..factor import core, svd_core, wide
from ..fisher import cut_along
from ..linear import LowRankLinear
from ..observe import Observer, Seen
from .data import blocks
from .loop import evaluate
from .run import Run

RANKS = (2, 4, 8, 12, 16, 24)
BATCH = 32                              # blocks at a time
BATCHES = 4                             # of training text that are shown
# what predicts the rise of the loss, and its unit; the last one is of the Fisher cut, the others of the SVD's
PREDICTORS = {"share of energy": "share", "energy": "squared weight", "output energy": "squared output",
              "loss, first order": "nats per token", "loss, second order": "nats per token",
              "Fisher importance": "nats per token"}


def show(run: Run, needs: Sequence[str], batches: int = BATCHES) -> dict[str, Seen]:
    """What an observer sees of every low-rank layer on the first batches of the training text; the sum of their gradients
    stays in `.grad`.  ValueError for a training text that is too short."""
    size = BATCH * run.config.block_size
    if len(run.corpus.train) <= batches * size:
        raise ValueError(f"damage: {batches} batches of {size} tokens, and the training text has {len(run.corpus.train)}.")
    observer = Observer(run.adapter.layers, needs, batches)
    run.model.zero_grad()
    for x, y, _ in blocks(run.corpus.train[:batches * size + 1], run.config.block_size, BATCH):
        logits = run.model(x.to(run.device))                        # (B, T, C)
        F.cross_entropy(logits.flatten(0, 1), y.to(run.device).flatten()).backward()
        observer.commit()
    return observer.close()


def expected(U: Tensor, V: Tensor, k: int, H: Tensor, K: Tensor, first: Tensor) -> dict[str, float]:
    """What five predictions say of the SVD cut to rank k; `first` is `estimate.loss_lost`, (r,).

    With s_j, p_j, z_j W's singular values and vectors: sum of s_j^2 over j > k, as a share of all and itself; the mean of
    |(W - W') x|^2, tr(D^T D H) with W - W' = D V; sum of |s_j p_j^T G z_j| over j > k; and half of tr(K E H E^T), where E is
    what the cut takes out between the factors, W - W' = U E V (K-FAC, Martens & Grosse 2015).
    """
    S, A, B = core(U, V)                                            # (r,), (r, r), (r, r)
    E = torch.eye(len(S), dtype=torch.double) - A[:, :k] @ torch.diag(1 / S[:k]) @ B[:k]        # (r, r)
    D = wide(U).cpu() @ E                                           # (m, r)
    energy = S.square()                                             # (r,)
    found = (energy[k:].sum() / energy.sum(), energy[k:].sum(), torch.trace(D @ H @ D.mT), first[k:].sum(),
             torch.trace(K @ E @ H @ E.mT) / 2)
    return dict(zip(PREDICTORS, map(float, found)))


def trial(run: Run, ranks: Sequence[int] = RANKS, tokens: int | None = None) -> list[dict]:
    """Cut one layer at a time, look at the validation loss, put the layer back: a row per layer and rank kept.

    Each row has `layer`, `k`, the rise of the loss in nats per token after the cut by the SVD (`damage`) and after the Fisher
    cut (`damage_fisher`), and what each of PREDICTORS said from training text.  tokens: of the validation text; all if None.
    The model is as it was afterwards, but for its gradients.  Cost: two evaluations per row.
    """
    moments = show(run, ("input_moment", "grad_moment"))
    firsts = {name: loss_lost(layer.U, layer.V, layer.U.grad / BATCHES) for name, layer in run.adapter.layers.items()}
    measured, rows = show(run, ("importance",)), []
    def loss():
        return evaluate(run.model, run.corpus.valid[:tokens], run.config.block_size, BATCH, run.device)
    whole = loss()
    for name, layer in run.adapter.layers.items():
        U, V, seen, felt = layer.U, layer.V, moments[name], measured[name]
        for k in [k for k in ranks if k < layer.rank]:
            row = {"layer": name, "k": k, "damage": with_factors(layer, *svd_core(U, V, k), loss) - whole}
            fisher = cut_along(U, V, k, felt.A, felt.B, felt.grams)
            row["damage_fisher"] = with_factors(layer, fisher.U, fisher.V, loss) - whole
            said = expected(U, V, k, seen.input_moment, seen.grad_moment, firsts[name])
            rows.append(row | said | {"Fisher importance": felt.importance[k:].sum().item()})
    return rows


def with_factors(layer: LowRankLinear, U: Tensor, V: Tensor, ask) -> float:
    """What `ask()` returns while a layer has these factors; then it has its own again."""
    own = layer.U, layer.V
    try:
        layer.U, layer.V = nn.Parameter(U.detach()), nn.Parameter(V.detach())
        return ask()
    finally:
        layer.U, layer.V = own
