"""The loop itself: steps, epochs, validation, the end; what `train` runs and an interrupt may cut.

Dims: B sequences, T tokens, C vocabulary size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..adapt import Resize
from ..causal import evaluating
from ..group import average_gradients
from ..rules import product_decay_
from ..state import place_of
from .config import Diverged
from .data import IGNORE, SPLITS, Batches, blocks
from .device import autocast, forget_peak_memory, peak_memory_mb, synchronize
from .log import seed_line
from .model import count_parameters
from .optimizers import OPTIMIZERS
from .processes import Workers
from .run import Run
from .stop import Stop


def evaluate(model: nn.Module, tokens: Tensor, block: int, batch: int, device: torch.device | str = "cpu",
             dtype: torch.dtype | None = None) -> float:
    """Mean loss of a model (B, T) -> (B, T, C) over every target of a split, in nats per token.

    In eval mode, with no gradient and no random number; the model is left in the mode it was in.  dtype: of autocast.
    """
    total, n = _nats(model, tokens, block, batch, torch.device(device), dtype)
    return total.item() / n


def _nats(model, tokens, block, batch, device, dtype, rank=0, size=1) -> tuple[Tensor, int]:
    """(sum of the losses of every `size`-th batch from `rank` on, targets of the whole split)."""
    total = torch.zeros((), device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
    targets = 0
    with evaluating(model):
        for i, (x, y, n) in enumerate(blocks(tokens, block, batch)):
            targets += n
            if i % size == rank:
                with autocast(device, dtype):
                    logits = model(x.to(device))                                    # (B, T, C)
                total += F.cross_entropy(logits.float().flatten(0, 1), y.to(device).flatten(), ignore_index=IGNORE,
                                         reduction="sum")
    return total, targets


class Loop:
    """The steps, epochs and end of one run."""

    def __init__(self, run: Run, workers: Workers, callback: Callable[[Run], None] | None = None,
                 quiet: bool = False):
        self.run, self.workers, self.callback = run, workers, callback
        self.between_steps, self.agreed = True, workers.size == 1
        self.mark = time.perf_counter()
        forget_peak_memory(run.device)
        self.train, self.valid, self.test = (getattr(run.corpus, split).to(run.device) for split in SPLITS)
        # disable=False would override TQDM_DISABLE, so nothing is said unless it is True
        self.bar = tqdm(total=run.config.steps, initial=run.step, desc=run.recipe.name, unit="step", dynamic_ncols=True,
                        **({"disable": True} if quiet or workers.rank else {}))
        self.logged = (run.step, run.seconds["work"])   # when the last `step` line was written
        self.saved = time.monotonic()                   # when the last checkpoint was

    @property
    def whole(self) -> bool:
        """Is the state, now, one that a checkpoint can hold, and do all processes stand at the same step?"""
        return self.between_steps and self.agreed

    def lap(self, kind: str) -> None:
        """Book the time since the last call."""
        now = time.perf_counter()
        self.run.seconds[kind] += now - self.mark
        self.mark = now

    def go(self, stop: Stop) -> None:
        run, c = self.run, self.run.config
        batches = Batches(self.train, c.block_size, c.batch_size, c.seed)
        self.mark = time.perf_counter()
        run.model.train()
        while True:
            if run.step == (run.epoch + 1) * c.steps_per_epoch:
                with stop.now():
                    loss, val = self.mean(run.running) / c.steps_per_epoch, self.validate()
                self.epoch(loss, val)
            if run.step == c.steps:
                break
            self.between_steps = False
            self.step(*batches[run.step])
            self.between_steps = True
            if self.callback is not None:
                self.lap("work")
                self.callback(run)
                self.lap("other")
            self.bar.update()
            asked, late = self.wishes(stop)
            if asked:
                self.agreed = True
                raise KeyboardInterrupt
            if not self.ends_epoch and (late or c.save_steps and run.step % c.save_steps == 0):
                self.lap("work")
                self.save()
        with stop.now():
            losses = self.final()
        self.end(*losses)

    def wishes(self, stop: Stop) -> tuple[bool, bool]:
        """(has somebody asked this run to stop, is a checkpoint due by the clock).

        Several processes must agree; they do where they wait for each other anyway, at the steps that are logged.
        """
        run, c = self.run, self.run.config
        late = c.save_minutes is not None and time.monotonic() - self.saved >= 60 * c.save_minutes
        if self.workers.size == 1:
            return stop.asked, late
        if run.step % c.log_every and run.step % c.steps_per_epoch:
            return False, False
        told = self.workers.total(torch.tensor([float(stop.asked), float(late)], device=run.device)).tolist()
        return told[0] > 0, told[1] > 0

    def step(self, x: Tensor, y: Tensor) -> None:
        run, c = self.run, self.run.config
        rate = c.rate(run.step)
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate
        x, y = self.workers.share(x), self.workers.share(y)                         # (B, T), (B, T)
        for optimizer in run.optimizers:                # what none of them holds (`state.Stale`) is not zeroed
            optimizer.zero_grad(set_to_none=True)
        with autocast(run.device, run.dtype):
            loss = F.cross_entropy(run.model(x).flatten(0, 1), y.flatten())
        loss.backward()
        average_gradients(run.model)
        due, norm = (run.step + 1) % c.log_every == 0, None
        if c.grad_clip is not None:
            norm = nn.utils.clip_grad_norm_(self.trained(), c.grad_clip)
        elif due:
            norm = nn.utils.get_total_norm([p.grad for p in self.trained() if p.grad is not None])
        events = self.decide() if run.recipe.when == "before" else []
        for optimizer in run.optimizers:
            optimizer.step()
        if c.decay == "product" and "pairs_lr" not in OPTIMIZERS[c.optimizer].reads:   # those decay it themselves
            self.decay_products()
        run.step += 1
        run.running += loss.detach()                    # stays on the device: reading it would make the host wait
        if run.recipe.when == "after" or run.recipe.when == "validated" and not self.ends_epoch:
            events = self.decide()
        self.tell(events)
        if due:
            self.report(loss.detach(), norm, c.lr * rate)

    def decay_products(self) -> None:
        """Decay W = U V of every low-rank layer at the rate of its factors; not where no optimizer holds them (`Stale`)."""
        for layer in self.run.adapter.layers.values():
            place = place_of(self.run.optimizers, layer.U)
            if place is not None:
                product_decay_(layer, place[1]["lr"] * self.run.config.weight_decay)

    @property
    def ends_epoch(self) -> bool:
        """Has the step that was taken last ended an epoch?"""
        return self.run.step == (self.run.epoch + 1) * self.run.config.steps_per_epoch

    def trained(self) -> list[nn.Parameter]:
        """The model's parameters without those that `Stale` has left behind, whose gradients are sums of many steps."""
        layers = self.run.adapter.layers
        stale = {id(p) for name in self.run.adapter.stale for p in (layers[name].U, layers[name].V)}
        return [p for p in self.run.model.parameters() if id(p) not in stale]

    def tell(self, events: list[Resize]) -> None:
        for event in events:
            self.run.writer.write("resize", **event._asdict())

    def decide(self, val_loss: float | None = None) -> list[Resize]:
        """The adapter's turn.  It hears of a validation loss with the step after it, or with that step (`val_loss`)."""
        run = self.run
        if run.recipe.due(run.adapter.steps + 1):
            synchronize(run.device)                     # what the device still has to do is not adaptation's time
        if val_loss is None and run.recipe.when != "validated" and run.adapter.steps == run.epoch * run.config.steps_per_epoch:
            val_loss = run.val_loss
        try:
            return run.adapter.step(val_loss)
        except (ValueError, ArithmeticError, RuntimeError) as error:
            self.check(run.running.item())              # an estimate of weights that have diverged: say that instead
            if isinstance(error, torch.linalg.LinAlgError):
                raise FloatingPointError(f"the weights of a layer have no decomposition any more by step {run.step} "
                                         f"({run.recipe.name}). Lower the learning rate.") from error
            raise

    def report(self, loss: Tensor, norm: Tensor, lr: float) -> None:
        run, c = self.run, self.run.config
        loss, norm, running = torch.stack([self.workers.total(loss.clone()) / self.workers.size, norm.to(loss),
                                           run.running]).tolist()
        self.check(running, norm)
        self.lap("work")
        steps, seconds = run.step - self.logged[0], run.seconds["work"] - self.logged[1]
        self.logged = (run.step, run.seconds["work"])
        speed = steps * c.batch_size * c.block_size / seconds
        run.writer.write("step", step=run.step, loss=loss, lr=lr, grad_norm=norm, tokens_per_s=round(speed, 1))
        ranks = run.adapter.ranks.values()
        shown = {"loss": f"{loss:.3f}"} | ({"val": f"{run.val_loss:.3f}"} if run.val_loss is not None else {})
        shown |= {"rank": f"{min(ranks)}-{max(ranks)}"} if ranks else {}
        self.bar.set_postfix(shown | {"tok/s": f"{speed:,.0f}"}, refresh=False)

    def check(self, *numbers: float) -> None:
        if not all(map(math.isfinite, numbers)):
            run = self.run
            raise Diverged(f"the loss or its gradient is not finite any more by step {run.step} ({run.recipe.name}, lr "
                           f"{run.config.lr:g}). Lower {{lr}}, add {{warmup_steps}}, or set {{grad_clip}} 1.")

    def mean(self, x: Tensor) -> float:
        """A scalar's mean over the processes."""
        return self.workers.total(x.clone()).item() / self.workers.size

    def nats(self, tokens: Tensor) -> float:
        """`evaluate`, with the work shared among the processes."""
        run, c = self.run, self.run.config
        total, n = _nats(run.model, tokens, c.block_size, c.batch_size, run.device, run.dtype, self.workers.rank,
                         self.workers.size)
        return self.workers.total(total.clone()).item() / n

    def validate(self) -> float:
        self.lap("work")
        limit = self.run.config.eval_tokens
        loss = self.nats(self.valid if limit is None else self.valid[:limit + 1])
        self.lap("evaluation")
        return loss

    def epoch(self, train_loss: float, val_loss: float) -> None:
        """The end of an epoch.  Where the recipe decides after validation (script v9), val_loss is of the model before."""
        run = self.run
        self.check(train_loss, val_loss)
        if run.recipe.when == "validated":
            self.between_steps = False
            self.tell(self.decide(val_loss))
            self.between_steps = True
            self.lap("work")
        run.epoch, run.val_loss, run.running = run.epoch + 1, val_loss, torch.zeros_like(run.running)
        ranks = list(run.adapter.ranks.values())
        line = run.writer.write(
            "epoch", epoch=run.epoch, step=run.step, train_loss=train_loss, val_loss=val_loss,
            rank_min=min(ranks, default=None), rank_max=max(ranks, default=None),
            rank_avg=sum(ranks) / len(ranks) if ranks else None, ranks=ranks,
            params_millions=count_parameters(run.model)["total"] / 1e6,
            time_sec=round(run.seconds["work"] - run.spent, 3))
        if run.seed_log.path is not None:
            run.seed_log.add(seed_line(line))
        run.spent = run.seconds["work"]
        self.save()

    def save(self) -> None:
        each = self.workers.gather(self.run.own()) if self.workers.size > 1 else None
        if self.workers.rank == 0:
            self.run.save(each)
        self.saved = time.monotonic()
        self.lap("other")

    def final(self) -> tuple[float, float | None]:
        """Losses over the splits, or as much of them as `end_tokens` says: (validation, test or None)."""
        run, end = self.run, self.run.config.end_tokens
        self.lap("other")
        valid, test = (split if end is None else split[:end + 1] for split in (self.valid, self.test))
        limit = run.config.eval_tokens
        same = len(valid) == len(self.valid if limit is None else self.valid[:limit + 1])
        moved = run.recipe.when == "validated" and run.recipe.due(run.step)     # after the last validation
        val = run.val_loss if same and not moved else self.nats(valid)
        test = self.nats(test) if run.config.test and len(test) > 1 else None
        self.lap("evaluation")
        return val, test

    def end(self, val: float, test: float | None) -> None:
        run, c = self.run, self.run.config
        self.check(val, test or 0.0)
        work, adaptation = run.seconds["work"], run.adapter.seconds
        def three(split, loss):
            if loss is None:
                return {f"{split}_loss": None, f"{split}_ppl": None, f"{split}_bpb": None}
            return {f"{split}_loss": loss, f"{split}_ppl": math.exp(loss) if loss < 700 else None,
                    f"{split}_bpb": run.corpus.bits_per_byte(loss, {"val": "valid"}.get(split, split))}
        run.writer.end(
            step=run.step, train_loss=next(x["train_loss"] for x in reversed(run.log) if x["kind"] == "epoch"),
            **three("val", val), **three("test", test), params=count_parameters(run.model), ranks=run.adapter.ranks,
            shapes={name: [x.out_features, x.in_features] for name, x in run.adapter.layers.items()},
            seconds={"training": round(work - adaptation, 3), "evaluation": round(run.seconds["evaluation"], 3),
                     "adaptation": round(adaptation, 3)},
            tokens_per_s=round(c.steps * c.batch_size * c.block_size / work, 1),
            peak_memory_mb=peak_memory_mb(run.device), resumed=run.resumed)
        self.save()
