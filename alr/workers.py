"""One process or many: what data-parallel training (torchrun) asks of the loop.

    torchrun --nproc-per-node 2 -m alr.train ...

Every process holds the whole model and sees its share of each batch.  Rank 0 (of the processes) decides about ranks (of
the layers), and alone writes files.
"""

from __future__ import annotations

import gc
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .adapt import RankAdapter, Resize
from .device import synchronize
from .watch import MOMENTS


class Workers:
    """The processes of this launch: `rank` is this one's number, `size` how many there are (1 without torchrun)."""

    def __init__(self):
        self.size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
        self.rank = int(os.environ["RANK"]) if self.size > 1 else 0
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank)) if self.size > 1 else None
        self._mine = False                              # did we open the process group?

    def start(self, device: torch.device) -> None:
        self.device = device
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            self._mine = True

    def stop(self) -> None:
        if self._mine:
            gc.collect()
            dist.destroy_process_group()
            self._mine = False

    def share(self, x: Tensor) -> Tensor:
        """This process's rows of a batch: (B, T) -> (B / size, T)."""
        return x if self.size == 1 else x[self.rank::self.size]

    def total(self, x: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as the loop calls it.  Wrap again after a resize: DDP holds on to the parameters it has seen."""
        if self.size == 1:
            return model
        gc.collect()                                    # a dead wrapper's hooks must be gone before new ones are made
        ids = None if self.device.type == "cpu" else [self.device.index]
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def follow(self, adapter: RankAdapter, device: torch.device) -> None:
        """Let process 0 decide for all: from now on `adapter.adapt` makes its ranks, factors and moments everybody's.

        Each process could decide for itself, but rounding or a random start would one day make two of them differ.
        """
        if self.size == 1 and device.type == "cpu":
            return
        decide = adapter.adapt

        def together() -> list[Resize]:
            synchronize(device)                         # what the device still has to do is not adaptation's time
            if self.size == 1:
                return decide()
            for layer in adapter.layers.values():       # each process has watched its share of the batch
                for moment in (getattr(layer, name, None) for name in MOMENTS):
                    if moment is not None:
                        self.total(moment).div_(self.size)
            said = [(decide(), adapter.memory) if self.rank == 0 else None]
            dist.broadcast_object_list(said, 0, device=device)
            events, memory = said[0]
            if self.rank > 0:
                adapter.resize({event.layer: event.new for event in events})
                adapter.memory = memory
            if events:
                self._spread(adapter)
            return events

        adapter.adapt = together

    def _spread(self, adapter: RankAdapter) -> None:
        for p in adapter.model.parameters():
            dist.broadcast(p.data, 0)
        for optimizer in adapter.optimizers:
            for group in optimizer.param_groups:
                for state in (optimizer.state.get(p, {}) for p in group["params"]):
                    for key, moment in state.items():
                        if isinstance(moment, Tensor) and moment.dim():         # step counts are the same everywhere
                            state[key] = moment.contiguous()
                            dist.broadcast(state[key], 0)
